"""Losses on held-out text: a hybrid's number is never given without its baselines'."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel

from manticore_hf.evaluation.data import DataArguments, load_rows
from manticore_hf.modeling.modeling_manticore import ManticoreForCausalLM
from manticore_hf.utils.distributed import all_reduce_dict, bar, component_runner, shares
from manticore_hf.utils.renamed import takes_old_name


@takes_old_name("rivals", "baselines")
@torch.no_grad()
def compare_losses(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 16, desc: str = "Evaluating", baselines: bool = True
) -> dict[str, float]:
    """Mean next-token loss of a hybrid, of each component alone, and of their plain ensemble, in one pass.

    Several processes each run a share of the rows; all of them must call this.

    Args:
        model: A hybrid; without baselines any causal LM, which counts as "hybrid".
        dataset: Blocks of `input_ids`, as `pack` makes them.
        batch_size: Blocks per forward pass.
        desc: Label of the progress bar.
        baselines: Also run the components; False where their losses on this text are known already.

    Returns:
        {component name: loss, ..., "ensemble": loss, "hybrid": loss} in nats per token; the ensemble is the normalised
        geometric mean of the components' distributions with equal weights. A pruned hybrid has lost parts of its
        components, so only "hybrid" is there: its baselines come from the soft one.
    """
    was_training, names = model.training, model.config.component_names if baselines and not model.config.route else []
    model.eval()
    sums, count = dict.fromkeys([*names, "ensemble", "hybrid"] if names else ["hybrid"], 0.0), 0
    runners = {name: component_runner(model, name) for name in names}
    order = range(len(dataset))
    mine = list(shares([list(order[start : start + batch_size]) for start in order[::batch_size]]))
    loader = DataLoader(dataset.with_format("torch"), batch_sampler=[rows for rows, _ in mine])
    for (_, share), batch in zip(mine, bar(loader, desc=desc, unit="batch", leave=False)):
        ids = batch["input_ids"].to(model.device)
        target = ids[:, 1:].flatten()

        def loss(logits, target=target, share=share):
            return share * F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, reduction="sum").item()

        mean = 0.0
        for name in names:
            logits = runners[name](input_ids=ids, use_cache=False).logits
            logprobs = logits[..., : model.config.vocab_size].float().log_softmax(-1)  # without rows that only pad
            sums[name] += loss(logprobs)
            mean = mean + logprobs / len(names)
        if names:
            sums["ensemble"] += loss(mean)
        sums["hybrid"] += loss(model(input_ids=ids, use_cache=False).logits)
        count += share * target.numel()
    model.train(was_training)
    *sums, count = all_reduce_dict({**sums, "": count}, model.device).items()
    return {name: loss / count[1] for name, loss in sums}


def measured_on(data: DataArguments, rows: Dataset) -> dict[str, Any]:
    """What a result says of the text it was measured on: {"data": its name, "tokens": predicted ones, "note": how}.

    Args:
        data: DataArguments.
        rows: The rows that were used.
    """
    tokens = sum(len(ids) - 1 for ids in rows["input_ids"])
    part = f"{data.validation_fraction:.0%} of it, held out" if data.validation_fraction else "All of it"
    note = f"{part}; for every component its own head inside this hybrid, for the ensemble their plain mean."
    local = Path(data.data)
    return {"data": local.name if local.exists() else data.data, "tokens": tokens, "note": note}


def run_evaluate(
    source: str | os.PathLike, data: DataArguments, batch_size: int = 8, output: str | os.PathLike | None = None
) -> dict[str, float]:
    """Prints (and writes) the losses of a saved hybrid and its baselines on a text.

    Args:
        source: Hybrid: directory or Hub repo.
        data: DataArguments with validation_fraction 0.
        batch_size: Rows per forward pass.
        output: Directory for `evaluation.json`, or None.

    Returns:
        As `compare_losses`.
    """
    model = ManticoreForCausalLM.from_pretrained(source, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows, _ = load_rows(data, AutoTokenizer.from_pretrained(source))
    losses = compare_losses(model, rows, batch_size)
    print(f"{source} on {data.data}: {len(rows) * data.block_size:,} tokens, nats per token")
    for name, loss in losses.items():
        print(f"{name:>24}  {loss:.4f}")
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        result = json.dumps({**measured_on(data, rows), "losses": losses}, indent=1)
        (Path(output) / "evaluation.json").write_text(result + "\n")
    return losses
