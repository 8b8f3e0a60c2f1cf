"""Hybrids in eight or four bits: what may be quantised, and what a quantised hybrid can be saved as.

Mamba's `x_proj`, `dt_proj` and `out_proj` are read raw or inside fused kernels, heads and the mixer decide about
probabilities, a router about whole experts: these stay in floating point whatever a quantisation configuration says.
Every quantiser of Transformers leaves out what a model lists in `_keep_in_fp32_modules`, beside what its configuration
lists; hybrids use it for that (their dtypes have a plan of their own, see dtypes_manticore).
"""

import copy
import re

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .anatomy_manticore import find_layers
from .bounds_manticore import unsaved_quantization
from .configuration_manticore import ManticoreError, component_depth

RAW = ("x_proj", "dt_proj", "out_proj", "conv1d")
"""Projections of state-space mixers that are no plain matrix product everywhere."""

MIXER, SCORE = "hybrid_mixer", "score"


def is_state_space(module):
    """Whether a module is the mixer of a state-space model."""
    return hasattr(module, "A_log")


def plain_linear_maps(model, components=None):
    """Names of the linear maps inside the components' layers that are plain matrix products on every machine.

    Args:
        model: A hybrid.
        components: Names of components; default: all.

    Returns:
        Sorted module names: attention, MLP and input projections; no heads, no embeddings, no expert routers, none of
        Mamba's raw or fused projections.
    """
    out = []
    for name in model.config.component_names if components is None else components:
        component = model.component(name)
        # Not `dissect`, which runs the component without computing: quantised maps cannot do that.
        prefix = ".".join([name, *find_layers(component, component_depth(component.config)), ""])
        for key, module in model.named_modules():
            if not key.startswith(prefix) or not isinstance(module, (nn.Linear, Conv1D)):
                continue
            parent = model.get_submodule(key.rpartition(".")[0])
            leaf = key.rpartition(".")[2]
            if is_state_space(parent) and leaf in RAW:
                continue
            if leaf == "router" or (leaf == "gate" and hasattr(parent, "experts")):
                continue
            out.append(key)
    return sorted(out)


def kept_maps(model):
    """Sorted patterns of module names of the linear maps that stay in floating point.

    A pattern holds for all layers of its component. They are regular expressions, as Transformers' quantisers take
    them.
    """
    kept = {key for key in _kept(model) if not key.startswith((f"{MIXER}.", f"{SCORE}."))}
    return sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(key)) for key in kept} | {MIXER, SCORE})


class Quantizable:
    """Mixin of the hybrid classes, before PreTrainedModel."""

    def post_init(self):
        super().post_init()
        self._keep_in_fp32_modules = set(kept_maps(self))
        self.__dict__["_transposed"] = [key for key, one in self.named_modules() if type(one) is Conv1D]

    def dequantize(self, dtype=None):
        """As in Transformers, which gives GPT-2's transposed maps back as others; no checkpoint has those."""
        super().dequantize(dtype)
        for key in self._transposed:
            path, _, leaf = key.rpartition(".")
            plain = self.get_submodule(key)
            if isinstance(plain, nn.Linear):
                with torch.device("meta"):
                    module = Conv1D(*plain.weight.shape)
                module.weight, module.bias = nn.Parameter(plain.weight.data.T.contiguous()), plain.bias
                setattr(self.get_submodule(path), leaf, module)
        return self

    def push_to_hub(self, *args, **kwargs):
        """As in Transformers; what cannot be saved is refused before a repository is made for it."""
        refuse_unsaved(self)
        return super().push_to_hub(*args, **kwargs)


def note_kept(quantizer, model):
    """Writes into a quantiser's settings what it left out, so that the saved `config.json` says it."""
    settings = quantizer.quantization_config = copy.deepcopy(quantizer.quantization_config)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(settings, key):
            setattr(settings, key, sorted({*(getattr(settings, key) or ()), *model._keep_in_fp32_modules}))
            return


def refuse_unsaved(model):
    """Raises ManticoreError if a hybrid was quantised in a way that its saved files could not be loaded from."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return
    reason = unsaved_quantization(settings if isinstance(settings, dict) else settings.to_dict())
    if reason is not None:
        raise ManticoreError(
            f"This hybrid cannot be saved: {reason}. Nothing was written. Save it before it is quantised and give "
            "quantization_config=... when you load it, or train and save an adapter (lora_config)."
        )


def refuse_packed(model, tensors):
    """Raises ManticoreError if a checkpoint has packed numbers for a map that is computed in floating point.

    Eight-bit integers have the shape of what they stand for, and would be taken for the numbers themselves.

    Args:
        model: The hybrid, its maps replaced by the quantiser's where it does that.
        tensors: {checkpoint key: tensor or lazy slice} of its own file.
    """
    kept = _kept(model)
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if path in kept:
            name = tensor.get_dtype() if hasattr(tensor, "get_dtype") else str(tensor.dtype)
            if leaf.startswith("_weight_") or (leaf == "weight" and "F" not in name and "float" not in name):
                _refuse(path)


def refuse_quantized(model):
    """Raises ManticoreError if a weight of a hybrid that is read raw, or one of its own, was quantised."""
    for key in sorted(_kept(model)):
        weight = model.get_submodule(key).weight
        # By name: bitsandbytes may keep 4 bits in a tensor of floating point.
        names = {type(weight).__name__, type(weight.data).__name__}
        if not weight.is_floating_point() or not names <= {"Tensor", "Parameter", "DTensor"}:
            _refuse(key)


def _refuse(key):
    raise ManticoreError(
        f"{key!r} was quantised, but has to stay in floating point. Quantise the hybrid by loading it with "
        "quantization_config=..., which leaves out what must be."
    )


def _kept(model):
    """Names of the linear maps that stay in floating point."""
    linear = {key for key, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return linear - set(plain_linear_maps(model))
