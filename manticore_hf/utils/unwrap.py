"""The hybrid inside what wraps it."""


def hybrid_of(model):
    """The hybrid inside whatever wraps it (accelerate, DDP, PEFT), or None."""
    # By name: loaded as remote code, its class is of another copy of the files.
    names = ((module, {cls.__name__ for cls in type(module).__mro__}) for module in model.modules())
    return next((module for module, bases in names if "ManticoreModel" in bases), None)
