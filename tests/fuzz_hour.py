"""All fuzz tests for as long as is asked: `python tests/fuzz_hour.py --output DIR --seconds 3600`.

Each iteration is one example of a test, drawn from a seed that is its name and number, so that a finding comes again
(`--again TARGET:NUMBER`). The target with the least CPU time for its weight is next. What is done is noted in DIR, and
the same command goes on from there, also after a crash, which is a finding itself. A finding is an error that is no
message, more than 10 s of CPU time, more than 1 GB of memory, or a file, process or connection outside of DIR.
"""

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

MODULES = ("test_fuzz_config", "test_fuzz_recipe", "test_fuzz_files")
PARSERS = {  # {parser: (its share of the time, its tests)}
    "config": (3, ["test_fuzz_config.test_changed_values_as_dicts", "test_fuzz_config.test_changed_values",
                   "test_fuzz_config.test_what_can_be_built_also_loads_and_runs", "test_fuzz_config.test_inspection",
                   "test_fuzz_config.test_garbled_text", "test_fuzz_config.test_components",
                   "test_fuzz_config.test_generation_configurations",
                   "test_fuzz_config.test_a_save_that_fails_leaves_no_file"]),
    "index": (1, ["test_fuzz_files.test_indices_of_shards"]),
    "safetensors header": (1, ["test_fuzz_files.test_headers_of_safetensors"]),
    "recipe": (2, ["test_fuzz_recipe.test_changed_values", "test_fuzz_recipe.test_garbled_text",
                   "test_fuzz_recipe.test_bytes_that_are_no_text", "test_fuzz_recipe.test_tags_construct_nothing"]),
    "card": (1, ["test_fuzz_files.test_cards"]),
    "GGUF": (2, ["test_fuzz_files.test_gguf_headers", "test_fuzz_files.test_gguf_files"]),
    "mamba_ssm configuration": (1, ["test_fuzz_files.test_configurations_of_mamba_ssm"]),
    "note of an unfinished save": (1, ["test_fuzz_files.test_notes_of_unfinished_saves"]),
    "stage, evaluation, comparison": (2, ["test_fuzz_files.test_stage_evaluation_and_comparison_files"]),
    "scores of tasks": (1, ["test_fuzz_files.test_scores_of_tasks"]),
}  # fmt: skip
MADE = {  # {(argument, module): how it is made}
    ("saved", "test_fuzz_config"): lambda module, root, _: module.save_hybrids(root),
    ("parts", "test_fuzz_config"): lambda module, root, _: module.save_parts(root),
    ("models", "test_fuzz_config"): lambda module, root, values: module.load_all(values.made(module, "saved")),
    ("whole", "test_fuzz_files"): lambda module, root, _: module.write_gguf(root),
    ("saved", "test_fuzz_files"): lambda module, root, _: module.gather_saved(root),
}
SECONDS, MEMORY = 10.0, 10**9  # of one iteration


class Outside(BaseException):
    """Raised where a file is written, a process started or a connection made; no handler of Exception swallows it."""


class Watch:
    """An audit hook: what a stranger's file makes the process do outside of a folder."""

    _WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    _RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn")

    def __init__(self, folder):
        self.folder, self.active, self.seen = os.path.realpath(folder), False, []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.active:
            return
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else "w" in (mode or "")
            named = isinstance(path, (str, bytes))
            if named and os.fsdecode(path).endswith("passwd"):
                self.report(f"read {path!r}")
            if named and writes and not self.inside(path):
                self.report(f"open {path!r} to write")
        elif event in self._WRITES:
            folders = [number for number in args if type(number) is int and number >= 0 and event != "os.chmod"]
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if folders and isinstance(path, str):  # relative to an opened folder, as `shutil.rmtree` does
                    path = os.path.join(f"/proc/self/fd/{folders[0]}", path)
                if isinstance(path, (str, bytes, os.PathLike)) and not self.inside(path):
                    self.report(f"{event} {path!r}")
        elif event in self._RUNS:
            self.report(f"{event} {args!r}"[:300])

    def inside(self, path):
        real = os.path.join(os.path.realpath(os.path.dirname(os.fsdecode(path)) or "."), "")
        return os.fsdecode(path) == os.devnull or real.startswith((f"{self.folder}/", "/dev/shm/"))

    def report(self, what):
        self.seen.append(what)
        raise Outside(what)


def peak():
    """Bytes of memory of this process at the most, since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


class Values:
    """What the tests take as arguments, by name."""

    def __init__(self, folder, modules):
        self.folder, self.modules = folder, modules

    def get(self, module, name, rng):
        config, recipe = self.modules["test_fuzz_config"], self.modules["test_fuzz_recipe"]
        fuzzing = sys.modules["fuzzing"]
        if name == "tmp_path":
            return self.folder / "tmp"
        if name == "folder":
            return config.with_configuration(self.made(module, "saved"), self.folder / "tmp")
        return {
            "random": lambda: rng,
            "name": lambda: rng.choice(sorted(config.HYBRIDS if module is config else recipe.RECIPES)),
            "family": lambda: rng.choice(sorted(config.FAMILIES)),
            "garble": lambda: rng.random() < 0.5,
            "data": lambda: rng.randbytes(rng.randrange(40)),
            "tag": lambda: rng.choice(recipe.TAGS),
            "key": lambda: rng.choice(fuzzing.HOSTILE_KEYS),
            "value": lambda: rng.choice(fuzzing.HOSTILE_VALUES),
        }.get(name, lambda: self.made(module, name))()

    @cache  # noqa: B019
    def made(self, module, name):
        """Models and folders that the examples of a module share."""
        root = self.folder / module.__name__ / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        return MADE[name, module.__name__](module, root, self)


def one(test, module, values, number, watch):
    """One example of a test: (CPU seconds, bytes of memory, what went wrong or None)."""
    function = getattr(module, test).hypothesis.inner_test
    rng = random.Random(f"{module.__name__}.{test}:{number}")
    shutil.rmtree(values.folder / "tmp", ignore_errors=True)
    (values.folder / "tmp").mkdir()
    arguments = {
        name: values.get(module, name, rng) for name in function.__code__.co_varnames[: function.__code__.co_argcount]
    }
    wrong, watch.seen = None, []
    forget_peak()
    before, begin = peak(), time.process_time()
    watch.active = True
    try:
        function(**arguments)
    except Exception:
        wrong = traceback.format_exc()
    except BaseException as err:  # a hang, or an act outside
        if isinstance(err, (KeyboardInterrupt, SystemExit)):
            raise
        wrong = traceback.format_exc()
    finally:
        watch.active = False
    took, memory = time.process_time() - begin, peak() - before
    if wrong is None and watch.seen:
        wrong = f"it was swallowed: {watch.seen}"
    if wrong is None and (took > SECONDS or memory > MEMORY):
        wrong = f"{took:.1f} s of CPU time, {memory / 1e6:.0f} MB"
    return took, memory, wrong


def cpu_time():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder of the log and of all files")
    parser.add_argument("--seconds", type=float, default=3600, help="of CPU time, all runs in this folder together")
    parser.add_argument("--again", help="run one example, TARGET:NUMBER, and show what comes of it")
    args = parser.parse_args()
    output = args.output.resolve()
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        HF_HOME=str(work / "hf"),
        HF_HUB_OFFLINE="1",
        TMPDIR=str(work),
        TOKENIZERS_PARALLELISM="false",
        MPLCONFIGDIR=str(work),
        NUMBA_CACHE_DIR=str(work),
        XDG_CACHE_HOME=str(work),
    )
    sys.dont_write_bytecode = True
    faulthandler.enable()
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzzing

    counts = Counter()
    limit = fuzzing.guarded  # here by the time of the processor: the machine may be busy with other work
    fuzzing.guarded = lambda seconds=SECONDS: limit(SECONDS, signal.SIGPROF, signal.ITIMER_PROF)
    plain = fuzzing.outcome
    fuzzing.outcome = lambda *a, **k: (
        counts.update([found := "read" if plain(*a, **k) else "rejected"]) or found == "read"
    )
    modules = {name: importlib.import_module(name) for name in MODULES}
    import torch

    torch.set_num_threads(1)
    values, watch = Values(work, modules), Watch(output)
    if args.again:
        target, _, number = args.again.rpartition(":")
        module, _, test = target.partition(".")
        print(one(test, modules[module], values, int(number), watch)[2] or "nothing went wrong")
        return
    run(args, output, modules, values, watch, counts)


def run(args, output, modules, values, watch, counts):
    """Draws examples until the time is over; `state.json` has the sums, `findings.jsonl` what went wrong."""
    share = {test: weight / len(tests) for weight, tests in PARSERS.values() for test in tests}
    parser_of = {test: name for name, (_, tests) in PARSERS.items() for test in tests}
    state = {"cpu": 0.0, "tests": {}}
    if (output / "state.json").is_file():
        state = json.loads((output / "state.json").read_text())
    for test in share:
        state["tests"].setdefault(
            test, {"next": 0, "cpu": 0.0, "memory": 0, "slowest": 0.0, "read": 0, "rejected": 0, "findings": 0}
        )
    if (output / "running").is_file():  # the last process died of it
        test, number = json.loads((output / "running").read_text())
        state["tests"][test]["next"] = max(state["tests"][test]["next"], number + 1)
        note(output, state, [test, number], "the process died", parser_of)
    before, saved, offset = state["cpu"], time.monotonic(), cpu_time()
    while state["cpu"] < args.seconds:
        test = min(share, key=lambda name: state["tests"][name]["cpu"] / share[name])
        mine, number = state["tests"][test], state["tests"][test]["next"]
        mine["next"] = number + 1
        (output / "running").write_text(json.dumps([test, number]))
        counts.clear()
        faulthandler.dump_traceback_later(3000, exit=True)  # where no handler of Python's is asked
        module, _, name = test.partition(".")
        took, memory, wrong = one(name, modules[module], values, number, watch)
        faulthandler.cancel_dump_traceback_later()
        mine["cpu"] += took
        mine["slowest"], mine["memory"] = max(mine["slowest"], took), max(mine["memory"], memory)
        for key in ("read", "rejected"):
            mine[key] += counts[key]
        state["cpu"] = before + cpu_time() - offset
        (output / "running").unlink()
        if wrong is not None:
            note(output, state, [test, number], wrong, parser_of)
        if wrong is not None or time.monotonic() - saved > 5:
            write(output, state)
            saved = time.monotonic()
    write(output, state)
    print(summary(state, parser_of))


def note(output, state, where, wrong, parser_of):
    test, number = where
    state["tests"][test]["findings"] += 1
    with open(output / "findings.jsonl", "a") as file:
        file.write(json.dumps({"example": f"{test}:{number}", "parser": parser_of[test], "wrong": wrong}) + "\n")


def write(output, state):
    (output / "state.json.new").write_text(json.dumps(state, indent=1))
    os.replace(output / "state.json.new", output / "state.json")
    with open(output / "log", "a") as file:
        done = sum(one["next"] for one in state["tests"].values())
        found = sum(one["findings"] for one in state["tests"].values())
        file.write(f"{time.strftime('%H:%M:%S')} {state['cpu']:.0f} s of CPU, {done} examples, {found} findings\n")


def summary(state, parser_of):
    """A table in Markdown: one row per parser."""
    lines = ["| parser | examples | read | rejected | findings | CPU seconds | slowest, s | most memory, MB |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for parser in PARSERS:
        rows = [row for test, row in state["tests"].items() if parser_of[test] == parser]
        sums = [sum(row[key] for row in rows) for key in ("next", "read", "rejected", "findings", "cpu")]
        worst = [max(row[key] for row in rows) for key in ("slowest", "memory")]
        lines.append(
            f"| {parser} | {sums[0]:,} | {sums[1]:,} | {sums[2]:,} | {sums[3]} | {sums[4]:.0f} | {worst[0]:.1f} | "
            f"{worst[1] / 1e6:.0f} |"
        )
    return "\n".join([*lines, f"\n{state['cpu']:.0f} s of CPU time in all."])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
