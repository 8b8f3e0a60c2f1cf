"""What the tokens of a tokenizer stand for; the code is in `modeling/`, since aligned hybrids carry it."""

from manticore_hf.modeling.aligned_bytes import ROLES, Surfaces

__all__ = ["ROLES", "Surfaces"]
