import io

import numpy as np
import pytest
import torch
from PIL import Image

from physnb.data import simulate
from physnb.metrics import parse_discs
from physnb.pictures import GAP, LABEL_HEIGHT, draw_film, draw_frame, encode_png, pixel_colour


def test_one_frame_is_a_plain_png_and_many_an_animation():
    frames = np.random.default_rng(0).integers(0, 255, (5, 12, 20, 3), dtype=np.uint8)
    still, moving = (Image.open(io.BytesIO(encode_png(part, fps=10))) for part in (frames[0], frames))
    assert getattr(still, "n_frames", 1) == 1 and moving.n_frames == 5 and moving.info["loop"] == 0
    assert np.array_equal(np.asarray(still.convert("RGB")), frames[0])
    for number, frame in enumerate(frames):
        moving.seek(number)
        assert moving.info["duration"] == 100 and np.array_equal(np.asarray(moving.convert("RGB")), frame)
    with pytest.raises(ValueError, match="no frame"):
        encode_png(frames[:0])


def test_film_shows_every_clip_under_its_name_with_its_path():
    clip = simulate("uniform", "id", range(1), frames=8, size=32, seed=1)
    frames = clip.frames[0]
    path = parse_discs(clip.frames).positions[0]
    film = draw_film(
        {"true": frames, "unguided": frames, "8 hunted heads": frames}, {"8 hunted heads": path}, height=128
    )
    assert film.shape == (8, LABEL_HEIGHT + 128, 3 * (128 + GAP), 3) and film.dtype == np.uint8
    assert (film[:, :LABEL_HEIGHT] < 100).any((0, 1, 3)).reshape(3, -1).any(1).all()  # a name above each panel
    first, second, third = np.split(film, 3, axis=2)
    plain = frames.numpy().repeat(4, 1).repeat(4, 2)
    assert np.array_equal(first[:, LABEL_HEIGHT + 1 : -1, 1:127], plain[:, 1:-1, 1:-1])
    assert np.array_equal(first[:, LABEL_HEIGHT:], second[:, LABEL_HEIGHT:])
    x, y = (path[3, 0] / 10 * torch.tensor([128, -128]) + torch.tensor([0, 128])).round().int().tolist()
    assert third[3, LABEL_HEIGHT + y, x].tolist() == list(pixel_colour("hunted heads"))  # the dot at the present frame


def test_path_breaks_where_the_disc_is_missing():
    frames = torch.full((3, 16, 16, 3), 255, dtype=torch.uint8)
    path = torch.tensor([[[2.0, 5.0]], [[torch.nan, torch.nan]], [[8.0, 5.0]]])
    film = draw_film({"true": frames}, {"true": path}, height=160)[:, LABEL_HEIGHT:, :160]
    row = film[1, 80]
    assert (row[60:100] == 255).all()  # no line bridges the gap, and no dot stands for it
    whole = draw_film({"true": frames}, {"true": path.nan_to_num(5.0)}, height=160)[:, LABEL_HEIGHT:, :160]
    assert (whole[1, 80, 40:120] < 255).any(1).all()


def test_truth_is_drawn_in_every_panel_in_black():
    frames = torch.full((2, 16, 16, 3), 255, dtype=torch.uint8)
    path = torch.tensor([[[2.0, 5.0]], [[8.0, 5.0]]])
    film = draw_film({"true": frames, "unguided": frames}, {"true": path}, height=160)
    assert film[0, LABEL_HEIGHT + 80, 168 + 80].max() < 100


def test_clips_of_different_sizes_are_refused():
    frames = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one size and length"):
        draw_film({"true": frames, "unguided": frames[:1]}, {})
    with pytest.raises(ValueError, match="no clip"):
        draw_film({}, {})


def test_frame_is_drawn_on_a_copy():
    picture = np.full((40, 60, 3), 255, np.uint8)
    marked = draw_frame(picture, (10.2, 5.0, 50.4, 30.0))
    assert picture.min() == 255 and marked[5, 30].max() == marked[30, 30].max() == marked[20, 10].max() == 0
    assert marked[20, 30].min() == 255
