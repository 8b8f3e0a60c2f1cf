"""Tasks that say what a model can do: MAD, the Long Range Arena, and a composition of two, trained on and scored.

    from manticore_hf.experiments import mad_task
    task = mad_task("in-context-recall", vocab_size=32)
    train, test = task.dataset("train"), task.dataset("test")       # datasets.Dataset, for any causal LM's Trainer

`manticore-hf mad TASK` and `manticore-hf lra TASK` train a model or a hybrid on one of them and print its accuracy.
"""

import importlib

_LATER = {
    "CompositionTask": "composition.texts",
    "CompressionModel": "mad.compression",
    "EasySettings": "mad.easy",
    "LraTask": "lra.lra_settings",
    "MadTask": "mad.mad_settings",
    "ProgramSettings": "mad.program",
    "ProgrammedAlpha": "mad.program",
    "TASKS": "mad.mad_settings",
    "benchmark_settings": "mad.mad_settings",
    "from_scratch": "scratch_models",
    "generate": "mad.tasks",
    "hybrid_from_scratch": "scratch_models",
    "mad_profile": "mad.profile",
    "mad_task": "mad.mad_settings",
    "program_alpha": "mad.program",
    "lra_task": "lra.lra_settings",
    "run_composition": "composition.train_composition",
    "run_lra": "lra.train_lra",
    "run_mad": "mad.train_mad",
}

__all__ = [*_LATER]


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__():
    return sorted({*globals(), *_LATER})
