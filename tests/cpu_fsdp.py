"""Lets accelerate shard on CPUs: it knows FSDP on accelerators only, and takes DDP there without a word.

torch's own `fully_shard` runs on CPUs with gloo; what is replaced is accelerate's choice of the engine, nothing else.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow():
    """Makes accelerate take FSDP where it is asked for, also on CPUs."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
