"""PEFT's adapters that would not train, merge or be saved as on a plain model.

A published repository's own code raises for all that would be wrong silently, once: as the first adapter is added.
"""

from transformers import PreTrainedModel

from manticore_hf.modeling import dtypes_manticore, mixers_manticore
from manticore_hf.modeling.bounds_manticore import ManticoreError


def check_adapted(model: PreTrainedModel) -> None:
    """Raises ManticoreError if what PEFT has wrapped would not train, merge or be saved as on a plain model."""
    mixers_manticore.check_adapted(model)
    check_magnitudes(model)
    dtypes_manticore.check_adapted(model)


def check_magnitudes(model: PreTrainedModel) -> None:
    """Raises ManticoreError if DoRA would divide by zero; a repository's own code does not look at this."""
    for key, module in model.named_modules():
        norms = [one.weight for one in getattr(module, "lora_magnitude_vector", {}).values()]
        if any(one.device.type != "meta" and not one.all() for one in norms):
            raise ManticoreError(
                f"DoRA divides by the norms of weights, and {key!r} has rows of zeros. Load the hybrid again, and "
                "adapt it with lora_config(model)."
            )
