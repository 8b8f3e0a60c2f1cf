"""Rows that are not one text from end to end: several documents in one row, and padding between tokens.

Recurrent layers, learned positions and windows that count places know of neither. So layers never see such a row:

- Without a cache each document is run in a row of its own, in groups of like length, and its states are put back where
  its tokens were (`Documents`). That is exact for every family, on every kernel.
- With a cache a call is cut where padding begins or ends inside of a row; while a row is padded, what the cache holds
  of it stays as it was, behind that much more padding on the left (`run_cut`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from .configuration_manticore import ManticoreError

SPARE, FEW = 8, 128
"""Documents share a pass while their padding is at most 1/SPARE of its tokens, or FEW tokens (what a pass costs)."""
Opt = torch.Tensor | None

IN_PARTS = (
    "output_attentions=True: rows with several documents, or with padding between tokens, are run in parts, whose "
    "attention weights are not of the whole row; give each text a row of its own."
)


def has_values(*tensors: torch.Tensor | None) -> bool:
    """Whether numbers of these tensors (or None) may be looked at: not while a graph is made of them."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and not any(x is not None and (x.is_meta or isinstance(x, FakeTensor)) for x in tensors)


def check_not_told(model: torch.nn.Module, word: str, why: str) -> None:
    """Raises ManticoreError where PEFT tells its layers `word` of each row of a batch; `why` it must not."""
    modules = [module for module in model.modules() if module._forward_pre_hooks]
    hooks = [(module, key, hook) for module in modules for key, hook in module._forward_pre_hooks.items()]
    told = [(module, key) for module, key, hook in hooks if word in getattr(hook, "keywords", ())]
    for module, key in told:  # PEFT (0.21) would leave them there, for later calls, too
        del module._forward_pre_hooks[key]
    if told:
        raise ManticoreError(f"{word}: {why}. Call the model once for each adapter, of plain LoRA.")


def check_mask(mask: torch.Tensor, time: int) -> torch.Tensor:
    """An attention mask [batch, past + time] as integers, 1 for real tokens.

    Args:
        mask: Of booleans, of 0 and 1 in any type, or of what is added to scores (0 and large negative numbers).
        time: New tokens. Integers are not looked at in steps of one.

    Raises:
        ManticoreError: It is none of these, or may be two of them.
    """
    floats = mask.is_floating_point()
    if mask.dtype != torch.bool and has_values(mask) and (floats or time > 1):
        wrong = mask[(mask != 0) & (mask != 1)]
        if floats and (wrong <= -1e4).all() and not (mask == 1).any() and (len(wrong) or not mask.any()):
            if not len(wrong):
                raise ManticoreError(
                    f"attention_mask is {mask.dtype} and 0 throughout: all padding, or none? Give integers."
                )
            mask = mask == 0
        elif len(wrong):
            raise ManticoreError(
                f"attention_mask holds {wrong[0].item()}; it may hold 1 (True) for real tokens and 0 for padding, or "
                "only what is added to scores (floats: 0, -inf). Use position_ids or seq_idx for documents in one row."
            )
    return mask.long()


# ---- without a cache -------------------------------------------------------------------------------------------------


@dataclass
class Documents:
    """The documents of a batch.

    Attributes:
        index: [tokens] places of real tokens in the flattened batch, document by document, on the CPU.
        lengths: [documents] tokens of each.
        shape: (batch, time).
    """

    index: torch.Tensor
    lengths: torch.Tensor
    shape: tuple

    @property
    def are_several(self) -> bool:
        """Whether a row holds more than one document."""
        rows = self.index[self.lengths.cumsum(0) - 1] // self.shape[1]
        return len(rows.unique()) < len(rows)

    def labels(self, labels: torch.Tensor, are_shifted: bool = False) -> torch.Tensor:
        """Labels [batch, time] of which each causal LM's shift by one makes those of each document alone.

        What comes after a document's last token is nobody's label, nor is padding.

        Args:
            labels: [batch, time].
            are_shifted: Whether the caller has shifted them.
        """
        inside = torch.ones(len(self.index), dtype=torch.bool)
        inside[self.lengths.cumsum(0) - 1] = False
        before, after = self.index[inside].to(labels.device), self.index[inside.roll(1)].to(labels.device)
        here, there = (before, before) if are_shifted else (before + 1, after)
        return torch.full_like(labels, -100).flatten().index_copy(0, here, labels.flatten()[there]).view_as(labels)

    def groups(self, together: bool) -> list[list[int]]:
        """Numbers of the documents that share a pass, the longest first.

        Args:
            together: One group, whatever the padding comes to.
        """
        lengths, out, tokens, padding = self.lengths.tolist(), [], 0, 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            more = lengths[out[-1][0]] - lengths[i] if out else 0
            if out and (together or padding + more <= max((tokens + lengths[i]) // SPARE, FEW)):
                out[-1].append(i)
                tokens, padding = tokens + lengths[i], padding + more
            else:
                out.append([i])
                tokens, padding = lengths[i], 0
        return out

    @torch.compiler.disable(recursive=False)
    def run(self, run: Callable, inputs: Any, together: bool) -> Any:
        """What `run` gives for each document in a row of its own, put back in place; zeros for padding.

        Args:
            run: Called with an Inputs, gives a Pass.
            inputs: The Inputs of the whole batch, without a cache.
            together: As in `groups`.
        """
        device, starts = inputs.positions.device, self.lengths.cumsum(0) - self.lengths
        passes, found, where = [], [], []
        for group in self.groups(together):
            lengths, steps = self.lengths[group, None], torch.arange(self.lengths[group[0]])
            # Padding behind a document changes nothing for it in a causal model, so that no mask is needed
            over = (steps - lengths + 1).clamp(min=0)
            places, positions = self.index[starts[group, None] + steps - over].to(device), steps[None].to(device)
            if inputs.explicit:
                positions = inputs.positions.expand(self.shape).flatten()[places] + over.to(device)
                positions = positions.clamp(max=inputs.positions.max())  # no padding beyond a table
            mask = (over == 0).long().to(device) if inputs.explicit and inputs.mask is not None else None
            ids, embeds = (None if x is None else x.flatten(0, 1)[places] for x in (inputs.ids, inputs.embeds))
            passes.append(run(replace(inputs, ids=ids, embeds=embeds, mask=mask, positions=positions, documents=None)))
            found.append((over == 0).flatten().nonzero()[:, 0])
            where.append(places.flatten()[found[-1].to(device)])
        where = torch.cat(where)

        def put_back(parts):
            parts = torch.cat([part.flatten(0, 1)[rows.to(part.device)] for part, rows in zip(parts, found)])
            out = parts.new_zeros(self.shape[0] * self.shape[1], *parts.shape[1:])
            return out.index_copy(0, where.to(parts.device), parts).view(*self.shape, *parts.shape[1:])

        return joined(passes, put_back)


def joined(passes: list, join: Callable[[list], torch.Tensor]) -> Any:
    """One Pass of several: `join` makes one tensor of a list of them; the rest is the last one's."""

    def all_of(values):
        first = values[0]
        if isinstance(first, torch.Tensor):
            return join(values)
        if isinstance(first, dict):
            return {key: join([one[key] for one in values]) for key in first}
        return None if first is None else tuple(map(join, map(list, zip(*values))))

    keys = ("states", "shared", "hidden_states")
    return replace(passes[-1], **{key: all_of([getattr(one, key) for one in passes]) for key in keys})


def find_documents(
    mask: Opt, positions: Opt, shape: tuple, seq_idx: Opt = None, cu_seq_lens_q: Opt = None, cu_seq_lens_k: Opt = None
) -> Documents | None:
    """The Documents of a call, or None where each row is one text without padding inside.

    Args:
        mask: [batch, past + time] of integers, or None.
        positions: [batch or 1, time] as the caller gave them, or None. A document begins where they do not go on by
            one; under a mask, which may have gaps, where they do not go on.
        shape: (batch, time).
        seq_idx: [batch, time] numbers of the documents, or None.
        cu_seq_lens_q: [documents + 1] where documents begin and the last one ends in the flattened batch, or None.
        cu_seq_lens_k: The same.

    Raises:
        ManticoreError: They do not fit the batch.
    """
    (batch, time), told = shape, (positions, seq_idx, cu_seq_lens_q)
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return _find_in_graph(mask, positions, shape, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
    if time == 1 or (mask is None and all(one is None for one in told)) or not has_values(mask, *told):
        return None
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, -time:].cpu().bool()
    index = real.flatten().nonzero()[:, 0]
    begins = torch.zeros(shape, dtype=torch.bool)
    begins[:, 0] = True
    if seq_idx is not None:
        begins[:, 1:] |= (seq_idx.cpu().diff() != 0).expand(batch, -1)
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q.cpu().long().flatten()
        if ends[-1] != batch * time or not (cu_seq_lens_k is None or torch.equal(ends, cu_seq_lens_k.cpu().long())):
            raise ManticoreError(
                f"cu_seq_lens_q ends at {int(ends[-1])}, as cu_seq_lens_k must; there are {batch} * {time} tokens."
            )
        begins.view(-1)[ends[ends < batch * time]] = True
    # Several may begin in one padding: numbers, of which only real tokens are asked
    new = begins.flatten().cumsum(0)[index].diff() != 0
    if positions is not None:
        step = positions.cpu().expand(shape).flatten()[index].diff()
        new |= step != 1 if mask is None else step <= 0
    starts = F.pad(new, (1, 0), value=True).nonzero()[:, 0]
    lengths = torch.cat([starts, torch.tensor([len(index)])]).diff()
    lone = len(starts) == len((index // time).unique()) and bool((new | (index.diff() == 1)).all())
    return None if lone or not len(index) else Documents(index, lengths, shape)


_find_outside = torch.compiler.disable(find_documents)


def _find_in_graph(mask, positions, shape, *told):
    """`find_documents` while a graph is made, which is left only where the caller speaks of positions or documents."""
    if positions is not None or any(one is not None for one in told):
        return _find_outside(mask, positions, shape, *told)
    if mask is not None:
        begins = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)
        torch._assert_async((begins <= 1).all(), "attention_mask has padding between a row's tokens: do not compile.")
    return None


# ---- with a cache ----------------------------------------------------------------------------------------------------


def run_cut(run: Callable, inputs: Any) -> Any:
    """What `run` gives for a call with a mask and a cache, cut where padding begins or ends inside of a row.

    Args:
        run: Called with an Inputs, gives a Pass.
        inputs: The Inputs of the call.

    Raises:
        ManticoreError: The mask contradicts those of earlier calls, or the cache is static.
    """
    cache, mask, past, time = inputs.cache, inputs.mask, inputs.cache.seen, inputs.shape[1]
    read, new, known = mask[:, :past], mask[:, past:].bool(), cache.mask
    inside = ~new & (read.any(1, keepdim=True) | (new.cumsum(1) > 0))
    # Transformers takes a call's only token for a generated one, never padding, so it reaches the states of some models
    padded = inside if time > 1 else ~new
    differs = (read == 0).any() if known is None else (read != known.to(read.device)).any()
    differs, has_padding, is_inside = torch.stack([differs, padded.any(), inside.any()]).tolist()
    if differs:
        raise ManticoreError(
            "attention_mask differs from before for tokens in the cache, which recurrent states and windows can no "
            "longer leave out: give the same mask as before, or start with a new cache."
        )
    if is_inside and any(word in type(layer).__name__ for layer in cache.layers for word in ("Static", "Quantized")):
        raise ManticoreError(
            "attention_mask has padding between a row's tokens, which a static or quantised cache cannot hold: leave "
            "cache_implementation at its default."
        )
    cuts, padded, passes = [0, time], padded.cpu(), []
    if has_padding:
        if inputs.attentions is not None:
            raise ManticoreError(IN_PARTS)
        cache.has_padding = cache.has_padding or is_inside
        cuts[1:1] = (padded.diff().any(0).nonzero()[:, 0] + 1).tolist()
    for start, stop in zip(cuts, cuts[1:]):
        rows = padded[:, start].nonzero()[:, 0]
        layers = cache.layers * len(rows[:1])
        kept = [{where: one[rows.to(one.device)] for where, one in _tensors(layer)} for layer in layers]
        part = {key: getattr(inputs, key) for key in ("ids", "embeds", "positions")}
        part = {key: None if x is None else x[:, start:stop] for key, x in part.items()}
        seen = mask[:, : past + stop]
        passes.append(run(replace(inputs, mask=_aligned(seen, past + start) if cache.has_padding else seen, **part)))
        for layer, states in zip(cache.layers, kept):
            _put_rows_back(layer, rows, states)
    cache.mask = mask
    return joined(passes, lambda parts: torch.cat(parts, 1)) if has_padding else passes[0]


def _aligned(mask, past):
    """A mask whose first `past` places are as the cache has them: all padding on the left."""
    there = torch.arange(past, device=mask.device) >= past - mask[:, :past].sum(1, keepdim=True)
    return torch.cat([there.to(mask.dtype), mask[:, past:]], 1)


def _tensors(layer):
    """((attribute, key or None), tensor) of what a layer's cache has of each row."""
    for name, value in vars(layer).items():
        for key, one in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(one, torch.Tensor) and one.ndim > 1:
                yield (name, key), one


def _put_rows_back(layer, rows, states):
    """Makes of rows what they were; what has grown is filled on the left, with what the mask leaves out."""
    for (name, key), one in list(_tensors(layer)):
        old = states.get((name, key), one.new_zeros(()))
        for dim in range(1, old.ndim):
            old = F.pad(old, [0, 0] * (old.ndim - 1 - dim) + [one.shape[dim] - old.shape[dim], 0])
        whole = one.clone() if one.requires_grad else one  # a backward pass may need what was there
        whole[rows.to(one.device)] = old
        setattr(layer, name, whole) if key is None else getattr(layer, name).update({key: whole})
