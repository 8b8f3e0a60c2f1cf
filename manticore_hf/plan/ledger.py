"""A training step without storage: what is alive at every moment, and the operations, counted while it runs.

The real modules run on tensors that have shapes and no data (torch's fake tensors), forward and backward, and the
ledger sees every tensor come and go. Nothing is assumed about an architecture. What kernels allocate inside themselves
is not seen; `kernels` adds it where it is known to matter.
"""

import contextlib
import weakref
from collections.abc import Hashable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from manticore_hf.plan import kernels
from manticore_hf.utils.flops import flop_formula


class Ledger(FakeTensorMode):
    """A fake mode that keeps account. As a context, it makes tensors fake; only inside `step` it counts.

    A model may be shorter than the one it stands for (see `shrink`). What happens in a section that stands for several
    layers is then repeated: layers of the same kind in a row do the same to memory, so levels are added up, and the
    highest is at the first or the last of them.

    Attributes:
        repeats: {key: how often the sections with this key happen}.
        shares: {id of a parameter: how many of its complete gradient's bytes stay where FSDP2 divides it}; default: 1.
        peak: Highest (bytes that a micro-batch made; the same with the gradients it left; with these divided; with only
            those that are not), without weights.
        operations: FLOPs.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.repeats, self.shares, self.counting, self.depth = {}, {}, False, 0
        self._begin(())

    def _begin(self, tensors):
        self.live, self.once, self.weights = {}, set(), {tensor.untyped_storage()._cdata for tensor in tensors}
        self.made = self.grads = self.divided = self.undivided = self.operations = 0
        self.key = None
        self.peak = self.first = self.highest = self._level()

    # ---- the step ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, *models: nn.Module) -> Iterator[None]:
        """Context of one micro-batch of models that are fake and have no gradients."""
        tensors = [one for model in models for one in (*model.parameters(), *model.buffers())]
        self._begin(tensors)
        handles = [
            parameter.register_post_accumulate_grad_hook(self._left)
            for parameter in tensors
            if parameter.requires_grad and parameter.is_leaf
        ]
        self.counting = True
        try:
            with self:
                yield
            self.mark(None, None)
        finally:
            self.counting = False
            for handle in handles:
                handle.remove()

    def mark(self, key: Hashable | None, state: torch.Tensor | None) -> None:
        """Ends the present section and begins one with `key` (None: of what happens once).

        Args:
            key: A key of `repeats`, or None.
            state: The tensor that is handed from one to the other, or None. Each repetition hands on its own.
        """
        if not self.counting:
            return
        more, level = self.repeats.get(self.key, 1) - 1, self._level()
        steps = [now - first for now, first in zip(level, self.first)]
        highest = [max(high, high + more * step) for high, step in zip(self.highest, steps)]
        self.peak = tuple(map(max, self.peak, highest))
        self.made += more * steps[0]
        self.grads += more * (steps[1] - steps[0])
        self.divided += more * (steps[2] - steps[0])
        self.undivided += more * (steps[3] - steps[0])
        self.key, self.first = key, self._level()
        self.highest = self.first
        if state is not None:
            self.once.add(state.untyped_storage()._cdata)

    def _level(self):
        return tuple(self.made + left for left in (0, self.grads, self.divided, self.undivided))

    def _left(self, parameter):
        """A parameter's gradient is complete: it stays until the optimizer has run."""
        key = parameter.grad.untyped_storage()._cdata
        if key not in self.live or self.live[key][1] is not None:
            return
        size, _, made_in = self.live[key]
        share = self.shares.get(id(parameter))
        share = (1, 1) if share is None else (share, 0)
        self.live[key] = (size, share, made_in)
        self._leave(size, share)

    def _leave(self, size, share):
        self.made, self.grads = self.made - size, self.grads + size
        self.divided, self.undivided = self.divided + share[0] * size, self.undivided + share[1] * size

    # ---- every operation ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.counting or self.depth or func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.depth += 1  # what an operation is decomposed into is not what a kernel allocates
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.depth -= 1
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self._add(one)
        packet = func._overloadpacket
        scratch = kernels.scratch(packet, args, kwargs)
        self.highest = tuple(max(high, level + scratch) for high, level in zip(self.highest, self._level()))
        count = flop_formula(packet)
        if count is not None:
            self.operations += self.repeats.get(self.key, 1) * count(*args, **kwargs, out_val=out)
        return out

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.weights:
            return
        size = storage.nbytes()
        self.live[key] = (size, None, self.key)
        self.made += size
        weakref.finalize(storage, self._drop, key, self.live)

    def _drop(self, key, live):
        if live is not self.live or key not in live:  # of a step before
            return
        size, share, made_in = live.pop(key)
        if made_in != self.key and key not in self.once:  # elsewhere, and so are those of all repetitions
            size *= self.repeats.get(made_in, 1) / self.repeats.get(self.key, 1)
        self.once.discard(key)
        self.made -= size
        if share is not None:
            self._leave(-size, share)
