"""Bridges that are searched, pruned, planned, and trained by the command line."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from bridged import EVERY, hybrid
from families import tokens
from tiny_hybrid import QUIET, QUIET_RECIPE, rows_of, save_pair, word_tokenizer

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.app.hybrid_page.reading import Hybrid
from manticore_hf.families import contract
from manticore_hf.families.contract import close
from manticore_hf.hub.card import CardFacts, make_card
from manticore_hf.hub.inspection import inspect_hybrid
from manticore_hf.plan.plan import make_plan
from manticore_hf.report.measure import removed
from manticore_hf.report.write import write_report
from manticore_hf.training.prune import prune
from manticore_hf.training.recipe import run_recipe
from manticore_hf.training.search import STRATEGIES, SearchArguments, SearchTrainer
from manticore_hf.training.trained_stages import take_mixture
from manticore_hf.utils.bridge_settings import bridge_weights


def searched(strategy, tmp_path, **settings):
    model = hybrid("gpt_neox+mamba", drawn=False, **EVERY, bridge_alpha=True, **settings)
    contract.randomise(model, scale=0.02)
    more = {"max_steps": 4, "learning_rate": 1e-2, "alpha_learning_rate": 0.5, "per_device_train_batch_size": 2}
    arguments = SearchArguments(output_dir=str(tmp_path / strategy), strategy=strategy, **more, **QUIET)
    trainer = SearchTrainer(model, arguments, rows_of(8))
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("strategy", ["darts", "darts_bilevel", "gaea", "dash"])
def test_a_search_finds_the_weights_of_bridges(strategy, tmp_path):
    """Every place's alpha moves, by its own optimizer's rate; the gate and the maps are trained like any weight."""
    edges = ["others", {"from": "mamba", "to": "gpt_neox", "from_block": 0, "to_block": 2}]
    model, trainer = searched(strategy, tmp_path, bridges=edges)
    bridges = model.hybrid_mixer.bridges
    assert bridges.alpha_logits.shape == (4, 3) and bridges.noise is None and not bridges.holds_alpha
    weights = bridges.weights()
    close(weights.sum(1), torch.ones(4))
    assert [int((row > 0).sum()) for row in weights] == [1 + len(row) for row in bridges.rows]
    for row, found in zip(bridges.rows, weights):
        assert (found[: 1 + len(row)] - 1 / (1 + len(row))).abs().max() > 1e-3
    found = bridge_weights(model)
    assert len(found) == 5 and not model.hybrid_mixer.alpha_logits.grad
    logged = trainer.state.log_history[-2]
    for edge, weight in zip(model.config.bridges, found):
        key = f"bridge/{edge['from']} {edge['from_block']} to {edge['to']} {edge['to_block']}"
        assert logged[key] == pytest.approx(weight, abs=1e-6), key


def test_exponentiated_gradients_go_by_each_places_own_choices():
    """Of places with fewer bridges than others, too: w <- w exp(-rate dL/dw), normalised, by hand."""
    edges = ["others", {"from": "mamba", "to": "gpt_neox", "from_block": 0, "to_block": 2}]
    bridges = hybrid("gpt_neox+mamba", **EVERY, bridge_alpha=True, bridges=edges).hybrid_mixer.bridges
    slopes, before = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), bridges.weights()
    (before * slopes).sum().backward()
    trainer = SimpleNamespace(alpha=bridges.alpha_logits, searched=bridges, alpha_rate=lambda: 0.3)
    STRATEGIES["gaea"](trainer).before_update()
    wanted = before * (-0.3 * slopes).exp()
    close(bridges.weights(), wanted / wanted.sum(1, keepdim=True))


def test_a_cost_penalty_counts_bridges(tmp_path):
    model = hybrid("gpt_neox+mamba", drawn=False, **EVERY, bridge_alpha=True)
    arguments = SearchArguments(
        output_dir=str(tmp_path), strategy="darts", max_steps=10, alpha_learning_rate=0.3, cost_penalty=50.0, **QUIET
    )
    SearchTrainer(model, arguments, rows_of(8)).train()
    assert max(bridge_weights(model)) < 0.2


def test_nothing_to_search_is_said(tmp_path):
    arguments = SearchArguments(output_dir=str(tmp_path), max_steps=1, **QUIET)
    with pytest.raises(ManticoreError, match="bridges and bridge_alpha=True"):
        SearchTrainer(hybrid("gpt_neox+mamba", **EVERY), arguments, rows_of(8))


@torch.no_grad()
def test_pruning_drops_bridges_that_weigh_less_than_none():
    """What is left computes what the hybrid computed, with the dropped ones at 0."""
    model, ids = hybrid("gpt_neox+mamba", **EVERY, bridge_alpha=True), tokens()
    alpha = model.hybrid_mixer.bridges.alpha_logits
    for row, value in zip(alpha, (1.0, -1.0, 0.5, -0.5)):
        row.copy_(torch.tensor([0.0, value]))
    before = copy.deepcopy(model.state_dict())
    got = prune(model, "alpha")
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    assert not got.config.bridge_alpha and len(got.config.bridges) == 2
    alpha[1, 1] = alpha[3, 1] = -1e9
    close(got(input_ids=ids).logits, model(input_ids=ids).logits)
    contract.check_chunks(got, (2, 3))
    # Weights that were given, one of them 0
    edges = [{**edge, "weight": weight} for edge, weight in zip(got.config.bridges, (0.0, 0.5))]
    model = hybrid("gpt_neox+mamba", **{**EVERY, "bridges": edges})
    left = prune(model)
    assert len(left.config.bridges) == 1 and left.config.bridges[0]["weight"] is None
    close(left(input_ids=ids).logits, model(input_ids=ids).logits)
    model = hybrid("gpt_neox+mamba", **{**EVERY, "bridges": [{**edge, "weight": 0.0} for edge in edges]})
    none = prune(model)
    assert none.config.topology == "merge" and none.hybrid_mixer.bridges is None
    assert torch.equal(none(input_ids=ids).logits, model(input_ids=ids).logits)
    for options in ({"path": "loss"}, {"path": "mamba"}, {"budget": 0.5}):
        with pytest.raises(ManticoreError, match="only bridges are pruned, by their weights"):
            prune(model, **options)


@pytest.mark.slow
def test_stages_from_the_command_line(tmp_path):
    """Composed, trained with the components frozen, searched, tuned, pruned, planned, inspected: bridges come along."""
    save_pair(tmp_path, 3000)
    recipe = {
        "name": "bridged",
        "components": [str(tmp_path / name) for name in ("neox", "mamba")],
        "hybrid": {"topology": "bridge", "bridge_blocks": 2, "bridge_alpha": True, "bridge_kind": "attention"},
        "data": {"data": str(tmp_path / "text.txt"), "block_size": 16},
        "stages": [{stage: {"max_steps": 2, **QUIET_RECIPE}} for stage in ("pretrain", "search", "finetune", "prune")],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = run_recipe(tmp_path / "recipe.yaml", tmp_path / "run")
    start, trained = (ManticoreForCausalLM.from_pretrained(folder) for folder, _ in results[:2])
    assert len(start.config.bridges) == 2 and not start.hybrid_mixer.bridges.edges[0].up.weight.any()
    for name, parameter in trained.named_parameters():  # the gate stands for the static alpha
        trained_there = name.startswith(("hybrid_mixer.bridges", "hybrid_mixer.token_gate"))
        assert torch.equal(parameter, start.get_parameter(name)) != trained_there, name
    searched, tuned = (ManticoreForCausalLM.from_pretrained(folder) for folder, _ in results[2:4])
    alpha = [one.hybrid_mixer.bridges.alpha_logits for one in (trained, searched, tuned)]
    assert not torch.equal(alpha[0], alpha[1]) and torch.equal(alpha[1], alpha[2])
    assert results[4][1]["bridges"] == 2 and results[4][1]["path"] is None
    _, _, report = write_report(tmp_path / "run", measured=False)
    assert "with bridges between their states" in report.read_text()
    found = inspect_hybrid(str(results[3][0]))
    assert found["settings"]["bridges"] == (
        "neox after block 1 to mamba before block 2 (attention), mamba after block 1 to neox before block 2 (attention)"
    )
    assert [(row["block"], row["component"]) for row in found["blocks"]] == [
        (1, "neox"),
        (1, "mamba"),
        (2, "neox"),
        (2, "mamba"),
    ]
    sizes = {row["part"]: row for row in found["parts"]}
    inner = tuned.hybrid_mixer.bridges.edges
    kept = 4 * sum(one.store.out_features for one in inner)
    assert sizes["hybrid"]["cache_bytes_per_token"] == kept + sum(
        sizes[name]["cache_bytes_per_token"] for name in ("neox", "mamba")
    )
    plan = make_plan(tmp_path / "recipe.yaml")
    assert [stage["stage"] for stage in plan["stages"]] == ["pretrain", "search", "finetune", "prune"]
    assert plan["own_parameters"] == sum(p.numel() for p in tuned.hybrid_mixer.parameters())
    assert plan["cache"]["bridges"]["per_token"] == kept
    assert plan["stages"][0]["trainable"] == plan["own_parameters"]


def test_tools_know_of_bridges(tmp_path):
    """The page's parameters, the report without a component, the card, sampling and mixtures taken from elsewhere."""
    edges = [{"from": "mamba", "to": "gpt_neox", "from_block": 1, "to_block": 0}]
    model, ids = hybrid("gpt_neox+mamba", **EVERY, bridges=edges, mixture="static"), tokens()
    page = Hybrid(model, word_tokenizer())
    whole = sum(p.numel() for p in model.parameters())
    assert page.parameters("hybrid") == whole
    with removed(model, "mamba", 0):
        assert page.parameters("hybrid") == whole - sum(p.numel() for p in model.component("mamba").parameters())
        close(model(input_ids=ids).logits, model.component("gpt_neox")(input_ids=ids).logits)
    assert model.config.bridges[0]["weight"] is None and model.config.mixture_weights is None
    model.set_mixture_weights("gpt_neox")
    layers = model.segments.stretch("mamba", 4, 6).layers  # behind what the bridge reads
    assert page.parameters("hybrid") == whole - sum(p.numel() for p in layers.parameters())
    model.save_pretrained(tmp_path / "saved")
    card, *_ = make_card(tmp_path / "saved", CardFacts("me/hybrid", {"gpt_neox": "mit", "mamba": "mit"}))
    shown = "".join(card.sections.values())
    assert "add to each other's hidden states, through 1 bridge." in shown
    assert "mamba after block 2 to gpt" in shown and "keeps one per block" not in shown
    with pytest.raises(ManticoreError, match="this hybrid has .*bridges between components"):
        model.generate(ids, do_sample=True, mixture_sampling=True, max_new_tokens=2)
    with pytest.raises(ManticoreError, match="has bridges .* this hybrid None"):
        take_mixture(hybrid("gpt_neox+mamba", mixture="static"), tmp_path / "saved")
    searched = hybrid("gpt_neox+mamba", **EVERY, bridge_alpha=True)
    searched.save_pretrained(tmp_path / "searched")
    other = hybrid("gpt_neox+mamba", drawn=False, **EVERY, bridge_alpha=True)
    take_mixture(other, tmp_path / "searched")
    assert bridge_weights(other) == bridge_weights(searched) and bridge_weights(hybrid("llama+mamba")) == []
