"""What a hunt found: maps of heads, rankings, promises and what fresh cases say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from physnb.config import HeadSet, require
from physnb.plots.style import EFFECT_COLOURS, METHOD_COLOURS, colour_limit, method_colour, new_figure


def plot_head_map(table: Float[Tensor, "layer head"], chosen: HeadSet = (), label: str = "effect") -> Figure:
    """Layer x head map of an effect around 0, orange where negative (it helps); chosen heads are framed."""
    values = np.asarray(table)
    layers, heads = values.shape
    figure, axes = new_figure(0.62 * heads + 2.2, 0.5 * layers + 1.2)
    limit = colour_limit(values)
    seaborn.heatmap(
        values, ax=axes[0, 0], cmap=EFFECT_COLOURS, vmin=-limit, vmax=limit, annot=True, fmt=".2f",
        annot_kws=dict(fontsize=7), cbar_kws=dict(label=label), linewidths=0.5, square=False,
    )  # fmt: skip
    for layer, head in chosen:
        axes[0, 0].add_patch(Rectangle((head, layer), 1, 1, fill=False, edgecolor="black", lw=2))
    axes[0, 0].set(xlabel="head", ylabel="layer")
    return figure


def plot_ranking(names: Sequence[str], means, lows, highs, chosen: int, label: str) -> Figure:
    """Every head's effect with its interval, most helpful first; the first `chosen` are highlighted."""
    figure, axes = new_figure(max(6, 0.2 * len(names)), 3.2)
    axis, places = axes[0, 0], np.arange(len(names))
    colours = [METHOD_COLOURS["hunted"] if i < chosen else METHOD_COLOURS["unguided"] for i in places]
    axis.axhline(0, color="black", linewidth=0.8)
    axis.vlines(places, lows, highs, color=colours, linewidth=1.5)
    axis.scatter(places, means, color=colours, s=14, zorder=3)
    axis.set_xticks(places, names, rotation=90, fontsize=7)
    axis.set(ylabel=label, xlim=(-1, len(names)))
    return figure


def plot_promises(rows: Sequence[Mapping], label: str) -> Figure:
    """What each chosen head promised on the selection cases and did on fresh ones; the step up is the winner's curse.

    rows: of `confirm.HeadVerdict.to_row`, in the order to draw. Bars are 95 % intervals; filled where confirmed.
    """
    require(len(rows) > 0, "there is no head to draw")
    figure, axes = new_figure(max(6, 0.7 * len(rows) + 2), 3.2)
    axis, places = axes[0, 0], np.arange(len(rows))
    axis.axhline(0, color="black", linewidth=0.8)
    sides = (("promised", "selection cases", -0.12, METHOD_COLOURS["unguided"]),)
    sides += (("fresh", "fresh cases", 0.12, METHOD_COLOURS["hunted"]),)
    for name, text, shift, colour in sides:
        for place, row in zip(places, rows, strict=True):
            axis.vlines(place + shift, row[name]["low"], row[name]["high"], color=colour, linewidth=2)
        filled = [colour if name == "promised" or row["confirmed"] else "white" for row in rows]
        means = [row[name]["mean"] for row in rows]
        axis.scatter(places + shift, means, color=filled, edgecolor=colour, s=28, zorder=3, label=text)
    axis.set_xticks(places, [row["head"] for row in rows])
    axis.set(ylabel=label, xlim=(-0.6, len(rows) - 0.4))
    handles = [Line2D([], [], color=colour, marker="o", label=text) for _, text, _, colour in sides]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_differences(rows: Sequence[dict], metrics: Mapping[str, str]) -> Figure:
    """Paired difference to unguided of each method, one panel a metric, with 95 % intervals; left of 0 is better.

    rows: from `search.ArmResult.to_row`; metrics: unit by name.
    """
    rows = [row for row in rows if row[next(iter(metrics))]["difference"] is not None]
    figure, axes = new_figure(3 * len(metrics) + 1, 0.45 * len(rows) + 1.1, 1, len(metrics))
    for axis, (metric, unit) in zip(axes[0], metrics.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(reversed(rows)):
            d, colour = row[metric]["difference"], method_colour(row["method"])
            if d["mean"] is not None:
                axis.plot([d["low"], d["high"]], [place, place], color=colour, linewidth=2)
                axis.plot(d["mean"], place, "o", color=colour)
        names = [row["method"] for row in reversed(rows)] if axis is axes[0, 0] else [""] * len(rows)
        axis.set_yticks(range(len(rows)), names)
        axis.locator_params(axis="x", nbins=4)  # more ticks run into each other
        axis.set(xlabel=f"{metric.replace('_', ' ')}\nminus unguided ({unit})", ylim=(-0.6, len(rows) - 0.4))
    return figure
