"""Where text comes from and how it is cut: the data options of all stages, and `data:` in a recipe.

Imports neither torch nor Transformers: a command's help is printed before they are.
"""

from dataclasses import dataclass, field

from manticore_hf.modeling.settings_manticore import ManticoreError


@dataclass
class DataArguments:
    """Where the text comes from and how it is cut."""

    data: str = field(metadata={"help": "Text, jsonl, csv or parquet file, a folder of them, or a Hub data set id."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    data_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    data_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub data set only as far as needed."})
    where: str | None = field(
        default=None,
        metadata={"help": "Read only the records that have this text in a column: column=text (column= for none)."},
    )
    shuffle_seed: int | None = field(
        default=None, metadata={"help": "Shuffle the records with this seed. Default: as they come."}
    )
    max_records: int | None = field(default=None, metadata={"help": "Read at most this many of these records."})
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column that holds plain text; answers.text for a nested one; or a text with columns in "
            "braces, '{question} {answer}'. The columns of prompts and answers are given likewise."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompt (instruction data), which gets no loss."}
    )
    completion_column: str = field(default="completion", metadata={"help": "Column of the answer."})
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of text, jsonl and csv, e.g. latin-1. Default: a byte order mark's, or UTF-8."},
    )
    special_tokens: str = field(
        default="text",
        metadata={
            "help": "What a special token's name in a text is (<unk>, <|im_start|>): 'text', the characters it is "
            "written with, or 'tokens', the token.",
            "choices": ["text", "tokens"],
        },
    )
    space_characters: bool = field(
        default=False,
        metadata={
            "help": "Put a space between every two characters of a text, as the paper's code does with Penn Treebank "
            "and FineWeb by mistake: only to compare with its numbers, which are comparable with no others."
        },
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per row."})
    one_per_row: bool = field(
        default=False, metadata={"help": "Every text is a row of its own, cut to block_size, instead of packed rows."}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "At most this many tokens, validation included."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the rows kept for validation; 0 for none."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the validation split."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split of the Hub data set that is for validation, instead of a share of the rows."},
    )

    def __post_init__(self):
        if self.block_size < 2:
            raise ManticoreError(f"block_size={self.block_size} must be at least 2 tokens.")
        if not 0 <= self.split_seed < 2**32:
            raise ManticoreError(f"split_seed={self.split_seed} must be in [0, 2**32).")
        if self.one_per_row and self.prompt_column is not None:
            raise ManticoreError("one_per_row: records with a prompt_column are rows of their own already; drop one.")
        if self.where is not None and "=" not in self.where:
            raise ManticoreError(f"where={self.where!r} must be column=text.")
        for name, low in (("shuffle_seed", 0), ("max_records", 1)):
            value = getattr(self, name)
            if value is not None and not low <= value < 2**32:
                raise ManticoreError(f"{name}={value} must be in [{low}, 2**32).")
        if self.special_tokens not in ("text", "tokens"):
            raise ManticoreError(f"special_tokens={self.special_tokens!r} is neither 'text' nor 'tokens'.")
        if not 0 <= self.validation_fraction < 1:
            raise ManticoreError(f"validation_fraction={self.validation_fraction} must be in [0, 1).")
