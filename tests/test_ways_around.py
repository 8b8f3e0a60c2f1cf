"""Ways around the checks of paths, links and tokens, which a sceptic and an hour of fuzzing found."""

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import zipfile

import pytest
from aligned_pairs import hybrid
from cases import case
from fuzzing import guarded
from manticore_hf.modeling.aligned_mapping import ByteTokenizer
from manticore_hf.modeling.aligned_tokenizers import tokenizer_of
from tiny_hybrid import pair, save, word_tokenizer, write_text
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from two_tokenizers import first

from manticore_hf import ComponentSpec, ManticoreConfig, ManticoreError, ManticoreForCausalLM
from manticore_hf.app.local import load
from manticore_hf.cli import main
from manticore_hf.compose.component_tokenizers import find_tokenizer
from manticore_hf.compose.components import resolve
from manticore_hf.compose.transplant.surface import Surfaces
from manticore_hf.hub.upload import check_no_tokens, collect, source_card
from manticore_hf.training.recipe import find_beside, load_kept_recipe, load_recipe, stage_data
from manticore_hf.training.search import alpha_history
from manticore_hf.utils.files import replace_text
from manticore_hf.utils.task_types import CAUSAL, task_type_of
from manticore_hf.utils.tokenizers import read_tokenizer

IDLE = "./" * 2100  # with it a path is too long for the system, until somebody leaves it out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "hybrid"
    model = ManticoreForCausalLM.from_components(list(pair()), num_blocks=1)
    save(model, folder)
    return folder


def recipe(folder, source):
    folder.mkdir(exist_ok=True)
    values = {
        "components": ["a", "b"], "hybrid": {"num_blocks": 1}, "data": {"data": source, "block_size": 16},
        "stages": [{"finetune": {"max_steps": 1}}],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return folder / "recipe.yaml"


def zipped(data):
    with zipfile.ZipFile(held := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", data)
    return held.getvalue()


def test_a_path_that_is_too_long_is_no_way_out(tmp_path):
    write_text(tmp_path / "private.txt", 5)
    for source in (f"/{IDLE}{str(tmp_path)[1:]}/private.txt", f"{IDLE}../private.txt"):
        file = recipe(tmp_path / "theirs", source)
        with pytest.raises(ManticoreError, match="a name of .* characters cannot be a file"):
            stage_data(load_kept_recipe(file), {})
        with pytest.raises(ManticoreError, match="a name of .* characters cannot be a file"):
            find_beside(source, load_recipe(file))


def test_links_are_not_laundered_by_saving(saved, tmp_path):
    """Neither a card nor a tokenizer's file that is a link out of a directory is read, and so saved as one's own."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in saved.iterdir():
        os.link(file, theirs / file.name)
    (tmp_path / "secret").write_text("a private key")
    (theirs / "README.md").symlink_to(tmp_path / "secret")
    model = AutoModelForCausalLM.from_pretrained(theirs)
    assert source_card(model) is None
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()
    with pytest.raises(ManticoreError, match="README.md in .* is a link to .*secret"):
        read_tokenizer(theirs)
    (theirs / "README.md").unlink()
    assert read_tokenizer(theirs).get_vocab() == word_tokenizer().get_vocab()
    (theirs / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ManticoreError, match="chat_template.jinja in .* is a link to .*secret"):
        read_tokenizer(theirs)


def test_tokenizers_of_components_that_are_links(tmp_path):
    """A link to any text is a vocabulary, which would be saved as one's own: composing, and of an aligned hybrid."""
    (tmp_path / "secret").write_text("a private key\n" * 3)
    (tmp_path / "parts").mkdir()
    made = hybrid(tmp_path / "parts", tokenizers="aligned")
    (name,) = made.config.aligned
    made.save_pretrained(tmp_path / "theirs")
    kept = tmp_path / "theirs" / f"tokenizer_{name}" / "tokenizer.json"
    assert tokenizer_of(ManticoreForCausalLM.from_pretrained(tmp_path / "theirs"), name).get_vocab()
    part = next((tmp_path / "parts").glob("llama*"))
    found = resolve(ComponentSpec(part), {}, weights=False)
    assert find_tokenizer(found, {}) is not None
    for file in (kept, part / "vocab.txt"):
        file.unlink(missing_ok=True)
        file.symlink_to(tmp_path / "secret")
    with pytest.raises(ManticoreError, match=f"tokenizer_{name}/tokenizer.json in .* is a link to .*secret"):
        tokenizer_of(ManticoreForCausalLM.from_pretrained(tmp_path / "theirs"), name)
    assert find_tokenizer(found, {}) is None
    with pytest.raises(ManticoreError, match="comes without a tokenizer that can be read"):
        hybrid(tmp_path / "parts", tokenizers="aligned")


def test_hard_links_are_said(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "theirs")
    (tmp_path / "secret").write_text("a private key")
    config = ManticoreConfig.from_pretrained(saved)
    for linked in (False, True):
        if linked:
            os.link(tmp_path / "secret", tmp_path / "theirs" / "NOTICE")
        _, notices = collect(tmp_path / "theirs", tmp_path / "made", config)
        assert [one for one in notices if "Hard links: NOTICE have other names" in one] == notices
        assert bool(notices) == linked


def test_no_name_for_a_scratch_file_can_be_known(tmp_path):
    (tmp_path / "precious").write_text("precious")
    for number in (*range(50), os.getpid()):
        (tmp_path / f".report.html.{number}").symlink_to(tmp_path / "precious")
    replace_text(tmp_path / "report.html", "text")
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "report.html").read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 2 + 51  # and nothing is left


def test_tokens_in_other_codes_and_in_names(tmp_path):
    token = "hf_" + "aB3" * 12
    for text in (token.encode("utf-16-le"), token.encode("utf-16-be"), b"hf_oauth_" + b"eyJhbGciOi." * 4):
        (tmp_path / "NOTICE").write_bytes(b"x " + text)
        with pytest.raises(ManticoreError, match="NOTICE holds an access token"):
            check_no_tokens({"NOTICE": tmp_path / "NOTICE"})
    for begin in range(3):  # base64 takes three bytes at a time, and may be folded
        for fold in (base64.b64encode, base64.encodebytes, base64.urlsafe_b64encode):
            (tmp_path / "NOTICE").write_bytes(b'"auth": "' + fold(b"u:p"[:begin] + token.encode() + b" " * 60) + b'"')
            with pytest.raises(ManticoreError, match="NOTICE holds an access token"):
                check_no_tokens({"NOTICE": tmp_path / "NOTICE"})
    for kind, pack in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress), ("zip", zipped)):
        (tmp_path / "LICENSE.txt").write_bytes(pack(token.encode()))
        with pytest.raises(ManticoreError, match=rf"LICENSE.txt is a {kind} archive.*unpack it"):
            check_no_tokens({"LICENSE.txt": tmp_path / "LICENSE.txt"})
    (tmp_path / "NOTICE").write_text("hf_hub_download_of_a_file_with_a_long_name")
    check_no_tokens({"NOTICE": tmp_path / "NOTICE"})
    with pytest.raises(ManticoreError, match="The name of a file is an access token"):
        check_no_tokens({f"plots/{token}.png": tmp_path / "NOTICE"})


def test_strange_values_of_a_configuration_are_a_sentence(saved, tmp_path, capsys):
    values = json.loads((saved / "config.json").read_text())
    for key, value, said in (
        ("output_hidden_states", ["a"], "output_hidden_states"),
        ("architectures", [["a"]], "architectures"),
        ("architectures", [3], "architectures"),
        ("model_type", ["manticore"], "model_type|not a JSON object of settings"),
    ):
        with pytest.raises(ManticoreError, match=said):
            ManticoreConfig.from_dict({**values, key: value})
    entry = next(one for one in values["components"] if one["config"]["model_type"] == "mamba")
    entry["config"]["time_step_max"] = 0.0
    with pytest.raises(ManticoreError, match="time_step_max=0.0 must be a number above 0"):
        ManticoreConfig.from_dict(values)
    for text in ("[]", '{"vocab_size": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text)
        assert main(["push", str(tmp_path), "me/h", "--dry-run"]) == 2
        assert main(["inspect", str(tmp_path)]) == 2
        assert "Traceback" not in capsys.readouterr().err
    config = ManticoreConfig.from_pretrained(saved)
    config.architectures = [["a"], 3]
    assert task_type_of(config) is CAUSAL


def test_a_log_without_steps_draws_nothing():
    assert alpha_history([{"alpha/0/a": 0.5}]) == ([], {})
    assert alpha_history([{"alpha/0/a": 0.5}, {"alpha/0/a": 0.5, "step": 1}]) == ([1], {"alpha/0/a": [0.5]})


def test_pipes_are_not_waited_for(saved, tmp_path, capsys):
    """An archive may hold named pipes: whoever opens one waits for ever."""
    for name in ("evaluation.json", "config.json", "NOTICE", "tokenizer.json", "model.safetensors", "stage.json"):
        theirs = tmp_path / name.replace(".", "_")
        shutil.copytree(saved, theirs)
        (theirs / name).unlink(missing_ok=True)
        os.mkfifo(theirs / name)
        for words in (["inspect", theirs], ["push", theirs, "me/h", "--dry-run"], ["report", theirs, "--no-measure"]):
            if name == "config.json" and words[0] == "report":
                continue  # then it is no hybrid
            with case(name, words[0]), guarded(60):
                assert main([str(one) for one in words]) == 2
                said, none = capsys.readouterr().err, name == "config.json" and words[0] != "inspect"
                assert ("no config.json" if none else f"{name} in '{theirs}' is a pipe or a device") in said
        with case(name), guarded(60), pytest.raises(ManticoreError, match="is a pipe or a device"):
            resolve(ComponentSpec(theirs), {})
    run = tmp_path / "run"
    shutil.copytree(saved, run / "0-compose")
    (run / "1-finetune").mkdir()
    os.mkfifo(run / "1-finetune" / "stage.json")
    with guarded(60):
        assert main(["report", str(run), "--no-measure"]) == 2  # no stage of a run has ended


def test_an_index_of_weight_files_is_one(saved, tmp_path):
    """Transformers joins what it names to the directory, and takes for granted what else it says."""
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    for values, said in (
        ({**index, "weight_map": {"a": "../private/model.safetensors"}}, "is not an index of safetensors files"),
        ({**index, "weight_map": {"a": "model.bin"}}, "is not an index of safetensors files beside it"),
        ([], "is not an index of safetensors files beside it"),
        ({"weight_map": index["weight_map"]}, r"its index of weight files is damaged \(KeyError: 'metadata'"),
        ({**index, "metadata": 3}, r"its index of weight files is damaged \(TypeError"),
    ):
        theirs = tmp_path / "theirs"
        shutil.rmtree(theirs, ignore_errors=True)
        shutil.copytree(saved, theirs)
        (theirs / "model.safetensors").unlink()
        (theirs / "model.safetensors.index.json").write_text(json.dumps(values))
        for cls in (ManticoreForCausalLM, AutoModelForCausalLM):
            with case(values, cls), pytest.raises(ManticoreError, match=said):
                cls.from_pretrained(theirs)


def test_a_tokenizer_that_cuts_no_text(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "theirs")
    values = json.loads((saved / "tokenizer.json").read_text())
    values["model"] = {"type": "WordLevel", "vocab": {}, "unk_token": "x"}
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(values))
    write_text(tmp_path / "text.txt", 100)
    words = ["evaluate", "--model", str(tmp_path / "theirs"), "--data", str(tmp_path / "text.txt")]
    assert main(words) == 2
    assert "cannot encode a text: Exception: WordLevel error" in capsys.readouterr().err
    with pytest.raises(ManticoreError, match="cannot encode a text"):
        load(tmp_path / "theirs")


def test_strange_tokenizers_of_aligned_components():
    """Bytes that are no text, ids that the model has no rows for or nobody has memory for, texts that it cannot cut."""

    def edited(change):
        parts = json.loads(first().backend_tokenizer.to_str())
        change(parts)
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<|end|>")

    whole, text = ByteTokenizer(first()), b"The cat sat on the mat"
    for broken in (b"\xff" * 3000, b"\xffa\xc3" * 2000, b"a\xe2\x96", b"\xe2\x96\x81\xff"):
        assert whole.bytes_of(whole.cut(broken)) == broken
    assert max(whole.cut(text)) >= 280
    for rows in (280, 260):
        some = ByteTokenizer(first(), rows)
        assert max(some.cut(text)) < rows and some.bytes_of(some.cut(text)) == text
    with pytest.raises(ManticoreError, match="a token with the id 200000000, beyond the rows of any model"):
        Surfaces(edited(lambda parts: parts["model"]["vocab"].update(zz=200_000_000)))
    known = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "y"}
    with pytest.raises(ManticoreError, match="tokenizer cannot encode 'The cat.*WordLevel error"):
        ByteTokenizer(edited(lambda parts: parts.update(model=known, added_tokens=[]))).cut(text)
