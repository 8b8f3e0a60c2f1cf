"""What a hybrid is made for: generating text, or classifying texts or tokens. Cards and `inspect` ask here."""

import os
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from manticore_hf.modeling import heads_manticore, modeling_manticore
from manticore_hf.modeling.bounds_manticore import guard
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.utils.unwrap import hybrid_of


@dataclass(frozen=True)
class TaskType:
    """What a hybrid can be made for.

    Args:
        architecture: Name of its class.
        auto: Name of the Auto class that loads it.
        task: Its task, as the Hub's `pipeline_tag` and Transformers' `pipeline` call it.
        noun: What it is, for a sentence.
        labels: Whether it gives labels instead of text.
    """

    architecture: str
    auto: str
    task: str
    noun: str
    labels: bool = True

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The hybrid class."""
        return getattr(heads_manticore if self.labels else modeling_manticore, self.architecture)


CAUSAL = TaskType("ManticoreForCausalLM", "AutoModelForCausalLM", "text-generation", "causal language model", False)
TASK_TYPES = {
    one.architecture: one
    for one in (
        CAUSAL,
        TaskType(
            "ManticoreForSequenceClassification",
            "AutoModelForSequenceClassification",
            "text-classification",
            "classifier of texts",
        ),
        TaskType(
            "ManticoreForTokenClassification",
            "AutoModelForTokenClassification",
            "token-classification",
            "classifier of tokens",
        ),
    )
}

_PROBLEMS = {
    "regression": "numbers (regression)",
    "single_label_classification": "one label for each text",
    "multi_label_classification": "any number of labels for each text",
}


def task_type_of(model_or_config: PreTrainedModel | ManticoreConfig) -> TaskType:
    """What a hybrid is made for; a causal language model where nothing else is said.

    Args:
        model_or_config: A hybrid, whose class says it, also one of remote code or a user's subclass (by the Auto class
            that it is registered for); or the configuration of a saved one (by the architecture that was saved).
    """
    if isinstance(model_or_config, nn.Module):
        auto = getattr(model_or_config, "_auto_class", None)
        return next((one for one in TASK_TYPES.values() if one.auto == auto), CAUSAL)
    names = getattr(model_or_config, "architectures", None)
    return (
        next((TASK_TYPES[name] for name in names if isinstance(name, str) and name in TASK_TYPES), CAUSAL)
        if isinstance(names, list)
        else CAUSAL
    )


def model_type_of(source: str | os.PathLike, **options: Any) -> Any:
    """What the config.json of a directory or repository says that it is: "manticore" if it is a hybrid's.

    Args:
        source: Directory or repository.
        options: For the Hub's client.

    Raises:
        ManticoreError: It is no JSON object of settings.
    """
    with guard().reading(source):
        return ManticoreConfig.get_config_dict(source, **options)[0].get("model_type")


def labels_of(config: ManticoreConfig) -> dict[str, Any]:
    """What a classifier gives.

    Args:
        config: Its configuration.

    Returns:
        {"labels": their names in order, "problem": what is predicted, for a sentence}.
    """
    if task_type_of(config).task == "token-classification":
        problem = "one label for each token"
    elif config.problem_type is None and config.num_labels == 1:  # as Transformers decides where it is not said
        problem = _PROBLEMS["regression"]
    else:
        problem = _PROBLEMS[config.problem_type or "single_label_classification"]
    return {"labels": [str(config.id2label[number]) for number in sorted(config.id2label)], "problem": problem}


def quantization_of(config: ManticoreConfig) -> str | None:
    """How a saved hybrid's linear maps are packed, for a sentence: "8 bits (bitsandbytes)"; None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method")
    return f"{4 if settings.get('load_in_4bit') else 8} bits ({getattr(method, 'value', method)})"


def check_generates(model: nn.Module | ManticoreConfig, doing: str) -> None:
    """Raises an error for a hybrid that classifies.

    Args:
        model: A hybrid, also a wrapped one, or the configuration of a saved one.
        doing: What needs a language model, as a sentence begins: "Calibrating".

    Raises:
        ManticoreError: The hybrid, or the one that the configuration is of, classifies.
    """
    found = task_type_of(hybrid_of(model) or model) if isinstance(model, nn.Module) else task_type_of(model)
    if found.labels:
        raise ManticoreError(
            f"{doing} needs a hybrid that predicts text, and this one is a {found.noun}: do that with the language "
            f"model first, and make the classifier of it ({found.architecture}.from_causal_lm, or from_pretrained of "
            "what was saved)."
        )
