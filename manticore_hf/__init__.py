"""manticore-hf: pretrained hybrids as ordinary Transformers models.

Importing the package registers the classes with Transformers' Auto classes, so that hybrids load without
`trust_remote_code`. What trains is imported when it is first asked for: it brings Trainer and datasets with it.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from manticore_hf._version import __version__
from manticore_hf.old_modules import OLD_MODULES
from manticore_hf.training import programs
from manticore_hf.utils import quiet, renamed

if TYPE_CHECKING:  # the same as `_PUBLIC`, for editors
    from manticore_hf.compose.choose_tokenizer import measure_tokenizers
    from manticore_hf.compose.components import ComponentSpec
    from manticore_hf.compose.convert.convert import convert
    from manticore_hf.compose.hybrid import (
        ManticoreForCausalLM,
        ManticoreForSequenceClassification,
        ManticoreForTokenClassification,
        ManticoreModel,
    )
    from manticore_hf.compose.transplant import compose_transplanted
    from manticore_hf.hub.publish import publish
    from manticore_hf.modeling.configuration_manticore import ManticoreConfig
    from manticore_hf.modeling.settings_manticore import ManticoreError
    from manticore_hf.training.calibrate import calibrate_projectors
    from manticore_hf.training.complementary_errors import choose_objective
    from manticore_hf.training.freezing import set_stage
    from manticore_hf.training.lora import lora_config, prompt_config, quantization_skips
    from manticore_hf.training.prune import pick_path, prune
    from manticore_hf.training.search import SearchArguments, SearchTrainer


_PUBLIC = {
    "ComponentSpec": "compose.components",
    "ManticoreConfig": "modeling.configuration_manticore",
    "ManticoreError": "modeling.settings_manticore",
    "ManticoreForCausalLM": "compose.hybrid",
    "ManticoreForSequenceClassification": "compose.hybrid",
    "ManticoreForTokenClassification": "compose.hybrid",
    "ManticoreModel": "compose.hybrid",
    "SearchArguments": "training.search",
    "SearchTrainer": "training.search",
    "calibrate_projectors": "training.calibrate",
    "choose_objective": "training.complementary_errors",
    "compose_transplanted": "compose.transplant",
    "convert": "compose.convert.convert",
    "prune": "training.prune",
    "lora_config": "training.lora",
    "measure_tokenizers": "compose.choose_tokenizer",
    "pick_path": "training.prune",
    "prompt_config": "training.lora",
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
    "__version__",
    "SearchArguments",
    "SearchTrainer",
    "calibrate_projectors",
    "choose_objective",
    "compose_transplanted",
    "convert",
    "prune",
    "lora_config",
    "measure_tokenizers",
    "pick_path",
    "prompt_config",
    "publish",
    "quantization_skips",
    "set_stage",
]


_old_name = renamed.old_names(__name__, {"harden": "prune", "pick_route": "pick_path"})


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        return _old_name(name)
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def register() -> None:
    """Registers the classes with Transformers' Auto classes; importing the package does it."""
    with quiet.quiet_optional_packages():
        _register()


def _register():
    import transformers

    from manticore_hf import kernels
    from manticore_hf.compose import hybrid
    from manticore_hf.modeling.configuration_manticore import ManticoreConfig
    from manticore_hf.utils import carried, defence, saving

    defence.install()
    saving.install()
    carried.install()
    kernels.register()
    transformers.AutoConfig.register(ManticoreConfig.model_type, ManticoreConfig, exist_ok=True)
    for auto, cls in (
        (transformers.AutoModel, hybrid.ManticoreModel),
        (transformers.AutoModelForCausalLM, hybrid.ManticoreForCausalLM),
        (transformers.AutoModelForSequenceClassification, hybrid.ManticoreForSequenceClassification),
        (transformers.AutoModelForTokenClassification, hybrid.ManticoreForTokenClassification),
    ):
        auto.register(ManticoreConfig, cls, exist_ok=True)


renamed.install(__name__, OLD_MODULES)
programs.register("mad", "manticore_hf.experiments.mad.program")
if not getattr(sys.modules.get("manticore_hf_cli"), "reading", False):  # see there: only the command waits with it
    register()
