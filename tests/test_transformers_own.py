"""Transformers' own tests of models pass on hybrids, as far as on a plain model: see `transformers_own.py`."""

import json
import os
import subprocess
import sys

import pytest
from transformers_own import KINDS, source

# Plain GPT-NeoX passes 114 of the 160 tests of Transformers 5.24; the others need an accelerator, images, a package ...
MOST_SKIPPED = {
    "gpt_neox+llama": 3, "gpt_neox+mamba": 4, "gpt_neox+llama, two blocks": 2, "gpt_neox+mamba, two blocks": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of Transformers' sources, with its tests."""
    try:
        return source(tmp_path_factory.mktemp("transformers"))
    except OSError as err:
        pytest.skip(f"Transformers' tests cannot be had (TRANSFORMERS_SOURCE names their checkout): {err}")


def run(sources, kind):
    environment = {**os.environ, "TRANSFORMERS_SOURCE": str(sources), "CUDA_VISIBLE_DEVICES": ""}
    script = __file__.replace("test_transformers_own.py", "transformers_own.py")
    done = subprocess.run([sys.executable, script, kind], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", [kind for kind, families in KINDS.items() if len(families) > 1])
def test_transformers_own_tests_pass(sources, kind):
    plain, found = run(sources, "gpt_neox"), run(sources, kind)
    assert not plain["failed"] and not found["failed"], found["failed"]
    more = {name: reason for name, reason in found["skipped"].items() if name not in plain["skipped"]}
    assert found["passed"] >= plain["passed"] - MOST_SKIPPED[kind], more
