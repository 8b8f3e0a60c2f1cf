"""Why this mixture: what each part of a hybrid is worth on held-out text, and how alike its components' features are.

Everything is measured on rows of `load_rows`, over the tokens that have a label; rows of different lengths are padded
on the right, which a causal model does not see.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from manticore_hf.compose.hybrid import ManticoreModel
from manticore_hf.evaluation.losses import ONLINE, inner_baselines, online_nats
from manticore_hf.utils.distributed import component_runner


def batches(
    rows: Dataset, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (input_ids [batch, time], labels [batch, time]) of rows; padding has the label -100.

    Args:
        rows: Dataset with `input_ids`, and `labels` where they differ from them.
        batch_size: Rows per batch.
        device: Where the tensors are wanted.
    """
    has_labels = "labels" in rows.column_names
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = [torch.tensor(row) for row in part["input_ids"]]
        labels = [torch.tensor(row) for row in part["labels"]] if has_labels else ids
        pad = torch.nn.utils.rnn.pad_sequence
        yield pad(ids, True, 0).to(device), pad(labels, True, -100).to(device)


def scored_positions(rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens are that are predicted and scored, in the order of `token_losses`.

    Args:
        rows: Held-out rows.

    Returns:
        (row [n], position [n] in the row), integers.
    """
    found = [(labels[:, 1:] != -100).nonzero() for _, labels in batches(rows, 1)]
    row = torch.cat([torch.full((len(one),), number) for number, one in enumerate(found)])
    return row, torch.cat([one[:, 1] for one in found]) + 1


def _losses_of(logits, labels):
    """Cross-entropy [n] of each labelled token, in nats."""
    kept = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][kept].float(), labels[:, 1:][kept], reduction="none").double().cpu()


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, rows: Dataset, batch_size: int = 8
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Loss of every token under the hybrid, each component (its own head, inside this hybrid) and two mixtures of them.

    These are their plain ensemble, and their online mixture.

    Args:
        model: A hybrid in evaluation mode.
        rows: Held-out rows.
        batch_size: Rows per forward pass.

    Returns:
        ({name: [n] nats, float64}, the token gate's weights [n, K] or None); a pruned hybrid has "hybrid" only, its
        baselines are no longer inside.
    """
    names = inner_baselines(model)
    out = {name: [] for name in [*names, *(["ensemble", ONLINE] if names else []), "hybrid"]}
    gate = []
    for ids, labels in tqdm(list(batches(rows, batch_size, model.device)), desc="Token losses", leave=False):
        mean, own = 0.0, []
        for name in names:
            logprobs = component_runner(model, name)(input_ids=ids, use_cache=False).logits
            logprobs = logprobs[..., : model.config.vocab_size].float().log_softmax(-1)
            out[name].append(_losses_of(logprobs, labels))
            mean = mean + logprobs / len(names)
            own.append(-logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0])
        if names:
            out["ensemble"].append(_losses_of(mean, labels))
            out[ONLINE].append(online_nats(torch.stack(own, -1), model.config)[labels[:, 1:] != -100].double().cpu())
        run = model(input_ids=ids, use_cache=False)
        out["hybrid"].append(_losses_of(run.logits, labels))
        if run.weights is not None:
            gate.append(run.weights[:, :-1][labels[:, 1:] != -100].float().cpu())
    return {name: torch.cat(parts) for name, parts in out.items()}, torch.cat(gate) if gate else None


@torch.no_grad()
def hybrid_loss(model: PreTrainedModel, rows: Dataset, batch_size: int = 8, desc: str = "Loss") -> float:
    """Mean loss of the hybrid alone.

    Args:
        model: A hybrid in evaluation mode.
        rows: Held-out rows.
        batch_size: Rows per forward pass.
        desc: Label of the progress bar.

    Returns:
        Nats per token.
    """
    found = list(batches(rows, batch_size, model.device))
    losses = [
        _losses_of(model(input_ids=ids, use_cache=False).logits, labels)
        for ids, labels in tqdm(found, desc=desc, leave=False)
    ]
    return torch.cat(losses).mean().item()


# ---- without one component, or with another mixture ------------------------------------------------------------------


def gated_block(model: PreTrainedModel) -> int | None:
    """The block whose mixture is the token gate's, or None where no gate is in use."""
    config = model.config
    fixed = config.mixture_weights is not None and config.mixture_weights[-1] is not None
    return config.num_blocks - 1 if config.mixture == "token" and not fixed else None


def cannot_remove(model: PreTrainedModel, name: str, block: int) -> str | None:
    """Why a component cannot be removed from a block.

    Args:
        model: A hybrid.
        name: The component.
        block: Index of the block.

    Returns:
        The reason, as a part of a sentence; None if it can be removed.
    """
    if model.config.route is not None:
        return "pruned: each block has only one component"
    k, row = model.config.component_names.index(name), model.mixture_weights()[block].tolist()
    if not sum(row) - row[k] > 0:
        return "this block uses no other component"
    return None


@contextlib.contextmanager
def removed(model: PreTrainedModel, name: str, block: int) -> Iterator[None]:
    """The hybrid with a component's mixture weight set to 0 in one block and the others of that block renormalised.

    The block's row is fixed by `set_mixture_weights`, so that the component is not run there; where the token gate
    mixes, its logit is minus infinity for every token. Whatever else reads that block's weights follows: with
    gate="alpha" the projectors, with mixed embeddings the embeddings (first block) and the heads (`head_mixture`).
    Bridges from the component to others are not run either.

    Args:
        model: A soft hybrid.
        name: The component.
        block: Index of the block; `cannot_remove` must be None.
    """
    bridges = model.config.bridges
    try:
        model.config.bridges = bridges and [{**e, "weight": 0.0} if e["from"] == name else e for e in bridges]
        with _unmixed(model, block, model.config.component_names.index(name)):
            yield
    finally:
        model.config.bridges = bridges


@contextlib.contextmanager
def _unmixed(model, block, k):
    if block == gated_block(model):
        index = torch.tensor(k, device=model.device)
        silent = _gate_logits(model, lambda logits: logits.index_fill(-1, index, -torch.inf))
        with silent, _alpha_logit(model, block, k):
            yield
        return
    row = model.mixture_weights()[block].double()
    row[k] = 0.0
    with mixture(model, {block: (row / row.sum()).tolist()}):
        yield


@contextlib.contextmanager
def mixture(model: PreTrainedModel, rows: torch.Tensor) -> Iterator[None]:
    """The hybrid with the weights of some blocks fixed; `rows` is {block: [K] weights}."""
    before = model.config.mixture_weights
    weights = list(before or [None] * model.config.num_blocks)
    for block, row in rows.items():
        weights[block] = row
    try:
        model.set_mixture_weights(weights)
        yield
    finally:
        model.config.mixture_weights = before


@contextlib.contextmanager
def _gate_logits(model, change):
    """The token gate with its logits changed before the softmax."""
    handle = model.hybrid_mixer.token_gate.linear.register_forward_hook(lambda module, args, out: change(out))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _alpha_logit(model, block, k):
    """Without native heads the last block also mixes states, by alpha: the component goes there, too."""
    alpha = model.hybrid_mixer.alpha_logits.data
    before = alpha[block, k].item()
    alpha[block, k] = -torch.inf
    try:
        yield
    finally:
        alpha[block, k] = before


def other_mixtures(model: PreTrainedModel) -> list[tuple[str, contextlib.AbstractContextManager]]:
    """[(what it is, context manager)]: mixtures that were not trained, to see what the trained one is worth."""
    config = model.config
    count, gated = len(config.component_names), gated_block(model)
    if config.route is not None or count < 2:
        return []
    even = dict.fromkeys(range(config.num_blocks), [1 / count] * count)
    out = [("equal weights in every block", mixture(model, even))]
    if gated is not None:
        bias = model.mixture_weights()[gated].double()
        out.append(("the gate, ignoring the token", mixture(model, {gated: (bias / bias.sum()).tolist()})))
    return out


# ---- how alike features are ------------------------------------------------------------------------------------------


class LinearCKA:
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, section 3) of rows that come in batches.

        |Y'X|^2 / (|X'X| |Y'Y|), X and Y centred, Frobenius norms

    Only sums of products are kept, in float64. 1 for features that are equal up to rotation and scale.
    """

    def __init__(self):
        self.count, self.sums = 0, None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows x [n, width_x] and y [n, width_y] of the same tokens."""
        x, y = x.double(), y.double()
        new = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x]
        self.sums = new if self.sums is None else [a + b for a, b in zip(self.sums, new)]
        self.count += len(x)

    def value(self) -> float:
        """The similarity; NaN if one of the two does not vary."""
        x, y, xx, yy, yx = self.sums
        own_x, own_y = (xx - torch.outer(x, x) / self.count).norm(), (yy - torch.outer(y, y) / self.count).norm()
        return ((yx - torch.outer(y, x) / self.count).square().sum() / (own_x * own_y)).item()


@torch.no_grad()
def feature_similarity(model: PreTrainedModel, rows: Dataset, batch_size: int = 8) -> list[dict[str, Any]]:
    """Linear CKA between what two components contribute at each block boundary, in the hybrid's own run.

    After an inner block that is their translated features (out-projector applied, as they enter the mixture); where the
    hybrid has no projector, because embeddings and heads are native, it is the components' hidden states.

    Args:
        model: A hybrid in evaluation mode.
        rows: Held-out rows.
        batch_size: Rows per forward pass.

    Returns:
        [{"boundary": 0 for the embeddings, else the block's number, "translated": bool, "components": [a, b],
        "cka": number, "tokens": n, "width": the larger of the two widths}].
    """
    names, last, seen, pairs = model.config.component_names, model.config.num_blocks, {}, {}

    def watch(mixer, args, out):
        if args[0].__name__ == "leave":
            seen[args[1] + 1, args[2]] = (out, True)

    handle = model.hybrid_mixer.register_forward_hook(watch)
    try:
        for ids, labels in tqdm(list(batches(rows, batch_size, model.device)), desc="Similarity", leave=False):
            seen.clear()
            run = ManticoreModel.forward(model, input_ids=ids, use_cache=False, return_dict=True)
            mine = [name for name in names if name not in model.config.aligned]  # others embed other tokens
            seen.update({(0, name): (model.embed(name, ids), False) for name in mine})
            for name, state in run.states.items():
                if (last, name) not in seen:
                    seen[last, name] = (state, False)
            real = _real(ids, labels)
            for (boundary, a), (x, translated) in seen.items():
                for b in names[names.index(a) + 1 :]:
                    if (boundary, b) in seen:
                        y, key = seen[boundary, b][0], (boundary, a, b, translated)
                        pairs.setdefault(key, LinearCKA()).add(x[real], y[real])
    finally:
        handle.remove()
    return [
        {
            "boundary": boundary,
            "translated": translated,
            "components": [a, b],
            "cka": one.value(),
            "tokens": one.count,
            "width": max(one.sums[0].numel(), one.sums[1].numel()),
        }
        for (boundary, a, b, translated), one in sorted(pairs.items())
    ]


def _real(ids, labels):
    """[batch, time] of bool: what is no padding on the right (a prompt has no label, but is text)."""
    scored = labels != -100
    return scored.flip(-1).cumsum(-1).flip(-1) > 0
