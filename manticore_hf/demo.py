"""The whole way of a hybrid, on real input: compose, train, compare, publish, load back, generate.

    manticore-hf demo

Runs against the Hub that the environment names; `manticore-hf demo` starts one on loopback for it. The components are
the two shipped with the package, the text is that of the running Python's standard library (modules the components
have not seen). The numbers are what they are: rivals are printed beside the hybrid.
"""

import argparse
import time
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from manticore_hf import ManticoreForCausalLM
from manticore_hf.data import pack
from manticore_hf.demo_text import documents
from manticore_hf.evaluation import compare_losses
from manticore_hf.stages import set_stage

COMPONENTS = Path(__file__).parent / "demo_components"
NAMES = {"neox-prose": "prose", "mamba-code": "code"}
BLOCK = 256
PROMPTS = {"prose": "Return the name of the", "code": "def close(self):\n    self."}


def run(output_dir, tokens, seed):
    """Runs the demo.

    Args:
        output_dir: Where the hybrids are kept.
        tokens: Training tokens per hybrid.
        seed: Random seed.
    """
    start = time.time()
    logging.set_verbosity_error()
    set_seed(seed)
    api = HfApi()
    repos = {name: _publish_component(api, name) for name in NAMES}
    tokenizer = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    half = -(-tokens // BLOCK // 2)
    train = _mix({kind: pack(documents(kind, "train"), tokenizer, BLOCK, half) for kind in PROMPTS}, seed)
    test = {kind: pack(documents(kind, "test"), tokenizer, BLOCK, 60) for kind in PROMPTS}
    test["both"] = _mix(test, seed)
    _say(f"{len(train) * BLOCK:,} training tokens, half prose, half code; {len(test['both']) * BLOCK:,} test tokens.")

    rows, hybrids = {}, {}
    for blocks in (1, 2):
        _say(f"Composing {' + '.join(repos.values())} in {blocks} block(s).")
        model = ManticoreForCausalLM.from_components(list(repos.values()), num_blocks=blocks, dtype="float32")
        before = {kind: compare_losses(model, text, desc=f"Before training, {kind}") for kind, text in test.items()}
        _train(model, train, output_dir / f"training-{blocks}", seed)
        after = {kind: compare_losses(model, text, desc=f"After training, {kind}") for kind, text in test.items()}
        if blocks == 1:
            for name in [*model.config.component_names, "ensemble"]:
                rows[name] = {kind: losses[name] for kind, losses in before.items()}
        label = f"hybrid, {blocks} block{'s' * (blocks > 1)}"
        rows[f"{label}, before training"] = {kind: losses["hybrid"] for kind, losses in before.items()}
        rows[f"{label}, trained"] = {kind: losses["hybrid"] for kind, losses in after.items()}
        hybrids[blocks] = (model, after["both"]["hybrid"])
    _print_table(rows)
    best = min(hybrids, key=lambda blocks: hybrids[blocks][1])
    model = hybrids[best][0]
    _print_mixture(model, test)

    directory = output_dir / "hybrid"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    repo_id = api.create_repo("manticore-demo", exist_ok=True).repo_id
    commit = api.upload_folder(repo_id=repo_id, folder_path=directory).oid
    own = (directory / "model.safetensors").stat().st_size
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    _say(f"Published the hybrid of {best} block(s) to {repo_id}@{commit[:7]}: {own:,} bytes instead of {whole:,}.")

    loaded = AutoModelForCausalLM.from_pretrained(repo_id, dtype="float32")
    ids = torch.tensor(test["both"][:2]["input_ids"])
    with torch.no_grad():
        same = torch.equal(loaded(ids).logits, model(ids).logits)
    _say(f"Loaded it back through AutoModelForCausalLM; logits equal to the last bit: {'yes' if same else 'NO'}.")
    for kind, prompt in PROMPTS.items():
        given = tokenizer(prompt, return_tensors="pt")
        out = loaded.generate(**given, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
        print(f"--- {kind} ---\n{tokenizer.decode(out[0], skip_special_tokens=True)}")
    _say(f"Done in {time.time() - start:.0f} s.")
    return 0 if same else 1


def _publish_component(api, name):
    repo_id = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=COMPONENTS / name)
    return repo_id


def _mix(parts, seed):
    from datasets import concatenate_datasets

    shortest = min(len(part) for part in parts.values())
    return concatenate_datasets([part.select(range(shortest)) for part in parts.values()]).shuffle(seed=seed)


def _train(model, dataset, output_dir, seed):
    set_stage(model, "projectors")
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _say(f"Training {trained:,} of {model.num_parameters():,} parameters: the mixer; the components stay as they are.")
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    model.eval()


def _print_table(rows):
    kinds = list(next(iter(rows.values())))
    width = max(map(len, rows))
    print(f"\nTest loss, nats per token (lower is better)\n{'':{width}}" + "".join(f"{kind:>9}" for kind in kinds))
    for label, losses in rows.items():
        print(f"{label:{width}}" + "".join(f"{losses[kind]:9.3f}" for kind in kinds))
    print()


@torch.no_grad()
def _print_mixture(model, test):
    names = model.config.component_names
    print("Mixture weights of the trained hybrid, mean over tokens: " + " / ".join(names))
    for kind in PROMPTS:
        weights = model(torch.tensor(test[kind][:16]["input_ids"])).weights.mean((0, 1))
        print(f"  on {kind}: " + " / ".join(f"{w:.2f}" for w in weights.tolist()))
    print()


def _say(text):
    print(f"[demo] {text}", flush=True)


def main():
    """`python -m manticore_hf.demo`, against the Hub of the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raise SystemExit(run(args.output_dir, args.tokens, args.seed))


if __name__ == "__main__":
    main()
