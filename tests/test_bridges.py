"""Bridges: components that add to each other's states, against plain loops and by the contract of all hybrids."""

import copy
import json
import math

import cache_rows
import naive
import pytest
import torch
from bridged import EVERY, hybrid, one_way, parts_of
from cases import case
from decoding_contract import check_decoding
from families import FAMILIES, tiny, tokens
from peft import PeftModel, get_peft_model
from transformers.cache_utils import StaticLayer

from manticore_hf import (
    ComponentSpec,
    ManticoreConfig,
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
    set_stage,
)
from manticore_hf.families import contract
from manticore_hf.families.contract import close
from manticore_hf.training.lora import lora_config

MODELS = {
    "linear": ("llama+mamba", EVERY),
    "attention": ("gpt_neox+llama", {**EVERY, "bridge_kind": "attention"}),
    "one way, recurrent": (
        "mamba2+llama",
        {**one_way("mamba2", "llama"), "bridge_kind": "attention", "bridge_rank": 8},
    ),
    "to itself": ("llama+mamba", {**EVERY, "bridges": ["self"], "bridge_rank": 3}),
    "three, kinds mixed": (
        "gpt_neo+mamba2+opt_projected",
        {
            **EVERY,
            "bridges": [
                {"from": "mamba2", "to": "gpt_neo", "kind": "attention"},
                {"from": "mamba2", "to": "opt_projected", "to_block": 0, "from_block": 1},
                {"from": "opt_projected", "to": "gpt_neo", "to_block": 1, "weight": 0.5},
            ],
            "bridge_rank": 4,
            "bridge_heads": 2,
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    names, settings = MODELS[request.param]
    return hybrid(names, **settings)


# ---- what is computed ------------------------------------------------------------------------------------------------


def naive_bridge(own, i, edge, heads, state, other):
    """What one bridge makes of the states [time, width] of a row, token by token; `own` are the mixer's parameters."""

    def normed(x):
        return x / (x.square().mean() + 1e-6).sqrt()

    part = {key.removeprefix(f"bridges.edges.{i}."): one for key, one in own.items()}
    out = []
    for t in range(len(state)):
        if edge["kind"] == "linear":
            found = normed(other[t])
            found = part["down.weight"] @ found if "down.weight" in part else found
        else:
            width = len(part["query.weight"])
            query = (part["query.weight"] @ normed(state[t])).view(heads, -1)
            stored = [part["store.weight"] @ normed(other[s]) for s in range(t + 1)]
            found = []
            for h in range(heads):
                keys = torch.stack([one[:width].view(heads, -1)[h] for one in stored])
                values = torch.stack([one[width:].view(heads, -1)[h] for one in stored])
                scores = (keys @ query[h]) / math.sqrt(width // heads)
                found.append(scores.softmax(0) @ values)
            found = torch.cat(found)
        out.append(own["bridges.gates"][i] * (state[t].square().mean() + 1e-6).sqrt() * (part["up.weight"] @ found))
    return torch.stack(out)


def naive_states(model, ids):
    """{component: its last state [time, width]} of one row; each state is asked for when it is needed."""
    config, own, found = model.config, dict(model.hybrid_mixer.named_parameters()), {}

    def leaves(name, block):
        """What leaves a block of a component."""
        if (name, block) not in found:
            state = enters(name, block)
            bounds = config.bounds(name)
            found[name, block] = naive.layers(model.component(name), state[None], bounds[block], bounds[block + 1])[0]
        return found[name, block]

    def enters(name, block):
        state = leaves(name, block - 1) if block else naive.embeddings(model.component(name), ids[None])[0]
        added = 0.0
        for i, edge in enumerate(config.bridges):
            if (edge["to"], edge["to_block"]) == (name, block):
                other = leaves(edge["from"], edge["from_block"])
                weight = 1.0 if edge["weight"] is None else edge["weight"]
                added = added + weight * naive_bridge(own, i, edge, config.bridge_heads, state, other)
        return state + added

    return {name: leaves(name, config.bridge_blocks - 1) for name in config.component_names}


NAIVE = {
    **{name: MODELS[name] for name in ("linear", "one way, recurrent", "to itself")},
    "attention": ("gpt_neox+llama", {**EVERY, "bridge_kind": "attention", "bridge_heads": 2}),
    "projected": ("opt_projected+mamba", one_way("mamba", "opt_projected")),
    "uneven": ("gpt_neox+mamba", {**EVERY, "block_layers": {"gpt_neox": [1, 3, 1], "mamba": [4, 1, 1]}}),
}


@pytest.mark.parametrize("name", NAIVE)
def test_states_and_gradients_are_those_of_the_formula(name):
    names, settings = NAIVE[name]
    model, ids = hybrid(names, **settings), tokens(2, 6, 3)
    found = []
    for way in ("run", "loop"):
        model.zero_grad()
        if way == "run":
            states = ManticoreModel.forward(model, input_ids=ids, use_cache=False, return_dict=True).states
        else:
            rows = [naive_states(model, row) for row in ids]
            states = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).mean() for one in states.values()).backward()
        found.append((states, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}))
    (got, grads), (wanted, wanted_grads) = found
    assert grads.keys() == wanted_grads.keys() and any("bridges.edges" in key for key in grads)
    for key in wanted:
        close(got[key], wanted[key], f"states of {key}")
    for key in grads:
        close(grads[key], wanted_grads[key], f"gradients of {key}")
        if "hybrid_mixer" in key or key.split(".")[0] in {edge["from"] for edge in model.config.bridges}:
            assert grads[key].abs().sum() > 0 or "bias" in key or ".wpe." in key, key


SLOW = [pytest.param(names, marks=pytest.mark.slow) for names in ("mamba2+llama", "gpt_neo+mamba2+opt_projected")]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("names", ["llama+mamba", "gpt_neox+llama", *SLOW])
def test_at_the_start_it_is_the_one_block_hybrid(names):
    """To the last bit: read at once, padded, with a cache, in training; each way that bridges may lead."""
    first, *_, last = names.split("+")
    one, ids = hybrid(names, drawn=False), tokens(2, 9, 3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for settings in (EVERY, {**EVERY, "bridges": ["self", "others"]}, one_way(last, first), one_way(first, last)):
        for kind in ("linear", "attention"):
            for mixture in ("token", "static"):
                with case(f"{settings.get('bridges')}, {kind}, {mixture}"):
                    one.config.mixture = mixture
                    model = hybrid(names, drawn=False, **settings, bridge_kind=kind, mixture=mixture)
                    assert model.config.num_blocks == 1 and model.config.bridges
                    for given in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(9)[None] % 5}):
                        got, wanted = (m(input_ids=ids, labels=ids, **given, use_cache=False) for m in (model, one))
                        assert torch.equal(got.logits, wanted.logits) and torch.equal(got.loss, wanted.loss)
                    caches = model.make_cache(), one.make_cache()
                    for part in ids.split([5, 1, 3], 1):
                        got, wanted = (m(input_ids=part, cache=c).logits for m, c in zip((model, one), caches))
                        assert torch.equal(got, wanted)


def test_gates_and_weights_scale_what_a_bridge_adds():
    model, ids = hybrid("llama+mamba", **one_way("mamba", "llama")), tokens()
    before = model(input_ids=ids).logits
    weighed = hybrid("llama+mamba", **{**EVERY, "bridges": [{**edge, "weight": 0.25} for edge in model.config.bridges]})
    with torch.no_grad():
        assert (weighed(input_ids=ids).logits - before).abs().max() > 1e-2
        weighed.hybrid_mixer.bridges.gates.mul_(4)
        close(weighed(input_ids=ids).logits, before)


def test_what_nobody_reads_is_not_run():
    """A component without weight runs as far as a bridge reads it; one whose bridges have weight 0 does not."""
    model = hybrid("llama+mamba", **EVERY, bridges=[{"from": "mamba", "to": "llama", "from_block": 1, "to_block": 0}])
    ids, ran = tokens(), []
    for name in ("llama", "mamba"):
        for i, layer in enumerate(model.segments.stretch(name, 0, model.config.bounds(name)[-1]).layers):
            layer.register_forward_hook(lambda *args, name=name, i=i: ran.append((name, i)))
    model(input_ids=ids)
    assert {name for name, _ in ran} == {"llama", "mamba"} and ("mamba", 5) in ran
    ran.clear()
    model.set_mixture_weights("llama")
    alone = model(input_ids=ids).logits
    assert {i for name, i in ran if name == "mamba"} == {0, 1, 2, 3} and ("llama", 4) in ran
    assert ran.index(("mamba", 3)) < ran.index(("llama", 0))  # the sender runs ahead
    ran.clear()
    model.set_mixture_weights("mamba")
    model(input_ids=ids)
    assert {name for name, _ in ran} == {"mamba"}
    ran.clear()
    model.config.bridges[0]["weight"] = 0.0
    model.set_mixture_weights("llama")
    assert not torch.equal(model(input_ids=ids).logits, alone) and {name for name, _ in ran} == {"llama"}
    close(model(input_ids=ids).logits, model.component("llama")(input_ids=ids).logits)
    assert (
        model.segments.segment("llama", 0).is_whole and sum(name == "mamba" for name, _ in model.segments.ranges) == 2
    )


# ---- the contract of every hybrid ------------------------------------------------------------------------------------


@pytest.mark.quick(every=4)
def test_the_contract_of_decoding(model):
    check_decoding(model)


@torch.no_grad()
def test_the_future_is_not_known(model):
    ids = tokens(1, 12, 3)
    other = ids.clone()
    other[0, 8:] = tokens(1, 4, 9)
    one, two = (model(input_ids=x, use_cache=False).logits for x in (ids, other))
    close(one[:, :8], two[:, :8], "logits before a text goes on otherwise")
    assert (one[:, 8:] - two[:, 8:]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_a_cache_are_picked_repeated_and_taken_back():
    model, ids = hybrid("gpt_neox+llama", **EVERY, bridge_kind="attention"), tokens(3, 12, 5)
    assert {type(layer) for layer in model.make_cache(16).layers} == {StaticLayer}
    whole = model(input_ids=ids, use_cache=False).logits

    read = cache_rows.reader(model, ids)
    cache_rows.check_picked(model, ids, whole)
    cache = model.make_cache()
    read(cache, slice(None), 0, 4)
    model(input_ids=tokens(3, 5, 9), cache=cache)
    cache.crop(-5)
    close(read(cache, slice(None), 4, 12), whole[:, 4:])
    cache.reset()
    close(read(cache, slice(None), 0, 12), whole)
    ids = tokens(1, 8, 3).repeat(1, 3)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), wanted)


def test_saved_and_loaded(model, tmp_path):
    contract.check_saved(model, tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").glob("*.py")}
    assert "bridges.py" in names and not names & {"past_losses.py", "aligned_hybrid.py"}
    assert ManticoreConfig.from_pretrained(tmp_path / "saved").bridges == model.config.bridges
    if model.config.component_names[0] == "llama":
        half = ManticoreForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        assert half.hybrid_mixer.bridges.gates.dtype == torch.float32
        assert half.hybrid_mixer.bridges.edges[0].up.weight.dtype == torch.bfloat16
        assert half(input_ids=tokens()).logits.isfinite().all()


def test_repositories_without_bridges_carry_no_code_of_them(tmp_path):
    for name, settings in (
        ("merge", {"num_blocks": 2}),
        ("online", {"mixture": "online"}),
        ("none", {"topology": "bridge", "bridges": []}),
    ):
        hybrid("llama+mamba", **settings).save_pretrained(tmp_path / name)
        assert not [file for file in (tmp_path / name).glob("*.py") if "bridge" in file.name], name
    hybrid("llama+mamba", **EVERY, mixture="online").save_pretrained(tmp_path / "both")
    assert {"bridges.py", "past_losses.py"} <= {file.name for file in (tmp_path / "both").glob("*.py")}
    one, other = hybrid("llama+mamba", topology="bridge", bridges=[]), hybrid("llama+mamba")
    assert one.config.topology == "merge" and one.config.block_layers == other.config.block_layers
    assert torch.equal(one(input_ids=tokens()).logits, other(input_ids=tokens()).logits)


def test_checkpointing_gives_the_same_gradients(model):
    ids, found = tokens(2, 8, 4), []
    model = copy.deepcopy(model).train()
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        close(found[1][name], found[0][name], name)


@pytest.mark.parametrize("cls", [ManticoreForSequenceClassification, ManticoreForTokenClassification])
def test_classifiers(cls, tmp_path):
    torch.manual_seed(0)
    ids = tokens(2, 8, 4)
    models = [
        cls.from_components(parts_of("llama+mamba"), verify=False, num_labels=3, **settings).eval()
        for settings in ({}, EVERY)
    ]
    models[1].score.load_state_dict(models[0].score.state_dict())
    mask = torch.ones_like(ids)
    got = [one(input_ids=ids, attention_mask=mask).logits for one in models]
    assert torch.equal(*got)
    contract.randomise(models[1])
    assert (models[1](input_ids=ids, attention_mask=mask).logits - got[0]).abs().max() > 1e-3
    models[1].save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved")
    close(*(one(input_ids=ids, attention_mask=mask).logits for one in (models[1], again)))


# ---- training --------------------------------------------------------------------------------------------------------


def test_stages_train_bridges_as_they_train_projectors():
    model = set_stage(hybrid("llama+mamba", drawn=False, **EVERY, bridge_alpha=True, bridge_rank=2), "pretrain")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"hybrid_mixer.{name}" for name, _ in model.hybrid_mixer.named_parameters()}
    assert any("bridges.edges.0.up" in name for name in trained)
    ids = tokens(2, 9, 3)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)  # DDP waits for all
    # Where the map is zero nothing moves but it; then all of it does
    for edge in model.hybrid_mixer.bridges.edges:
        assert edge.up.weight.grad.abs().sum() > 0 and not edge.down.weight.grad.any()
    set_stage(model, "finetune")
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"hybrid_mixer.alpha_logits", "hybrid_mixer.bridges.alpha_logits"}


def test_adapters_save_bridges(tmp_path):
    model = hybrid("llama+mamba", drawn=False, **EVERY, bridge_kind="attention")
    model.save_pretrained(tmp_path / "hybrid")
    peft = get_peft_model(ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid"), lora_config(model, r=2)).train()
    optimizer, ids = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.05), tokens(4, 10, 3)
    assert any("bridges.edges" in name for name, p in peft.named_parameters() if p.requires_grad)
    assert not any("bridges" in name and "lora_" in name for name, _ in peft.named_parameters())
    losses = []
    for _ in range(3):
        loss = peft(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    peft.save_pretrained(tmp_path / "adapter")
    base = ManticoreForCausalLM.from_pretrained(tmp_path / "hybrid")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    close(again(input_ids=ids).logits, peft.eval()(input_ids=ids).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.hybrid_mixer.bridges.edges[0].up.weight.any()
    close(loaded(input_ids=ids).logits, peft(input_ids=ids).logits)


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said():
    a, b = "llama", "mamba"

    def edge(**more):
        return {**EVERY, "bridges": [{"from": a, "to": b, **more}]}

    for said, settings in {
        "topology='merge' must be 'merge', or 'bridge' where bridges are given": {"bridges": ["others"]},
        "topology='ring' is unknown; choose one of": {"topology": "ring"},
        "give bridge_blocks=3 instead of num_blocks=3": {"topology": "bridge", "num_blocks": 3},
        "give embeddings='native'": {"topology": "bridge", "preset": "paper"},
        "bridge_kind='mlp' is unknown; choose one of": {**EVERY, "bridge_kind": "mlp"},
        "bridge_rank=0 must be a positive integer": {**EVERY, "bridge_rank": 0},
        "bridge_blocks='2' must be a positive integer": {**EVERY, "bridge_blocks": "2"},
        "bridge_blocks=9 is more than the 5 layers of component 'llama'": {**EVERY, "bridge_blocks": 9},
        "bridge_heads=None must be a positive integer": {**EVERY, "bridge_heads": None},
        "bridge_alpha=1 must be true or false": {**EVERY, "bridge_alpha": 1},
        "give a multiple of their number": {**EVERY, "bridge_kind": "attention", "bridge_rank": 6},
        "bridges=7 must be a list": {**EVERY, "bridges": 7},
        "bridges: 'none' must have the keys": {**EVERY, "bridges": ["none"]},
        "'from_layer': 1} must have the keys": edge(from_layer=1),
        "bridges: to='gpt2' is not a component; choose one of": edge(to="gpt2"),
        "bridges: from_block=3 from 'llama' to 'mamba' is not a block; .* 0 to 2": edge(from_block=3),
        "bridges: to_block='last' from": edge(to_block="last"),
        "bridges: to_block=-1 from": edge(to_block=-1),
        "bridges: kind='mean' is unknown": edge(kind="mean"),
        "bridges: weight=2 must be a number from 0 to 1": edge(weight=2),
        "go round in a circle: '(llama|mamba)' from block 2 on, '(llama|mamba)' from block 2 on would": {
            **EVERY,
            "bridges": [{"from": a, "to": b}, {"from": b, "to": a}],
        },
        "bridges: from 'llama', block 0, to 'mamba', block 1, linear: there are two": {
            **EVERY,
            "bridges": ["others", {"from": a, "to": b, "from_block": 0, "to_block": 1}],
        },
        "go round in a circle: 'llama' from block 1 on": edge(to=a, from_block=1, to_block=1),
        "block_layers..llama..=.* must be 3 positive integers": {**EVERY, "block_layers": {a: [2, 3]}},
    }.items():
        with case(said), pytest.raises(ManticoreError, match=said) as caught:
            hybrid("llama+mamba", **settings)
        assert str(caught.value).count("\n") == 0
    many = [ComponentSpec(tiny("gpt2", seed=0), name=f"one{i}") for i in range(30)]
    with pytest.raises(ManticoreError, match="at most 1024 can be"):
        ManticoreForCausalLM.from_components(many, topology="bridge", bridge_blocks=4)


def test_a_circle_of_later_blocks_is_none():
    """Each into the other is fine as long as each state can be had before it is needed."""
    edges = [
        {"from": "mamba", "to": "llama", "from_block": 0, "to_block": 2},
        {"from": "llama", "to": "mamba", "from_block": 1, "to_block": 2},
        {"from": "llama", "to": "mamba", "from_block": "last", "to_block": 2, "kind": "attention"},
    ]
    model = hybrid("llama+mamba", **EVERY, bridges=edges)
    contract.check_chunks(model, (3, 1))


def test_settings_survive_a_file(tmp_path):
    """What a user wrote is written out as edges, which mean the same when they are read again."""
    model = hybrid("llama+mamba", **EVERY, bridges="self", bridge_rank=2)
    values = json.loads(model.config.to_json_string())
    assert values["num_blocks"] == 1 and values["bridge_rank"] == 2 and len(values["bridges"]) == 4
    assert values["auto_map"]["AutoModelForCausalLM"] == "hybrid_manticore.ManticoreForCausalLM"
    again = ManticoreConfig.from_dict(values)
    assert again.to_dict() == model.config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Beside a Llama of other depth, into and out of it."""
    other = "llama" if family != "llama" else "mamba"
    one, ids = hybrid(f"{family}+{other}", drawn=False), tokens(2, 9, 3)
    for kind in ("linear", "attention"):
        model = hybrid(f"{family}+{other}", drawn=False, **EVERY, bridge_kind=kind)
        assert torch.equal(model(input_ids=ids).logits, one(input_ids=ids).logits)
        contract.randomise(model)
        for check in (contract.check_greedy, contract.check_padding, contract.check_beams, contract.check_turns):
            with case(f"{kind}, {check.__name__}"):
                check(model)
        with case(kind):
            contract.check_chunks(model, (4, 1, 1, 3, 2))
            contract.check_padding_inside(model)
            contract.check_documents(model)
