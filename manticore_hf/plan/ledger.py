"""A training step without storage: what is alive at every moment, and the operations, counted while it runs.

The real modules run on tensors that have shapes and no data (torch's fake tensors), forward and backward, and the
ledger sees every tensor come and go. Nothing is assumed about an architecture. What kernels allocate inside themselves
is not seen; `kernels` adds it where it is known to matter.
"""

import contextlib
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from manticore_hf.plan import kernels


class Ledger(FakeTensorMode):
    """A fake mode that keeps account. As a context, it makes tensors fake; only inside `step` it counts.

    Attributes:
        sections: [[key, first level, last level, peak, operations]] of the step, in the order of time. A level is
            (bytes that a micro-batch made, the same with the gradients it left), without weights. Sections with a key
            stand for several layers: see `Timeline`.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.counting, self.depth = False, 0
        self.live, self.weights, self.sections = {}, set(), []
        self.made = self.grads = 0

    # ---- the step ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, *models):
        """Context of one micro-batch of models that are fake and have no gradients."""
        self.live, self.made, self.grads, self.sections = {}, 0, 0, []
        tensors = [one for model in models for one in (*model.parameters(), *model.buffers())]
        self.weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        handles = [
            parameter.register_post_accumulate_grad_hook(self._left) for parameter in tensors
            if parameter.requires_grad and parameter.is_leaf
        ]  # fmt: skip
        self.counting = True
        self.mark(None)
        try:
            with self:
                yield
            self._close()
        finally:
            self.counting = False
            for handle in handles:
                handle.remove()

    def mark(self, key):
        """Ends the present section and begins one with `key` (None: of what happens once)."""
        if self.counting:
            self._close()
            level = self._level()
            self.sections.append([key, level, level, level, 0])

    def _close(self):
        if self.sections:
            self.sections[-1][2] = self._level()

    def _level(self):
        return (self.made, self.made + self.grads)

    def _left(self, parameter):
        """A parameter's gradient is complete: it stays until the optimizer has run."""
        key = parameter.grad.untyped_storage()._cdata
        if self.live.get(key, (0, True))[1]:
            return
        size = self.live[key][0]
        self.live[key] = (size, True)
        self.made, self.grads = self.made - size, self.grads + size

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
        section, packet = self.sections[-1], func._overloadpacket
        scratch = kernels.scratch(packet, args, kwargs)
        section[3] = tuple(max(peak, level + scratch) for peak, level in zip(section[3], self._level()))
        count = kernels.FLOPS.get(packet) or flop_registry.get(packet)
        if count is not None:
            section[4] += count(*args, **kwargs, out_val=out)
        return out

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.weights:
            return
        size = storage.nbytes()
        self.live[key] = (size, False)
        self.made += size
        weakref.finalize(storage, self._drop, key, self.live)

    def _drop(self, key, live):
        if live is not self.live or key not in live:  # of a step before
            return
        size, left = live.pop(key)
        if left:
            self.grads -= size
        else:
            self.made -= size


class Timeline:
    """The sections of a shortened model, as those of the whole one.

    Layers of the same kind in a row do the same to memory, so what one section did happens as often as it has layers to
    stand for: the levels are added up, and the highest is at the first or the last of them.

    Args:
        sections: As `Ledger.sections`.
        repeats: {key: how often its sections happen}.

    Attributes:
        peak: Highest (bytes made by the micro-batch, those with gradients).
        last: The levels at the end.
        operations: FLOPs.
    """

    def __init__(self, sections, repeats):
        level, self.peak, self.operations = (0, 0), (0, 0), 0
        for key, first, last, peak, operations in sections:
            times = repeats.get(key, 1)
            steps = [b - a for a, b in zip(first, last)]
            above = [b - a for a, b in zip(first, peak)]
            self.peak = tuple(
                max(so_far, now + high, now + (times - 1) * step + high)
                for so_far, now, step, high in zip(self.peak, level, steps, above)
            )
            level = tuple(now + times * step for now, step in zip(level, steps))
            self.operations += times * operations
        self.last = level
