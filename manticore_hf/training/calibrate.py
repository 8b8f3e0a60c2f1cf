"""Projectors in closed form: ridge regressions between the components' own states.

On a few ten thousand tokens every component is run alone, segment by segment. At each boundary W_out maps component
k's state to the reference component's and W_in maps back; the reference is the identity. Only sums of products are
kept (float64, O(width^2) memory), so one pass over the text is enough, however long it is. Several processes each read
a share of the batches, and add their sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers.modeling_utils import local_torch_dtype

from manticore_hf.evaluation.data import NO_LOSS, pad, separate
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.mixing_manticore import resize
from manticore_hf.modeling.projectors_manticore import LinearProjector
from manticore_hf.modeling.shared_manticore import mix_embeddings
from manticore_hf.utils.distributed import all_reduce, all_reduce_dict, bar, broadcast, component_runner, world
from manticore_hf.utils.hybrid_settings import check_name
from manticore_hf.utils.renamed import takes_old_name
from manticore_hf.utils.task_types import check_generates

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Moments:
    """Running first and second moments of pairs of rows (x, y), in float64.

    Args:
        width_x, width_y: Widths of x and y.
        device: Where the sums are.
    """

    def __init__(self, width_x: int, width_y: int, device: torch.device | str):
        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = 0
        self.x, self.y = zeros(width_x), zeros(width_y)
        self.xx, self.xy, self.yy = zeros(width_x, width_x), zeros(width_x, width_y), zeros(width_y)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows x [n, width_x] and y [n, width_y]."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def join(self) -> None:
        """Adds what the other processes have seen; on every rank."""
        self.count = int(all_reduce(torch.tensor(self.count, device=self.x.device)))
        for one in (self.x, self.y, self.xx, self.xy, self.yy):
            all_reduce(one)


def solve_ridge(
    fit: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The affine map x -> y of least squares with the ridge that does best on held-out rows.

    Args:
        fit: Moments of the rows to fit.
        held_out: Moments of the rows that choose the ridge.
        ridges: Candidates, in units of the mean variance of x.

    Returns:
        (weight [width_y, width_x], bias [width_y], ridge, R^2 on the held-out rows), float64.
    """
    mean_x, mean_y = fit.x / fit.count, fit.y / fit.count
    covariance = fit.xx - torch.outer(fit.x, mean_x)
    cross = fit.xy - torch.outer(fit.x, mean_y)
    values, vectors = torch.linalg.eigh(covariance)
    rotated, scale = vectors.T @ cross, covariance.diagonal().mean()
    best = None
    for ridge in ridges:
        weight = vectors @ (rotated / (values.clamp(min=0) + ridge * scale + 1e-300)[:, None])
        bias = mean_y - mean_x @ weight
        error = _squared_error(held_out, weight, bias)
        if best is None or error < best[0]:
            best = (error, weight, bias, ridge)
    error, weight, bias, ridge = best
    total = (held_out.yy - held_out.y.square() / held_out.count).sum()
    return weight.T.contiguous(), bias, ridge, (1 - error / total).item()


def _squared_error(moments, weight, bias):
    """Sum over rows of |x W + b - y|^2, from moments alone."""
    out = ((moments.xx @ weight) * weight).sum() - 2 * (moments.xy * weight).sum() + moments.yy.sum()
    return out + 2 * (moments.x @ weight) @ bias - 2 * moments.y @ bias + moments.count * bias @ bias


@dataclass
class Calibration:
    """What calibration found.

    Attributes:
        reference: The reference component.
        losses: Loss of each component alone on the calibration text, nats per token.
        r2: R^2 on held-out tokens of each map, by "into:name-block" or "out_of:name-block".
        ridges: The ridge chosen for each.
        tokens: Tokens used.
    """

    reference: str
    losses: dict
    r2: dict
    ridges: dict
    tokens: int


@takes_old_name("reference", "reference_component")
@torch.no_grad()
def calibrate_projectors(
    model: torch.nn.Module,
    dataset: Dataset,
    tokens: int = 40_000,
    batch_size: int = 8,
    reference_component: str | None = None,
    held_out: float = 0.2,
) -> Calibration:
    """Sets a hybrid's linear projectors in closed form, in place; where there are several processes, all must call it.

    Args:
        model: A hybrid with projector="linear".
        dataset: Rows of `input_ids`, as `pack` or `mask_prompts` make them; every text in a row is read by itself.
        tokens: Tokens to use; a few ten thousand.
        batch_size: Blocks per forward pass.
        reference_component: The reference component; default: the one with the lowest loss on this text.
        held_out: Share of the batches that choose the ridge.

    Returns:
        A Calibration. The model's config notes it (`calibration`) and, with gate="none", the reference.

    Raises:
        ManticoreError: projector="mlp" or "none"; an unknown reference; too little text; a hybrid that classifies.
    """
    check_generates(model, "Calibrating")
    config = model.config
    if config.projector != "linear":
        raise ManticoreError(f"projector={config.projector!r} has no closed form; compose with projector='linear'.")
    if reference_component is not None:
        check_name(config.component_names, "reference_component", reference_component)
    batches = _batches(dataset, tokens, batch_size, model.device)
    was_training = model.training
    model.eval()
    try:
        losses = _losses(model, batches)
        reference = reference_component or min(losses, key=losses.get)
        if reference != config.reference_component:
            _change_reference(model, reference)
        every = min(max(2, round(1 / held_out)), len(batches))  # of few batches, too, one is held out
        pairs = collect(model, batches, reference, every)
    finally:
        model.train(was_training)
    r2, ridges = {}, {}
    for (side, name, block), (fit, test) in bar(pairs.items(), desc="Solving", unit="map", leave=False):
        weight, bias, ridge, score = solve_ridge(fit, test)
        projector = getattr(model.hybrid_mixer, side)[f"{name}-{block}"]
        projector.weight.zero_()
        projector.bias.zero_()
        projector.weight[: weight.shape[0], : weight.shape[1]] = weight.to(projector.weight)
        projector.bias[: len(bias)] = bias.to(projector.bias)
        broadcast(projector.weight)  # solvers may differ in the last bits from one processor to the next
        broadcast(projector.bias)
        r2[f"{side}:{name}-{block}"], ridges[f"{side}:{name}-{block}"] = score, ridge
    tokens = sum(int(real.sum()) for _, _, real in batches)
    config.projector_init = "calibrated"
    config.calibration = {"tokens": tokens, "reference": reference}
    return Calibration(reference, losses, r2, ridges, tokens)


def awaits_calibration(model: torch.nn.Module) -> bool:
    """Whether a hybrid was composed with projector_init="calibrated" and has projectors that nobody calibrated yet."""
    config, mixer = model.config, model.hybrid_mixer
    if config.projector_init != "calibrated" or config.calibration is not None:
        return False
    return any(isinstance(p, LinearProjector) for p in (*mixer.into.values(), *mixer.out_of.values()))


def _batches(dataset, tokens, batch_size, device):
    """[(ids, labels, which of them are text and not padding)], each [batch, time]."""
    rows = separate(dataset, tokens)
    out = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids, labels = pad(part["input_ids"], 0), pad(part["labels"], NO_LOSS)
        real = pad([[1] * len(one) for one in part["input_ids"]], 0).bool()
        out.append(tuple(one.to(device) for one in (ids, labels, real)))
    if len(out) < 2:
        raise ManticoreError(
            f"Calibration needs at least two batches of text, got {len(out)} of {sum(map(len, rows['input_ids']))} "
            "tokens: give more text or a smaller batch_size."
        )
    return out


def _losses(model, batches):
    """Loss of each component alone on a few of the batches: enough to tell which is best."""
    names, some = model.config.component_names, batches[: max(2, len(batches) // 4)]
    if len(names) == 1:
        return {names[0]: float("nan")}
    sums, count, (rank, size) = dict.fromkeys(names, 0.0), 0, world()
    for ids, labels, _ in bar(some[rank::size], desc="Choosing the reference", unit="batch", leave=False):
        kept = int((labels[:, 1:] != NO_LOSS).sum())
        count += kept
        for name in names:
            sums[name] += loss_alone(model, name, ids, labels).item()
    *sums, count = all_reduce_dict({**sums, "": count}, model.device).items()
    return {name: loss / count[1] for name, loss in sums}


def loss_alone(model: torch.nn.Module, name: str, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a component alone loses on tokens [batch, time], in nats: the sum over those with a label."""
    logits = component_runner(model, name)(input_ids=ids, use_cache=False).logits
    logits = logits[:, :-1, : model.config.vocab_size].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=NO_LOSS)


def _change_reference(model, reference):
    """Gives the mixer the projectors that the new reference needs; they are all about to be solved for."""
    model.config.reference_component = reference
    if model.config.gate != "none":
        return
    old = model.hybrid_mixer
    with local_torch_dtype(model.dtype):
        new = model.new_mixer().to(old.alpha_logits.device)
    new.reset()
    new.alpha_logits.data.copy_(old.alpha_logits)
    if new.token_gate is not None:
        new.token_gate.load_state_dict(old.token_gate.state_dict())
    model.hybrid_mixer = new.train(old.training)


def collect(
    model: torch.nn.Module, batches: list[tuple], reference: str, every: int
) -> dict[tuple[str, str, str], tuple["Moments", "Moments"]]:
    """What every projector that has parameters is to be solved from.

    Args:
        model: A hybrid.
        batches: (token ids [rows, time], their mask or None, bool [rows, time] of the tokens that count).
        reference: The component whose states stand for the shared ones.
        every: Of so many batches one is held out.

    Returns:
        {(side, name, block): (moments to fit, moments held out)}.
    """
    mixer, pairs, (rank, size) = model.hybrid_mixer, {}, world()
    if not any(isinstance(one, LinearProjector) for one in (*mixer.into.values(), *mixer.out_of.values())):
        return pairs
    for number, (ids, _, real) in enumerate(bar(batches, desc="Calibrating", unit="batch", leave=False)):
        mine = number % size == rank
        if not mine and number:  # the first one shows every rank which maps there are
            continue
        states = {name: _boundary_states(model, name, ids) for name in model.config.component_names}
        for side, projectors in (("into", mixer.into), ("out_of", mixer.out_of)):
            for key, projector in projectors.items():
                if not isinstance(projector, LinearProjector):
                    continue
                name, block = key.rsplit("-", 1)
                if side == "out_of":
                    x, y = states[name][int(block) + 1], states[reference][int(block) + 1]
                else:
                    x, y = states[reference][int(block)], states[name][int(block)]
                    if int(block) == 0:  # with mixed embeddings the first block reads their mixture
                        x = resize(mix_embeddings(model, ids), projector.in_features)
                x, y = (rows[real][: None if mine else 0] for rows in (x, y))
                if (side, name, block) not in pairs:
                    made = [Moments(x.shape[1], y.shape[1], x.device) for _ in range(2)]
                    pairs[side, name, block] = tuple(made)
                pairs[side, name, block][number % every == every - 1].add(x, y)
    for fit, test in pairs.values():
        fit.join()
        test.join()
    return pairs


def _boundary_states(model, name, ids):
    """States of a component run alone: its embeddings, then the state after each of its segments."""
    out = [model.embed(name, ids)]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    for block in range(model.config.num_blocks):
        out.append(model.segments.segment(name, block)(out[-1], None, positions))
    return out
