"""What is in the picture besides the discs: rods, springs, floors, slopes, stars, water and wings, in grey and green.

Nothing here is red or blue beyond the other channels, so that discs are still found by their colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from physnb.data.clips import WORLD_SIZE, DiscState
from physnb.data.laws import wave_frequency
from physnb.data.worlds import frame_times, render

SUPERSAMPLE = 2  # scenery is drawn this many times larger, with smooth edges, and averaged down
SHIFT = 4  # bits of a pixel's fraction in cv2's coordinates
GREY, DARK, GREEN, WATER = (150, 150, 150), (90, 90, 90), (60, 140, 60), (120, 190, 190)
LINE_WIDTH = 0.25  # world units
COILS = 6  # of a spring
BEYOND = 10 * WORLD_SIZE  # far out of the picture


class Shape(NamedTuple):
    """A line of `width` world units, or the area within its points where the width is None.

    points: world units; one time where the shape does not move.
    """

    points: Float[np.ndarray, "batch time point axis"]
    colour: tuple[int, int, int]
    width: float | None = None


class Scene(NamedTuple):
    """Where disc 0 is and what the parameters of its clip are, all of shape [batch, time] or [batch, 1]."""

    parameters: Mapping[str, Float[np.ndarray, "batch 1"]]
    x: Float[np.ndarray, "batch time"]
    y: Float[np.ndarray, "batch time"]
    heading: Float[np.ndarray, "batch time axis"]  # of length 1
    time_s: Float[np.ndarray, "1 time"]


def _points(*pairs) -> Float[np.ndarray, "batch time point axis"]:
    """Points from pairs of x and y, which broadcast over batch and time."""
    arrays = np.broadcast_arrays(*(value for pair in pairs for value in pair))
    return np.stack([np.stack(arrays[0::2], -1), np.stack(arrays[1::2], -1)], -1)


def _circle(x, y, radius: float, colour) -> Shape:
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return Shape(_points(*((x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles)), colour)


def _ground(height, rise=0.0) -> Shape:
    """Everything below the line that is at `height` where x = 0 and rises by `rise` a unit of x."""
    left, right = height - BEYOND * rise, height + BEYOND * rise
    return Shape(_points((-BEYOND, left), (BEYOND, right), (BEYOND, -BEYOND), (-BEYOND, -BEYOND)), GREY)


def rod(s: Scene) -> list[Shape]:
    x, y = s.parameters["pivot_x"], s.parameters["pivot_y"]
    return [Shape(_points((x, y), (s.x, s.y)), DARK, LINE_WIDTH), _circle(x, y, LINE_WIDTH, DARK)]


def coil(s: Scene) -> list[Shape]:
    radius, wall = s.parameters["radius"], 2 * LINE_WIDTH
    turns = np.linspace(0, 1, 2 * COILS + 2)
    swing = 0.4 * np.array([0, *[1, -1] * COILS, 0])
    line = _points(*((wall + (s.x - wall) * t, s.y + up) for t, up in zip(turns, swing, strict=True)))
    post = _points((0 * radius, -BEYOND), (wall, -BEYOND), (wall, BEYOND), (0, BEYOND))
    return [_ground(s.y[:, :1] - radius), Shape(post, DARK), Shape(line, DARK, 0.6 * LINE_WIDTH)]


def floor(s: Scene) -> list[Shape]:
    return [_ground(s.parameters["floor"])]


def star(s: Scene) -> list[Shape]:
    return [_circle(s.parameters["star_x"], s.parameters["star_y"], 0.6, GREEN)]


def slope(s: Scene) -> list[Shape]:
    return [_ground(s.parameters["foot_y"], np.tan(s.parameters["slope"]))]


def water(s: Scene) -> list[Shape]:
    p, x = s.parameters, np.linspace(0, WORLD_SIZE, 40)
    turn = wave_frequency(p["wave_number"], p["depth"]) * s.time_s - p["phase"]
    surface = ((at, p["depth"] + p["amplitude"] * np.cos(p["wave_number"] * at - turn)) for at in x)
    return [Shape(_points(*surface, (WORLD_SIZE, -1.0), (0.0, -1.0)), WATER)]


def wings(s: Scene) -> list[Shape]:
    length = 2.2 * s.parameters["radius"]
    ahead, up = s.heading[..., 0] * length, s.heading[..., 1] * length
    tail = s.x - ahead, s.y - up
    body = _points(tail, (s.x + 0.6 * ahead, s.y + 0.6 * up))
    fin = _points(tail, (tail[0] - 0.4 * up, tail[1] + 0.4 * ahead))
    return [Shape(body, GREEN, LINE_WIDTH), Shape(fin, GREEN, LINE_WIDTH)]


SCENERY: dict[str, Callable[[Scene], list[Shape]]] = {
    "pendulum": rod,
    "spring": coil,
    "bounce": floor,
    "drag": lambda scene: [],  # thick air cannot be seen
    "orbit": star,
    "rolling": slope,
    "stack": floor,
    "wave": water,
    "glide": wings,
}


def draw_shapes(
    shapes: Sequence[Shape], batch: int, time: int, size: int
) -> UInt8[np.ndarray, "batch time size size 3"]:
    """Pictures of shapes on white, later ones in front; edges are shaded by coverage."""
    out = np.full((batch, time, size, size, 3), 255, np.uint8)
    if not shapes:
        return out
    scale, moving = size * SUPERSAMPLE / WORLD_SIZE, max(shape.points.shape[1] for shape in shapes)
    drawn = [(_pixels(shape.points, scale), shape.colour, shape.width) for shape in shapes]
    canvas = np.empty((size * SUPERSAMPLE, size * SUPERSAMPLE, 3), np.uint8)
    for clip in range(batch):
        for frame in range(moving):
            canvas.fill(255)
            for points, colour, width in drawn:
                line = points[clip, frame % points.shape[1]]
                if width is None:
                    cv2.fillPoly(canvas, [line], colour, cv2.LINE_AA, SHIFT)
                else:
                    cv2.polylines(canvas, [line], False, colour, max(1, round(width * scale)), cv2.LINE_AA, SHIFT)
            picture = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
            out[clip, frame if moving > 1 else slice(None)] = picture
    return out


def _pixels(
    points: Float[np.ndarray, "batch time point axis"], scale: float
) -> Int[np.ndarray, "batch time point axis"]:
    places = np.stack([points[..., 0], WORLD_SIZE - points[..., 1]], -1) * scale - 0.5
    return np.rint(np.clip(places, -8000, 8000) * 2**SHIFT).astype(np.int32)


def scene_of(parameters: Sequence[Mapping[str, float]], state: DiscState) -> Scene:
    """What scenery needs to know of clips of one scenario; a disc that has vanished counts where it was last."""
    p = {name: np.array([row[name] for row in parameters])[:, None] for name in parameters[0]}
    place, heading = state.positions[:, :, 0].double().numpy().copy(), state.velocities[:, :, 0].double().numpy().copy()
    for frame in range(1, place.shape[1]):
        gone = np.isnan(place[:, frame]).any(-1)
        place[gone, frame], heading[gone, frame] = place[gone, frame - 1], heading[gone, frame - 1]
    heading /= np.maximum(np.linalg.norm(heading, axis=-1, keepdims=True), 1e-9)
    times = frame_times(place.shape[1]) - frame_times(1)
    return Scene(p, place[..., 0], place[..., 1], heading, times[None])


def render_scene(
    scenario: str, parameters: Sequence[Mapping[str, float]], state: DiscState, size: int
) -> UInt8[Tensor, "batch time size size 3"]:
    """Frames of one scenario: scenery, and on top of it the discs, shaded by how much of a pixel they cover.

    An absent or vanished disc is not drawn.
    """
    shapes = SCENERY[scenario](scene_of(parameters, state))
    ground = draw_shapes(shapes, *state.positions.shape[:2], size).astype(np.uint16)
    shown = DiscState(state.positions.nan_to_num(-BEYOND), state.velocities, state.radii, state.impact_time_s)
    discs = render(shown, size).numpy()
    # On white, red takes from green and blue, and blue from red and green: so much of each covers a pixel.
    red, blue = 255 - discs[..., 2], 255 - discs[..., 0]
    bare = (255 - np.minimum(red.astype(np.uint16) + blue, 255))[..., None]
    out = (ground * bare + 127) // 255
    out[..., 0] += red
    out[..., 2] += blue
    return torch.from_numpy(np.minimum(out, 255).astype(np.uint8))
