"""The settings of the six MAD tasks: defaults, difficulty changes, and which settings raise.

Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (arXiv 2403.17844), as its code runs it
(github.com/athms/mad-lab): defaults and changes from `configs/tasks/*.yml`, vocabularies from `mad/data/instances.py`,
test size and training settings from `mad/configs.py` (AdamW, learning rate 1e-4, 5e-4 or 1e-3, weight decay 0 or 0.1,
the best of the six counts; 200 epochs of batches of 128, cosine to 1e-6; width 128, two mixers and two MLPs).
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manticore_hf.modeling.configuration_manticore import ManticoreError

if TYPE_CHECKING:
    from datasets import Dataset

_NOISY = ("noisy-in-context-recall", "compression", "memorization")

# Beyond the defaults of MadTask; then what the benchmark changes, one setting at a time, to make the task harder.
_EXAMPLES = (6400, 3200, 1600, 800)
_RECALL_CHANGES = {"vocab_size": (32, 64, 128), "seq_len": (256, 512, 1024), "num_train": _EXAMPLES}
TASKS = {
    "in-context-recall": ({}, _RECALL_CHANGES),
    "fuzzy-in-context-recall": ({"key_motif": 3, "value_motif": 3}, _RECALL_CHANGES),
    # Sixteen tokens of every vocabulary are noise.
    "noisy-in-context-recall": (
        {"vocab_size": 32, "noise_vocab_size": 16, "frac_noise": 0.2},
        {**_RECALL_CHANGES, "vocab_size": (48, 80, 144), "frac_noise": (0.4, 0.6, 0.8)},
    ),
    "selective-copying": (
        {"seq_len": 256, "tokens_to_copy": 16},
        {**_RECALL_CHANGES, "seq_len": (512, 1024), "tokens_to_copy": (32, 64, 96)},
    ),
    "compression": ({"seq_len": 32}, {**_RECALL_CHANGES, "seq_len": (64, 128, 256)}),
    "memorization": (
        {"vocab_size": 256, "seq_len": 32, "num_train": 256},
        {"vocab_size": (512, 1024, 2048, 4096, 8192)},
    ),
}
ALIASES = {
    "recall": "in-context-recall", "fuzzy-recall": "fuzzy-in-context-recall", "fuzzy": "fuzzy-in-context-recall",
    "noisy-recall": "noisy-in-context-recall", "copying": "selective-copying",
}  # fmt: skip


@dataclass(frozen=True)
class MadTask:
    """One task at one difficulty. Make it with `mad_task`, which knows the task's own defaults."""

    name: str = dataclasses.field(metadata={"help": "One of TASKS."})
    vocab_size: int = dataclasses.field(default=16, metadata={"help": "Token ids, special and noise tokens included."})
    seq_len: int = dataclasses.field(default=128, metadata={"help": "Tokens per sequence."})
    num_train: int = dataclasses.field(default=12_800, metadata={"help": "Training sequences."})
    num_test: int = dataclasses.field(default=1_280, metadata={"help": "Test sequences."})
    frac_noise: float = dataclasses.field(
        default=0.0, metadata={"help": "Share of pairs (compression: tokens) replaced by noise."}
    )
    noise_vocab_size: int = dataclasses.field(default=0, metadata={"help": "Token ids that only noise uses."})
    tokens_to_copy: int = dataclasses.field(default=0, metadata={"help": "Tokens to copy (selective copying)."})
    key_motif: int = dataclasses.field(default=1, metadata={"help": "Longest key in tokens (fuzzy recall)."})
    value_motif: int = dataclasses.field(default=1, metadata={"help": "Longest value in tokens (fuzzy recall)."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Random seed; train and test draw apart."})

    def __post_init__(self):
        if self.name not in TASKS:
            raise ManticoreError(f"task={self.name!r} is unknown; choose one of {list(TASKS)}.")
        for field in dataclasses.fields(self)[1:]:
            if field.name == "frac_noise":
                continue
            value = getattr(self, field.name)
            least = 1 if field.name.startswith("num_") or field.name.endswith("_motif") else 0
            if not isinstance(value, int) or value < least:
                raise ManticoreError(f"{self.name}: {field.name}={value!r} must be a whole number from {least} on.")
        self._check_noise()
        self._check_fitting()

    def _check_noise(self):
        if not isinstance(self.frac_noise, int | float) or not 0 <= self.frac_noise < 1:
            raise ManticoreError(f"{self.name}: frac_noise={self.frac_noise!r} must be a number in [0, 1).")
        if self.frac_noise and self.name not in _NOISY:
            raise ManticoreError(
                f"{self.name} has no noise, and frac_noise={self.frac_noise} was given; tasks with noise are "
                f"{list(_NOISY)}."
            )
        if self.frac_noise and not self.noise_vocab_size:
            raise ManticoreError(
                f"{self.name}: frac_noise={self.frac_noise} needs tokens to draw noise from: give noise_vocab_size."
            )

    def _check_fitting(self):
        # A key that is drawn must leave others to confuse it with, and so must a value
        keys, values = len(self.keys), len(self.answers)
        paired = self.name not in ("selective-copying", "compression")
        if values < max(2, self.value_motif) or (paired and keys < max(2, self.key_motif)):
            raise ManticoreError(
                f"{self.name}: vocab_size={self.vocab_size} leaves {keys} key and {values} value tokens: too few for "
                f"keys of {self.key_motif} and values of {self.value_motif} token(s). Give a larger vocab_size."
            )
        if self.name == "fuzzy-in-context-recall":
            least = 2 * (self.key_motif + self.value_motif) + 1
            if keys**self.key_motif >= 2**62:
                raise ManticoreError(f"{self.name}: key_motif={self.key_motif} is too large to number the keys.")
        elif self.name == "selective-copying":
            least = 2 * self.tokens_to_copy + 2
            if not self.tokens_to_copy:
                raise ManticoreError(f"{self.name}: tokens_to_copy=0 leaves nothing to copy; give at least 1.")
        else:
            least = 4 if self.name.endswith("recall") else 2
            if paired and self.seq_len % 2:
                raise ManticoreError(f"{self.name}: seq_len={self.seq_len} must be even, for pairs of tokens.")
        if self.seq_len < least:
            raise ManticoreError(f"{self.name}: seq_len={self.seq_len} is too short; at least {least} is needed.")

    # ---- vocabulary: keys, then values, then noise, then special tokens ----------------------------------------------

    @property
    def special_tokens(self) -> int:
        """How many of the last token ids have a role of their own (pad, blank, copy, insert, compress)."""
        return {"fuzzy-in-context-recall": 1, "selective-copying": 2, "compression": 1, "memorization": 1}.get(
            self.name, 0
        )

    @property
    def keys(self) -> range:
        """Token ids of keys; none where the task has no keys."""
        if self.name in ("selective-copying", "compression"):
            return range(0)
        return range(self._plain // 2)

    @property
    def answers(self) -> range:
        """Token ids that are asked for (the compression token apart, which compression asks for once, too)."""
        return range(len(self.keys), self._plain)

    @property
    def noise(self) -> range:
        """Token ids of noise."""
        return range(self._plain, self._plain + self.noise_vocab_size)

    @property
    def _plain(self):
        return max(0, self.vocab_size - self.special_tokens - self.noise_vocab_size)

    @property
    def chance(self) -> float:
        """Accuracy (micro) of drawing uniformly from `answers`; compression's last token needs no drawing."""
        if self.name == "compression":
            drawn = (self.seq_len - 1) * (1 - self.frac_noise)
            return (1 + drawn / len(self.answers)) / (1 + drawn)
        return 1 / len(self.answers)

    @property
    def shifted(self) -> bool:
        """Whether `labels` are shifted by the model, as those of a causal LM; compression's belong where they are."""
        return self.name != "compression"

    def dataset(self, split: str) -> "Dataset":
        """The split "train" or "test" as a `datasets.Dataset` of `input_ids` and `labels`; see `mad.generate`."""
        from manticore_hf.experiments.mad.tasks import dataset

        return dataset(self, split)


def mad_task(name: str, **settings: Any) -> MadTask:
    """A MAD task with the benchmark's defaults, but for what is given.

    Args:
        name: One of TASKS, or its short form (recall, fuzzy-recall, noisy-recall, copying).
        **settings: Fields of MadTask.

    Raises:
        ManticoreError: An unknown task or setting, or settings that do not fit together.
    """
    name = ALIASES.get(name, name)
    if name not in TASKS:
        close = difflib.get_close_matches(str(name), [*TASKS, *ALIASES], 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {list(TASKS)}."
        raise ManticoreError(f"task={name!r} is unknown; {hint}")
    known = [field.name for field in dataclasses.fields(MadTask)[1:]]
    for key in settings:
        if key not in known:
            raise ManticoreError(f"{name}: there is no setting {key!r} (={settings[key]!r}); choose from {known}.")
    return MadTask(name, **{**TASKS[name][0], **settings})


def benchmark_settings(name: str, seed: int = 0) -> list[MadTask]:
    """All difficulties of a task in the benchmark: its defaults, then every change, one setting at a time.

    A model's MAD score in a task is the mean of its accuracies over these, each the best of the training settings.
    """
    base = mad_task(name, seed=seed)
    changed = [dataclasses.replace(base, **{key: v}) for key, vs in TASKS[base.name][1].items() for v in vs]
    return [base, *changed]
