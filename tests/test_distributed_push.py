"""What two processes have trained is pushed once, whole, and loads with nothing but the Hub."""

from pathlib import Path

import pytest
import torch
from hub_models import publish, tiny, tokenizer
from processes import launch
from transformers import AutoModelForCausalLM

from manticore_hf import ManticoreForCausalLM
from manticore_hf import publish as publish_hybrid


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_processes_push_what_they_trained(hub, owner, tmp_path, options):
    for name, family in (("a", "gpt_neox"), ("b", "mamba")):
        publish(hub, f"{owner}/{name}", tiny(family), tmp_path / "src", tokenizer())
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"], num_blocks=2)
    model.save_pretrained(tmp_path / "out")
    repo_id = f"{owner}/h"
    publish_hybrid(tmp_path / "out", repo_id)
    launch([Path(__file__).with_name("distributed_push.py"), repo_id, tmp_path / "run", *options])
    trained = torch.load(tmp_path / "run" / "state.pt")
    loaded = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
    start = model.state_dict()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, trained[key], atol=0, rtol=0, msg=key)
    assert any(not torch.equal(start[key], value) for key, value in trained.items()), "nothing was trained"
    assert "org/books" in hub.files(repo_id)["README.md"].decode()
