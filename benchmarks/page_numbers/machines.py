"""Plans against measured memory (benchmarks/plan.py), and what ran on a GPU (gpu_kernels.py, gpu_run.py)."""

from .registry import Load, Rows, Values, table, values, versions

PAIRS = {
    "neox+mamba": "GPT-NeoX + Mamba",
    "neox+mamba, small": "GPT-NeoX + Mamba, small",
    "llama+mamba2": "Llama + Mamba-2",
    "pythia-160m+mamba-130m": "shape of Pythia-160M + Mamba-130M",
}

STAGES = {
    "pretrain": "projector warm-up",
    "harden": "pruning with recovery distillation",
    "prune": "pruning with recovery distillation",
    "finetune": "fine-tuning",
}


def case_name(case: dict) -> str:
    """A run that was planned and measured, in words."""
    words = [PAIRS.get(case["pair"], case["pair"]), STAGES.get(case["stage"], case["stage"])]
    words += [f"{case['num_blocks']} blocks"] if case["num_blocks"] > 1 else []
    words += [f"{case['batch']} x {case['length']} tokens"]
    words += ["bf16 mixed precision, loaded in bf16"] if case.get("train_dtype") == "bfloat16" else []
    words += ["bf16 autocast"] if case.get("bf16") and not case.get("train_dtype") else []
    words += ["checkpointing"] if case.get("gradient_checkpointing") else []
    words += ["LoRA in bf16"] if case.get("lora") else []
    words += [f"{case['gradient_accumulation_steps']} accumulated"] if case.get("gradient_accumulation_steps") else []
    return ", ".join(words + ([case["optim"]] if "optim" in case else []))


@table("plan")
def plan(load: Load) -> Rows:
    rows = [["run", "planned, MB", "resident, MB", "ratio", "micro-batch: planned / allocated, MB"]]
    for one in load("plan"):
        cells = [f"{one['peak'] / 1e6:.0f}", f"{one['resident'] / 1e6:.0f}", f"{one['ratio']:.3f}"]
        micro = sum(one["estimate"][part] for part in ("gradients", "activations"))
        rows.append([case_name(one["case"]), *cells, f"{micro / 1e6:.1f} / {one['allocator'] / 1e6:.1f}"])
    return rows


@table("plan-processes")
def plan_processes(load: Load) -> Rows:
    rows = [["run", "engine", "planned, MB", "resident, MB", "ratio"]]
    for one in load("plan_processes"):
        cells = [f"{one['peak'] / 1e6:.0f}", f"{one['resident'] / 1e6:.0f}", f"{one['ratio']:.3f}"]
        rows.append([case_name(one["case"]), one["case"]["engine"].upper(), *cells])
    return rows


@table("plan-cuda")
def plan_cuda(load: Load) -> Rows:
    rows = [["run", "planned, GB", "measured, GB", "ratio"]]
    for one in load("plan_cuda"):
        cells = [f"{one['peak'] / 1e9:.2f}", f"{one['resident'] / 1e9:.2f}", f"{one['ratio']:.3f}"]
        rows.append([case_name(one["case"]), *cells])
    return rows


@values
def plan_values(load: Load) -> Values:
    for name in ("plan", "plan_processes", "plan_cuda"):
        ratios = [one["ratio"] for one in load(name)]
        yield f"{name}.runs", str(len(ratios))
        yield f"{name}.least", f"{min(ratios):.3f}"
        yield f"{name}.most", f"{max(ratios):.3f}"


@table("gpu-kernels")
def gpu_kernels(load: Load) -> Rows:
    ways = {"kernels": "mamba-ssm's kernels", "portable": "Triton", "torch": "Transformers' torch path"}
    rows = [["layer, dtype", "what", *ways.values()]]
    for one in load("gpu_kernels")["rows"]:
        if "milliseconds" in one:
            layer = f"{one['layer'].capitalize()}, {one['dtype'].removeprefix('torch.')}"
            what = {"read": "forward", "train": "forward and backward", "step": "one token with a cache"}[one["what"]]
            what += f", {one['batch']} rows" if one["tokens"] == 1 else f", {one['batch']} x {one['tokens']} tokens"
            cells = [
                f"{one['milliseconds'][way]:.2f} ({one['over kernels'][way]:.2f})" if way in one["milliseconds"] else ""
                for way in ways
            ]
            rows.append([layer, what, *cells])
    return rows


@table("gpu-ratios")
def gpu_ratios(load: Load) -> Rows:
    """Of the longest batch in bfloat16 that all three were timed on."""
    timed = [one for one in load("gpu_kernels")["rows"] if "torch" in one.get("over kernels", ())]
    timed = {one["what"]: one["over kernels"] for one in timed if one["dtype"] == "torch.bfloat16"}
    rows = [["", "inference", "training"]]
    for way, label in (("portable", "Triton"), ("torch", "Transformers' own path")):
        rows.append(
            [
                label,
                *(
                    f"{timed[what][way]:.2g}" if timed[what][way] < 10 else f"{timed[what][way]:.0f}"
                    for what in ("read", "train")
                ),
            ]
        )
    return rows


@table("gpu-errors")
def gpu_errors(load: Load) -> Rows:
    ways = {"kernels": "mamba-ssm's kernels", "portable": "Triton", "torch": "Transformers' torch path"}
    rows = [["layer, dtype", "error of", *ways.values()]]
    for one in load("gpu_kernels")["rows"]:
        for what in ("output", "gradients") if "errors, 2 x 200 tokens" in one else ():
            errors = [one["errors, 2 x 200 tokens"][way][what] for way in ways]
            layer = f"{one['layer'].capitalize()}, {one['dtype'].removeprefix('torch.')}"
            rows.append([layer, what, *(f"{error:.1e}" for error in errors)])
    return rows


@table("gpu-run")
def gpu_run(load: Load) -> Rows:
    result = load("gpu_run")
    last = result["losses"][-1]
    names = {"loss/mixture": "hybrid", "loss/pythia": "the GPT-NeoX in it", "loss/mamba": "the Mamba in it"}
    names |= {"loss/ensemble": "their plain ensemble"}
    return [["model", "training loss, last steps"], *([label, f"{last[key]:.2f}"] for key, label in names.items())]


@values
def gpu_values(load: Load) -> Values:
    kernels, run = load("gpu_kernels"), load("gpu_run")
    yield "gpu.device", kernels["device"]
    yield "gpu.date", kernels["date"]
    found = kernels["versions"]
    extras = f"mamba-ssm {found['mamba_ssm']}, causal-conv1d {found['causal_conv1d']}"
    yield "gpu.versions", f"{versions(kernels)}, {extras}"
    timed = [one for one in kernels["rows"] if "milliseconds" in one]
    for what in ("read", "train"):
        ratios = [one["over kernels"]["portable"] for one in timed if one["what"] == what]
        yield f"gpu.{what}.triton", f"{min(ratios):.2f} to {max(ratios):.2f}"
        ratios = [
            one["over kernels"]["torch"] for one in timed if one["what"] == what and "torch" in one["over kernels"]
        ]
        yield f"gpu.{what}.torch", f"{min(ratios):.0f} to {max(ratios):.0f}"
    yield "gpu.seconds", f"{run['finetune']['seconds']:.0f}"
    yield "gpu.planned", f"{run['finetune']['planned_peak'] / 1e9:.1f}"
    yield "gpu.measured", f"{run['finetune']['measured_peak'] / 1e9:.1f}"
    yield "gpu.tokens-per-second", f"{run['generation']['tokens per second, 16 rows, bfloat16']:.0f}"
    yield "gpu.steps", str(run["losses"][-1]["step"])
