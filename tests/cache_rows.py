"""Rows of a hybrid's cache, picked as beams and batches pick them, against the rows read without a cache."""

from collections.abc import Callable

import torch
from cases import case

from manticore_hf import ManticoreForCausalLM
from manticore_hf.families.contract import close


def reader(model: ManticoreForCausalLM, ids: torch.Tensor) -> Callable:
    """A function of (cache, rows, start, stop): the logits of these tokens of `ids` [3, 12], behind the cache."""

    def read(cache, rows, start, stop):
        return model(input_ids=ids[rows, start:stop], cache=cache).logits

    return read


def check_picked(model: ManticoreForCausalLM, ids: torch.Tensor, whole: torch.Tensor) -> None:
    """Rows that are reordered, selected or repeated after seven tokens go on as in `whole`, the logits of all 12."""
    read = reader(model, ids)
    for name, act, rows in (
        ("reordered", lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        ("selected", lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        ("repeated", lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        with case(name):
            cache = model.make_cache()
            read(cache, slice(None), 0, 7)
            act(cache)
            close(read(cache, rows, 7, 12), whole[rows, 7:])
