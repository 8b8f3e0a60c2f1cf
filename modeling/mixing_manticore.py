"""Projectors, mixture weights and token gate: the only parameters a hybrid adds to its components.

Notation of Roberts et al. (arXiv 2406.00894), section 3: component k has width d_k, the shared space width
d = max d_k, block s has mixture weights alpha_s on the simplex.

    u_k = (1 - g) * in_sk(h) + g * resize(h, d_k)        o_k = (1 - g) * out_sk(v_k) + g * resize(v_k, d)

with g = alpha_sk for gate="alpha" (the paper) and g = 0 for gate="none".
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .devices_manticore import device_of, onloaded, place
from .mixture_manticore import PAST, widen, without_autocast


def resize(states, width):
    """Truncates or zero-pads the last dimension to `width`."""
    have = states.shape[-1]
    if have == width:
        return states
    return states[..., :width] if have > width else F.pad(states, (0, width - have))


def whole(tensor):
    """A tensor with all its values: one that FSDP2 has sharded is gathered, which all processes must do at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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


class Float32Linear(nn.Linear):
    """An affine map that is kept and computed in float32, whatever it is given.

    As a module of its own, called as such, so that whatever hooks into modules (sharding) finds its weight.
    """

    def __init__(self, width_in, width_out):
        super().__init__(width_in, width_out, dtype=torch.float32)

    def forward(self, states):
        weight = widen(self.weight)
        return F.linear(states.to(weight.dtype), weight, self.bias.to(weight.dtype))


class TokenGate(nn.Module):
    """Output mixture that depends on the token: w_t = softmax(W f_t + b), zero at the start (the plain ensemble).

    f_t holds, of each component, the last state divided by its root mean square, and, detached, the entropy (nats) and
    the largest log-probability of its own prediction.
    """

    def __init__(self, widths):
        super().__init__()
        self.linear = Float32Linear(sum(widths) + 2 * len(widths), len(widths))

    def reset(self):
        init.zeros_(self.linear.weight)
        init.zeros_(self.linear.bias)

    def forward(self, *given):
        """states: K x [batch, time, d_k]; sureness: K x [batch, time, 2] -> [batch, time, K], summing to 1."""
        with without_autocast(given[0][0].device.type):
            return self.scores(*given).softmax(-1)

    def scores(self, states, sureness):
        features = []
        for state, one in zip(states, sureness):
            state = widen(state)
            features += [state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6), one]
        return self.linear(torch.cat(features, -1))


class HybridMixer(nn.Module):
    """All projectors, the mixture weights and the gate, in one module with a forward.

    One module, so that PEFT's `modules_to_save=["hybrid_mixer"]` and FSDP see them. Its steps are run through `forward`
    for the same reason: shards are gathered, and offloaded weights brought, by hooks on a module's call.

    Args:
        config: A ManticoreConfig.
        widths_in: Width of the state each component's first segment reads, by name (its embeddings).
        widths: Width of each component's hidden states.
        widths_out: Width of the state its head reads.
    """

    def __init__(self, config, widths_in, widths, widths_out):
        super().__init__()
        self.names = config.component_names
        self.width = config.hidden_size
        self.gate = config.gate
        self.projector_init = config.projector_init
        blocks, count = config.num_blocks, len(self.names)
        # Float32 whatever the rest is: in half precision most steps of training would round to nothing.
        self.alpha_logits = nn.Parameter(torch.zeros(blocks, count, dtype=torch.float32))
        self.noise, self.temperature, self.holds_alpha = None, 1.0, False
        self.into, self.out_of, self.across = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        native, self.token_gate = config.embeddings == "native", None
        if config.route is not None:
            self._only_the_route(config, widths_in, widths, widths_out, native)
            return
        for name in self.names:
            reference = config.gate == "none" and name == config.reference_component
            make = Resize if reference else PROJECTORS[config.projector]
            for block in range(blocks):
                first, last = block == 0, block == blocks - 1
                if not (native and first):
                    self.into[f"{name}-{block}"] = make(self.width, widths_in[name] if first else widths[name])
                if not (native and last):
                    self.out_of[f"{name}-{block}"] = make(widths_out[name] if last else widths[name], self.width)
        gate = PAST["gate"] if config.gate_past_losses and config.mixture == "token" else TokenGate
        self.token_gate = gate([widths_out[n] for n in self.names]) if config.mixture == "token" else None

    def _only_the_route(self, config, widths_in, widths, widths_out, native):
        route, last = config.route, config.num_blocks - 1
        del self.alpha_logits
        zeros = torch.zeros(config.num_blocks, len(self.names), dtype=torch.float32)
        self.register_buffer("alpha_logits", zeros)  # kept for the record
        for block, (name, after) in enumerate(zip(route, route[1:]), 1):
            if name != after:
                self.across[str(block)] = make_crossing(config, name, after, widths)
        if not native:
            for kept, name, block, sizes in (
                (self.into, route[0], 0, (self.width, widths_in[route[0]])),
                (self.out_of, route[-1], last, (widths_out[route[-1]] or widths[route[-1]], self.width)),
            ):
                reference = config.gate == "none" and name == config.reference_component
                kept[f"{name}-{block}"] = (Resize if reference else PROJECTORS[config.projector])(*sizes)

    def forward(self, step, *args):
        """Runs one step: one of the methods below, as `mixer(HybridMixer.enter, block, name, shared, alpha)`."""
        return step(self, *place(args, device_of(self)))

    def weights(self):
        """alpha = softmax(a): [S, K], in float32; a search may add noise and a temperature while training."""
        if self.noise is not None and self.training:
            return ((widen(self.alpha_logits) + self.noise) / self.temperature).softmax(-1)
        return self.weights_without_noise()

    def weights_without_noise(self):
        """softmax(a), whatever noise a search adds; without gradient where it holds alpha."""
        logits = self.alpha_logits.detach() if self.holds_alpha and self.training else self.alpha_logits
        return widen(logits).softmax(-1)

    def enter(self, block, name, shared, alpha):
        """Shared state [batch, time, d] -> what component `name` reads in `block` [batch, time, d_k]."""
        return self._gated(self.into[f"{name}-{block}"], shared, alpha)

    def leave(self, block, name, state, alpha):
        """Component state [batch, time, d_k] -> shared space [batch, time, d]."""
        return self._gated(self.out_of[f"{name}-{block}"], state, alpha)

    def cross(self, block, state):
        """A pruned hybrid's state [batch, time, d_j] -> what the component of `block` reads [batch, time, d_k]."""
        return self._gated(self.across[str(block)], state, 0.0)

    def gate_tokens(self, *given):
        """The token gate's weights [batch, time, K]; see `TokenGate`.

        They stand for the last block's row of alpha.
        """
        return self._touched(self.token_gate(*given), self.alpha_logits)

    def gate_rest(self):
        """The part of the token gate that does not depend on the token, softmax(b): [K], in float32."""
        linear = self.token_gate.linear
        with onloaded(linear):
            unused = [one for one in self.token_gate.parameters() if one is not linear.bias]
            return self._touched(widen(linear.bias).softmax(-1), self.alpha_logits, *unused)

    def _touched(self, weights, *unused):
        """Mixture weights, with gradients of zero for what they replace: DDP stops at a parameter without one."""
        trained = [one.sum() for one in unused if one.requires_grad and self.training and one.numel()]
        return weights + 0.0 * sum(trained) if trained else weights

    def _gated(self, projector, states, alpha):
        gate = alpha if self.gate == "alpha" else 0.0
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

    def reset(self):
        """(Re-)initialises everything; called by the model's `_init_weights`."""
        init.zeros_(self.alpha_logits)
        for projector in (*self.into.values(), *self.out_of.values(), *self.across.values()):
            projector.reset(self.projector_init)
        if self.token_gate is not None:
            self.token_gate.reset()


class Chain(nn.Sequential):
    """Two projectors in a row, where they cannot be one (MLPs)."""

    def reset(self, kind):
        for projector in self:
            projector.reset(kind)


def make_crossing(config, name, after, widths):
    """The map that takes a pruned hybrid's state from component `name` to component `after`."""
    if config.gate == "alpha" or config.projector == "none":  # at alpha = 1 the paper's projectors vanish
        return Resize(widths[name], widths[after])
    if config.projector == "linear":
        return LinearProjector(widths[name], widths[after])
    sizes = ((name, widths[name], config.hidden_size), (after, config.hidden_size, widths[after]))
    return Chain(*[(Resize if one == config.reference_component else MLPProjector)(*size) for one, *size in sizes])


def projector_width(projector):
    """Output width of a projector."""
    if isinstance(projector, Chain):
        return projector_width(projector[-1])
    if isinstance(projector, Resize):
        return projector.width
    return projector.down.out_features if isinstance(projector, MLPProjector) else projector.out_features
