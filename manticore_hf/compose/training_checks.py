"""What would train silently wrong: PEFT's adapters in some places, and parts of rows on several devices.

A published repository's own code asks only for what state-space mixers read raw.
"""

import sys

from transformers import PreTrainedModel

from manticore_hf.modeling import mixers_manticore
from manticore_hf.modeling.bounds_manticore import ManticoreError

_WRAPS = ("base_layer", "token_adapter")  # what PEFT's wrappers of a module have


def check_whole_rows() -> None:
    """Raises ManticoreError where accelerate gives each process a part of every row."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    how = None if state is None else state._shared_state.get("parallelism_config")
    for size in ("cp_size", "sp_size"):
        if getattr(how, size, 1) > 1:
            raise ManticoreError(
                f"parallelism_config has {size}={getattr(how, size)}: each process would get a part of every row, and "
                f"recurrent states are not passed on between them. Set {size}=1 (tp_size and data parallelism work)."
            )


def check_adapted(model: PreTrainedModel) -> None:
    """Raises ManticoreError if what PEFT has wrapped would not train, merge or be saved as on a plain model."""
    mixers_manticore.check_adapted(model)
    for why in _wrong_adapters(model):
        raise ManticoreError(f"{why} Load the hybrid again, and adapt it with lora_config(model).")


def _wrong_adapters(model):
    for key, module in model.named_modules():
        norms = [one.weight for one in getattr(module, "lora_magnitude_vector", {}).values()]
        if any(one.device.type != "meta" and not one.all() for one in norms):
            yield f"DoRA divides by the norms of weights, and {key!r} has rows of zeros."
    if model.config.route is not None:
        return
    parts = {name: model.component(name) for name in model.config.component_names}
    ends = {name: (part.get_input_embeddings(), part.get_output_embeddings()) for name, part in parts.items()}
    wraps = {name: {key for key in _WRAPS for end in pair if hasattr(end, key)} for name, pair in ends.items()}
    for name, part in parts.items():
        if part.all_tied_weights_keys and wraps[name]:
            yield f"PEFT has wrapped embeddings or head of component {name!r}, which are one tensor, and not the other."
    listed = [isinstance(getattr(one, "trainable_token_indices", None), list) for one in model.peft_config.values()]
    if any(listed) and any("token_adapter" not in found for found in wraps.values()):
        yield "trainable_token_indices in a list trains the rows of one component alone, or of none."
    bare = [name for name in ends if any(end is not None and not hasattr(end, "modules_to_save") for end in ends[name])]
    if bare and model.is_resized and model.name_or_path:
        yield (
            f"The vocabulary was resized after loading, and embeddings and heads of {bare} would not be saved with the "
            "adapter. Save the resized hybrid and go on from there, or:"
        )
