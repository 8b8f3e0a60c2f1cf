"""The command line: `manticore-hf COMMAND --help`.

Commands import what they need when they run, so that `--help` is quick.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile

STAGES = {
    "compose": "join pretrained models into a hybrid",
    "calibrate": "solve for a hybrid's projectors in closed form",
    "pretrain": "train projectors and mixture, components frozen",
    "search": "search the mixture weights",
    "finetune": "fine-tune everything at fixed mixture weights",
    "harden": "keep one component per block, and heal by distillation",
}


def main(argv=None):
    """Entry point of `manticore-hf`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="manticore-hf", description="Pretrained hybrids.")
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in STAGES:  # these take every option of TrainingArguments
        if argv[0] in ("compose", "calibrate"):
            from manticore_hf.training.untrained_stages import main as stage
        elif argv[0] == "harden":
            from manticore_hf.training.distill import main as stage
        else:
            from manticore_hf.training.trained_stages import main as stage

        return stage(argv[0], argv[1:])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adds = (_add_demo, _add_run, _add_convert, _add_evaluate, _add_compare, _add_inspect, _add_report, _add_push)
    for add in (*adds, _add_plan, _add_families, _add_mad, _add_mad_profile, _add_lra):
        add(commands)
    for name, text in STAGES.items():
        commands.add_parser(name, help=text, add_help=False)
    args = parser.parse_args(argv)
    from manticore_hf.modeling.configuration_manticore import ManticoreError

    try:
        return args.run(args) or 0
    except ManticoreError as err:
        print(f"manticore-hf {args.command}: {err}", file=sys.stderr)
        return 2


def _later(module):
    """A module's `main`, imported when it is run."""
    return lambda args: importlib.import_module(module).main(args)


def _add_demo(commands):
    command = commands.add_parser(
        "demo",
        help="join two tiny pretrained models, train the joint, publish it to a local Hub, load it back",
        description="Joins the two tiny components shipped with the package (a GPT-NeoX that knows prose, a Mamba that "
        "knows code), trains projectors and mixture, then everything, on text of Python's standard library, prints "
        "the losses beside those of every rival on the same tokens, and publishes the hybrid to a Hub on this machine. "
        "Needs no network; a few minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--output-dir", help="keep the hybrids here (default: a temporary directory, removed)")
    command.add_argument("--tokens", type=int, default=80_000, help="training tokens of every model")
    command.add_argument("--seed", type=int, default=0, help="random seed")
    command.set_defaults(run=_demo)


def _demo(args):
    from manticore_hf.testing.local_hub import LocalHub

    with tempfile.TemporaryDirectory(prefix="manticore-demo-") as scratch, LocalHub() as hub:
        output = args.output_dir or os.path.join(scratch, "hybrids")
        # A process of its own: huggingface_hub reads the address of the Hub when it is imported, which it is by now.
        command = [sys.executable, "-m", "manticore_hf.demo.demo", "--output-dir", output]
        command += ["--tokens", str(args.tokens), "--seed", str(args.seed)]
        return subprocess.run(command, env={**os.environ, **hub.environment(os.path.join(scratch, "home"))}).returncode


def _add_run(commands):
    command = commands.add_parser(
        "run",
        help="run all stages of a recipe",
        description="Runs the stages of a YAML recipe, each in a directory of its own; finished stages are skipped, so "
        "the same command goes on after a kill.",
    )
    command.add_argument("recipe", help="the YAML file")
    command.add_argument("--output-dir", required=True, help="directory below which every stage writes its own")
    command.add_argument("--seed", type=int, help="random seed instead of the recipe's")
    command.set_defaults(run=_run)


def _run(args):
    from manticore_hf.training.recipe import run_recipe

    run_recipe(args.recipe, args.output_dir, args.seed)


def _add_convert(commands):
    command = commands.add_parser(
        "convert",
        help="make a component of a checkpoint in mamba_ssm's layout, a GGUF file or a pickle",
        description="Writes a checkpoint that hybrids do not read (mamba_ssm's own layout, GGUF, pickles) as a "
        "directory with safetensors and tokenizer, which they do. Pickles are read with weights_only; one that holds "
        "anything but tensors is refused. What was written is read back and compared.",
    )
    command.add_argument("source", help="directory, .gguf file or Hub repo (org/name, org/name@revision)")
    command.add_argument("--output-dir", required=True, help="directory to write; new or empty")
    command.add_argument(
        "--tokenizer",
        help="directory or repository of the tokenizer (default: the source's; for "
        "mamba_ssm's layout that of EleutherAI/gpt-neox-20b)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights written (default: the widest stored; for GGUF float32)",
    )
    command.add_argument("--gguf-file", help="name of a GGUF file in the directory or repository")
    command.add_argument("--revision", help="revision of a Hub repo")
    command.set_defaults(run=_later("manticore_hf.compose.convert.convert"))


def _add_evaluate(commands):
    command = commands.add_parser(
        "evaluate",
        help="losses or task scores of a hybrid beside those of its components and their ensemble",
        description="Prints the loss of a hybrid, of each of its components alone and of their plain ensemble on a "
        "text, in nats per token (--data), or their scores on tasks of the lm-evaluation-harness (--tasks).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--model", required=True, help="the hybrid: directory or Hub repo")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="text, jsonl, csv or parquet file, or a Hub data set")
    what.add_argument("--tasks", help="tasks of the lm-evaluation-harness: arc_easy,hellaswag")
    command.add_argument("--data-split", default="train", help="split of a Hub data set")
    command.add_argument("--block-size", type=int, default=512, help="tokens per row")
    command.add_argument("--max-tokens", type=int, help="use at most so many tokens (default: all)")
    command.add_argument("--batch-size", type=int, default=8, help="rows per forward pass")
    command.add_argument("--include-path", help="--tasks: directory with task definitions of your own")
    command.add_argument("--num-fewshot", type=int, help="--tasks: examples before each question (default: the task's)")
    command.add_argument("--limit", type=int, help="--tasks: documents of each task (default: all)")
    command.add_argument("--output-dir", help="also write evaluation.json (--data) or tasks.json (--tasks) there")
    command.add_argument("--seed", type=int, default=0, help="random seed of few-shot examples")
    command.set_defaults(run=_evaluate)


def _evaluate(args):
    if args.tasks is not None:
        from manticore_hf.compare.harness import run_tasks

        run_tasks(
            args.model,
            [task for task in args.tasks.split(",") if task],
            args.include_path,
            args.batch_size,
            args.num_fewshot,
            args.limit,
            args.output_dir,
            args.seed,
        )
        return
    from manticore_hf.evaluation.data import DataArguments
    from manticore_hf.evaluation.losses import run_evaluate

    data = DataArguments(
        data=args.data,
        data_split=args.data_split,
        block_size=args.block_size,
        max_tokens=args.max_tokens,
        validation_fraction=0.0,
    )
    run_evaluate(args.model, data, args.batch_size, args.output_dir)


def _add_compare(commands):
    command = commands.add_parser(
        "compare",
        help="train and test a recipe's hybrid and every rival at equal budget, over seeds",
        description="Trains the hybrid of a recipe and every rival a user has (each component tuned alone, also for as "
        "many FLOPs as the hybrid; their ensemble, plain, weighed, and with a gate per token) on the same tokens with "
        "the same grid of settings, chosen on a validation split, and tests them on the same documents: losses with "
        "intervals, paired tests, FLOPs and time. Finished runs are not repeated.",
    )
    command.add_argument("recipe", help="the YAML file; its finetune stage is what all models are tuned with")
    command.add_argument("--output-dir", required=True, help="directory of the runs and the comparison")
    command.add_argument(
        "--test",
        required=True,
        help="held-out documents: file, folder or Hub data set; a column 'kind' splits the losses",
    )
    command.add_argument(
        "--validation",
        help="text that settings are chosen on (default: the recipe's split, whose "
        "rows may come from documents that other rows train)",
    )
    command.add_argument("--test-split", help="split of a Hub data set (default: test)")
    command.add_argument("--max-test-tokens", type=int, help="test on at most so many tokens")
    command.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    recipe = "(default: the recipe's)"
    command.add_argument("--learning-rates", type=float, nargs="+", help=f"grid of fine-tuning {recipe}")
    command.add_argument("--gate-learning-rates", type=float, nargs="+", help=f"grid of gates trained alone {recipe}")
    command.add_argument("--epochs", type=float, nargs="+", help=f"grid of passes over the text {recipe}")
    command.add_argument("--blocks", type=int, nargs="+", help=f"hybrids of so many blocks {recipe}")
    command.add_argument("--projectors", nargs="+", help=f"of hybrids of several blocks: linear, mlp, none {recipe}")
    command.add_argument("--spaces", nargs="+", help=f"grid of mixture spaces: logprob, prob {recipe}")
    command.add_argument("--loss-weights", nargs="+", metavar="MIX:OWN", help=f"grid of the hybrids' losses {recipe}")
    command.add_argument("--from-tuned", action="store_true", help="also start hybrids from the tuned components")
    command.add_argument("--harden", action="store_true", help="also harden and heal every hybrid")
    command.add_argument("--singles", nargs="+", help="other models with the same tokenizer, tuned likewise")
    command.add_argument("--all-text", help="the components' own training text: also retrain each on all of it")
    command.add_argument("--retrain", nargs="+", help="only these components are retrained on all text")
    command.set_defaults(run=_later("manticore_hf.compare.compare"))


def _add_inspect(commands):
    command = commands.add_parser(
        "inspect",
        help="what a hybrid is and costs, without running its code or downloading weights",
        description="Prints a hybrid's settings and components; per block and component layers, alpha, parameters, "
        "FLOPs per token, bytes of cache per token and of constant state; the totals beside each component alone.",
    )
    command.add_argument("model", help="directory or Hub repo")
    command.add_argument("--revision", help="revision of a Hub repo")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_inspect)


def _inspect(args):
    from manticore_hf.hub.inspection import run_inspect

    run_inspect(args.model, args.revision, args.json)


def _add_plan(commands):
    command = commands.add_parser(
        "plan",
        help="does a recipe fit, on which engine, and how long does it take, before weights are downloaded",
        description="Estimates memory, FLOPs and hours of every stage of a recipe (or of fine-tuning a saved hybrid) "
        "from configurations alone, and says with which engine it fits: one device, DDP, FSDP2, with activation "
        "checkpointing, with CPU offload, LoRA or QLoRA. A training step is run on tensors without storage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("recipe", help="the YAML file, or a saved hybrid: directory or Hub repo")
    command.add_argument("--devices", type=int, default=1, help="number of devices")
    command.add_argument("--memory", default="80GB", help="memory of each device: 80GB (10^9), 24GiB (2^30) or bytes")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="kind of device")
    command.add_argument(
        "--flops",
        type=float,
        default=989e12,
        help="FLOP/s of a device at best, in the type computed in (H100, bf16: 989e12)",
    )
    command.add_argument("--utilization", type=float, default=0.35, help="share of them that training reaches")
    command.add_argument(
        "--reserve", type=float, default=0.08, help="share of the memory left to context, communication and fragments"
    )
    command.add_argument(
        "--tokens",
        help="tokens of the training text: 500M, 5e8 (default: counted where the text is "
        "here, else the recipe's max_tokens)",
    )
    command.add_argument("--sequence-length", type=int, help="tokens per row (default: the recipe's block_size)")
    command.add_argument("--batch-size", type=int, help="rows per device and micro-batch (default: the stages')")
    command.add_argument(
        "--configs",
        help="directory with org/name/config.json of components, read instead of the Hub (for gated or offline models)",
    )
    command.add_argument("--output-dir", help="also write plan.json, with every number, there")
    command.set_defaults(run=_later("manticore_hf.plan.plan"))


def _add_families(commands):
    command = commands.add_parser(
        "families",
        help="which model types of Transformers can be components, and why others are refused",
        description="Prints the table that came with the package. With --run every model type that has a causal LM is "
        "put through the contract again (cut, padded, cached, trained, saved and loaded, as a tiny random model). A "
        "killed run goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--type", nargs="+", metavar="NAME", help="only these model types: llama mamba")
    command.add_argument("--verdict", choices=("passes", "refused", "wrong", "unknown"), help="print only these")
    command.add_argument(
        "--run", action="store_true", dest="run_contract", help="run the contract with the installed Transformers"
    )
    command.add_argument(
        "--output-dir",
        help="--run: directory of the results, one JSON file per type; when all are "
        "there, also families.json and FAMILIES.md",
    )
    command.add_argument("--time-limit", type=int, default=300, help="--run: seconds for each type")
    command.set_defaults(run=_later("manticore_hf.families.sweep"))


def _add_report(commands):
    command = commands.add_parser(
        "report",
        help="is a hybrid worth it, what does it cost, why this mixture, what next: one HTML file, and Markdown",
        description="Writes report.html (self-contained) and report.md: a verdict by stated rules, what the hybrid "
        "costs beside its components, licences, and for engineers what each part is worth on held-out text. The "
        "verdict needs the comparison.json of `manticore-hf compare`. What is measured is kept in report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("directory", help="directory of a saved hybrid, or the output directory of manticore-hf run")
    command.add_argument("--data", help="file of held-out text (default: the validation split of the recipe's data)")
    command.add_argument(
        "--comparison",
        help="directory of a manticore-hf compare run (default: comparison.json in the directory or above it)",
    )
    command.add_argument("--output", help="write the report to this directory (default: the given one)")
    command.add_argument("--max-tokens", type=int, default=20_000, help="measure on at most so many tokens")
    command.add_argument("--block-size", type=int, help="tokens per row of --data (default: the recipe's, else 512)")
    command.add_argument("--batch-size", type=int, default=8, help="rows per forward pass")
    command.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the hybrid and measure it; --no-measure reports what is on disk",
    )
    command.set_defaults(run=_later("manticore_hf.report.write"))


def _add_push(commands):
    command = commands.add_parser(
        "push",
        help="publish a hybrid: weights, code, tokenizer, recipe, card and plots in one commit",
        description="Publishes a saved hybrid. Component weights that it references are not uploaded. The card is made "
        "from what is measured in the directory, and keeps what people wrote into it. Licences that conflict stop it.",
    )
    command.add_argument("model", help="directory of the hybrid")
    command.add_argument("repo_id", help="repository on the Hub, made if it is not there: you/name")
    command.add_argument("--private", action=argparse.BooleanOptionalAction, help="whether a new repository is private")
    command.add_argument("--revision", help="branch, made from main if it is not there")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--dry-run", action="store_true", help="list files and sizes, write nothing to the Hub")
    command.add_argument("--commit-message", help="default: Publish hybrid")
    command.add_argument(
        "--tokenizer",
        help="directory or repository of the tokenizer (default: the directory's, else "
        "that of the tokenizer component)",
    )
    command.add_argument("--recipe", help="recipe that made it (default: recipe.yaml in the directory)")
    command.add_argument("--license", help="the hybrid's licence (default: the one that satisfies all components')")
    command.add_argument("--commercial", action="store_true", help="commercial use is wanted: refuse what excludes it")
    command.add_argument("--override-licenses", action="store_true", help="publish although licences conflict")
    command.add_argument(
        "--card",
        choices=("merge", "local", "hub"),
        default="merge",
        help="which card the new one updates (default: the one with all edits)",
    )
    command.add_argument("--dataset", action="append", default=[], help="data set it was trained on (repeatable)")
    command.add_argument("--tag", action="append", default=[], help="tag for the card (repeatable)")
    command.set_defaults(run=_push)


def _push(args):
    from manticore_hf.hub.publish import print_published, publish

    tokenizer = None
    if args.tokenizer is not None:
        from manticore_hf.hub.upload import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
    same = (
        "recipe",
        "private",
        "revision",
        "create_pr",
        "dry_run",
        "commit_message",
        "license",
        "commercial",
        "override_licenses",
        "card",
    )
    options = {key: getattr(args, key) for key in same}
    out = publish(args.model, args.repo_id, tokenizer=tokenizer, datasets=args.dataset, tags=args.tag, **options)
    print_published(out)


def _add_models(command, layers):
    """Options of what is trained from scratch."""
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model type of Transformers: llama, mamba, gpt_neox, ...")
    what.add_argument("--hybrid", help="model types of a hybrid's components: llama,mamba")
    command.add_argument("--output-dir", required=True, help="directory of the results, one JSON file per run")
    command.add_argument("--layers", type=int, default=layers, help="layers of every model")
    command.add_argument("--hidden-size", type=int, default=128, help="width of every model")
    command.add_argument("--num-blocks", type=int, default=1, help="blocks of the hybrid")
    command.add_argument("--preset", default="default", help="settings of the hybrid: default or paper")
    command.add_argument(
        "--rivals",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train each of the hybrid's components alone",
    )
    command.add_argument(
        "--designed",
        action="store_true",
        help="also train a hybrid that was designed by hand: Mamba "
        "and attention layers in turn (Jamba without experts)",
    )


def _add_training(command, epochs, learning_rate, batch_size, weight_decay=0.0):
    command.add_argument("--epochs", type=int, default=epochs, help="passes over the training sequences")
    command.add_argument("--learning-rate", type=float, default=learning_rate, help="of AdamW, at the start")
    command.add_argument("--weight-decay", type=float, default=weight_decay, help="of AdamW")
    command.add_argument("--batch-size", type=int, default=batch_size, help="sequences per step")
    command.add_argument("--seed", type=int, default=0, help="random seed of sequences, weights and their order")


def _add_mad(commands):
    command = commands.add_parser(
        "mad",
        help="train a model or a hybrid from scratch on a MAD task, and print its accuracy",
        description="Trains a small model from scratch on one of the MAD tasks (in-context recall, fuzzy and noisy "
        "recall, selective copying, compression, memorization) and prints its accuracy, micro and macro; for a hybrid "
        "beside each component trained alone on the same sequences, and their ensemble. A finished run is not "
        "repeated. Defaults are the benchmark's; on a CPU give fewer epochs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "task",
        help="in-context-recall, fuzzy-in-context-recall, noisy-in-context-recall, "
        "selective-copying, compression or memorization",
    )
    _add_models(command, layers=2)
    for name, kind, text in (
        ("vocab-size", int, "token ids, special and noise tokens included"),
        ("seq-len", int, "tokens per sequence"),
        ("num-train", int, "training sequences"),
        ("num-test", int, "test sequences"),
        ("frac-noise", float, "share of pairs (compression: tokens) that are noise"),
        ("noise-vocab-size", int, "token ids that only noise uses"),
        ("tokens-to-copy", int, "tokens to copy (selective copying)"),
    ):
        command.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the task's)")
    _add_training(command, epochs=200, learning_rate=5e-4, batch_size=128)
    command.set_defaults(run=_later("manticore_hf.experiments.mad.train"))


def _add_mad_profile(commands):
    command = commands.add_parser(
        "mad-profile",
        help="what architectures are good at: each trained from scratch on all MAD tasks, as a table and a radar plot",
        description="Trains each model's family from scratch, at a small size, on easy versions of the MAD tasks, "
        "prints the accuracies, and writes them as profile.json and profile.png. Of a directory or Hub repo (of a "
        "hybrid: of each component) only the configuration is read. About a minute per model and task on one core; a "
        "finished run is not repeated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("models", help="model types of Transformers, directories or Hub repos: llama,mamba")
    command.add_argument("--output-dir", required=True, help="directory of the profile, and one JSON file per run")
    command.add_argument("--tasks", help="tasks of `manticore-hf mad`, or short: recall,copying (default: all six)")
    for name, default, text in (
        ("seq-len", 32, "tokens per sequence (compression: half of it; a quarter of them are copied)"),
        ("num-train", 1600, "training sequences (memorization: 256)"),
        ("num-test", 320, "test sequences"),
        ("layers", 2, "layers of every model"),
        ("hidden-size", 64, "width of every model"),
        ("steps", 400, "optimizer steps of every run, rounded up to whole passes over the sequences"),
        ("batch-size", 32, "sequences per step"),
        ("seeds", 1, "runs of every model and task, averaged"),
        ("seed", 0, "random seed of the first; the others count on"),
    ):
        command.add_argument(f"--{name}", type=int, default=default, help=text)
    command.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW, at the start of a cosine")
    command.set_defaults(run=_later("manticore_hf.experiments.mad.profile"))


def _add_lra(commands):
    command = commands.add_parser(
        "lra",
        help="train a model or a hybrid from scratch on a task of the Long Range Arena, and print its accuracy",
        description="Trains a small classifier from scratch on ListOps or Pathfinder, which are generated, or on texts "
        "(bytes) or images (grey pixels) of yours or of the Hub, and prints its accuracy; for a hybrid beside each "
        "component trained alone on the same sequences, and their ensemble. A finished run is not repeated. Defaults "
        "are long sequences and many: on a CPU give fewer and shorter ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("task", help="listops, pathfinder, text or image")
    _add_models(command, layers=4)
    for name, kind, text in (
        ("num-train", int, "training sequences (text, image: at most)"),
        ("num-test", int, "test sequences (text, image: at most)"),
        ("min-len", int, "fewest tokens of a sequence (listops)"),
        ("max-len", int, "most tokens of a sequence (listops, text)"),
        ("max-depth", int, "levels of nesting, the numbers' included (listops)"),
        ("max-args", int, "most arguments of an operator (listops)"),
        ("image-size", int, "height and width in pixels (pathfinder, image)"),
        ("path-len", int, "pixels of the two long paths (pathfinder)"),
        ("distractors", int, "short paths (pathfinder)"),
        (
            "data",
            str,
            "training data: file (csv, json, parquet), or data set with the splits train and test: a folder "
            "or a repository of the Hub (text, image)",
        ),
        ("test-data", str, "file of the test data, if --data is one (text, image)"),
        ("input-column", str, "column of the text or image"),
        ("label-column", str, "column of the label (text, image)"),
    ):
        command.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: the task's)")
    _add_training(command, epochs=10, learning_rate=1e-3, batch_size=32, weight_decay=0.01)
    command.set_defaults(run=_later("manticore_hf.experiments.lra.train"))


if __name__ == "__main__":
    sys.exit(main())
