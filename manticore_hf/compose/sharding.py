"""Saved buffers of a hybrid while accelerate shards it with FSDP2.

accelerate (1.15), when it shards with FSDP2 and `cpu_ram_efficient_loading`, sends the model to the meta device, cuts
it there, and hands the weights out again by its state dict. Buffers that belong to the state dict are not cut, which it
does not expect: a pruned hybrid's record of alpha, Gemma 4's scales, the correction biases of DeepSeek's and
NemotronH's experts. Every process has read them, so they need no handing out: they are kept aside on the way to the
meta device and put back when the weights arrive, inside wrappers (PEFT's) as well.
"""

import torch


class KeepsBuffers:
    """Mixin of the package's hybrid classes, before those of `modeling/`."""

    def state_dict(self, *args: object, prefix: str = "", **kwargs: object) -> dict:
        """As in torch, but of a model that was sharded on the meta device only what is sharded."""
        out = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in self.aside():
            out.pop(prefix + key, None)
        return out

    def _apply(self, fn, recurse=True):
        """Keeps saved buffers that are about to go to the meta device; torch's way for whatever moves a module."""
        before = {key: buffer for key, buffer in self._saved_buffers() if buffer.device.type != "meta"}
        super()._apply(fn, recurse)
        gone = {key for key, buffer in self._saved_buffers() if buffer.device.type == "meta"}
        self.__dict__["_kept_buffers"] = {key: buffer for key, buffer in before.items() if key in gone}
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for key, buffer in self.aside().items():
            mesh = next(self.parameters()).device_mesh  # where shards compute, also if they wait elsewhere
            state_dict.setdefault(prefix + key, buffer.to(mesh.device_type))
        self.__dict__.pop("_kept_buffers", None)
        return super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def aside(self) -> dict:
        """{name: buffer} of what was kept and is needed: all weights are shards on the meta device."""
        kept = self.__dict__.get("_kept_buffers")
        if not kept or any(type(one).__name__ != "DTensor" or one.device.type != "meta" for one in self.parameters()):
            return {}
        return kept

    def _saved_buffers(self):
        """(name, buffer) of all that belong to the state dict."""
        for path, module in self.named_modules(remove_duplicate=False):
            for name, buffer in module._buffers.items():
                if isinstance(buffer, torch.Tensor) and name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, buffer
