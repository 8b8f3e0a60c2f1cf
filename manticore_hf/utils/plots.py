"""Pictures: alpha over a search, the mixture that came out, weights over tokens, losses, and what models are good at.

Drawn on `Figure` objects, without pyplot: pyplot holds one state per process, its backend and its open figures, and
that state is the user's. A notebook keeps the backend that it had.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from manticore_hf.modeling.settings_manticore import printable

_LONGEST, _TOKEN, _MOST = 60, 12, 40  # characters of a name and of a token, rows of a chart


def plot_alpha(steps: Sequence[int], history: Mapping[str, Sequence[float]], path: str | os.PathLike) -> None:
    """Draws alpha over the steps of a search, one panel per block.

    Args:
        steps: [n] optimizer steps.
        history: {"alpha/BLOCK/COMPONENT": [n] weights}, as `alpha_history` gives it.
        path: PNG to write.
    """
    blocks = sorted({int(key.split("/")[1]) for key in history})
    figure = Figure(figsize=(7, 1.2 + 1.8 * len(blocks)))
    axes = figure.subplots(len(blocks), 1, sharex=True, squeeze=False)
    for block, axis in zip(blocks, axes[:, 0]):
        for key, values in history.items():
            _, b, name = key.split("/")
            if int(b) == block:
                axis.plot(steps, values, label=name, linewidth=1.5)
        axis.set_ylim(0, 1)
        axis.set_ylabel(f"alpha, block {block + 1}")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="best", fontsize="small")
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def plot_mixture(
    weights: torch.Tensor | Sequence[Sequence[float]], names: Sequence[str], path: str | os.PathLike
) -> None:
    """Draws the mixture weights as a heat map, blocks by components.

    Args:
        weights: [S, K] nested lists or tensor.
        names: K component names.
        path: PNG to write.
    """
    rows = [[float(w) for w in row] for row in weights]
    figure = Figure(figsize=(1.8 + 1.4 * len(names), 1.4 + 0.6 * len(rows)))
    axis = figure.subplots()
    image = axis.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for s, row in enumerate(rows):
        for k, weight in enumerate(row):
            axis.text(k, s, f"{weight:.2f}", ha="center", va="center", color="white" if weight > 0.6 else "black")
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set_yticks(range(len(rows)), [f"block {s + 1}" for s in range(len(rows))])
    figure.colorbar(image, label="mixture weight")
    _save(figure, path)


def plot_weights(
    weights: torch.Tensor | Sequence[Sequence[float]],
    names: Sequence[str],
    path: str | os.PathLike | None = None,
    tokens: Sequence[str] = (),
) -> Figure:
    """Draws how much each component contributes to the prediction of each token, one above the other.

    Args:
        weights: [time, K] nested lists or tensor, as a hybrid returns them for a row (`weights[0]`).
        names: K component names.
        path: PNG to write, or None.
        tokens: What stands at the positions, to be written below them; () for their numbers.

    Returns:
        The picture, which a notebook shows.
    """
    columns = [[float(w) for w in column] for column in zip(*weights)]
    places = range(len(columns[0]))
    figure = Figure(figsize=(max(7, 0.16 * len(tokens)), 2.6 + 0.6 * bool(tokens)))
    axis = figure.subplots()
    axis.stackplot(places, columns, labels=names)
    axis.set_xlim(0, len(places) - 1)
    axis.set_ylim(0, 1)
    axis.set_ylabel("weight")
    if tokens:
        shown = [printable(token)[:_TOKEN] for token in tokens]
        axis.set_xticks(places, shown, rotation=90, fontsize="x-small", parse_math=False)
    else:
        axis.set_xlabel("token")
    axis.legend(loc="lower left", fontsize="small")
    figure.tight_layout()
    if path is not None:
        _save(figure, path)
    return figure


def plot_losses(losses: Mapping[str, float], path: str | os.PathLike) -> None:
    """Draws losses as bars, hybrids apart from their baselines by colour.

    Args:
        losses: {label: nats per token}; labels of hybrids begin with "hybrid".
        path: PNG to write.
    """
    labels = sorted(losses, key=losses.get, reverse=True)
    values = [losses[label] for label in labels]
    figure = Figure(figsize=(8, 1 + 0.32 * len(labels)))
    axis = figure.subplots()
    colours = ["tab:orange" if label.startswith("hybrid") else "tab:gray" for label in labels]
    axis.barh(labels, values, color=colours)
    for row, value in enumerate(values):
        axis.text(value, row, f" {value:.3f}", va="center", fontsize="small")
    low, high = min(values), max(values)
    axis.set_xlim(low - 0.4 * (high - low) - 1e-3, high + 0.15 * (high - low) + 1e-3)
    axis.set_xlabel("test loss, nats per token (the axis does not start at 0)")
    _save(figure, path)


def plot_differences(
    rows: Sequence[Mapping],
    hybrid: str,
    path: str | os.PathLike,
    per_byte: float | None = None,
    unit: str = "nats per token",
) -> None:
    """Draws how much each baseline loses against a hybrid, with its interval.

    Args:
        rows: Rows of a comparison: name, kind, difference, difference_interval (its low and high end; None, None: it is
            not known).
        hybrid: Name of the hybrid that all are compared with.
        path: PNG to write.
        per_byte: Bits per byte in a nat per token, for a second scale; None for none.
        unit: Of the differences.
    """
    shown = sorted((row for row in rows if "difference" in row), key=lambda row: row["difference"], reverse=True)
    shown = shown[-_MOST:]  # the best baselines are the last
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)))
    axis = figure.subplots()
    colours = {"hybrid": "tab:orange", "pruned": "tab:orange", "oracle": "tab:green", "single": "tab:purple"}
    for place, row in enumerate(shown):
        low, high = row["difference_interval"]
        colour = colours.get(row["kind"], "tab:gray")
        if low is not None:
            axis.plot([low, high], [place, place], color=colour, linewidth=2)
        axis.plot(row["difference"], place, "o", color=colour)
    # Names may be anybody's: nothing in them is a formula, and none pushes the chart aside
    names = [printable(row["name"])[:_LONGEST] for row in shown]
    axis.set_yticks(range(len(shown)), names, fontsize="small", parse_math=False)
    axis.axvline(0, color="black", linewidth=1)
    axis.grid(alpha=0.3, axis="x")
    text = f"loss minus that of '{hybrid}', {unit} (right of 0: the hybrid is better)"
    axis.set_xlabel(text, fontsize="small", parse_math=False)
    if per_byte is not None:
        top = axis.secondary_xaxis("top", functions=(lambda x: x * per_byte, lambda x: x / per_byte))
        top.set_xlabel("bits per byte", fontsize="small")
    _save(figure, path)


def plot_profile(
    scores: Mapping[str, Mapping[str, float]], chance: Mapping[str, float], path: str | os.PathLike
) -> None:
    """Draws accuracies as a radar plot, one axis per task, from chance in the centre to 1 at the rim.

    Args:
        scores: {model: {task: accuracy}}; what is below chance is drawn in the centre.
        chance: {task: accuracy of guessing}, below 1; its order is that of the axes.
        path: PNG to write.
    """
    angles = [2 * math.pi * i / len(chance) for i in range(len(chance))]
    figure = Figure(figsize=(8.5, 6))
    axis = figure.subplots(subplot_kw={"projection": "polar"})
    axis.set_theta_offset(math.pi / 2)
    axis.set_theta_direction(-1)
    markers = "osD^vP*X"
    for i, (model, found) in enumerate(scores.items()):
        radii = [min(1.0, max(0.0, (found[task] - low) / (1 - low))) for task, low in chance.items()]
        axis.plot(angles + angles[:1], radii + radii[:1], label=model, linewidth=1.5, marker=markers[i % 8], ms=5)
        axis.fill(angles, radii, alpha=0.06)
    axis.set_ylim(0, 1)
    axis.set_yticks([0.25, 0.5, 0.75, 1], ["", "half way", "", "1"], fontsize="x-small", color="dimgray")
    axis.set_rlabel_position(180 / len(chance))
    axis.set_xticks(angles, [f"{task}\n(chance {low:.3f})" for task, low in chance.items()], fontsize="small")
    for angle, label in zip(angles, axis.get_xticklabels()):
        side = math.sin(angle)  # labels beside the circle begin or end at it
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axis.tick_params(axis="x", pad=8)
    axis.legend(
        loc="upper left", bbox_to_anchor=(1.2, 1.1), fontsize="small", title="from chance to 1", title_fontsize="small"
    )
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)  # the ending of the path chooses what draws it, not the backend
