"""How much guidance: an effect over two settings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import seaborn
from matplotlib.figure import Figure

from physnb.config import require
from physnb.plots.style import EFFECT_COLOURS, PALETTE, colour_limit, interval_text, new_figure

Surface = Mapping[tuple[float, float], Mapping[str, float | None]]
BLANK = dict(mean=None, low=None, high=None)  # a point that is not there
WEIGHT_AND_STRENGTH = ("guidance weight w (0 = off)", "perturbation strength u (0 = off)", "u")


def grid_of(surface: Surface) -> tuple[list[float], list[float], list[list[Mapping[str, float | None]]]]:
    """All values of the first and of the second setting, and the points, one row a second setting."""
    first, second = (sorted({key[i] for key in surface}) for i in (0, 1))
    return first, second, [[surface.get((a, b), BLANK) for a in first] for b in second]


def plot_surface(
    surface: Surface,
    label: str,
    names: tuple[str, str, str] = WEIGHT_AND_STRENGTH,
) -> Figure:
    """Left: an effect over two settings, such as weight w and strength u; right: as lines with 95 % intervals.

    names: of the first setting, of the second, and of the second in the legend. Points that are not there stay blank.
    """
    first, second, rows = grid_of(surface)
    mean, low, high = (np.array([[point[k] for point in row] for row in rows], dtype=float) for k in BLANK)
    limit = colour_limit(mean)
    figure, axes = new_figure(10, 3.4, 1, 2)
    seaborn.heatmap(
        mean, ax=axes[0, 0], cmap=EFFECT_COLOURS, vmin=-limit, vmax=limit, annot=True, fmt=".2f",
        xticklabels=[f"{a:g}" for a in first], yticklabels=[f"{b:g}" for b in second], cbar_kws=dict(label=label),
    )  # fmt: skip
    axes[0, 0].set(xlabel=names[0], ylabel=names[1])
    axes[0, 0].invert_yaxis()
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    for number, b in enumerate(second):
        shift = 0.02 * (number - len(second) / 2) * (max(first) or 1)
        known = ~np.isnan(mean[number])  # a line goes on over a point that is not there
        places, middle, bottom, top = (v[known] for v in (np.array(first), mean[number], low[number], high[number]))
        axes[0, 1].errorbar(
            places + shift, middle, color=PALETTE[number % 10], marker="o", markersize=3, capsize=2,
            yerr=np.abs([middle - bottom, top - middle]), label=f"{names[2]} = {b:g}",
        )  # fmt: skip
    axes[0, 1].set(xlabel=names[0], ylabel=label)
    axes[0, 1].legend(frameon=False, fontsize=8)
    return figure


def plot_surfaces(
    surfaces: Mapping[str, Surface],
    units: Mapping[str, str],
    names: tuple[str, str, str] = WEIGHT_AND_STRENGTH,
) -> Figure:
    """Effects of several metrics over the same two settings: mean and 95 % interval in every cell."""
    require(len(surfaces) > 0, "there is no surface to draw")
    down = -(-len(surfaces) // 2)
    figure, axes = new_figure(12, 2.9 * down, down, 2)
    for axis in axes.flat[len(surfaces) :]:
        axis.set_axis_off()
    for axis, (metric, surface) in zip(axes.flat, surfaces.items(), strict=False):
        first, second, rows = grid_of(surface)
        means = np.array([[point["mean"] for point in row] for row in rows], dtype=float)
        texts = [[interval_text(point) for point in row] for row in rows]
        limit = colour_limit(means)
        seaborn.heatmap(
            means, ax=axis, cmap=EFFECT_COLOURS, vmin=-limit, vmax=limit, annot=texts, fmt="",
            annot_kws=dict(fontsize=7), xticklabels=[f"{a:g}" for a in first], yticklabels=[f"{b:g}" for b in second],
        )  # fmt: skip
        axis.set_title(f"{metric.replace('_', ' ')} minus unguided ({units[metric]})", fontsize=9)
        axis.set(xlabel=names[0], ylabel=names[1].split(" (")[0])
        axis.invert_yaxis()
    return figure
