"""The demo as a user runs it, on a fifth of its text, and what it says to do next."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from manticore_hf import ManticoreForCausalLM
from manticore_hf.training.recipe import load_recipe

ROWS = (
    "neox_prose", "mamba_code", "ensemble", "online mixture", "hybrid, 1 block, gate trained",
    "hybrid, 2 blocks, calibrated only",
    "hybrid, 2 blocks, projectors and gate trained", "neox_prose, tuned alone", "mamba_code, tuned alone",
    "ensemble of the tuned components", "online mixture of the tuned components",
    "token gate over the tuned components", "hybrid, 1 block, tuned jointly",
    "hybrid, 2 blocks, searched and tuned",
)  # fmt: skip
SAID = ("bits per byte better than", "bits per byte worse than", "shows no clear difference from")


def _command(place, *given):
    """A command as a user types it in a directory."""
    done = subprocess.run(
        [sys.executable, "-m", "manticore_hf.cli", *given], capture_output=True, text=True, timeout=1800, cwd=place
    )
    assert done.returncode == 0, (given, done.stderr[-3000:])
    return done


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo(tmp_path, hub, owner):
    given = ("demo", "--tokens", "8000", "--seed", "3")
    done = _command(tmp_path, *given)
    for noise in ("{'loss'", "torchao", "bitsandbytes", "gemm_4bit", "_pytree"):
        assert noise not in done.stdout + done.stderr, noise
    for row in ROWS:
        assert f"\n{row} " in done.stdout, row
    found, next_steps = done.stdout.split("\nWhat was found\n")[1].split("\nNext\n")
    lines = found.splitlines()
    assert [any(said in line for said in SAID) for line in lines] == [True, True, True, False, False]
    tuned, untuned, blocks, gate, published = (line.removeprefix("  ") for line in lines)
    assert tuned.startswith("The best hybrid (") and "the best baseline (" in tuned
    assert untuned.startswith("Before tuning the components, the best hybrid (")
    assert blocks.startswith("The tuned two-block hybrid") and "the tuned one-block hybrid" in blocks
    means = [float(one) for one in re.findall(r"(0\.\d\d) to (?:neox_prose|mamba_code)", gate)]
    assert len(means) == 4 and sum(means[:2]) == pytest.approx(1, abs=0.02) == sum(means[2:])
    assert "gives the same logits to the last bit; it takes 2,400 bytes with the untuned components" in published

    kept = tmp_path / "manticore-demo"
    assert (kept / "losses.png").stat().st_size > 10_000
    for name in ("one_block", "two_blocks"):
        recipe = load_recipe(kept / name / "recipe.yaml")
        assert recipe.seed == 3
        for number, stage in enumerate(["compose", *(stage for stage, _ in recipe.stages)]):
            folder = kept / name / f"{number}-{stage}"
            assert json.loads((folder / "stage.json").read_text())["stage"] == stage
            logged = (folder / "training.log").read_text() if stage not in ("compose", "calibrate") else ""
            assert all(json.loads(line)["step"] for line in logged.splitlines())
            assert bool(logged) == (stage not in ("compose", "calibrate"))
    searched = ManticoreForCausalLM.from_pretrained(kept / "two_blocks" / "3-search")
    tuned = ManticoreForCausalLM.from_pretrained(kept / "two_blocks" / "4-finetune")
    assert tuned.config.mixture_weights[0] == pytest.approx(searched.mixture_weights()[0].tolist(), abs=1e-6)
    assert (kept / "two_blocks" / "3-search" / "plots" / "alpha.png").is_file()
    report = (kept / "one_block" / "report.html").read_text()
    measured = json.loads((kept / "one_block" / "2-finetune" / "evaluation.json").read_text())
    own = measured["bits_per_byte"][measured["own"]]  # the report tells what was printed, not what a sample says
    assert re.search(rf"hybrid, 1 block, tuned jointly .*{own:.4f}\n", done.stdout) and f"{own:.4f} bits per" in report
    assert {"original neox_prose", "original mamba_code"} < set(measured["losses"]) and set(measured["by_kind"]) > {
        "code"
    }
    assert report.count("<svg") > 1 and (kept / "one_block" / "report.html").as_uri() in done.stdout

    commands = [shlex.split(line) for line in next_steps.splitlines() if line.startswith("  manticore-hf ")]
    assert [one[1] for one in commands] == ["compare", "report", "inspect", "push"]
    (compare, report, inspect, push) = (one[1:] for one in commands)
    _command(tmp_path, *compare, "--learning-rates", "1e-3", "--gate-learning-rates", "1e-3")
    assert "Written: manticore-demo" in _command(tmp_path, *report).stdout
    assert "neox_prose" in _command(tmp_path, *inspect).stdout
    _command(tmp_path, *[f"{owner}/first" if one == "you/my-first-hybrid" else one for one in push])
    assert ManticoreForCausalLM.from_pretrained(f"{owner}/first").config.component_names == ["neox_prose", "mamba_code"]

    other = subprocess.run(
        [sys.executable, "-m", "manticore_hf.cli", "demo", "--tokens", "9000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert other.returncode == 2 and "holds a demo on other text" in other.stderr
