"""Attention of one head drawn over the clip, fast enough for animations: NumPy and OpenCV, no figure."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from physnb.analysis import UNKNOWN, HeadAttention, disc_centres, places_at
from physnb.config import require
from physnb.data import DISC_COLOURS, WORLD_SIZE, Clip

Query = tuple[int, int, int]  # time, row and column of a token

PANEL_WIDTH = 112  # pixels of a panel at the usual scale: eight fit in a row
FULL_WIDTH = 1000  # pixels of a picture; panels that do not fit go into further rows
GAP, TITLE, FOOT = 6, 18, 20  # pixels between panels, above each for its title, below all for the colour's meaning
OPACITY = 0.55  # of the attention over the frame
QUERY_COLOUR = (255, 0, 0)
LEVELS = np.arange(256, dtype=np.uint8)
VIRIDIS = cv2.applyColorMap(LEVELS, cv2.COLORMAP_VIRIDIS).reshape(256, 3)[:, ::-1]  # RGB by level; OpenCV has BGR


def write_text(picture: np.ndarray, text: str, left: int, bottom: int) -> None:
    cv2.putText(picture, text, (left, bottom), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


def draw_cross(picture: np.ndarray, x: int, y: int) -> None:
    """A small white cross with a black border, to be seen on any ground."""
    for colour, reach, width in (((0, 0, 0), 3, 3), ((255, 255, 255), 3, 1)):
        cv2.line(picture, (x - reach, y), (x + reach, y), colour, width)
        cv2.line(picture, (x, y - reach), (x, y + reach), colour, width)


def mean_by_token(values: np.ndarray, time: int) -> np.ndarray:
    """Means over the frames of each of `time` token frames, of the same type."""
    if len(values) == time:
        return values
    return values.reshape(time, -1, *values.shape[1:]).mean(1).astype(values.dtype)


def check_picture(attention: HeadAttention, head: int, clip: int, frames: np.ndarray, scale, centres) -> None:
    """Raise ValueError for a head or clip that the maps lack, or frames or centres that do not belong to them."""
    heads, clips = attention.maps.shape[:2]
    require(0 <= head < heads, f"there are maps of heads 0 to {heads - 1}, not of head {head}")
    require(0 <= clip < clips, f"there are maps of clips 0 to {clips - 1}, not of clip {clip}")
    require(
        frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3 and min(frames.shape) > 0,
        f"frames must be uint8 [time, height, width, 3], got {frames.dtype} {tuple(frames.shape)}",
    )
    time = attention.grid[0]
    require(len(frames) % time == 0, f"{len(frames)} frames do not divide into the maps' {time} token frames")
    require(scale is None or 0 < scale < np.inf, f"scale must be a positive number, got {scale}")
    shape = tuple(np.shape(centres))
    require(
        centres is None or (len(shape) == 3 and shape[0] == len(frames) and shape[2] == 2),
        f"centres must be [time, disc, 2] of the {len(frames)} frames, got {shape}",
    )


def attention_picture(
    attention: HeadAttention,
    head: int,
    clip: int,
    query: Query,
    frames: UInt8[Tensor, "time height width 3"],
    scale: float | None = None,
    *,
    centres: Float[Tensor, "time disc axis"] | None = None,
    top: float | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Where one query token looks: RGB, one panel a token frame over the mean of its video frames, both sizes even.

    head, clip: places in `attention.maps`; query: time, row and column of a token, framed in red. frames: those of the
    clip. scale: picture pixels a video pixel; None: panels PANEL_WIDTH wide. centres: true disc centres in world units
    (`clips.state.positions[clip]`), drawn as crosses at their mean over a token frame. top: attention weight of the
    brightest colour, which all larger ones share; None: the largest weight of this query.
    Raises ValueError for a head, clip or query that is not there, and for frames of another length.
    """
    frames = np.asarray(frames)
    check_picture(attention, head, clip, frames, scale, centres)
    time, rows, columns = attention.grid
    for axis, place, size in zip(("time", "row", "column"), query, attention.grid, strict=True):
        require(0 <= place < size, f"query {axis} must be in [0, {size - 1}], got {place}")
    weights = attention.from_query(head, clip, query).numpy()
    top = float(weights.max()) if top is None else top
    require(0 < top < np.inf, f"the brightest colour must stand for a positive attention weight, got {top}")
    colours = VIRIDIS[(np.minimum(weights / top, 1) * 255).round().astype(np.uint8)]

    grounds = mean_by_token(frames, time)
    crosses = np.empty((time, 0, 2)) if centres is None else mean_by_token(np.asarray(centres), time)
    scale = PANEL_WIDTH / frames.shape[2] if scale is None else scale
    high, wide = (max(2, 2 * round(size * scale / 2)) for size in frames.shape[1:3])
    across = min(time, max(1, (FULL_WIDTH - GAP) // (wide + GAP)))
    down = -(-time // across)
    across = -(-time // down)  # rows of equal length
    picture = np.full((down * (high + TITLE) + FOOT, across * (wide + GAP) + GAP, 3), 255, np.uint8)
    for number in range(time):
        upper = (number // across) * (high + TITLE) + TITLE
        left = (number % across) * (wide + GAP) + GAP
        ground = cv2.resize(grounds[number], (wide, high), interpolation=cv2.INTER_NEAREST)
        overlay = cv2.resize(colours[number], (wide, high), interpolation=cv2.INTER_NEAREST)
        panel = cv2.addWeighted(overlay, OPACITY, ground, 1 - OPACITY, 0)
        if number == query[0]:
            left_top, right_bottom = (
                (column * wide // columns, row * high // rows)
                for row, column in (query[1:], (query[1] + 1, query[2] + 1))
            )
            for inset in (0, 1):  # two lines, because a thick one would reach into the neighbours
                corner = (right_bottom[0] - 1 - inset, right_bottom[1] - 1 - inset)
                cv2.rectangle(panel, (left_top[0] + inset, left_top[1] + inset), corner, QUERY_COLOUR)
        for x, y in crosses[number].tolist():
            if x == x and y == y:  # NaN: the clip has no such disc
                draw_cross(panel, round(x / WORLD_SIZE * wide), round((1 - y / WORLD_SIZE) * high))
        picture[upper : upper + high, left : left + wide] = panel
        write_text(picture, f"t = {number}", left, upper - 5)
    write_text(picture, f"brightest: {top:.3f} of the attention of the red token", GAP, picture.shape[0] - 6)
    return picture


def attention_video(
    attention: HeadAttention,
    head: int,
    clip: int,
    queries: Sequence[Query],
    frames: UInt8[Tensor, "time height width 3"],
    scale: float | None = None,
    *,
    centres: Float[Tensor, "time disc axis"] | None = None,
) -> UInt8[np.ndarray, "query height width 3"]:
    """One `attention_picture` a query, in the order given; a colour is the same weight in all of them."""
    require(len(queries) > 0, "there is no query to draw")
    frames = np.asarray(frames)
    check_picture(attention, head, clip, frames, scale, centres)
    time, rows, columns = attention.grid
    tokens = [(t * rows + row) * columns + column for t, row, column in queries]
    require(
        0 <= min(tokens) and max(tokens) < attention.maps.shape[2],
        f"queries must be tokens of the grid {attention.grid}, got {list(queries)}",
    )
    top = float(attention.maps[head, clip, tokens].max())
    frames = mean_by_token(frames, time)  # once for all pictures
    draw = dict(scale=scale, centres=None if centres is None else mean_by_token(np.asarray(centres), time), top=top)
    return np.stack([attention_picture(attention, head, clip, query, frames, **draw) for query in queries])


def queries_along(clips: Clip, grid: tuple[int, int, int], clip: int, disc: int = 0) -> list[Query]:
    """The tokens that hold a disc's true centre, in time order, one a token frame in which the disc is in the box.

    Raises ValueError for a clip or disc that is not there, or a disc that is never in the box.
    """
    require(0 <= clip < len(clips), f"there are clips 0 to {len(clips) - 1}, not clip {clip}")
    require(0 <= disc < len(DISC_COLOURS), f"discs are 0 ({DISC_COLOURS[0]}) and 1 ({DISC_COLOURS[1]}), got {disc}")
    places = places_at(disc_centres(clips, grid)[clip, disc], grid).tolist()
    found = [(t, *divmod(place, grid[2])) for t, place in enumerate(places) if place != UNKNOWN]
    require(len(found) > 0, f"clip {clip} never shows a {DISC_COLOURS[disc]} disc in the box")
    return found


def queries_all(grid: tuple[int, int, int]) -> list[Query]:
    """Every token of the grid, in the order of the attention maps: columns first, then rows, then time."""
    return [tuple(place) for place in np.ndindex(*grid)]
