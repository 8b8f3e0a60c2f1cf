"""The hybrid classes that users import: those of `modeling/`, with `from_components`.

A published repository carries `modeling/` alone, which loads, runs, trains and saves a hybrid; composing needs more.
Importing `manticore_hf` registers these classes with the Auto classes.
"""

import copy
import difflib
import os
import sys
from dataclasses import fields
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from manticore_hf.compose.checkpoints import check_checkpoint, checkpoint_files, record
from manticore_hf.compose.component_tokenizers import align, can_align, check_tokenizers, record_tokenizer
from manticore_hf.compose.components import ComponentSpec, load, resolve
from manticore_hf.compose.dtypes import cast, stored_dtype
from manticore_hf.compose.mixture_sampling import sample_components
from manticore_hf.compose.packaged import Packaged
from manticore_hf.modeling import base_manticore, heads_manticore, modeling_manticore
from manticore_hf.modeling.bounds_manticore import show, trying
from manticore_hf.modeling.components_manticore import settle_attention
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.devices_manticore import whole_weights
from manticore_hf.modeling.layer_stack_manticore import find_layout
from manticore_hf.modeling.references_manticore import component_files
from manticore_hf.utils.settings import HybridSettings
from manticore_hf.utils.task_types import CAUSAL
from manticore_hf.utils.unwrap import is_hybrid

# Ways to read five tokens: what a message calls them, tokens per call (several: with a cache), tokens of left padding.
# The first is all of them at once.
_WAYS = (
    ("a cache beside padding on the left", (4, 1, 2), 2),
    ("a cache", (3, 1, 1), 0),
    ("a call with several tokens after the first", (2, 3), 0),
    ("padding on the left", (7,), 2),
)


class _NoAddress(str):
    """The address of a hybrid in memory: empty, and whoever loads something from there (TRL's trainers do) is told."""

    def __str__(self):
        raise ManticoreError(
            "This hybrid was composed in memory and has no address, from which a reference model, a teacher or a "
            "tokenizer could be loaded. Save it and load it from there, or hand over what is wanted "
            "(ref_model=copy.deepcopy(model), processing_class=tokenizer)."
        )


class ManticoreModel(Packaged, base_manticore.ManticoreModel):
    """A hybrid without output head; see `manticore_hf.modeling.base_manticore`."""


class ManticoreForCausalLM(Packaged, modeling_manticore.ManticoreForCausalLM):
    """A hybrid as a causal LM, which `from_components` composes; see `manticore_hf.modeling.modeling_manticore`."""

    def generate(
        self, *args: object, mixture_sampling: bool = False, gate_lag: int | None = None, **kwargs: object
    ) -> object:
        """As in Transformers, and with `mixture_sampling` at the price of one component per token.

        Args:
            *args: As in Transformers.
            mixture_sampling: Draw for each token which component writes it, and run that one alone; with
                do_sample=True, and without what changes probabilities (top_k is 0 unless given).
            gate_lag: Tokens for which weights per token are kept then; by default the hybrid's own `gate_lag`, or 16
                where that is 1. With the hybrid's own, and with static weights, samples are exactly the mixture's.
            **kwargs: As in Transformers.

        Raises:
            ManticoreError: The prompt is empty, or the hybrid cannot be sampled so.
        """
        given = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        is_empty = any(isinstance(one, torch.Tensor) and one.shape[-1] == 0 for one in given)
        if is_empty and kwargs.get("inputs_embeds") is None:
            raise ManticoreError(
                "The prompt has no token to begin with: put the tokenizer's start token (bos_token_id, or eos_token_id "
                "where there is none) before it."
            )
        if mixture_sampling:
            # Transformers (5.24) does not hand a streamer on to a callable
            given = {"gate_lag": gate_lag, "streamer": kwargs.get("streamer")}
            kwargs["custom_generate"] = partial(sample_components, **given)
            kwargs.setdefault("top_k", 0)
        return super().generate(*args, **kwargs)

    @property
    def lm_head(self) -> NoReturn:
        """Not there: the heads are the components'. Whoever would cast it (TRL's GRPO) gets a ManticoreError."""
        if sys._getframe(1).f_code.co_name == "_cast_lm_head_to_fp32":
            raise ManticoreError(
                "cast_lm_head_to_fp32=True: a hybrid has no lm_head but one head in each component. Leave it out, or "
                "train in float32 (model.float())."
            )
        raise AttributeError("lm_head")

    @classmethod
    @whole_weights()
    def from_components(
        cls,
        components: list,
        *,
        dtype: torch.dtype | str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        verify: bool = True,
        tokenizers: str | None = None,
        **settings: object,
    ) -> "ManticoreForCausalLM":
        """Composes a hybrid from pretrained causal LMs.

        Args:
            components: Each a repo id ("org/name", "org/name@revision"), a local directory, an instantiated causal LM,
                or a ComponentSpec. Repos are pinned to their 40-hex commit and referenced; directories and instances
                are embedded.
            dtype: Of the weights; default: what the components are stored in if they agree, else float32. Instances are
                converted in place.
            token, cache_dir, local_files_only: As in `from_pretrained`.
            verify: Run a few tokens through each component, cut and uncut, and raise if they differ.
            tokenizers: What is done where the components' tokenizers differ: "aligned" (each reads the text by its own,
                and its predictions are mapped to those of `tokenizer_component`; the default in one block), or
                "transplant" (raises here; see `compose_transplanted`).
            **settings: Keys of ManticoreConfig: preset, num_blocks, block_layers, gate, mixture, embeddings, ...

        Returns:
            The hybrid, in evaluation mode.

        Raises:
            ManticoreError: A component or setting that cannot be used, named, before weights are downloaded where
                possible.
        """
        if not isinstance(components, (list, tuple)) or not components:
            raise ManticoreError("from_components takes a list of at least one component.")
        known = [*(field.name for field in fields(HybridSettings)), "calibration", "objective", "route"]
        for key in settings:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                raise ManticoreError(
                    f"{key}={settings[key]!r}: there is no such setting"
                    + (f"; did you mean {close[0]}?" if close else f"; choose from {known}.")
                )
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ManticoreError(f"dtype={dtype!r} is not a torch dtype; give for example 'bfloat16'.")
        for key in ("preset", "tokenizer_component"):
            if not isinstance(settings.get(key), (str, type(None))):
                raise ManticoreError(f"{key}={show(settings[key])} must be a name.")
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        found = [resolve(ComponentSpec.of(item), hub) for item in components]
        own = align(found, hub, tokenizers, can_align(settings))
        home = settings.get("tokenizer_component") or found[0].name
        for one in found if home in own else ():
            if one.name == home or own[one.name].get_vocab() != own[home].get_vocab():
                one.tokenizer = record_tokenizer(one, hub)
        same = [one for one in found if one.tokenizer is None or one.name == home]
        padded = len({one.config.vocab_size for one in same}) > 1 and "vocab_size" not in settings
        if padded:  # or really different: then there is no common size, and the configuration raises
            settings["vocab_size"] = check_tokenizers(same, hub)
        config = cls.config_class(components=[one.entry() for one in found], **settings)
        settle_attention(config)
        if not padded and not (config.embeddings == "fresh" and "vocab_size" in settings):  # of any tokenizer
            check_tokenizers(same, hub)
        files = {}
        for one, entry in zip(found, config.components):
            if one.repo_id is not None:  # fetched here, where what arrives is checked
                files[one.name] = component_files({**entry, "files": None}, hub)
                entry["files"] = record(files[one.name]) if entry["weights"] == "reference" else None
            elif one.directory is not None:
                files[one.name] = checkpoint_files(os.path.join(one.directory, one.subfolder or ""))
        if dtype is None or dtype == "auto":
            stored = {stored_dtype(one.model or one.config, files.get(one.name)) for one in found}
            dtype = stored.pop() if len(stored) == 1 else torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        parts = {}
        for one in found:
            if one.model is None:
                check_checkpoint(one.address, one.config, files[one.name])
            part = parts[one.name] = load(one, dtype, hub)
            if one.model is not None:
                cast(f"Component {one.address}", part, dtype)
        config.dtype = dtype
        first = parts[config.tokenizer_component]
        for name, part in parts.items():
            with trying(f"Component {name!r} ({part.config.model_type})"):
                try:
                    find_layout(part)  # of one block too, which would run whatever the class does around its layers
                except ManticoreError as err:
                    raise ManticoreError(f"Component {name!r}: {err}") from err
        with local_torch_dtype(dtype):
            model = cls(config, components=parts)
        if first.device.type != "meta":  # as where weights wait on a disk
            model.hybrid_mixer.to(first.device)
        config._name_or_path = _NoAddress()
        model._component_cache_dir = cache_dir
        model._tokenizers = own
        model.generation_config = type(first.generation_config).from_dict(first.generation_config.to_dict())
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(first.config, key, None) is not None:
                setattr(config, key, getattr(first.config, key))
        model.eval()
        if verify:
            model.verify_segments()
        if config.embeddings == "fresh":
            model.renew_embeddings()
        return model

    @torch.no_grad()
    def verify_segments(self) -> None:
        """Runs five tokens through every component: cut and uncut, at once and with a cache, alone and padded.

        Raises:
            ManticoreError: A component whose segments are not the component, or that is not causal, or that a cache or
                padding on the left changes.
        """
        for name in self.config.component_names:
            component = self.component(name)
            ids = torch.arange(5, device=self.device)[None] * 7 % component.config.vocab_size
            what = f"Component {name!r} ({component.config.model_type})"
            whole = component(input_ids=ids, use_cache=False).logits
            if _differ(self._read(name, ids, [5]), whole, component.dtype):
                raise ManticoreError(
                    f"{what}: its layers run in {len(self.segments.blocks(name))} segments do not give what the whole "
                    "model gives; this architecture is not supported."
                )
            if _differ(component(input_ids=ids[:, :-1], use_cache=False).logits, whole[:, :-1], component.dtype):
                raise ManticoreError(f"{what} is not causal: its predictions change with later tokens.")
            if self._read_wrong(name, ids, whole, *_WAYS[0][1:]) is not None:
                wrong = [(way, self._read_wrong(name, ids, whole, *rest)) for way, *rest in (*_WAYS[1:], _WAYS[0])]
                way, reason = next((way, reason) for way, reason in wrong if reason is not None)
                raise ManticoreError(
                    f"{what}: in Transformers {way} {reason}, so that it would generate something else than it should; "
                    "this architecture is not supported."
                )

    def _read(self, name, ids, sizes, padding=0):
        """A component's logits [1, time, vocabulary], in segments.

        Args:
            name: The component.
            ids: [1, time].
            sizes: How many tokens each call reads, padding included; with several calls there is a cache.
            padding: Tokens of padding on the left.
        """
        ids = F.pad(ids, (padding, 0))
        positions = (torch.arange(ids.shape[1], device=ids.device) - padding).clamp(min=0)[None]
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        cache, logits, start = self.make_cache() if len(sizes) > 1 else None, [], 0
        for size in sizes:
            stop = start + size
            reads_ids = self.config.embeddings == "native" and self.segments.segment(name, 0).is_whole
            state = ids[:, start:stop] if reads_ids else self.embed(name, ids[:, start:stop])
            for block in self.segments.blocks(name):
                view = None if cache is None else cache.view(name, block)
                given = mask[:, :stop] if padding else None
                state = self.segments.segment(name, block)(state, given, positions[:, start:stop], view)
            logits.append(self.segments.head(name)(state))
            if cache is not None:
                cache.seen += size
            start = stop
        return torch.cat(logits, 1)[:, padding:]

    def _read_wrong(self, name, ids, whole, sizes, padding):
        """What is wrong with a way of reading, or None."""
        try:
            read, dtype = self._read(name, ids, sizes, padding), self.component(name).dtype
            return "changes its predictions" if _differ(read, whole, dtype) else None
        except Exception as err:  # of the component's class
            return "fails (" + " ".join(f"{type(err).__name__}: {err}".split())[:200] + ")"

    @torch.no_grad()
    def renew_embeddings(self) -> None:
        """New embeddings and heads of N(0, 0.02) for every component (embeddings="fresh", the paper's code).

        A head that a component ties to its embedding stays tied. (The paper's code ties all.)

        Raises:
            ManticoreError: The hybrid has the components' own embeddings.
        """
        if self.config.embeddings != "fresh":
            raise ManticoreError(
                f"new_embeddings is for a hybrid with embeddings 'fresh'; this one has {self.config.embeddings!r}."
            )
        for name in self.config.component_names:
            component = self.component(name)
            for module in {
                id(m): m for m in (component.get_input_embeddings(), component.get_output_embeddings()) if m is not None
            }.values():
                nn.init.normal_(module.weight, 0.0, 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)


def _differ(got, wanted, dtype):
    """Whether two ways to the same logits differ by more than the rounding of the component's dtype."""
    by, size = (got - wanted).float().abs(), wanted.float().abs()
    if dtype not in (torch.bfloat16, torch.float16):
        return not bool(by.max() <= 1e-3 * size.max().clamp(min=1e-6))  # nor is a NaN equal
    # Rounding may send a token to other experts, whose outputs differ more
    return not bool(by.mean() <= 5e-2 * size.mean().clamp(min=1e-6))


class _Classifies(Packaged):
    """What both classifiers add to those of `modeling/`."""

    @classmethod
    def from_components(
        cls,
        components: list,
        *,
        num_labels: int | None = None,
        id2label: dict | None = None,
        label2id: dict | None = None,
        problem_type: str | None = None,
        **settings: object,
    ) -> PreTrainedModel:
        """Composes a hybrid that classifies, from pretrained causal LMs.

        Args:
            components: As in `ManticoreForCausalLM.from_components`.
            num_labels: Number of labels (default: as many as `id2label` has, else 2).
            id2label, label2id: Names of the labels by number, and back.
            problem_type: "regression", "single_label_classification" or "multi_label_classification"; default: by the
                labels that are given first, as in Transformers.
            **settings: Further arguments of `ManticoreForCausalLM.from_components`.

        Returns:
            The hybrid, in evaluation mode, with new score heads.

        Raises:
            ManticoreError: A component or setting that cannot be used.
        """
        model = ManticoreForCausalLM.from_components(components, **settings)
        return cls.from_causal_lm(model, num_labels, id2label, label2id, problem_type)

    @classmethod
    def from_causal_lm(
        cls,
        model: PreTrainedModel,
        num_labels: int | None = None,
        id2label: dict | None = None,
        label2id: dict | None = None,
        problem_type: str | None = None,
    ) -> PreTrainedModel:
        """A classifier of a causal hybrid in memory; they share components and mixer, so training one changes both.

        Args:
            model: A ManticoreForCausalLM, pruned or not.
            num_labels, id2label, label2id, problem_type: As in `from_components`.

        Raises:
            ManticoreError: It is no causal hybrid, or a quantised one, or the labels contradict each other.
        """
        if not is_hybrid(model) or model._auto_class != CAUSAL.auto:  # not by its class, which may be of another copy
            raise ManticoreError(f"{type(model).__name__} is not a causal hybrid; give a ManticoreForCausalLM.")
        if getattr(model.config, "quantization_config", None) is not None:
            raise ManticoreError(
                f"This hybrid is quantised; load it as a {cls.__name__} instead (from_pretrained with num_labels and "
                "quantization_config)."
            )
        config = copy.deepcopy(model.config)
        config.architectures = None
        _label(config, num_labels, id2label, label2id, problem_type)
        with local_torch_dtype(model.dtype):
            out = cls(config, {name: model.component(name) for name in config.component_names})
        out.hybrid_mixer = model.hybrid_mixer
        # Where it came from, for saving and for adapters, and tokenizers that components read by
        for key in ("_component_cache_dir", "_own_commit", "_loaded_from", "_tokenizers"):
            if key in model.__dict__:
                setattr(out, key, getattr(model, key))
        out.score.to(model.device)
        return out.eval()


class ManticoreForSequenceClassification(_Classifies, heads_manticore.ManticoreForSequenceClassification):
    """A hybrid that scores whole sequences; see `manticore_hf.modeling.heads_manticore`."""


class ManticoreForTokenClassification(_Classifies, heads_manticore.ManticoreForTokenClassification):
    """A hybrid that scores every token; see `manticore_hf.modeling.heads_manticore`."""


def _label(config, num_labels, id2label, label2id, problem_type):
    """Writes labels into a configuration."""
    names = None if id2label is None else {int(number): name for number, name in id2label.items()}
    if names is not None and num_labels not in (None, len(names)):
        raise ManticoreError(f"num_labels={num_labels} contradicts id2label, which has {len(names)} labels.")
    if names is not None:
        config.id2label = names
        config.label2id = {name: number for number, name in names.items()}
    elif num_labels is not None:
        config.num_labels = num_labels
    if label2id is not None:
        config.label2id = dict(label2id)
    if problem_type is not None:
        config.problem_type = problem_type
