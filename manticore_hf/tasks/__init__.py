"""Tasks that say what a model can do: the six of MAD and those of the Long Range Arena, trained on and scored.

    from manticore_hf.tasks import mad_task
    task = mad_task("in-context-recall", vocab_size=32)
    train, test = task.dataset("train"), task.dataset("test")       # datasets.Dataset, for any causal LM's Trainer

`manticore-hf mad TASK` and `manticore-hf lra TASK` train a model or a hybrid on one of them and print its accuracy.
"""

import importlib

_LATER = {
    "CompressionModel": "compression",
    "EasySettings": "easy",
    "LraTask": "lra_settings",
    "MadTask": "settings",
    "ProgramSettings": "program",
    "ProgrammedAlpha": "program",
    "TASKS": "settings",
    "benchmark_settings": "settings",
    "from_scratch": "models",
    "generate": "mad",
    "hybrid_from_scratch": "models",
    "mad_profile": "profile",
    "mad_task": "settings",
    "program_alpha": "program",
    "lra_task": "lra_settings",
    "run_lra": "lra_run",
    "run_mad": "run",
}

__all__ = [*_LATER]


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__():
    return sorted({*globals(), *_LATER})
