"""Components on the local Hub and a hybrid of them, for the tests of publishing."""

import pytest
from hub_models import publish as put
from hub_models import tiny, tokenizer
from huggingface_hub import HfApi

from manticore_hf import ManticoreForCausalLM

MIT, APACHE = "---\nlicense: mit\n---\n", "---\nlicense: apache-2.0\n---\n"


def component(hub, repo_id, family, root, card=MIT, **options):
    """Puts a component on the Hub, with its tokenizer and a card."""

    def edit(folder):
        if card is not None:
            (folder / "README.md").write_text(card)

    return put(hub, repo_id, tiny(family), root, tokenizer(), edit=edit, **options)


@pytest.fixture
def parts(hub, owner, tmp_path):
    component(hub, f"{owner}/a", "gpt_neox", tmp_path / "src")
    component(hub, f"{owner}/b", "mamba", tmp_path / "src", APACHE)
    return [f"{owner}/a", f"{owner}/b"]


@pytest.fixture
def saved(parts, tmp_path):
    """A saved hybrid. Returns (model, folder)."""
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2)
    model.save_pretrained(tmp_path / "out")
    return model, tmp_path / "out"


def exists(repo_id):
    return HfApi().repo_exists(repo_id)
