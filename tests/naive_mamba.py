"""Mamba and Mamba-2 in the parametrisation and with the names of mamba_ssm, token by token, from the papers' equations.

Gu and Dao, arXiv 2312.00752 (algorithm 2, section 3.4), and Dao and Gu, arXiv 2405.21060 (section 7.1). Nothing here
calls Transformers or the code under test. `checkpoint` makes what mamba_ssm would have saved.
"""

import math

import torch


def checkpoint(layer="Mamba1", seed=0, d_model=16, n_layer=2, vocab_size=61, multiple=8, tied=True, **ssm):
    """A random checkpoint. Returns (its config.json as a dict, {name: tensor})."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=draw)

    given = {"layer": "Mamba2", **ssm} if layer == "Mamba2" else ssm
    config = {
        "d_model": d_model, "n_layer": n_layer, "vocab_size": vocab_size, "ssm_cfg": given, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": multiple,
    }  # fmt: skip
    if not tied:
        config["tie_embeddings"] = False
    rows = math.ceil(vocab_size / multiple) * multiple
    out = {"backbone.embedding.weight": random(rows, d_model), "backbone.norm_f.weight": 1 + random(d_model, scale=0.1)}
    out["lm_head.weight"] = out["backbone.embedding.weight"] if tied else random(rows, d_model)
    inner, taps = ssm.get("expand", 2) * d_model, ssm.get("d_conv", 4)
    for i in range(n_layer):
        block = {"norm.weight": 1 + random(d_model, scale=0.1)}
        if layer == "Mamba2":
            state, groups, heads = ssm.get("d_state", 128), ssm.get("ngroups", 1), inner // ssm.get("headdim", 64)
            width = inner + 2 * groups * state
            block["mixer.in_proj.weight"] = random(inner + width + heads, d_model, scale=d_model**-0.5)
            block["mixer.norm.weight"] = 1 + random(inner, scale=0.1)
            block.update({"mixer.dt_bias": random(heads), "mixer.A_log": random(heads), "mixer.D": random(heads)})
        else:
            state, width = ssm.get("d_state", 16), inner
            rank = ssm.get("dt_rank", math.ceil(d_model / 16))
            block["mixer.in_proj.weight"] = random(2 * inner, d_model, scale=d_model**-0.5)
            block["mixer.x_proj.weight"] = random(rank + 2 * state, inner, scale=inner**-0.5)
            block["mixer.dt_proj.weight"] = random(inner, rank)
            block.update({"mixer.dt_proj.bias": random(inner), "mixer.D": random(inner)})
            block["mixer.A_log"] = random(inner, state)
        block["mixer.conv1d.weight"] = random(width, 1, taps, scale=0.5)
        if ssm.get("conv_bias", True):
            block["mixer.conv1d.bias"] = random(width)
        block["mixer.out_proj.weight"] = random(d_model, inner, scale=inner**-0.5)
        if ssm.get("bias", False):
            block["mixer.in_proj.bias"] = random(len(block["mixer.in_proj.weight"]))
            block["mixer.out_proj.bias"] = random(d_model)
        out.update({f"backbone.layers.{i}.{key}": tensor for key, tensor in block.items()})
    return config, out


def forward(config, tensors, ids):
    """Logits [time, padded vocabulary] of one sequence of token ids [time]."""
    ssm = config["ssm_cfg"]
    mixer = mamba2 if ssm.get("layer") == "Mamba2" else mamba1
    state = tensors["backbone.embedding.weight"][ids]
    for i in range(config["n_layer"]):
        own = {key.split(".", 3)[3]: one for key, one in tensors.items() if key.startswith(f"backbone.layers.{i}.")}
        state = state + mixer(own, ssm, rms(state, own["norm.weight"]))
    return rms(state, tensors["backbone.norm_f.weight"]) @ tensors["lm_head.weight"].T


def rms(x, weight):
    """x / sqrt(mean(x^2)) * weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def linear(own, name, x):
    """x W^T, and the bias where there is one."""
    out = x @ own[f"mixer.{name}.weight"].T
    return out + own[f"mixer.{name}.bias"] if f"mixer.{name}.bias" in own else out


def silu(x):
    """x sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def convolve(own, x):
    """Each channel with its own causal filter; the last tap is the present."""
    filters = own["mixer.conv1d.weight"][:, 0]
    taps, out = filters.shape[1], torch.zeros_like(x)
    for t in range(len(x)):
        for back in range(min(taps, t + 1)):
            out[t] += filters[:, taps - 1 - back] * x[t - back]
    return silu(out + own.get("mixer.conv1d.bias", 0.0))


def mamba1(own, ssm, u):
    """h_t = exp(dt A) h_{t-1} + dt B_t x_t, y_t = C_t h_t + D x_t, with dt, B, C made from x_t. u: [time, d_model]."""
    x, z = linear(own, "in_proj", u).chunk(2, -1)
    x = convolve(own, x)
    a, skip = -torch.exp(own["mixer.A_log"]), own["mixer.D"]
    n = a.shape[1]
    rank = own["mixer.dt_proj.weight"].shape[1]
    made = x @ own["mixer.x_proj.weight"].T
    dt = torch.log1p(torch.exp(linear(own, "dt_proj", made[:, :rank])))
    b, c = made[:, rank : rank + n], made[:, rank + n :]
    h, out = torch.zeros_like(a), []
    for t in range(len(u)):
        h = torch.exp(dt[t, :, None] * a) * h + (dt[t] * x[t])[:, None] * b[t]
        out.append(h @ c[t] + skip * x[t])
    return linear(own, "out_proj", torch.stack(out) * silu(z))


def mamba2(own, ssm, u):
    """Scalar A per head, B and C shared by the heads of a group; the gate is applied before the norm of each group."""
    heads, groups, n = len(own["mixer.A_log"]), ssm.get("ngroups", 1), ssm.get("d_state", 128)
    inner = len(own["mixer.norm.weight"])
    width = inner // heads
    z, xbc, dt = linear(own, "in_proj", u).split([inner, inner + 2 * groups * n, heads], -1)
    xbc = convolve(own, xbc)
    low, high = ssm.get("dt_limit", (0.0, math.inf))
    dt = torch.log1p(torch.exp(dt + own["mixer.dt_bias"])).clamp(low, high)
    a, out = -torch.exp(own["mixer.A_log"]), []
    h = torch.zeros(heads, width, n)
    for t in range(len(u)):
        x, b, c = xbc[t].split([inner, groups * n, groups * n])
        x, b, c = x.view(heads, width), b.view(groups, n), c.view(groups, n)
        y = torch.empty(heads, width)
        for head in range(heads):
            group = head // (heads // groups)
            h[head] = torch.exp(dt[t, head] * a[head]) * h[head] + dt[t, head] * torch.outer(x[head], b[group])
            y[head] = h[head] @ c[group] + own["mixer.D"][head] * x[head]
        gated = (y.flatten() * silu(z[t])).view(groups, -1)
        out.append(rms(gated, own["mixer.norm.weight"].view(groups, -1)).flatten())
    return linear(own, "out_proj", torch.stack(out))
