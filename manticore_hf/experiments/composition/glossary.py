"""A composition in words: a private glossary in one component, the German and French of its definitions in the other.

Words are tokens, a name is of syllables, and only the glossary says what a name means:

* **glossary**: `xyl ter means lamp ;`, all names, some without their word. Trained on every next token, but on none
  where a word is left out.
* **dictionary**: `xyl ter means lamp , in German ? Lampe ;`. A word may bear a name, which says nothing of it. Trained
  on the German and French words.
* **train**, **trained-names**: `xyl ter means , in German ? Lampe ;`, names of the first half. Trained on the same.
* **known-words**, **test**: the same of the other half: names whose words the first half's have, too, and names whose
  words it has not, so that nothing trained on has told what these are in German.

No model but the two together can answer the test: of its names only the glossary tells what they mean, and of that only
the dictionary what it is in German. (What the first half's words are in German the task itself teaches.)
"""

from dataclasses import dataclass

import numpy as np
import torch

from manticore_hf.experiments.composition.texts import IGNORE, CompositionTask, Part, stream, written

WORDS = """
lamp Lampe lampe, spoon Löffel cuillère, bridge Brücke pont, horse Pferd cheval, tree Baum arbre, apple Apfel pomme,
knife Messer couteau, house Haus maison, church Kirche église, dog Hund chien, cat Katze chat, bird Vogel oiseau,
fish Fisch poisson, bread Brot pain, cheese Käse fromage, water Wasser eau, wine Wein vin, milk Milch lait,
key Schlüssel clé, door Tür porte, window Fenster fenêtre, chair Stuhl chaise, bed Bett lit, book Buch livre,
ship Schiff navire, boat Boot bateau, wheel Rad roue, street Straße rue, city Stadt ville, king König roi,
queen Königin reine, child Kind enfant, woman Frau femme, foot Fuß pied, head Kopf tête, eye Auge œil,
ear Ohr oreille, mouth Mund bouche, heart Herz cœur, sun Sonne soleil, moon Mond lune, star Stern étoile,
rain Regen pluie, snow Schnee neige, fire Feuer feu, stone Stein pierre, iron Eisen fer, forest Wald forêt
"""
SYLLABLES = "xyl ter nor vik bra dun fel gim hos jal kep lum mir nax ost pry qua rel sar tov ulm vex wim yor zan"
SYLLABLES = (SYLLABLES + " cly dro eph gol hib jur olk").split()
ENGLISH, GERMAN, FRENCH = zip(*(line.split() for line in WORDS.split(",")))
SIGNS = "means , in German French ? ;".split()
TOKENS = (*SYLLABLES, *ENGLISH, *GERMAN, *FRENCH, *SIGNS)
_FIRST, _COUNT = len(SYLLABLES), len(ENGLISH)
MEANS, COMMA, IN, IN_GERMAN, IN_FRENCH, ASKED, END = range(len(TOKENS) - len(SIGNS), len(TOKENS))


@dataclass(frozen=True)
class GlossaryTask(CompositionTask):
    """As CompositionTask: its keys are names, of `key_length` syllables; its table is the glossary, its sums questions.

    Attributes:
        num_keys: Names in the glossary; the first half is trained on.
        pairs: Questions in a row of the task.
        num_table: Rows of "glossary".
        num_sums: Rows of "dictionary".
        num_test: Rows of "test", of "known-words" and of "trained-names".
    """

    name = "glossary"
    vocab_size = len(TOKENS)
    letters = len(SYLLABLES)
    texts = "glossary", "dictionary", "train", "trained-names", "known-words", "test"
    parts = {"dictionary": Part("llama", "dictionary", "num_sums"), "glossary": Part("mamba", "glossary", "num_table")}
    said = range(_FIRST, _FIRST + _COUNT)
    answer = 1
    asked = {"unseen": "test", "known": "known-words", "trained": "trained-names"}

    @property
    def positions(self) -> int:
        """The longest row, in tokens."""
        return max(self.length, self.pairs * (self.key_length + 7))

    def write(self, text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One of `texts`, as `generate` returns it."""
        if text == "glossary":
            names, words, _ = glossary(self)
            chosen = rng.integers(0, self.num_keys, (self.num_table, -(-self.length // (self.key_length + 2))))
            slots = _joined(names[chosen], MEANS, words[chosen] + _FIRST, rng.choice([END, COMMA], chosen.shape))
            there = np.ones(slots.shape, bool)
            there[..., -2] = rng.random(chosen.shape) >= self.omitted
            asked = np.ones(slots.shape, bool)
            asked[..., -1] = there[..., -2]
            return written(slots, there, asked, self.length)
        if text == "dictionary":
            shape = self.num_sums, -(-self.length // 7)
            names = rng.integers(0, self.letters, (*shape, self.key_length))
            slots = self._questions(names, rng.integers(0, _COUNT, shape), rng)
            size = rng.integers(0, self.key_length + 1, shape)[..., None]  # 0: a word without a name
            there = np.ones(slots.shape, bool)
            there[..., : self.key_length] = np.arange(self.key_length) < size
            there[..., self.key_length] = (size[..., 0] > 0) & (rng.random(shape) < 0.5)
            return self._asked(slots, there, self.length)
        (names, words, is_new), half = glossary(self), np.arange(self.num_keys) < self.num_keys // 2
        mine = {"test": is_new, "known-words": ~half & ~is_new}.get(text, half)
        rows, places = self.num_train if text == "train" else self.num_test, np.flatnonzero(mine)
        chosen = places[rng.random((rows, len(places))).argsort(1)[:, : self.pairs]]
        slots = self._questions(names[chosen], words[chosen], rng)
        there = np.ones(slots.shape, bool)
        there[..., self.key_length + 1] = False
        return self._asked(slots, there, self.pairs * (self.key_length + 7))

    def told(self, ids: torch.Tensor) -> torch.Tensor:
        """What the second component knows, where a text of the task asks for it: [rows, time]; -100 elsewhere."""
        names, words, _ = (one.tolist() for one in glossary(self))
        known = {tuple(name): word + _FIRST for name, word in zip(names, words)}
        found = torch.full_like(ids, IGNORE)
        for row, place in (ids == MEANS).nonzero().tolist():
            found[row, place] = known[tuple(ids[row, place - self.key_length : place].tolist())]
        return found

    def _questions(self, names, words, rng):
        """Questions with their answers, of names [..., syllables] and their words [...]."""
        tongue = rng.integers(0, 2, words.shape)
        answer = words + _FIRST + _COUNT * (1 + tongue)
        return _joined(names, MEANS, words + _FIRST, COMMA, IN, IN_GERMAN + tongue, ASKED, answer, END)

    def _asked(self, slots, there, length):
        asked = np.zeros(slots.shape, bool)
        asked[..., -2] = True
        return written(slots, there, asked, length)


def glossary(task: GlossaryTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The private glossary: three quarters of the words for three quarters of the names, the others for the last.

    Returns:
        (names, words, is_new): token ids [num_keys, key_length], the words' places in ENGLISH [num_keys], and whether
        a name's word is one that the first half's names have not [num_keys].
    """
    rng, place = stream(task, "keys"), np.arange(task.num_keys)
    codes = rng.permutation(task.letters**task.key_length)[: task.num_keys]
    syllables = codes[:, None] // task.letters ** np.arange(task.key_length) % task.letters
    known, new = np.split(rng.permutation(_COUNT), [_COUNT * 3 // 4])
    is_new = place >= task.num_keys * 3 // 4
    words = np.where(is_new, new[place % len(new)], known[place % min(len(known), task.num_keys // 2)])
    return syllables, words, is_new


def _joined(names, *others):
    """[..., slots] of names [..., syllables] and of tokens, each one for all or an array of its own."""
    shape = names.shape[:-1]
    return np.concatenate([names, *(np.broadcast_to(one, shape)[..., None] for one in others)], -1)
