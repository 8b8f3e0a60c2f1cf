"""What the package's hybrids do beside those that run the code of their repository: `Packaged`, before their classes.

accelerate (1.15), when it shards with FSDP2 and `cpu_ram_efficient_loading`, sends the model to the meta device, cuts
it there, and hands the weights out again by its state dict. Buffers that belong to the state dict are not cut, which it
does not expect: a pruned hybrid's record of alpha, Gemma 4's scales, the correction biases of DeepSeek's and
NemotronH's experts. Every process has read them, so they need no handing out: they are kept aside on the way to the
meta device and put back when the weights arrive, inside wrappers (PEFT's) as well.
"""

import torch
from transformers import PreTrainedModel

from manticore_hf.compose.dtypes import transpose_again, transposed_maps
from manticore_hf.compose.training_checks import check_adapted, check_magnitudes
from manticore_hf.hub.upload import keep_card, upload_files
from manticore_hf.modeling.bounds_manticore import reason
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.dtypes_manticore import check_savable
from manticore_hf.utils.defence import check_generation, loading


class Packaged:
    """Mixin of the package's hybrid classes, before those of `modeling/`."""

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> PreTrainedModel:
        """As in Transformers, with references to components resolved and checked."""
        with loading(kwargs.get("pretrained_model_name_or_path", *args[:1]), kwargs):
            return super().from_pretrained(*args, **kwargs)

    def adjust_generation_fn(self, *args: object, **kwargs: object) -> None:
        """As in Transformers; what a repository's generation_config.json says is a stranger's word, too."""
        what = "The hybrid's generation_config.json"
        try:
            super().adjust_generation_fn(*args, **kwargs)
        except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError, RecursionError) as err:
            raise ManticoreError(f"{what} is invalid: {reason(err)}") from err
        if self.generation_config is not None:
            check_generation(what, self.generation_config.to_dict())

    # ---- training --------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT has wrapped what a configuration, whoever made it, says
            check_magnitudes(self)  # the rest was looked at above

    def train(self, mode: bool = True) -> PreTrainedModel:
        """As in torch; ManticoreError for what would train silently wrong."""
        went_on = self.training  # as in every step of the Trainer
        super().train(mode)
        if mode and hasattr(self, "peft_config"):  # adapters that came after the first
            adapters = [*self.peft_config.items(), self.is_resized]
            if not went_on or adapters != self.__dict__.get("_checked_adapters"):
                check_adapted(self)
            self.__dict__["_checked_adapters"] = adapters
        return self

    # ---- weights ---------------------------------------------------------------------------------------------------

    def post_init(self) -> None:
        """As in Transformers; notes which maps are transposed."""
        super().post_init()
        self.__dict__["_transposed"] = transposed_maps(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """As in Transformers, which gives GPT-2's transposed maps back as others."""
        super().dequantize(dtype)
        transpose_again(self, self._transposed)
        return self

    def state_dict(self, *args: object, prefix: str = "", **kwargs: object) -> dict:
        """As in torch, but of a model that was sharded on the meta device only what is sharded."""
        out = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in self.aside():
            out.pop(prefix + key, None)
        return out

    def _apply(self, fn, recurse=True):
        """Keeps saved buffers that are about to go to the meta device; torch's way for whatever moves a module."""
        before = {key: buffer for key, buffer in _saved_buffers(self) if buffer.device.type != "meta"}
        super()._apply(fn, recurse)
        gone = {key for key, buffer in _saved_buffers(self) if buffer.device.type == "meta"}
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

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _save_beside(self, directory, target):
        keep_card(self, directory, target)

    def push_to_hub(self, *args: object, **kwargs: object) -> str:
        """As in Transformers; what cannot be saved raises before a repository is made for it."""
        check_savable(self)
        return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **commit):
        return upload_files(self, working_dir, repo_id, files_timestamps, **commit)


def _saved_buffers(model):
    """(name, buffer) of all that belong to the state dict."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if isinstance(buffer, torch.Tensor) and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
