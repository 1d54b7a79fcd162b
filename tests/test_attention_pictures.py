import time

import numpy as np
import pytest
import torch
from discs import clip_of, one_disc
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.analysis import HeadAttention
from physnb.attention_pictures import (
    FOOT,
    GAP,
    OPACITY,
    PANEL_WIDTH,
    TITLE,
    VIRIDIS,
    attention_picture,
    attention_video,
    queries_all,
    queries_along,
)
from physnb.config import head_set
from physnb.data import DiscState

GRID = (8, 4, 4)
TOKENS = 128
WHITE = torch.full((16, 32, 32, 3), 255, dtype=torch.uint8)
RED = (255, 0, 0)
PANEL = PANEL_WIDTH


def attention_on(maps) -> HeadAttention:
    return HeadAttention(head_set("L0H0"), maps.expand(1, 1, TOKENS, TOKENS), GRID, 0.9)


UNIFORM = attention_on(torch.full((TOKENS, TOKENS), 1 / TOKENS))


def panel(picture: np.ndarray, number: int) -> np.ndarray:
    """The square of token frame `number` in a picture whose panels are all in one row."""
    left = number * (PANEL + GAP) + GAP
    return picture[TITLE : TITLE + PANEL, left : left + PANEL]


def blended(level: int) -> np.ndarray:
    """Colour of attention level 0 to 255 over white."""
    return OPACITY * VIRIDIS[level].astype(float) + (1 - OPACITY) * 255


def test_eight_panels_fit_in_one_row():
    picture = attention_picture(UNIFORM, 0, 0, (3, 1, 2), WHITE)
    assert picture.dtype == np.uint8 and picture.shape == (TITLE + PANEL + FOOT, 8 * (PANEL + GAP) + GAP, 3)
    assert picture.shape[1] <= 1000


@pytest.mark.parametrize("scale, rows, columns", [(3.5, 1, 8), (5.0, 2, 4), (9.0, 3, 3), (15.0, 4, 2), (40.0, 8, 1)])
def test_panels_wrap_into_even_rows(scale, rows, columns):
    picture = attention_picture(UNIFORM, 0, 0, (0, 0, 0), WHITE, scale)
    side = int(32 * scale)
    assert picture.shape == (rows * (side + TITLE) + FOOT, columns * (side + GAP) + GAP, 3)


def test_colour_is_attention_and_the_query_is_framed():
    maps = torch.zeros(TOKENS, TOKENS)
    query, key, half = (5, 2, 1), (2, 0, 3), (2, 3, 0)
    maps[(5 * 4 + 2) * 4 + 1, (2 * 4 + 0) * 4 + 3] = 0.6
    maps[(5 * 4 + 2) * 4 + 1, (2 * 4 + 3) * 4 + 0] = 0.3
    picture = attention_picture(attention_on(maps), 0, 0, query, WHITE)
    cell = PANEL // 4
    for number in range(8):
        shown = panel(picture, number)
        for row in range(4):
            for column in range(4):
                level = {key: 255, half: 128}.get((number, row, column), 0)
                middle = shown[row * cell + cell // 2, column * cell + cell // 2]
                assert np.abs(middle - blended(level)).max() <= 1
        framed = (shown == RED).all(-1)
        assert framed.any() == (number == query[0])
    row, column = np.nonzero((panel(picture, 5) == RED).all(-1))
    assert (row.min(), row.max(), column.min(), column.max()) == (2 * cell, 3 * cell - 1, cell, 2 * cell - 1)


def test_frame_lies_under_the_attention():
    clips = clip_of(one_disc(speed=4.0, x=2.0, y=5.0), size=32)
    bare, drawn = (attention_picture(UNIFORM, 0, 0, (0, 0, 0), frames) for frames in (WHITE, clips.frames[0]))
    for number in range(8):
        darker = (panel(drawn, number).astype(int) < panel(bare, number)).any(-1)
        column = np.nonzero(darker)[1].mean()
        centre = float(clips.state.positions[0, 2 * number : 2 * number + 2, 0, 0].mean())
        assert abs(column / PANEL * 10 - centre) < 0.2


def test_cross_marks_the_true_centre():
    centres = torch.full((16, 2, 2), torch.nan)
    centres[:, 0, 0], centres[:, 0, 1] = torch.arange(16) * 0.5 + 0.75, 7.5
    plain = attention_picture(UNIFORM, 0, 0, (0, 0, 0), WHITE)
    marked = attention_picture(UNIFORM, 0, 0, (0, 0, 0), WHITE, centres=centres)
    for number in range(8):
        row, column = np.nonzero((panel(plain, number) != panel(marked, number)).any(-1))
        assert abs(row.mean() - 0.25 * PANEL) < 1
        assert abs(column.mean() - (number + 1) / 10 * PANEL) < 1
        assert tuple(panel(marked, number)[PANEL // 4, round((number + 1) / 10 * PANEL)]) == (255, 255, 255)


def test_centre_outside_of_the_box_draws_nothing_there():
    centres = torch.full((16, 2, 2), 30.0)
    plain = attention_picture(UNIFORM, 0, 0, (0, 0, 0), WHITE)
    assert np.array_equal(plain, attention_picture(UNIFORM, 0, 0, (0, 0, 0), WHITE, centres=centres))


def test_video_has_one_picture_a_query_on_one_scale():
    maps = torch.zeros(TOKENS, TOKENS)
    maps[0, 0], maps[1, 0] = 0.8, 0.4
    video = attention_video(attention_on(maps), 0, 0, [(0, 0, 0), (0, 0, 1)], WHITE)
    centre = [panel(picture, 0)[PANEL // 8, PANEL // 8] for picture in video]
    assert np.abs(centre[0] - blended(255)).max() <= 1 and np.abs(centre[1] - blended(128)).max() <= 1
    alone = attention_picture(attention_on(maps), 0, 0, (0, 0, 0), WHITE)
    assert np.array_equal(video[0], alone)  # the largest weight of all is this query's own


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.floats(0.3, 6))
def test_sizes_are_even_and_inputs_unchanged(rows, columns, height, width, scale):
    maps = torch.rand(1, 1, 2 * rows * columns, 2 * rows * columns)
    attention = HeadAttention(head_set("L0H0"), maps, (2, rows, columns), 0.9)
    frames = torch.randint(0, 256, (4, height, width, 3), dtype=torch.uint8)
    before = maps.clone(), frames.clone()
    picture = attention_picture(attention, 0, 0, (1, rows - 1, columns - 1), frames, scale)
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    assert torch.equal(before[0], maps) and torch.equal(before[1], frames)


def test_queries_follow_the_disc_or_cover_the_grid():
    clips = clip_of(DiscState.concatenate([one_disc(speed=4.0, x=2.0, y=4.0), one_disc(speed=6.0, x=6.0, y=4.0)]))
    assert queries_along(clips, GRID, 0) == [(t, 2, c) for t, c in enumerate((0, 1, 1, 1, 2, 2, 2, 3))]
    left = queries_along(clips, GRID, 1)  # x = 6.06 + 1.2 t + 0.3 +- 0.3 leaves the box in the fourth token frame
    assert left == [(0, 2, 2), (1, 2, 3), (2, 2, 3)]
    every = queries_all((2, 1, 3))
    assert every == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 1), (1, 0, 2)]


def test_bad_requests_are_named():
    def draw(**changed):
        arguments = dict(attention=UNIFORM, head=0, clip=0, query=(0, 0, 0), frames=WHITE) | changed
        return attention_picture(**arguments)

    for changed, message in (
        (dict(head=1), "maps of heads 0 to 0, not of head 1"),
        (dict(clip=-1), "maps of clips 0 to 0, not of clip -1"),
        (dict(query=(8, 0, 0)), r"query time must be in \[0, 7\], got 8"),
        (dict(query=(0, 4, 0)), r"query row must be in \[0, 3\], got 4"),
        (dict(query=(0, 0, -1)), r"query column must be in \[0, 3\], got -1"),
        (dict(frames=WHITE.float()), "frames must be uint8"),
        (dict(frames=WHITE[:0]), "frames must be uint8"),
        (dict(frames=WHITE[0]), "frames must be uint8"),
        (dict(frames=WHITE[:1]), "1 frames do not divide into the maps' 8 token frames"),
        (dict(scale=0.0), "scale must be a positive number, got 0.0"),
        (dict(scale=float("nan")), "scale must be a positive number, got nan"),
        (dict(centres=torch.zeros(8, 2, 2)), r"centres must be \[time, disc, 2\] of the 16 frames, got \(8, 2, 2\)"),
        (dict(top=0.0), "a positive attention weight, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**changed)
    with pytest.raises(ValueError, match="there is no query to draw"):
        attention_video(UNIFORM, 0, 0, [], WHITE)
    with pytest.raises(ValueError, match="tokens of the grid"):
        attention_video(UNIFORM, 0, 0, [(9, 0, 0)], WHITE)
    clips = clip_of(DiscState.concatenate([one_disc(), one_disc(x=11.0)]))
    with pytest.raises(ValueError, match="clip 1 never shows a red disc in the box"):
        queries_along(clips, GRID, 1)
    with pytest.raises(ValueError, match="clip 0 never shows a blue disc in the box"):
        queries_along(clips, GRID, 0, disc=1)
    with pytest.raises(ValueError, match="clips 0 to 1, not clip 2"):
        queries_along(clips, GRID, 2)
    with pytest.raises(ValueError, match="discs are 0"):
        queries_along(clips, GRID, 0, disc=2)


def test_picture_is_drawn_in_milliseconds():
    frames = WHITE.numpy()
    taken = []
    for query in queries_all(GRID)[:40]:
        start = time.perf_counter()
        attention_picture(UNIFORM, 0, 0, query, frames)
        taken.append(time.perf_counter() - start)
    assert np.median(taken) < 0.02  # about 1 ms on an idle core
