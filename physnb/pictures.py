"""Pictures drawn pixel by pixel, fast enough to follow a slider; figures with axes are in `plots`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from physnb.config import require
from physnb.data import WORLD_SIZE
from physnb.plots import method_colour

Frames = UInt8[np.ndarray, "time height width 3"]
LABEL_HEIGHT = 22  # pixels above a panel
GAP = 8  # pixels between panels
FONT = cv2.FONT_HERSHEY_SIMPLEX


def encode_png(frames: Frames | UInt8[np.ndarray, "height width 3"], fps: float = 8.0) -> bytes:
    """A PNG, animated in a loop if there are several frames: every browser plays it, and it swaps without a flicker."""
    frames = frames if frames.ndim == 4 else frames[None]
    require(len(frames) > 0, "there is no frame to encode")
    first, *rest = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    more = dict(save_all=True, append_images=rest, duration=1000 / fps, loop=0) if rest else {}
    first.save(buffer, "PNG", compress_level=1, **more)
    return buffer.getvalue()


def pixel_colour(name: str) -> tuple[int, int, int]:
    """The method's colour of the figures as 8-bit RGB."""
    colour = method_colour(name)
    return (0, 0, 0) if colour == "black" else tuple(round(255 * part) for part in colour[:3])


def draw_film(
    clips: Mapping[str, UInt8[Tensor, "time height width 3"]],
    paths: Mapping[str, Float[Tensor, "time disc 2"]],
    *,
    height: int = 224,
) -> Frames:
    """Clips side by side under their names, with the parsed trajectories drawn over them.

    paths: disc centres in world units by clip, NaN where a disc is missing. Each panel shows the first clip's paths in
    black, as the truth, and its own in the colour of its name; a dot marks the present frame. height: pixels of a
    panel, rounded to whole pixels of the clip. Raises ValueError for clips of different sizes.
    """
    require(len(clips) > 0, "there is no clip to show")
    shapes = {tuple(frames.shape) for frames in clips.values()}
    require(len(shapes) == 1, f"the clips must have one size and length, got {sorted(shapes)}")
    _, rows, columns, _ = shapes.pop()
    scale = max(1, round(height / rows))
    truth = next(iter(clips))
    panels = []
    for name, frames in clips.items():
        panel = np.asarray(frames).repeat(scale, axis=1).repeat(scale, axis=2)
        panel = np.pad(panel, ((0, 0), (LABEL_HEIGHT, 0), (0, GAP), (0, 0)), constant_values=255)
        label = np.full_like(panel[0, :LABEL_HEIGHT], 255)
        panel[:, :LABEL_HEIGHT] = cv2.putText(label, name, (2, LABEL_HEIGHT - 7), FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        drawn = [(_places(paths[o], rows * scale), pixel_colour(o)) for o in dict.fromkeys((truth, name)) if o in paths]
        for number, picture in enumerate(panel):
            inside = picture[LABEL_HEIGHT:, : columns * scale]
            cv2.rectangle(inside, (0, 0), (columns * scale - 1, rows * scale - 1), (190, 190, 190), 1)
            for places, colour in drawn:
                _draw_path(inside, places, number, colour)
        panels.append(panel)
    return np.ascontiguousarray(np.concatenate(panels, axis=2))


def _places(path: Float[Tensor, "time disc 2"], size: int) -> Float[np.ndarray, "disc time 2"]:
    """World units to sixteenths of a pixel, as OpenCV wants them: right and down from the upper left corner."""
    places = np.asarray(path) * np.array([size, -size]) / WORLD_SIZE + np.array([0, size])
    return np.moveaxis(16 * places, 1, 0)


def _draw_path(picture: np.ndarray, places: Float[np.ndarray, "disc time 2"], frame: int, colour: tuple) -> None:
    """Lines along each disc's centres, broken where it is missing, and a dot at the present frame."""
    known = np.isfinite(places).all(-1)
    for disc, seen in zip(places, known, strict=True):
        breaks = np.flatnonzero(np.diff(seen.astype(int))) + 1
        runs = [run for run in np.split(np.arange(len(disc)), breaks) if seen[run[0]]]
        lines = [disc[run].round().astype(np.int32) for run in runs]
        cv2.polylines(picture, lines, False, colour, 1, cv2.LINE_AA, shift=4)
        if seen[frame]:
            x, y = disc[frame].round().astype(int).tolist()
            cv2.circle(picture, (x, y), 4 << 4, colour, -1, cv2.LINE_AA, shift=4)


def draw_frame(picture: UInt8[np.ndarray, "height width 3"], box: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """A copy of the picture with a black frame around box (left, top, right, bottom), in pixels."""
    marked = np.ascontiguousarray(picture).copy()
    left, top, right, bottom = (round(edge) for edge in box)
    cv2.rectangle(marked, (left, top), (right, bottom), (0, 0, 0), 3)
    return marked
