"""How far the components can read: which of them has a table of positions, and what happens beyond its end.

`config.max_position_embeddings` is the smallest that a component's configuration states, as users of Transformers
expect of a limit that they may cut texts to. Rotary and recurrent components compute beyond theirs, better or worse;
a table (learned positions, GPT-J's angles) has an end. Input that reaches beyond the table of a component that is run
is refused; one whose mixture weight is exactly 0 is not run, and limits nothing.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_manticore import ManticoreError


@dataclass(frozen=True)
class Tables:
    """Where the tables of a segment end.

    Attributes:
        positions: Positions that it has rows for, None without a table.
        length: Tokens, padding and cached ones included, that its masks are made for (GPT-Neo); None: any number.
    """

    positions: int | None = None
    length: int | None = None


def find_tables(config, embeddings, layers, beside):
    """The Tables of some layers of a component.

    Args:
        config: The component's configuration.
        embeddings: Modules that add positions before the first of the layers.
        layers: The layers.
        beside: Buffers of the model outside of its layers (angles of GPT-J from Transformers 5.24 on, of CTRL).
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


def check_positions(segments, positions, length, explicit):
    """Refuses input beyond a table, before an index error inside of a component.

    Args:
        segments: (component's name, its Segment) of all that are run.
        positions: [batch or 1, time] positions of the new tokens.
        length: Cached and new tokens, padding included, or the length of a static cache.
        explicit: Whether the caller gave the positions; else none of them is `length` or more.

    Raises:
        ManticoreError: Names the component, its limit, and what was given.
    """
    if torch.compiler.is_compiling():  # looking at values would break the graph
        return
    found = [(name, segment.tables) for name, segment in segments if segment.tables != Tables()]
    if not found or positions.numel() == 0:
        return
    last = None
    for name, tables in found:
        if tables.length is not None and length > tables.length:
            _refuse(name, tables.length, f"{length} tokens, padding and cached ones included")
        if tables.positions is not None and (explicit or length > tables.positions):
            last = int(positions.max()) if last is None else last
            if last >= tables.positions:
                _refuse(name, tables.positions, f"position {last}, that is {last + 1} tokens with those cached")


def _refuse(name, limit, given):
    raise ManticoreError(
        f"Component {name!r} has a table of {limit} positions; {given}, is beyond its end. Give shorter input, "
        "generate fewer tokens, or take the component out of the mixture (set_mixture_weights with weight 0 for "
        f"{name!r} in every block: it is not run then)."
    )
