"""Forked processes are as clean as started ones, and behave as these."""

import os
import signal
import subprocess
import sys

import clean_process
import pytest

STATE = """
import random, sys, threading
import numpy, torch
print(sorted(name for name in sys.modules if name.startswith(("test_", "conftest", "pytest", "_pytest"))))
print(torch.cuda.is_initialized(), threading.active_count(), torch.is_grad_enabled())
print(sys.argv, __name__, sys.path[0])
"""


def test_nothing_of_a_test_is_in_it(tmp_path):
    """One after the other are alike, and like one that was started; what another has drawn is not."""
    done = subprocess.run([sys.executable, "-c", STATE, "x"], capture_output=True, text=True, check=True, cwd=tmp_path)
    for modules in (clean_process.PACKAGE, clean_process.TRANSFORMERS, clean_process.TORCH):
        for _ in range(2):
            found = clean_process.run(["-c", STATE, "x"], cwd=tmp_path, modules=modules)
            assert found.returncode == 0 and found.stdout == done.stdout, found
    loaded = "import sys; print('manticore_hf' in sys.modules, 'transformers' in sys.modules)"
    assert clean_process.run(["-c", loaded]).stdout == "True True\n"
    assert clean_process.run(["-c", loaded], modules=clean_process.TRANSFORMERS).stdout == "False True\n"
    assert clean_process.run(["-c", loaded], modules=clean_process.TORCH).stdout == "False False\n"
    code = "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())"
    drawn = [clean_process.run(["-c", code]).stdout.split() for _ in range(3)]
    assert all(len(set(one)) == 3 for one in zip(*drawn))


def test_arguments_streams_and_status(tmp_path):
    (tmp_path / "one.py").write_text("import sys, two\nprint(sys.argv[1:], two.__name__, file=sys.stderr)\nsys.exit(3)")
    (tmp_path / "two.py").write_text("")
    done = clean_process.run([tmp_path / "one.py", "a", "b c"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "['a', 'b c'] two\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MINE": "1"}
    done = clean_process.run(["-m", "one"], env=environment, cwd="/")
    assert (done.returncode, done.stderr) == (3, "[] two\n")
    done = clean_process.run(
        ["-c", "import os; print(os.environ['MINE'], os.getcwd()); 1 / 0"], env=environment, cwd="/"
    )
    assert done.returncode == 1 and done.stdout == "1 /\n" and "ZeroDivisionError" in done.stderr
    code = "import atexit; atexit.register(print, 'at exit'); raise SystemExit('in words')"
    done = clean_process.run(["-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (1, "at exit\n", "in words\n")


def test_what_is_read_before_the_fork_must_be_the_same(monkeypatch):
    with pytest.raises(AssertionError, match="HF_HUB_OFFLINE is read before the fork"):
        clean_process.run(["-c", ""], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    code = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert clean_process.run(["-c", code], env=environment, modules=clean_process.TORCH).stdout == "True\n"


def test_pipes_and_signals():
    pipe = subprocess.PIPE
    code = "import sys; print('ready', flush=True); print(sys.stdin.read()[::-1])"
    process = clean_process.start(["-c", code], stdin=pipe, stdout=pipe)
    assert process.stdout.readline() == "ready\n" and process.poll() is None
    process.stdin.write("abc")
    process.stdin.close()
    assert process.stdout.read() == "cba\n" and process.wait(60) == 0 == process.poll()
    process = clean_process.start(["-c", code], stdin=pipe, stdout=pipe)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process = clean_process.start(["-c", code], stdin=pipe, stdout=pipe)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        clean_process.run(["-c", "import time; time.sleep(60)"], timeout=0.1)
