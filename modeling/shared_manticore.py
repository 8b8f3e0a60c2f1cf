"""The shared space of several blocks, or of mixed embeddings: all components run in every block and are mixed there."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_manticore import ManticoreConfig, ManticoreError
from .mixing_manticore import HybridMixer, resize
from .mixture_manticore import weighted_sum
from .projectors_manticore import PROJECTORS, Resize, gated
from .running_manticore import Inputs, Pass, active_in, mix_native, mixture_rows, native_inputs


def add_projectors(mixer: nn.Module, config: ManticoreConfig, widths_in: dict, widths: dict, widths_out: dict) -> None:
    """Makes the projectors of a soft hybrid's mixer; arguments as in `HybridMixer`."""
    native, blocks = config.embeddings == "native", config.num_blocks
    for name in mixer.names:
        reference = config.gate == "none" and name == config.reference_component
        make = Resize if reference else PROJECTORS[config.projector]
        for block in range(blocks):
            first, last = block == 0, block == blocks - 1
            if not (native and first):
                mixer.into[f"{name}-{block}"] = make(mixer.width, widths_in[name] if first else widths[name])
            if not (native and last):
                mixer.out_of[f"{name}-{block}"] = make(widths_out[name] if last else widths[name], mixer.width)


def enter(mixer: HybridMixer, block: int, name: str, shared: Tensor, alpha: float | Tensor) -> Tensor:
    """Shared state [batch, time, d] -> what component `name` reads in `block` [batch, time, d_k]."""
    return gated(mixer, mixer.into[f"{name}-{block}"], shared, alpha)


def leave(mixer: HybridMixer, block: int, name: str, state: Tensor, alpha: float | Tensor) -> Tensor:
    """Component state [batch, time, d_k] -> shared space [batch, time, d]."""
    return gated(mixer, mixer.out_of[f"{name}-{block}"], state, alpha)


# ---- running ---------------------------------------------------------------------------------------------------------


def run_all(model: PreTrainedModel, inputs: Inputs, weights: list, shared: bool) -> Pass:
    """All components in every block, as their mixture weights say; the states are mixed after each block."""
    config, mixer, segments = model.config, model.hybrid_mixer, model.segments
    native, last = config.embeddings == "native", config.num_blocks - 1
    own = native_inputs(model, inputs, weights[0]) if native else None
    state = None if native else mixed_inputs(model, inputs)
    boundaries = [state if own is None else mix_native(model, weights[0], own)] if inputs.keep else []
    for block in range(config.num_blocks):
        active, states = active_in(model, weights[block]), {}
        for name, weight in active.items():
            entering = own[name] if native and block == 0 else mixer(enter, block, name, state, weight)
            states[name] = segments.segment(name, block)(entering, *inputs.around(name, block))
        if native and block == last:
            state = mix_native(model, weights[block], states) if shared or inputs.keep else None
        else:
            left = [mixer(leave, block, n, states[n], w) for n, w in active.items()]
            state = weighted_sum(list(active.values()), left)
        if inputs.keep:
            boundaries.append(state)
    return Pass(states, weights, state, tuple(boundaries) if inputs.keep else None)


def mix_embeddings(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """h_0 = sum_k alpha_1k * pad(E_k[x], d): [batch, time, d]."""
    active = active_in(model, mixture_rows(model)[0])
    own = model.together([model.embed(name, input_ids) for name in active])
    return weighted_sum(list(active.values()), [resize(one, model.config.hidden_size) for one in own])


def mixed_inputs(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """h_0 [batch, time, d], which all first segments read where embeddings are mixed."""
    state = mix_embeddings(model, inputs.ids) if inputs.embeds is None else inputs.embeds
    if state.shape[-1] != model.config.hidden_size:
        width = model.config.hidden_size
        raise ManticoreError(f"inputs_embeds has width {state.shape[-1]}; this hybrid's is {width}.")
    return state
