"""Tasks of the lm-evaluation-harness: a hybrid beside its components, their plain ensemble and their online mixture.

    manticore-hf evaluate --model org/hybrid --tasks arc_easy,hellaswag

The harness alone runs on a hybrid, too: `lm_eval --model hf --model_args pretrained=org/hybrid,trust_remote_code=True`.
This adds the baselines, without which a hybrid's number says little.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.modeling_utils import local_torch_dtype

from manticore_hf.compose.components import ComponentSpec
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.untouched import load_original
from manticore_hf.evaluation.losses import ONLINE, inner_baselines
from manticore_hf.modeling.aligned_tokenizers import tokenizer_of
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.training.originals import find_originals
from manticore_hf.utils.claims import ORIGINAL
from manticore_hf.utils.files import read_json, write_json
from manticore_hf.utils.formatting import is_number
from manticore_hf.utils.tokenizers import read_tokenizer

RESULTS = "tasks.json"


def run_tasks(
    source: str | Path,
    tasks: Sequence[str],
    include_path: str | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    components: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """Runs tasks of the harness on a hybrid and its baselines, and prints the scores.

    The baselines are its components, their ensemble and online mixture, and each original component, with its own
    tokenizer, where its address is known.

    Args:
        source: Hybrid: directory or Hub repo.
        tasks: Names of tasks or groups.
        include_path: Directory with task definitions of one's own.
        batch_size: Requests per forward pass.
        num_fewshot: Examples before each question; default: the task's.
        limit: Use only so many documents of each task.
        output: Directory for `tasks.json`; what is in it already is not run again.
        seed: Of the few-shot examples.
        components: Where the original components are, in order. Default: the addresses that the hybrid knows, or
            those of the recipe beside it.

    Returns:
        {model: {task: {metric: [value, standard error or None]}}}. A pruned hybrid has no baselines inside it any more.

    Raises:
        ManticoreError: The harness is not installed, or does not know a task.
    """
    lm_eval = _harness()
    for defaults in (False, True):  # reading the harness's own definitions takes long, and is often not needed
        manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            break
    if not tasks or unknown:
        named = ", ".join(map(repr, unknown)) or "(none was given)"
        raise ManticoreError(
            f"--tasks: the harness knows no task {named}; `lm_eval ls tasks` lists them, --include-path names a "
            "directory of your own."
        )
    settings = {"tasks": sorted(tasks), "num_fewshot": num_fewshot, "limit": limit, "seed": seed, "model": str(source)}
    kept, datasets = _read(output, settings)
    model = ManticoreForCausalLM.from_pretrained(source, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = read_tokenizer(source)
    sources = find_originals(source, model.config, components)
    for label, load in _models(model, tokenizer, sources):
        if label not in kept:
            part, own = load()
            print(f"{label} on {', '.join(tasks)}", flush=True)
            lm = lm_eval.models.huggingface.HFLM(
                pretrained=part, tokenizer=own, batch_size=batch_size, device=str(model.device)
            )
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            kept[label] = _scores(found["results"])
            datasets |= _datasets(found.get("configs") or {})
            _write(output, settings, kept, datasets)
    _print(kept)
    return kept


def _models(model, tokenizer, sources):
    """(label, function that gives a causal LM and its tokenizer) of the hybrid and its baselines."""
    yield "hybrid", lambda: (model, tokenizer)
    names = inner_baselines(model)
    for name in names:
        aligned = name in model.config.aligned  # by itself it reads the text, not the hybrid's tokens
        own = partial(tokenizer_of, model, name) if aligned else lambda: tokenizer
        yield name, lambda name=name, own=own: (model.component(name), own())
    if len(names) > 1:
        yield "ensemble", lambda: (_ensemble(model, names, "static", "logprob"), tokenizer)
        yield ONLINE, lambda: (_ensemble(model, names, "online", "prob"), tokenizer)

    def untouched(entry, source):
        part, own = load_original(entry, source, model.dtype)
        return part.to(model.device), own

    for entry, source in zip(model.config.components, sources or [None] * len(model.config.components)):
        if source is not None or entry["repo_id"] is not None and entry.get("code") is None:
            label = ORIGINAL.format(entry["name"])
            yield label, lambda entry=entry, source=source: untouched(entry, source)


def _ensemble(model, names, mixture, space):
    online = {key: getattr(model.config, key) for key in ("online_eta", "online_decay", "online_share")}
    if model.config.aligned:  # instances have no tokenizers: a hybrid of the same components, with theirs
        config = copy.deepcopy(model.config)
        config.mixture, config.mixture_space, config.mixture_weights = mixture, space, None
        with local_torch_dtype(model.dtype):
            out = type(model)(config, {name: model.component(name) for name in names})
        out._tokenizers = {name: tokenizer_of(model, name) for name in names}
        return out.to(model.device).eval()
    parts = [ComponentSpec(model.component(name), name=name) for name in names]
    return ManticoreForCausalLM.from_components(
        parts,
        dtype=model.dtype,
        num_blocks=1,
        mixture=mixture,
        mixture_space=space,
        **online,
        vocab_size=model.config.vocab_size,
        verify=False,
    )


def _harness():
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as err:
        raise ManticoreError(
            f"--tasks needs the lm-evaluation-harness ({err}): pip install 'manticore-hf[harness]'."
        ) from err
    return lm_eval


def _scores(results):
    """{task: {metric: [value, standard error]}} of the harness's results."""
    out = {}
    for task, values in results.items():
        out[task] = {}
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filtered}")
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                out[task][name] = [value, error if isinstance(error, (int, float)) else None]
    return out


def _read(output, settings):
    """What was measured already with these settings, and the tasks' data sets."""
    file = None if output is None else Path(output) / RESULTS
    if file is None or not file.exists():
        return {}, {}
    values = read_json(file)
    if values.get("settings") != settings:
        raise ManticoreError(f"{file} is of another evaluation; give another --output-dir.")
    scores, datasets = values.get("scores", {}), values.get("datasets", {})
    try:
        pairs = [pair for tasks in scores.values() for metrics in tasks.values() for pair in metrics.values()]
        fits = isinstance(datasets, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        fits = fits and all(is_number(value) and (error is None or is_number(error)) for value, error in pairs)
    except (AttributeError, TypeError):
        fits = False
    if not fits:
        raise ManticoreError(f"{file} is damaged: its scores are no tables of numbers; delete it, then run again.")
    return scores, datasets


def _datasets(configs):
    """{task: [data set, its configuration or None]}, as the harness's own definitions of the tasks say."""
    wanted = ("dataset_path", "dataset_name")
    return {task: [one.get(key) for key in wanted] for task, one in configs.items() if one.get("dataset_path")}


def _write(output, settings, scores, datasets):
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        write_json(Path(output) / RESULTS, {"settings": settings, "datasets": datasets, "scores": scores})


def _print(scores):
    rows = [(task, metric) for task, metrics in scores["hybrid"].items() for metric in metrics]
    width = max(len(f"{task} {metric}") for task, metric in rows) if rows else 4
    print(f"\n{'task':{width}}" + "".join(f"{label:>20}" for label in scores))
    for task, metric in rows:
        cells = [scores[label].get(task, {}).get(metric, [float("nan"), None]) for label in scores]
        shown = [f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}") for value, error in cells]
        print(f"{f'{task} {metric}':{width}}" + "".join(f"{cell:>20}" for cell in shown))
