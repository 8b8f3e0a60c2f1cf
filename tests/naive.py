"""The hybrid's formulas (Roberts et al., arXiv 2406.00894, section 3, and the variants this package adds), spelled out.

Nothing here calls the code under test: components are run layer by layer, with masks, positions and rotary angles made
by hand, and weights are read from the hybrid's parameters by name. Slow and plain on purpose.
"""

import torch
import torch.nn.functional as F


def causal_mask(time, window=None):
    """Additive mask [1, 1, time, time]."""
    query, key = torch.arange(time)[:, None], torch.arange(time)[None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.zeros(1, 1, time, time).masked_fill(~seen, torch.finfo(torch.float32).min)


def embeddings(component, ids):
    """The component's token embeddings [batch, time, width]."""
    kind, base = component.config.model_type, component.base_model
    table = {"gpt2": "wte", "gpt_neox": "embed_in", "mamba": "embeddings", "mamba2": "embeddings"}.get(kind)
    if kind == "opt":
        return F.embedding(ids, base.decoder.embed_tokens.weight)
    return F.embedding(ids, getattr(base, table or "embed_tokens").weight)


def layers(component, state, start, stop):
    """Runs the component's layers [start, stop), with what belongs before the first and after the last one."""
    kind, base, depth = component.config.model_type, component.base_model, component.config.num_hidden_layers
    time = state.shape[1]
    mask, positions = causal_mask(time), torch.arange(time)[None]
    if kind in ("mamba", "mamba2"):
        for layer in base.layers[start:stop]:
            state = layer(state)
        return base.norm_f(state) if stop == depth else state
    if kind == "gpt2":
        if start == 0:
            state = state + base.wpe.weight[:time]
        for layer in base.h[start:stop]:
            state = _first(layer(state, attention_mask=mask))
        return base.ln_f(state) if stop == depth else state
    if kind == "opt":
        decoder = base.decoder
        if start == 0:
            if decoder.project_in is not None:
                state = state @ decoder.project_in.weight.T
            state = state + decoder.embed_positions.weight[2 : 2 + time]
        for layer in decoder.layers[start:stop]:
            state = _first(layer(state, attention_mask=mask))
        if stop == depth:
            state = decoder.final_layer_norm(state) if decoder.final_layer_norm is not None else state
            state = state @ decoder.project_out.weight.T if decoder.project_out is not None else state
        return state
    angles = _rotary(component, positions)
    for layer in base.layers[start:stop]:
        state = _first(layer(state, attention_mask=mask, position_embeddings=angles, position_ids=positions))
    if stop == depth:
        state = base.final_layer_norm(state) if kind == "gpt_neox" else base.norm(state)
    return state


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _rotary(component, positions):
    config = component.config
    width = config.hidden_size // config.num_attention_heads
    turned = int(width * config.rope_parameters.get("partial_rotary_factor", 1.0))
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, turned, 2).float() / turned)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def head(component, state):
    """The component's logits."""
    kind = component.config.model_type
    matrix = component.embed_out if kind == "gpt_neox" and hasattr(component, "embed_out") else component.lm_head
    return state @ matrix.weight.T


def fit(state, width):
    """Truncates or pads with zeros."""
    if state.shape[-1] >= width:
        return state[..., :width]
    return torch.cat([state, state.new_zeros(*state.shape[:-1], width - state.shape[-1])], -1)


def project(parameters, prefix, kind, state, width):
    """One projector: "linear", "mlp", "none", or the identity of the reference component (no parameters)."""
    if kind == "none" or not any(key.startswith(prefix + ".") for key in parameters):
        return fit(state, width)
    if kind == "linear":
        return state @ parameters[f"{prefix}.weight"].T + parameters[f"{prefix}.bias"]
    hidden = state @ parameters[f"{prefix}.up.weight"].T + parameters[f"{prefix}.up.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return fit(state, width) + hidden @ parameters[f"{prefix}.down.weight"].T + parameters[f"{prefix}.down.bias"]


def cross_entropy(logits, labels):
    """Mean over the tokens that are predicted and not -100, in nats."""
    logprobs, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    real = targets != -100
    picked = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * real).sum() / real.sum()


def forward(model, ids, labels=None, alpha=None):
    """The whole hybrid.

    Args:
        model: A ManticoreForCausalLM; only its config, components and parameters are read.
        ids: [batch, time].
        labels: [batch, time] or None.
        alpha: [S, K] fixed mixture weights; None: softmax of the parameters.

    Returns:
        Dict with logits, token weights (or None), and with labels loss, mixture_loss, component_losses.
    """
    config, names = model.config, model.config.component_names
    parts = {name: getattr(model, name) for name in names}
    own = dict(model.hybrid_mixer.named_parameters())
    fixed = alpha is not None
    if not fixed:
        alpha = own["alpha_logits"].exp() / own["alpha_logits"].exp().sum(-1, keepdim=True)
    d, blocks = max(part.config.hidden_size for part in parts.values()), config.num_blocks
    native = config.embeddings == "native"

    embedded = {name: embeddings(part, ids) for name, part in parts.items()}
    shared = sum(alpha[0, k] * fit(embedded[name], d) for k, name in enumerate(names))
    states = {}
    for s in range(blocks):
        total = 0
        for k, name in enumerate(names):
            part, d_k = parts[name], parts[name].config.hidden_size
            kind = "none" if config.gate == "none" and name == config.reference_component else config.projector
            g = alpha[s, k] if config.gate == "alpha" else 0.0
            cut = config.block_layers[name]
            start, stop = sum(cut[:s]), sum(cut[: s + 1])
            if s == 0:
                d_k = embedded[name].shape[-1]
            if native and s == 0:
                u = embedded[name]
            else:
                u = (1 - g) * project(own, f"into.{name}-{s}", kind, shared, d_k) + g * fit(shared, d_k)
            v = layers(part, u, start, stop)
            states[name] = v
            if not (native and s == blocks - 1):
                o = (1 - g) * project(own, f"out_of.{name}-{s}", kind, v, d) + g * fit(v, d)
                total = total + alpha[s, k] * o
        shared = total

    j = blocks - 1 if native or config.head_mixture == "last" else 0
    if not native:
        states = {name: fit(shared, embedded[name].shape[-1]) for name in names}
    logits = {name: head(parts[name], states[name]) for name in names}
    logprobs = [logits[name].log_softmax(-1) for name in names]
    weights = token_weights = None
    if config.mixture == "token" and not fixed:
        features = []
        for name, logprob in zip(names, logprobs):
            state, logprob = states[name], logprob.detach()
            features.append(state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt())
            features.append(-(logprob.exp() * logprob).sum(-1, keepdim=True))
            features.append(logprob.max(-1, keepdim=True)[0])
        scores = torch.cat(features, -1) @ own["token_gate.linear.weight"].T + own["token_gate.linear.bias"]
        token_weights = scores.softmax(-1)
        weights = [token_weights[..., k : k + 1] for k in range(len(names))]
    else:
        weights = [alpha[j, k] for k in range(len(names))]
    if config.mixture_space == "prob":
        mixed = sum(w * p.exp() for w, p in zip(weights, logprobs)).log()
    else:
        mixed = sum(w * p for w, p in zip(weights, logprobs))
    out = {"logits": mixed, "weights": token_weights}
    if labels is not None:
        out["mixture_loss"] = cross_entropy(mixed, labels)
        out["component_losses"] = torch.stack([cross_entropy(logits[name], labels) for name in names])
        out["loss"] = config.mix_loss_weight * out["mixture_loss"]
        out["loss"] = out["loss"] + config.component_loss_weight * out["component_losses"].sum()
    return out
