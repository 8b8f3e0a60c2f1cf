"""A causal LM with another tokenizer: its body as it was, an embedding and a head with rows for the new tokens.

from manticore_hf.compose.transplant import transplant

model, report = transplant(model, own_tokenizer, other_tokenizer, texts=held_out_texts)
model.save_pretrained("transplanted")        # a plain model of its family
"""

import copy

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import local_torch_dtype

from manticore_hf.compose.transplant.build import ATOMS, METHODS, check_method, match, new_rows
from manticore_hf.compose.transplant.coverage import TransplantReport, bits_per_byte, text_coverage
from manticore_hf.compose.transplant.surface import Surfaces
from manticore_hf.modeling.bounds_manticore import build_component
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.transplant_manticore import end_names

_LISTS = ("bad_words_ids", "force_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def transplant(
    model: PreTrainedModel,
    tokenizer_from: PreTrainedTokenizerBase,
    tokenizer_to: PreTrainedTokenizerBase,
    method: str = "auto",
    texts: list[str] | None = None,
    *,
    donor: PreTrainedModel | None = None,
    atoms: int = ATOMS,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[PreTrainedModel, TransplantReport]:
    """Gives a causal LM the vocabulary of another tokenizer.

    Tokens that stand for the same bytes keep their rows, special tokens get those of the same role, the others are
    built. Nothing is trained; a short training of the embedding and head alone regains much of what is lost.

    Args:
        model: The causal LM; it is left as it was.
        tokenizer_from: Its tokenizer.
        tokenizer_to: The tokenizer that it shall read.
        method: "mean" (from the model's own sub-tokens of the same string), "omp" (a sparse combination of common
            tokens, found in the donor's rows), or "auto": what measures best on `texts`; without them "omp" if there is
            a donor, which measured better more often than not (BENCHMARKS.md), else "mean".
        texts: List of texts on which the model is measured before and after; none that it was trained on.
        donor: A causal LM of the new tokenizer, for "omp".
        atoms: Most common tokens that "omp" combines to one.
        batch_size: Texts per forward pass of the measurement.
        progress: Show progress bars.

    Returns:
        (the model of the same class with the new vocabulary, TransplantReport).

    Raises:
        ManticoreError: The method is unknown or lacks a donor, a tokenizer shows no tokens, the model has no rows for
            its own tokenizer, or more of it than embedding and head depends on the vocabulary.
    """
    if method != "auto":
        check_method(method, donor)
    source, target = Surfaces(tokenizer_from), Surfaces(tokenizer_to)
    ends = {"input": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    rows = _rows(model, ends, source.size, "the tokenizer it comes with")
    plan = match(source, target)
    if tokenizer_from.get_vocab() == tokenizer_to.get_vocab():
        out = copy.deepcopy(model)
        _set_ids(out.config, tokenizer_to)
        _set_generation(out, tokenizer_to)
        return out, TransplantReport("identical", (rows, rows), plan.coverage())
    donor_ends = {}
    if donor is not None:
        donor_ends = {"input": donor.get_input_embeddings(), "head": donor.get_output_embeddings()}
        _rows(donor, donor_ends, target.size, "the new tokenizer", "The donor")
    tried = [method]
    if method == "auto":
        tried = ["omp", "mean"] if donor is not None else ["mean"]
        tried = tried if texts else tried[:1]
    report = TransplantReport(tried[0], (rows, target.size), {})
    if texts:
        report.bits_before = bits_per_byte(model, tokenizer_from, texts, batch_size, progress)
        report.text_coverage = text_coverage(plan, tokenizer_to, texts)
    best = None
    for name in tried:
        given = {side: end.weight.detach() for side, end in donor_ends.items()}
        found = _graft(model, ends, plan, name, given, atoms, tokenizer_to, progress)
        if texts:
            report.bits_after[name] = bits_per_byte(found, tokenizer_to, texts, batch_size, progress)
        if best is None or report.bits_after[name] < report.bits_after[report.method]:
            best, report.method = found, name
    report.coverage = plan.coverage(pieces_only=report.method == "mean")
    return best, report


def _rows(model, ends, size, whose, what="The model"):
    """Rows of a model's embedding, if there are enough of them and as many in its head."""
    kind = f"{what} ({model.config.model_type})"
    if None in ends.values():
        raise ManticoreError(f"{kind} has no embedding or no head that can be asked for; it cannot be transplanted.")
    rows = {len(end.weight) for end in ends.values()}
    if rows != {model.config.vocab_size}:
        raise ManticoreError(
            f"{kind}: its embedding and head have {sorted(rows)} rows, its vocab_size is {model.config.vocab_size}; "
            "such a vocabulary cannot be transplanted."
        )
    if size > model.config.vocab_size:
        raise ManticoreError(
            f"{kind} has {model.config.vocab_size} rows, but {whose} has ids up to {size - 1}: give the tokenizer that "
            "belongs to it."
        )
    return model.config.vocab_size


@torch.no_grad()
def _graft(model, ends, plan, name, donor, atoms, tokenizer, progress):
    """A new model: the body's tensors copied, embedding and head made by a method."""
    config = copy.deepcopy(model.config)
    config.vocab_size = plan.size
    tied = ends["head"].weight is ends["input"].weight
    config.tie_word_embeddings = tied
    _set_ids(config, tokenizer)
    with local_torch_dtype(model.dtype):
        out = build_component(f"The transplanted model ({config.model_type})", config).to(model.device)
    known, own = model.state_dict(), end_names(model)
    if type(out) is not type(model) or own != end_names(out):
        raise ManticoreError(
            f"The model is a {type(model).__name__}, its configuration builds a {type(out).__name__}; only a plain "
            "model of its family can be transplanted."
        )
    body = {key: value.clone() for key, value in known.items() if key not in own}
    for key, value in out.state_dict().items():
        if key not in own and (key not in body or body[key].shape != value.shape):
            raise ManticoreError(
                f"The model ({config.model_type}) cannot be transplanted: {key} depends on the vocabulary, too, and "
                "only an embedding and a head can be made for another one."
            )
    out.load_state_dict(body, strict=False, assign=True)
    for side in ("head",) if tied else ("input", "head"):  # one matrix: rows that are wrong in the head cost more
        end = out.get_input_embeddings() if side == "input" else out.get_output_embeddings()
        coefficients = METHODS[name](plan, side, donor.get(side), atoms, progress)
        for key, value in ends[side].named_parameters(recurse=False):
            rows = new_rows(value, plan, "tied" if tied else side, coefficients)
            setattr(end, key, torch.nn.Parameter(rows, value.requires_grad))
    if tied:
        out.get_input_embeddings().weight = out.get_output_embeddings().weight
    out.generation_config = copy.deepcopy(model.generation_config)
    _set_generation(out, tokenizer)
    return out.train(model.training)


def _set_ids(config, tokenizer):
    """The special tokens of the new tokenizer; what else names a token of the old one goes."""
    for key in list(vars(config)):
        if key.endswith("_token_id"):
            setattr(config, key, None)
    for key in _IDS:
        setattr(config, key, getattr(tokenizer, key))


def _set_generation(model, tokenizer):
    """As `_set_ids`, for the settings of `generate`: lists of tokens there are of the old vocabulary, too."""
    if model.generation_config is None:
        return
    for key in list(vars(model.generation_config)):
        if key.endswith("_token_id") or key in _LISTS:
            setattr(model.generation_config, key, None)
    for key in _IDS:
        setattr(model.generation_config, key, getattr(tokenizer, key))
