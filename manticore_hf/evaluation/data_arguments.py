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
    text_column: str = field(
        default="text", metadata={"help": "Column that holds plain text; answers.text for a nested one."}
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
    block_size: int = field(default=512, metadata={"help": "Tokens per row."})
    max_tokens: int | None = field(default=None, metadata={"help": "At most this many tokens, validation included."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the rows kept for validation; 0 for none."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the validation split."})

    def __post_init__(self):
        if self.block_size < 2:
            raise ManticoreError(f"block_size={self.block_size} must be at least 2 tokens.")
        if not 0 <= self.split_seed < 2**32:
            raise ManticoreError(f"split_seed={self.split_seed} must be in [0, 2**32).")
        if self.special_tokens not in ("text", "tokens"):
            raise ManticoreError(f"special_tokens={self.special_tokens!r} is neither 'text' nor 'tokens'.")
        if not 0 <= self.validation_fraction < 1:
            raise ManticoreError(f"validation_fraction={self.validation_fraction} must be in [0, 1).")
