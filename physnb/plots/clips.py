"""Clips as film strips, paths and videos."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import mediapy
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from physnb.config import require
from physnb.plots.style import method_colour, new_figure
from physnb.store import written_whole

mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())  # a binary that comes with the package: no system ffmpeg needed


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


def side_by_side(clips: dict[str, Float[Tensor, "batch time height width 3"]], scale: int = 4) -> np.ndarray:
    """Clips as columns and cases as rows of one video [time, height, width, 3], enlarged, with grey gaps."""
    columns = []
    for frames in clips.values():
        big = np.asarray(frames).repeat(scale, axis=2).repeat(scale, axis=3)
        padded = np.pad(big, ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)), constant_values=200)
        columns.append(np.concatenate(list(padded), axis=1))
    return np.concatenate(columns, axis=2)


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
