"""Pruned hybrids: what a path gives, what is left of the components, how paths are chosen and healed."""

import copy
import itertools
import json

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, components, hybrid, randomise, representatives, tiny, tokens
from peft import AutoPeftModelForCausalLM, get_peft_model
from test_train import _command, _kill_when, _run, _same, start  # noqa: F401  (a fixture)
from tiny_hybrid import QUIET
from transformers import AutoModelForCausalLM, TrainingArguments

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM, lora_config
from manticore_hf.cli import main
from manticore_hf.training.distill import DistilTrainer
from manticore_hf.training.prune import path_logits, pick_path, prune, segment_costs
from manticore_hf.training.trained_stages import last_whole_checkpoint  # noqa: I001

WIRINGS = [
    {}, {"mixture": "static"}, {"preset": "paper"}, {"projector": "mlp"}, {"projector": "none"},
    {"embeddings": "mixed"}, {"embeddings": "mixed", "head_mixture": "first"},
]  # fmt: skip


def close(got, wanted, atol=1e-5):
    torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-5)


def names_of(model, path):
    return [model.config.component_names[k] for k in path]


def one_hot(model, path):
    return [[float(i == k) for i in range(len(model.config.component_names))] for k in path]


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(3, 90, (12, 11), generator=torch.Generator().manual_seed(5)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("settings", WIRINGS[:5], ids=str)
def test_a_change_of_component_is_the_soft_hybrids(settings):
    """Where every block changes component, the soft hybrid with one-hot weights is the twin."""
    soft, ids = hybrid("gpt_neox+mamba", num_blocks=3, **settings), tokens()
    for path in ([0, 1, 0], [1, 0, 1]):
        hard = prune(soft, names_of(soft, path))
        soft.set_mixture_weights(one_hot(soft, path))
        close(hard(input_ids=ids).logits, soft(input_ids=ids).logits)
        soft.set_mixture_weights(None)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("settings", WIRINGS, ids=str)
def test_every_path_gives_what_was_measured_for_it(settings, tmp_path):
    soft, ids = hybrid("gpt_neox+mamba", num_blocks=3, **settings), tokens()
    before = {key: value.clone() for key, value in soft.state_dict().items()}
    for path in itertools.product(range(2), repeat=3):
        names = names_of(soft, path)
        hard = prune(soft, names)
        logits = hard(input_ids=ids).logits
        close(logits, path_logits(soft, names, ids), atol=1e-5)
        if len(set(names)) == 1:
            assert torch.equal(logits, soft.component(names[0])(input_ids=ids).logits)
        # Two changes of component; under one wiring one change and none, too, which need less
        if path == (1, 0, 1) or (not settings and path in ((1, 1, 1), (0, 0, 1))):
            hard.save_pretrained(tmp_path / "x")
            assert torch.equal(ManticoreForCausalLM.from_pretrained(tmp_path / "x")(input_ids=ids).logits, logits)
    assert all(torch.equal(before[key], value) for key, value in soft.state_dict().items())


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("family", representatives(sorted(FAMILIES)))
def test_every_family(family, tmp_path):
    """Cached, padded, saved, trained: with every family at the beginning, in the middle and at the end of a path."""
    other = "gpt2" if family == "llama" else "llama"
    parts = [ComponentSpec(tiny(family), name="one"), ComponentSpec(tiny(other, seed=1), name="two")]
    soft, ids = ManticoreForCausalLM.from_components(parts, num_blocks=3, verify=False), tokens()
    randomise(soft)
    for path in (["one", "two", "one"], ["two", "one", "one"]):
        hard = prune(soft, path)
        logits = hard(input_ids=ids).logits
        close(logits, path_logits(soft, path, ids), atol=1e-4)
        greedy = hard.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(greedy, hard.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
        padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
        mask = torch.cat([torch.zeros_like(ids[:, :2]), torch.ones_like(ids)], 1)
        close(hard(input_ids=padded, attention_mask=mask).logits[:, 2:], logits, atol=1e-4)
    hard.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    loaded.train()
    loaded(input_ids=ids, labels=ids).loss.backward()
    idle = {n for n, p in loaded.named_parameters() if p.requires_grad and p.grad is None}
    assert all("embed" in n or "wte" in n or "wpe" in n or "lm_head" in n for n in idle), idle


def test_only_what_the_path_needs_is_left():
    soft = hybrid("gpt_neox+mamba", num_blocks=2)
    neox, mamba = soft.config.component_names
    hard = prune(soft, [neox, mamba])
    keys = {key.split(".", 1)[1] for key in hard.state_dict() if key.startswith(f"{neox}.")}
    assert any("embed_in" in key for key in keys) and not any("lm_head" in key or "final_layer" in key for key in keys)
    kept = {int(key.split(".")[2]) for key in keys if ".layers." in key}
    assert kept == set(range(soft.config.bounds(neox)[1]))
    assert list(hard.hybrid_mixer.across) == ["1"] and not hard.hybrid_mixer.into and not hard.hybrid_mixer.out_of
    alone = prune(soft, mamba)
    assert alone.config.component_names == [mamba] and not hasattr(alone, neox)
    assert alone.num_parameters() == soft.component(mamba).num_parameters()
    with pytest.raises(ManticoreError, match="was pruned: only the layers of"):
        hard.component(neox)(input_ids=tokens())
    assert hard.mixture_weights().tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("settings", WIRINGS[:1] + WIRINGS[2:3] + WIRINGS[-2:], ids=str)
def test_its_embeddings_are_those_of_the_component_that_reads(settings):
    """Also where the tokenizer's component, or the wider one, has lost its own."""
    parts = [ComponentSpec(tiny("gpt_neox"), name="one"), ComponentSpec(tiny("mamba", hidden_size=32), name="two")]
    soft, ids = ManticoreForCausalLM.from_components(parts, num_blocks=2, **settings), tokens()
    for path in itertools.product(("one", "two"), repeat=2):
        hard = prune(soft, list(path))
        embeddings = hard.get_input_embeddings()
        embeds, own = embeddings(ids), soft.component(path[0]).get_input_embeddings()
        width = own.weight.shape[1] if hard.config.embeddings == "native" else hard.config.hidden_size
        assert embeds.shape[-1] == embeddings.embedding_dim == width
        assert embeddings.num_embeddings == 99 and torch.equal(embeddings.weight, own.weight)
        assert torch.equal(hard(inputs_embeds=embeds).logits, hard(input_ids=ids).logits)


def test_tied_components():
    parts = [ComponentSpec(tiny("gemma2"), name="one"), ComponentSpec(tiny("gpt2", seed=1), name="two")]
    assert parts[0].source.config.tie_word_embeddings and parts[1].source.config.tie_word_embeddings
    soft, ids = ManticoreForCausalLM.from_components(parts, num_blocks=3), tokens()
    for path in itertools.product(["one", "two"], repeat=3):
        close(prune(soft, list(path))(input_ids=ids).logits, path_logits(soft, list(path), ids), atol=1e-5)


def test_three_components_by_reference(owner):
    """Published pruned, it still references what it kept unchanged."""
    parts = components("gpt_neox+mamba")
    repos = []
    for name, part in parts.items():
        part.push_to_hub(f"{owner}/{name.replace('_', '-')}-hard")
        repos.append(f"{owner}/{name.replace('_', '-')}-hard")
    soft, ids = ManticoreForCausalLM.from_components(repos, num_blocks=2), tokens()
    randomise(soft)
    hard = prune(soft, soft.config.component_names)
    hard.push_to_hub(f"{owner}/pruned")
    loaded = AutoModelForCausalLM.from_pretrained(f"{owner}/pruned")
    assert torch.equal(loaded(input_ids=ids).logits, hard(input_ids=ids).logits)
    assert not loaded.unchanged_keys() ^ {k for k in loaded.state_dict() if not k.startswith("hybrid_mixer")}


def test_adapters_and_copies(tmp_path):
    soft, ids = hybrid("gpt_neox+mamba"), tokens()
    prune(soft, soft.config.component_names).save_pretrained(tmp_path / "hard")
    hard = ManticoreForCausalLM.from_pretrained(tmp_path / "hard")
    close(copy.deepcopy(hard)(input_ids=ids).logits, hard(input_ids=ids).logits, atol=0)
    adapted = get_peft_model(hard, lora_config(hard, r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    logits = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    close(ManticoreForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits, logits, atol=1e-4)


def test_the_best_measured_path_is_chosen(text):
    soft = hybrid("gpt_neox+mamba", num_blocks=3)
    choice = pick_path(soft, "loss", text)
    assert len(choice.losses) == 8
    losses = {}
    for path in itertools.product(soft.config.component_names, repeat=3):
        hard, ids = prune(soft, list(path)), torch.tensor(text["input_ids"])
        losses[" > ".join(path)] = hard(input_ids=ids, labels=ids).loss.item()
    assert losses == pytest.approx(choice.losses, abs=1e-4)
    assert " > ".join(choice.path) == min(losses, key=losses.get)


def test_the_beam_never_ends_worse_than_it_began(text, monkeypatch):
    soft = hybrid("gpt_neox+mamba", num_blocks=3)
    everything = pick_path(soft, "loss", text).losses
    monkeypatch.setattr("manticore_hf.training.prune.EXHAUSTIVE", 1)
    found = pick_path(soft, "loss", text, beam=2)
    likely = " > ".join(pick_path(soft, "alpha").path)
    loss = everything[" > ".join(found.path)]
    assert loss == min(found.losses.values()) <= everything[likely]
    names = soft.config.component_names
    near = [" > ".join([*found.path[:b], n, *found.path[b + 1 :]]) for b in range(3) for n in names]
    assert loss <= min(everything[path] for path in near)


def test_by_alpha_and_under_a_budget():
    soft = hybrid("gpt_neox+mamba", num_blocks=3, mixture="static")
    neox, mamba = soft.config.component_names
    with torch.no_grad():
        soft.hybrid_mixer.alpha_logits.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]))
    assert pick_path(soft).path == [neox, mamba, neox]
    costs = torch.tensor(segment_costs(soft))
    layers = sum(sum(p.numel() for p in part.parameters()) for n, part in soft.named_modules() if n.endswith("layers"))
    assert costs.sum() == layers
    share = costs / costs.sum()
    wanted = (share[0, 0] + share[1, 1] + share[2, 0]).item()
    assert pick_path(soft).cost == pytest.approx(wanted)
    for cost in ("parameters", "flops"):
        share = torch.tensor(segment_costs(soft, cost))
        share = share / share.sum()
        for budget in (0.3, 0.5, 0.7, 1.0):
            fitting = {
                path: sum(soft.mixture_weights()[b, k].log().item() for b, k in enumerate(path))
                for path in itertools.product(range(2), repeat=3)
                if sum(share[b, k].item() for b, k in enumerate(path)) <= budget
            }
            if not fitting:
                with pytest.raises(ManticoreError, match="the cheapest path costs"):
                    pick_path(soft, budget=budget, cost=cost)
                continue
            choice = pick_path(soft, budget=budget, cost=cost)
            assert choice.path == names_of(soft, max(fitting, key=fitting.get)) and choice.cost <= budget
    assert min(map(min, segment_costs(soft, "latency"))) > 0


def test_impossible_paths_are_refused(text):
    soft = hybrid("gpt_neox+mamba")
    neox, mamba = soft.config.component_names
    for bad, message in (
        ([neox], "must name one of"),
        ([neox, "x"], "must name one of"),
        ("x", "No component is named 'x'"),
    ):
        with pytest.raises(ManticoreError, match=message):
            prune(soft, bad)
    with pytest.raises(ManticoreError, match="needs held-out text"):
        prune(soft, "loss")
    with pytest.raises(ManticoreError, match="cost='watts' is unknown"):
        pick_path(soft, cost="watts")
    hard = prune(soft, [neox, mamba])
    for path in ("alpha", [neox, mamba]):
        with pytest.raises(ManticoreError, match="pruned already"):
            prune(hard, path)
    with pytest.raises(ManticoreError, match="was pruned to the path"):
        hard.set_mixture_weights(neox)
    with pytest.raises(ManticoreError, match="cannot be resized"):
        hard.resize_token_embeddings(120)
    values = hard.config.to_dict()
    for path in ([neox], [neox, neox], [neox, "x"], "ab", 3):
        with pytest.raises(ManticoreError, match="route=.* must name one component for each"):
            type(hard.config).from_dict({**values, "route": path})


def test_distillation_is_normalised_by_tokens(tmp_path):
    """Batch 4 x 1 == batch 1 x 4 with rows of different lengths, and the loss is what the docstring says."""
    soft = hybrid("gpt_neox+mamba")
    ids = tokens(4, 9)
    labels = ids.clone()
    for row, masked in enumerate((1, 5, 3, 7)):
        labels[row, :masked] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    results = []
    for size, steps in ((4, 1), (1, 4)):
        hard = prune(soft, soft.config.component_names)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            **QUIET,
        )
        DistilTrainer(model=hard, args=arguments, train_dataset=rows, teacher=soft, distil_weight=0.3).train()
        results.append(hard.state_dict())
    for key, value in results[0].items():
        close(results[1][key], value, atol=1e-5)
    hard = prune(soft, soft.config.component_names)
    kept = labels[:, 1:] != -100
    own, target = (m(input_ids=ids).logits[:, :-1][kept].log_softmax(-1) for m in (hard, soft))
    loss = 0.7 * hard(input_ids=ids, labels=labels).loss + 0.3 * (target.exp() * (target - own)).sum(-1).mean()
    loss.backward()
    key = next(key for key, p in hard.named_parameters() if p.grad is not None and p.ndim == 2)
    close(results[0][key], (hard.get_parameter(key) - 0.1 * hard.get_parameter(key).grad).detach(), atol=1e-5)


@pytest.mark.slow
def test_the_command_survives_a_kill(start, tmp_path):  # noqa: F811
    def command(output):
        return _command("prune", start, output, "--path", "loss", "--max_steps", "4")

    done = _run(command(tmp_path / "whole"))
    for row in (
        "unpruned hybrid",
        "ensemble",
        "pruned, before distillation",
        "pruned, distilled",
        "of the unpruned hybrid's",
    ):
        assert row in done.stdout
    output = tmp_path / "killed"
    assert _kill_when(command(output), lambda: last_whole_checkpoint(output) is not None)
    assert "resuming from" in _run(command(output)).stdout
    _same(tmp_path / "whole", output)
    result = json.loads((output / "stage.json").read_text())
    model = ManticoreForCausalLM.from_pretrained(output)
    assert model.config.route == result["path"] and len(result["measured_paths"]) == 4


def test_the_command_names_what_is_wrong(start, tmp_path, capsys):  # noqa: F811
    command = ["prune", "--model", str(start / "hybrid"), "--data", str(start / "text.txt"), "--block_size", "16"]
    command += ["--output_dir", str(tmp_path / "x"), "--max_steps", "0"]
    for more, message in (
        (["--path", "loss", "--budget", "0.01"], "the cheapest path costs"),
        (["--path", "nobody"], "No component is named 'nobody'"),
        (["--distil_weight", "2"], "--distil-weight is 2.0, must be at least 0 and at most 1"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--path", "mamba,gpt_neox"]) == 0
    assert "mamba > gpt_neox" in capsys.readouterr().out
