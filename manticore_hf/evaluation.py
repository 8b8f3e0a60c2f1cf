"""Losses on held-out text: a hybrid's number is never given without its rivals'."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


@torch.no_grad()
def compare_losses(model, dataset, batch_size=16, desc="Evaluating"):
    """Mean next-token loss of a hybrid, of each component alone, and of their plain ensemble, in one pass.

    Args:
        model: A hybrid.
        dataset: Blocks of `input_ids`, as `pack` makes them.
        batch_size: Blocks per forward pass.
        desc: Label of the progress bar.

    Returns:
        {component name: loss, ..., "ensemble": loss, "hybrid": loss} in nats per token; the ensemble is the normalised
        geometric mean of the components' distributions with equal weights.
    """
    was_training, names = model.training, model.config.component_names
    model.eval()
    sums, count = dict.fromkeys([*names, "ensemble", "hybrid"], 0.0), 0
    loader = DataLoader(dataset.with_format("torch"), batch_size=batch_size)
    for batch in tqdm(loader, desc=desc, unit="batch", leave=False):
        ids = batch["input_ids"].to(model.device)
        target = ids[:, 1:].flatten()

        def loss(logits, target=target):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, reduction="sum").item()

        mean = 0.0
        for name in names:
            logprobs = model.component(name)(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            sums[name] += loss(logprobs)
            mean = mean + logprobs / len(names)
        sums["ensemble"] += loss(mean)
        sums["hybrid"] += loss(model(input_ids=ids, use_cache=False).logits)
        count += target.numel()
    model.train(was_training)
    return {name: total / count for name, total in sums.items()}
