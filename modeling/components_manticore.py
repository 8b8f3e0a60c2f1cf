"""A component as a module: built from its configuration, and repaired where Transformers is wrong."""

from .mixers_manticore import repair_mixers
from .sizes_manticore import build_component

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def build(name, config, beside=()):
    """A component's module with initial weights, of Transformers' own class.

    Args:
        name: The component's name.
        config: Its configuration.
        beside: The components that were built before it and share the machine's memory with it.

    Raises:
        ManticoreError: It cannot be built, or there is not enough memory for it.
    """
    return build_component(f"Component {name!r} ({config.model_type})", config, beside)


def prepare(component):
    """Repairs what Transformers gets wrong for a component: its state-space mixers, and experts.

    Experts run in groups by default, which torch cannot multiply where a row of their weights is not a multiple of 16
    bytes.
    """
    experts = [tensor for name, tensor in component.named_parameters() if ".experts." in name and tensor.ndim == 3]
    if any(size * tensor.element_size() % 16 for tensor in experts for size in tensor.shape[1:]):
        component.set_experts_implementation("eager")
    repair_mixers(component)
