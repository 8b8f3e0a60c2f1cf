"""Components with their own tokenizers in a plan: how much they would read of a text, without having the text.

Such a component reads a tree of its tokens (see `modeling.aligned_reading`), and what it predicts is mapped to the
hybrid's vocabulary. How large the tree is, and between how many tokens the mapping chooses, depends on the text: it is
measured on the recipe's, where that and both tokenizers are at hand, and else assumed.
"""

from collections.abc import Mapping as MappingOf
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel

from manticore_hf.modeling import aligned_hybrid
from manticore_hf.modeling.aligned_hybrid import Aligner, Reading
from manticore_hf.modeling.aligned_mapping import ByteTokenizer, Cover, Mapping
from manticore_hf.modeling.aligned_reading import Position, Row, grow, masks, may_read_trees
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.modeling.running_manticore import Inputs

SAMPLE = 4_000
"""Bytes of text that are enough to measure on."""
MOST_PIECES = 50
"""Pieces in which the mapping is rehearsed at most."""


@dataclass(frozen=True)
class Amount:
    """What a component reads for each of the hybrid's tokens.

    Attributes:
        nodes: Nodes of its tree.
        plain: Covers (ways in which it may have cut the bytes so far) whose tokens end where the hybrid's do.
        inside: Covers whose next token begins within bytes that were read.
        pairs: Of each of the latter, pairs of a token of its own and one of the hybrid's that may come next.
        how: Where these numbers are from.
    """

    nodes: float
    plain: float
    inside: float
    pairs: float
    how: str


ASSUMED = Amount(1.4, 1.05, 1.0, 300.0, "assumed: SmolLM2 and Gemma 3 read 1.1 to 2.0, depending on the text")
"""For each of the hybrid's tokens: that of code, of the two models in benchmarks/results/aligned.json. Other languages
than English take more. The numbers of covers and pairs are guesses."""


def measure_amount(ours: ByteTokenizer, theirs: ByteTokenizer, texts: Sequence[str]) -> Amount:
    """What a component reads of some texts.

    Args:
        ours: The hybrid's tokenizer.
        theirs: The component's.
        texts: At least one that is not empty.
    """
    mapping, tokens, nodes, plain, inside, pairs = Mapping(ours, theirs), 0, 0, 0, 0, 0
    for text in texts:
        ids = ours.cut(text.encode())
        tree, _ = grow(mapping, Row(), ids)
        tokens, nodes = tokens + len(ids), nodes + len(tree.parents) - 1
        for position in tree.positions:
            for _, _, cover in position.covers:
                if cover.rest or cover.ahead:
                    inside += 1
                    pairs += len(mapping.pairs(cover.rest, cover.ahead, position.last)[0])
                else:
                    plain += 1
    size = sum(len(text.encode()) for text in texts)
    how = f"measured on {size:,} bytes of the text"
    return Amount(nodes / tokens, plain / tokens, inside / tokens, pairs / max(1, inside), how)


class PlannedAligner(Aligner):
    """Reads rows whose tokens are not known: of each as much as a component reads of a text on average.

    Args:
        home: The component whose tokenizer is the hybrid's.
        amounts: {component: Amount}.
    """

    def __init__(self, home: str, amounts: MappingOf[str, Amount]):
        super().__init__(home)
        self.amounts = amounts

    def mapping(self, model: PreTrainedModel, name: str) -> Any:
        """As the aligner's, between vocabularies of which nothing but the size is known."""
        if name not in self.mappings:
            sizes = (getattr(model.config, one).vocab_size for one in (name, self.home))
            self.mappings[name] = _PlannedMapping(self.amounts[name], *sizes)
        return self.mappings[name]

    def check_embeds(self, model: PreTrainedModel, inputs: Inputs) -> None:
        """Nothing is known of what is read."""

    def read(self, model: PreTrainedModel, name: str, inputs: Inputs) -> Reading:
        """As the aligner's; every row is as long as the others."""
        segment, amount, (batch, time) = model.segments.segment(name, 0), self.amounts[name], inputs.shape
        if not may_read_trees(segment, model.component(name).config):
            raise ManticoreError(
                f"Component {name!r} reads text through its own tokenizer in steps, with copies of its states where a "
                "word can be split in several ways: the memory for that cannot be planned. Measure a few steps "
                f"(max_steps: 3), or give the hybrid its tokenizer (hybrid: {{tokenizer_component: {name}}} in the "
                "recipe) and let the others read through theirs."
            )
        size = max(2, round(amount.nodes * time))
        ids = torch.zeros(batch, size, dtype=torch.long, device=inputs.ids.device)
        sees = torch.ones(batch, size, size, dtype=torch.bool, device=ids.device)
        given = masks(segment, sees, ids, torch.zeros(batch, dtype=torch.long, device=ids.device), None)
        states = segment(ids, given, ids, None)
        states = torch.cat([torch.cat([row.new_zeros(1, row.shape[-1]), row]) for row in states])
        positions = [self._position(amount, at, size) for at in range(time)]
        places = [(row * (size + 1), one) for row in range(batch) for one in positions]
        return Reading(places, states, (batch, time), {}, [])

    def log_probs(self, model: PreTrainedModel, name: str, reading: Reading, logits: torch.Tensor, kept: Any) -> Any:
        """As the aligner's, in at most MOST_PIECES pieces: each takes time though nothing is computed."""
        width = logits.shape[-1] + getattr(model.config, name).vocab_size
        larger = width * logits.shape[:-1].numel() // MOST_PIECES
        sizes = {key: max(getattr(aligned_hybrid, key), larger) for key in ("HEADS", "PIECE")}
        with mock.patch.multiple(aligned_hybrid, **sizes):
            return super().log_probs(model, name, reading, logits, kept)

    @staticmethod
    def _position(amount, at, size):
        node = min(size, 1 + int(amount.nodes * at))
        path, covers = [(node - 1, 0)], []
        for each, place, cover in (
            (amount.plain, node, Cover((0,), b"")),
            (amount.inside, node - 1, Cover((), b"inside")),
        ):
            count = int(each * (at + 1)) - int(each * at)
            covers += [(place, path, cover)] * count
        return Position(node, covers, (0,))


class _PlannedMapping:
    """Between two vocabularies as large as given: for each token the other one's with the same number."""

    def __init__(self, amount, theirs, ours):
        count, self.theirs, self.ours = max(1, round(amount.pairs)), theirs, ours
        ones = np.ones(count, dtype=np.float32)
        places = np.arange(count)
        self._inside = places % theirs, places % ours, places, ones, ones

    def at_boundary(self):
        same = np.arange(min(self.theirs, self.ours))
        return same, same

    def prefixes(self):
        return {side: np.zeros((size, 4), dtype=np.int64) for side, size in (("b", self.theirs), ("a", self.ours))}

    def pairs(self, rest, ahead, last):
        return self._inside

    def never(self, last):
        return np.zeros(1, dtype=np.int64)

    blocked = never
