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

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.calibrate import calibrate_projectors
from manticore_hf.data import pack
from manticore_hf.demo_text import documents
from manticore_hf.evaluation import compare_losses
from manticore_hf.stages import set_stage

COMPONENTS = Path(__file__).parent / "demo_components"
NAMES = {"neox-prose": "prose", "mamba-code": "code"}
BLOCK = 256
TUNING_RATE = 3e-4  # the best of 1e-4, 3e-4 and 1e-3 for each component alone, on the validation split
PROMPTS = {"prose": "Return the name of the", "code": "def close(self):\n    self."}


def run(output_dir, tokens, seed):
    """Runs the demo.

    Args:
        output_dir: Where the hybrids are kept.
        tokens: Training tokens of every model and hybrid.
        seed: Random seed.
    """
    start = time.time()
    logging.set_verbosity_error()
    set_seed(seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    api = HfApi()
    repos = {name: _publish_component(api, name) for name in NAMES}
    tokenizer = AutoTokenizer.from_pretrained(COMPONENTS / "neox-prose")
    half = -(-tokens // BLOCK // 2)
    train = _mix({kind: pack(documents(kind, "train"), tokenizer, BLOCK, half) for kind in PROMPTS}, seed)
    test = {kind: pack(documents(kind, "test"), tokenizer, BLOCK, 60) for kind in PROMPTS}
    tested = sum(map(len, test.values())) * BLOCK
    _say(f"{len(train) * BLOCK:,} training tokens, {tested:,} test tokens, half prose and half code.")

    frozen, joint = _frozen_components(list(repos.values()), train, test, output_dir, seed)
    tuned = _tuned_components(list(repos.values()), train, test, output_dir, seed, joint)
    _print_table("components as they are; only projectors and mixture trained", frozen)
    _print_table("components tuned on the same tokens, too", tuned)
    _verdict({**frozen, **tuned})
    model = joint["model"]
    _print_mixture(model, test)

    whole, same = sum(p.numel() * p.element_size() for p in model.parameters()), True
    for label, hybrid in (("components as they are", joint["frozen"]), ("everything trained", model)):
        loaded, equal = _publish(api, hybrid, tokenizer, output_dir, label, whole, test)
        same &= equal
    for kind, prompt in PROMPTS.items():
        given = tokenizer(prompt, return_tensors="pt")
        out = loaded.generate(**given, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
        print(f"--- {kind} ---\n{tokenizer.decode(out[0], skip_special_tokens=True)}")
    _say(f"Done in {time.time() - start:.0f} s.")
    return 0 if same else 1


def _publish(api, model, tokenizer, output_dir, label, whole, test):
    """Saves, pushes and loads back. Returns the loaded hybrid, and whether its logits are the same to the last bit."""
    name = f"manticore-demo-{label.replace(' ', '-')}"
    model.save_pretrained(output_dir / name)
    tokenizer.save_pretrained(output_dir / name)
    repo_id = api.create_repo(name, exist_ok=True).repo_id
    commit = api.upload_folder(repo_id=repo_id, folder_path=output_dir / name).oid
    own = (output_dir / name / "model.safetensors").stat().st_size
    _say(f"Published {repo_id}@{commit[:7]}: {own:,} bytes of weights, of {whole:,} ({label}).")
    loaded = AutoModelForCausalLM.from_pretrained(repo_id, dtype="float32")
    ids = torch.tensor(test["code"][:2]["input_ids"])
    with torch.no_grad():
        equal = torch.equal(loaded(ids).logits, model(ids).logits)
    _say(f"Loaded it back through AutoModelForCausalLM; logits equal to the last bit: {'yes' if equal else 'NO'}.")
    return loaded, equal


def _publish_component(api, name):
    repo_id = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=COMPONENTS / name)
    return repo_id


def _mix(parts, seed):
    from datasets import concatenate_datasets

    shortest = min(len(part) for part in parts.values())
    return concatenate_datasets([part.select(range(shortest)) for part in parts.values()]).shuffle(seed=seed)


def _frozen_components(repos, train, test, output_dir, seed):
    """Hybrids whose components stay as they are. Returns the table's rows, and the one-block hybrid."""
    rows, joint = {}, {}
    for blocks in (1, 2):
        label = f"hybrid, {blocks} block{'s' * (blocks > 1)}"
        _say(f"Composing {' + '.join(repos)} in {blocks} block(s).")
        model = ManticoreForCausalLM.from_components(repos, num_blocks=blocks, dtype="float32")
        if blocks > 1:
            found = calibrate_projectors(model, train, tokens=30_000)
            _say(f"Projectors calibrated in closed form on {found.tokens:,} tokens; reference {found.reference}.")
        before = _evaluate(model, test, label)
        _train(set_stage(model, "projectors"), train, output_dir / f"projectors-{blocks}", seed, 1e-2)
        after = _evaluate(model, test, label)
        if blocks == 1:
            rows.update({name: before[name] for name in [*model.config.component_names, "ensemble"]})
            joint["frozen"] = model
        rows[f"{label}, before training"], rows[f"{label}, trained"] = before["hybrid"], after["hybrid"]
    return rows, joint


def _tuned_components(repos, train, test, output_dir, seed, joint):
    """The hybrid trained end to end, and its rivals on the same tokens. Returns the table's rows.

    Fair by construction: the gated rival's components and then its gate see the tokens once each, the hybrid's gate and
    then all of it do.
    """
    rows, parts = {}, []
    for repo_id in repos:
        part = AutoModelForCausalLM.from_pretrained(repo_id, dtype="float32")
        _train(part, train, output_dir / "component", seed, TUNING_RATE)
        parts.append(ComponentSpec(part, name=repo_id.split("/")[-1].replace("-", "_")))
    apart = ManticoreForCausalLM.from_components(parts)
    losses = _evaluate(apart, test, "tuned components")
    for name in apart.config.component_names:
        rows[f"{name}, tuned alone"] = losses[name]
    rows["ensemble of the tuned components"] = losses["ensemble"]
    _train(set_stage(apart, "projectors"), train, output_dir / "gate", seed, 1e-2)
    rows["token gate over the tuned components"] = _evaluate(apart, test, "gate")["hybrid"]
    model = ManticoreForCausalLM.from_components(repos, dtype="float32")
    model.hybrid_mixer.load_state_dict(joint["frozen"].hybrid_mixer.state_dict())
    _train(set_stage(model, "finetune"), train, output_dir / "joint", seed, TUNING_RATE)
    rows["hybrid, trained jointly"] = _evaluate(model, test, "hybrid")["hybrid"]
    joint["model"] = model
    return rows


def _evaluate(model, test, label):
    """{row: {kind of text: loss, and "both": their mean, since there is as much of each}}."""
    found = {kind: compare_losses(model, text, desc=f"Testing {label}, {kind}") for kind, text in test.items()}
    rows = {}
    for name in next(iter(found.values())):
        rows[name] = {kind: found[kind][name] for kind in test}
        rows[name]["both"] = sum(rows[name].values()) / len(test)
    return rows


def _train(model, dataset, output_dir, seed, learning_rate):
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _say(f"Training {trained:,} of {model.num_parameters():,} parameters of {type(model).__name__}.")
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    model.eval()


def _verdict(rows):
    """Says how the best hybrid does against the best of everything a user has without one."""
    hybrids = {label: row["both"] for label, row in rows.items() if label.startswith("hybrid")}
    rivals = {label: row["both"] for label, row in rows.items() if label not in hybrids}
    one, other = min(hybrids, key=hybrids.get), min(rivals, key=rivals.get)
    gain = rivals[other] - hybrids[one]
    word = "better" if gain > 0 else "worse"
    _say(f"The best hybrid ({one}) is {abs(gain):.3f} nats per token {word} than the best rival ({other}).\n")


def _print_table(title, rows):
    kinds = list(next(iter(rows.values())))
    width = max(map(len, rows))
    print(f"\nTest loss in nats per token (lower is better), {title}")
    print(" " * width + "".join(f"{kind:>9}" for kind in kinds))
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
    parser.add_argument("--tokens", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raise SystemExit(run(args.output_dir, args.tokens, args.seed))


if __name__ == "__main__":
    main()
