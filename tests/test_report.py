"""The report as files: the same numbers in both, what strangers wrote in it, no network, killed and gone on."""

import html.parser
import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from tiny_hybrid import mamba, mixed_hybrid, pair, save, write_text

from manticore_hf import ManticoreError, prune
from manticore_hf.report import measure, write_report
from manticore_hf.report import run as run_module
from manticore_hf.training.recipe import load_recipe, run_recipe


@pytest.fixture(scope="module", autouse=True)
def few_repeats():
    """What speed comes out does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_NEW_TOKENS", 2)
        patch.setattr(run_module, "_REPEATS", 1)
        yield


pytestmark = pytest.mark.usefixtures("counted_once")
EVIL = "<script>alert(1)</script> | **x** [y](http://evil.example)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved hybrid with a text of its own; its end-of-text token is a stranger's idea."""
    where = tmp_path_factory.mktemp("saved")
    model = mixed_hybrid(num_blocks=2, mixture="static")
    save(model, where / "hybrid", words=[EVIL.split()[0], *"cat sat on a mat and saw two dogs run".split()])
    words = f"{EVIL.split()[0]} cat sat on a mat and saw two dogs run".split()
    drawn = torch.randint(0, len(words), (400,), generator=torch.Generator().manual_seed(1)).tolist()
    (where / "text.txt").write_text(" ".join(words[i] for i in drawn))
    return where


def comparison(path, **changes):
    """A comparison whose baselines' names are a stranger's, too."""

    def row(name, kind, loss, **more):
        return {
            "name": name,
            "kind": kind,
            "seeds": [0, 1, 2],
            "loss": loss,
            "interval": [loss - 0.01, loss + 0.01],
            "by_kind": {"prose": loss},
            **more,
        }

    more = {"difference": 0.1, "difference_interval": [0.08, 0.12], "p": 0.001, "seeds_won": 3}
    values = {
        "version": 1, "data": EVIL, "test": "test text", "tokens": 60_000, "test_tokens": 30_720, "seeds": [0, 1, 2],
        "hybrid": "hybrid, 2 blocks", "machine": EVIL,
        "rows": [row("hybrid, 2 blocks", "hybrid", 2.4), row(EVIL, "component", 2.5, **more)], **changes,
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return path


class Page(html.parser.HTMLParser):
    """Tags and addresses of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.styles, self.text, self.code = set(), [], [], "", []
        self.last = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for key, value in attributes:
            if key in ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"):
                self.addresses.append(value)
            if key == "style":
                self.styles.append(value)
            assert not key.startswith("on"), f"{tag} runs {key}"

        self.last = tag
        self.code += [""] * (tag == "code")

    def handle_data(self, data):
        self.text += data
        if self.last in ("code", "span") and self.code:
            self.code[-1] += data


@pytest.fixture(scope="module")
def written(folder):
    """The report of the saved hybrid: (verdict, HTML, Markdown)."""
    comparison(folder / "comparison.json")
    verdict, page, markdown = write_report(folder / "hybrid", folder / "text.txt", max_tokens=300, batch_size=2)
    return verdict, page.read_text(), markdown.read_text()


def test_the_page_is_self_contained(written):
    page = Page(written[1])
    assert page.addresses == []
    assert "script" not in page.tags and not page.tags & {"link", "img", "iframe", "object", "embed", "base", "form"}
    for style in (*page.styles, *re.findall(r"(?s)<style>(.*?)</style>", written[1])):
        assert "url(" not in style and "@import" not in style


def test_what_strangers_wrote_is_shown_as_text(written):
    _, page, markdown = written
    assert "<script" not in page and EVIL in Page(page).text
    found = Page(page).text
    assert found.count("<script>alert(1)</script>") > 4, "a component's name, a token in its context, documents"
    for line in markdown.splitlines():
        assert "<script" not in line.replace("\\<script", "") and "[y](" not in line
    assert "| **x**" not in markdown


def test_both_files_say_the_same(written, folder):
    verdict, page, markdown = written
    text = " ".join(Page(page).text.split())
    plain = " ".join(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown).split())
    assert verdict.word == "GO" and f"{verdict.word}. {verdict.headline}." in text
    for sentence in (*verdict.reasons, *verdict.steps):
        assert sentence in text and sentence in plain
    said = text.split("To quote in a meeting ")[1].split(" The rules of the verdict")[0]
    assert said.count(".") > 4 and "Without" in said and page.index("hybrid better, ") < page.index("The rules")
    assert said.split(". ")[0] in plain
    measured = json.loads((folder / "hybrid" / "report.json").read_text())["parts"]
    numbers = [f"{measured['losses']['losses'][name]:.3f}" for name in measured["losses"]["losses"]]
    numbers += [f"{value['loss']:.3f}" for key, value in measured.items() if key.startswith("without/")]
    numbers += [f"{one['loss']:.3f}" for one in measured["mixtures"]]
    numbers += [f"{one['cka']:.3f}" for one in measured["similarity"]]
    numbers += [f"{one['decode']:,.1f}" for one in measured["speed"]["models"].values()]
    assert len(numbers) == 5 + 4 + 1 + 3 + 3
    assert [number for number in numbers if number not in text or number not in plain] == []
    for baseline in measured["losses"]["where"].values():
        assert f"{abs(baseline['gain']):.3f} nats per token" in text
        assert f"{abs(baseline['gain']):.3f} nats per token" in plain


def test_a_killed_report_goes_on_and_another_hybrid_starts_again(folder, tmp_path, monkeypatch):
    calls, measured = [], measure.hybrid_loss

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*args, **kwargs)

    monkeypatch.setattr(measure, "hybrid_loss", counted)
    options = {"data": folder / "text.txt", "output": tmp_path, "max_tokens": 200, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        write_report(folder / "hybrid", **options)
    assert not (tmp_path / "report.html").exists()
    write_report(folder / "hybrid", **options)
    assert len(calls) == 3 + 3, "four removals and one mixture; two were kept"
    first = (tmp_path / "report.html").read_text()
    monkeypatch.setattr(run_module.ManticoreForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    write_report(folder / "hybrid", **options)
    assert len(calls) == 6 and (tmp_path / "report.html").read_text() == first
    with pytest.raises(pytest.fail.Exception, match="loaded"):  # of other text nothing is known
        write_report(folder / "hybrid", **{**options, "block_size": 24})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_nothing_is_measured_and_what_was_measured_stays(folder, written, tmp_path):
    hybrid = tmp_path / "hybrid"
    shutil.copytree(folder / "hybrid", hybrid)  # with the times of its files
    write_report(hybrid, comparison=folder, measured=False)
    for name, before in zip(("report.html", "report.md"), written[1:]):
        assert (hybrid / name).read_text() == before
    assert written[2].count(" times), ") == written[2].count(" times),") > 0  # a list in Markdown keeps its spaces
    kept, values = hybrid / "report.json", json.loads((hybrid / "report.json").read_text())
    shorter = {key: value for key, value in values["parts"].items() if key not in ("mixtures", "similarity", "speed")}
    kept.write_text(json.dumps({**values, "parts": shorter}))  # as one that was killed leaves it
    assert "speed was not measured" in write_report(hybrid, comparison=folder, measured=False)[1].read_text()
    kept.write_text(json.dumps({**values, "parts": {**shorter, "losses": {"losses": []}}}))
    with pytest.raises(ManticoreError, match="report.json' cannot be shown: remove it"):
        write_report(hybrid, comparison=folder, measured=False)
    kept.write_text(json.dumps(values))
    (hybrid / "model.safetensors").touch()  # other weights, for all that is known
    text = Page(write_report(hybrid, measured=False)[1].read_text()).text
    assert "report.json is not used: the hybrid's files were changed" in text and "Not measured" in text


def test_without_a_comparison_nothing_is_decided(folder, tmp_path):
    shutil.copytree(folder / "hybrid", tmp_path / "hybrid", ignore=shutil.ignore_patterns("report.*"))
    verdict, page, _ = write_report(tmp_path / "hybrid", comparison=None, output=tmp_path / "out", measured=False)
    assert verdict.word == "TRY" and not verdict.decided
    text = Page(page.read_text()).text
    assert "a single run cannot support a decision" in text
    # No recipe made it, so the commands begin with one that is there
    commands = [shlex.split(command) for command in Page(page.read_text()).code if command.startswith(("cp", "man"))]
    assert [one[:2] for one in commands[1:]] == [["manticore-hf", "run"], ["manticore-hf", "compare"]]
    copied = load_recipe(commands[0][2])
    assert commands[0][1] == "-i"  # asks before it replaces a recipe of that name
    assert commands[0][3] == commands[1][2] == commands[2][2] and [stage for stage, _ in copied.stages]
    # Nothing says where the components are, nor which text will not be trained on
    assert re.search(r"\(DIRECTORY_OF_\w+ and DIRECTORY_OF_\w+\)", text) and "marked small:" in text
    assert commands[2][3:5] == ["--test", "HELD_OUT.txt"]
    assert "Not measured" in text and "no baseline" in text
    verdict, *_ = write_report(tmp_path / "hybrid", output=tmp_path, measured=False, components=["one", "org/two"])
    assert "enter the components (one and org/two)" in verdict.steps[0]


def tables(markdown):
    """Each table of a Markdown text: [cells of each of its lines]."""
    out = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            out[-1].append(re.split(r"(?<!\\)\|", line.strip())[1:-1])
        elif out[-1]:
            out.append([])
    return [table for table in out if table]


def test_an_online_mixture_is_not_drawn_as_one_row_nor_compared_with_itself(folder, tmp_path):
    model = mixed_hybrid(num_blocks=1, mixture="online")
    torch.nn.init.zeros_(model.hybrid_mixer.alpha_logits)
    save(model, tmp_path / "hybrid", words="cat sat on a mat and saw two dogs run".split())
    (tmp_path / "hybrid" / "stage.json").write_text(json.dumps({"stage": "compose"}))  # as `compose` leaves it
    verdict, page, markdown = write_report(tmp_path / "hybrid", folder / "text.txt", max_tokens=200, batch_size=2)
    found, plain = " ".join(Page(page.read_text()).text.split()), markdown.read_text()
    names = model.config.component_names
    begun = ", ".join(f"{name} 0.500" for name in names)
    said = f"weights follow the components’ losses on the text so far. A text begins with {begun}."
    assert said in found
    assert "Against ensemble" in found and "Against online mixture" not in found
    assert "hybrid (this hybrid)" in plain and "| online mixture |" not in plain
    assert "The hybrid is the online mixture of its components, which is therefore no baseline." in found
    assert f"nats per token; {names[0]}" in plain
    # Nothing was trained: seeds say nothing, and no weights are worth anything by training
    assert "seed" not in found.split("The rules of the verdict")[0] and "Nothing of this hybrid was trained" in found
    assert "untrained mixture weights" not in found and "with fixed weights: the change shows" in found
    assert "needs every component's prediction at every token, because its weights follow" in found
    assert f"weight: {names[0]}" in found and "gate: " not in found
    # 200 tokens in rows of 512 were one row: they are cut so that there is an interval
    kept = json.loads((tmp_path / "hybrid" / "report.json").read_text())
    rows = kept["parts"]["losses"]["rows"]
    assert rows < 8 and kept["about"]["chosen"] and kept["about"]["block_size"] == 32  # too little for that, too
    assert f"takes at least 8 rows of text ({rows} here)" in verdict.reasons[0] or "too few" in verdict.reasons[0]
    assert verdict.steps[0] == "Measure on more of the text: " + shlex.join(
        ["manticore-hf", "report", str(tmp_path / "hybrid"), "--data", str(folder / "text.txt")]
    )


def test_the_first_card_says_what_it_leaves_out(folder, written, tmp_path):
    assert "more are in the table of all models" not in written[1]
    hybrid = shutil.copytree(folder / "hybrid", tmp_path / "hybrid", ignore=shutil.ignore_patterns("report.*"))
    losses = {"hybrid": 2.0, **{f"baseline {i}": 2.1 + i for i in range(9)}}
    (hybrid / "evaluation.json").write_text(json.dumps({"data": "text", "losses": losses}))
    _, page, _ = write_report(hybrid, measured=False)
    text = Page(page.read_text()).text
    assert "The best 7 and the hybrid; 2 more are in the table of all models below." in text
    assert "baseline 8" in text.split("All models of this run")[1]


def test_rows_are_made_short_enough_for_an_interval(folder, tmp_path, capsys):
    hybrid = shutil.copytree(folder / "hybrid", tmp_path / "hybrid", ignore=shutil.ignore_patterns("report.*"))
    options = {"max_tokens": 300, "output": tmp_path, "batch_size": 2}
    _, page, _ = write_report(hybrid, folder / "text.txt", **options)
    kept = json.loads((tmp_path / "report.json").read_text())
    losses = kept["parts"]["losses"]
    assert losses["rows"] >= 8 and None not in losses["differences"]["ensemble"]
    assert (
        f"in {losses['rows']} rows of at most 32 tokens: an interval takes at least 8 rows"
        in Page(page.read_text()).text
    )
    assert "confidence interval" not in capsys.readouterr().err
    # As the user wants it; the last words, too short for a row, are measured as well
    write_report(hybrid, folder / "text.txt", output=tmp_path, batch_size=2, block_size=60)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["parts"]["losses"]["rows"] < 8 and not kept["about"]["chosen"]
    said = "rows of text cannot give a confidence interval (at least 8 can), and without one no claim is made. "
    assert kept["parts"]["losses"]["bytes"] == (folder / "text.txt").stat().st_size
    assert said + "Use more text." in capsys.readouterr().err


def test_equal_static_weights_have_no_ablation(folder, tmp_path):
    model = mixed_hybrid(num_blocks=1, mixture="static")
    torch.nn.init.zeros_(model.hybrid_mixer.alpha_logits)
    save(model, tmp_path / "hybrid", words="cat sat on a mat and saw two dogs run".split())
    _, page, _ = write_report(tmp_path / "hybrid", folder / "text.txt", max_tokens=100, batch_size=2)
    assert "Ablations of the mixture" not in page.read_text()


def test_kinds_of_text_and_several_texts_are_told_apart(folder, written, tmp_path):
    """In one run, where the records say what they are, and where losses on several texts are known."""
    hybrid = shutil.copytree(folder / "hybrid", tmp_path / "hybrid", ignore=shutil.ignore_patterns("report.*"))
    words = (folder / "text.txt").read_text().split()
    half = {"verse": words[:200], "<b>list</b>": words[200:]}
    records = [{"kind": kind, "text": " ".join(part)} for kind, part in half.items()]
    both, one = tmp_path / "both.jsonl", tmp_path / "one.jsonl"
    both.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, page, markdown = write_report(hybrid, both, max_tokens=1000, block_size=16, batch_size=2)
    by_kind = json.loads((hybrid / "report.json").read_text())["parts"]["losses"]["by_kind"]
    assert set(by_kind) == set(half)
    text = Page(page.read_text()).text
    for kind, bits in by_kind.items():  # the split is what each kind of text gives by itself, cut in the same places
        assert f"on {kind} the hybrid has {bits['hybrid']:.4f}" in text
        assert all(f"{value:.4f}" in text and f"{value:.4f}" in markdown.read_text() for value in bits.values())
        one.write_text(json.dumps({"text": " ".join(half[kind])}) + "\n")
        write_report(hybrid, one, output=tmp_path / "alone", max_tokens=1000, block_size=16, batch_size=2)
        alone = json.loads((tmp_path / "alone" / "report.json").read_text())["parts"]["losses"]
        assert "by_kind" not in alone
        assert bits["hybrid"] == pytest.approx(alone["bits_per_byte"]["hybrid"], rel=0.02)
    results = [
        {
            "data": name,
            "losses": {"hybrid": 2.0, "ensemble": 2.0 + more},
            "tokens": 9000,
            "bytes": 36_000,
            "bits_per_byte": {"hybrid": 0.72, "ensemble": 0.72 + more},
        }
        for name, more in (("some prose", 0.125), ("some code", -0.0625))
    ]
    (hybrid / "evaluation.json").write_text(json.dumps(results))
    (hybrid / "report.json").unlink()  # of the text that was named
    _, page, markdown = write_report(hybrid, measured=False)
    for shown in (Page(page.read_text()).text, markdown.read_text().replace("\\", "")):
        assert "on some prose the hybrid has 0.7200, the best baseline (ensemble) 0.8450" in shown
        assert "on some code the hybrid has 0.7200, the best baseline (ensemble) 0.6575" in shown
    for text in (written[2], markdown.read_text()):
        for table in tables(text):
            assert len(table) > 1 and {len(line) for line in table} == {len(table[0])}, table[:3]
            assert re.fullmatch("[-:|]+", "|".join(table[1]))


def test_pruned_and_three_components(tmp_path):
    model = mixed_hybrid(num_blocks=2, mixture="static", parts=[*pair(), mamba()])
    save(prune(model, "alpha"), tmp_path / "hard")
    save(model, tmp_path / "soft")
    write_text(tmp_path / "text.txt", 200)
    options = {"max_tokens": 64, "block_size": 32}
    for name, count in (("hard", 0), ("soft", 3)):
        written = write_report(tmp_path / name, tmp_path / "text.txt", **options)
        parts = json.loads((tmp_path / name / "report.json").read_text())["parts"]
        assert len(parts["similarity"]) == 3 * count and len(parts["losses"]["losses"]) == (6 if count else 1)
        assert ("pruned to one component per block" in Page(written[1].read_text()).text) == (count == 0)
        # A hybrid's number is never there without its baselines'
        own = f"{parts['losses']['losses']['hybrid']:.3f}"
        assert [own in text.read_text() for text in written[1:]] == [bool(count)] * 2
        assert all((one["loss"] is None) == (count == 0) for key, one in parts.items() if key.startswith("without/"))


def test_text_is_needed_and_asked_for(folder, tmp_path):
    with pytest.raises(ManticoreError, match="--data FILE"):
        write_report(folder / "hybrid", output=tmp_path)
    with pytest.raises(ManticoreError, match="nowhere.txt"):
        write_report(folder / "hybrid", "nowhere.txt", output=tmp_path)
    with pytest.raises(ManticoreError, match="no hybrid"):
        write_report(tmp_path)
    with pytest.raises(ManticoreError, match="no comparison.json"):
        write_report(folder / "hybrid", folder / "text.txt", comparison=tmp_path)
    assert not list(tmp_path.glob("report*"))


def test_a_run_is_reported_as_a_whole(tmp_path, capsys):
    """Stages, curves, costs and the validation text of `manticore-hf run`, without any option."""
    for name, model in zip(("first", "second"), pair()):
        save(model, tmp_path / name)
    write_text(tmp_path / "text.txt", 900)
    trained = {
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
    }
    recipe = {
        "components": [str(tmp_path / "first"), str(tmp_path / "second")],
        "hybrid": {"num_blocks": 2, "mixture": "static", "projector_init": "default", "dtype": "float32"},
        "data": {"data": str(tmp_path / "text.txt"), "block_size": 32, "validation_fraction": 0.2},
        "stages": [{"search": {**trained, "alpha_learning_rate": 0.1}}, {"finetune": trained}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = run_recipe(tmp_path / "recipe.yaml", tmp_path / "run")
    write_report(tmp_path / "run", max_tokens=32, batch_size=2)
    assert "Note: 1 row of text cannot" in (said := capsys.readouterr().err) and "Give a larger --max-tokens." in said
    verdict, page, markdown = write_report(tmp_path / "run", batch_size=2)  # --block-size is no remedy: the recipe's is
    assert "Note: 6 rows of text cannot" in (said := capsys.readouterr().err) and "longer text with --data" in said
    verdict, page, markdown = write_report(tmp_path / "run", max_tokens=64, batch_size=2)
    assert page == tmp_path / "run" / "report.html" and verdict.word == "TRY"
    text, plain = Page(page.read_text()).text, markdown.read_text()
    for state in ("1-search", "2-finetune"):
        log = json.loads((tmp_path / "run" / state / "trainer_state.json").read_text())["log_history"]
        values = [row["eval_loss"] for row in log if "eval_loss" in row]
        assert f"| {state} | hybrid, held out | {values[0]:.3f} | {values[-1]:.3f} | 2 | 4 |" in plain
        assert f"{values[-1]:.3f}" in text
    assert "2 stages" in text and "1-search, block 1" in text and "2-finetune, block 1" not in text
    # The recipe beside it says where the original components are: what was measured for the report has them
    found = json.loads((tmp_path / "run" / "report.json").read_text())["parts"]["losses"]
    names = ["ensemble", "online mixture", *results[-1][1]["components"]]
    names += [f"original {name}" for name in results[-1][1]["components"]]
    bits, losses = found["bits_per_byte"], found["losses"]
    assert sorted(bits) == sorted([*names, "hybrid"])
    for name in names:
        assert f"| {name} | {bits[name]:.4f} | {losses[name]:.3f} |" in plain and f"{bits[name]:.4f}" in text
    assert f"({min(names, key=bits.get)})" in verdict.reasons[0] and "bytes of text are too few" in verdict.reasons[0]
    for text, named in (("text.txt", "HELD_OUT.txt"), ("other.txt", str(tmp_path / "other.txt"))):  # `compare` refuses
        verdict, *_ = write_report(tmp_path / "run", data=tmp_path / text, measured=False, output=tmp_path / "again")
        assert f" --test {named} " in verdict.steps[-1]
    alone = write_report(tmp_path / "run" / "1-search", output=tmp_path / "alone", measured=False)[2].read_text()
    assert "run/1-search" in alone and "2-finetune" not in alone
