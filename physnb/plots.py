"""Figures and videos from results: data in, Figure out. One style, one colour a method, intervals always drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import mediapy
import numpy as np
import seaborn
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from physnb.config import HeadSet, require
from physnb.store import written_whole

mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())  # a binary that comes with the package: no system ffmpeg needed

PALETTE = seaborn.color_palette("colorblind")
METHOD_COLOURS = {
    "true": "black",
    "unguided": PALETTE[7],
    "CFG": PALETTE[1],
    "random heads": PALETTE[4],
    "all heads": PALETTE[3],
    "best layer": PALETTE[2],
    "SEG": PALETTE[9],
    "AutoGuidance": PALETTE[5],
    "hunted heads": PALETTE[0],
}
EFFECT_COLOURS = "PuOr"  # diverging, safe for colour-blind readers; purple is harm, orange is help
matplotlib.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100, "savefig.dpi": 130, "font.size": 10}
)


def method_colour(name: str):
    """The colour of a method everywhere: `8 hunted heads` has that of `hunted heads`, `SEG, L3` that of `SEG`."""
    return next((colour for method, colour in METHOD_COLOURS.items() if method in name), PALETTE[6])


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure that no backend shows by itself, and its axes as a 2-D array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_training(history: dict[str, tuple[Sequence[int], Sequence[float]]], window: int = 20) -> Figure:
    """Training loss over steps on a log scale, single steps and their running mean."""
    steps, losses = (np.asarray(column) for column in history["loss"])
    require(len(steps) > 0, "the training log holds no loss yet")
    figure, axes = new_figure(7, 3)
    axis = axes[0, 0]
    axis.plot(steps, losses, color=PALETTE[7], alpha=0.4, linewidth=0.7, label="every step")
    width = min(window, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axis.plot(steps[width - 1 :], smooth, color=PALETTE[0], label=f"mean of {width}")
    axis.set(xlabel="step", ylabel="velocity loss", yscale="log")
    axis.legend(frameon=False)
    return figure


def plot_clips(clips: dict[str, Float[Tensor, "time height width 3"]], columns: int = 8) -> Figure:
    """Film strips, one row a clip, `columns` frames spread over it."""
    figure, axes = new_figure(1.1 * columns, 1.25 * len(clips), len(clips), columns)
    for place, (row, (name, frames)) in enumerate(zip(axes, clips.items(), strict=True)):
        for axis, number in zip(row, np.linspace(0, len(frames) - 1, columns).round().astype(int), strict=True):
            axis.imshow(frames[number], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(True)
                side.set_color("lightgrey")
            if place == 0:
                axis.set_title(f"frame {number}", fontsize=8)
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    return figure


def plot_trajectories(paths: dict[str, Float[Tensor, "time axis"]], given: int = 0) -> Figure:
    """Disc centres in the box (world units), one line a method; the first `given` points are start frames."""
    figure, axes = new_figure(4.2, 4)
    axis = axes[0, 0]
    for name, path in paths.items():
        axis.plot(*np.asarray(path).T, marker="o", markersize=3, color=method_colour(name), label=name)
    if given:
        first = np.asarray(next(iter(paths.values())))[:given]
        axis.scatter(*first.T, s=60, facecolors="none", edgecolors="black", label="start frames")
    axis.set(xlim=(0, 10), ylim=(0, 10), xlabel="x (world units)", ylabel="y (world units)", aspect="equal")
    axis.legend(frameon=False, fontsize=8)
    return figure


def plot_head_map(table: Float[Tensor, "layer head"], chosen: HeadSet = (), label: str = "effect") -> Figure:
    """Layer x head map of an effect around 0, orange where negative (it helps); chosen heads are framed."""
    values = np.asarray(table)
    layers, heads = values.shape
    figure, axes = new_figure(0.62 * heads + 2.2, 0.5 * layers + 1.2)
    limit = float(np.nanmax(np.abs(values))) or 1.0
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
    colours = [METHOD_COLOURS["hunted heads"] if i < chosen else METHOD_COLOURS["unguided"] for i in places]
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
    sides += (("fresh", "fresh cases", 0.12, METHOD_COLOURS["hunted heads"]),)
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
        axis.set(xlabel=f"{metric.replace('_', ' ')}\nminus unguided ({unit})", ylim=(-0.6, len(rows) - 0.4))
    return figure


def plot_surface(
    surface: Mapping[tuple[float, float], Mapping[str, float]], label: str, point: tuple[float, float] | None = None
) -> Figure:
    """Left: an effect over weight w and strength u, `point` framed; right: as lines over w with 95 % intervals."""
    weights, strengths = (sorted({key[i] for key in surface}) for i in (0, 1))
    values = np.array([[surface[w, u]["mean"] for w in weights] for u in strengths], dtype=float)
    limit = float(np.nanmax(np.abs(values))) or 1.0
    figure, axes = new_figure(10, 3.4, 1, 2)
    seaborn.heatmap(
        values, ax=axes[0, 0], cmap=EFFECT_COLOURS, vmin=-limit, vmax=limit, annot=True, fmt=".2f",
        xticklabels=[f"{w:g}" for w in weights], yticklabels=[f"{u:g}" for u in strengths], cbar_kws=dict(label=label),
    )  # fmt: skip
    axes[0, 0].set(xlabel="guidance weight w (0 = off)", ylabel="perturbation strength u (0 = off)")
    axes[0, 0].invert_yaxis()
    if point is not None:
        corner = (weights.index(point[0]), strengths.index(point[1]))
        axes[0, 0].add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2))
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    for number, u in enumerate(strengths):
        points = [surface[w, u] for w in weights]
        shift = 0.02 * (number - len(strengths) / 2) * (max(weights) or 1)
        places = np.array(weights) + shift
        axes[0, 1].errorbar(
            places, [p["mean"] for p in points], color=PALETTE[number % 10], marker="o", markersize=3, capsize=2,
            yerr=np.abs([[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]),
            label=f"u = {u:g}",
        )  # fmt: skip
    axes[0, 1].set(xlabel="guidance weight w (0 = off)", ylabel=label)
    axes[0, 1].legend(frameon=False, fontsize=8)
    return figure


def plot_attention(weights: Float[Tensor, "time height width"], query: tuple[int, int, int], frames=None) -> Figure:
    """Where one query token looks: one panel a token row of time, brighter is more; the query is framed in red.

    frames: a clip [time, height, width, 3] to draw underneath, its frames spread over the token grid's time axis.
    """
    values = np.asarray(weights)
    figure, axes = new_figure(1.35 * len(values), 1.7, 1, len(values))
    for time, axis in enumerate(axes[0]):
        extent = (-0.5, values.shape[2] - 0.5, values.shape[1] - 0.5, -0.5)
        if frames is not None:
            axis.imshow(frames[time * len(frames) // len(values)], extent=extent, alpha=0.5)
        axis.imshow(values[time], cmap="viridis", vmin=0, vmax=values.max(), alpha=0.7, extent=extent)
        axis.set(xticks=[], yticks=[], title=f"t = {time}")
        if time == query[0]:
            corner = (query[2] - 0.5, query[1] - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2))
    return figure


def side_by_side(clips: dict[str, Float[Tensor, "batch time height width 3"]], scale: int = 4) -> np.ndarray:
    """Clips as columns and cases as rows of one video [time, height, width, 3], enlarged, with grey gaps."""
    columns = []
    for frames in clips.values():
        big = np.asarray(frames).repeat(scale, axis=2).repeat(scale, axis=3)
        padded = np.pad(big, ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)), constant_values=200)
        columns.append(np.concatenate(list(padded), axis=1))
    return np.concatenate(columns, axis=2)


def save_figure(path: Path, figure: Figure) -> None:
    """The figure as a PNG file, whole or not at all."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def check_video_path(path: Path) -> None:
    """Raise ValueError unless `path` names an mp4 in a folder that exists: worth knowing before generating."""
    require(path.suffix == ".mp4", f"a video is an .mp4 file, got {path}")
    require(path.parent.is_dir(), f"folder {path.parent} does not exist; make it or choose another place")


def write_video(path: str | Path, clips: dict, fps: float = 8.0, scale: int = 4) -> Path:
    """An H.264 mp4 of `clips` (Clips or frame arrays) side by side; raises ValueError if nothing can be written."""
    path = Path(path)
    check_video_path(path)
    video = side_by_side({name: getattr(clip, "frames", clip) for name, clip in clips.items()}, scale)
    video = video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]  # H.264 wants even sizes
    try:
        data = mediapy.compress_video(video, fps=fps, qp=18)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
    return path


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
