"""Hybrids of components whose tokenizers differ: composed, calibrated, trained, saved, pushed, loaded, generating."""

import copy
import json
import os

import clean_process
import pytest
import torch
from hub_models import MODEL, component_keys, folder_of, publish, read_json, saved_keys
from safetensors.torch import load_file, save_file
from tiny_hybrid import QUIET
from transformers import AutoTokenizer, Trainer, TrainingArguments
from two_tokenizers import FIRST, SECOND, component, first, second

from manticore_hf import (
    ComponentSpec,
    ManticoreConfig,
    ManticoreError,
    ManticoreForCausalLM,
    calibrate_projectors,
    compose_transplanted,
    set_stage,
)
from manticore_hf import publish as publish_hybrid
from manticore_hf.cli import main
from manticore_hf.compose.component_tokenizers import digest
from manticore_hf.evaluation.data import pack
from manticore_hf.hub.inspection import run_inspect

pytestmark = pytest.mark.usefixtures("counted_once")
ENDS = {"b.backbone.embeddings.weight"}  # tied: the head is the same tensor


@pytest.fixture(scope="module")
def composed_once(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("src")
    publish(hub, "transplanted/a", component("neox", first(), extra=6), folder, first())
    publish(hub, "transplanted/b", component("mamba", second(), extra=2), folder, second())
    return compose_transplanted(["transplanted/a", "transplanted/b"], progress=False)


@pytest.fixture
def composed(composed_once):
    """A GPT-NeoX with a tokenizer and padding rows, a Mamba with another tokenizer; the hybrid reads the first's."""
    return copy.deepcopy(composed_once)


def ids(seed=1):
    return torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(seed))


def edit(folder, change):
    values = read_json(folder)
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_only_embedding_and_head_are_the_hybrids_own(composed, hub, tmp_path):
    model, tokenizer, reports = composed
    assert list(reports) == ["b"] and reports["b"].method == "omp" and reports["b"].rows == (327, 310)
    assert model.config.vocab_size == 310 and model.config.tokenizer_component == "a"
    assert model.config.eos_token_id == model.b.config.eos_token_id == tokenizer.eos_token_id == 0
    entry = model.config.components[1]
    address = {"repo_id": "transplanted/a", "revision": hub.head("transplanted/a"), "subfolder": None}
    vocabulary = digest(first().get_vocab())
    assert entry["transplant"] == {"method": "omp", "tokenizer": address, "vocabulary": vocabulary, "vocab_size": 327}
    assert entry["weights"] == "reference" and entry["repo_id"] == "transplanted/b"
    model.save_pretrained(tmp_path / "out")
    assert component_keys(tmp_path / "out") == ENDS
    size = model.b.get_input_embeddings().weight.nbytes
    assert size < (tmp_path / "out" / MODEL).stat().st_size < size + 20_000
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out", cache_dir=tmp_path / "fresh")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODEL).read_bytes() == (tmp_path / "out" / MODEL).read_bytes()


def test_a_push_counts_what_is_referenced_and_not_the_table_that_nobody_reads(composed, hub, owner, tmp_path):
    model, tokenizer, _ = composed
    out = publish_hybrid(model, f"{owner}/h", tokenizer=tokenizer, dry_run=True)
    body = sum(value.nbytes for key, value in model.b.state_dict().items() if key.startswith("backbone.layers"))
    body += model.b.backbone.norm_f.weight.nbytes
    files = {name: len(hub.files(f"transplanted/{name}")[MODEL]) for name in "ab"}
    assert abs(out.referenced_bytes - files["a"] - body) < 0.1 * body  # a share of the header of so small a file
    assert files["b"] - body > 327 * model.b.config.hidden_size * 4 - 1  # its own table, which is not counted


def test_padding_rows_get_no_probability_and_the_cache_changes_nothing(composed):
    model, _, _ = composed
    assert model.a.config.vocab_size == 316 and model(ids()).logits.shape[-1] == 310
    out = [
        model.generate(ids(), max_new_tokens=12, do_sample=False, use_cache=use, eos_token_id=None, pad_token_id=0)
        for use in (True, False)
    ]
    assert torch.equal(*out) and out[0].max() < 310


def test_new_rows_are_trained_with_the_projectors(composed):
    model = set_stage(composed[0], "projectors")
    trained = {name for name, one in model.named_parameters() if one.requires_grad and not name.startswith("hybrid_")}
    assert trained == ENDS


def test_either_tokenizer_or_a_given_one(hub, owner, tmp_path):
    folders = []
    for kind, tokenizer in (("neox", first()), ("mamba", second())):
        folders.append(str(folder_of(component(kind, tokenizer), tmp_path / kind, tokenizer)))
    model, tokenizer, reports = compose_transplanted(folders, "mean", tokenizer_component="mamba", progress=False)
    assert list(reports) == ["neox"] and tokenizer.get_vocab() == second().get_vocab()
    assert model.config.tokenizer_component == "mamba" and model.config.eos_token_id == 1
    assert model.generation_config.eos_token_id == 1
    model.save_pretrained(tmp_path / "out")
    assert read_json(tmp_path / "out")["components"][0]["transplant"]["tokenizer"] is None
    assert torch.equal(ManticoreForCausalLM.from_pretrained(tmp_path / "out")(ids()).logits, model(ids()).logits)

    third = folder_of(component("neox", first()), tmp_path / "third", first())
    given = AutoTokenizer.from_pretrained(third)
    given.add_tokens(["<new>"])
    model, tokenizer, reports = compose_transplanted(folders, tokenizer=given, progress=False)
    assert set(reports) == {"neox", "mamba"} and model.config.vocab_size == 311 and tokenizer is given
    with pytest.raises(ManticoreError, match="needs a donor"):
        compose_transplanted(folders, "omp", tokenizer=given, progress=False)


def test_equal_tokenizers_are_left_alone(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", component("neox", first()), tmp_path / "src", first())
    publish(hub, f"{owner}/b", component("mamba", first(), extra=4), tmp_path / "src", first())
    model, _, reports = compose_transplanted([f"{owner}/a", f"{owner}/b"], progress=False)
    assert not reports and all(entry["transplant"] is None for entry in model.config.components)
    model.save_pretrained(tmp_path / "out")
    assert not component_keys(tmp_path / "out")


def test_from_components_names_the_remedy_and_checks_what_it_is_given(composed):
    model, _, _ = composed
    with pytest.raises(ManticoreError, match="Transplant.*compose --transplant auto"):
        ManticoreForCausalLM.from_components(["transplanted/a", "transplanted/b"], tokenizers="transplant")
    entry = model.config.components[1]["transplant"]
    other = ComponentSpec("transplanted/b", model=model.b, transplant={**entry, "vocabulary": "0" * 64})
    with pytest.raises(ManticoreError, match="have different vocabularies; components must share"):
        ManticoreForCausalLM.from_components(["transplanted/a", other])
    with pytest.raises(ManticoreError, match="model= is a GPTNeoXForCausalLM; give a causal LM of model type 'mamba'"):
        ManticoreForCausalLM.from_components(["transplanted/a", ComponentSpec("transplanted/b", model=model.a)])
    with pytest.raises(ManticoreError, match="instantiated model, which has no tokenizer"):
        compose_transplanted(["transplanted/a", component("mamba", second())])
    with pytest.raises(ManticoreError, match="method='nearest' is unknown"):
        compose_transplanted(["transplanted/a", "transplanted/b"], "nearest")


def test_trained_tensors_and_a_resumed_state_are_kept(composed, tmp_path):
    model, _, _ = composed
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.b.get_input_embeddings().weight.add_(1)
    model.load_state_dict(load_file(tmp_path / "out" / MODEL))  # as the Trainer resumes
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_the_referenced_embedding_is_never_taken_for_the_new_one(hub, owner, tmp_path):
    """Even where it has the same shape, as with two tokenizers of one size."""
    publish(hub, f"{owner}/a", component("neox", first(), extra=17), tmp_path / "src", first())
    publish(hub, f"{owner}/b", component("mamba", second()), tmp_path / "src", second())
    model, _, _ = compose_transplanted([f"{owner}/a", f"{owner}/b"], "mean", progress=False)
    model.resize_token_embeddings(325)
    original = folder_weights(tmp_path / "src", owner)
    with torch.no_grad():
        model.b.get_input_embeddings().weight.copy_(original)
    model.save_pretrained(tmp_path / "out")
    assert component_keys(tmp_path / "out") >= ENDS  # written although it is bit-equal
    tensors = load_file(tmp_path / "out" / MODEL)
    save_file({k: v for k, v in tensors.items() if k not in ENDS}, tmp_path / "out" / MODEL, metadata={"format": "pt"})
    with pytest.raises(ManticoreError, match="1 tensors are neither|2 tensors are neither"):
        ManticoreForCausalLM.from_pretrained(tmp_path / "out")


def folder_weights(root, owner):
    return load_file(root / f"{owner}--b" / "main" / MODEL)["backbone.embeddings.weight"]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.update(vocab_size=310), "has 327 rows; its vocabulary was transplanted from one of 310"),
        (lambda t: t.update(vocab_size=-1), "transplant vocab_size=-1"),
        (lambda t: t.update(vocab_size=2**40), "more than any model has|vocab_size=1099511627776"),
        (lambda t: t.update(vocab_size=True), "transplant vocab_size=True"),
        (lambda t: t.update(method="../x"), "transplant method='../x' is not a name"),
        (lambda t: t.update(vocabulary="0"), "is not a SHA-256"),
        (lambda t: t.update(tokenizer="/etc/passwd"), "must have a repo_id, revision and subfolder"),
        (lambda t: t["tokenizer"].update(repo_id="../up"), "is not a Hub repository id"),
        (lambda t: t["tokenizer"].update(revision="main"), "which is not a 40-hex commit"),
        (lambda t: t.update(more=1), "must have the keys"),
        (lambda t: t.clear(), "must have the keys"),
    ],
)
def test_a_tampered_configuration_is_refused(composed, tmp_path, change, message):
    model, _, _ = composed
    model.save_pretrained(tmp_path / "out")
    edit(tmp_path / "out", lambda values: change(values["components"][1]["transplant"]))
    with pytest.raises(ManticoreError, match=message):
        ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    values = copy.deepcopy(model.config.components[1])
    with pytest.raises(ManticoreError, match="must have the keys"):
        ManticoreConfig(components=[{**values, "config": model.b.config, "transplant": [1]}])


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.modules["manticore_hf"] = None  # the repository's own code must do
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
given = tokenizer("The cat sat", return_tensors="pt")
out = [model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
assert torch.equal(*out)
torch.save({"logits": model(**given).logits, "generated": out[0]}, sys.argv[2])
"""


@pytest.mark.slow
def test_the_whole_way(hub, owner, tmp_path, capsys):
    """A GPT-Neo style and a Mamba style model of different tokenizers, by the command line and by hand."""
    publish(hub, f"{owner}/a", component("neox", first(), extra=6), tmp_path / "src", first())
    publish(hub, f"{owner}/b", component("mamba", second()), tmp_path / "src", second())
    (tmp_path / "text.txt").write_text((FIRST + SECOND) * 8)
    command = ["compose", f"{owner}/a", f"{owner}/b", "--num_blocks", "2", "--output_dir", str(tmp_path / "0")]
    assert main(command) == 2 and "--transplant auto" in capsys.readouterr().err
    command += ["--transplant", "auto", "--transplant_data", str(tmp_path / "text.txt")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "vocabulary of b transplanted by" in said and "bits per byte" in said
    result = json.loads((tmp_path / "0" / "stage.json").read_text())
    assert set(result["transplants"]["b"]["bits_after"]) == {"omp", "mean"}

    model = ManticoreForCausalLM.from_pretrained(tmp_path / "0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "0")
    assert tokenizer.get_vocab() == first().get_vocab()
    rows = pack([(FIRST + SECOND) * 8], tokenizer, 32)
    calibrate_projectors(model, rows, tokens=1500, batch_size=8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "train"), max_steps=8, learning_rate=5e-3, per_device_train_batch_size=8, **QUIET
    )
    before = mean_loss(model, rows)
    Trainer(model=set_stage(model, "finetune"), args=arguments, train_dataset=rows).train()
    model.eval()
    assert mean_loss(model, rows) < before - 0.1

    model.save_pretrained(tmp_path / "1")
    tokenizer.save_pretrained(tmp_path / "1")
    assert {key.split(".")[0] for key in saved_keys(tmp_path / "1")} >= {"a", "b", "hybrid_mixer"}  # all was trained
    publish_hybrid(tmp_path / "1", f"{owner}/hybrid", license="mit")
    card = hub_card(f"{owner}/hybrid")
    assert (
        "Embedding and head of b were made for this tokenizer" in card
        and "The tokenizer is that of a (310 tokens)" in card
    )
    run_inspect(f"{owner}/hybrid")
    assert "its vocabulary was transplanted" in capsys.readouterr().out
    done = clean_process.run(
        ["-c", LOAD, f"{owner}/hybrid", tmp_path / "out.pt"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        modules=clean_process.TORCH,
    )
    assert done.returncode == 0, done.stderr
    found, given = torch.load(tmp_path / "out.pt"), tokenizer("The cat sat", return_tensors="pt")
    torch.testing.assert_close(found["logits"], model(**given).logits)  # the package's mixture rounds otherwise
    assert torch.equal(found["generated"], model.generate(**given, max_new_tokens=8, do_sample=False))


@torch.no_grad()
def mean_loss(model, rows):
    ids = torch.tensor(rows["input_ids"])
    return model(input_ids=ids, labels=ids).loss.item()


def hub_card(repo_id):
    from huggingface_hub import hf_hub_download

    with open(hf_hub_download(repo_id, "README.md"), encoding="utf-8") as file:
        return file.read()


def test_a_recipe_transplants_and_measures_on_its_own_data(hub, owner, tmp_path):
    for kind, tokenizer in (("neox", first()), ("mamba", second())):
        folder_of(component(kind, tokenizer), tmp_path / kind, tokenizer)
    (tmp_path / "text.txt").write_text((FIRST + SECOND) * 4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"components: [{tmp_path}/neox, {tmp_path}/mamba]\nhybrid: {{transplant: auto, tokenizer_component: mamba}}\n"
        "data: {data: text.txt, block_size: 16, validation_fraction: 0.1}\nstages: [calibrate: {tokens: 200}]\n"
    )
    assert main(["run", str(recipe), "--output-dir", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "0-compose" / "stage.json").read_text())
    assert result["transplants"]["neox"]["bits_before"] > 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "1-calibrate")
    assert tokenizer.get_vocab() == second().get_vocab()
    recipe.write_text(recipe.read_text().replace("auto", "3"))
    assert main(["run", str(recipe), "--output-dir", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=pytest.mark.slow), "search", "finetune"])
def test_new_rows_have_a_learning_rate_of_their_own_and_can_be_frozen(stage, tmp_path):
    """A rate of 0 leaves them as they are; another moves them by that rate, and nothing else by it."""
    for kind, tokenizer in (("neox", first()), ("mamba", second())):
        folder_of(component(kind, tokenizer), tmp_path / kind, tokenizer)
    (tmp_path / "text.txt").write_text((FIRST + SECOND) * 8)
    settings = {"num_blocks": 2, "mixture": "static", "projector_init": "default", "progress": False}
    model, tokenizer, _ = compose_transplanted([tmp_path / "neox", tmp_path / "mamba"], "mean", **settings)
    model.save_pretrained(tmp_path / "0")
    tokenizer.save_pretrained(tmp_path / "0")
    before, new = model.state_dict(), {"mamba.backbone.embeddings.weight", "mamba.lm_head.weight"}
    words = [stage, "--model", "0", "--data", "text.txt", "--block-size", "16", "--max-steps", "1", "--use-cpu"]
    words = [str(tmp_path / word) if word in ("0", "text.txt") else word for word in words]
    words += ["--learning-rate", "1e-3", "--weight-decay", "0", "--lr-scheduler-type", "constant"]

    def moved(rate):
        options = [] if rate is None else ["--new-rows-learning-rate", str(rate)]
        assert main([*words, *options, "--output-dir", str(tmp_path / f"{stage}-{rate}")]) == 0
        after = ManticoreForCausalLM.from_pretrained(tmp_path / f"{stage}-{rate}").state_dict()
        return {key: (after[key] - before[key]).abs().max().item() for key in before}

    # One step of Adam is as long as its rate
    for rate, expected in ((None, 1e-3), (0, 0.0), (1e-2, 1e-2)):
        found = moved(rate)
        assert max(found[key] for key in new & set(found)) == pytest.approx(expected, rel=0.02), rate
        assert found["hybrid_mixer.into.mamba-1.weight"] == pytest.approx(1e-3, rel=0.02)
    assert main([*words, "--new-rows-learning-rate", "-1", "--output-dir", str(tmp_path / "x")]) == 2
