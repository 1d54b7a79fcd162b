"""Pictures drawn pixel by pixel, fast enough to follow a slider; figures with axes are in `plots`."""

from __future__ import annotations

import io
import itertools
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
        for number, picture in enumerate(panel):
            cv2.putText(picture, name, (2, LABEL_HEIGHT - 7), FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
            inside = picture[LABEL_HEIGHT:, : columns * scale]
            cv2.rectangle(inside, (0, 0), (columns * scale - 1, rows * scale - 1), (190, 190, 190), 1)
            for owner in dict.fromkeys((truth, name)):
                if owner in paths:
                    _draw_paths(inside, paths[owner], number, pixel_colour(owner))
        panels.append(panel)
    return np.ascontiguousarray(np.concatenate(panels, axis=2))


def _draw_paths(picture: np.ndarray, path: Float[Tensor, "time disc 2"], frame: int, colour: tuple) -> None:
    """Lines along each disc's centres, broken where it is missing, and a dot at the present frame."""
    height, width, _ = picture.shape
    scale = np.array([width, -height]) / WORLD_SIZE
    places = np.asarray(path) * scale + np.array([0, height])
    for disc in np.moveaxis(places, 1, 0):
        for start, end in itertools.pairwise(disc):
            if np.isfinite([*start, *end]).all():
                cv2.line(picture, _point(start), _point(end), colour, 1, cv2.LINE_AA, shift=4)
        if np.isfinite(disc[frame]).all():
            cv2.circle(picture, _point(disc[frame]), 4 << 4, colour, -1, cv2.LINE_AA, shift=4)


def _point(place: Sequence[float]) -> tuple[int, int]:
    """A place as OpenCV wants it, in sixteenths of a pixel."""
    return round(16 * float(place[0])), round(16 * float(place[1]))


def draw_frame(picture: UInt8[np.ndarray, "height width 3"], box: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """A copy of the picture with a black frame around box (left, top, right, bottom), in pixels."""
    marked = np.ascontiguousarray(picture).copy()
    left, top, right, bottom = (round(edge) for edge in box)
    cv2.rectangle(marked, (left, top), (right, bottom), (0, 0, 0), 3)
    return marked
