"""What a hybrid's cache holds while it generates: bytes that grow with the tokens, and bytes that do not.

One layer of each kind is run once with a cache, without storage; the others hold the same.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PreTrainedModel

from manticore_hf.hub.inspection import bridge_cache, layer_memory
from manticore_hf.modeling.components_manticore import Shell
from manticore_hf.modeling.layer_stack_manticore import layer_kind, one_of_each, pick_config
from manticore_hf.plan import kernels

_SHORT = 8  # tokens that no window is shorter than


def cache_sizes(model: PreTrainedModel, tokens: int, batch: int = 1) -> dict[str, dict[str, float]]:
    """Bytes of cache of every component.

    Args:
        model: An unshortened hybrid on the meta device; its dtype is the cache's.
        tokens: Length of the sequences.
        batch: Sequences.

    Returns:
        {component: {"per_token": bytes that each token of a sequence adds (while no window is full), "constant": bytes
        of a sequence's states, "total": bytes of `batch` sequences of `tokens` tokens}}; and the same of "bridges",
        where they keep something.
    """
    out = {}
    for name in model.config.component_names:
        short, full = _run(model, name, min(_SHORT, tokens), 1), _run(model, name, tokens, batch)
        out[name] = {
            "per_token": sum(times * one["cache_bytes_per_token"] for times, one in short),
            "constant": sum(times * one["state_bytes"] for times, one in short),
            "total": sum(times * (one["cache_bytes_per_token"] * tokens + one["state_bytes"]) for times, one in full),
        }
    if each := bridge_cache(model):
        out["bridges"] = {"per_token": each, "constant": 0, "total": each * batch * tokens}
    return out


def _run(model, name, tokens, batch):
    """[(layers of a kind, what one of them holds)]."""
    component = model.component(name)
    layout = model.segments.layout(name)
    stack = component.get_submodule(layout.path)
    layers = list(getattr(stack, layout.layers))
    first = one_of_each(layers)
    kinds = [layer_kind(layer) for layer in layers]
    shell, cache = Shell(stack), DynamicCache(config=stack.config)
    kept = nn.ModuleList([layers[i] for i in first])
    shell.own = {"_modules": {**stack._modules, layout.layers: kept}, "config": pick_config(stack.config, first)}
    shell.follow()
    width = component.get_input_embeddings().weight.shape[1]
    was_training = stack.training
    stack.eval()
    try:
        with kernels.assumed("cpu"), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            hidden = torch.zeros(batch, tokens, width, device="meta", dtype=model.dtype)
            mask = torch.ones(batch, tokens, dtype=torch.long, device="meta")
            given = {layout.cache_argument: cache} if layout.cache_argument is not None else {}
            shell.module(inputs_embeds=hidden, attention_mask=mask, use_cache=True, **given)
    finally:
        stack.train(was_training)
    return [(kinds.count(kinds[i]), layer_memory([cache.layers[i]], tokens)) for i in first]
