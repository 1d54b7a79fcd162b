"""Heads one by one: where they look, when they help, what they add to a set, and where that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from physnb.config import HeadSet, require
from physnb.plots.style import EFFECT_COLOURS, PALETTE, colour_limit, colour_scale, interval_text, new_figure


def plot_head_maps(maps: Mapping[str, Float[Tensor, "layer head"]], chosen: HeadSet = (), columns: int = 3) -> Figure:
    """Several layer x head maps side by side, each in its own colours; chosen heads are framed.

    Maps with values below zero are coloured around 0, orange below; others from nothing to most.
    """
    require(len(maps) > 0, "there is no map to draw")
    layers, heads = np.asarray(next(iter(maps.values()))).shape
    down, columns = -(-len(maps) // columns), min(columns, len(maps))
    figure, axes = new_figure((0.34 * heads + 1.2) * columns, (0.3 * layers + 0.9) * down, down, columns)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    for axis, (name, table) in zip(axes.flat, maps.items(), strict=False):
        values = np.asarray(table)
        colours, low, high = colour_scale(values)
        seaborn.heatmap(values, ax=axis, cmap=colours, vmin=low, vmax=high, linewidths=0.3)
        for layer, head in chosen:
            axis.add_patch(Rectangle((head, layer), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="head", ylabel="layer")
        axis.tick_params(labelsize=7)
    return figure


def plot_profile(rows: Sequence[Mapping], label: str) -> Figure:
    """Effects of heads alone by noise level, scenario, split and strength: one panel a question, 95 % intervals.

    rows: of `profiles.profile_rows`, of one head or several.
    """
    require(len(rows) > 0, "there is no effect to draw")
    questions, heads = (list(dict.fromkeys(row[name] for row in rows)) for name in ("by", "head"))
    figure, axes = new_figure(2.6 * len(questions), 3.0, 1, len(questions))
    for axis, question in zip(axes[0], questions, strict=True):
        own = [row for row in rows if row["by"] == question and row["mean"] is not None]
        values = list(dict.fromkeys(row["at"] for row in own))
        axis.axhline(0, color="black", linewidth=0.8)
        for number, head in enumerate(heads):
            shift = 0.6 * ((number + 0.5) / len(heads) - 0.5)
            found = [row for row in own if row["head"] == head]
            places = [values.index(row["at"]) + shift for row in found]
            colour = PALETTE[number % len(PALETTE)]
            axis.vlines(places, [r["low"] for r in found], [r["high"] for r in found], color=colour, linewidth=1.5)
            axis.plot(places, [row["mean"] for row in found], "o", color=colour, markersize=3, label=head)
        axis.set_xticks(range(len(values)), values, fontsize=8)
        axis.set_xlabel(question, fontsize=9)
    axes[0, 0].set_ylabel(label, fontsize=9)
    if len(heads) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def plot_contributions(rows: Sequence[Mapping], label: str) -> Figure:
    """Each head of a set alone, its Shapley value, and what is lost without it; 95 % intervals.

    rows: of `contributions.Contributions.to_rows`.
    """
    require(len(rows) > 0, "there is no head to draw")
    figure, axes = new_figure(max(6, 0.9 * len(rows) + 2), 3.2)
    axis = axes[0, 0]
    axis.axhline(0, color="black", linewidth=0.8)
    kinds = {"alone": PALETTE[7], "shapley": PALETTE[0], "leave_one_out": PALETTE[1]}
    for number, (kind, colour) in enumerate(kinds.items()):
        found = [row[kind] for row in rows]
        places = np.arange(len(rows)) + 0.2 * (number - 1)
        axis.vlines(places, [e["low"] for e in found], [e["high"] for e in found], color=colour, linewidth=2)
        axis.plot(places, [e["mean"] for e in found], "o", color=colour, label=kind.replace("_", " "))
    axis.set_xticks(range(len(rows)), [row["head"] for row in rows])
    axis.set_ylabel(label, fontsize=9)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return figure


def plot_transfer(rows: Sequence[Mapping], label: str) -> Figure:
    """Heads hunted on one condition (rows), tested on another (columns): mean effect over its 95 % interval.

    rows: of `transfer.Transfer.to_row`. Frames mark heads on the condition that chose them.
    """
    require(len(rows) > 0, "there is no transfer to draw")
    sources, targets = (list(dict.fromkeys(row[name] for row in rows)) for name in ("hunted_on", "tested_on"))
    effects = {(row["hunted_on"], row["tested_on"]): row["effect"] for row in rows}
    means = np.array([[effects[s, t]["mean"] for t in targets] for s in sources], dtype=float)
    texts = [[interval_text(effects[s, t]) for t in targets] for s in sources]
    limit = colour_limit(means)
    figure, axes = new_figure(1.45 * len(targets) + 2.6, 0.62 * len(sources) + 1.2)
    seaborn.heatmap(
        means, ax=axes[0, 0], cmap=EFFECT_COLOURS, vmin=-limit, vmax=limit, annot=texts, fmt="", linewidths=0.5,
        annot_kws=dict(fontsize=7), xticklabels=targets, yticklabels=sources, cbar_kws=dict(label=label),
    )  # fmt: skip
    for row, source in enumerate(sources):
        if source in targets:
            corner = (targets.index(source), row)
            axes[0, 0].add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2))
    axes[0, 0].set(xlabel="tested on fresh cases of", ylabel="hunted on")
    return figure


def plot_picture(picture: UInt8[np.ndarray, "height width 3"]) -> Figure:
    """A picture drawn elsewhere as a figure, one pixel a pixel."""
    height, width, _ = np.asarray(picture).shape
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(picture, interpolation="nearest")
    axis.set_axis_off()
    return figure
