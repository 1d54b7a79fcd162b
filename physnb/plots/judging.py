"""The judges judged: ladders of broken clips, sensitivity, correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from physnb.config import require
from physnb.plots.style import EFFECT_COLOURS, PALETTE, new_figure

OUTCOME_COLOURS = {"worse": PALETTE[0], "tie": PALETTE[1], "better": PALETTE[3], "not judged": PALETTE[7]}


def plot_ladder(ladders: Mapping[str, Sequence], uses: Mapping[str, str], columns: int = 4) -> Figure:
    """One panel a metric: each rung's paired difference to the second take, 0 = second take, 1 = the worst rung.

    ladders: rows of `ladder.climb` by metric; uses: what the verdict allows each. Bars are 95 % intervals over clips; a
    metric of sets has none. Colour is what the interval says of the rung against the second take.
    """
    require(len(ladders) > 0, "there is no ladder to draw")
    down = -(-len(ladders) // columns)
    figure, axes = new_figure(2.6 * columns, 1.9 * down, down, columns)
    for axis in axes.flat[len(ladders) :]:
        axis.set_axis_off()
    for number, (name, rows) in enumerate(ladders.items()):
        axis = axes.flat[number]
        size = np.nanmax([abs(row.difference.mean) for row in rows]) or 1.0
        axis.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(rows):
            d, colour = row.difference, OUTCOME_COLOURS[row.against_second]
            axis.plot([d.low / size, d.high / size], [place, place], color=colour, linewidth=2)
            axis.plot(d.mean / size, place, "o", color=colour, markersize=4)
        names = [row.rung.replace("_", " ") for row in rows] if number % columns == 0 else [""] * len(rows)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{name.replace('_', ' ')}\n{uses[name]}", fontsize=8)
        if number + columns >= len(ladders):
            axis.set_xlabel("worse than a second take\n(share of worst rung)", fontsize=7)
    handles = [Line2D([], [], color=colour, marker="o", markersize=4) for colour in OUTCOME_COLOURS.values()]
    figure.legend(handles, list(OUTCOME_COLOURS), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def plot_sensitivity(rows: Mapping[str, Sequence[Mapping[str, float]]], clips: int, power: float) -> Figure:
    """How many clips each metric needs to see a speed error; `rows` of `ladder.detectable_error` by metric.

    The dashed line is at `clips`. Errors that a metric does not rate worse at all have no point. Metrics stand a little
    apart, for many need the fewest clips that have a spread, 2.
    """
    figure, axes = new_figure(7, 3.6)
    axis = axes[0, 0]
    for number, (name, found) in enumerate(rows.items()):
        shift = 1 + 0.03 * (number - (len(rows) - 1) / 2)
        points = [(row["error"] * shift, row["clips_needed"]) for row in found if np.isfinite(row["clips_needed"])]
        style = dict(color=PALETTE[number % len(PALETTE)], marker="os^Dv"[number // len(PALETTE) % 5], markersize=5)
        axis.plot(*zip(*points, strict=True) if points else ([], []), label=name.replace("_", " "), **style)
    axis.axhline(clips, color="black", linestyle="--", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="speed error (share)", ylabel=f"clips needed for {power:.0%} power")
    errors = sorted({row["error"] for found in rows.values() for row in found})
    axis.set_xticks(errors, [f"{error:g}" for error in errors])
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def plot_correlations(
    names: Sequence[str],
    rho: Float[Tensor, "score score"],
    low: Float[Tensor, "score score"],
    high: Float[Tensor, "score score"],
) -> Figure:
    """Rank correlations of every two scores, lower triangle; in brackets where the 95 % interval holds 0."""
    values, low, high = (np.asarray(table) for table in (rho, low, high))
    texts = np.full(values.shape, "", dtype=object)
    for i, j in np.argwhere(np.isfinite(values)):
        texts[i, j] = f"({values[i, j]:.2f})" if low[i, j] <= 0 <= high[i, j] else f"{values[i, j]:.2f}"
    labels = [name.replace("_", " ") for name in names]
    figure, axes = new_figure(0.62 * len(names) + 2.2, 0.5 * len(names) + 1.8)
    seaborn.heatmap(
        values, ax=axes[0, 0], cmap=EFFECT_COLOURS, vmin=-1, vmax=1, annot=texts, fmt="", annot_kws=dict(fontsize=7),
        mask=np.triu(np.ones(values.shape, bool)) | ~np.isfinite(values), linewidths=0.5,
        xticklabels=labels, yticklabels=labels, cbar_kws=dict(label="Spearman's rho"),
    )  # fmt: skip
    axes[0, 0].tick_params(labelsize=8)
    return figure
