"""Repairs of a component where Transformers is wrong."""

from .fast_mixers_manticore import carry_state, install, limit_steps
from .padding_manticore import unfuse_padded


def prepare(component):
    """Repairs what Transformers gets wrong for a component: recurrent states, limits of step sizes, and experts.

    Experts run in groups by default, which torch cannot multiply where a row of their weights is not a multiple of 16
    bytes.
    """
    experts = [tensor for name, tensor in component.named_parameters() if ".experts." in name and tensor.ndim == 3]
    if any(size * tensor.element_size() % 16 for tensor in experts for size in tensor.shape[1:]):
        component.set_experts_implementation("eager")
    install(component.config.model_type)
    carry_state(component)
    limit_steps(component)
    unfuse_padded(component)
