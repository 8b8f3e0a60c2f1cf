"""One count of FLOPs: what torch's counter knows, and attention and convolutions as they are computed here."""

import pytest
import torch
import torch.nn.functional as F
from families import hybrid
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from manticore_hf.compare.scores import forward_flops
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.plan.ledger import Ledger
from manticore_hf.training.prune import segment_costs
from manticore_hf.utils.flops import FORMULAS, count_flops, flop_formula


def test_attention_counts_alike_by_whichever_kernel():
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 24, 16), torch.randn(2, 4, 24, 16)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            assert count_flops(lambda: F.scaled_dot_product_attention(query, key, value)) == 4 * 2 * 4 * 8 * 24 * 16


def test_the_table_of_torch_is_not_touched():
    assert not set(FORMULAS) & set(flop_registry) - {torch.ops.aten.convolution_backward}
    assert flop_registry[torch.ops.aten.convolution_backward] is not flop_formula(torch.ops.aten.convolution_backward)
    assert flop_formula(torch.ops.aten.mm) is flop_registry[torch.ops.aten.mm]
    assert flop_formula(torch.ops.aten.relu) is None


@pytest.mark.parametrize("pair", ["gpt_neox", "llama"])  # a scan has products on some devices and none on others
def test_every_place_counts_the_same(pair, tmp_path):
    model, tokens = hybrid(pair, num_blocks=2), 16
    model.save_pretrained(tmp_path)
    found = inspect_hybrid(tmp_path, tokens=tokens)
    parts = {row["part"]: row["flops_per_token"] for row in found["parts"]}
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as plain:
        model(input_ids=ids, use_cache=False)
    assert forward_flops(model, tokens) == parts["hybrid"] == plain.get_total_flops() / tokens
    costs = segment_costs(model, "flops", tokens=tokens)
    for row in found["blocks"]:
        place = model.config.component_names.index(row["component"])
        assert costs[row["block"] - 1][place] == row["flops_per_token"], row
    for name in model.config.component_names:
        assert forward_flops(model.component(name), tokens) == parts[name]
    ledger = Ledger()
    with torch.no_grad():
        fake = hybrid(pair, num_blocks=2).to("meta")
        with ledger.step(fake):
            fake(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    assert ledger.operations == plain.get_total_flops()
