"""Other tokenizers: giving a model the vocabulary of another one, and joining components whose tokenizers differ."""

from manticore_hf.compose.transplant.compose import compose_transplanted
from manticore_hf.compose.transplant.coverage import TransplantReport, bits_per_byte
from manticore_hf.compose.transplant.transplant import transplant

__all__ = ["TransplantReport", "bits_per_byte", "compose_transplanted", "transplant"]
