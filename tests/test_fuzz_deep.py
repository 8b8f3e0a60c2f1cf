"""The fuzz tests with all their examples, at random; without `slow`, each tries a tenth of them, always the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_fuzz_config.py", "test_fuzz_recipe.py", "test_fuzz_files.py"])
def test_every_example(name, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        tmp_path / "x",
    ]
    done = subprocess.run(
        [*command, Path(__file__).with_name(name)], env={**os.environ, "FUZZ": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
