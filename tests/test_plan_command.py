"""`manticore-hf plan`: recipes and hybrids, from the Hub and from directories, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_models import publish, tiny, tokenizer
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from manticore_hf import ManticoreError, ManticoreForCausalLM
from manticore_hf.cli import main
from manticore_hf.plan.amounts import parse_bytes, parse_count
from manticore_hf.plan.plan import make_plan
from manticore_hf.plan.schedule import Task, checkpoints
from manticore_hf.plan.subject import load_subject
from manticore_hf.utils.defence import memory_of
from manticore_hf.utils.flops import reached_flops

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "benchmarks" / "plan_configs"
KNOWN = {  # parameters, as the models' pages on the Hub state them, to the digits that they do
    "EleutherAI/pythia-410m-deduped": (405_334_016, 0),
    "state-spaces/mamba-370m-hf": (371_516_416, 0),
    "EleutherAI/pythia-1.4b": (1.4e9, 0.05e9),
    "state-spaces/mamba-1.4b-hf": (5.49e9 / 4, 0.01e9 / 4),  # from here by the bytes of their weights' files
    "HuggingFaceTB/SmolLM2-135M": (269e6 / 2, 1e6 / 2),
    "Qwen/Qwen2.5-Coder-0.5B": (988e6 / 2, 1e6 / 2),
    "Qwen/Qwen2.5-0.5B": (988e6 / 2, 1e6 / 2),
    "HuggingFaceTB/SmolLM2-360M": (0.36e9, 0.005e9),
    "meta-llama/Meta-Llama-3-8B": (8_030_261_248, 0),
    "meta-llama/Meta-Llama-3-70B": (70_553_706_496, 0),
    "tiiuae/falcon-mamba-7b": (7.27e9, 0.005e9),
    "nvidia/Nemotron-H-56B-Base-8K": (56e9, 0.5e9),
}


@pytest.mark.parametrize("repo", KNOWN)
def test_configurations_of_real_models_have_their_sizes(repo):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIGS / repo))
    model.tie_weights()
    size, tolerance = KNOWN[repo]
    assert abs(model.num_parameters() - size) <= tolerance


def test_the_table_of_pairs_says_what_the_configurations_do():
    rows = re.findall(r"^\| `(\S+/\S+)` \|(.*)\|$", (ROOT / "docs" / "pairs.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for repo, cells in rows:
        config = AutoConfig.from_pretrained(CONFIGS / repo)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        numbers = [model.num_parameters(), config.num_hidden_layers, config.hidden_size, config.vocab_size]
        longest = getattr(config, "max_position_embeddings", None)
        shown = [f"{number:,}" for number in numbers] + [f"{longest:,}" if longest else "no limit"]
        assert [cell.strip() for cell in cells.split("|")][1:6] == shown, repo


PAIRS = [
    ("EleutherAI/pythia-410m-deduped", "state-spaces/mamba-370m-hf"),
    ("EleutherAI/pythia-1.4b", "state-spaces/mamba-1.4b-hf"),
    ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-Coder-0.5B"),
    ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M"),
    ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B"),
]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_pairs_worth_trying_are_planned_from_their_configurations(pair, tmp_path, capsys):
    poc = (ROOT / "recipes" / "poc.yaml").read_text()
    for shipped, other in zip(PAIRS[0], pair):
        poc = poc.replace(f"- {shipped}\n", f"- {other}\n")
    (tmp_path / "pair.yaml").write_text(poc)
    command = ["plan", str(tmp_path / "pair.yaml"), "--configs", str(CONFIGS), "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--devices", "1", "--memory", "80GB"]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["verdict"].startswith("Fits: ") and plan["verdict"] in capsys.readouterr().out
    names = [repo.split("/")[1].lower() for repo in pair]
    assert [re.sub("[^a-z0-9]", "", one["name"].lower()) for one in plan["components"]] == [
        re.sub("[^a-z0-9]", "", name) for name in names
    ]
    assert plan["parameters"] == sum(one["parameters"] for one in plan["components"]) + plan["own_parameters"]
    several = [note for note in plan["notes"] if "tokens for each of the hybrid's" in note]
    assert len(several) == (pair == PAIRS[-1])


@pytest.fixture
def no_adapters(monkeypatch):
    """LoRA makes three engines more, which most tests do not look at."""
    monkeypatch.setattr(Task, "adaptable", False)


def write_recipe(folder, components, stages="[finetune: {}]", data="text.txt", validation=0.0, **hybrid):
    """Without validation text no evaluation is planned, which most tests do not look at."""
    recipe = folder / "recipe.yaml"
    hybrid = json.dumps({"num_blocks": 1, **hybrid})
    recipe.write_text(
        f"components: {json.dumps([str(one) for one in components])}\nhybrid: {hybrid}\nstages: {stages}\n"
        f"data: {{data: {data}, block_size: 32, validation_fraction: {validation}}}\n"
    )
    return recipe


def save_configs(folder, *families, **changes):
    """Directories with nothing but a config.json."""
    out = []
    for family in families:
        config = tiny(family, **changes).config
        config.architectures = [type(tiny(family)).__name__]
        config.save_pretrained(folder / family)
        out.append(folder / family)
    return out


@pytest.mark.slow
def test_the_poc_recipe_with_real_models(tmp_path, capsys):
    command = ["plan", str(ROOT / "recipes" / "poc.yaml"), "--configs", str(CONFIGS), "--tokens", "20M"]
    command += ["--devices", "8", "--memory", "24GiB", "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["verdict"] in shown and plan["verdict"].startswith("Fits: ")
    counts = {one["name"]: one["parameters"] for one in plan["components"]}
    assert counts == {"pythia_410m_deduped": 405_334_016, "mamba_370m_hf": 371_516_416}
    assert "405,334,016" in shown and plan["parameters"] == sum(counts.values()) + plan["own_parameters"]
    pretrain, tune = plan["stages"]
    # 24 layers with keys and values of width 1024; what the hybrid is stored in is float32, as its components differ
    assert plan["cache"]["pythia_410m_deduped"]["per_token"] == 24 * 2 * 1024 * 4
    assert pretrain["trainable"] == plan["own_parameters"]
    assert tune["trainable"] == plan["parameters"] - 2  # of one block, alpha's logits are fixed
    assert pretrain["tokens"] == 500 * 8 * 8 * 1024 and tune["tokens"] == 20_000_000
    engines = {one["engine"]: one for one in tune["options"]}
    whole = engines["one device + activation checkpointing"]["parts"]
    assert (whole["weights"], whole["gradients"]) == (4 * plan["parameters"], 4 * tune["trainable"])
    assert whole["optimizer"] == pytest.approx(2 * whole["weights"], rel=1e-6)
    shards = engines["FSDP2 + activation checkpointing"]["parts"]
    assert shards["weights"] == pytest.approx(whole["weights"] / 8, abs=8)
    # Forward 2, backward 4, and again 2 for what is recomputed, per parameter that multiplies; attention comes on top
    used = plan["parameters"] - 50304 * 1024  # Pythia's embeddings are looked up; Mamba's are its head, too
    assert 7 * used < tune["flops_per_token"] < 9.5 * used
    assert tune["hours"] == pytest.approx(tune["flops"] / (8 * 989e12 * 0.35) / 3600)
    assert any("padded" in note for note in plan["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, devices, memory, engines",
    [
        ("llama3_8b_falcon_mamba_7b", 8, "80GB", ["FSDP2 + activation checkpointing"] * 2),
        (
            "llama3_8b_falcon_mamba_7b",
            1,
            "24GB",
            ["FSDP2 + activation checkpointing + CPU offload"] * 2,
        ),  # a row at a time
        ("llama3_8b_falcon_mamba_7b", 1, "12GB", [None, None]),
        (
            "llama3_70b_nemotron_h_56b",
            8,
            "80GB",
            ["FSDP2 + activation checkpointing", "FSDP2 + activation checkpointing + CPU offload"],
        ),
    ],
)
def test_large_recipes(recipe, devices, memory, engines):
    plan = make_plan(ROOT / "recipes" / f"{recipe}.yaml", devices, memory, configs=CONFIGS)
    found = [stage["choice"] and stage["choice"]["engine"] for stage in plan["stages"]]
    assert found == engines
    assert any("the vocabulary of" in note and "is replaced by" in note for note in plan["notes"])


def test_components_on_the_hub_are_not_downloaded(hub, owner, tmp_path, no_adapters):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src", tokenizer())
    publish(hub, f"{owner}/b", tiny("mamba"), tmp_path / "src", tokenizer())
    hub.clear_requests()
    (tmp_path / "text.txt").write_text(" ".join(["w5"] * 3199))
    recipe = write_recipe(tmp_path, [f"{owner}/a", f"{owner}/b"], validation=0.25)
    plan = make_plan(recipe, 1, "8GB")
    asked = [path for _, path in hub.requests if "safetensors" in path]
    assert not asked and try_to_load_from_cache(f"{owner}/a", "model.safetensors") is None
    assert [one["name"] for one in plan["components"]] == ["a", "b"]
    # 3200 tokens with the one that ends the text are 100 rows, of which a quarter is for validation
    stage = plan["stages"][0]
    assert (stage["tokens"], stage["counted"]) == (3 * 75 * 32, "the text was tokenised")


@pytest.mark.parametrize("named", [None, True, False])
@pytest.mark.parametrize("formerly", [False, True])
def test_checkpointing_is_what_the_trainer_does(tmp_path, named, formerly):
    """Under Transformers' name for it, and under the one that it had before."""
    values = {"activation_checkpointing": named, "gradient_checkpointing": formerly}
    assert checkpoints(values) == TrainingArguments(str(tmp_path), **values).activation_checkpointing


@pytest.mark.slow
def test_every_stage(tmp_path, capsys):
    parts = save_configs(tmp_path, "llama", "mamba2")
    stages = (
        "[calibrate, pretrain: {max_steps: 10}, search: {strategy: gaea}, finetune: {bf16: true}, "
        "prune: {path: alpha, activation_checkpointing: true}]"
    )
    recipe = write_recipe(tmp_path, parts, stages, mixture="static", num_blocks=2)
    (tmp_path / "text.txt").write_text("x" * 4000)
    plan = make_plan(recipe, 2, "1GB")
    shown = capsys.readouterr().err
    for what in ("calibrate", "pretrain, plain weights, 8 rows", "finetune, adapted weights, 8 rows, checkpointing"):
        assert what in shown  # each takes seconds with large components
    assert [one["stage"] for one in plan["stages"]] == ["calibrate", "pretrain", "search", "finetune", "prune"]
    assert all(one["choice"] is not None and one["hours"] > 0 for one in plan["stages"])
    calibrate, pretrain, search, tune, hard = plan["stages"]
    assert calibrate["tokens"] == 40_000 and tune["tokens"] == 3 * 1000  # four bytes a token without a tokenizer
    assert pretrain["trainable"] == plan["own_parameters"] and search["trainable"] == plan["parameters"]
    assert tune["trainable"] == plan["parameters"] - 4  # alpha is fixed
    assert hard["trainable"] < tune["trainable"] and any("prune" in note for note in plan["notes"])
    assert {"LoRA, DDP", "QLoRA, DDP"} <= {one["engine"] for one in tune["options"]}
    assert tune["options"][0]["parts"]["weights"] == 4 * plan["parameters"]


def test_what_is_trained_in_half_precision(tmp_path, no_adapters):
    """accelerate's FSDP2 makes it float32 with mixed precision; what is frozen, and any other engine, leaves it."""
    recipe = write_recipe(tmp_path, save_configs(tmp_path, "llama"))
    text = recipe.read_text()
    found = {}
    for name, settings in (("mixed", "bf16: true, dtype: bfloat16"), ("pure", "dtype: bfloat16")):
        recipe.write_text(text.replace("finetune: {", f"finetune: {{{settings}, "))
        stage = make_plan(recipe, 4, "1GB", tokens=1000, batch_size=2)["stages"][0]
        found[name] = {one["engine"]: one["parts"] for one in stage["options"]}, stage
    parameters = found["mixed"][1]["trainable"]
    for engine, sizes in (("FSDP2", {"mixed": 4, "pure": 2}), ("DDP", {"mixed": 2, "pure": 2})):
        for name, size in sizes.items():
            shards = 4 if engine == "FSDP2" else 1
            parts = found[name][0][engine]
            assert parts["weights"] == pytest.approx(size * parameters / shards, rel=1e-3), (engine, name)
            assert parts["optimizer"] == pytest.approx(2 * size * parameters / shards, rel=1e-2), (engine, name)


def test_weights_that_are_read_in_another_dtype(tmp_path, no_adapters):
    parts = save_configs(tmp_path, "llama")
    for part in parts:
        file = Path(part) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    recipe = write_recipe(tmp_path, parts)
    said = "while loading, each of the 2 processes holds all weights in float32"
    plan = make_plan(recipe, 2, "1GB", tokens=1000, batch_size=2)
    assert plan["dtype"] == "bfloat16" and any(said in one for one in plan["stages"][0]["advice"])
    recipe.write_text(recipe.read_text().replace("finetune: {", "finetune: {dtype: bfloat16, "))
    assert not any("are read" in one for one in make_plan(recipe, 2, "1GB", tokens=1000)["stages"][0]["advice"])


@pytest.mark.slow
def test_more_devices_and_less_memory(tmp_path):
    recipe = write_recipe(tmp_path, save_configs(tmp_path, "llama", "gpt_neox"))
    peaks = {}
    for devices in (2, 4):
        plan = make_plan(recipe, devices, "1GB", tokens=1000, batch_size=2)
        peaks[devices] = {one["engine"]: one["peak"] for one in plan["stages"][0]["options"]}
    assert peaks[4]["FSDP2"] < peaks[2]["FSDP2"] < peaks[2]["DDP"] == peaks[4]["DDP"]
    assert peaks[4]["FSDP2 + activation checkpointing + CPU offload"] < peaks[4]["FSDP2 + activation checkpointing"]
    # Just too small for two rows: one, then none
    least = min(peak for name, peak in peaks[2].items() if not ("LoRA" in name or "offload" in name or "one" in name))
    stage = make_plan(recipe, 2, least - 1, reserve=0, tokens=1000, batch_size=2)["stages"][0]
    assert stage["choice"]["batch"] == 1
    assert "per_device_train_batch_size: 1, gradient_accumulation_steps: 2" in "; ".join(stage["advice"])
    plan = make_plan(recipe, 1, "1kB", batch_size=1)
    assert plan["verdict"].startswith("Does not fit: finetune") and plan["stages"][0]["choice"] is None


def test_a_saved_hybrid(hub, owner, tmp_path, no_adapters, monkeypatch):
    model = ManticoreForCausalLM.from_components([tiny("llama"), tiny("mamba")], num_blocks=2)
    model.save_pretrained(tmp_path / "hybrid")
    monkeypatch.setattr("manticore_hf.plan.plan.reached_flops", lambda: 5e10)  # a CPU's, measured; not an H100's
    plan = make_plan(tmp_path / "hybrid", block_size=64, batch_size=2, device="cpu")
    assert plan["assumptions"]["memory"] == memory_of(torch.device("cpu"))
    plan = make_plan(tmp_path / "hybrid", memory="16GB", block_size=64, batch_size=2, device="cpu")
    stage = plan["stages"][0]
    assert stage["hours_per_billion_tokens"] == pytest.approx(stage["flops_per_token"] * 1e9 / (5e10 * 0.35) / 3600)
    assert (stage["stage"], stage["batch"], stage["length"]) == ("finetune", 2, 64)
    assert plan["parameters"] == model.num_parameters()
    assert stage["hours"] is None and "--tokens" in plan["verdict"]
    hub.add_repo(f"{owner}/hybrid", tmp_path / "hybrid")
    shutil.rmtree(tmp_path / "hybrid")
    subject = load_subject(f"{owner}/hybrid")
    assert subject.config.component_names == ["llama", "mamba"] and subject.config.num_blocks == 2
    assert try_to_load_from_cache(f"{owner}/hybrid", "model.safetensors") is None


def test_vocabularies(tmp_path):
    parts = [*save_configs(tmp_path, "llama"), *save_configs(tmp_path, "mamba", vocabulary=90)]
    with pytest.raises(ManticoreError, match="transplant: auto"):
        load_subject(write_recipe(tmp_path, parts, num_blocks=2))
    subject = load_subject(write_recipe(tmp_path, parts, transplant="auto"))
    assert subject.config.mamba.vocab_size == subject.config.vocab_size == 64
    assert [entry["transplant"] is not None for entry in subject.config.components] == [False, True]
    assert "is replaced by llama" in subject.notes[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory": "80 apples"}, "memory='80 apples' is not an amount"),
        ({"memory": "0GB"}, "is not an amount of memory"),
        ({"devices": 0}, "devices=0"),
        ({"tokens": "many"}, "tokens='many'"),
        ({"utilization": 1.5}, "utilization=1.5"),
        ({"flops": -1}, "flops=-1"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cpu", "flops": 0}, "flops=0"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    with pytest.raises(ManticoreError, match=message):
        make_plan(tmp_path / "none.yaml", **options)


def test_what_cannot_be_read(owner, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for component, message in ((tmp_path / "empty", "has no config.json"), (f"{owner}/nothing", "private or gated")):
        assert main(["plan", str(write_recipe(tmp_path, [component]))]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan", f"{owner}/nothing"]) == 2
    assert "neither a recipe (a .yaml file) nor readable as a hybrid" in capsys.readouterr().err
    save_configs(tmp_path, "llama")
    assert main(["plan", str(tmp_path / "llama")]) == 2
    assert "is not a hybrid" in capsys.readouterr().err
    parts = save_configs(tmp_path, "llama", "mamba")
    recipe = write_recipe(tmp_path, parts, "[finetune: {optim: lomo}]")
    assert main(["plan", str(recipe), "--memory", "1GB"]) == 2
    assert "optim='lomo'" in capsys.readouterr().err


def test_amounts():
    assert parse_bytes("80GB") == 80 * 10**9 and parse_bytes("24 GiB") == 24 * 2**30 and parse_bytes(1000) == 1000
    assert parse_bytes("8e10") == 8 * 10**10 and parse_count("1.5B", "x") == 1_500_000_000


def test_what_a_cpu_reaches_is_measured():
    assert 1e7 < reached_flops(size=256, repeats=3) < 1e15
