"""The verdict: is the hybrid worth it? Stated rules, applied to stated numbers; the report prints both.

Differences are a baseline's loss minus the hybrid's, in nats per token: positive means that the hybrid is better.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manticore_hf.report.one_run import OneRun
from manticore_hf.utils.claims import CLAIM_BYTES, CLAIM_ROWS, ORIGINAL, claim, too_little
from manticore_hf.utils.formatting import plural, signed

WORTH = 0.01
"""Smallest gain that is worth a second model, as a share of the best baseline's loss."""
_MIXTURES = {"ensemble, untuned": "static", "online mixture, untuned": "online"}
"""Baselines that `compose` makes of the components as they are: {row: its setting `mixture`}."""
PRUNE_WITHIN = 0.01
"""A pruned hybrid is as good as the unpruned one if its loss is at most this share higher."""

RULES = [
    "A baseline counts if you could use it today, that is, if it needs no text beyond what the hybrid was trained on: "
    "the components, untuned and tuned, their ensemble, a gate over them, and one model trained on the same text.",
    f"The gain must be worth having: at least {WORTH:.0%} of the best baseline's loss, in nats per token, against "
    "every baseline.",
    "GO: the gain is that large against every baseline, and its 95 % confidence interval excludes 0. Because every "
    "baseline has to be beaten, no correction for multiple comparisons is needed.",
    "NO GO: against some baseline, even the upper end of the interval is below that gain. It is a tie at best, and the "
    "baseline costs no more. If that baseline is one model trained on the same text: RETRAIN.",
    "TRY: anything else. The data are compatible with such a gain but do not show it.",
    "RETRAIN: one model trained on everything, including the components' training text, is not beaten (the interval of "
    "the difference includes 0 or lies below it). It costs less to run. If you do not have that text, the other rules "
    "apply; the report gives both answers.",
    "PRUNE: the answer is GO, and a pruned hybrid (one component per block, about the cost of one model) has a loss at "
    f"most {PRUNE_WITHIN:.0%} above that of the unpruned one and still beats the best baseline.",
    "Without a comparison over several seeds that includes separately tuned baselines, there is no verdict, only TRY; "
    f"the same holds for fewer than {CLAIM_BYTES:,} bytes or {CLAIM_ROWS} rows (or documents) of test text.",
]

_ONE_RUN = "There is no comparison over several seeds: a single run cannot support a decision."
_UNTRAINED = (
    "Nothing of this hybrid was trained. Whether that is better than training is not measured: a verdict takes a "
    "comparison with its components tuned on your text."
)

_EXPLAINED = {
    "GO": "Use the hybrid",
    "PRUNE": "Use the hybrid, pruned to about the cost of one model",
    "NO GO": "Do not use the hybrid",
    "RETRAIN": "Train one model on everything instead",
    "TRY": "Not decided yet",
}


@dataclass
class Verdict:
    """What to do.

    Args:
        word: "GO", "PRUNE", "NO GO", "RETRAIN" or "TRY".
        baseline: The row that decided: the closest baseline, or the one that won; None without a comparison.
        reasons: Sentences with the numbers that decided.
        steps: What to do next, most useful first.
        otherwise: With a RETRAIN that needs the components' training text: the Verdict for who does not have it.
        decided: Whether a comparison carries it.
    """

    word: str
    baseline: dict | None
    reasons: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    otherwise: "Verdict | None" = None
    decided: bool = True

    @property
    def headline(self) -> str:
        """The verdict in words."""
        if self.otherwise is not None:
            rest = _EXPLAINED[self.otherwise.word]
            text = "the components' training text"
            return f"{_EXPLAINED[self.word]}, if you have {text}; {rest[0].lower()}{rest[1:]}, if not"
        return _EXPLAINED[self.word]


def decide(
    comparison: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None = None,
    command: str | None = None,
    one_run: OneRun | None = None,
    untrained: bool = False,
    steps: Sequence[str] | None = None,
    components: Sequence[str] = (),
) -> Verdict:
    """Applies the rules.

    Args:
        comparison: What `read_comparison` gives, or None.
        settings: The hybrid's settings (`inspect_hybrid`): the advice of TRY looks at them.
        command: The command that makes a comparison, for the advice where there is none.
        one_run: What one run measured, said with its caveat where there is no comparison.
        untrained: Whether nothing of the hybrid was trained, so that seeds do not matter.
        steps: The advice where there is no comparison; default: to make one.
        components: Where the components are, for the command that makes an untrained mixture of them.

    Returns:
        A Verdict.
    """
    if comparison is None:
        reasons = [_in_one_run(one_run)] if one_run else []
        reasons.append(_UNTRAINED if untrained else _ONE_RUN)
        default = [f"Measure it: {command}"] if command else []
        return Verdict("TRY", None, reasons, default if steps is None else list(steps), decided=False)
    rows = {row["name"]: row for row in comparison["rows"]}
    hybrid = rows[comparison["hybrid"]]
    why = too_little(comparison.get("test_bytes"), comparison.get("test_units"), comparison.get("units") or "row")
    if why is not None:
        reason = f"The comparison was tested on too little for a claim: {why}."
        return Verdict("TRY", None, [reason], [f"Compare on more text: {command}"] if command else [], decided=False)
    others = _baselines(comparison)
    free = [row for row in others if not row["needs"]]
    if not free:
        reason = "The comparison has no baseline that you could use today: no component, ensemble or gate."
        return Verdict("TRY", None, [reason], [f"Measure the baselines: {command}"] if command else [], decided=False)
    if len(hybrid["seeds"]) < 2:
        reason = "One seed cannot support a decision, however narrow the interval over documents is."
        best = min(free, key=lambda row: row["loss"])
        step = f"Compare with at least 3 seeds ({_seeds(hybrid)} now)."
        return Verdict("TRY", best, [say(best, hybrid), reason], [step], decided=False)
    retrained = [row for row in others if row["needs"] and row["kind"] == "single" and _not_beaten(row)]
    verdict = _against(hybrid, free, comparison, settings or {}, components)
    if retrained:
        best = min(retrained, key=lambda row: row["loss"])
        reasons = [f"{say(best, hybrid)} It needs {best['needs']}."]
        steps = [
            f"If you have {best['needs']}: train one model on all of it ({best['name']}).",
            *(f"If you do not: {step[0].lower()}{step[1:]}" for step in verdict.steps[:2]),
        ]
        return Verdict("RETRAIN", best, reasons + verdict.reasons, steps, otherwise=verdict)
    return verdict


def _against(hybrid, baselines, comparison, settings, components):
    """The verdict on a hybrid and the baselines that need nothing else."""
    best = min(baselines, key=lambda row: row["loss"])
    needed = WORTH * best["loss"]
    unsure = [row for row in baselines if row["difference_interval"] is None or row["difference"] is None]
    if unsure:
        reason = f"There is no interval for {unsure[0]['name']}: one seed cannot show how certain a difference is."
        step = f"Compare again with at least 3 seeds ({_seeds(hybrid)} now)."
        return Verdict("TRY", best, [say(best, hybrid), reason], [step])
    lost = [row for row in baselines if row["difference_interval"][1] < needed]
    if lost:
        baseline = min(lost, key=lambda row: row["loss"])
        word = "RETRAIN" if baseline["kind"] == "single" else "NO GO"
        reasons = [
            say(baseline, hybrid),
            f"Even at best, that is less than the {needed:.3f} nats ({WORTH:.0%}) that would make it worthwhile.",
        ]
        steps = _use(baseline, components)
        steps += _other_hybrid(hybrid, baseline, comparison) + _alike(comparison)
        return Verdict(word, baseline, reasons, steps)
    short = [row for row in baselines if row["difference_interval"][0] <= 0 or row["difference"] < needed]
    if short:
        baseline = min(short, key=lambda row: row["difference"])
        why = f"A GO takes at least {needed:.3f} nats ({WORTH:.0%}) and an interval that excludes 0."
        attempts = _attempts(hybrid, baseline, comparison, settings, needed)
        return Verdict("TRY", baseline, [say(baseline, hybrid), why], attempts)
    share = best["difference"] / best["loss"]
    reasons = [f"{say(best, hybrid)} That is {share:.1%} of the loss of this baseline, the best one."]
    hard = [row for row in comparison["rows"] if row["kind"] == "pruned" and not row["needs"]]
    hard = [row for row in hard if row["loss"] <= (1 + PRUNE_WITHIN) * hybrid["loss"] and row["loss"] < best["loss"]]
    if hard:
        small = min(hard, key=lambda row: row["loss"])
        reasons.append(
            f"{small['name']} keeps nearly all of it: {small['loss']:.3f} against {hybrid['loss']:.3f} nats per token."
        )
        return Verdict("PRUNE", best, reasons, [f"Use {small['name']}: it costs about as much as one model."])
    steps = ["Use it on text like the test text; for other text, test again."]
    if not settings.get("aligned") and not any(row["kind"] == "pruned" for row in comparison["rows"]):
        steps.append("Prune it (manticore-hf prune) and compare again: if the gain remains, it costs about one model.")
    return Verdict("GO", best, reasons, steps + _other_hybrid(hybrid, hybrid, comparison))


def _use(baseline, components):
    """What to do with a baseline that the hybrid does not beat; a mixture of the components is a hybrid, too."""
    name, mixture = baseline["name"], _MIXTURES.get(baseline["name"])
    steps = [f"Use {'the ' if mixture else ''}{name}: the hybrid adds too little to it, if anything."]
    if mixture and components:
        options = [f"--{key.replace('_', '-')}={value:g}" for key, value in baseline.get("options", {}).items()]
        command = ["manticore-hf", "compose", *components, "--mixture", mixture, *options, "--output-dir", mixture]
        steps.append(f"Make it of the components, which takes no training: {shlex.join(command)}")
    return steps


def _baselines(comparison):
    """The rows that are no hybrids."""
    return [
        row
        for row in comparison["rows"]
        if row["kind"] not in ("hybrid", "pruned") and row["name"] != comparison["hybrid"]
    ]


def gain_needed(comparison: Mapping[str, Any]) -> float | None:
    """Nats per token that the hybrid has to be better by, or None where no baseline can be used today."""
    losses = [row["loss"] for row in _baselines(comparison) if not row["needs"]]
    return WORTH * min(losses) if losses else None


def _in_one_run(run):
    """What one run may claim of the best baseline, in a sentence."""
    order = run.bits if set(run.losses) <= set(run.bits) else run.losses
    best = min((name for name in run.losses if name != run.own), key=order.get)
    said = claim(f"the best baseline of one run ({best})", run.differences.get(best), run.size, "The hybrid", run.rows)
    bits = f", {run.bits[best]:.4f} and {run.bits[run.own]:.4f} bits per byte" if order is run.bits else ""
    losses = f" Losses: {run.losses[best]:.3f} and the hybrid's {run.losses[run.own]:.3f} nats per token{bits}."
    if run.has_untouched:
        return said + losses
    if run.sample is not None and run.sample.has_untouched:
        return f"{said}{losses} {_original_in(run.sample)}"
    return f"{said}{losses} The original components, with their own tokenizers, are not among them."


def _original_in(sample):
    """What a sample may claim of the best original component, in a sentence."""
    names = [name for name in sample.losses if name.startswith(ORIGINAL.format(""))]
    best = min(names, key=sample.losses.get)
    what = f"On a sample of {plural(sample.tokens, 'token')}, the hybrid"
    return claim(f"the best original component ({best})", sample.differences.get(best), sample.size, what, sample.rows)


def say(row: Mapping[str, Any], hybrid: Mapping[str, Any]) -> str:
    """A baseline's difference to the hybrid in a sentence that says what it means.

    Args:
        row: The baseline's row, as `read_comparison` gives it; losses and differences in nats per token.
        hybrid: The hybrid's row, of which the loss counts.
    """
    difference, pair = row["difference"], row["difference_interval"]
    if difference is None:
        return f"{row['name']} has a loss of {row['loss']:.3f} nats per token, the hybrid {hybrid['loss']:.3f}."
    word = "better" if difference >= 0 else "worse"
    low_high = sorted(abs(x) for x in pair) if pair and pair[0] * pair[1] > 0 else pair
    sure = f" (95 % confidence: between {low_high[0]:.3f} and {low_high[1]:.3f}" if pair else " (one seed"
    if pair and pair[0] <= 0 <= pair[1]:
        sure = f" (95 % confidence: between {abs(pair[0]):.3f} worse and {pair[1]:.3f} better, so it may be zero"
    won = (
        f"; better in {row['seeds_won']} of {len(row['seeds'])} seeds"
        if row["seeds_won"] is not None and row["seeds"]
        else ""
    )
    return (
        f"The hybrid is {abs(difference):.3f} nats per token {word} than {row['name']}{sure}{won}): perplexity "
        f"{perplexity(hybrid['loss'])} instead of {perplexity(row['loss'])}{_in_bits(row, hybrid)}."
    )


def _in_bits(row, hybrid):
    """The same per byte, which compares between tokenizers, as the end of a sentence; "" where it is not known."""
    both = [one.get("bits_per_byte") for one in (hybrid, row)]
    return "" if None in both else f", {both[0]:.4f} instead of {both[1]:.4f} bits per byte"


def say_difference(row: Mapping[str, Any], seeds: bool = True, digits: int = 3) -> str:
    """How much better the hybrid is than a row's model, with the interval, as text.

    Args:
        row: Of a comparison, or one with what is known of a run; in any unit.
        seeds: Whether seeds matter: without an interval it then says that there is one.
        digits: Decimals.
    """
    value, pair = row["difference"], row.get("difference_interval")
    if value is None:
        return "not known"
    if pair:
        return f"{signed(value, digits)} ({signed(pair[0], digits)} to {signed(pair[1], digits)})"
    return signed(value, digits) + (" (one seed)" if seeds else "")


def perplexity(loss: float) -> str:
    """exp(loss) as text; what the loss means: the model is as unsure as between that many equally likely tokens."""
    value = math.exp(min(loss, 700.0))
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _not_beaten(row):
    """Whether an interval is there and does not show the hybrid to be better than a row."""
    return row["difference_interval"] is not None and row["difference_interval"][0] <= 0


def _seeds(row):
    return plural(len(row["seeds"]), "seed")


def _other_hybrid(hybrid, baseline, comparison):
    """Another hybrid of the comparison that measured better than this one and its baseline."""
    rows = [row for row in comparison["rows"] if row["kind"] == "hybrid" and row is not hybrid]
    rows = [row for row in rows if row["loss"] < min(hybrid["loss"], baseline["loss"])]
    best = min(rows, key=lambda row: row["loss"], default=None)
    return (
        [f"{best['name']} measured better ({best['loss']:.3f} nats per token): report on it instead."] if best else []
    )


def _best_by_kind(comparison):
    """{kind of text: name of the component (as it is, where that was measured) with the lowest loss}."""
    for wanted in ("untuned", "component"):
        rows = [row for row in comparison["rows"] if row["kind"] == wanted and row["by_kind"]]
        rows = [row for row in rows if row["name"] not in _MIXTURES]
        if len(rows) > 1:
            kinds = set.intersection(*(set(row["by_kind"]) for row in rows))
            return {kind: min(rows, key=lambda row, k=kind: row["by_kind"][k])["name"] for kind in sorted(kinds)}
    return {}


def _alike(comparison):
    best = _best_by_kind(comparison)
    if len(best) > 1 and len(set(best.values())) == 1:
        return [
            f"{next(iter(best.values()))} is the best component on every kind of text here. A hybrid pays off if each "
            "component is best on some of the text: try a pair with complementary errors."
        ]
    return []


def _attempts(hybrid, baseline, comparison, settings, needed):
    """What may turn a TRY into an answer, most useful first."""
    out, (low, high) = [], baseline["difference_interval"]
    half, seeds, goal = (high - low) / 2, max(len(baseline["seeds"]), len(hybrid["seeds"])), baseline["difference"]
    if goal >= needed and seeds >= 2:
        more = math.ceil(seeds * (half / goal) ** 2) + 1
        out.append(
            f"Compare with more seeds: if the gain is real, about {max(more, seeds + 1)} will show it ({seeds} now)."
        )
    best = _best_by_kind(comparison)
    if len(set(best.values())) > 1 and settings.get("mixture_space") == "logprob":
        who = "; ".join(f"{name} on {kind}" for kind, name in best.items())
        out.append(
            f"Set mixture_space: prob. The components' errors are complementary (best: {who}), and mixing "
            "probabilities lets the gate silence the one that is wrong."
        )
    if (settings.get("num_blocks") or 1) > 1:
        out.append("Try num_blocks: 1: so far, several blocks have measured worse than one.")
    if comparison["tokens"]:
        out.append(f"Train the hybrid and the baselines on more text ({comparison['tokens']:,} tokens now).")
    return out + _other_hybrid(hybrid, hybrid, comparison) + _alike(comparison)
