"""The command line: help at once, one name for one thing, mistakes in a sentence, bugs with their traceback."""

import argparse
import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import clean_process
import pytest
from manticore_hf.modeling.settings_manticore import SETTINGS
from safetensors import SafetensorError
from tiny_hybrid import pair, save, write_text
from transformers import TrainingArguments

import manticore_hf
import manticore_hf_cli
from manticore_hf import ManticoreConfig, ManticoreForCausalLM, SearchArguments
from manticore_hf.cli import COMMANDS, main, parser_of
from manticore_hf.compare import CompareArguments
from manticore_hf.demo import demo
from manticore_hf.evaluation.data_arguments import DataArguments
from manticore_hf.training.recipe import find_recipe, load_recipe
from manticore_hf.training.stages import AFTER_COMPOSE, STAGES
from manticore_hf.utils.options import Parser, Renamed, from_namespace
from manticore_hf.utils.settings import FILLED, PRESETS, HybridSettings

ROOT = Path(__file__).parent.parent
TRAINED = [name for name, stage in STAGES.items() if stage.trains is not None]


def shell(code, *more):
    """What a process of its own prints, which starts where the console script does."""
    done = subprocess.run([sys.executable, "-c", code, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forked(code):
    """The same from a fork that has imported torch, and neither Transformers nor the package."""
    done = clean_process.run(["-c", code], cwd=ROOT, modules=clean_process.TORCH)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_help_imports_neither_torch_nor_transformers():
    code = """if True:
        import sys, manticore_hf_cli
        for command in [[], *([one] for one in sys.argv[1:])]:
            sys.argv = ["manticore-hf", *command, "--help"]
            try:
                manticore_hf_cli.main()
            except SystemExit as end:
                assert not end.code, command
        heavy = {"torch", "transformers", "datasets", "numpy", "huggingface_hub", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
        """
    printed = shell(code, *COMMANDS)
    assert printed.count("usage: manticore-hf ") == 1 + len(COMMANDS)
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed and command.help in printed


def test_a_command_registers_the_classes_before_it_runs():
    code = """if True:
        import sys, manticore_hf_cli
        sys.argv = ["manticore-hf", "families", "--type", "llama"]
        assert manticore_hf_cli.main() == 0
        from transformers import AutoConfig
        import manticore_hf
        assert type(AutoConfig.for_model("manticore")) is manticore_hf.ManticoreConfig
        """
    assert "LlamaForCausalLM" in forked(code)


def test_a_plain_import_registers_the_classes():
    """Also one of a name in it, also beside the command's module, and of whatever comes first."""
    code = """if True:
        import manticore_hf_cli
        from manticore_hf import ManticoreError
        from transformers import AutoConfig
        AutoConfig.for_model("manticore")
        """
    forked(code)


def test_options_have_hyphens_and_take_underscores():
    for name in COMMANDS:
        parser = parser_of(name)
        with_underscore = [one for one in parser._option_string_actions if "_" in one]
        assert not with_underscore, (name, with_underscore)
        for one in parser._option_string_actions:
            if one.startswith("--") and "-" in one[2:]:
                old = "--" + one[2:].replace("-", "_")
                assert parser._hyphened([old, f"{old}=a_b", "--", old]) == [one, f"{one}=a_b", "--", old]
    values = ["--model", "my_hybrid", "--data", "a_b.txt", "--output_dir=out_dir", "--block_size", "16"]
    args = parser_of("finetune").parse_args([*values, "--learning_rate", "1e-3", "--bf16"])
    assert (args.model, args.output_dir, args.block_size, args.learning_rate) == ("my_hybrid", "out_dir", 16, 1e-3)


def test_one_thing_has_one_name_everywhere():
    for name in COMMANDS:
        shown = parser_of(name).format_help()
        for old in ("--output ", "--output-path", "--out ", "--sequence-length", "--blocksize"):
            assert old not in shown, (name, old)
        for old in ("--reference ", "--train-dtype", "--calibration-dtype"):
            assert old not in shown, (name, old)
        assert name not in ("mad", "lra") or ("--num-train-epochs N" in shown and "--epochs" not in shown), name
        if name != "inspect" and name != "push":
            assert "--output-dir" in shown, name
    for command, old, new, value in (
        ("report", "--output", "output_dir", "there"),
        ("plan", "--sequence-length", "block_size", 64),
    ):
        with pytest.warns(FutureWarning, match=f"{old} is now --{new.replace('_', '-')}"):
            args = parser_of(command).parse_args(["x", old, str(value)])
        assert getattr(args, new) == value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parser_of("report").parse_args(["x", "--output-dir", "there"]).output_dir == "there"


def test_old_names_of_options_are_taken_with_a_warning():
    stage = "--model m --data d --output-dir o".split()
    for command, old, new, value in (
        ("calibrate", "--reference", "reference_component", "c1"),
        ("calibrate", "--calibration-dtype", "dtype", "bfloat16"),
        ("calibrate", "--calibration_dtype", "dtype", "bfloat16"),
        ("pretrain", "--train-dtype", "dtype", "bfloat16"),
        ("search", "--train-dtype", "dtype", "bfloat16"),
        ("finetune", "--train_dtype", "dtype", "bfloat16"),
        ("prune", "--train-dtype", "dtype", "bfloat16"),
    ):
        parser = parser_of(command)
        with pytest.warns(FutureWarning, match=f"is now --{new.replace('_', '-')};"):
            found = from_namespace(STAGES[command].arguments, parser.parse_args([*stage, old, value]))
        assert getattr(found, new) == value, (command, old)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = parser.parse_args([*stage, f"--{new.replace('_', '-')}", value])
        assert from_namespace(STAGES[command].arguments, again) == found, (command, old)
    for command in ("mad", "lra"):
        with pytest.warns(FutureWarning, match="--epochs is now --num-train-epochs;"):
            args = parser_of(command).parse_args("recall --model llama --output-dir o --epochs 3".split())
        assert args.epochs == 3
        args = parser_of(command).parse_args("recall --model llama --output-dir o --num-train-epochs 4".split())
        assert args.epochs == 4


def test_help_of_what_is_measured_names_every_baseline():
    for name in ("compare", "evaluate"):
        shown = " ".join(parser_of(name).format_help().split())
        assert "ensemble" in shown and "online mixture" in shown, name
    assert "online mixture" in COMMANDS["evaluate"].help


def test_help_names_options_as_they_are_typed():
    for name in STAGES:
        parser = parser_of(name, whole=False)
        fields = {action.dest for action in parser._actions if "_" in action.dest}
        for action in parser._actions:
            named = set(re.findall(r"\w+", action.help)) & fields
            assert action.help == argparse.SUPPRESS or not named, (name, action.option_strings, named)
    shown = " ".join(parser_of("compose").format_help().split())
    assert "see --block-layers" in shown and '"kind": as --bridge-kind' in shown and '"from_block": block' in shown
    assert "cut to --block-size," in " ".join(parser_of("calibrate").format_help().split())
    assert "--batch-size N " in parser_of("calibrate").format_help()


def test_compose_and_calibrate_take_what_they_use(capsys):
    own = {"output_dir", "seed", "use_cpu", "per_device_train_batch_size"}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in ("compose", "calibrate"):
        assert {action.dest for action in parser_of(name)._actions} & known == own, name
    with pytest.warns(FutureWarning, match="is now --batch-size"):
        words = "--model m --data d --output-dir o --per_device_train_batch_size 4 --use_cpu true".split()
        args = parser_of("calibrate").parse_args(words)
    assert (args.per_device_train_batch_size, args.use_cpu, args.seed) == (4, True, 42)
    with pytest.raises(SystemExit) as end:
        main(["calibrate", "--model", "m", "--data", "d", "--output-dir", "o", "--learning-rate", "1"])
    assert end.value.code == 2 and "there is no option --learning-rate" in capsys.readouterr().err


def test_stages_show_their_own_options_and_take_all_of_training_arguments(capsys):
    for name in TRAINED:
        texts = {}
        for option in ("--help", "--help-all"):
            with pytest.raises(SystemExit) as end:
                main([name, option])
            assert end.value.code == 0
            texts[option] = capsys.readouterr().out
        short, whole = texts.values()
        assert "--weight-decay" not in short and "TrainingArguments (see Transformers)" not in short
        heading = whole.index("TrainingArguments (see Transformers)")
        assert whole.index("\n  --model ") < heading < whole.index("\n  --weight-decay ")
        for field in dataclasses.fields(STAGES[name].arguments):
            assert f"--{field.name.replace('_', '-')}" in short
        dests = {action.dest for action in parser_of(name)._actions}
        assert {field.name for field in dataclasses.fields(TrainingArguments) if field.init} <= dests
    assert "--strategy" in texts["--help"] or "--strategy" in parser_of("search", whole=False).format_help()
    args = parser_of("search").parse_args(
        "--model m --data d --output-dir o --strategy gaea --lr-scheduler-type cosine".split()
    )
    arguments = from_namespace(SearchArguments, args)
    assert (arguments.strategy, arguments.logging_steps, arguments.lr_scheduler_type) == ("gaea", 1, "cosine")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save(ManticoreForCausalLM.from_components(pair(), num_blocks=2, mixture="static"), folder / "hybrid")
    write_text(folder / "text.txt", 300)
    return folder


def test_a_mistake_is_a_sentence_and_status_2(place, tmp_path, capsys):
    stage = ["--model", str(place / "hybrid"), "--data", str(place / "text.txt"), "--output-dir", str(tmp_path / "x")]
    stage += ["--block-size", "16", "--use-cpu"]
    (tmp_path / "bad.yaml").write_text("components: [a, b]\nstages: [boil]\n")
    for name in ("0-compose", "1-pretrain", "2-finetune"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for words, message in (
        (["fly"], "invalid choice: 'fly'"),
        (["plan", "x", "--devics", "2"], "there is no option --devics (did you mean --devices?)"),
        (["plan", "x", "--dev", "2"], "there is no option --dev"),  # no abbreviations
        (["plan", "x", "y"], "'y' is one too many"),
        (["plan", "x", "--devices", "many"], "invalid int value: 'many'"),
        (["inspect", str(tmp_path / "none")], "none"),
        (["run", str(tmp_path / "none.yaml"), "--output-dir", "o"], "none.yaml"),
        (["run", "none.yaml", "--output-dir", "o"], "does not exist, and is not one of those shipped: demo.yaml, "),
        (["run", str(tmp_path / "bad.yaml"), "--output-dir", "o"], "stage 'boil' is unknown"),
        (["compose", str(tmp_path / "none"), "b", "--output-dir", str(tmp_path / "x")], "none"),
        (["compose", "a", "b", "--block-layers", "{"], "block_layers='{' is not JSON"),
        (["calibrate", *stage, "--data", str(tmp_path / "no.txt")], "no.txt"),
        *(
            ([name, *stage[:4]], "the following arguments are required: --output-dir")
            for name in STAGES
            if name != "compose"
        ),
        (["compose", "a", "b"], "the following arguments are required: --output-dir"),
        (["finetune", *stage, "--learning-rate", "fast"], "invalid float value: 'fast'"),
        (["finetune", *stage, "--lr-scheduler-type", "wavy"], "'wavy'"),
        (["finetune", *stage, "--logging-steps", "0.5", "--eval-strategy", "sometimes"], "'sometimes'"),
        (["finetune", *stage, "--load-best-model-at-end", "--eval-strategy", "no"], "eval"),
        (["finetune", *stage, "--eval-strategy", "epoch", "--validation-fraction", "0"], "eval_dataset"),
        (["finetune", *stage, "--dtype", "float33"], "'float33' is not a torch dtype"),
        (["finetune", *stage, "--block-size", "1"], "--block-size is 1, must be at least 2 and at most 16,777,216"),
        (["finetune", *stage, "--model", str(tmp_path / "none")], "none"),
        (["finetune", *stage, "--model", "no such/thing at all"], "no such/thing"),
        (["search", *stage, "--strategy", "luck"], "strategy='luck'"),
        (["prune", *stage, "--distil-weight", "2"], "--distil-weight is 2.0, must be at least 0 and at most 1"),
        (["evaluate", "--model", str(place / "hybrid"), "--data", str(tmp_path / "no.txt")], "no.txt"),
        (["report", str(tmp_path / "none")], "none"),
        *(
            ([*words, option, "0"], f"{option} is 0, must be at least")
            for words in (["evaluate", *stage[:4]], ["report", str(place / "hybrid"), *stage[2:4]])
            for option in ("--batch-size", "--max-tokens", "--block-size")
        ),
        (["calibrate", *stage, "--batch-size", "0"], "--batch-size is 0, must be at least 1 and at most 65,536"),
        (["plan", str(place / "hybrid"), "--block-size", "0"], "--block-size is 0, must be at least 2"),
        (["app", str(place / "hybrid"), "--port", "99999999"], "--port is 99999999, must be at least 0"),
        (["app", str(place / "hybrid"), "--device", "foo"], "--device foo: torch has no such device here"),
        (["push", str(tmp_path / "none"), "me/x"], "none"),
        (["push", str(place / "hybrid"), "x", "--dry-run"], "'x' is no repository of the Hub; say whose it is: you/x"),
        (["convert", str(tmp_path / "none"), "--output-dir", str(tmp_path / "y")], "none"),
        # A name of a file is no name on the Hub, which is not asked
        (["evaluate", "--model", str(place / "hybrid"), "--data", "missing.txt"], "'missing.txt' is no file or folder"),
        (
            ["convert", str(tmp_path / "bad.yaml"), "--output-dir", str(tmp_path / "y")],
            "no existing directory or .gguf",
        ),
        (
            ["compose", str(tmp_path / "bad.yaml"), "b", "--output-dir", str(tmp_path / "x")],
            "neither a local directory",
        ),
        (
            ["evaluate", "--model", "nowhere", "--data", "missing.txt"],
            "There is no directory 'nowhere'; give a hybrid's",
        ),
        (
            ["evaluate", "--model", "me/model.GGUF", "--data", "missing.txt"],
            "'me/model.GGUF' is a GGUF file and no hybrid: `manticore-hf compose` makes a hybrid of such files, and",
        ),
        (["convert", ".", "--output-dir", str(tmp_path / "y")], f"The checkpoint {os.getcwd()!r} has no config.json"),
        # Before any work
        (["compose", "a", "b", "--output-dir", str(tmp_path / "bad.yaml")], "bad.yaml' is a file; give a directory"),
        (["app", str(tmp_path / "bad.yaml")], "has no config.json; give the directory of a saved hybrid"),
        (["app", str(tmp_path)], "has no config.json; give the directory of a saved hybrid"),
        (["inspect", str(tmp_path / "run")], f"give one, for example the last, {tmp_path / 'run' / '2-finetune'}"),
    ):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1] if said.strip() else ""
        assert status == 2, (words, said)
        assert message in last and last.startswith("manticore-hf"), (words, said)
        assert "Traceback" not in said, words
    assert not (tmp_path / "x" / "stage.json").exists()


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert not shown.out and all(f"  {name} " in shown.err for name in COMMANDS)


def test_a_bug_shows_its_traceback(monkeypatch):
    module = importlib.import_module(COMMANDS["inspect"].module)
    for error in (RuntimeError("a bug"), ValueError("another"), KeyError("x")):

        def broken(args, error=error):
            raise error

        monkeypatch.setattr(module, "main", broken)
        with pytest.raises(type(error)):
            main(["inspect", "me/x"])


def test_an_interrupt_is_a_line_and_status_130(monkeypatch, capsys):
    def stopped(args):
        raise KeyboardInterrupt

    for words, said in (
        (["inspect", "me/x"], "Interrupted."),
        (["compose", "a/b", "c/d", "--output-dir", "o"], "Interrupted."),
        (["run", "x.yaml", "--output-dir", "o"], "Interrupted; run the same command again to go on."),
        (["report", "o"], "Interrupted; run the same command again to go on."),
        (["families", "--run", "--output-dir", "o"], "Interrupted; run the same command again to go on."),
        (["evaluate", "--model", "a/b", "--data", "d", "--output-dir", "o"], "Interrupted."),
        (["evaluate", "--model", "a/b", "--tasks=t", "--output_dir", "o"], "Interrupted; run the same command again"),
        (["finetune", "--model", "a/b", "--data", "d", "--output-dir", "o"], "Interrupted; run the same command"),
    ):
        monkeypatch.setattr(importlib.import_module(COMMANDS[words[0]].module), "main", stopped)
        with pytest.raises(SystemExit) as end:
            main(words)
        shown = capsys.readouterr().err
        assert end.value.code == 130 and shown.startswith(f"\n{said}") and len(shown.strip().splitlines()) == 1


def test_an_interrupt_while_the_command_line_is_imported(monkeypatch):
    class Interrupted:
        def find_spec(self, name, *args):
            if name == "manticore_hf.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(manticore_hf_cli, "reading", False)
    monkeypatch.delitem(sys.modules, "manticore_hf.cli")
    monkeypatch.delattr(manticore_hf, "cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert manticore_hf_cli.main() == 130


@pytest.mark.slow
def test_an_interrupted_process_ends_without_a_traceback(tmp_path):
    """Itself, and one that it has started, which a terminal interrupts with it."""
    (tmp_path / "wait.py").write_text(
        "import time\n"
        "import manticore_hf_cli\n"
        "manticore_hf_cli.reading = True\n"
        "from manticore_hf.utils.interrupted import ends_if_interrupted\n"
        "with ends_if_interrupted():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(300)\n"
    )
    code = f"""if True:
        import subprocess, sys
        import manticore_hf_cli
        manticore_hf_cli.reading = True
        from manticore_hf import cli
        from manticore_hf.hub import inspect_command
        inspect_command.main = lambda args: subprocess.run([sys.executable, {str(tmp_path / "wait.py")!r}]).returncode
        sys.exit(cli.main(["inspect", "me/x"]))
        """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        # A shell starts what runs in its background with interrupts ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "\nInterrupted.\n")


def test_a_full_disk_is_a_sentence(monkeypatch, capsys):
    """Also where it is safetensors that meets it."""

    def full(args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("manticore_hf.hub.inspect_command.main", full)
    assert main(["inspect", "me/x"]) == 2
    assert "inspect: Error while serializing: I/O error: No space left on device" in capsys.readouterr().err


def test_shipped_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe in files("manticore_hf.recipes").iterdir():
        if recipe.name.endswith(".yaml"):
            assert find_recipe(recipe.name).read_text() == recipe.read_text()
            assert load_recipe(recipe.name).name
    Path("poc.yaml").write_text("components: [x/y]\nname: mine\n")
    assert load_recipe("poc.yaml").name == "mine"  # a file of that name comes first
    assert find_recipe("sub/poc.yaml") == Path("sub/poc.yaml")  # a path is a path


def test_the_demo_finds_what_is_shipped():
    for name in demo.KINDS:
        assert (demo.COMPONENTS / name / "model.safetensors").is_file()
    assert all((files("manticore_hf.recipes") / recipe).is_file() for recipe in demo.SHIPPED.values())


def test_one_list_of_a_hybrids_settings():
    """Configuration, command line and recipes take the same; each has its help."""
    defaults = {field.name: field.default for field in dataclasses.fields(HybridSettings)}
    assert SETTINGS == defaults  # what repositories carry
    names = set(defaults)
    said, preset = ManticoreConfig().to_dict(), PRESETS["default"]
    assert names - set(said) == {"preset"}
    for field in dataclasses.fields(HybridSettings):
        assert field.name == "preset" or said[field.name] in (field.default, preset.get(field.name), {})
        assert field.metadata["help"].endswith(".")
        assert (field.name in FILLED) == any(field.name in preset for preset in PRESETS.values())
    options = {action.dest for action in parser_of("compose")._actions}
    assert names - options == {"mixture_weights", "vocab_size"}
    for preset in PRESETS.values():
        assert set(preset) == set(FILLED)


def test_one_table_of_stages():
    assert list(STAGES) == ["compose", "calibrate", "pretrain", "search", "finetune", "prune"]
    assert list(AFTER_COMPOSE) == list(STAGES)[1:]
    for name, stage in STAGES.items():
        assert COMMANDS[name].help == stage.help and callable(stage.run)
        assert issubclass(stage.training_class, TrainingArguments)
        assert (stage.own_training is not None) == (stage.training_class is not TrainingArguments)


def test_the_dataclasses_become_options():
    args = parser_of("compare").parse_args(
        "r.yaml --output-dir o --test t --seeds 1 2 --prune --loss-weights 1:0 --epochs 0.5".split()
    )
    args.loss_weights = [(1.0, 0.0)]
    arguments = from_namespace(CompareArguments, args)
    assert (arguments.seeds, arguments.prune, arguments.from_tuned) == ((1, 2), True, False)
    assert (arguments.loss_weights, arguments.epochs, arguments.singles) == (((1.0, 0.0),), (0.5,), ())
    assert parser_of("compare").parse_args("--prune r.yaml --output-dir o --test t".split()).recipe == "r.yaml"
    for words, value in (([], False), (["--streaming"], True), (["--streaming", "false"], False)):
        args = parser_of("calibrate").parse_args(["--model", "m", "--data", "d", "--output-dir", "o", *words])
        assert from_namespace(DataArguments, args).streaming is value
    parser = Parser(prog="x")
    parser.add_argument("--new-name", type=int)
    parser.add_argument("--old-name", type=int, action=Renamed, new="--new-name")
    assert vars(parser.parse_args([])) == {"new_name": None} and "old-name" not in parser.format_help()


def test_two_names_of_an_option_with_two_values_are_refused(capsys):
    stage = "prune --model m --data d --output-dir o"
    cases = {
        f"{stage} --path loss --route alpha": "--path (loss) and, by its old name, --route (alpha) are given; drop",
        f"{stage} --route=alpha --path=loss": "--path (loss) and, by its old name, --route (alpha) are given; drop",
        f"{stage} --dtype float32 --train_dtype bfloat16": "--dtype (float32) and, by its old name, --train-dtype",
        "plan r.yaml --block-size 8 --sequence-length 9": "--block-size (8) and, by its old name, --sequence-",
        "mad recall --model llama --output-dir o --no-baselines --rivals": "--baselines (False) and, by its old name,",
    }
    for words, said in cases.items():
        with pytest.warns(FutureWarning), pytest.raises(SystemExit) as end:
            main(words.split())
        assert end.value.code == 2 and said in capsys.readouterr().err, words
    for words in (f"{stage} --path loss --route loss", f"{stage} --route loss", f"{stage} --path loss -- --route"):
        command, *words = words.split()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = vars(parser_of(command).parse_known_args(words)[0])
        assert found["path"] == "loss" and "--route" not in found, words


def test_a_warning_of_an_old_name_is_its_sentence_alone():
    code = """if True:
        import sys, warnings
        from manticore_hf import cli
        from manticore_hf.report import report_command
        report_command.main = lambda args: warnings.warn("another", FutureWarning)
        sys.stderr = sys.stdout
        cli.main(["report", "x", "--output", "there"])
        warnings.warn("x is now y", FutureWarning)
        """
    own, *others = shell(code).splitlines()
    assert own == "manticore-hf report: --output is now --output-dir; the old name goes with version 0.3."
    assert others[0].endswith("FutureWarning: another") and others[-1].endswith("FutureWarning: x is now y")
