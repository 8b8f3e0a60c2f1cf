"""What each component is good at: its architecture, trained from scratch on every MAD task, as a table and a picture.

    manticore-hf mad-profile llama,mamba --output-dir profile
    manticore-hf mad-profile you/hybrid,EleutherAI/pythia-410m --output-dir profile

A model that is named by directory or repository is profiled by its family, at the small size of all others: only its
configuration is read. So the profile says what an architecture learns quickly, not what pretrained weights know; two
models of one family have one profile.
"""

import dataclasses
from pathlib import Path

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from manticore_hf.experiments.baselines import Training
from manticore_hf.experiments.mad.easy import EasySettings, task_names
from manticore_hf.experiments.mad.mad_settings import TASKS
from manticore_hf.experiments.mad.train_mad import run_mad
from manticore_hf.experiments.scratch_models import scratch_config
from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.modeling.configuration_manticore import ManticoreConfig
from manticore_hf.utils.files import write_json
from manticore_hf.utils.plots import plot_profile


def mad_profile(
    models: list[str],
    output_dir: str | Path,
    tasks: list[str] | None = None,
    settings: EasySettings | None = None,
    quiet: bool = False,
) -> dict:
    """Trains every model's family on every task from scratch, and scores it.

    Args:
        models: Model types (llama, mamba, ...), directories or Hub repos; of a hybrid all its components.
        output_dir: Where each run's JSON goes, and `profile.json` and `profile.png`; runs that are finished there are
            read instead.
        tasks: MAD tasks by full or short names; default: all six.
        settings: EasySettings.
        quiet: No progress bars and no table.

    Returns:
        What `profile.json` holds: {"models": {name: family}, "chance": {task: accuracy of guessing}, "accuracy":
        {name: {task: micro accuracy, mean over seeds}}, "seeds": {name: {task: one accuracy per seed}}, "settings"}.

    Raises:
        ManticoreError: A model or a task is unknown, or a family cannot be built at that size.
    """
    settings, tasks = settings or EasySettings(), task_names(TASKS if tasks is None else tasks)
    families = {name: family for model in models for name, family in _families(model).items()}
    if not families:
        raise ManticoreError("There is no model to profile; give at least one family, directory or Hub repo.")
    drawn = [settings.task(name, seed) for name in tasks for seed in settings.runs()]
    for family in families.values():  # what cannot be built is said before anything is trained
        for task in drawn:
            scratch_config(family, task.vocab_size, settings.layers, settings.hidden_size, task.seq_len + 1)
    output, found = Path(output_dir), {}
    for family in dict.fromkeys(families.values()):
        for task in drawn:
            (result,) = run_mad(task, [family], output, _training(settings, task), quiet=quiet)
            found.setdefault(family, {}).setdefault(task.name, []).append(result["accuracy"])
    profile = {
        "models": families,
        "chance": {task.name: task.chance for task in drawn},
        "accuracy": {
            name: {task: sum(values) / len(values) for task, values in found[family].items()}
            for name, family in families.items()
        },
        "seeds": {name: found[family] for name, family in families.items()},
        "settings": dataclasses.asdict(settings),
    }
    write_json(output / "profile.json", profile)
    plot_profile(profile["accuracy"], profile["chance"], output / "profile.png")
    if not quiet:
        _print_profile(profile, settings)
        print(f"\n{output / 'profile.png'}: the same as a picture; {output / 'profile.json'}: as numbers")
    return profile


def _families(model):
    """{name: family} of a model type, or of what a configuration describes."""
    if model in CONFIG_MAPPING and model != ManticoreConfig.model_type:
        return {model: model}
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise ManticoreError(
            f"model={show(model)} is not a model type of Transformers (llama, mamba, ...), nor a directory or Hub repo "
            f"whose configuration can be read: {err}"
        ) from err
    if isinstance(config, ManticoreConfig):
        return {f"{model}: {name}": getattr(config, name).model_type for name in config.component_names}
    return {model: config.model_type}


def _training(settings, task):
    """The training of so many steps, in whole epochs."""
    per_epoch = -(-task.num_train // settings.batch_size)
    return Training(
        layers=settings.layers,
        hidden_size=settings.hidden_size,
        epochs=-(-settings.steps // per_epoch),
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=task.seed,
    )


def _print_profile(profile, settings):
    names = [name if len(name) <= 24 else f"...{name[-21:]}" for name in profile["models"]]
    print(
        f"\naccuracy (micro) after {settings.steps} steps from scratch, mean of {settings.seeds} seed(s); "
        f"{settings.layers} layers of width {settings.hidden_size}"
    )
    print(f"{'':28}{'chance':>8}" + "".join(f"{name:>26}" for name in names))
    for task, low in profile["chance"].items():
        scores = [found[task] for found in profile["accuracy"].values()]
        cells = (f"{score:.4f}{'*' if len(scores) > 1 and score == max(scores) else ' '}" for score in scores)
        print(f"{task:28}{low:8.3f}" + "".join(f"{cell:>26}" for cell in cells))
    if len(names) > 1:
        print("* the best of each task; a difference between seeds can be as large (give --num-seeds)")
