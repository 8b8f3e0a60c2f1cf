"""`manticore-hf families`: every model type that has a causal LM through the contract, and the table of it.

Every type runs in a process of its own, with a limit of time and memory: some hang, some ask for the machine. Each
finished type is a JSON file; a sweep that is run again goes on with those that are missing.
"""

import json
import multiprocessing
import os
from multiprocessing.context import BaseContext
from pathlib import Path

from manticore_hf.families.table import OLD_VERDICTS, ORDER, versions, write_table
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.files import write_json

SECONDS = 300
MEMORY = 6 * 2**30


def chosen(results: list[dict], names: list[str] | None) -> list[dict]:
    """Those of some results that are of these model types; of None, all.

    Raises:
        ManticoreError: A name is no model type with a causal LM.
    """
    if not names:
        return results
    _check_names(names)
    return [one for one in results if one["type"] in names]


def _check_names(names):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    for name in names:
        if name not in KNOWN:
            import difflib

            close = difflib.get_close_matches(name, KNOWN, 1)
            raise ManticoreError(
                f"--type {name}: the installed Transformers has no causal LM of that type"
                + (f"; did you mean {close[0]}?" if close else ".")
            )


def all_types() -> list[str]:
    """The model types with a causal LM, in alphabetical order; a hybrid's own is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    return sorted(name for name in KNOWN if name != "manticore")


def sweep(
    output_dir: str | Path, names: list[str] | None = None, time_limit: float = SECONDS, quiet: bool = False
) -> list[dict]:
    """Puts types through the contract, one process at a time.

    Args:
        output_dir: Where `types/TYPE.json` are written, one per finished type; those that are there, made with the same
            versions, are not repeated. When all types are there, `families.json` and `FAMILIES.md` are written, too.
        names: Model types; default: all.
        time_limit: Seconds for each.
        quiet: No progress bar.

    Returns:
        The results, in alphabetical order.

    Raises:
        ManticoreError: A name is no model type with a causal LM.
    """
    from tqdm.auto import tqdm

    _check_names(names or ())
    folder, made_with = Path(output_dir) / "types", versions()
    folder.mkdir(parents=True, exist_ok=True)
    context, results = _context(), []
    with tqdm(sorted(names) if names else all_types(), unit="type", disable=quiet) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            file = folder / f"{name}.json"
            found = _read(file, made_with)
            if found is None:
                found = {**run_one(context, name, time_limit), "versions": made_with}
                write_json(file, found)
            results.append(found)
    present = [_read(folder / f"{name}.json", made_with) for name in all_types()]
    if None not in present:
        kept = ("type", "class", "verdict", "reason", "checks")
        data = {"versions": made_with, "types": [{key: one[key] for key in kept} for one in present]}
        write_json(Path(output_dir) / "families.json", data)
        write_table(Path(output_dir) / "FAMILIES.md", data)
    return results


def _read(file, made_with):
    """A finished type's result, or None if there is none of these versions."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if found.get("versions") != made_with:
        return None
    found["verdict"] = OLD_VERDICTS.get(found.get("verdict"), found.get("verdict"))
    return found if found["verdict"] in ORDER else None


def _context():
    """Processes that start quickly: copies of a server that has imported what they need, and never run anything."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["manticore_hf.families.examine"])
    return context


def run_one(context: BaseContext, name: str, time_limit: float = SECONDS) -> dict:
    """One type in a process of its own; one that dies or takes too long is a result, too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    out = {"type": name, "class": KNOWN[name], "verdict": "unknown", "checks": {}, "seconds": float(time_limit)}
    try:
        if not receiver.poll(time_limit):
            return {**out, "reason": f"its contract did not end within {time_limit} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {**out, "reason": f"its process ended with status {process.exitcode} before the contract did"}
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _work(name, sender):
    """What the process does: nothing of the machine but its share, and no words."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _limit_memory()
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    from manticore_hf.families.examine import examine

    sender.send(examine(name))


def _limit_memory():
    try:
        import resource
    except ImportError:  # not on Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
