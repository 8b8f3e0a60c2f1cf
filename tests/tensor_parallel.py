"""A hybrid cut over two processes by Transformers' own tensor parallelism: run by `test_as_transformers.py`.

python -m torch.distributed.run --nproc-per-node 2 tests/tensor_parallel.py HYBRID OUT
"""

import sys

import torch
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from manticore_hf import ManticoreForCausalLM
from manticore_hf.utils.distributed import world

hybrid, out = sys.argv[1:]
model = ManticoreForCausalLM.from_pretrained(hybrid, distributed_config=DistributedConfig(tp_size=2)).eval()
ids = torch.arange(24).view(2, 12) % 60 + 3
result = model(ids, labels=ids)
result.loss.backward()
with torch.no_grad():
    tokens = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
cut = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.to_local().numel() < p.numel()]
grads = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()}
if world()[0] == 0:
    torch.save({"logits": result.logits.detach(), "tokens": tokens, "cut": cut, "grads": grads}, out)
