"""`manticore-hf plan` against measurement: peak memory of real training runs, on the CPU or on a GPU.

    python benchmarks/plan.py --output benchmarks/results/plan.json
    python benchmarks/plan.py --device cuda --output benchmarks/results/plan_cuda.json

Every case trains in a process of its own, with the project's Trainers, a hybrid of random weights (6M to 35M
parameters) for a few steps, and measures
* the process's peak resident memory (VmHWM, reset after the imports and a warm-up, with glibc told to give memory back
  at once), minus what was resident before the model was built;
* the peak of torch's CPU allocator in one micro-batch, from torch.profiler, which also sees what kernels allocate.
Neither knows of the estimator, which is run in the parent process from the configurations alone.

    python benchmarks/plan.py --processes 2 --output benchmarks/results/plan_processes.json

runs DDP and FSDP2 in two processes (gloo), and measures each one's peak of resident memory from the first step on.

On a GPU the hybrids are larger (56M to 850M parameters), all run in this process, and what is measured is the peak of
torch's CUDA allocator over what it held before the model was built. Plans for CUDA are those without mamba-ssm, so it
should not be installed.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = {"vocab_size": 4000, "hidden_size": 192}
LARGER = {"vocab_size": 12000, "hidden_size": 384}
PAIRS = {
    "neox+mamba, small": [
        ("gpt_neox", {**SMALL, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768}),
        ("mamba", {**SMALL, "num_hidden_layers": 6}),
    ],
    "neox+mamba": [
        ("gpt_neox", {**LARGER, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}),
        ("mamba", {**LARGER, "num_hidden_layers": 6}),
    ],
    "llama+mamba2": [
        (
            "llama",
            {
                **LARGER,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "intermediate_size": 1024,
            },
        ),
        (
            "mamba2",
            {**LARGER, "num_hidden_layers": 6, "num_heads": 12, "head_dim": 64, "n_groups": 1, "state_size": 64},
        ),
    ],
}
_PILE = {"vocab_size": 50280}
_WIDE = {"vocab_size": 1000, "hidden_size": 1024, "num_hidden_layers": 4}
_DEEP = {"vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 24}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
PAIRS |= {  # whose weights outweigh what they compute: in wide layers, and in many
    "wide": [("llama", {**_WIDE, "intermediate_size": 4096, **_HEADS}), ("mamba", _WIDE)],
    "deep": [("llama", {**_DEEP, "intermediate_size": 1408, **_HEADS}), ("mamba", _DEEP)],
}
PAIRS |= {  # of the sizes of Pythia-160M and Mamba-130M, Pythia-410M and Mamba-370M
    "pythia-160m+mamba-130m": [
        (
            "gpt_neox",
            {
                **_PILE,
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
            },
        ),
        ("mamba", {**_PILE, "hidden_size": 768, "num_hidden_layers": 24}),
    ],
    "pythia-410m+mamba-370m": [
        (
            "gpt_neox",
            {
                **_PILE,
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
        ),
        ("mamba", {**_PILE, "hidden_size": 1024, "num_hidden_layers": 48}),
    ],
}
BASE = {"stage": "finetune", "pair": "neox+mamba", "num_blocks": 1, "batch": 4, "length": 256}
CASES = [
    {},
    {"bf16": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "bf16": True},
    {"pair": "llama+mamba2"},
    {"stage": "pretrain"},
    {"stage": "search", "num_blocks": 2},
    {"stage": "prune"},
    {"lora": True},
    {"gradient_accumulation_steps": 2},
    {"pair": "llama+mamba2", "bf16": True, "gradient_checkpointing": True, "length": 512},
    {"pair": "neox+mamba, small", "batch": 8, "length": 256},
    {"pair": "neox+mamba, small", "batch": 2, "length": 1024, "gradient_checkpointing": True},
    {"pair": "llama+mamba2", "stage": "pretrain", "bf16": True, "num_blocks": 2},
    {"num_blocks": 2, "optim": "sgd"},
]
CUDA_BASE = {**BASE, "pair": "pythia-160m+mamba-130m", "length": 512}
CUDA_CASES = [
    {},
    {"bf16": True},
    {"bf16": True, "gradient_checkpointing": True, "batch": 16},
    {"lora": True},
    {"stage": "pretrain", "bf16": True, "num_blocks": 2},
    {"stage": "search", "bf16": True, "num_blocks": 2},
    {"stage": "prune", "bf16": True},
    {"bf16": True, "gradient_accumulation_steps": 2, "optim": "adamw_torch"},
    {"pair": "llama+mamba2", "bf16": True, "batch": 16},
    {"pair": "pythia-410m+mamba-370m", "bf16": True, "gradient_checkpointing": True, "batch": 4, "length": 512},
    {"pair": "pythia-410m+mamba-370m", "stage": "pretrain", "bf16": True, "batch": 8, "length": 512},
]
SEVERAL_CASES = [
    {"engine": "ddp"},
    {"engine": "ddp", "bf16": True, "gradient_checkpointing": True},
    {"engine": "fsdp2"},
    {"engine": "fsdp2", "gradient_checkpointing": True},
    {"engine": "fsdp2", "pair": "llama+mamba2", "gradient_checkpointing": True},
    {"engine": "fsdp2", "bf16": True, "train_dtype": "bfloat16", "gradient_checkpointing": True},
    {"engine": "fsdp2", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    {"engine": "fsdp2", "stage": "pretrain"},
    {"engine": "fsdp2", "lora": True},
    {"engine": "fsdp2", "optim": "sgd", "batch": 1},
    {"engine": "fsdp2", "pair": "wide", "batch": 1, "length": 64},
    {"engine": "fsdp2", "pair": "deep", "batch": 1, "length": 64},
]
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_TRAINING = ("gradient_checkpointing", "gradient_accumulation_steps", "bf16", "optim", "train_dtype")


def configuration(case):
    """The case's ManticoreConfig."""
    from transformers import AutoConfig

    from manticore_hf import ManticoreConfig

    parts = [{"name": kind, "config": AutoConfig.for_model(kind, **values)} for kind, values in PAIRS[case["pair"]]]
    settings = {"mixture": "static"} if case["stage"] == "search" else {}
    return ManticoreConfig(components=parts, num_blocks=case["num_blocks"], **settings)


def estimate(case, device, processes=1):
    """The plan's Option for a case: nothing but what the configurations say."""
    from manticore_hf.plan.engines import Machine, StagePlanner
    from manticore_hf.plan.schedule import make_task
    from manticore_hf.plan.subject import Subject

    settings = {key: case[key] for key in _TRAINING if key in case}
    if "train_dtype" in settings:  # as recorded cases have it
        settings["dtype"] = settings.pop("train_dtype")
    settings["per_device_train_batch_size"] = case["batch"]
    if case["stage"] == "prune":
        settings["path"] = PAIRS[case["pair"]][0][0]
    subject = Subject("case", configuration(case), [(case["stage"], settings)])
    task = make_task(subject, case["stage"], settings, length=case["length"])
    planner = StagePlanner(task, Machine(processes, 10**15, 0.0, device))
    sharded = case.get("engine") == "fsdp2"
    if case.get("lora"):
        return planner.lora(case["batch"], fsdp=sharded)
    if sharded:
        return planner.fsdp(case["batch"], task.checkpointing)
    return planner.unsharded(case["batch"], task.checkpointing, ddp=processes > 1)


def make_trainer(case, folder, device):
    """A Trainer as the stage makes it, and the micro-batch that it reads."""
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments

    from manticore_hf import ManticoreForCausalLM, SearchArguments, SearchTrainer, lora_config, prune, set_stage
    from manticore_hf.training.distill import DistilTrainer
    from manticore_hf.training.freezing import fix_alpha
    from manticore_hf.training.stages import STAGES
    from manticore_hf.training.trained_stages import HybridTrainer

    config, stage = configuration(case), case["stage"]
    model = ManticoreForCausalLM(config)
    rows = case["batch"] * case.get("gradient_accumulation_steps", 1) * 2 * int(os.environ.get("WORLD_SIZE", 1))
    ids = torch.randint(0, config.vocab_size, (rows, case["length"])).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    settings = {key: case[key] for key in _TRAINING if key in case}
    model.to(getattr(torch, settings.pop("train_dtype", "float32")))
    kind, trainer, more = TrainingArguments, HybridTrainer, {}
    if stage == "search":
        kind, trainer = SearchArguments, SearchTrainer
    elif stage == "finetune":
        fix_alpha(model)
    if stage == "prune":
        soft, model = fix_alpha(model), prune(fix_alpha(model), PAIRS[case["pair"]][0][0])
        trainer, more = DistilTrainer, {"teacher": soft}
    if case.get("lora"):
        from peft import get_peft_model

        model = model.to(torch.bfloat16).requires_grad_(False)
        model = get_peft_model(model, lora_config(model, r=16))
        settings |= {"gradient_checkpointing": True, "bf16": True}
    else:
        set_stage(model, STAGES[stage].trains if stage in STAGES else "finetune")
    if case.get("engine") == "fsdp2":
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    elif case.get("engine") == "ddp":
        settings["ddp_find_unused_parameters"] = True
    arguments = kind(
        output_dir=folder,
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        max_steps=2,
        per_device_train_batch_size=case["batch"],
        dataloader_pin_memory=False,
        **settings,
    )
    return trainer(model=model, args=arguments, train_dataset=data, **more)


def resident(key):
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def warm_up(case, folder):
    """Trains a tiny hybrid as in the case, for whatever is imported, compiled and allocated once."""
    kept, PAIRS[case["pair"]] = (
        PAIRS[case["pair"]],
        [(kind, {**values, "num_hidden_layers": 2, "vocab_size": 500}) for kind, values in PAIRS[case["pair"]]],
    )
    make_trainer({**case, "batch": 2, "length": 128}, folder, "cpu").train()  # long enough for the compiled scan
    PAIRS[case["pair"]] = kept


def measure(case):
    """Peak of a training run in this process, in bytes."""
    import torch

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        warm_up(case, folder)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        trainer = make_trainer(case, folder, "cpu")
        trainer.train()
        peak = resident("VmHWM") - before
    return {"resident": peak, "allocator": micro_batch(trainer, case)}


def measure_rank(case):
    """Peak of one of several processes, from the first step on: the whole model that each reads before is not in it."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import cpu_fsdp
    import torch
    from transformers import TrainerCallback

    from manticore_hf.utils.distributed import is_sharded

    class Reset(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            assert is_sharded(model) == (case["engine"] == "fsdp2")
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")

    cpu_fsdp.allow()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        warm_up(case, folder)
        gc.collect()
        before = resident("VmRSS")
        trainer = make_trainer(case, folder, "cpu")
        trainer.add_callback(Reset())
        trainer.train()
        return {"resident": resident("VmHWM") - before}


def measure_processes(case, count):
    """`measure_rank` in so many processes; the larger of what they measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--case", json.dumps(case), "--ranks", folder]
        child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        if child.returncode:
            print(child.stderr[-3000:])
            raise SystemExit(f"{case} failed")
        found = [json.loads(file.read_text())["resident"] for file in sorted(Path(folder).iterdir())]
    return {"resident": max(found), "ranks": found}


def measure_cuda(case):
    """Peak of the allocator in a training run on the GPU, in bytes."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make_trainer(case, folder, "cuda").train()
        return {"resident": torch.cuda.max_memory_allocated() - before}


def micro_batch(trainer, case):
    """Peak of torch's allocator over what was there, in one micro-batch."""
    import torch

    trainer.model.zero_grad(set_to_none=True)
    model = trainer.model_wrapped
    ids = torch.randint(0, 100, (case["batch"], case["length"]))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(ids.numel()))
        loss.backward()
    now = peak = 0
    events = (one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]")
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure_apart(case):
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    if child.returncode:
        print(child.stderr[-2000:])
        raise SystemExit(f"{case} failed")
    return json.loads(child.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="of a run, sharing its rows (CPU only)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ranks is not None:
        file = Path(args.ranks) / f"rank{os.environ['RANK']}.json"
        file.write_text(json.dumps(measure_rank(json.loads(args.case))))
        return
    if args.case is not None:
        print(json.dumps(measure(json.loads(args.case))))
        return
    on_gpu = args.device == "cuda"
    several = args.processes > 1
    base, cases = (CUDA_BASE, CUDA_CASES) if on_gpu else (BASE, SEVERAL_CASES if several else CASES)
    if on_gpu:  # kernels are loaded and workspaces allocated once
        measure_cuda({**CUDA_BASE, "pair": "llama+mamba2", "length": 64, "bf16": True})
    results = []
    for number, case in enumerate(cases):
        if args.only is not None and number not in args.only:
            continue
        case = {**base, **case}
        option = estimate(case, args.device, args.processes)
        if several:
            found = measure_processes(case, args.processes)
        else:
            found = measure_cuda(case) if on_gpu else measure_apart(case)
        step = sum(option.parts[key] for key in ("gradients", "activations"))
        row = {"case": case, "estimate": option.parts, "peak": option.peak, **found}
        row["ratio"] = option.peak / found["resident"]
        results.append(row)
        inner = ""
        if "allocator" in found:
            inner = f"; micro-batch {step / 1e6:.1f} planned {found['allocator'] / 1e6:.1f} allocated"
        print(
            f"{number:>2} {option.peak / 1e6:9.1f} MB planned {found['resident'] / 1e6:9.1f} resident "
            f"{row['ratio']:.3f}{inner}; {case}",
            flush=True,
        )
        if args.output:
            Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
