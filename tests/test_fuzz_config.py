"""Thousands of damaged configurations: each gives a working hybrid or an error with a message, and nothing else.

Nothing else: no other kind of error, no hang, no memory taken, no part of a file written.
"""

import json
import shutil

import pytest
import torch
from fuzzing import HOSTILE_KEYS, HOSTILE_VALUES, fuzzed, garbled, mutated, outcome
from hub_models import FAMILIES, tiny
from hypothesis import given
from hypothesis import strategies as st

from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreError, ManticoreForCausalLM, prune
from manticore_hf.hub.inspection import inspect_hybrid

HYBRIDS = {
    "gpt_neox+mamba": {},
    "llama+mamba2": {"preset": "paper"},
    "gpt2+jamba": {"embeddings": "mixed", "mixture": "token", "projector": "mlp"},
    "llama+mamba": {"num_blocks": 1, "mixture_weights": [[0.5, 0.5]]},
    "pruned": {"num_blocks": 2},
    "llama+gpt_neox": {
        "num_blocks": 1, "topology": "bridge", "bridge_alpha": True, "bridge_rank": 4,
        "bridges": ["others", {"from": "llama", "to": "llama", "from_block": 0, "to_block": 1, "kind": "attention"}],
    },
}  # fmt: skip


GENERATION = {
    "num_beams": 2, "max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": [1, 2],
    "num_return_sequences": 1, "repetition_penalty": 1.1, "suppress_tokens": [3], "stop_strings": ["x"],
    "watermarking_config": {"greenlist_ratio": 0.25}, "compile_config": {"mode": "default"},
    "cache_implementation": None, "transformers_version": "5.24.0", "custom_generate": None, "generation_kwargs": {},
}  # fmt: skip


class Saved(dict):
    """{name: (directory, its config.json as text)} of small hybrids."""

    def __repr__(self):  # hypothesis prints the arguments of a failing example
        return "saved"


def save_hybrids(root):
    """Small hybrids of several kinds, saved below `root`."""
    out = Saved()
    for name, choices in HYBRIDS.items():
        families = ["gpt_neox", "mamba"] if name == "pruned" else name.split("+")
        parts = [ComponentSpec(tiny(family, seed=i), name=family) for i, family in enumerate(families)]
        model = ManticoreForCausalLM.from_components(parts, **{"num_blocks": 2, **choices})
        model = prune(model, families) if name == "pruned" else model
        folder = root / name
        model.save_pretrained(folder)
        out[name] = folder, (folder / "config.json").read_text()
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_hybrids(tmp_path_factory.mktemp("saved"))


def with_configuration(saved, tmp_path):
    """Function (name, text of a config.json) -> a hybrid's directory with that configuration."""

    def make(name, text):
        target = tmp_path / "fuzzed"
        target.mkdir(exist_ok=True)
        for file in ("model.safetensors", "generation_config.json"):
            if not (target / file).is_symlink() or (target / file).readlink().parent != saved[name][0]:
                (target / file).unlink(missing_ok=True)
                (target / file).symlink_to(saved[name][0] / file)
        (target / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        return target

    return make


@pytest.fixture
def folder(saved, tmp_path):
    return with_configuration(saved, tmp_path)


def changed(text, random):
    """A config.json whose values were changed: in one component, or anywhere."""
    values = json.loads(text)
    part = random.randrange(len(values["components"]) + 1)
    within = None if part == len(values["components"]) else lambda copy: copy["components"][part]["config"]
    try:
        return json.dumps(mutated(values, random, times=random.choice([1, 1, 1, 2, 5]), within=within))
    except (KeyError, TypeError, IndexError):  # the part itself is gone
        return json.dumps(mutated(values, random))


def on_meta(folder):
    config = ManticoreConfig.from_pretrained(folder)
    with torch.device("meta"):
        ManticoreForCausalLM(config)


@torch.no_grad()
def loaded(folder):
    model = ManticoreForCausalLM.from_pretrained(folder)
    logits = model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits
    assert logits.shape == (1, 5, model.config.vocab_size)
    target = folder.parent / "again"
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    again = ManticoreForCausalLM.from_pretrained(target)
    torch.testing.assert_close(again(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits, logits, equal_nan=True)


@pytest.mark.slow
def test_the_hybrids_themselves_work(saved, folder):
    for name, (_, text) in saved.items():
        assert all(outcome(run, folder(name, text)) for run in (on_meta, loaded, inspect_hybrid))


@fuzzed(1000)
@given(name=st.sampled_from(sorted(HYBRIDS)), random=st.randoms())
def test_changed_values_as_dicts(saved, name, random):
    def read(values):
        config = ManticoreConfig.from_dict(values)
        assert ManticoreConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    outcome(read, json.loads(changed(saved[name][1], random)))


@fuzzed(200)
@given(name=st.sampled_from(sorted(HYBRIDS)), random=st.randoms())
def test_changed_values(saved, folder, name, random):
    outcome(on_meta, folder(name, changed(saved[name][1], random)))


@fuzzed(60)
@given(name=st.sampled_from(sorted(HYBRIDS)), random=st.randoms())
def test_what_can_be_built_also_loads_and_runs(saved, folder, name, random):
    outcome(loaded, folder(name, changed(saved[name][1], random)))


@fuzzed(40)
@given(name=st.sampled_from(sorted(HYBRIDS)), random=st.randoms())
def test_inspection(saved, folder, name, random):
    outcome(inspect_hybrid, folder(name, changed(saved[name][1], random)))


@fuzzed(200)
@given(name=st.sampled_from(sorted(HYBRIDS)), random=st.randoms())
def test_garbled_text(saved, folder, name, random):
    outcome(on_meta, folder(name, garbled(saved[name][1], random, times=random.choice([1, 1, 3]))))


def save_parts(root):
    """{family: directory} of components."""
    folders = {family: root / family for family in FAMILIES}
    for family, folder in folders.items():
        tiny(family).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@fuzzed(150)
@given(family=st.sampled_from(sorted(FAMILIES)), random=st.randoms(), garble=st.booleans())
def test_components(parts, tmp_path, family, random, garble):
    target, text = tmp_path / "part", (parts[family] / "config.json").read_text()
    shutil.copytree(parts[family], target, dirs_exist_ok=True)
    text = garbled(text, random) if garble else json.dumps(mutated(json.loads(text), random, random.choice([1, 1, 3])))
    (target / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    outcome(lambda: ManticoreForCausalLM.from_components([ComponentSpec(target, name="one")]))


def load_all(saved):
    """{name: the hybrid}."""
    return {name: ManticoreForCausalLM.from_pretrained(folder) for name, (folder, _) in saved.items()}


@fuzzed(60)
@given(name=st.sampled_from(sorted(HYBRIDS)), random=st.randoms())
def test_generation_configurations(saved, folder, name, random):
    target = folder(name, saved[name][1])
    values = {**json.loads((saved[name][0] / "generation_config.json").read_text()), **GENERATION}
    text = json.dumps(mutated(values, random, times=random.choice([1, 1, 3])))
    (target / "generation_config.json").unlink()
    (target / "generation_config.json").write_text(garbled(text, random) if random.randrange(4) == 0 else text)
    outcome(ManticoreForCausalLM.from_pretrained, target)


@pytest.fixture(scope="module")
def models(saved):
    return load_all(saved)


@fuzzed(100)
@given(name=st.sampled_from(sorted(HYBRIDS)), key=st.sampled_from(HOSTILE_KEYS), value=st.sampled_from(HOSTILE_VALUES))
def test_a_save_that_fails_leaves_no_file(models, tmp_path, name, key, value):
    """Whatever a user did to the configuration in memory: a directory that can be read, or none at all."""
    config, target = models[name].config, tmp_path / "target"
    before = dict(vars(config))
    try:
        vars(config)[key] = value
        models[name].save_pretrained(target)
    except Exception:  # it is the user's own object: any error will do
        assert not list(tmp_path.iterdir())
    else:
        assert {"config.json", "model.safetensors"} <= {file.name for file in target.iterdir()}
        outcome(ManticoreConfig.from_pretrained, target)
    finally:
        vars(config).clear()
        vars(config).update(before)
        shutil.rmtree(target, ignore_errors=True)


def test_errors_of_other_kinds_do_not_pass():
    def refuse(error):
        raise error

    with pytest.raises(KeyError):
        outcome(refuse, KeyError("x"))
    with pytest.raises(AssertionError):
        outcome(refuse, ManticoreError(""))
    assert not outcome(refuse, ManticoreError("no"))
