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

from manticore_hf.modeling.components_manticore import ComponentSpec
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.modeling.modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
)

__version__ = "0.1.0"

_LATER = {
    "SearchArguments": "search",
    "SearchTrainer": "search",
    "calibrate_projectors": "calibrate",
    "choose_objective": "strengths",
    "compose_transplanted": "transplant",
    "convert": "conversion",
    "harden": "hardening",
    "lora_config": "adapters",
    "pick_route": "hardening",
    "publish": "publishing",
    "quantization_skips": "adapters",
    "set_stage": "stages",
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
