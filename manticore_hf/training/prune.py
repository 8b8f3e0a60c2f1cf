"""From a soft hybrid to the cost of one model: a path, one component per block, and nothing else kept.

    model = prune(model, "loss", dataset)          # or "alpha", or a list of names

`manticore_hf.training.distill` distils the soft hybrid into it.

The path is chosen by the mixture weights or by the measured loss, under a budget if wanted. Where it changes component
the state crosses by the soft hybrid's projectors, multiplied; where it stays, nothing is in between (a soft hybrid with
one-hot weights still goes through its projectors there, and through those of mixed embeddings). A path that stays on
one component is that component, to the last bit.
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_utils import local_torch_dtype

from manticore_hf.evaluation.data import NO_LOSS, pad, separate
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.modeling.mixing_manticore import resize
from manticore_hf.modeling.path_manticore import Chain, stretches
from manticore_hf.modeling.projectors_manticore import LinearProjector
from manticore_hf.modeling.shared_manticore import enter, leave
from manticore_hf.utils.bridge_settings import bridge_weights
from manticore_hf.utils.flops import count_flops
from manticore_hf.utils.renamed import old_names, takes_old_name, warn_renamed
from manticore_hf.utils.task_types import check_generates, quantization_of

EXHAUSTIVE = 64  # paths: up to so many are all measured
COSTS = ("parameters", "flops", "latency")


@dataclass
class Choice:
    """A path and what was found on the way.

    Attributes:
        path: One component name per block.
        cost: The path's cost as a share of the soft hybrid's.
        losses: {path joined by " > ": loss, nats per token} of every path that was measured.
    """

    path: list
    cost: float
    losses: dict

    @property
    def route(self) -> list:
        """`path` under its name of version 0.1."""
        warn_renamed("Choice.route", "path")
        return self.path


def segment_costs(model: torch.nn.Module, cost: str = "parameters", tokens: int = 128) -> list[list[float]]:
    """What each segment costs: [S][K] numbers.

    Args:
        model: A soft hybrid.
        cost: "parameters", "flops" (per token, counted by torch over `tokens` tokens; the selective scan's own few
            are not counted) or "latency" (seconds for `tokens` tokens, median of five).
        tokens: Length of the input.
    """
    if cost not in COSTS:
        raise ManticoreError(f"cost={cost!r} is unknown; choose one of {list(COSTS)}.")
    return [
        [_cost(model, name, block, cost, tokens) for name in model.config.component_names]
        for block in range(model.config.num_blocks)
    ]


@torch.no_grad()
def _cost(model, name, block, cost, tokens):
    segment = model.segments.segment(name, block)
    if cost == "parameters":
        return float(sum(p.numel() for p in segment.layers.parameters()))
    width = getattr(model.config, name).hidden_size
    if block == 0:
        width = model.component(name).get_input_embeddings().weight.shape[1]
    hidden = torch.zeros(1, tokens, width, device=model.device, dtype=model.dtype)
    positions = torch.arange(tokens, device=model.device)[None]
    if cost == "flops":
        return count_flops(lambda: segment(hidden, None, positions)) / tokens
    times = []
    for _ in range(6):
        start = time.perf_counter()
        segment(hidden, None, positions)
        if hidden.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


def pick_path(
    model: torch.nn.Module,
    by: str = "alpha",
    dataset: Dataset | None = None,
    budget: float | None = None,
    cost: str = "parameters",
    beam: int = 4,
    batch_size: int = 8,
) -> Choice:
    """Chooses one component per block.

    Args:
        model: A soft hybrid.
        by: "alpha" (the most probable path under the mixture weights) or "loss" (the lowest measured loss: all paths
            if they are at most 64, else a beam search from the most probable ones, one block changed at a time).
        dataset: Held-out rows of `input_ids`, for "loss".
        budget: Largest cost allowed, as a share of the soft hybrid's; None for any.
        cost: What the budget counts; see `segment_costs`.
        beam: Paths kept at each step of the beam search.
        batch_size: Rows per forward pass.

    Returns:
        A Choice.

    Raises:
        ManticoreError: No path fits the budget, or there is no text to measure on.
    """
    if by not in ("alpha", "loss"):
        raise ManticoreError(f"by={by!r} is unknown; choose 'alpha' or 'loss', or give the path itself.")
    if by == "loss" and dataset is None:
        raise ManticoreError("Choosing a path by loss needs held-out text: give a dataset.")
    if model.config.route is not None:
        raise ManticoreError(f"This hybrid is pruned already, to the path {model.config.route}.")
    _check_not_aligned(model.config, by)
    costs = torch.tensor(segment_costs(model, cost), dtype=torch.float64)
    share = costs / costs.sum()
    scores = model.mixture_weights().double().cpu().clamp(min=1e-12).log()
    blocks, count = share.shape

    def cost_of(path):
        return sum(share[block, k].item() for block, k in enumerate(path))

    limit = math.inf if budget is None else budget
    cheapest = share.min(1).values.sum().item()
    if cheapest > limit:
        raise ManticoreError(
            f"budget={budget} of the full hybrid's {cost}: the cheapest path costs {cheapest:.3f}; allow that much."
        )

    def score_of(path):
        return sum(scores[block, k].item() for block, k in enumerate(path))

    likely = _likely_paths(scores, share, limit, max(beam, EXHAUSTIVE))
    losses = {}
    if by == "alpha":
        best = max(likely, key=score_of)
    else:
        measure = _Measured(model, dataset, batch_size, losses)
        if count**blocks <= EXHAUSTIVE:
            best = min(tqdm(likely, desc="Measuring paths", unit="path", leave=False), key=measure)
        else:
            best = _beam_search(likely[:beam], measure, cost_of, limit, blocks, count, beam)
    names = model.config.component_names
    return Choice([names[k] for k in best], cost_of(best), losses)


def _likely_paths(scores, share, limit, keep):
    """The `keep` most probable paths within the limit, most probable first; all of them if they are not more."""
    blocks, count = scores.shape
    if count**blocks <= 4096:
        paths = itertools.product(range(count), repeat=blocks)
        paths = [r for r in paths if sum(share[b, k].item() for b, k in enumerate(r)) <= limit + 1e-12]
        return sorted(paths, key=lambda r: -sum(scores[b, k].item() for b, k in enumerate(r)))[:keep]
    least = share.min(1).values.flip(0).cumsum(0).flip(0).tolist() + [0.0]  # of the blocks from b on
    partial = [((), 0.0, 0.0)]
    for block in range(blocks):
        partial = [
            ((*path, k), cost + share[block, k].item(), score + scores[block, k].item())
            for path, cost, score in partial
            for k in range(count)
            if cost + share[block, k].item() + least[block + 1] <= limit + 1e-12
        ]
        partial = sorted(partial, key=lambda p: -p[2])[: 4 * keep]
    return [path for path, _, _ in partial][:keep]


def _beam_search(start, measure, cost_of, limit, blocks, count, beam):
    kept = sorted(start, key=measure)
    while True:
        near = {
            (*path[:block], k, *path[block + 1 :]) for path in kept for block in range(blocks) for k in range(count)
        }
        near = [path for path in sorted(near) if cost_of(path) <= limit + 1e-12]
        found = sorted(tqdm(near, desc="Measuring paths", unit="path", leave=False), key=measure)[:beam]
        if measure(found[0]) >= measure(kept[0]):
            return kept[0]
        kept = found


class _Measured:
    """Loss of paths of a soft hybrid; each is measured once."""

    def __init__(self, model, dataset, batch_size, losses):
        self.model, self.losses = model, losses
        rows = separate(dataset)
        self.batches = [
            (pad(part["input_ids"], 0), pad(part["labels"], NO_LOSS))
            for part in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        ]

    @torch.no_grad()
    def __call__(self, path):
        names = [self.model.config.component_names[k] for k in path]
        key = " > ".join(names)
        if key not in self.losses:
            training = self.model.training
            self.model.eval()
            total = count = 0
            for ids, labels in self.batches:
                ids, target = ids.to(self.model.device), labels[:, 1:].flatten().to(self.model.device)
                logits = path_logits(self.model, names, ids)[:, :-1].flatten(0, 1).float()
                total += F.cross_entropy(logits, target, ignore_index=NO_LOSS, reduction="sum").item()
                count += int((target != NO_LOSS).sum())
            self.model.train(training)
            self.losses[key] = total / count
        return self.losses[key]


def _is_native(config, path):
    """Whether a pruned hybrid reads its first component's embeddings, and its last one's head reads it, as they are.

    Always but where the paper's code has the first component's head read the last one's state.
    """
    return config.embeddings == "native" or config.head_mixture == "last" or path[0] == path[-1]


def path_logits(model: torch.nn.Module, path: list[str], ids: torch.Tensor) -> torch.Tensor:
    """What a soft hybrid would give for tokens [batch, time] once pruned to a path, without pruning it."""
    config, mixer, before, state = model.config, model.hybrid_mixer, None, None
    native = _is_native(config, path)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    for one in stretches(SimpleNamespace(route=path, bounds=config.bounds)):
        if before is not None:
            shared = mixer(leave, before.last, before.name, state, 1.0)
            state = mixer(enter, one.first, one.name, shared, 1.0)
        elif native:
            state = model.embed(one.name, ids)
        else:
            state = mixer(enter, 0, one.name, resize(model.embed(one.name, ids), config.hidden_size), 1.0)
        state, before = model.segments.stretch(one.name, one.start, one.stop)(state, None, positions), one
    if native:
        return model.segments.logits(before.name, state)
    shared = mixer(leave, before.last, before.name, state, 1.0)
    head = model.component(path[0]).get_output_embeddings()
    return model.segments.logits(path[0], resize(shared, head.weight.shape[1]))


@takes_old_name("route", "path")
@torch.no_grad()
def prune(
    model: torch.nn.Module, path: str | list[str] = "alpha", dataset: Dataset | None = None, **options: Any
) -> torch.nn.Module:
    """A pruned copy of a hybrid: one component per block, everything else dropped (with bridges: `drop_bridges`).

    Args:
        model: A soft hybrid; it stays as it is.
        path: "alpha" or "loss" (see `pick_path`), a component's name (all blocks), or one name per block.
        dataset: Held-out rows of `input_ids`, for "loss".
        **options: Further arguments of `pick_path`.

    Returns:
        A hybrid of the same class whose config has the path, in evaluation mode. It loads, generates, trains and is
        published like any other.

    Raises:
        ManticoreError: An impossible path, or a hybrid that classifies or is quantised.
    """
    if model.config.bridges:
        return drop_bridges(model, path, **options)
    check_generates(model, "Pruning")
    _check_not_packed(model)
    names, blocks = model.config.component_names, model.config.num_blocks
    if path in ("alpha", "loss"):
        path = pick_path(model, path, dataset, **options).path
    elif isinstance(path, str):
        model.component(path)
        path = [path] * blocks
    elif model.config.route is not None:
        raise ManticoreError(f"This hybrid is pruned already, to the path {model.config.route}.")
    if len(path) != blocks or not set(path) <= set(names):
        raise ManticoreError(f"path={path!r} must name one of {names} for each of the {blocks} block(s).")
    if set(path) & set(model.config.aligned):
        _check_not_aligned(model.config, path)
    values = model.config.to_dict()
    values["components"] = [entry for entry in values["components"] if entry["name"] in path]
    values["block_layers"] = {name: model.config.block_layers[name] for name in names if name in path}
    values.update(route=list(path), mixture_weights=None)
    if _is_native(model.config, path):
        values["embeddings"] = "native"
    if values["tokenizer_component"] not in path:
        values["tokenizer_component"] = path[0]
    config = ManticoreConfig.from_dict(values)
    with local_torch_dtype(model.dtype):
        hard = type(model)(config, {name: copy.deepcopy(model.component(name)) for name in config.component_names})
    hard = hard.to(device=model.device)
    old, new = model.hybrid_mixer, hard.hybrid_mixer
    new.alpha_logits.copy_(old.alpha_logits[:, [names.index(name) for name in config.component_names]])
    for side in ("into", "out_of"):
        for key, projector in getattr(new, side).items():
            projector.load_state_dict(getattr(old, side)[key].state_dict())
    for block, crossing in new.across.items():
        leave, enter = old.out_of[f"{path[int(block) - 1]}-{int(block) - 1}"], old.into[f"{path[int(block)]}-{block}"]
        _merge(crossing, leave, enter)
    hard.generation_config = copy.deepcopy(model.generation_config)
    return hard.eval()


def _check_not_packed(model):
    if (packed := quantization_of(model.config)) is not None:
        raise ManticoreError(
            f"This hybrid is packed in {packed}: prune it in floating point, and quantise the result when you load it."
        )


@torch.no_grad()
def drop_bridges(model: torch.nn.Module, path: str = "alpha", **options: Any) -> torch.nn.Module:
    """A copy of a hybrid without the bridges that come to nothing: `prune` of a hybrid with bridges.

    Those are bridges of weight 0, and, with `bridge_alpha`, those that weigh less than having none in their place; the
    others keep their weights, which go into their gates. Components stay whole.

    Args:
        model: A hybrid with bridges; it stays as it is.
        path: "alpha".
        **options: None.

    Returns:
        A hybrid of the same class, in evaluation mode; one without bridges is of one block, like any other.

    Raises:
        ManticoreError: There are settings, which are for paths of one component per block.
    """
    if path != "alpha" or options.get("budget") is not None:
        raise ManticoreError(
            f"path={path!r}, budget={options.get('budget')!r}: of a hybrid with bridges only bridges are pruned, by "
            "their weights: give path='alpha' and no budget. For one component alone save model.component(name)."
        )
    _check_not_packed(model)
    edges, weights, bridges = model.config.bridges, bridge_weights(model), model.hybrid_mixer.bridges
    least = [0.0] * len(edges)
    if bridges.alpha_logits is not None:
        for row, alpha in zip(bridges.rows, bridges.softmax(bridges.alpha_logits).tolist()):
            least = [alpha[0] if i in row and edges[i]["weight"] is None else one for i, one in enumerate(least)]
    kept = [i for i, weight in enumerate(weights) if weight > 0 and weight >= least[i]]
    values = model.config.to_dict()
    values.update(bridges=[{**edges[i], "weight": None} for i in kept], bridge_alpha=False)
    config = ManticoreConfig.from_dict(values)
    with local_torch_dtype(model.dtype):
        out = type(model)(config, {name: copy.deepcopy(model.component(name)) for name in config.component_names})
    out = out.to(device=model.device)
    state = {key: one for key, one in model.hybrid_mixer.state_dict().items() if not key.startswith("bridges.")}
    for new, i in enumerate(kept):
        mine = bridges.edges[i].state_dict()
        state |= {f"bridges.edges.{new}.{key}": one for key, one in mine.items()}
    if kept:
        state["bridges.gates"] = bridges.gates[kept] * bridges.gates.new_tensor([weights[i] for i in kept])
    out.hybrid_mixer.load_state_dict(state)
    if hasattr(model, "score"):
        out.score.load_state_dict(model.score.state_dict())
    out.generation_config = copy.deepcopy(model.generation_config)
    return out.eval()


def _check_not_aligned(config, path):
    """Raises for a hybrid with several tokenizers: a choice between its components is one between tokenizers."""
    if config.aligned:
        raise ManticoreError(
            f"path={path!r}: components {list(config.aligned)} have tokenizers of their own, and pruned to one of "
            f"them the hybrid would be that original model; prune to {config.tokenizer_component!r}, whose tokenizer "
            "is the hybrid's."
        )


def _merge(crossing, leave, enter):
    """Fills a crossing with the two projectors it stands for, multiplied where that is possible."""
    if isinstance(crossing, LinearProjector):
        both = nn.Sequential(copy.deepcopy(leave), copy.deepcopy(enter)).double()
        like = {"dtype": torch.float64, "device": crossing.weight.device}
        bias = both(torch.zeros(1, crossing.in_features, **like))
        crossing.weight.copy_((both(torch.eye(crossing.in_features, **like)) - bias).T)
        crossing.bias.copy_(bias[0])
    elif isinstance(crossing, Chain):
        crossing[0].load_state_dict(leave.state_dict())
        crossing[1].load_state_dict(enter.state_dict())


__getattr__ = old_names(__name__, {"harden": "prune", "pick_route": "pick_path"})
