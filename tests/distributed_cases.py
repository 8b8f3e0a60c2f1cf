"""What runs once in one process and once in two, with the same global batch: training of tiny hybrids, every way.

    python -m torch.distributed.run --nproc-per-node 2 tests/distributed_cases.py FOLDER CASE...

Each case returns plain numbers; rank 0 also leaves the final weights as FOLDER/CASE.pt. Models are in float64, so that
what differs between one process and two is not the order of a sum.
"""

import json
import os
import sys
from pathlib import Path

import cpu_fsdp
import torch
from aligned_pairs import hybrid as aligned_hybrid
from aligned_pairs import tokenizer
from datasets import Dataset
from peft import get_peft_model
from processes import report, same
from tiny_hybrid import QUIET, mixed_hybrid, rows_of
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from two_tokenizers import FIRST, SECOND

from manticore_hf import ManticoreForCausalLM, calibrate_projectors, lora_config, prune, set_stage
from manticore_hf.evaluation.losses import compare_losses
from manticore_hf.families.tiny import tiny_config, tiny_model
from manticore_hf.training.distill import DistilTrainer
from manticore_hf.training.freezing import ComponentClipping, fix_alpha
from manticore_hf.training.search import SearchArguments, SearchTrainer, alpha_history
from manticore_hf.training.trained_stages import HybridTrainer
from manticore_hf.utils.distributed import all_reduce, gathered, main_first, world

GLOBAL_BATCH = 4
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


def text(count=24):
    """Rows of which every one has another number of labels, so that means over tokens and over rows differ."""
    rows = rows_of(count).to_dict()
    rows["labels"] = [[-100] * (i % 7) + ids[i % 7 :] for i, ids in enumerate(rows["labels"])]
    return Dataset.from_dict(rows)


def settings(**changes):
    """Settings of a trainer whose processes share GLOBAL_BATCH rows, in two micro-batches each."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    values = {
        **QUIET, "max_steps": 3, "per_device_train_batch_size": GLOBAL_BATCH // 2 // processes,
        "per_device_eval_batch_size": GLOBAL_BATCH // processes, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "seed": 3,
    }  # fmt: skip
    return {**values, **changes}


def train(
    kind, model, folder, name, callbacks=(), arguments=TrainingArguments, resume=None, text=text, then=None, **changes
):
    own = {key: changes.pop(key) for key in ("teacher",) if key in changes}
    trainer = kind(
        model=model,
        args=arguments(output_dir=str(folder / name), **settings(**changes)),
        train_dataset=text(),
        eval_dataset=text(8),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        **own,
    )
    if "fsdp" in changes:
        trainer.add_callback(DividedGradients())
    trainer.train(resume_from_checkpoint=resume)
    if "fsdp" in changes:
        check_sharded(trainer.model)
    if then is not None:
        then(trainer)
    evaluated = {key: value for key, value in trainer.evaluate().items() if key.startswith("eval_loss")}
    log = trainer.state.log_history
    kept = ("loss", "gate", "grad_norm", "eval_loss")
    rows = [{key: row[key] for key in row if key.split("/")[0] in kept} for row in log]
    return finish(trainer, folder, name, log=[row for row in rows if row], evaluated=evaluated)


class DividedGradients(TrainerCallback):
    """Between micro-batches, too, no rank holds whole gradients."""

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        trained = [one for one in model.parameters() if one.requires_grad and one.grad is not None]
        assert trained and all(isinstance(one.grad, DTensor) for one in trained)


def check_sharded(model):
    """Every parameter, frozen ones included, is held in parts that add up to it."""
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    local = torch.tensor(sum(parameter.to_local().numel() for parameter in parameters))
    whole = sum(parameter.numel() for parameter in parameters)
    assert local < 0.6 * whole, f"this rank holds {local} of {whole} numbers"
    assert all_reduce(local.clone()) == whole


def finish(trainer, folder, name, **found):
    """Leaves the weights, and adds alpha (every step's, and its final one as this rank has it) to what was found."""
    model = trainer.model
    state = gathered(trainer, model)
    state = model.state_dict() if state is None else state
    if world()[0] == 0:
        torch.save({key: value.detach().clone() for key, value in state.items()}, folder / f"{name}.pt")
    hybrid = model.get_base_model() if hasattr(model, "get_base_model") else model
    found["alpha"] = hybrid.mixture_weights().tolist()
    found["history"] = alpha_history(trainer.state.log_history)[1]
    return found


def hybrid(**changes):
    changes = {"num_blocks": 2, "mixture": "static", **changes}
    return mixed_hybrid(**changes).double()


def search(strategy, **more):
    def run(folder, name, **changes):
        changes = {"strategy": strategy, "alpha_learning_rate": 0.1, "entropy_penalty": 0.05, **more, **changes}
        model = hybrid(embeddings="mixed")
        return train(SearchTrainer, model, folder, name, arguments=SearchArguments, **changes)

    return run


def bridged(folder, name, **changes):
    """A search over bridges of both kinds, whose maps are trained on the way; not every place has as many."""
    edges = ["others", {"from": "part_0", "to": "part_1", "to_block": 1, "from_block": 0, "kind": "attention"}]
    model = hybrid(num_blocks=1, mixture="token", topology="bridge", bridge_alpha=True, bridges=edges)
    with torch.no_grad():
        for parameter in model.hybrid_mixer.bridges.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    changes = {"strategy": "gaea", "alpha_learning_rate": 0.5, "cost_penalty": 0.05, **changes}
    return train(SearchTrainer, model, folder, name, arguments=SearchArguments, **changes)


def pretrain(folder, name, **changes):
    return train(HybridTrainer, set_stage(hybrid(embeddings="mixed"), "projectors"), folder, name, **changes)


def finetune(folder, name, **changes):
    """The default preset's form: one block, native ends, a token gate; alpha has no use."""
    model = set_stage(hybrid(num_blocks=1, mixture="token", component_loss_weight=0.5), "finetune")
    return train(HybridTrainer, model, folder, name, **changes)


def told(folder, name, **changes):
    """What DDP may be told, which changes nothing; a static graph goes with steps of one batch only, in any model."""
    more = {"ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": True, "ddp_static_graph": True}
    rows = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1))
    more |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": rows}
    return finetune(folder, name, **more, **changes)


def clipped(folder, name, **changes):
    model = set_stage(hybrid(), "finetune")
    callbacks = [ComponentClipping(0.05)]
    return train(HybridTrainer, model, folder, name, callbacks, max_grad_norm=0.0, **changes)


def paper(folder, name, **changes):
    """The paper's preset, with weights fixed so that one component is not run in the first block, checkpointed."""
    model = mixed_hybrid(num_blocks=2, preset="paper").double()
    model.set_mixture_weights([[1.0, 0.0], [0.3, 0.7]])
    changes = {"gradient_checkpointing": True, "ddp_find_unused_parameters": True, **changes}
    return train(HybridTrainer, set_stage(model, "finetune"), folder, name, **changes)


def mixed(folder, name, **changes):
    """bf16 with activations computed again in the backward pass, by FSDP's own way where it shards."""
    model = set_stage(hybrid(num_blocks=1, mixture="token").float(), "finetune")
    if "fsdp_config" in changes:
        changes["fsdp_config"] = {**changes["fsdp_config"], "activation_checkpointing": True}
    else:
        changes["gradient_checkpointing"] = True
    return train(HybridTrainer, model, folder, name, [Precise()], bf16=True, learning_rate=3e-2, **changes)


class Precise(TrainerCallback):
    """Looks at results where the Trainer gets them, after what FSDP2 does to them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(results_are_precise)


def results_are_precise(module, args, out):
    """Predictions are mixed, and losses computed, in float32; the weights of a token add up to 1."""
    assert out.logits.dtype == out.loss.dtype == out.weights.dtype == torch.float32
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(out.weights.shape[:-1]), atol=1e-6, rtol=0)


def one_component(folder, name, **changes):
    """Native ends and weights that leave a component out everywhere: its embeddings and head are never read."""
    model = hybrid()
    model.set_mixture_weights("part_0")
    return train(HybridTrainer, set_stage(model, "search"), folder, name, **changes)


def lora(folder, name, **changes):
    model = hybrid(embeddings="mixed")
    torch.manual_seed(5)
    model = get_peft_model(model, lora_config(model, r=2, lora_alpha=16))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.1)
    return train(HybridTrainer, model.double(), folder, name, **changes)


def heal(folder, name, **changes):
    teacher, student = hybrid(num_blocks=1), hybrid(embeddings="mixed")
    return train(DistilTrainer, set_stage(fix_alpha(student), "finetune"), folder, name, teacher=teacher, **changes)


def resumed(folder, name, make=lambda: set_stage(hybrid(), "finetune"), **changes):
    """Goes on from a checkpoint, and from another start, as if it had not been stopped; then takes the best one."""
    changes = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
        "learning_rate": 0.05, **changes,
    }  # fmt: skip
    whole = train(HybridTrainer, make(), folder, name, **changes)
    for step in (2, 4):
        state = json.loads((folder / name / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(folder / name / "checkpoint-2"), f"forgotten at step {step}"
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    last = str(folder / name / "checkpoint-2")
    again = train(HybridTrainer, other, folder, f"{name}-again", resume=last, **changes)
    same(whole, again, "resumed")
    first, second, loaded = (row["eval_loss"] for row in whole["log"] if "eval_loss" in row)
    assert loaded == first > second, "the best checkpoint was not taken"
    return again


def sharded(folder, name, **changes):
    """As `resumed`, each rank writing its own shards of a checkpoint (where there are shards)."""
    if "fsdp_config" in changes:
        changes["fsdp_config"] = {**changes["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    return resumed(folder, name, **changes)


def buffers(folder, name, **changes):
    """As accelerate's own default has it: shards are cut on the meta device. Apertus has buffers in its state dict."""
    if "fsdp_config" in changes:
        changes["fsdp_config"] = {**changes["fsdp_config"], "cpu_ram_efficient_loading": True}
    parts = [tiny_model(tiny_config(kind)) for kind in ("apertus", "gpt_neox")]
    model = prune(ManticoreForCausalLM.from_components(parts, num_blocks=2), ["apertus", "gpt_neox"])
    with torch.no_grad():
        for key, value in model.named_buffers():
            if key.endswith(("act_fn.beta", "alpha_logits")):
                value += 0.25  # not what a new model would have
    return train(HybridTrainer, set_stage(model.double(), "finetune"), folder, name, **changes)


def sentences(kind):
    """Rows of words in the tokens of one of the tokenizers of `aligned_pairs`, padded on the right."""

    def rows(count=24):
        words, drawn = (FIRST + SECOND).split(), torch.Generator().manual_seed(3)
        texts = [words[i : i + 4 + i % 5] for i in torch.randint(0, len(words) - 9, (count,), generator=drawn).tolist()]
        ids = [tokenizer(kind)(" ".join(one), add_special_tokens=False).input_ids[:24] for one in texts]
        padded = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return Dataset.from_dict(
            {
                key: [([1] * len(one) if key == "attention_mask" else one) + [fill] * (24 - len(one)) for one in ids]
                for key, fill in padded.items()
            }
        )

    return rows


def aligned(*parts, **settings):
    """Components with tokenizers of their own, the first one's that of the hybrid; trained, saved and loaded."""

    def run(folder, name, **changes):
        home = folder / f"{name}-parts"

        def make():
            torch.manual_seed(4)
            with main_first():  # the others save nothing
                home.mkdir(exist_ok=True)
                model = aligned_hybrid(home, parts, component_loss_weight=0.5).double()
            with torch.no_grad():
                for parameter in model.hybrid_mixer.parameters():
                    parameter += 0.3 * torch.randn_like(parameter)
            return set_stage(model, "finetune")

        def check_saved(trainer):
            state = gathered(trainer, trainer.model)
            if world()[0] == 0:
                trainer.model.save_pretrained(folder / f"{name}-saved", state_dict=state)
                loaded = ManticoreForCausalLM.from_pretrained(folder / f"{name}-saved", dtype=torch.float64)
                loaded = loaded.state_dict()
                state = trainer.model.state_dict() if state is None else state
                assert loaded.keys() == state.keys()
                for key, value in loaded.items():
                    assert torch.equal(value, state[key].to(value.dtype)), key  # of the mixer, which is float32

        rows = sentences(parts[0][1])
        return resumed(folder, name, make, text=rows, then=check_saved, **{**settings, **changes})

    return run


def calibrate(folder, name):
    """Of five batches two processes have three and two."""
    model = hybrid(embeddings="mixed")
    found = calibrate_projectors(model, rows_of(10), batch_size=2)
    if world()[0] == 0:
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return {"losses": found.losses, "r2": found.r2, "reference": found.reference, "tokens": found.tokens}


def evaluate(folder, name):
    """Seven rows in batches of two: the last one is short, and one process has none left for it."""
    return compare_losses(hybrid(), rows_of(7), batch_size=2)


def repeated(folder, name, **changes):
    """Nine rows in batches of four: of the last, two processes are given a row and a copy, and two copies."""
    model = hybrid(num_blocks=1, mixture="token", component_loss_weight=0.5)
    arguments = TrainingArguments(output_dir=str(folder / name), **settings(**changes))
    trainer = HybridTrainer(model=model, args=arguments, eval_dataset=text(9), data_collator=default_data_collator)
    found = trainer.evaluate()
    return {key: value for key, value in found.items() if key.startswith(("eval_loss/", "eval_gate"))}


CASES = {
    "darts": search("darts"), "darts_bilevel": search("darts_bilevel"), "gaea": search("gaea", cost_penalty=0.05),
    "dash": search("dash"), "pretrain": pretrain, "finetune": finetune, "clipped": clipped, "paper": paper,
    "one_component": one_component, "lora": lora, "heal": heal, "resumed": resumed, "sharded": sharded,
    "buffers": buffers, "bridged": bridged, "repeated": repeated, "mixed": mixed, "calibrate": calibrate,
    "evaluate": evaluate, "told": told, "aligned": aligned(("llama", "gpt"), ("gpt_neox", "gemma")),
    "aligned_mamba": aligned(("llama", "gemma"), ("mamba", "gpt")),
    "aligned_checkpointed": aligned(("llama", "gemma"), ("mamba", "gpt"), gradient_checkpointing=True),
}  # fmt: skip


def run(folder, names, **changes):
    """{case: what it found}."""
    return {name: CASES[name](Path(folder), name, **changes) for name in names}


def main(folder, *names):
    torch.set_num_threads(1)
    sharded = "--fsdp" in names
    if sharded:
        cpu_fsdp.allow()
    TrainingArguments(output_dir=folder, use_cpu=True)  # joins the processes
    names = [name for name in names if not name.startswith("--")]
    report(folder, run(folder, names, **(FSDP if sharded else {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
