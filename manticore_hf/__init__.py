"""manticore-hf: pretrained hybrids as ordinary Transformers models.

Importing the package registers the classes with Transformers' Auto classes, so that hybrids load without
`trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from manticore_hf.adapters import lora_config
from manticore_hf.calibrate import calibrate_projectors
from manticore_hf.modeling.components_manticore import ComponentSpec
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.modeling.modeling_manticore import ManticoreForCausalLM, ManticoreModel
from manticore_hf.search import SearchArguments, SearchTrainer
from manticore_hf.stages import set_stage

__version__ = "0.1.0"
__all__ = [
    "ComponentSpec",
    "ManticoreConfig",
    "ManticoreError",
    "ManticoreForCausalLM",
    "ManticoreModel",
    "SearchArguments",
    "SearchTrainer",
    "calibrate_projectors",
    "lora_config",
    "set_stage",
]

AutoConfig.register(ManticoreConfig.model_type, ManticoreConfig, exist_ok=True)
AutoModel.register(ManticoreConfig, ManticoreModel, exist_ok=True)
AutoModelForCausalLM.register(ManticoreConfig, ManticoreForCausalLM, exist_ok=True)
