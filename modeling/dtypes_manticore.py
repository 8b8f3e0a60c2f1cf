"""Which tensor of a hybrid has which dtype, and which may be quantised.

A hybrid has one dtype, `config.dtype`: its components' and its projectors'. Three things differ from it: what a
component's class keeps in float32 (`_keep_in_fp32_modules`, of this component only); buffers that no checkpoint holds
(rotary angles), which are as in the component loaded alone; mixture weights and token gate, which are float32 always: a
step of training is smaller than what a half precision number resolves.

In eight or four bits, Mamba's `x_proj`, `dt_proj` and `out_proj` are read raw or inside fused kernels, heads and the
mixer decide about probabilities, a router about whole experts: these stay in floating point. Every quantiser of
Transformers leaves out what a model lists in `_keep_in_fp32_modules`; hybrids use it for that.
"""

import copy
import functools
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .bounds_manticore import ManticoreError, show
from .components_manticore import find_layers
from .configuration_manticore import component_depth

ALWAYS_FLOAT32 = ("alpha_logits", "token_gate.", "bridges.alpha", "bridges.gates")  # names in the mixer begin so
RAW = ("x_proj", "dt_proj", "out_proj", "conv1d")  # of state-space mixers: no plain matrix product everywhere
MIXER, SCORE = "hybrid_mixer", "score"
_WRAPS = ("base_layer", "token_adapter")  # what PEFT's wrappers of a module have
# What torchao's settings in a hybrid's file may name.
_TORCHAO = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "PerRow", "PerTensor", "MappingType")


class MixedDtypes:
    """Mixin of the hybrid classes, before PreTrainedModel."""

    def post_init(self) -> None:
        """Notes which maps stay in floating point."""
        super().post_init()
        self._keep_in_fp32_modules = set(kept_maps(self))

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the parts; what `save_pretrained` states, and a later load takes."""
        found = [_dtype_of(name, part) for name, part in self.named_children()]
        return functools.reduce(torch.promote_types, [dtype for dtype in found if dtype is not None])

    def _get_dtype_plan(self, dtype):
        # As in Transformers, but a component's patterns speak of that component alone ("norm" is in every family).
        plan = {}
        for name in self.config.component_names:
            for pattern, kept in self._modules[name]._get_dtype_plan(dtype).items():
                # Transformers replaces "*" by ".*", so that no other may stand here.
                plan[f"^{name}\\..{{0,}}(?:{pattern})"] = kept
        return plan


def loaded_dtypes(model: PreTrainedModel) -> Callable:
    """Function from the name of a tensor to the dtype that it has when what is saved now is loaded again."""
    plan = dtype_plan(model._get_dtype_plan(model.dtype))
    return functools.partial(plan, default=model.dtype)


def _dtype_of(name, part):
    """A part's own dtype: that of its first tensor of floating point that is not float32 whatever the rest is."""
    kept = ALWAYS_FLOAT32 if name == MIXER else ()
    found = (x.dtype for key, x in part.named_parameters() if x.is_floating_point() and not key.startswith(kept))
    return next(found, None)


def convert_unpacked(tensors: dict, own: set, rename: Callable, plan: dict) -> None:
    """Converts, in place, what is not packed of a quantised hybrid's tensors {checkpoint key: tensor or lazy slice}.

    Transformers takes it as it is in the file, which is right where all was quantised at once. References have the
    dtype of their own repositories; packed ones are among the hybrid's `own` keys. `plan` is of `_get_dtype_plan`.
    """
    wanted, plan = rename.known, dtype_plan(plan)
    for key, tensor in tensors.items():
        name, converted = rename(key)
        if name not in wanted or not wanted[name].is_floating_point():
            continue
        shape = tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
        if key not in own or (not converted and shape == tuple(wanted[name].shape)):
            tensors[key] = tensor[...].to(plan(name, wanted[name].dtype))


def dtype_plan(plan: dict) -> Callable:
    """Function from a tensor's name to the dtype that a plan of Transformers' has for it, or else to a default."""
    plan = [(re.compile(key.replace("*", ".*")), kept) for key, kept in plan.items()]
    return lambda name, default: next((kept for pattern, kept in plan if pattern.search(name)), default)


# ---- quantisation ----------------------------------------------------------------------------------------------------


def is_state_space(module: nn.Module) -> bool:
    """Whether a module is the mixer of a state-space model."""
    return hasattr(module, "A_log")


def plain_linear_maps(model: PreTrainedModel, components: list | None = None) -> list[str]:
    """Sorted names of the linear maps inside components' layers that are plain matrix products on every machine.

    Attention, MLP and input projections; no heads, embeddings, expert routers, nor Mamba's raw or fused projections.
    """
    inside = []
    for name in model.config.component_names if components is None else components:
        # Not `find_layout`, which runs the component without computing: quantised maps cannot do that.
        layers = find_layers(model.component(name), component_depth(model.component(name).config))
        inside.append(".".join([name, *layers, ""]))
    modules, out = dict(model.named_modules()), []
    for key, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)) and key.startswith(tuple(inside)):
            parent, _, leaf = key.rpartition(".")
            raw = is_state_space(modules[parent]) and leaf in RAW
            if not raw and leaf != "router" and not (leaf == "gate" and hasattr(modules[parent], "experts")):
                out.append(key)
    return sorted(out)


def check_adapted(model: PreTrainedModel) -> None:
    """Raises ManticoreError where PEFT's adapters would leave embeddings and heads untrained or unsaved, silently."""
    if model.config.route is not None:
        return
    parts = {name: model.component(name) for name in model.config.component_names}
    ends = {name: (part.get_input_embeddings(), part.get_output_embeddings()) for name, part in parts.items()}
    wraps = {name: {key for key in _WRAPS for end in pair if hasattr(end, key)} for name, pair in ends.items()}
    tied = [name for name, part in parts.items() if part.all_tied_weights_keys and wraps[name]]
    listed = [isinstance(getattr(one, "trainable_token_indices", None), list) for one in model.peft_config.values()]
    bare = [name for name in ends if any(end is not None and not hasattr(end, "modules_to_save") for end in ends[name])]
    if tied:
        why = f"PEFT has wrapped embeddings or head of component {tied[0]!r}, which are one tensor, and not the other."
    elif any(listed) and any("token_adapter" not in found for found in wraps.values()):
        why = "trainable_token_indices in a list trains the rows of one component alone, or of none."
    elif bare and model.is_resized and model.name_or_path:
        why = (
            f"The vocabulary was resized after loading, and embeddings and heads of {bare} would not be saved with the "
            "adapter. Save the resized hybrid and go on from there, or:"
        )
    else:
        return
    raise ManticoreError(f"{why} Load the hybrid again, and adapt it with lora_config(model).")


def kept_maps(model: PreTrainedModel) -> list[str]:
    """Sorted patterns of the names of linear maps that stay in floating point, as Transformers' quantisers take them.

    A pattern, a regular expression, holds for all layers of its component.
    """
    kept = {key for key in _kept(model) if not key.startswith((f"{MIXER}.", f"{SCORE}."))}
    kept = {re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(key)) for key in kept}
    return sorted(kept | ({MIXER, SCORE} & set(model._modules)))


def note_kept(quantizer: object, model: PreTrainedModel) -> None:
    """Writes into a quantiser's settings what it left out, so that the saved `config.json` says it."""
    settings = quantizer.quantization_config = copy.deepcopy(quantizer.quantization_config)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(settings, key):
            setattr(settings, key, sorted({*(getattr(settings, key) or ()), *model._keep_in_fp32_modules}))
            return


def check_savable(model: PreTrainedModel) -> None:
    """Raises ManticoreError if a hybrid was quantised in a way that its saved files could not be loaded from."""
    settings = getattr(model.config, "quantization_config", None)
    values = settings.to_dict() if hasattr(settings, "to_dict") else settings
    if values is not None and (reason := unsaved_quantization(values)) is not None:
        raise ManticoreError(
            f"This hybrid cannot be saved: {reason}. Nothing was written. Save it before it is quantised and give "
            "quantization_config=... when you load it, or train and save an adapter (lora_config)."
        )


def check_unpacked(model: PreTrainedModel, tensors: dict) -> None:
    """Raises ManticoreError if a hybrid's own file has packed numbers for a map that is computed in floating point.

    Eight-bit integers have the shape of what they stand for, and would be taken for the numbers themselves.
    """
    kept = _kept(model)
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if path in kept:
            name = tensor.get_dtype() if hasattr(tensor, "get_dtype") else str(tensor.dtype)
            if leaf.startswith("_weight_") or (leaf == "weight" and "F" not in name and "float" not in name):
                raise _must_stay(path)


def check_unquantized(model: PreTrainedModel) -> None:
    """Raises ManticoreError if a weight of a hybrid that is read raw, or one of its own, was quantised."""
    for key in sorted(_kept(model)):
        weight = model.get_submodule(key).weight
        # By name: bitsandbytes may keep 4 bits in a tensor of floating point.
        names = {type(weight).__name__, type(weight.data).__name__}
        if not weight.is_floating_point() or not names <= {"Tensor", "Parameter", "DTensor"}:
            raise _must_stay(key)


def _must_stay(key):
    return ManticoreError(
        f"{key!r} was quantised, but has to stay in floating point. Quantise the hybrid by loading it with "
        "quantization_config=..., which skips such weights."
    )


def _kept(model):
    """Names of the linear maps that stay in floating point."""
    linear = {key for key, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return linear - set(plain_linear_maps(model))


def unsaved_quantization(values: dict) -> str | None:
    """Why a hybrid's config.json cannot state that its weights are quantised with these settings; None if it can."""
    method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    if method == "bitsandbytes":
        return None
    if method != "torchao":  # others fetch kernels from the Hub, or store tensors under names that no hybrid has
        return f"weights quantised by quant_method={show(method)} are not read from a hybrid's files"
    todo = [values.get("quant_type")]
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value
        # torchao looks the name up among all that its modules have, and calls it.
        if isinstance(value, dict) and value.get("_type", "PerRow") not in _TORCHAO:
            return f"torchao's {show(value['_type'])} is not read from a hybrid's files, only {', '.join(_TORCHAO)}"
    return None
