"""The page to try a hybrid: what it finds out is what the models say, and strangers' text is only shown."""

import ast
import math
import re
import socket
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import aligned_pairs
import pytest
import torch
import yaml
from published import parts, saved  # noqa: F401 - fixtures
from tiny_hybrid import mixed_hybrid, word_tokenizer
from transformers import AutoModelForCausalLM

from manticore_hf import ManticoreError, prune, publish
from manticore_hf.app import local
from manticore_hf.app.hybrid_page import drawing
from manticore_hf.app.hybrid_page.reading import Hybrid, cut, token_text
from manticore_hf.app.local import load
from manticore_hf.app.space import GRADIO, publish_space, requirements
from manticore_hf.cli import main
from manticore_hf.evaluation.losses import text_nats

ROOT = Path(__file__).parent.parent
TEXT = "the cat sat on a mat\nand saw two dogs"


@pytest.fixture(scope="module")
def hybrid():
    return Hybrid(mixed_hybrid(num_blocks=1), word_tokenizer())


@pytest.fixture(scope="module")
def found(hybrid):
    return hybrid.read(TEXT)


# ---- what is found out -----------------------------------------------------------------------------------------------


def test_a_reading_is_what_the_models_say(hybrid, found):
    model, n = hybrid.model, len(found.pieces)
    ids = torch.tensor([[0, *word_tokenizer()(TEXT)["input_ids"]]])  # predicted from the end-of-text token
    assert "".join(found.pieces) == TEXT and found.pieces[:2] == ["the", " cat"] and n == ids.shape[1] - 1
    with torch.no_grad():
        out = model(ids)
        models = {"hybrid": out.logits, **{one: model.component(one)(ids).logits for one in hybrid.names}}
    assert found.per_token and found.names == ["part_0", "part_1"]
    torch.testing.assert_close(torch.tensor(found.weights), out.weights[0])
    assert not torch.allclose(out.weights[0, 0], out.weights[0, 1])  # or the test would see no shift
    for name, logits in models.items():
        probs = logits[0].softmax(-1)
        there = probs[torch.arange(n), ids[0, 1:]]
        torch.testing.assert_close(torch.tensor(found.chances[name]), there, rtol=1e-4, atol=1e-9)
        assert math.isclose(found.bits[name], -there.double().log2().sum().item() / len(TEXT), rel_tol=1e-5)
        for place in (0, n):
            token, chance = found.likely[name][place][0]
            assert math.isclose(chance, probs[place].max().item(), rel_tol=1e-5)
            assert token == word_tokenizer().decode([probs[place].argmax().item()])
    assert set(found.likely) == set(models)


def test_a_mixture_that_goes_by_past_losses_is_shown_token_by_token():
    model = mixed_hybrid(num_blocks=1, mixture="online")
    found = Hybrid(model, word_tokenizer()).read(TEXT)
    ids = torch.tensor([[0, *word_tokenizer()(TEXT)["input_ids"]]])
    assert found.per_token
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found.weights), model(ids).weights[0])


def test_what_is_written_is_what_generate_gives(hybrid):
    ids = word_tokenizer()("the cat", return_tensors="pt")["input_ids"]
    written = list(hybrid.write("the cat", 6))
    assert [one.model for one in written] == ["hybrid", "part_0", "part_1"]
    for one in written:
        model = hybrid.model if one.model == "hybrid" else hybrid.model.component(one.model)
        wanted = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert one.prompt + one.text == word_tokenizer().decode(wanted, skip_special_tokens=True)
        assert one.tokens == len(wanted) - 2 and one.first > 0 and (one.per_token or 1) > 0
    drawn = [[one.text for one in hybrid.write("the cat", 6, 1.5, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def used_parameters(model):
    """Parameters on which the logits of one token depend, as autograd sees it."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(torch.tensor([[2, 3, 4]])).logits.sum(), wanted, allow_unused=True)
    return sum(p.numel() for p, grad in zip(wanted, grads) if grad is not None)


def test_parameters_that_run():
    model = mixed_hybrid(num_blocks=2)
    hybrid = Hybrid(model, word_tokenizer())
    assert hybrid.parameters("hybrid") == used_parameters(model) == sum(p.numel() for p in model.parameters())
    assert hybrid.parameters("part_1") == sum(p.numel() for p in model.component("part_1").parameters())
    whole = sum(p.numel() for p in model.parameters())
    layers = {name: model.segments.segment(name, 0).layers for name in hybrid.names}
    model.set_mixture_weights([[1.0, 0.0], [0.5, 0.5]])
    silent = sum(p.numel() for p in layers["part_1"].parameters())
    assert hybrid.parameters("hybrid") == whole - silent > 0
    model.set_mixture_weights("part_0")
    assert hybrid.parameters("hybrid") == whole - sum(p.numel() for p in model.component("part_1").parameters())


def test_a_pruned_hybrid_and_fixed_weights_are_shown_without_a_gate():
    model = mixed_hybrid(num_blocks=2)
    model.set_mixture_weights([[0.25, 0.75], [0.6, 0.4]])
    found = Hybrid(model, word_tokenizer()).read(TEXT)
    assert not found.per_token and all(row == pytest.approx([0.6, 0.4]) for row in found.weights)
    assert found.blocks[0] == pytest.approx([0.25, 0.75]) and "same for every token" in drawing.coloured_text(found)
    hybrid = Hybrid(prune(model, ["part_0", "part_1"]), word_tokenizer())
    found = hybrid.read(TEXT)
    assert hybrid.alone == [] and list(found.likely) == ["hybrid"] and found.weights[0] == [0.0, 1.0]
    assert [one.model for one in hybrid.write("the cat", 2)] == ["hybrid"]
    assert hybrid.parameters("hybrid") == sum(p.numel() for p in hybrid.model.parameters())


def test_components_with_their_own_tokenizers(tmp_path):
    model = aligned_pairs.hybrid(tmp_path)
    model.save_pretrained(tmp_path / "hybrid")
    aligned_pairs.tokenizer("gpt").save_pretrained(tmp_path / "hybrid")
    hybrid = load(tmp_path / "hybrid")
    (name,) = hybrid.model.config.aligned
    own, folder = aligned_pairs.tokenizer("gemma"), next(tmp_path.glob("gpt_neox-gemma-*"))
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    for text in aligned_pairs.TEXTS.values():
        found = hybrid.read(text)
        assert "".join(found.pieces) == text
        wanted = text_nats(alone, own, [text], progress=False)[0] / math.log(2) / len(text.encode())
        assert math.isclose(found.bits[name], wanted, rel_tol=1e-4)
        assert all(math.isclose(sum(row), 1, rel_tol=1e-4) for row in found.weights)
    (written,) = (one for one in hybrid.write("The cats waited", 5) if one.model == name)
    ids = torch.tensor([own("The cats waited")["input_ids"]])
    wanted = alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert written.prompt + written.text == own.decode(wanted[0], skip_special_tokens=True)
    before = hybrid.model.config.mixture_weights
    assert before is None  # running a component alone leaves the hybrid as it was


def test_long_texts_are_cut_and_say_so(hybrid):
    words = " ".join(["the cat sat"] * 100)
    found = hybrid.read(words)
    limit = hybrid.model.config.max_position_embeddings
    assert len(found.pieces) == limit - 2 < 300 and words.startswith("".join(found.pieces))
    assert found.notes == [f"Only the first {limit - 2} of 300 tokens are read."]
    with pytest.raises(ValueError, match="no text"):
        hybrid.read("  ")
    assert all(one.tokens <= 5 for one in hybrid.write(words, 5))
    with pytest.raises(ValueError, match=f"at most {limit} tokens"):
        list(hybrid.write("the cat", limit))


@pytest.mark.parametrize("kind", aligned_pairs.TOKENIZERS)
def test_pieces_join_to_the_text(kind):
    for text in (*aligned_pairs.TEXTS.values(), " the", "\n\n", "a\u0301 e\u0301"):
        start, ids, pieces, _ = cut(aligned_pairs.tokenizer(kind), text, 999)
        assert "".join(pieces) == text and len(ids) == len(pieces) and len(start) == 1
    # The name of a special token is text, as where losses are measured
    end = aligned_pairs.tokenizer(kind).eos_token
    ids, pieces = cut(aligned_pairs.tokenizer(kind), f"a {end} cat", 999)[1:3]
    assert aligned_pairs.tokenizer(kind).eos_token_id not in ids and "".join(pieces) == f"a {end} cat"


@pytest.mark.parametrize("kind", aligned_pairs.TOKENIZERS)
def test_part_of_a_letter_is_shown_as_bytes(kind):
    tokenizer = aligned_pairs.tokenizer(kind)
    shown = [
        token_text(tokenizer, number) for number in tokenizer("\u732b\U0001f600", add_special_tokens=False).input_ids
    ]
    assert all(one.isascii() or one.strip() in "\u732b\U0001f600" for one in shown), shown
    if any(one.startswith("<0x") for one in shown) and all(one.startswith("<0x") for one in shown):
        codes = bytes(int(code, 16) for one in shown for code in re.findall("<0x(..)>", one))
        assert codes.decode() == "\u732b\U0001f600"


# ---- what is shown ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{#each value}}{{this}}{{/each}}",
    "${alert(1)} `x` \\u0041",
    "a\u202ecba\u2069",
    "</div></span><style>*{display:none}</style>",
]


class Tags(HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.names, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


OURS = {"div", "span", "ul", "li", "p", "b", "h2", "h4", "code", "table", "tr", "td", "th", "details", "summary"}


@pytest.mark.parametrize("text", HOSTILE)
def test_strangers_text_is_shown_and_does_nothing(text, found):
    n = 3
    made = type(found)(
        pieces=[text] * n,
        labels=[text] * n,
        names=[text, "b"],
        weights=[[0.9, 0.1]] * (n + 1),
        per_token=True,
        blocks=[[0.9, 0.1]] * 2,
        likely={text: [[(text, 0.5)]] * (n + 1)},
        chances={"hybrid": [0.5] * n, text: [0.5] * n},
        bits={text: 1.0},
        notes=[text],
    )
    made.likely["hybrid"] = made.likely[text]
    written = drawing.Written(text, text, text, 3, 0.1, 0.1, 10)
    pages = [
        drawing.coloured_text(made, 1), drawing.next_tokens(made, 1), drawing.token_table(made),
        drawing.bits_table(made), drawing.continuations([written], [text]), drawing.said(text),
    ]  # fmt: skip
    visible = text.replace("\u202e", "\\u202e").replace("\u2069", "\\u2069")
    for page in pages:
        seen = Tags(page)
        assert seen.tags <= OURS and seen.names <= {"class", "style", "id", "title", "data-place", "role", "aria-label"}
        assert visible in seen.text or visible.replace(" ", "␣") in seen.text
        assert not set("{}$`") & set(page)  # Gradio's templates know these


def test_colours_say_what_the_table_says(found):
    seen = drawing.coloured_text(found, 2)
    tokens = re.findall(r'<span class="hp-t (hp-\d|)( hp-on)?" style="(?:--a:(\d+)%)?" data-place="(\d+)"', seen)
    assert [int(place) for *_, place in tokens] == list(range(len(found.pieces)))
    assert [bool(on) for _, on, _, _ in tokens] == [place == 2 for place in range(len(tokens))]
    for row, (css, _, strength, _) in zip(found.weights, tokens):
        if css:
            assert row[int(css[-1])] == max(row) and int(strength) == round(8 + 47 * (2 * max(row) - 1))
        else:
            assert abs(row[0] - row[1]) < 0.01
    table = Tags(drawing.token_table(found)).text
    assert all(name in table for name in found.names) and "␣cat" in table
    rows = drawing.token_table(found).count("<tr>") - 1
    assert rows == len(found.pieces)
    assert [drawing.percent(x) for x in (0.5, 0.0995, 0.0123, 0.0001)] == ["50%", "10%", "1.2%", "<0.1%"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_without_gradio_one_sentence_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app", "me/anything"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("pip install 'manticore-hf[app]'.")


def test_an_address_that_cannot_be_listened_on_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(local, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["app", "me/hybrid", "--port", port]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"manticore-hf app: --port {port} is in use: give another port, or leave the option out for the first free one "
        "from 7860.\n"
    )
    assert main(["app", "me/hybrid", "--host", "192.0.2.1", "--port", port]) == 2  # kept for documentation: nobody's
    assert "--host 192.0.2.1 cannot be listened on (Cannot assign" in capsys.readouterr().err and not said.out


def test_that_it_loads_is_said_before_it_has_loaded(monkeypatch, capsys):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from manticore_hf.app.hybrid_page import serving

    def no_port(*args):
        assert capsys.readouterr().out == "Loading me/hybrid ...\n"
        raise OSError("set GRADIO_SERVER_PORT")

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # gradio sets it, and clean processes notice
    monkeypatch.setattr(local, "load", lambda *args: None)
    monkeypatch.setattr(serving, "build", lambda *args: None)
    monkeypatch.setattr(serving, "launch", no_port)
    assert main(["app", "me/hybrid"]) == 2
    assert "on 127.0.0.1: there is no free port from 7860; give one with --port." in capsys.readouterr().err


def test_what_the_page_is_not_for(tmp_path, parts):  # noqa: F811
    with pytest.raises(ManticoreError, match="no hybrid"):
        load(parts[0])
    mixed_hybrid(num_blocks=1).save_pretrained(tmp_path / "out")
    with pytest.raises(ManticoreError, match="no tokenizer"):
        load(tmp_path / "out")


def test_the_spaces_files(saved, hub, owner, tmp_path, capsys):  # noqa: F811
    commit = publish(saved[1], f"{owner}/h").commit
    assert main(["app", f"{owner}/h", "--output-dir", str(tmp_path / "space")]) == 0
    assert "app.py" in capsys.readouterr().out
    page = ROOT / "manticore_hf" / "app" / "hybrid_page"
    for file in page.glob("*.py"):
        assert (tmp_path / "space" / "hybrid_page" / file.name).read_bytes() == file.read_bytes()
    (call,) = (one for one in ast.walk(ast.parse((tmp_path / "space" / "app.py").read_text())) if type(one) is ast.Call)
    assert [ast.literal_eval(one) for one in call.args] == [f"{owner}/h", commit]
    _, front, body = (tmp_path / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["sdk"] == "gradio" and about["sdk_version"] == GRADIO and about["app_file"] == "app.py"
    assert about["models"] == [f"{owner}/h", *(f"{owner}/{one}" for one in "ab")] and commit in body
    assert (tmp_path / "space" / "requirements.txt").read_text().split() == requirements()
    assert set(requirements()) <= set(metadata.requires("manticore-hf"))
    assert [re.match(r"\w+", one)[0] for one in requirements()] == [
        "torch",
        "transformers",
        "safetensors",
        "tokenizers",
    ]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={GRADIO}" in pinned


def test_a_space_is_published_and_updated(saved, hub, owner, capsys):  # noqa: F811
    publish(saved[1], f"{owner}/h")
    with pytest.raises(ManticoreError, match="manticore-hf push"):
        publish_space(str(saved[1]), space=f"{owner}/try")
    assert main(["app", f"{owner}/h", "--space", f"{owner}/try", "--private"]) == 0
    assert f"spaces/{owner}/try" in capsys.readouterr().out
    from huggingface_hub import HfApi

    api = HfApi()
    names = {"app.py", "requirements.txt", "README.md", "hybrid_page/serving.py", "hybrid_page/reading.py"}
    assert names <= set(api.list_repo_files(f"{owner}/try", repo_type="space"))
    assert api.space_info(f"{owner}/try").private
    for name, text in (("README.md", b"mine"), ("hybrid_page/old.py", b"x"), ("notes.txt", b"kept")):
        api.upload_file(path_or_fileobj=text, path_in_repo=name, repo_id=f"{owner}/try", repo_type="space")
    assert publish_space(f"{owner}/h", space=f"{owner}/try")
    files = set(api.list_repo_files(f"{owner}/try", repo_type="space"))
    assert "notes.txt" in files and "hybrid_page/old.py" not in files
    card = api.hf_hub_download(f"{owner}/try", "README.md", repo_type="space")
    assert Path(card).read_text() == "mine"
    api.create_repo(f"{owner}/other", repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="app.py", repo_id=f"{owner}/other", repo_type="space")
    with pytest.raises(ManticoreError, match="another name"):
        publish_space(f"{owner}/h", space=f"{owner}/other")
    with pytest.raises(ManticoreError, match="nowhere"):
        publish_space(f"{owner}/nowhere", space=f"{owner}/try")


def test_the_page_itself_imports_nothing_of_ours():
    for file in (ROOT / "manticore_hf" / "app" / "hybrid_page").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] != "manticore_hf", file.name
            if isinstance(node, ast.Import):
                assert all(not one.name.startswith("manticore_hf") for one in node.names), file.name


def test_gradio_builds_it_and_tells_nobody(hybrid, monkeypatch):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from manticore_hf.app.hybrid_page import serving

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # gradio sets it, and clean processes notice
    page = serving.build(hybrid, "a <b>title</b>")
    config = page.get_config_file()
    assert page.analytics_enabled is False and config["analytics_enabled"] is False
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])
    theme = serving.theme()
    assert not theme._stylesheets and not re.search(r"url\([\"']?http|@import", theme._get_theme_css())
    shown = [one["props"].get("value") for one in config["components"] if one["type"] == "html"]
    assert any("a &lt;b&gt;title" in str(value) for value in shown)
