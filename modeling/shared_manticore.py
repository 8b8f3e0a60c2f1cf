"""The shared space of several blocks, or of mixed embeddings: projectors into it and out of it, and running in it.

In the notation of mixing_manticore:

    u_k = (1 - g) * in_sk(h) + g * resize(h, d_k)        o_k = (1 - g) * out_sk(v_k) + g * resize(v_k, d)

with g = alpha_sk for gate="alpha" (the paper) and g = 0 for gate="none".
"""

import math

import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_manticore import ManticoreError
from .mixing_manticore import resize
from .mixture_manticore import weighted_sum
from .running_manticore import Pass, active_in, mix_native, mixture_rows, native_inputs


class LinearProjector(nn.Linear):
    """The paper's projector: an affine map [..., width_in] -> [..., width_out]."""

    def reset(self, kind):
        if kind == "default":
            _framework_init(self)
        else:
            init.eye_(self.weight)
            init.zeros_(self.bias)


class MLPProjector(nn.Module):
    """`resize(x) + W2 gelu(W1 x)`: two layers with a skip that pads or truncates where the widths differ.

    (Without the skip at unequal widths the identity initialisation would start from nothing.)
    """

    def __init__(self, width_in, width_out):
        super().__init__()
        self.up = nn.Linear(width_in, max(width_in, width_out))
        self.down = nn.Linear(max(width_in, width_out), width_out)

    def forward(self, states):
        return resize(states, self.down.out_features) + self.down(F.gelu(self.up(states)))

    def reset(self, kind):
        _framework_init(self.up)
        _framework_init(self.down)
        if kind != "default":
            init.zeros_(self.down.weight)
            init.zeros_(self.down.bias)


class Resize(nn.Module):
    """No parameters: pad or truncate (the ablation, and the reference component's own maps)."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.width = width_out

    def forward(self, states):
        return resize(states, self.width)

    def reset(self, kind):
        pass


PROJECTORS = {"linear": LinearProjector, "mlp": MLPProjector, "none": Resize}


def _framework_init(linear):
    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(linear.in_features)
    init.uniform_(linear.bias, -bound, bound)


def projector_width(projector):
    """Output width of a projector."""
    if isinstance(projector, nn.Sequential):
        return projector_width(projector[-1])
    if isinstance(projector, Resize):
        return projector.width
    return projector.down.out_features if isinstance(projector, MLPProjector) else projector.out_features


# ---- steps of a mixer ------------------------------------------------------------------------------------------------


def add_projectors(mixer, config, widths_in, widths, widths_out):
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


def enter(mixer, block, name, shared, alpha):
    """Shared state [batch, time, d] -> what component `name` reads in `block` [batch, time, d_k]."""
    return gated(mixer, mixer.into[f"{name}-{block}"], shared, alpha)


def leave(mixer, block, name, state, alpha):
    """Component state [batch, time, d_k] -> shared space [batch, time, d]."""
    return gated(mixer, mixer.out_of[f"{name}-{block}"], state, alpha)


def gated(mixer, projector, states, alpha):
    """(1 - g) * projector(states) + g * resize(states), with the gate g of a mixer and a block's alpha."""
    gate = alpha if mixer.gate == "alpha" else 0.0
    width = projector_width(projector)
    if isinstance(gate, float) and gate == 1.0:
        return resize(states, width)
    raw = states
    parameter = next(projector.parameters(), None)
    if parameter is not None and parameter.is_floating_point():
        # Some components keep their state in float32 whatever their weights are (Mamba's residual_in_fp32)
        states = states.to(parameter.dtype)
    if isinstance(gate, float) and gate == 0.0:
        return projector(states)
    return (1 - gate) * projector(states) + gate * resize(raw, width)


# ---- running ---------------------------------------------------------------------------------------------------------


def run_all(model, inputs, weights, shared):
    """All components in every block, as their mixture weights say; the states are mixed after each block."""
    config, mixer, segments = model.config, model.hybrid_mixer, model.segments
    native, last = config.embeddings == "native", config.num_blocks - 1
    own = native_inputs(model, inputs, weights[0]) if native else None
    state = None if native else mixed_inputs(model, inputs)
    boundaries = [state if own is None else mix_native(model, weights[0], own)] if inputs.keep else []
    for block in range(config.num_blocks):
        active, states = active_in(model, weights[block]), {}
        for name, weight in active.items():
            if native and block == 0:
                entering = own[name]
            else:
                entering = mixer(enter, block, name, state, weight)
            states[name] = segments.segment(name, block)(entering, *inputs.around(name, block))
        if native and block == last:
            state = mix_native(model, weights[block], states) if shared or inputs.keep else None
        else:
            left = [mixer(leave, block, n, states[n], w) for n, w in active.items()]
            state = weighted_sum(list(active.values()), left)
        if inputs.keep:
            boundaries.append(state)
    return Pass(states, weights, state, tuple(boundaries) if inputs.keep else None)


def mix_embeddings(model, input_ids):
    """h_0 = sum_k alpha_1k * pad(E_k[x], d): [batch, time, d]."""
    active = active_in(model, mixture_rows(model)[0])
    own = model.together([model.embed(name, input_ids) for name in active])
    return weighted_sum(list(active.values()), [resize(one, model.config.hidden_size) for one in own])


def mixed_inputs(model, inputs):
    """h_0 [batch, time, d], which all first segments read where embeddings are mixed."""
    state = mix_embeddings(model, inputs.ids) if inputs.embeds is None else inputs.embeds
    if state.shape[-1] != model.config.hidden_size:
        width = model.config.hidden_size
        raise ManticoreError(f"inputs_embeds has width {state.shape[-1]}; this hybrid's is {width}.")
    return state
