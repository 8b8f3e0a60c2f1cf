"""The selective scan's naive twin, inputs for it, and tiny models that scan; shared by the tests of the scan."""

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from manticore_hf.modeling.components_manticore import cache_argument
from manticore_hf.modeling.mixers_manticore import OwnForward
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from manticore_hf.families.tiny import tokens

BATCH, D, N, TIME = 2, 5, 3, 37
SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
CONFIGS = {
    "mamba": {"state_size": 4, "expand": 2, "time_step_rank": 2},
    "falcon_mamba": {"state_size": 4, "expand": 2, "time_step_rank": 2},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
}
SCANNING = ("mamba", "falcon_mamba", "jamba")


def naive_scan(u, dt, A, B, C, state=None):
    """The recurrence token by token, as written in the paper."""
    state = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    outputs = []
    for t in range(u.shape[2]):
        state = torch.exp(dt[:, :, t, None] * A) * state + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1), state


def make_inputs(batch=BATCH, d=D, n=N, time=TIME, dtype=torch.float64, dt=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    steps = F.softplus(draw(batch, d, time)) if dt is None else torch.full((batch, d, time), dt, dtype=torch.float64)
    tensors = (draw(batch, d, time), steps, -torch.exp(draw(d, n)), draw(batch, n, time), draw(batch, n, time))
    return [x.to(dtype).requires_grad_() for x in (*tensors, draw(batch, d, n))]


@contextlib.contextmanager
def another_copy(module):
    """A file imported once more under another name, as transformers' remote code does."""
    name = module.__name__ + "_copy"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    yield copy
    del sys.modules[name]


@contextlib.contextmanager
def another_package(module, name="modeling_copy"):
    """All of `modeling/` imported once more, as it is by a published repo's remote code; gives a module's twin."""
    folder = Path(module.__file__).parent
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield importlib.import_module(f"{name}.{module.__name__.rpartition('.')[2]}")
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[key]


def modeling(model_type):
    """Transformers' module of a model type."""
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def own_globals(mixer):
    """What a repaired mixer's forward calls, by name; all mixers of a class share it."""
    return inspect.unwrap(mixer.forward.whole).__globals__


def bind(torch_function, implementation):
    """Mimics how Transformers binds the function of an importable package, without a device check."""

    @functools.wraps(torch_function)
    def wrapped(*args, **kwargs):
        return implementation(*args, **kwargs)

    return wrapped


def build(model_type, dtype=torch.float32, **overrides):
    """A tiny model, in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | CONFIGS[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default scale is so small that a lost state would hardly show
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.weight", "conv1d.weight", "embeddings.weight")):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def mixers(model):
    """The repaired mixers of a model."""
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), OwnForward)]


def padded_inputs(padded, length=11):
    """Token ids and their mask, None where nothing is padded."""
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(3))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # longer than the shortest chunks: whole chunks of one row are padding
    return ids * mask, mask


def chunked(model, model_type, ids, mask, size, full_mask=False):
    """Logits from prefilling `size` tokens at a time into one cache."""
    cache = DynamicCache(config=model.config)
    trims_itself = model_type in ("mamba2", "jamba") or full_mask
    bounds = list(range(0, ids.shape[1], size)) + [ids.shape[1]]
    if size == 1 and mask is not None and model_type in ("mamba2", "jamba"):
        # Their models drop the mask of single tokens, "a generated token is never padding": padding needs one prefill
        bounds = bounds[:1] + bounds[5:]
    outputs = []
    for s, e in zip(bounds, bounds[1:]):
        kwargs = {cache_argument(model.forward): cache, "use_cache": True}
        if mask is not None:
            kwargs["attention_mask"] = mask[:, :e] if trims_itself else mask[:, s:e]
            if model_type == "jamba":
                kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, s:e]
        outputs.append(model(ids[:, s:e], **kwargs).logits)
    return torch.cat(outputs, 1), cache


@torch.no_grad()
def read(model, sizes=(4, 3, 1, 1)):
    """Logits of nine tokens read in calls of these sizes with a cache; of one size, without."""
    name, parts, start = cache_argument(model.forward), [], 0
    make = getattr(model, "make_cache", lambda: DynamicCache(config=model.config))
    given = {name: make(), "use_cache": True} if len(sizes) > 1 else {"use_cache": False}
    for part in (tokens() % SMALL["vocab_size"]).split(list(sizes), 1):
        if model.config.model_type == "bamba":  # it counts from 0 in every call
            given["position_ids"] = torch.arange(start, start + part.shape[1])[None]
        parts.append(model(input_ids=part, **given).logits)
        start += part.shape[1]
    return torch.cat(parts, 1)


def read_elsewhere(_, model, path):
    """What a spawned process does; here, since such a process cannot import a test module (importlib mode)."""
    faulthandler.dump_traceback_later(300, exit=True)
    torch.save((len(mixers(model)), read(model)), path)
