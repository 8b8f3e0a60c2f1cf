"""What cannot be joined is refused by name, before anything large is downloaded."""

import json
import re

import pytest
import torch
from hub_models import FAMILIES, MODEL, folder_of, logits, mended_logits, publish, tiny, tokenizer, weight_requests
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM
from manticore_hf.compose import components
from manticore_hf.compose.convert import read_checkpoint
from manticore_hf.compose.convert.read_checkpoint import find_source

SMALL_BERT = dict(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
)


@pytest.fixture
def refuse(hub):
    """Asserts that `from_components` refuses with a message that has all the words, and fetched no weights."""

    def check(components, *words, **settings):
        hub.clear_requests()
        with pytest.raises(ManticoreError) as caught:
            ManticoreForCausalLM.from_components(components, **settings)
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
        fetched = [path for path in weight_requests(hub) if not is_probe(hub, path)]
        assert not fetched, fetched
        return str(caught.value)

    return check


def is_probe(hub, path):
    """Whether all requests for a file only asked whether it exists."""
    return all(method == "HEAD" for method, other in hub.requests if other == path)


@pytest.fixture
def a(hub, owner, tmp_path):
    publish(hub, f"{owner}/a", tiny("gpt_neox"), tmp_path / "src", tokenizer())
    return f"{owner}/a"


def rewrite_config(**changes):
    def edit(folder):
        values = json.loads((folder / "config.json").read_text())
        values.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return edit


def test_the_probe_of_these_tests_sees_downloads(hub, a):
    hub.clear_requests()
    ManticoreForCausalLM.from_components([a])
    assert any(path.endswith(MODEL) and not is_probe(hub, path) for path in weight_requests(hub))


def test_a_name_without_owner_is_asked_for_once(hub, monkeypatch, tmp_path):
    """It is most often a mistyped directory; the Hub's client would try five times to reach the Hub."""
    publish(hub, "old", tiny("gpt_neox"), tmp_path / "src", tokenizer())
    assert ManticoreForCausalLM.from_components(["old"]).config.components[0]["repo_id"] == "old"
    hub.clear_requests()
    for ask in (lambda: ManticoreForCausalLM.from_components(["gema"]), lambda: find_source("gema")[0].file("x")):
        with pytest.raises(ManticoreError, match="no such repository"):
            ask()
    assert 0 < len(hub.requests) <= 4

    def unreachable(self, repo_id, timeout, **options):
        assert 0 < timeout <= 10
        raise HTTPError("[Errno -2] Name or service not known")

    def tried(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    assert ManticoreForCausalLM.from_components(["old"]).config.num_blocks == 1  # which is in the cache
    for module in (components, read_checkpoint):
        monkeypatch.setattr(module, "hf_hub_download", tried)
    for ask in (lambda: ManticoreForCausalLM.from_components(["gema"]), lambda: find_source("gema")):
        with pytest.raises(ManticoreError, match=r"there is no directory 'gema' here, .* service not known\)\.$"):
            ask()


# ---- architectures ---------------------------------------------------------------------------------------------------


def test_unknown_architecture(hub, owner, a, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=rewrite_config(model_type="no_such_model"))
    words = ["'no_such_model'", "unknown", "upgrade Transformers or choose another"]
    refuse([a, f"{owner}/b"], f"'b' ({owner}/b)", *words)


def test_config_without_a_model_type(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=rewrite_config(model_type=None))
    refuse([f"{owner}/b"], f"'b' ({owner}/b)", "model_type None", "choose another")


def test_remote_code_is_refused(hub, owner, tmp_path, refuse):
    edit = rewrite_config(model_type="their_own", auto_map={"AutoModelForCausalLM": "modeling_theirs.Theirs"})
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=edit)
    refuse([f"{owner}/b"], "'b'", "remote code", "'their_own'", "modeling_theirs.Theirs", "Transformers itself")


def test_known_architecture_with_code_of_its_own_uses_transformers(hub, owner, tmp_path):
    edit = rewrite_config(auto_map={"AutoModelForCausalLM": "modeling_theirs.Theirs", "AutoConfig": "x.Y"})
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=edit)
    model = ManticoreForCausalLM.from_components([f"{owner}/b"])
    assert type(model.b).__module__.startswith("transformers.")
    model.b.save_pretrained(tmp_path / "alone")
    assert "auto_map" not in json.loads((tmp_path / "alone" / "config.json").read_text())
    model.save_pretrained(tmp_path / "out")
    assert "modeling_theirs" not in (tmp_path / "out" / "config.json").read_text()


def test_masked_language_model(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/bert", BertForMaskedLM(BertConfig(**SMALL_BERT)), tmp_path / "src")
    refuse([f"{owner}/bert"], f"({owner}/bert)", "BertForMaskedLM", "only causal LMs")


def test_bert_that_looks_both_ways(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/bert", BertLMHeadModel(BertConfig(**SMALL_BERT)), tmp_path / "src")
    refuse([f"{owner}/bert"], f"({owner}/bert)", "is_decoder=False", "only causal LMs")
    refuse([BertLMHeadModel(BertConfig(**SMALL_BERT))], "'bert'", "is_decoder=False")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder(hub, owner, tmp_path, refuse, kind):
    if kind == "t5":
        config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(config)
    else:
        config = BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
        model = BartForConditionalGeneration(config)
    publish(hub, f"{owner}/both", model, tmp_path / "src")
    refuse([f"{owner}/both"], f"'both' ({owner}/both)", f"encoder-decoder ({kind})", "only causal LMs")
    refuse([model], f"'{kind}'", "encoder-decoder")


def test_hybrid_of_hybrids(hub, owner, a, tmp_path, refuse):
    ManticoreForCausalLM.from_components([a]).save_pretrained(tmp_path / "out")
    hub.add_repo(f"{owner}/hybrid", tmp_path / "out")
    refuse([f"{owner}/hybrid"], "'hybrid'", "itself a hybrid", "name its components")


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def test_vocabularies_of_different_size(hub, owner, a, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2", vocabulary=80), tmp_path / "src")
    refuse([a, f"{owner}/b"], "'a': 64", "'b': 80", "one vocabulary")


def test_different_tokenizers_of_the_same_size(hub, owner, a, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", tokenizer(["other"]))
    words = f"'a' ({owner}/a)", f"'b' ({owner}/b)", "'other' has id", "one tokenizer"
    refuse([a, f"{owner}/b"], *words, num_blocks=2)  # in one block each reads the text through its own


def test_components_without_a_tokenizer_are_compared_by_size(hub, owner, a, tmp_path):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src")
    publish(hub, f"{owner}/c", tiny("llama"), tmp_path / "src")
    ManticoreForCausalLM.from_components([f"{owner}/b", a, f"{owner}/c"])


def test_tokenizers_are_compared_across_a_component_without_one(hub, owner, a, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src")
    publish(hub, f"{owner}/c", tiny("llama"), tmp_path / "src", tokenizer(["other"]))
    refuse([a, f"{owner}/b", f"{owner}/c"], "'a'", "'c'", "one tokenizer")


# ---- repositories ----------------------------------------------------------------------------------------------------


def test_pickles_only(hub, owner, tmp_path, refuse):
    def edit(folder):
        torch.save({}, folder / "pytorch_model.bin")
        (folder / MODEL).unlink()

    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=edit)
    refuse([f"{owner}/b"], f"'b' ({owner}/b)", "pickle (pytorch_model.bin)", "`manticore-hf convert`")
    refuse([tmp_path / "src" / f"{owner}--b" / "main"], "'main'", "pickle (pytorch_model.bin)", "Convert it")


def test_no_weights_at_all(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=lambda folder: (folder / MODEL).unlink())
    refuse([f"{owner}/b"], f"'b' ({owner}/b)", "no model.safetensors")


def test_nonexistent_repository(owner, a, refuse):
    refuse(
        [a, f"{owner}/nowhere"],
        f"({owner}/nowhere)",
        "no directory of this name",
        "no such repository",
        "private or gated",
        "hf auth login",
    )


def test_nonexistent_revision(a, refuse):
    refuse([f"{a}@v9"], f"({a})", "no revision 'v9'")
    refuse([ComponentSpec(a, revision="0" * 40)], f"({a})", "no revision '" + "0" * 40)


def test_contradicting_revisions(a, refuse):
    refuse([ComponentSpec(f"{a}@main", revision="dev")], "revision='dev'", "'@main'")


def test_private_repository(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/secret", tiny("gpt2"), tmp_path / "src", private=True)
    words = [f"({owner}/secret)", "private or gated", "hf auth login"]
    refuse([f"{owner}/secret"], *words, token="hf_someone_else", cache_dir=tmp_path / "cache")
    refuse([f"{owner}/secret"], *words, token=False, cache_dir=tmp_path / "cache")
    message = refuse([f"{owner}/secret"], token="hf_someone_else", cache_dir=tmp_path / "cache")
    assert "hf_someone_else" not in message
    ManticoreForCausalLM.from_components([f"{owner}/secret"], cache_dir=tmp_path / "cache")


def test_gated_repository(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/gated", tiny("gpt2"), tmp_path / "src")
    hub.fault(f"{owner}/gated/resolve", "gated", times=-1)
    refuse([f"{owner}/gated"], f"({owner}/gated)", "is gated", "ask for access", "hf auth login")


def test_server_error(hub, owner, a, refuse, tmp_path):
    hub.fault(f"{a}/resolve", "status", times=-1, status=400)
    refuse([a], f"({a})", "the Hub answers", cache_dir=tmp_path / "cache")


def test_nothing_cached_and_offline(a, refuse, tmp_path):
    refuse([a], f"({a})", "config.json", "not in the local cache", cache_dir=tmp_path / "cache", local_files_only=True)


def test_repository_without_config(hub, owner, refuse):
    hub.add_repo(f"{owner}/bare", {"README.md": b"nothing here"})
    refuse([f"{owner}/bare"], f"({owner}/bare)", "no config.json")


def test_subfolder_that_does_not_exist(a, refuse):
    refuse([ComponentSpec(a, subfolder="inner")], f"({a})", "config.json")


def test_directory_without_config(tmp_path, refuse):
    refuse([tmp_path], str(tmp_path), "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "", '"gpt2"', "\x00"])
def test_malformed_config(hub, owner, tmp_path, refuse, text):
    def edit(folder):
        (folder / "config.json").write_text(text)

    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=edit)
    refuse([f"{owner}/b"], f"'b' ({owner}/b)", "config.json", "JSON object")
    refuse([tmp_path / "src" / f"{owner}--b" / "main"], "'main'", "config.json", "JSON object")


def test_config_with_an_impossible_value(hub, owner, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=rewrite_config(n_layer="many"))
    refuse([f"{owner}/b"], f"'b' ({owner}/b)", "n_layer")


def test_weights_that_do_not_fit_their_config(hub, owner, tmp_path):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src", edit=rewrite_config(n_layer=3))
    with pytest.raises(ManticoreError, match=rf"'b' \({owner}/b\).*missing or of another shape.*transformer.h.2"):
        ManticoreForCausalLM.from_components([f"{owner}/b"])
    publish(hub, f"{owner}/c", tiny("gpt2"), tmp_path / "src", edit=rewrite_config(n_inner=8))
    with pytest.raises(ManticoreError, match=rf"'c' \({owner}/c\).*h.0.mlp.c_fc.bias \(\(64,\), not \(8,\)"):
        ManticoreForCausalLM.from_components([f"{owner}/c"])


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [[], (), None, "org/name", {}])
def test_no_list_of_components(refuse, components):
    refuse(components, "list of at least one component")


def test_one_model_instead_of_a_list(refuse):
    refuse(tiny("gpt2"), "list of at least one component")


@pytest.mark.parametrize("item", [3, None, {"repo_id": "a/b"}, torch.nn.Linear(2, 2)])
def test_item_of_the_wrong_type(refuse, item):
    refuse([item], type(item).__name__, "a repo id, a local directory, a causal LM or a ComponentSpec")
    refuse([ComponentSpec(item)], type(item).__name__, "a repo id, a local directory")


NO_ADDRESSES = ["../up", "/no/such/directory", "a/b/c", "https://x.y/a/b", "file:x", "", "a b/c", "x\n"]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_text_that_is_no_address(refuse, text):
    refuse([text], repr(text), "neither a local directory that exists nor a Hub repository id")


def test_duplicate_names(hub, owner, a, refuse):
    refuse([a, a], "Two components are named 'a'", "ComponentSpec(name=...)")
    refuse([tiny("gpt2"), tiny("gpt2", 1)], "Two components are named 'gpt2'", "ComponentSpec(name=...)")
    model = ManticoreForCausalLM.from_components([a, ComponentSpec(a, name="twin")])
    assert model.config.component_names == ["a", "twin"]


@pytest.mark.parametrize("name", ["hybrid_mixer", "config", "1st", "a-b", "", 3])
def test_impossible_name(a, refuse, name):
    refuse([ComponentSpec(a, name=name)], repr(name), "Component name")


def test_names_are_made_from_addresses(hub, owner, tmp_path):
    for repo in ("pythia-1.4b", "config", "7B"):
        publish(hub, f"{owner}/{repo}", tiny("gpt2"), tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/pythia-1.4b", f"{owner}/config", f"{owner}/7B"])
    assert model.config.component_names == ["pythia_1_4b", "config_lm", "c_7b"]


def test_more_blocks_than_layers(hub, owner, a, tmp_path, refuse):
    publish(hub, f"{owner}/b", tiny("gpt2"), tmp_path / "src")
    refuse([a, f"{owner}/b"], "num_blocks=3", "2 layers of component 'b'", "at most 2", num_blocks=3)


@pytest.mark.parametrize("blocks", [0, -1, 1.5, "2", True, None])
def test_impossible_number_of_blocks(a, refuse, blocks):
    refuse([a], f"num_blocks={blocks!r}", "positive integer", num_blocks=blocks)


@pytest.mark.parametrize("cut", [[1, 1], [3], [0, 3], [1, 2, 0], "12", [1.0, 2.0], None])
def test_wrong_block_layers(a, refuse, cut):
    refuse([a], f"block_layers['a']={cut!r}", "2 positive integers", "3 layers", num_blocks=2, block_layers={"a": cut})


def test_block_layers_of_no_component(a, refuse):
    refuse([a], "block_layers", "'zz'", "['a']", block_layers={"zz": [3]})
    refuse([a], "block_layers=[3]", "['a']", block_layers=[3])


@pytest.mark.parametrize(
    "key, value",
    [
        ("gate", "open"),
        ("mixture", 1),
        ("embeddings", "none"),
        ("preset", "best"),
        ("reference_component", "zz"),
        ("tokenizer_component", "zz"),
        ("mix_loss_weight", -1),
        ("component_loss_weight", "x"),
        ("dtype", "float33"),
        ("mixture_weights", [[0.5]]),
        ("route", ["zz"]),
        ("vocab_size", 7),
    ],
)
def test_wrong_setting(a, refuse, key, value):
    refuse([a], f"{key}={value!r}", **{key: value})


def test_setting_that_does_not_exist(a, refuse):
    refuse([a], "num_block=2", "did you mean num_blocks?", num_block=2)
    refuse([a], "zzz=1", "choose from", "num_blocks", zzz=1)


def test_instance_without_a_head(refuse):
    from transformers import GPT2Model

    refuse([GPT2Model(tiny("gpt2").config)], "'gpt2'", "GPT2Model", "not as a causal LM")


def test_instance_of_a_class_that_loading_would_not_find(refuse):
    class OtherForCausalLM(type(tiny("gpt2"))):
        pass

    refuse([OtherForCausalLM(tiny("gpt2").config)], "'gpt2'", "OtherForCausalLM", "rebuild it as GPT2LMHeadModel")


def test_revision_of_an_instance(refuse):
    refuse([ComponentSpec(tiny("gpt2"), revision="main")], "'gpt2'", "no revision 'main'")


# ---- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_kind_of_source_gives_the_same(hub, owner, tmp_path, family):
    model = tiny(family)
    publish(hub, f"{owner}/a", model, tmp_path / "src")
    folder = folder_of(model, tmp_path / "local")
    sources, wanted = [f"{owner}/a", folder, model], mended_logits(model)
    if family == "gpt_neox":  # other ways to say the same, of any family
        sources += [str(folder), ComponentSpec(f"{owner}/a"), f"{owner}/a@main"]
    for source in sources:
        hybrid = ManticoreForCausalLM.from_components([source])
        assert torch.equal(logits(hybrid), wanted)


def test_bert_as_a_decoder(hub, owner, tmp_path):
    model = BertLMHeadModel(BertConfig(**SMALL_BERT, is_decoder=True)).eval()
    publish(hub, f"{owner}/bert", model, tmp_path / "src")
    assert AutoConfig.from_pretrained(f"{owner}/bert").is_decoder
    try:
        hybrid = ManticoreForCausalLM.from_components([f"{owner}/bert"])
    except ManticoreError as err:  # the segments may not support it, and then say so
        assert re.search(r"'bert'.*(not supported|cannot be cut)", str(err))
    else:
        assert torch.equal(logits(hybrid), logits(model))
