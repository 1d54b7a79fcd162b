"""One style: one colour a method, colours safe for colour-blind readers, figures that no backend shows by itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import seaborn
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from physnb.store import written_whole

PALETTE = seaborn.color_palette("colorblind")

METHOD_COLOURS = {
    "true": "black",
    "unguided": PALETTE[7],
    "CFG": PALETTE[1],
    "random": PALETTE[4],
    "all heads": PALETTE[3],
    "best layer": PALETTE[2],
    "PAG": PALETTE[2],
    "SEG": PALETTE[9],
    "AutoGuidance": PALETTE[5],
    "hunted": PALETTE[0],
}

EFFECT_COLOURS = "PuOr"  # diverging, safe for colour-blind readers; purple is harm, orange is help

SHARE_COLOURS = "Blues"  # from nothing to most

matplotlib.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 130, "font.size": 10}
)


def method_colour(name: str):
    """The colour of a method everywhere: `8 hunted heads` has that of `hunted`, `SEG, L3` that of `SEG`."""
    return next((colour for method, colour in METHOD_COLOURS.items() if method in name), PALETTE[6])


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure that no backend shows by itself, and its axes as a 2-D array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def interval_text(estimate: Mapping[str, float | None] | None) -> str:
    """Mean over interval in two lines, for a cell of a map; nothing where nothing was judged."""
    if estimate is None or estimate["mean"] is None:
        return ""
    return f"{estimate['mean']:+.2f}\n[{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


def colour_limit(values: Float[np.ndarray, "..."]) -> float:
    """The largest distance from 0, as the end of a colour scale; 1 where every value is 0 or not a number."""
    return float(np.nanmax(np.abs(values), initial=0.0)) or 1.0


def colour_scale(values: Float[np.ndarray, "..."]) -> tuple[str, float, float]:
    """Colours of a map, and the values at both ends: around 0 where any is below it, else from nothing to most."""
    limit = colour_limit(values)
    return (EFFECT_COLOURS, -limit, limit) if bool((values < 0).any()) else (SHARE_COLOURS, 0.0, limit)


def effect_colours(values: Sequence[float]) -> list[str]:
    """`#rrggbb` of each value on its `colour_scale`, white where it is not a number."""
    known = np.asarray(values, dtype=float)
    name, low, high = colour_scale(known)
    shares = (known - low) / (high - low)
    return [to_hex(matplotlib.colormaps[name](share)) if share == share else "#ffffff" for share in shares]


def text_colour(background: str) -> str:
    """Black or white, whichever reads better on a colour: by its luma (ITU-R BT.601)."""
    red, green, blue = to_rgb(background)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def save_figure(path: Path, figure: Figure) -> None:
    """The figure as a PNG file, whole or not at all."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, at 100 pixels an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def figure_pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """The figure as pixels, at its own resolution."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def cell_boxes(figure: Figure) -> list[list[tuple[float, float, float, float]]]:
    """(left, top, right, bottom) in pixels of every cell of the heat map in the figure's first axes, row by row.

    Of a figure that `figure_pixels` has drawn: the layout is not known before.
    """
    axis, height = figure.axes[0], figure.canvas.get_width_height()[1]
    columns, rows = (round(max(limits)) for limits in (axis.get_xlim(), axis.get_ylim()))

    def box(row: int, column: int) -> tuple[float, float, float, float]:
        corners = axis.transData.transform([(column, row), (column + 1, row + 1)])
        (left, right), (bottom, top) = np.sort(corners, axis=0).T
        return left, height - top, right, height - bottom

    return [[box(row, column) for column in range(columns)] for row in range(rows)]
