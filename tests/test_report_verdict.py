"""The rules of the verdict, each by a comparison made for it; reading a comparison; the charts' arithmetic."""

import contextlib
import io
import json
import re
import types
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from manticore_hf import ManticoreError
from manticore_hf.compare.evaluate import print_result
from manticore_hf.hub.card import Result
from manticore_hf.report import charts
from manticore_hf.report.comparison import find_comparison, read_comparison
from manticore_hf.report.details import _apart, _trajectory, no_curves, visible, where
from manticore_hf.report.facts import FinishedStage
from manticore_hf.report.gains import gains, phrases
from manticore_hf.report.one_run import OneRun, one_run
from manticore_hf.report.passages import token_text
from manticore_hf.report.verdict import RULES, WORTH, decide, gain_needed, perplexity, say, say_difference
from manticore_hf.report.view import _running
from manticore_hf.report.write import _here
from manticore_hf.utils.claims import claim, itself, more_rows
from manticore_hf.utils.formatting import signed

LOSS = 2.0  # the hybrid's; baselines are said by how much worse they are


def row(name, kind, gain, half=0.005, **more):
    """A row whose loss is the hybrid's plus `gain`, with an interval of `half` around it."""
    return {
        "name": name,
        "kind": kind,
        "seeds": [0, 1, 2],
        "loss": LOSS + gain,
        "interval": [LOSS + gain - 0.01, LOSS + gain + 0.01],
        "by_kind": {},
        "needs": "",
        "difference": gain,
        "difference_interval": [gain - half, gain + half],
        "p": 0.01,
        "seeds_won": 3 if gain > 0 else 0,
        **more,
    }


def verdict(*baselines, settings=None, **more):
    """The verdict on a comparison of these baselines."""
    hybrid = row("ours", "hybrid", 0.0) | {"difference": None, "difference_interval": None, "seeds_won": None}
    comparison = {"hybrid": "ours", "rows": [hybrid, *baselines], "tokens": 60_000, **more}
    return decide(comparison, settings, "compare this")


PARTS = (row("a", "component", 0.3), row("b", "component", 0.4), row("ensemble", "ensemble", 0.1))
ALL_TEXT = {"needs": "the components' training text"}


def test_go_needs_all_baselines_beaten_surely_and_by_enough():
    found = verdict(*PARTS, row("gate", "gate", 0.03))
    assert found.word == "GO" and found.decided and found.baseline["name"] == "gate"
    assert "0.030 nats per token better than gate" in found.reasons[0]
    assert "between 0.025 and 0.035" in found.reasons[0] and "3 of 3 seeds" in found.reasons[0]
    assert "perplexity 7.39 instead of 7.61" in found.reasons[0]
    assert any("prune" in step for step in found.steps)
    # Pruned, a hybrid of components with tokenizers of their own would be one of them
    found = verdict(*PARTS, row("gate", "gate", 0.03), settings={"aligned": ["b"]})
    assert found.word == "GO" and not any("prune" in step for step in found.steps)


def test_one_seed_carries_no_decision():
    """Not even where the intervals over documents say that it is worse, or better."""
    for gain in (-0.3, 0.3):
        rows = [{**row(name, "ensemble", gain), "seeds": [0]} for name in ("ours", "it")]
        rows[0] |= {"kind": "hybrid", "loss": LOSS, "difference": None, "difference_interval": None}
        found = decide({"hybrid": "ours", "rows": rows, "tokens": 60_000}, {}, "compare this")
        assert (found.word, found.decided) == ("TRY", False) and "One seed" in found.reasons[1]
        assert "at least 3 seeds (1 seed now)" in found.steps[0]


@pytest.mark.parametrize("kind", ["component", "ensemble", "gate", "untuned", "designed"])
def test_no_go_where_a_baseline_ties_or_wins(kind):
    for gain in (-0.03, 0.0, 0.01):  # even the upper end is below 1 % of 2.03
        found = verdict(*PARTS, row("it", kind, gain))
        assert found.word == "NO GO" and found.baseline["name"] == "it" and "Use it" in found.steps[0]
    assert verdict(*PARTS, row("it", kind, 0.03)).word == "GO"


def test_an_untrained_mixture_is_made_by_a_command_and_is_no_component():
    online = row("online mixture, untuned", "untuned", 0.0, options={"online_eta": 0.2, "online_decay": 0.95})
    hybrid = row("ours", "hybrid", 0.0) | {"difference": None, "difference_interval": None, "seeds_won": None}
    comparison = {"hybrid": "ours", "rows": [hybrid, *PARTS, online], "tokens": 60_000}
    found = decide(comparison, {}, components=["a dir", "org/b"])
    assert found.word == "NO GO" and found.steps[0].startswith("Use the online mixture, untuned: the hybrid adds")
    assert found.steps[1].endswith(
        ": manticore-hf compose 'a dir' org/b --mixture online --online-eta=0.2 --online-decay=0.95 --output-dir online"
    )
    # The best on every kind of text, but no component that another one could complement
    kinds = [row(name, "untuned", gain, by_kind={"code": gain, "prose": gain}) for name, gain in (("a", 1), ("b", 2))]
    online |= {"by_kind": {"code": 0.1, "prose": 0.1}}
    comparison["rows"] = [hybrid, *kinds, online]
    said = " ".join(decide(comparison).steps)
    assert "a is the best component on every kind" in said and "mixture, untuned is the best component" not in said


def test_the_border_is_one_per_cent_of_the_best_baselines_loss():
    gain = 0.01 * LOSS / 0.99  # exactly 1 % of its own loss
    assert verdict(*PARTS, row("it", "gate", gain + 1e-6, half=0.001)).word == "GO"
    assert verdict(*PARTS, row("it", "gate", gain - 1e-6, half=0.001)).word == "TRY"  # sure, but too small
    assert verdict(*PARTS, row("it", "gate", gain - 0.0011, half=0.001)).word == "NO GO"


def test_try_where_the_interval_allows_a_gain_and_no_gain():
    found = verdict(*PARTS, row("gate", "gate", 0.03, half=0.06))
    assert found.word == "TRY" and found.decided and found.baseline["name"] == "gate"
    assert "between 0.030 worse and 0.090 better, so it may be zero" in found.reasons[0]
    assert "about 13 will show it (3 now)" in found.steps[0]  # 3 seeds * (0.06 / 0.03)^2 + 1
    assert any("60,000" in step for step in found.steps)


def test_try_advises_by_what_the_numbers_say():
    kinds = [{"by_kind": {"code": 2.0, "prose": 3.0}}, {"by_kind": {"code": 3.0, "prose": 2.0}}]
    parts = [row(name, "component", 0.3, **kind) for name, kind in zip("ab", kinds)]
    gate = row("gate", "gate", 0.03, half=0.06)
    advice = verdict(*parts, gate, settings={"mixture_space": "logprob", "num_blocks": 2}).steps
    assert any("mixture_space: prob" in step and "a on code; b on prose" in step for step in advice)
    assert any("num_blocks: 1" in step for step in advice)
    plain = verdict(*parts, gate, settings={"mixture_space": "prob", "num_blocks": 1}).steps
    assert not any("mixture_space" in step or "num_blocks" in step for step in plain)
    alike = [
        row(name, "component", gain, by_kind={"code": gain, "prose": gain}) for name, gain in (("a", 0.3), ("b", 0.4))
    ]
    assert any("complementary errors" in step for step in verdict(*alike, gate).steps)


def test_retrain_depends_on_whose_text_it_needs():
    good, single = row("gate", "gate", 0.03), row("one model", "single", -0.02)
    found = verdict(*PARTS, good, single | ALL_TEXT)
    assert found.word == "RETRAIN" and found.baseline["name"] == "one model" and found.otherwise.word == "GO"
    assert "if you have the components' training text; use the hybrid, if not" in found.headline
    tie = row("one model", "single", 0.002) | ALL_TEXT  # it costs half to run
    assert verdict(*PARTS, good, tie).word == "RETRAIN"
    assert verdict(*PARTS, good, row("one model", "single", 0.02) | ALL_TEXT).word == "GO"
    poor = verdict(*PARTS, row("gate", "gate", 0.0), single | ALL_TEXT)
    assert poor.word == "RETRAIN" and poor.otherwise.word == "NO GO"
    always = verdict(*PARTS, good, single)
    assert always.word == "RETRAIN" and always.otherwise is None
    unsure = row("one model", "single", -0.02) | ALL_TEXT | {"difference_interval": None}
    assert verdict(*PARTS, good, unsure).word == "GO", "one seed of it shows nothing"


def test_prune_where_little_is_lost_and_the_best_baseline_is_still_beaten():
    good = row("gate", "gate", 0.05)
    found = verdict(*PARTS, good, row("small", "pruned", 0.015))
    assert found.word == "PRUNE" and "Use small" in found.steps[0]
    assert verdict(*PARTS, good, row("small", "pruned", 0.03)).word == "GO"  # 1.5 % worse
    assert verdict(*PARTS, row("gate", "gate", 0.03), row("small", "pruned", 0.031)).word == "GO"
    assert verdict(*PARTS, row("gate", "gate", 0.0), row("small", "pruned", 0.01)).word == "NO GO"


def test_nothing_is_decided_without_seeds_baselines_or_comparison():
    one_seed = row("gate", "gate", 0.3) | {"difference_interval": None}
    assert verdict(*PARTS, one_seed).word == "TRY"
    alone = verdict(row("other", "hybrid", 0.1))
    assert alone.word == "TRY" and not alone.decided and "compare this" in alone.steps[0]
    run = OneRun({"hybrid": 3.315, "gate": 3.339, "a": 3.6}, "hybrid", "One run.")
    found = decide(None, command="compare this", one_run=run)
    assert found.word == "TRY" and not found.decided and "compare this" in found.steps[0]
    assert "No claim is made against the best baseline of one run (gate)" in found.reasons[0]
    assert "3.339 and the hybrid's 3.315 nats per token" in found.reasons[0]
    assert "The original components, with their own tokenizers, are not among them." in found.reasons[0]
    bits = {"hybrid": 1.1, "gate": 1.2, "original a": 1.15}
    more = {"bits": bits, "size": 6000, "differences": {"original a": [0.05, 0.01, 0.09]}}
    run = OneRun({"hybrid": 3.3, "gate": 3.4, "original a": 3.35}, "hybrid", "One run.", **more)
    said = decide(None, one_run=run).reasons[0]
    assert said.startswith("The hybrid is 0.0500 bits per byte better than the best baseline of one run (original a)")
    assert "1.1500 and 1.1000 bits per byte" in said and "not among them" not in said


def test_why_there_is_no_interval_is_said():
    assert claim("it", [0.1, None, None], 6_000, rows=3) == (
        "No claim is made against it: there is no confidence interval, which takes at least 8 rows of text (3 here)."
    )
    assert "too few (at least 5,000)" in claim("it", [0.1, None, None], 4_999, rows=3)
    assert more_rows(3) == "Use more text, or a smaller --block-size." and more_rows(8) == more_rows(None) == ""
    assert more_rows(1, 992) == more_rows(20, 992) == "Use more text."  # shorter rows make no more bytes
    result = {"data": "text.txt", "tokens": 9, "bytes": 6_000, "rows": 3, "missing": {}, "losses": {}}
    result["losses"] = {"hybrid": 2.0, "online mixture": 2.000001, "ensemble": 2.1}
    result["bits_per_byte"] = {name: loss / 3 for name, loss in result["losses"].items()}
    result["differences"] = {"online mixture": [1e-6, None, None], "ensemble": [0.03, None, None]}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_result("hybrid", result)
    said = out.getvalue()
    assert "8 rows of text (3 here). Use more text, or a smaller --block-size." in said
    assert "The hybrid is the online mixture of its components" in said and said.count("online mixture") == 1
    assert 'as "original", as they came' not in said
    for name in ("a", "original a"):
        result["losses"][name], result["bits_per_byte"][name] = 2.2, 2.2 / 3
        result["differences"][name] = [0.07, None, None]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_result("hybrid", result)
    assert 'measured inside the hybrid and, as "original", as they came, with their own tokenizers.' in out.getvalue()


@pytest.mark.parametrize("apart, low, high, same", [
    (1e-4, 1e-5, 5e-5, True),  # two real models of 262,144 tokens, in float32
    (1e-4, -3e-3, 3e-3, False),  # nearly as good, by other predictions
    (1e-3, 1e-5, 5e-5, False),
    (1e-4, None, None, False),
    (1e-5, None, None, True),
])  # fmt: skip
def test_the_mixture_that_a_hybrid_is_itself_is_known_by_every_row(apart, low, high, same):
    losses = {"hybrid": 3.0, "online mixture": 3.0 - apart, "ensemble": 3.1}
    differences = {"online mixture": [-apart / 3, low, high], "ensemble": [0.03, 0.01, 0.05]}
    for mixture in (None, "online"):
        assert itself(losses, differences, mixture=mixture) == ["online mixture"] * same
    assert itself(losses, differences, mixture="token") == []
    # Of equal components all mixtures are equal, and a hybrid is the one that it is made to be
    losses = dict.fromkeys(("hybrid", "online mixture", "ensemble"), 3.0)
    assert [itself(losses, mixture=one) for one in ("online", "token", "static")] == [
        ["online mixture"],
        ["ensemble"],
        ["ensemble"],
    ]


def test_what_rounds_to_zero_has_no_minus():
    assert [signed(one) for one in (-0.0004, 0.0004, -0.0006)] == ["+0.000", "+0.000", "-0.001"]
    assert "(95 % confidence: +0.0000 to +0.0050)" in claim("it", [0.002, -0.00001, 0.005], 6_000)
    assert (
        say_difference({"difference": -0.0001, "difference_interval": [-0.0002, 0.01]}) == "+0.000 (+0.000 to +0.010)"
    )
    lost = {
        "gain": -0.004,
        "before": "",
        "token": "x",
        "after": "",
        "tokens": 1,
        "text": "x",
        "cut": False,
        "per_token": 0,
    }
    where_it = {way: [] if way == "gains" else [lost] for way in ("gains", "loses")}
    one = {"gain": -0.001, "better": 0.5, **{what: where_it for what in ("tokens", "kinds", "documents")}}
    losses = {"losses": {"hybrid": 2.0, "a": 2.1}, "tokens": 5, "where": {"a": one}}
    (found,) = where(types.SimpleNamespace(measured={"losses": losses}, found={"settings": {"mixture": "token"}}))
    assert [found[what]["loses"] for what in ("tokens", "kinds", "documents")] == [[], [], []]


def test_costs_are_told_against_the_model_that_gains_are_told_against():
    facts = facts_of(row("small, tuned", "component", 0.4), row("large, tuned", "component", 0.2))
    keys = ("parameters", "flops_per_token", "cache_bytes_per_token", "state_bytes", "bytes")
    parts = [{"part": name, **dict.fromkeys(keys, size)} for name, size in (("small", 1), ("large", 2), ("hybrid", 3))]
    facts.found = {
        "parts": parts,
        "components": [{"name": "small"}, {"name": "large"}],
        "note": "",
        "settings": {"route": None, "mixture": "token"},
    }
    assert _running(facts)["sentence"].startswith("The hybrid's weights take 1.5 times the memory of large alone")
    speeds = {
        name: {"decode": decode, "prefill": 1, "working": 1}
        for name, decode in (("small", 100), ("large", 50), ("hybrid", 20))
    }
    facts.measured = {
        "speed": {
            "models": speeds,
            "device": "cpu",
            "threads": 1,
            "dtype": "float32",
            "prompt_tokens": 1,
            "new_tokens": 1,
            "repeats": 1,
            "reads_past_losses": True,
        }
    }
    found = _running(facts)
    assert found["sentence"].endswith("; it generates at 40% of its speed.")
    assert "needs every component's prediction at every token" in found["note"]


def test_an_untrained_hybrid_lacks_no_seeds():
    run = OneRun({"hybrid": 3.3, "ensemble": 3.4}, "hybrid", "One run.", rows=3, size=6_000)
    found = decide(None, None, "compare this", run, untrained=True, steps=["Do that."])
    assert "seed" not in " ".join(found.reasons) and "Nothing of this hybrid was trained" in found.reasons[1]
    assert (found.word, found.decided, found.steps) == ("TRY", False, ["Do that."])


def test_a_difference_is_said_per_byte_where_that_is_known():
    one, ours = row("a", "component", 0.3), row("ours", "hybrid", 0.0)
    assert say(one, ours).endswith(".") and "bits per byte" not in say({**one, "bits_per_byte": None}, ours)
    known = {**one, "bits_per_byte": 1.25}, {**ours, "bits_per_byte": 1.0}
    assert say(*known).endswith(", 1.0000 instead of 1.2500 bits per byte.")


def test_a_comparison_on_little_text_decides_nothing():
    rows = (*PARTS, row("gate", "gate", 0.3))
    assert verdict(*rows, test_bytes=4_999).word == "TRY" and verdict(*rows, test_bytes=5_000).word == "GO"
    assert "4,999 bytes of text are too few" in verdict(*rows, test_bytes=4_999).reasons[0]
    assert verdict(*rows, test_units=7).word == "TRY" and verdict(*rows, test_units=8).word == "GO"


def test_other_hybrids_are_no_baselines_but_are_named():
    found = verdict(*PARTS, row("gate", "gate", 0.0), row("two blocks", "hybrid", -0.1))
    assert found.word == "NO GO" and any("two blocks measured better" in step for step in found.steps)
    rows = [row("ours", "hybrid", 0.0), row("x", "single", -1.0, **ALL_TEXT), *PARTS]
    assert gain_needed({"hybrid": "ours", "rows": rows}) == pytest.approx(WORTH * (LOSS + 0.1))


def test_words_have_rules_and_signs_are_right():
    text = " ".join(RULES)
    assert all(f"{word}:" in text for word in ("GO", "NO GO", "RETRAIN", "PRUNE", "TRY"))
    worse = say(row("it", "gate", -0.02), {"loss": LOSS})
    assert (
        "0.020 nats per token worse than it (95 % confidence: between 0.015 and 0.025; better in 0 of 3 seeds)" in worse
    )
    assert [perplexity(x) for x in (2.0, 3.315, 8.0)] == ["7.39", "27.5", "2,981"]


# ---- reading ---------------------------------------------------------------------------------------------------------


def good():
    """The agreed format, as `manticore-hf compare` writes it."""
    return {
        "version": 1,
        "data": "text",
        "test": "other text",
        "tokens": 100,
        "test_tokens": 50,
        "seeds": [0, 1],
        "hybrid": "h",
        "machine": "here",
        "versions": {},
        "rows": [
            {"name": "h", "kind": "hybrid", "seeds": [0, 1], "loss": 2.0, "losses": [1.9, 2.1], "needs": ""},
            {"name": "a", "kind": "component", "loss": 2.5, "difference": 0.5, "difference_interval": [0.4, 0.6]},
        ],
    }


def test_a_comparison_is_found_and_read(tmp_path):
    run, stage = tmp_path / "run", tmp_path / "run" / "1-finetune"
    stage.mkdir(parents=True)
    assert find_comparison(stage) is None
    (run / "comparison.json").write_text(json.dumps(good()))
    assert find_comparison(stage) == run / "comparison.json" == find_comparison(tmp_path, run)
    found = read_comparison(run / "comparison.json")
    assert found["rows"][1]["difference_interval"] == [0.4, 0.6] and found["rows"][1]["bits_per_byte"] is None
    (run / "comparison.json").write_text(json.dumps(good()).replace('"component"', '"hardened"'))  # of version 0.1
    assert {row["kind"] for row in read_comparison(run / "comparison.json")["rows"]} == {"hybrid", "pruned"}
    (stage / "comparison.json").write_text("{}")
    assert find_comparison(stage) == stage / "comparison.json"


@pytest.mark.parametrize(
    "where, value, said",
    [
        (("version",), 2, "version"),
        (("hybrid",), "x", "'x'"),
        (("rows",), [], "no rows"),
        (("rows", 1, "kind"), "best", "'best'"),
        (("rows", 1, "loss"), float("nan"), "nan"),
        (("rows", 1, "name"), "h", "two rows"),
        (("rows", 0, "loss"), True, "True"),
        (("rows", 1, "difference_interval"), [0.6, 0.4], "ascending"),
        (("rows", 1, "p"), "small", "'small'"),
        (("rows", 1, "by_kind"), {"code": None}, "by_kind"),
    ],
)
def test_what_is_wrong_with_a_comparison_is_named(tmp_path, where, value, said):
    values = good()
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (tmp_path / "comparison.json").write_text(json.dumps(values))
    with pytest.raises(ManticoreError, match="comparison.json.*" + said):
        read_comparison(tmp_path / "comparison.json")


# ---- what is said to others ------------------------------------------------------------------------------------------


def facts_of(*baselines, bits=1.0):
    hybrid = row("ours", "hybrid", 0.0, bits_per_byte=bits) | {"difference": None, "difference_interval": None}
    values = {"hybrid": "ours", "rows": [hybrid, *baselines], "test_bytes": 9_000}
    return types.SimpleNamespace(comparison=values, measured={}, found={"components": []})


def test_gains_are_in_bits_per_byte_where_these_are_known():
    parts = row("b", "component", 0.4), row("a", "component", 0.2), row("e", "ensemble", -0.1, bits_per_byte=0.9)
    found, unit = gains(facts_of(*parts))
    assert unit == "bits per byte" and list(found) == ["e", "a", "b"]  # 2 nats per token are 1 bit per byte
    assert found["a"] == pytest.approx([0.1, 0.0975, 0.1025]) and found["e"] == pytest.approx([-0.05, -0.0525, -0.0475])
    found, unit = gains(facts_of(*parts, bits=None))
    assert unit == "nats per token" and found["a"] == pytest.approx([0.2, 0.195, 0.205])


def test_an_untuned_mixture_is_no_single_model():
    rows = [
        row(f"{name}, untuned", "untuned", gain)
        for name, gain in (("online mixture", 0.1), ("ensemble", 0.2), ("a", 0.3))
    ]
    facts = facts_of(row("e", "gate", 0.05), *rows)
    facts.found = {"components": [{"name": "a"}]}
    assert phrases(facts, "", "Mine.")[1].startswith(
        "The hybrid is 0.1500 bits per byte better than the best single model (a, u"
    )


def test_phrases_say_what_is_lost_too():
    parts = row("a", "component", 0.2), row("e", "ensemble", -0.1)
    said = phrases(facts_of(*parts), "It costs.", "It may be used. ")
    assert said[0].startswith("The hybrid is 0.0500 bits per byte worse than the best baseline (e) (95")
    assert said[1].startswith("The hybrid is 0.1000 bits per byte better than the best single model (a) (95")
    assert said[2:] == ["It costs.", "It may be used."]
    more = row("r", "single", -0.3, needs="all of the text"), row("f", "single", 0.1)
    said = phrases(facts_of(*parts, *more), "", "Mine.")
    for sentence, start in zip(
        said,
        (
            "The hybrid is 0.1500 bits per byte worse than the best baseline (r, which needs all of",
            "The hybrid is 0.0500 bits per byte worse than the best baseline that needs nothing else (e)",
            "The hybrid is 0.0500 bits per byte better than the best single model (f)",
            "Mine.",
        ),
        strict=True,
    ):
        assert sentence.startswith(start)
    facts = facts_of(*parts, bits=None)
    facts.measured = {
        "losses": {"losses": {"hybrid": 2.0}}, "without/0/a": {"loss": 2.5}, "without/0/b": {"loss": 1.9},
        "without/1/a": {"loss": None},
    }  # fmt: skip
    assert phrases(facts, "", "Mine.") == [
        "Without a in block 1, the hybrid is 0.500 nats per token worse; without b in block 1, it is 0.100 better.",
        "Mine.",
    ]
    facts.measured["losses"] |= {"tokens": 300, "bytes": 1200}
    assert "0.500 nats per token worse (0.1803 bits per byte); without b" in phrases(facts, "", "Mine.")[0]


def of_one_run(tokens, sampled, low=0.01, data="text.txt", named=False):
    """Facts of a run that measured so many tokens without the originals, and a report that sampled some with them."""
    difference = {"gate": [0.1, low, low and 0.2]}
    run = Result(
        data,
        {"hybrid": 2.0, "gate": 2.2},
        tokens=tokens,
        bits={"hybrid": 1.0, "gate": 1.1},
        size=9 * tokens,
        differences=difference,
    )
    losses = {
        "losses": {"hybrid": 1.9, "gate": 1.8, "original a": 2.9}, "tokens": sampled, "bytes": 3 * sampled,
        "bits_per_byte": {"hybrid": 0.95, "gate": 0.9, "original a": 1.45}, "missing": {},
        "differences": {"gate": [-0.05, -0.06, -0.04], "original a": [0.5, 0.4, 0.6]},
    }  # fmt: skip
    measured = {"losses": losses, "text": "text.txt", "named": named, "without/0/a": {"loss": 2.4}}
    found = {"components": [], "settings": {"mixture": "token"}}
    return types.SimpleNamespace(results=[run], measured=measured, comparison=None, found=found)


def test_a_sample_does_not_contradict_what_the_run_measured_on_more_text():
    facts = of_one_run(20_448, 7_924, named=True, data="text.txt (all that there is)")
    said = decide(None, one_run=one_run(facts)).reasons[0]
    assert said.startswith("The hybrid is 0.1000 bits per byte better than the best baseline of one run (gate)")
    # The originals are only in the sample, whose size is said
    assert "On a sample of 7,924 tokens, the hybrid is 0.5000 bits per byte better than the best original" in said
    quoted = phrases(facts, "", "Mine.")
    assert quoted[0].startswith("The hybrid is 0.1000 bits per byte better than the best baseline (gate)")
    assert quoted[1].endswith("(on a sample of 7,924 tokens).")
    assert "of another measurement" in _apart(facts) and _apart(of_one_run(7_924, 7_924)) == ""
    for other in (
        of_one_run(7_924, 7_924),  # all of it, and with the originals
        of_one_run(20_448, 7_924, low=None),  # without intervals nothing can be said
        of_one_run(20_448, 7_924, named=True, data="other.txt"),  # not the text that was asked for
    ):
        run = one_run(other)
        assert run.losses["hybrid"] == 1.9 and run.sample is None
        assert not any("sample" in one for one in phrases(other, "", "Mine."))


def test_why_there_are_no_curves_is_said():
    log = [{"step": 8, "train_runtime": 37.1}]
    short = FinishedStage("1-pretrain", Path(), {"steps": 8}, log, logging_steps=20)
    long = FinishedStage("2-finetune", Path(), {"steps": 40}, [{"step": 20, "loss": 3.0}], logging_steps=20)

    def said(*stages, untrained=False):
        return no_curves(types.SimpleNamespace(stages=stages, untrained=untrained))

    assert said(short, long) == "1-pretrain logged no losses: it took 8 steps, fewer than logging_steps (20)."
    assert said(long) == "" and said(untrained=True) == "Nothing was trained."
    assert said() == "The directory holds no training log."


def test_tokens_that_differ_by_a_space_look_different():
    assert [visible(text, True) for text in ("a", " a", "a ", "  ", "a b")] == ["a", "␣a", "a␣", "␣␣", "a b"]
    assert visible(" a\n") == " a⏎"
    vocabulary = {"\u2581a": 0, "a": 1, "<unk>": 2}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.decoder = Metaspace()  # which drops the space before the first token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert [token_text(tokenizer, token) for token in (0, 1)] == [" a", "a"]


# ---- charts ----------------------------------------------------------------------------------------------------------


def test_charts_escape_what_they_print():
    evil = '<script>"&'
    drawn = [
        charts.forest([(evil, 0.1, [0.0, 0.2])]),
        charts.heat([[0.5, None]], [evil], [evil, "b"]),
        charts.lines({evil: ([0, 1], [1.0, 2.0])}, evil, evil, label=evil),
    ]
    for chart in drawn:
        assert "<script" not in chart and "&lt;script&gt;&#34;&amp;" in chart


def test_what_a_forest_says_of_its_sides_stands_inside():
    """Also of a hybrid that loses everywhere, whose line at 0 is at the edge, and beside the longest names."""
    for width in (640, 520):
        chart = charts.forest([("n" * 60, -0.05, [-0.06, -0.04]), ("b", -0.03, None)], width=width)
        found = re.findall(
            r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="tick">([^<]*better[^<]*)<', chart
        )
        (left, y, start, baseline), (right, at, end, hybrid) = found
        assert (start, end) == ("start", "end") and y == at and float(right) < width
        assert float(right) - float(left) > 5.6 * len(
            baseline + hybrid
        )  # of 11 pixels' letters, which they do not share
        assert re.search(r"n{28,}…", chart)


def test_ticks_are_round_and_inside():
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(-0.013, 0.021, 4) == [-0.01, 0.0, 0.01, 0.02]
    assert charts.ticks(3.0, 3.0) == [3.0]


def test_a_chart_is_drawn_for_a_page_and_for_a_phone():
    rows = [("online mixture of the tuned components", 0.1, [0.05, 0.2]), ("b", -0.1, None)]
    for draw, given in (
        (charts.forest, (rows,)),
        (charts.heat, ([[0.5, 0.2]], ["block 1"], ["a", "b"])),
        (charts.lines, ({"a": ([0, 5], [1.0, 3.0])}, "optimizer step", "loss in nats per token")),
    ):
        drawn = charts.for_any_page(draw, *given)
        broad, narrow = drawn.split('<div class="narrow">')
        wide, small = (float(re.search(r'viewBox="0 0 ([\d.]+)', one)[1]) for one in (broad, narrow))
        assert small <= charts.NARROW < wide or draw is charts.heat and small <= charts.NARROW
    for width in (charts.NARROW, 520, 640):  # a phone, a card on a page, the page
        assert "online mixture of the tuned components</text>" in charts.forest(rows, width=width)
    assert "loss in nats per token, by optimizer step" in drawn


def test_weights_that_stay_equal_are_a_sentence():
    flat = {"a": ([1, 2], [0.5, 0.505]), "b": ([1, 2], [0.5, 0.495])}
    found = _trajectory("1-pretrain", flat, "mean gate weight")
    assert found["chart"] is None and found["said"].endswith("equal within 0.02; at the end: a 0.505, b 0.495.")
    moved = {"a": ([1, 2], [0.5, 0.6]), "b": ([1, 2], [0.5, 0.4])}
    assert "mean gate weight, by optimizer step" in _trajectory("1-pretrain", moved, "mean gate weight")["chart"]


def test_a_curve_goes_through_its_points():
    chart = charts.lines({"x": ([0, 5, 10], [1.0, 3.0, 2.0])}, "step", "loss", low=1.0, high=3.0)
    points = chart.split('points="')[1].split('"')[0].split()
    xs, ys = zip(*[map(float, point.split(",")) for point in points])
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1) and ys[1] < ys[2] < ys[0]
    assert ys[2] - ys[1] == pytest.approx(ys[0] - ys[2], abs=0.11)


def test_places_of_an_earlier_report_are_printed_only_where_they_lead_somewhere(tmp_path, monkeypatch):
    """They count from where that one was written."""
    (tmp_path / "text.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert _here("text.txt") == "text.txt" and _here("owner/name@v1") == "owner/name@v1"
    monkeypatch.chdir(tmp_path.parent)
    assert _here("text.txt") is _here("data/text.txt") is _here("a/b/converted") is _here(None) is None
