"""A hybrid is recognised whatever its class is called, of whatever copy of the files, inside whatever wraps it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from manticore_hf.modeling import modeling_manticore
from peft import LoraConfig, get_peft_model
from tiny_hybrid import mixed_hybrid, neox
from torch import nn

from manticore_hf import (
    ManticoreConfig,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    lora_config,
)
from manticore_hf.utils.task_types import CAUSAL, TASK_TYPES, check_generates, task_type_of
from manticore_hf.utils.unwrap import hybrid_of, is_hybrid

LABELLED = (ManticoreForSequenceClassification, ManticoreForTokenClassification)


@pytest.fixture(scope="module")
def causal():
    return mixed_hybrid(num_blocks=1)


@pytest.fixture(scope="module")
def other_copy():
    """The modules of `modeling/` once more, as those of a repository are beside the installed ones."""
    name, home = "another_copy", Path(modeling_manticore.__file__).parent
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(name, home / "__init__.py", submodule_search_locations=[str(home)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    yield importlib.import_module(f"{name}.modeling_manticore")
    for one in [one for one in sys.modules if one.split(".")[0] == name and one not in before]:
        del sys.modules[one]


def copy_of(causal, module, cls=ManticoreForCausalLM, **labels):
    """A model in another copy of the files, made from the components of a causal hybrid."""
    settings = {**causal.config.to_dict(), **labels}
    config = sys.modules[f"{module.__package__}.configuration_manticore"].ManticoreConfig(**settings)
    components = {name: causal.component(name) for name in causal.config.component_names}
    home = module if hasattr(module, cls.__name__) else importlib.import_module(f"{module.__package__}.heads_manticore")
    return getattr(home, cls.__name__)(config, components)


def test_what_is_a_hybrid(causal, other_copy):
    copied = copy_of(causal, other_copy)
    assert not isinstance(copied, modeling_manticore.ManticoreModel)
    for one in (causal, copied, causal.config, copied.config, ManticoreConfig()):
        assert is_hybrid(one)
    for one in (causal.component(causal.config.component_names[0]), neox(), neox().config, nn.Linear(1, 1), None, "x"):
        assert not is_hybrid(one)


def test_the_hybrid_inside_a_wrapper(causal, other_copy):
    for model in (causal, copy_of(causal, other_copy)):
        peft = get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
        for wrapped in (model, peft, nn.DataParallel(peft), torch.compile(model), nn.Sequential(nn.Identity(), peft)):
            assert hybrid_of(wrapped) is model
        assert not is_hybrid(peft), "what wraps a hybrid has not its parts"
        peft.unload()
    assert hybrid_of(neox()) is None


def test_what_it_is_made_for(causal, other_copy):
    assert task_type_of(causal) is task_type_of(copy_of(causal, other_copy)) is CAUSAL
    for cls in LABELLED:
        model = cls.from_causal_lm(causal, 3)
        assert model.config.architectures is None, "nothing says it but the class"
        mine = type("Mine", (cls,), {})  # FSDP2 makes such a class, too
        for one in (model, copy_of(causal, other_copy, cls, num_labels=3), mine.from_causal_lm(causal, 3)):
            assert task_type_of(one) is TASK_TYPES[cls.__name__]
            for wrapped in (one, nn.DataParallel(one)):
                with pytest.raises(
                    ManticoreError, match=f"Reading needs .* this one is a {TASK_TYPES[cls.__name__].noun}"
                ):
                    check_generates(wrapped, "Reading")
            with pytest.raises(ManticoreError, match="is not a causal hybrid"):
                cls.from_causal_lm(one)
            wanted = "SEQ_CLS" if cls is ManticoreForSequenceClassification else "TOKEN_CLS"
            assert lora_config(one, r=2).task_type == wanted
    assert lora_config(causal, r=2).task_type == "CAUSAL_LM"
    assert type(LABELLED[0].from_causal_lm(copy_of(causal, other_copy), 3)) is LABELLED[0]
    with pytest.raises(ManticoreError, match="GPTNeoXForCausalLM is not a causal hybrid"):
        LABELLED[0].from_causal_lm(neox())
