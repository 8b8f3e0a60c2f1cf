"""Plans of hybrids whose components have tokenizers of their own: against what really happens, and what they say."""

import json
import re

import pytest
import torch
from aligned_pairs import CODE, tokenizer
from hub_models import folder_of
from manticore_hf.modeling import aligned_hybrid
from manticore_hf.modeling.aligned_mapping import ByteTokenizer, Mapping
from plan_cases import SIZES, allocated
from test_plan_command import no_adapters, save_configs, write_recipe  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from two_tokenizers import FIRST, SECOND

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM, set_stage
from manticore_hf.cli import main
from manticore_hf.plan.aligned import ASSUMED, measure_amount
from manticore_hf.plan.plan import make_plan
from manticore_hf.plan.schedule import _fixed
from manticore_hf.plan.step import Rehearsal
from manticore_hf.training.freezing import fix_alpha
from manticore_hf.training.trainer import PartSums
from manticore_hf.utils.flops import FORMULAS

TEXT = (FIRST + SECOND + CODE) * 6
BATCH, LENGTH = 2, 160


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Llama whose tokenizer is the hybrid's, and a GPT-NeoX with one like Gemma's."""
    specs = []
    for family, kind in (("llama", "gpt"), ("gpt_neox", "gemma")):
        torch.manual_seed(0)
        size = max(tokenizer(kind).get_vocab().values()) + 1
        config = AutoConfig.for_model(family, vocab_size=size, hidden_size=64, **SIZES[family])
        folder = tmp_path_factory.mktemp(family)
        folder_of(AutoModelForCausalLM.from_config(config), folder, tokenizer(kind))
        specs.append(ComponentSpec(folder, family))
    return ManticoreForCausalLM.from_components(specs)


def rows():
    ids = tokenizer("gpt")(TEXT).input_ids[: BATCH * LENGTH]
    return torch.tensor(ids).view(BATCH, LENGTH)


def amounts():
    pair = (ByteTokenizer(tokenizer(kind)) for kind in ("gpt", "gemma"))
    return {"gpt_neox": measure_amount(*pair, [tokenizer("gpt").decode(row) for row in rows().tolist()])}


def test_what_is_read_of_a_text_is_counted(made, monkeypatch):
    """Beside the trees and pairs that the hybrid itself makes of the same rows."""
    trees, read = [], aligned_hybrid.read_trees
    monkeypatch.setattr(aligned_hybrid, "read_trees", lambda *args: trees.extend(args[2]) or read(*args))
    pairs, find = [], Mapping.pairs
    monkeypatch.setattr(Mapping, "pairs", lambda *args: pairs.append(find(*args)) or pairs[-1])
    with torch.no_grad():
        made(rows(), use_cache=False)
    monkeypatch.undo()
    found, count = amounts()["gpt_neox"], BATCH * LENGTH
    assert found.nodes == pytest.approx(sum(len(tree.parents) - 1 for tree in trees) / count, rel=0.02)
    assert found.inside == pytest.approx(len(pairs) / count, rel=0.02) and 0.5 < found.inside < 2
    assert found.pairs == pytest.approx(sum(len(one[0]) for one in pairs) / len(pairs), rel=0.02)
    assert 1 <= found.plain < 1.3 and "bytes of the text" in found.how


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("stage, checkpointing", [("finetune", False), ("finetune", True), ("projectors", False)])
def test_an_aligned_micro_batch_takes_what_the_allocator_gives(made, stage, checkpointing):
    model, ids, before = set_stage(made, stage), rows(), made.config.mixture_weights
    if stage == "finetune":
        fix_alpha(model)
    PartSums(model).__enter__()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()

    def run():
        model.zero_grad(set_to_none=True)
        items = torch.tensor(BATCH * (LENGTH - 1))
        model(input_ids=ids, labels=ids, num_items_in_batch=items).loss.backward()

    try:
        taken = allocated(run)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            run()
    finally:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
        model.zero_grad(set_to_none=True)
        made.eval().config.mixture_weights = before
    config = _fixed(made.config) if stage == "finetune" else made.config
    cost = Rehearsal(config, stage, device="cpu", amounts=amounts()).micro_batch(BATCH, LENGTH, None, checkpointing)
    assert 0.98 * taken < cost.with_gradients < 1.25 * taken, (taken, cost.with_gradients)
    assert cost.operations == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.slow
def test_a_recipe_whose_tokenizers_and_text_are_here(made, tmp_path, no_adapters, capsys):  # noqa: F811
    for entry in made.config.components:
        part = made.component(entry["name"])
        part.config.architectures = [type(part).__name__]
        part.config.save_pretrained(tmp_path / entry["name"])
    for name, kind in (("llama", "gpt"), ("gpt_neox", "gemma")):
        tokenizer(kind).save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = write_recipe(tmp_path, ["llama", "gpt_neox"], "[pretrain: {max_steps: 2}, prune: {path: alpha}]")
    assert main(["plan", str(recipe), "--memory", "2GB", "--output-dir", str(tmp_path / "out")]) == 0
    shown, plan = capsys.readouterr().out, json.loads((tmp_path / "out" / "plan.json").read_text())
    size = {name: getattr(made.config, name).vocab_size for name in made.config.component_names}
    assert size["llama"] != size["gpt_neox"] and plan["parameters"] == made.num_parameters()
    nodes = float(re.search(r"gpt_neox reads ([\d.]+) tokens for each of the hybrid's \(measured on", shown)[1])
    assert nodes == pytest.approx(amounts()["gpt_neox"].nodes, rel=0.15)  # of the first part of the text
    pretrain, prune = plan["stages"]
    assert pretrain["choice"] and pretrain["trainable"] == plan["own_parameters"]
    assert prune["trainable"] == made.component("llama").num_parameters()
    recipe.write_text(recipe.read_text().replace("path: alpha", "path: gpt_neox"))
    with pytest.raises(ManticoreError, match="can be pruned to 'llama' alone"):
        make_plan(recipe)


@pytest.mark.slow
def test_configurations_without_tokenizers(tmp_path, no_adapters):  # noqa: F811
    """Then vocabularies of other sizes are taken for other tokenizers, and what is read of a text is assumed."""
    parts = [*save_configs(tmp_path, "llama", "mamba"), *save_configs(tmp_path, "gpt_neox", vocabulary=90)]
    recipe = write_recipe(tmp_path, [parts[0], parts[2]])
    plan = make_plan(recipe, tokens=1000, batch_size=2)
    notes = " ".join(plan["notes"])
    assert "the tokenizers of gpt_neox and llama were not read and are assumed to differ" in notes
    assert f"gpt_neox reads {ASSUMED.nodes:.2f} tokens for each of the hybrid's ({ASSUMED.how})" in notes
    # The component reads more tokens than the hybrid has, and has a larger vocabulary
    same = make_plan(write_recipe(tmp_path, [parts[0], *save_configs(tmp_path / "same", "gpt_neox")]), tokens=1000)
    assert plan["stages"][0]["flops_per_token"] > 1.1 * same["stages"][0]["flops_per_token"]
    assert plan["stages"][0]["choice"] and plan["verdict"].startswith("Fits: finetune")
    # Of two recurrent ones none reads a text at once
    with pytest.raises(ManticoreError, match="'mamba' reads text through its own tokenizer in steps.*tokenizer_compo"):
        make_plan(write_recipe(tmp_path, [parts[2], parts[1]]))
    plan = make_plan(write_recipe(tmp_path, [parts[2], parts[1]], tokenizer_component="mamba"), tokens=1000)
    assert plan["verdict"].startswith("Fits: ")


def test_a_saved_aligned_hybrid(made, tmp_path, no_adapters):  # noqa: F811
    made.save_pretrained(tmp_path)
    plan = make_plan(tmp_path, memory="4GB", block_size=32, batch_size=2, device="cpu")
    assert plan["parameters"] == made.num_parameters() and plan["stages"][0]["choice"] is not None
    assert any(ASSUMED.how in note for note in plan["notes"])
