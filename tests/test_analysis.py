import math

import pytest
import torch

from physnb.analysis import HeadAttention, attention_maps, disc_token
from physnb.config import head_set

GRID = (2, 3, 4)
TOKENS = 24
ONE_HEAD = head_set("L0H0")


def attention(maps) -> HeadAttention:
    return HeadAttention(ONE_HEAD, maps.expand(1, 1, TOKENS, TOKENS), GRID, 0.9)


def test_places_run_over_columns_first():
    places = attention(torch.eye(TOKENS)).places()
    assert places[0].tolist() == [0, 0, 0] and places[1].tolist() == [0, 0, 1]
    assert places[4].tolist() == [0, 1, 0] and places[12].tolist() == [1, 0, 0]


def test_head_that_looks_at_itself():
    found = attention(torch.eye(TOKENS)).statistics()
    assert {name: float(value) for name, value in found.items()} == dict(
        entropy=0, reach_time=0, reach_space=0, self_weight=1, past_weight=0
    )


def test_head_that_looks_everywhere():
    found = attention(torch.full((TOKENS, TOKENS), 1 / TOKENS)).statistics()
    assert float(found["entropy"]) == pytest.approx(math.log(TOKENS), rel=1e-5)
    assert float(found["self_weight"]) == pytest.approx(1 / TOKENS)
    # two token frames: half of the keys are one away; a quarter of all pairs lie in the past
    assert float(found["reach_time"]) == pytest.approx(0.5)
    assert float(found["past_weight"]) == pytest.approx(0.25)


def test_head_that_looks_one_frame_back():
    maps = torch.zeros(TOKENS, TOKENS)
    for token in range(TOKENS):
        maps[token, token - 12 if token >= 12 else token] = 1
    found = attention(maps).statistics()
    assert (float(found["reach_time"]), float(found["reach_space"])) == (0.5, 0)
    assert (float(found["past_weight"]), float(found["self_weight"])) == (0.5, 0.5)


def test_view_from_a_query_is_on_the_token_grid():
    maps = torch.zeros(TOKENS, TOKENS)
    maps[(1 * 3 + 2) * 4 + 3, (0 * 3 + 1) * 4 + 2] = 1
    view = attention(maps).from_query(0, 0, (1, 2, 3))
    assert view.shape == GRID and view[0, 1, 2] == 1 and view.sum() == 1


def test_maps_of_a_model_are_rows_of_weights(model, cases):
    heads = head_set("L0H1,L1H3")
    found = attention_maps(model, cases, heads)
    assert found.heads == heads and found.grid == (4, 2, 2) and found.maps.shape == (2, 6, 16, 16)
    torch.testing.assert_close(found.maps.sum(-1), torch.ones(2, 6, 16))
    assert (found.maps[0] - found.maps[1]).abs().max() > 1e-3
    again = attention_maps(model, cases, heads)
    assert torch.equal(again.maps, found.maps)


def test_maps_depend_on_the_noise_level(model, cases):
    one, other = (attention_maps(model, cases, ONE_HEAD, sigma=sigma).maps for sigma in (0.2, 1.0))
    assert (one - other).abs().max() > 1e-3


def test_bad_request_is_named(model, cases):
    with pytest.raises(ValueError, match="head L99H0 does not exist"):
        attention_maps(model, cases, head_set("L99H0"))
    for sigma in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"sigma must be in \(0, 1\], got {sigma}"):
            attention_maps(model, cases, ONE_HEAD, sigma=sigma)


def test_disc_token_holds_the_disc(model, cases):
    for clip in range(len(cases)):
        time, row, column = disc_token(model, cases, clip, 5)
        assert time == 2  # two frames a token
        shade = 255 - cases.frames[clip, 5, :, :, 1].float()  # not white: disc
        if cases.state.present[clip, 1]:
            continue  # the other disc shades pixels too
        tokens = shade.unflatten(1, (2, 8)).unflatten(0, (2, 8)).sum((1, 3))
        assert tokens[row, column] > 0


def test_disc_token_of_a_clip_without_truth_is_refused(model, cases):
    from dataclasses import replace

    with pytest.raises(ValueError, match="no true state; take it from a simulator"):
        disc_token(model, replace(cases, state=None), 0, 0)
