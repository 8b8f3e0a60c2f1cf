"""A hybrid of two components of over 100M parameters each, trained in bfloat16 on one GPU, from text to generation.

    python benchmarks/gpu_run.py TEXT --output benchmarks/results/gpu_run.json

No weights can be downloaded where this was made: both components (a GPT-NeoX of Pythia-160M's shape, a Mamba of
Mamba-130M's) start from random weights, and the tokenizer is trained on TEXT. So losses say that training works, and
nothing about hybrids. What runs is what a user runs: the plan of a recipe and `manticore-hf run` of it (everything is
trained), `from_pretrained` of what it leaves, `generate` with a cache and without.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from manticore_hf.cli import main as manticore_hf
from manticore_hf.plan.plan import make_plan

COMPONENTS = {
    "pythia": (
        "gpt_neox",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 2048,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 768, "num_hidden_layers": 24}),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def make_tokenizer(text, size):
    """A byte-level BPE trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([text], trainers.BpeTrainer(vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_component(folder, kind, settings, tokenizer, size):
    """Saves a causal LM of random weights with the tokenizer; returns its number of parameters."""
    torch.manual_seed(0)
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=size, **ids, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def run_recipe(folder, args, components):
    """Plans and runs a recipe; returns what was planned and measured, and the log."""
    finetune = {
        "max_steps": args.steps, "learning_rate": 6e-4, "per_device_train_batch_size": args.batch,
        "bf16": args.device == "cuda", "logging_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 10,
        "save_strategy": "no",
    }  # fmt: skip
    recipe = Path(folder, "recipe.yaml")
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "gpu-run",
                "components": components,
                "hybrid": {"num_blocks": 1, "dtype": "float32"},
                "data": {
                    "data": str(Path(args.text).resolve()),
                    "block_size": args.length,
                    "validation_fraction": 0.02,
                },
                "stages": [{"finetune": finetune}],
            }
        )
    )
    planned = make_plan(str(recipe), 1, "80GB", device=args.device, allow_outside=True)["stages"]
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.time()
    if manticore_hf(["run", str(recipe), "--allow-outside", "--output-dir", f"{folder}/run"]):
        raise SystemExit("the recipe failed")
    peaks = [option["peak"] for one in planned for option in one["options"] if option["engine"] == "one device"]
    found = {"seconds": time.time() - start, "planned_peak": max(peaks)}
    if cuda:
        found["measured_peak"] = torch.cuda.max_memory_allocated() - before
    logs = []
    for state in sorted(Path(folder, "run").rglob("trainer_state.json")):
        logs.append(json.loads(state.read_text())["log_history"])
    found["training_seconds"] = sum(row.get("train_runtime", 0) for log in logs for row in log)
    found["flops"] = sum(stage["flops"] for stage in planned)
    found["flops_per_second"] = found["flops"] / found["training_seconds"]
    return found, logs


@torch.no_grad()
def generation(folder, args):
    """Loads a finished hybrid as a user does and generates; cached and uncached greedy tokens must be the same."""
    dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, device_map=args.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids.to(args.device)
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **settings)
    uncached = model.generate(ids, use_cache=False, **settings)
    out = {
        "class": type(model).__name__,
        "cached equals uncached": torch.equal(cached, uncached),
        "text": tokenizer.decode(cached[0]),
    }
    model = model.to(torch.bfloat16)
    model.generate(ids, **settings)
    rows = ids.repeat(16, 1)
    start = time.time()
    model.generate(rows, **settings)
    if args.device == "cuda":
        torch.cuda.synchronize()
    out["tokens per second, 16 rows, bfloat16"] = 16 * 64 / (time.time() - start)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--small", action="store_true", help="tiny components, to try the command")
    args = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, parts = make_tokenizer(str(args.text), args.vocabulary), []
        for name, (kind, settings) in COMPONENTS.items():
            settings = {key: SMALL[key] for key in settings if key in SMALL} if args.small else settings
            parts.append(f"{folder}/{name}")
            result[name] = make_component(parts[-1], kind, settings, tokenizer, args.vocabulary)
        result["finetune"], logs = run_recipe(folder, args, parts)
        result["losses"] = [row for log in logs for row in log if "loss" in row or "eval_loss" in row]
        done = sorted(path.parent for path in Path(folder, "run").rglob("model.safetensors.index.json"))
        done = done or sorted(path.parent for path in Path(folder, "run").rglob("model.safetensors"))
        result["generation"] = generation(done[-1], args)
    if args.output:
        names = ("torch", "transformers", "mamba_ssm", "causal_conv1d")
        versions = {}
        for name in names:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = None
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        result = {"date": time.strftime("%Y-%m-%d"), "device": device, "versions": versions, **result}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1)[:6000])


if __name__ == "__main__":
    main()
