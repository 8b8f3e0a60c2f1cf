"""What strangers write passes through one function on its way to terminal, Markdown and HTML, and to error messages."""

import io
import json
import logging
import struct
import sys

import pytest
from hub_models import publish, tiny
from manticore_hf.modeling.settings_manticore import printable
from markupsafe import Markup

from manticore_hf import ManticoreError, ManticoreForCausalLM, cli
from manticore_hf.report import charts
from manticore_hf.report.comparison import read_comparison
from manticore_hf.report.details import visible
from manticore_hf.report.facts import gather
from manticore_hf.utils.formatting import (
    code,
    escape,
    fence,
    html_environment,
    is_number,
    markdown_environment,
    printable_output,
    shown,
)

pytestmark = pytest.mark.usefixtures("uncounted")

# Clears the screen, sets the window's title, writes a link, rings, turns the reading order, hides, ends a line
COMMANDS = "a\x1b[2J\x1b]0;owned\x07\x1b]8;;http://x\x1b\\b\x9b31m\u202ec\u2066d\u200be\ufefff\x00\r\x08\u2028g\ud800"


def commands(text):
    return [c for c in text if not c.isprintable() and c not in "\n\t"]


def test_every_way_out_is_printable():
    assert commands(COMMANDS) and printable(COMMANDS).isprintable()
    html = html_environment().from_string("<p title='{{ x }}'>{{ x }}</p>{{ m }}").render(x=COMMANDS, m=Markup("<b>"))
    ways = {
        "Markdown": escape(COMMANDS),
        "fence": fence(f"{COMMANDS}\n{COMMANDS}"),
        "code": code(COMMANDS),
        "template": markdown_environment().from_string("{{ x }}").render(x=COMMANDS),
        "HTML": html,
        "chart": charts.bars([(COMMANDS, 1.0)], label=COMMANDS) if hasattr(charts, "bars") else "",
        "passage": visible(COMMANDS),
        "message": str(ManticoreError(COMMANDS)),
        "terminal": shown(COMMANDS),
    }
    assert {name: commands(text) for name, text in ways.items()} == dict.fromkeys(ways, [])
    assert html.endswith("<b>") and "\\x1b[2J" in ways["HTML"]
    for plain in ("plain", "é ü 猫 🐈", "one\ntwo"):
        assert printable(plain, "\n") == plain and shown(plain) == plain
    assert printable("1\xa0000") == "1 000"


def test_a_command_line_commands_no_terminal(monkeypatch):
    """Neither do the libraries underneath, whose logs hold what they read; progress bars still move."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdout, sys.stderr
    logger, logs = logging.getLogger("transformers.something"), logging.StreamHandler(err)
    logger.addHandler(logs)
    monkeypatch.setattr(logger, "propagate", False)  # pytest's processes cannot hand on what is no Unicode
    sys.stdout, sys.stderr = out, err
    try:
        with printable_output():
            print(COMMANDS)
            print("x" * 30_000)
            print(COMMANDS, file=sys.stderr)
            logger.warning(COMMANDS)
            sys.stderr.write("\r 50%|█████     | 1/2")
            sys.stderr.write("\n\x1b[A")
            assert not sys.stdout.isatty()
        print("as before\x07")
        assert logs.stream is err
    finally:
        sys.stdout, sys.stderr = before
        logger.removeHandler(logs)
    assert out.getvalue().endswith("as before\x07\n") and "... (30000 characters)\n" in out.getvalue()
    assert commands(out.getvalue()) == ["\x07"] and len(out.getvalue()) < 11_000
    assert err.getvalue().endswith("\r 50%|█████     | 1/2\n\x1b[A")
    assert commands(err.getvalue().removesuffix("\r 50%|█████     | 1/2\n\x1b[A")) == []


def test_markdown_formats_nothing():
    """Neither marks, nor entities and formulas, nor addresses that the Hub makes links of by themselves."""
    hostile = "_x_ __y__ a_b &lt; &#60; A&B $$z$$ $5 HTTPS://evil.example http://a www.evil.example mailto:x@y.z"
    marked, addresses = r"\_x\_ \_\_y\_\_ a_b \&lt; \&#60; A&B \$\$z\$\$ $5 ", r"HTTPS\://evil.example http\://a "
    assert escape(hostile) == marked + addresses + r"www\.evil.example mailto\:x@y.z"
    assert escape(escape("_x_")) == r"\_x\_" and escape("12:30 ftp://x") == r"12:30 ftp\://x"


def test_a_terminal_of_fewer_characters_is_no_error():
    raw = io.BytesIO()
    narrow, before = io.TextIOWrapper(raw, "ascii"), sys.stdout
    sys.stdout = narrow
    try:
        with printable_output():
            print("é 猫")
            sys.stdout.flush()
    finally:
        sys.stdout = before
    assert raw.getvalue() == b"\\xe9 \\u732b\n"


def test_numbers_that_are_none():
    for value in (10**400, -(10**400), float("inf"), float("nan"), True, None, "1", [1]):
        assert not is_number(value)
    assert is_number(0) and is_number(-1.5) and is_number(10**200)


@pytest.fixture(scope="module")
def hybrid(hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("strangers")
    for name, family in (("a", "gpt_neox"), ("b", "mamba")):
        publish(hub, f"strangers/{name}", tiny(family), root / "src")
    ManticoreForCausalLM.from_components(["strangers/a", "strangers/b"]).save_pretrained(root / "hybrid")
    return root / "hybrid"


@pytest.fixture
def folder(hybrid, tmp_path):
    (tmp_path / "hybrid").mkdir()
    for file in hybrid.iterdir():
        (tmp_path / "hybrid" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "hybrid"


def edit(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def test_commands_print_what_strangers_wrote_as_text(folder, capsys):
    """In file names, configurations, recipes, stage files, on stdout and stderr, whether it works or fails."""
    (folder / "x\x1b[2Jy.py").write_text("")
    (folder / "x\x1b[2Jy.bin").write_text("")
    edit(folder, id2label={"0": COMMANDS}, note=COMMANDS)
    recipe = folder.parent / "r.yaml"
    recipe.write_text(json.dumps({"name": "n\x1b[2J", "components": ["x/y\x1b[2J"], "data": {"data": "t\x1b[2J"}}))
    odd = folder.parent / "odd.yaml"
    odd.write_text(json.dumps({"components": ["a/b"], "stages": [{"fine\x1b[2J": 1}], "z\x1b]0;x\x07": 1}))
    bad = folder.parent / "bad"
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps({"model_type": "man\x1b[2Jticore", "architectures": ["\x1b[2J"]}))
    for command in (
        ["inspect", folder],
        ["inspect", folder, "--json"],
        ["inspect", bad],
        ["inspect", "no\x1b[2Jwhere"],
        ["report", folder, "--no-measure"],
        ["report", bad],
        ["plan", recipe],
        ["plan", odd],
        ["run", recipe, "--output-dir", folder.parent / "o"],
        ["run", odd, "--output-dir", folder.parent / "o"],
        ["convert", bad, "--output-dir", folder.parent / "o"],
        ["convert", "x\x1b[2Jy.gguf", "--output-dir", folder.parent / "o"],
        ["compare", odd, "--output-dir", folder.parent / "o", "--test", "t"],
        ["evaluate", "--model", bad, "--data", "t"],
        ["push", bad, "you/x\x1b[2J"],
    ):
        cli.main([str(one) for one in command])
        found = capsys.readouterr()
        assert not commands(found.out) and not commands(found.err.replace("\r", "").replace("\x1b[A", "")), command
        assert "Traceback" not in found.err and len(found.out) + len(found.err) < 40_000, command


def header(folder, values, padding=0):
    """Puts another header on the hybrid's own weights."""
    raw = json.dumps(values).encode() + b" " * padding
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 64)


ALPHA = "hybrid_mixer.alpha_logits"
GATE = "hybrid_mixer.token_gate.linear.bias"


def test_impossible_headers_end_in_a_sentence(folder, capsys):
    many = {f"{i}-{'x' * 90}.y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(20_000)}
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for values in (
        {ALPHA: {**good, "shape": [10**400]}, GATE: good},
        {ALPHA: {**good, "data_offsets": [10**400, 10**400 + 8]}, GATE: good},
        {ALPHA: {**good, "data_offsets": [-(10**400), 8 - 10**400]}, GATE: good},
        {ALPHA: {**good, "shape": [-1, -2]}, GATE: good},
        {ALPHA: {**good, "shape": [-2], "data_offsets": [8, 0]}, GATE: good},
        {ALPHA: {**good, "dtype": "F7"}, GATE: good},
        {ALPHA: {**good, "dtype": ["F32"]}, GATE: good},
        {ALPHA: {**good, "shape": "12"}, GATE: good},
        {ALPHA: {**good, "shape": [2.5]}, GATE: good},
        {ALPHA: [], GATE: None},
        {ALPHA: {**good, "data_offsets": [0]}, GATE: good},
        many,
    ):
        header(folder, values)
        assert cli.main(["inspect", str(folder)]) == 0
        found = capsys.readouterr()
        assert len(found.out) < 20_000 and "Traceback" not in found.err
        assert cli.main(["push", str(folder), "you/h", "--dry-run"]) == 2
        assert "not a readable safetensors file" in capsys.readouterr().err
        cli.main(["report", str(folder), "--no-measure"])
        assert "Traceback" not in capsys.readouterr().err


def test_stage_and_evaluation_files_of_any_numbers(folder, capsys):
    big = 10**400
    files = {
        "stage.json": {"stage": "calibrate", "tokens": big, "steps": big, "losses": {"hybrid": big, "a": 1.0}},
        "evaluation.json": [{"losses": {"hybrid": 1.0, "a": -big}, "tokens": big, "data": COMMANDS}],
        "trainer_state.json": {
            "total_flos": big,
            "global_step": big,
            "log_history": [{"loss": big, "step": 1}, {"loss": 1.0, "step": big}, {"train_runtime": big}],
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    facts = gather(folder)
    assert facts.results == [] and facts.stages[0].flops is None and facts.stages[0].series("loss") == {}
    assert cli.main(["report", str(folder), "--no-measure"]) == 0
    row = {"name": "h", "kind": "hybrid", "loss": 1.0}
    for more, message in (
        ({"loss": big}, "no number"),
        ({"kind": "x" * 10**6}, "has kind"),
        ({"name": ["x"]}, "has the name"),
    ):
        values = {"version": 1, "hybrid": "h", "rows": [{**row, **more}]}
        (folder / "comparison.json").write_text(json.dumps(values))
        with pytest.raises(ManticoreError, match=message) as caught:
            read_comparison(folder / "comparison.json")
        assert len(str(caught.value)) < 1000
    (folder / "comparison.json").write_text(json.dumps({"version": 1, "hybrid": "h", "rows": [{**row, "losses": 3}]}))
    assert read_comparison(folder / "comparison.json")["rows"][0]["losses"] == []


def test_a_generation_config_beyond_any_sense_is_refused(folder):
    text = (folder / "generation_config.json").read_text()
    for values, message in (
        ({"num_beams": 10**9}, "num_beams=1000000000 .* at most 1024"),
        ({"num_return_sequences": 10**7}, "num_return_sequences"),
        ({"num_return_sequences": 10**7, "do_sample": True}, "num_return_sequences=10000000 is not a sensible number"),
        ({"max_new_tokens": 10**30}, "max_new_tokens"),
        ({"num_beams": "many"}, "num_beams='many' is not a sensible number"),
        ({"stop_strings": ["x" * 10**6]}, "a text of 1000000 characters"),
    ):
        (folder / "generation_config.json").write_text(json.dumps({**json.loads(text), **values}))
        with pytest.raises(ManticoreError, match=message):
            ManticoreForCausalLM.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({**json.loads(text), "num_beams": 4}))
    assert ManticoreForCausalLM.from_pretrained(folder).generation_config.num_beams == 4
