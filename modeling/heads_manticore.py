"""A hybrid that classifies sequences or tokens: score heads where the components had their language-model heads.

With `embeddings="native"` every component's final state has a score head of its own, and the scores are mixed as the
predictions of a causal hybrid are: score = sum_k w_k Score_k(v_k), w the last block's alpha. A token gate also reads
each component's confidence, which nothing tells without a head over the vocabulary: w is then the part of the gate that
does not depend on the token, softmax(b). Other embeddings: one score head, on the shared state. Score heads are as in
Transformers: without bias for sequences, with bias and dropout for tokens.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from .base_manticore import ManticoreModel, takes_old_cache
from .bounds_manticore import ManticoreError, construct
from .cache_manticore import ManticoreCache
from .devices_manticore import device_of, onloaded, place
from .mixing_manticore import HybridMixer
from .mixture_manticore import weighted_sum, widen
from .running_manticore import read_inputs, run
from .weights_manticore import ShapeError

DROPOUT = 0.1  # of token classification, where the configuration has no `classifier_dropout`


class ScoreHead(nn.Module):
    """The score heads, and their mixture; one module with a forward, so that PEFT and FSDP see them.

    Args:
        widths: Width of each state that is scored, by key.
        num_labels: Number of scores.
        bias: Whether the heads have one.
        dropout: Share of each state that is dropped in training.
    """

    def __init__(self, widths: dict[str, int], num_labels: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({key: nn.Linear(width, num_labels, bias) for key, width in widths.items()})
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: dict[str, torch.Tensor], weights: list) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Scores [batch, time, labels] of the mixture, and of each state [batch, time, width] alone.

        The weights are a number or scalar tensor for each state.
        """
        own = [self.heads[key](self.dropout(x.to(self.heads[key].weight.dtype))) for key, x in states.items()]
        return weighted_sum(weights, own), own


def gate_rest(mixer: HybridMixer) -> torch.Tensor:
    """The part of a mixer's token gate that does not depend on the token, softmax(b): [K], in float32."""
    linear = mixer.token_gate.linear
    with onloaded(linear):
        unused = [one for one in mixer.token_gate.parameters() if one is not linear.bias]
        return mixer.touched(widen(linear.bias).softmax(-1), mixer.alpha_logits, *unused)


class ManticoreClassifier(ManticoreModel):
    """What both classifiers are: score heads instead of heads over the vocabulary."""

    _no_split_modules = ["HybridMixer", "ScoreHead"]

    def post_init(self) -> None:
        """Takes the heads over the vocabulary away once the components are there, and makes score heads."""
        # The mixer's widths are those of the heads that go now
        config, last = self.config, self.config.num_blocks - 1
        if not config.num_labels:
            raise ManticoreError(f"num_labels={config.num_labels!r} must be at least 1.")
        if config.embeddings == "native":
            writers = config.route[-1:] if config.route else config.component_names
            sizes = {name: self.component(name).get_output_embeddings().weight.shape[1] for name in writers}
            widths = {f"{name}-{last}": width for name, width in sizes.items()}
        else:
            widths = {"shared": config.hidden_size}
        for name in config.component_names:
            drop_head(self, name)
        self.score = construct("The score heads", lambda: self.make_score(widths), list(self.children()))
        super().post_init()

    @property
    def num_labels(self) -> int:
        """Number of scores."""
        return self.config.num_labels

    def make_score(self, widths: dict[str, int]) -> ScoreHead:
        """New score heads; `widths` as in ScoreHead."""
        return ScoreHead(widths, self.config.num_labels, bias=False, dropout=0.0)

    def starts_anew(self, key: str) -> bool:
        """Whether a checkpoint need not have a tensor: score heads, unless it is one of this class."""
        return key.startswith("score.") and type(self).__name__ not in (self.config.architectures or ())

    @can_return_tuple
    @takes_old_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: ManticoreCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Scores of the labels, and the loss; of what, and from which labels, the class says.

        Args:
            labels: Class numbers or other targets.
            use_cache: Whether to go on from, and make, a cache; default: if one is given.
            **kwargs: `num_items_in_batch` reaches the loss, as the Trainer expects. All others as in ManticoreModel.
        """
        use_cache = use_cache or cache is not None
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, keep)
        config, native, there = self.config, self.config.embeddings == "native", device_of(self.score)
        inputs = read_inputs(self, *given, {**kwargs, "output_attentions": output_attentions})
        at = self._where_to_score(inputs)
        found = run(self, inputs, shared=not native)
        row = found.weights[-1]
        if config.mixture == "token" and not isinstance(row[0], float):
            row = self.hybrid_mixer(gate_rest).unbind()
        if native:
            weights = [w for name, w in zip(config.component_names, row) if name in found.states]
            states = {f"{name}-{config.num_blocks - 1}": state for name, state in found.states.items()}
        else:
            weights, states = [1.0 + 0.0 * sum(row)], {"shared": found.shared}
        logits, own = self.score(*place((states, weights), there))
        if at is not None:
            rows = torch.arange(len(logits), device=logits.device), at.to(logits.device)
            logits, own = logits[rows], [one[rows] for one in own]
        loss = None
        if labels is not None:
            loss_of = partial(self._loss_of, labels=labels, items=kwargs.get("num_items_in_batch"))
            loss = loss_of(logits) if len(own) == 1 else config.mix_loss_weight * loss_of(logits)
            if len(own) > 1 and config.component_loss_weight > 0:
                loss = loss + config.component_loss_weight * sum(map(loss_of, own))
        given = {"hidden_states": found.hidden_states, "attentions": found.attentions, "cache": found.cache}
        return self._output(loss=loss, logits=logits, **given)


class ManticoreForSequenceClassification(ManticoreClassifier):
    """A hybrid that scores whole sequences, at their last token that is no padding: [batch, labels].

    `model.component(name)` is the component without language-model head, unless that is tied to its embeddings.

    Labels are [batch] class numbers; or for regression numbers [batch] or [batch, labels]; or for several labels at
    once floats 0 or 1 [batch, labels]. Padding of an `attention_mask` may stand left or right. Without it the last
    token that is not `pad_token_id` is scored; padding on the left is then read as text, as in any model of
    Transformers.
    """

    _output = SequenceClassifierOutputWithPast

    def _where_to_score(self, inputs):
        """[batch], the index of the last real token of each row."""
        (batch, time), ids = inputs.shape, inputs.ids
        if inputs.documents is not None and inputs.documents.are_several:
            raise ManticoreError("A row of several documents has no single score: give each document a row of its own.")
        # A hybrid of components without one has no such setting
        pad = getattr(self.config, "pad_token_id", None) if ids is not None else None
        if inputs.mask is None and pad is None and batch > 1:
            raise ManticoreError(
                f"Where {batch} rows end is unknown: there is neither an attention_mask nor "
                f"{'input_ids' if ids is None else 'a config.pad_token_id'}. Give an attention_mask."
            )
        if inputs.mask is None and pad is None:
            return torch.full((batch,), time - 1)
        real = ids != pad if inputs.mask is None else inputs.mask[:, -time:] != 0
        return (torch.arange(time, device=real.device) * real).argmax(-1)

    def _loss_of(self, values, labels, items):
        loss = self.loss_function(logits=values, pooled_logits=values, labels=labels, config=self.config)
        # Transformers' losses of other problem types than one label ignore it, and a step's batches would add up.
        return loss if items is None else loss * place((labels != -100).sum(), loss.device) / items


class ManticoreForTokenClassification(ManticoreClassifier):
    """A hybrid that scores every token, from what stands before it and itself: [batch, time, labels].

    Its components are as for sequences. Labels are [batch, time] class numbers, -100 is ignored; they are not shifted.
    A cache goes on in place, and is not among the outputs.
    """

    def make_score(self, widths: dict[str, int]) -> ScoreHead:
        """New score heads; `widths` as in ScoreHead."""
        dropout = getattr(self.config, "classifier_dropout", None)
        return ScoreHead(widths, self.config.num_labels, bias=True, dropout=DROPOUT if dropout is None else dropout)

    @staticmethod
    def _output(cache=None, **fields):
        return TokenClassifierOutput(**fields)

    def _where_to_score(self, inputs):
        return None

    def _loss_of(self, values, labels, items):
        return self.loss_function(logits=values, labels=labels, config=self.config, num_items_in_batch=items)


# ---- without heads over the vocabulary -------------------------------------------------------------------------------


def without_head(component: PreTrainedModel) -> tuple[PreTrainedModel, str | None]:
    """(A causal LM without its language-model head, sharing everything else with it; the path of that head).

    A head that is tied to the embeddings is the same tensor, and stays: then (the component itself, None).
    """
    head = component.get_output_embeddings()
    path = next((path for path, module in component.named_modules() if module is head), None)
    ties = component.all_tied_weights_keys or {}
    if path is None or not list(head.parameters()) or f"{path}.weight" in {*ties, *ties.values()}:
        return component, None
    whole = part = _shallow(component)
    *parents, name = path.split(".")
    for parent in parents:
        part._modules[parent] = part = _shallow(part._modules[parent])
    part._modules[name] = None  # what Transformers takes for a model without head, when embeddings are resized
    return whole, path


def _shallow(module):
    out = module.__class__.__new__(module.__class__)
    out.__dict__.update(module.__dict__, _modules=dict(module._modules))
    return out


def drop_head(model: ManticoreModel, name: str) -> None:
    """Leaves out a component's language-model head, where it has one of its own."""
    model._modules[name], path = without_head(model.component(name))
    if path is not None:
        model.__dict__["_gone"] = (*model.__dict__.get("_gone", ()), f"{name}.{path}.")


def forgo(model: ManticoreModel, there: set[str]) -> bool:
    """Leaves out the heads that the checkpoint of a classifier lacks, where they are not used; whether any are."""
    for name in () if type(model).can_generate() or hasattr(model, "score") else model.config.component_names:
        head = without_head(model.component(name))[1]
        if head is not None and not any(key.startswith(f"{name}.{head}.") for key in there):
            drop_head(model, name)
    return "_gone" in model.__dict__


def check_labels(model: ManticoreModel, missing: list | set, wrong: dict) -> None:
    """`check_complete`, of what only the checkpoint of a classifier can have wrong."""
    kind = next((one for one in model.config.architectures or () if one.endswith("Classification")), None)
    if missing and kind is not None and type(model).__name__ != kind:
        raise ManticoreError(
            f"This hybrid was saved as a classifier ({kind}), whose components have no language-model heads "
            f"({min(missing)}). Load it with AutoModelFor{kind.rpartition('For')[2]} or AutoModel."
        )
    if not missing and wrong and all(key.startswith("score.") for key in wrong):
        (file, *_), (asked, *_) = wrong[min(wrong)]
        raise ShapeError(
            f"The score heads have {file} labels in the file, and num_labels={asked} is asked for: load with "
            f"ignore_mismatched_sizes=True for new heads, or with num_labels={file}."
        )


ManticoreForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ManticoreForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
