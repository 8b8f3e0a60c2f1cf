"""A finite language, and the best predictions that a model with a given tokenizer could make of it: by enumeration.

The texts and their probabilities are known, so that a component that is perfect can be asked for its next token, and
so can one with the hybrid's tokenizer: mapped, the first must predict what the second does.
"""

import itertools
import math
import random

import torch
from manticore_hf.modeling.aligned_hybrid import Aligner, Piece
from manticore_hf.modeling.aligned_reading import Row, grow


class Language:
    """All texts made of one piece from each list, with random probabilities.

    Args:
        pieces: Lists of strings.
        seed: Of the probabilities.
    """

    def __init__(self, pieces, seed=0):
        rng = random.Random(seed)
        made = ["".join(parts) for parts in itertools.product(*pieces)]
        weights = [rng.gammavariate(0.7, 1.0) for _ in made]
        self.texts = {}
        for text, weight in zip(made, weights):
            self.texts[text] = self.texts.get(text, 0.0) + weight / sum(weights)


class Ideal:
    """The best predictions of the next token, where every text ends with the tokenizer's end token.

    Args:
        language: A Language.
        cut: Text -> ids.
        end: The id that ends a text.
    """

    def __init__(self, language, cut, end):
        self.end, self.after = end, {}
        for text, weight in language.texts.items():
            ids = (*cut(text), end)
            for length in range(len(ids)):
                following = self.after.setdefault(ids[:length], {})
                following[ids[length]] = following.get(ids[length], 0.0) + weight

    def __call__(self, ids):
        """{next token: probability} after some tokens; empty where no text begins so."""
        found = self.after.get(tuple(ids), {})
        total = sum(found.values())
        return {number: weight / total for number, weight in found.items()}


def bits(language, cut, end, predict):
    """Mean bits of a text whose tokens are predicted by `predict(tokens so far) -> {token: probability}`."""
    total = 0.0
    for text, weight in language.texts.items():
        ids = (*cut(text), end)
        total -= weight * sum(math.log2(max(predict(ids[:i]).get(ids[i], 0.0), 1e-30)) for i in range(len(ids)))
    return total


def mapped(mapping, ideal, share):
    """What the product makes of a perfect component, as a function of the hybrid's tokens so far."""
    a, b, found = mapping.a, mapping.b, {}

    def predict(ids):
        ids = tuple(ids)
        if ids not in found:
            tree, _ = grow(mapping, Row(), [a.surfaces.roles["bos"], *ids])
            paths, logits = [()], torch.full((len(tree.parents), b.size), -60.0)
            for node in range(1, len(tree.parents)):
                paths.append((*paths[tree.parents[node]], tree.tokens[node]))
                for number, probability in ideal(paths[node][len(b.start) :]).items():
                    logits[node, number] = math.log(probability)
            piece = Piece(Aligner("a"), mapping, [(0, tree.positions[-1])], a.size)
            found[ids] = piece(logits[piece.nodes], share(ids)[None])[0].exp()
            assert abs(found[ids].sum() - 1) < 1e-4
        return dict(enumerate(found[ids].tolist()))

    return predict
