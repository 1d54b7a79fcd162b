"""What captions and mixtures of training clips change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from physnb.config import require
from physnb.plots.style import PALETTE, new_figure

PANELS_A_ROW = 4
SPLIT_COLOURS = {"id": PALETTE[7], "ood": PALETTE[0]}


def plot_arms(rows: Sequence[Mapping], quantities: Mapping[str, str]) -> Figure:
    """Differences of trainings to a baseline, one panel a quantity, in (grey) and out of distribution (blue).

    rows: of `knowledge.compare_arms`; quantities: unit by name. Bars are 95 % intervals over trainings; a difference of
    one training alone has none.
    """
    rows = [row for row in rows if row["difference"] is not None]
    require(len(rows) > 0, "there is no arm besides the baseline to draw")
    arms = list(dict.fromkeys((row["level"], row["physics"], row["variety"]) for row in rows))
    columns = min(PANELS_A_ROW, len(quantities))
    lines = -(-len(quantities) // columns)
    figure, axes = new_figure(2.6 * columns + 2.2, (0.42 * len(arms) + 1.2) * lines, lines, columns)
    for axis in axes.flat[len(quantities) :]:
        axis.set_axis_off()
    for axis, (quantity, unit) in zip(axes.flat, quantities.items(), strict=False):
        axis.axvline(0, color="black", linewidth=0.8)
        for row in (row for row in rows if row["quantity"] == quantity):
            place = len(arms) - 1 - arms.index((row["level"], row["physics"], row["variety"]))
            place += 0.15 if row["split"] == "id" else -0.15
            d, colour = row["difference"], SPLIT_COLOURS[row["split"]]
            if d["low"] is not None:
                axis.plot([d["low"], d["high"]], [place, place], color=colour, linewidth=2)
            axis.plot(d["mean"], place, "o", color=colour, markersize=4)
        names = [f"{level}, {physics:.0%} {variety}" for level, physics, variety in reversed(arms)]
        axis.set_yticks(range(len(arms)), names if axis in axes[:, 0] else [""] * len(arms))
        axis.set(xlabel=f"{quantity}\nminus baseline ({unit})", ylim=(-0.6, len(arms) - 0.4))
    return figure
