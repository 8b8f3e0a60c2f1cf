"""manticore-hf: pretrained hybrids as ordinary Transformers models.

Importing the package registers the classes with Transformers' Auto classes, so that hybrids load without
`trust_remote_code`. What trains is imported when it is first asked for: it brings Trainer and datasets with it.
"""

import importlib

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from manticore_hf.compose.components import ComponentSpec
from manticore_hf.compose.hybrid import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
)
from manticore_hf.kernels import register as register_kernels
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.training import programs
from manticore_hf.utils import renamed

__version__ = "0.1.0"

_LATER = {
    "SearchArguments": "training.search",
    "SearchTrainer": "training.search",
    "calibrate_projectors": "training.calibrate",
    "choose_objective": "training.objective",
    "compose_transplanted": "compose.transplant",
    "convert": "compose.convert.convert",
    "harden": "training.prune",
    "lora_config": "training.lora",
    "pick_route": "training.prune",
    "publish": "hub.publish",
    "quantization_skips": "training.lora",
    "set_stage": "training.freezing",
}

__all__ = [
    "ComponentSpec",
    "ManticoreConfig",
    "ManticoreError",
    "ManticoreForCausalLM",
    "ManticoreForSequenceClassification",
    "ManticoreForTokenClassification",
    "ManticoreModel",
    *_LATER,
]

renamed.install(__name__)
register_kernels()
programs.register("mad", "manticore_hf.experiments.mad.program")

AutoConfig.register(ManticoreConfig.model_type, ManticoreConfig, exist_ok=True)
AutoModel.register(ManticoreConfig, ManticoreModel, exist_ok=True)
AutoModelForCausalLM.register(ManticoreConfig, ManticoreForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ManticoreConfig, ManticoreForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(ManticoreConfig, ManticoreForTokenClassification, exist_ok=True)


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__():
    return sorted({*globals(), *_LATER})
