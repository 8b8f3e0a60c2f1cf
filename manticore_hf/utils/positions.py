"""How far components can read, checked beforehand, because an index error inside a model would not say what to do.

A published repository goes without, as any model of Transformers does: what is too long raises an error there, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import is_not

import torch
from torch import nn
from transformers import PreTrainedConfig

from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.modeling.segments_manticore import Whole


@dataclass(frozen=True)
class Tables:
    """Where the tables of a segment (learned positions, GPT-J's angles) end.

    Rotary and recurrent components compute beyond their `config.max_position_embeddings`, better or worse.

    Attributes:
        positions: Positions that it has rows for, None without a table.
        length: Tokens, padding and cached ones included, that its masks are made for (GPT-Neo); None: any number.
    """

    positions: int | None = None
    length: int | None = None


def tables_of(segment: Whole) -> Tables:
    """The Tables of a segment, found again where a child of the owner of its layers was replaced."""
    modules = segment.stack._modules
    layers = modules[segment.layout.layers]
    children = [*modules.values(), *layers._modules.values()]
    known, found = segment.__dict__.get("_tables", ((), None))
    if len(children) != len(known) or any(map(is_not, children, known)):
        first = position_tables(segment) if segment.start == 0 else []
        replaced = getattr(segment, "stand_ins", ())
        runs = [x for name, x in modules.items() if x not in (None, layers) and name not in replaced]
        beside = [*segment.stack.buffers(recurse=False), *(buffer for x in runs for buffer in x.buffers())]
        found = find_tables(segment.stack.config, first, list(layers)[segment.start : segment.stop], beside)
        segment.__dict__["_tables"] = children, found
    return found


def position_tables(segment: Whole) -> list[nn.Module]:
    """The embeddings of positions that are added to those of tokens, where a segment is the first of its component."""
    tokens, config = segment.component.get_input_embeddings(), segment.component.config.get_text_config()
    widths = {tokens.weight.shape[1], config.hidden_size}
    tables = [one for one in segment.stack._modules.values() if isinstance(one, nn.Embedding) and one is not tokens]
    return [one for one in tables if one.embedding_dim in widths]


def find_tables(config: PreTrainedConfig, embeddings: list, layers: list, beside: list) -> Tables:
    """The Tables of some layers of a component, and of what runs with them.

    That are modules that add positions before them (`embeddings`), and buffers `beside` them (GPT-J's angles, CTRL's).
    """
    stated = getattr(config, "max_position_embeddings", None)
    # OPT and its kin leave the first rows to padding.
    rows = [one.num_embeddings - getattr(one, "offset", 0) for one in embeddings if isinstance(one, nn.Embedding)]
    lengths = []
    for buffer in {id(one): one for layer in layers for one in layer.buffers()}.values():
        if buffer.ndim >= 2 and stated in buffer.shape:
            (lengths if list(buffer.shape).count(stated) > 1 else rows).append(stated)
    rows += [stated for one in beside if one.ndim == 2 and one.shape[0] == stated != one.shape[1]]
    return Tables(min(rows, default=None), min(lengths, default=None))


def check_positions(segments: Iterable, positions: torch.Tensor, length: int, explicit: bool) -> None:
    """Raises ManticoreError for input beyond a table, before an index error inside of a component.

    Args:
        segments: (component's name, its `Whole`) of all that are run.
        positions: [batch or 1, time] positions of the new tokens.
        length: Cached and new tokens, padding included, or the length of a static cache.
        explicit: Whether the caller gave the positions; else none of them is `length` or more.
    """
    found = [(name, tables) for name, segment in segments if (tables := tables_of(segment)) != Tables()]
    if not found or positions.numel() == 0:
        return
    last = None
    for name, tables in found:
        if tables.length is not None and length > tables.length:
            raise _too_long(name, tables.length, f"{length} tokens, padding and cached ones included")
        if tables.positions is not None and (explicit or length > tables.positions):
            last = int(positions.max()) if last is None else last
            if last >= tables.positions:
                said = f"position {last}, that is {last + 1} tokens with those cached"
                raise _too_long(name, tables.positions, said)


def _too_long(name, limit, given):
    return ManticoreError(
        f"Component {name!r} has a table of {limit} positions; {given}, is beyond its end. Give shorter input, "
        "generate fewer tokens, or take the component out of the mixture (set_mixture_weights with weight 0 for "
        f"{name!r} in every block: it is not run then)."
    )
