import math
from dataclasses import replace

import pytest
import torch
from discs import clip_of, one_disc
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.analysis import (
    HeadAttention,
    attention_by_level,
    attention_maps,
    disc_centres,
    disc_token,
    object_following,
    places_at,
)
from physnb.config import head_set
from physnb.data import Clip, DiscState, simulate
from physnb.generate import generate

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
        entropy=0, reach_time=0, reach_space=0, self_weight=1, past_weight=0, sink_weight=pytest.approx(1 / TOKENS)
    )


def test_head_that_looks_everywhere():
    found = attention(torch.full((TOKENS, TOKENS), 1 / TOKENS)).statistics()
    assert float(found["entropy"]) == pytest.approx(math.log(TOKENS), rel=1e-5)
    assert float(found["self_weight"]) == pytest.approx(1 / TOKENS)
    # two token frames: half of the keys are one away; a quarter of all pairs lie in the past
    assert float(found["reach_time"]) == pytest.approx(0.5)
    assert float(found["past_weight"]) == pytest.approx(0.25)
    assert float(found["sink_weight"]) == pytest.approx(1 / TOKENS)


def test_head_that_looks_one_frame_back():
    maps = torch.zeros(TOKENS, TOKENS)
    for token in range(TOKENS):
        maps[token, token - 12 if token >= 12 else token] = 1
    found = attention(maps).statistics()
    assert (float(found["reach_time"]), float(found["reach_space"])) == (0.5, 0)
    assert (float(found["past_weight"]), float(found["self_weight"])) == (0.5, 0.5)


def test_sink_is_found_in_each_clip():
    maps = torch.zeros(1, 2, TOKENS, TOKENS)
    maps[0, 0, :, 7] = 1  # every query looks at token 7
    maps[0, 1, :, 3], maps[0, 1, :, 4] = 0.75, 0.25  # of another clip mostly at token 3
    found = HeadAttention(ONE_HEAD, maps, GRID, 0.9).statistics()
    assert float(found["sink_weight"]) == pytest.approx((1 + 0.75) / 2)


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
    with pytest.raises(ValueError, match="no true state; take it from a simulator"):
        disc_token(model, replace(cases, state=None), 0, 0)


BOX = (8, 4, 4)  # token grid of 16 frames in the tests below
PLACES = 16


def moving_discs() -> Clip:
    """Six clips of one disc, at several heights and speeds: each crosses at least two columns of tokens."""
    states = [
        one_disc(speed=s, x=x, y=y)
        for s, x, y in zip((4, 5, 3, 4, 5, 3), (1, 2, 4) * 2, (1, 4, 6, 9, 6, 1), strict=True)
    ]
    return clip_of(DiscState.concatenate(states))


def on_clips(maps, clips) -> HeadAttention:
    """One head that attends by `maps` [query, key] or [clip, query, key], rows scaled to sum to 1."""
    maps = maps / maps.sum(-1, keepdim=True)
    return HeadAttention(ONE_HEAD, maps.expand(1, len(clips), -1, -1), BOX, 0.9)


def attends_everywhere(clips: Clip) -> HeadAttention:
    return on_clips(torch.ones(128, 128), clips)


def tokens_by_place(places) -> torch.Tensor:
    """1 where query and key satisfy places(time, place of query, time, place of key), else 0: [query, key]."""
    time, place = (
        torch.arange(BOX[0] * PLACES).div(PLACES, rounding_mode="floor"),
        torch.arange(BOX[0] * PLACES) % PLACES,
    )
    return places(time[:, None], place[:, None], time[None], place[None]).float()


def follower(clips: Clip, disc: int = 0) -> HeadAttention:
    """Each token that holds the disc attends to all the tokens that held it before; all others attend everywhere."""
    maps = torch.ones(len(clips), BOX[0] * PLACES, BOX[0] * PLACES)
    for clip, path in enumerate(places_at(disc_centres(clips, BOX)[:, disc], BOX).tolist()):
        for now in range(1, BOX[0]):
            row = maps[clip, now * PLACES + path[now]]
            row.zero_()
            row[[s * PLACES + path[s] for s in range(now)]] = 1
    return on_clips(maps, clips)


def test_centres_and_places_of_a_known_path():
    centres = disc_centres(clip_of(one_disc(speed=2.0, x=2.0, y=4.0)), BOX)
    assert centres.shape == (1, 2, 8, 2) and centres[0, 1].isnan().all()
    # frames 0 and 1 are at 0.01 s and 0.11 s
    torch.testing.assert_close(centres[0, 0, 0], torch.tensor([2.12, 4.0]))
    assert places_at(centres[0, 0], BOX).tolist() == [
        8,
        9,
        9,
        9,
        9,
        9,
        9,
        9,
    ]  # third row from above; 2.5 units a column
    assert places_at(torch.tensor([[10.0, 0.0], [0.0, 10.0], [10.1, 5.0], [math.nan, 1.0]]), BOX).tolist() == [
        15,
        0,
        -1,
        -1,
    ]


def test_centre_out_of_the_box_in_one_frame_is_unknown():
    # x = 9.75, 9.85, 9.95, 10.05: the second token frame has one frame on either side of the wall
    centres = disc_centres(clip_of(one_disc(speed=1.0, x=9.74)), BOX)[0, 0]
    assert not centres[0].isnan().any() and centres[1:].isnan().all()


def test_perfect_follower_scores_one():
    clips = moving_discs()
    found = object_following(follower(clips), clips)
    torch.testing.assert_close(found.follows, torch.ones(1, 6))
    assert (found.control < 0.2).all()
    assert (found.moments > 0).all() and (found.moments < found.moments_visible).all()
    row = found.to_rows()[0]
    assert row["head"] == "L0H0" and row["follows"]["mean"] == pytest.approx(1) and row["above_control"]["low"] > 0.8
    met = found.other_ways > 0  # clips 0 and 5 and clips 2 and 4 are on one height
    assert met.tolist() == [True, False, True, False, True, True]
    torch.testing.assert_close(found.above_other_way[:, met], torch.ones(1, 4))
    assert found.above_other_way[:, ~met].isnan().all() and row["above_other_way"]["judged"] == 4


def test_uniform_attention_is_at_chance_and_equals_its_control():
    clips = moving_discs()
    found = object_following(attends_everywhere(clips), clips)
    for values in (found.follows, found.control):
        torch.testing.assert_close(values, torch.full((1, 6), 1 / PLACES))
    assert found.above_other_way.nan_to_num().abs().max() < 1e-6


def test_looking_at_the_own_place_is_not_following():
    clips = moving_discs()
    own_place = tokens_by_place(lambda _, place, __, other: place == other)
    found = object_following(on_clips(own_place, clips), clips)
    assert torch.equal(found.follows, torch.zeros(1, 6)) and torch.equal(found.control, torch.zeros(1, 6))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["uniform", "parabola", "collision"]))
def test_head_that_ignores_the_content_equals_its_control(seed, scenario):
    """Whatever it prefers: near places, usual places, a direction, or anything else."""
    clips = simulate(scenario, "id", range(8), frames=16, size=32, seed=seed)
    maps = torch.rand(128, 128, generator=torch.Generator().manual_seed(seed)) ** 8
    found = object_following(on_clips(maps, clips), clips)
    torch.testing.assert_close(found.follows, found.control, equal_nan=True)
    assert found.above_other_way.nan_to_num().abs().max() < 1e-5


def test_looking_near_only_where_a_disc_is_is_not_another_way():
    clips = simulate("uniform", "id", range(24), frames=16, size=32)
    near = tokens_by_place(lambda _, p, __, k: torch.exp(-((p % 4 - k % 4).square() + (p // 4 - k // 4).square())))
    maps = torch.ones(len(clips), 128, 128)
    for clip, path in enumerate(places_at(disc_centres(clips, BOX)[:, 0], BOX).tolist()):
        tokens = [t * PLACES + place for t, place in enumerate(path) if place >= 0]
        maps[clip, tokens] = near[tokens]
    found = object_following(on_clips(maps, clips), clips)
    assert found.to_rows()[0]["above_control"]["low"] > 0  # its content decides, so the first control does not see it
    assert found.other_ways.sum() > 50 and found.above_other_way.nan_to_num().abs().max() < 1e-5


def test_head_that_never_looks_back_is_not_judged():
    clips = moving_discs()
    found = object_following(on_clips(torch.eye(128), clips), clips)
    assert found.follows.isnan().all() and found.control.isnan().all()
    row = found.to_rows()[0]
    assert (
        row["follows"]["mean"] is None and row["above_control"]["mean"] is None and row["above_control"]["judged"] == 0
    )


def test_disc_at_rest_or_out_of_the_box_is_not_judged():
    states = [one_disc(speed=0.0), one_disc(x=11.0), *(one_disc(speed=4.0, x=1.0, y=y) for y in (4.0, 6.0))]
    clips = clip_of(DiscState.concatenate(states))
    found = object_following(attends_everywhere(clips), clips)
    assert found.follows.isnan().tolist() == [[True, True, False, False]]
    assert found.moments[:2].tolist() == [0, 0] and found.moments_visible[:2].tolist() == [28, 0]


def two_discs(gap: float) -> DiscState:
    """A red disc and, `gap` world units behind it, a blue one, moving alike."""
    state = one_disc(speed=4.0, x=3.0)
    positions, velocities = state.positions.clone(), state.velocities.clone()
    positions[:, :, 1] = positions[:, :, 0] - torch.tensor([gap, 0.0])
    velocities[:, :, 1] = velocities[:, :, 0]
    return DiscState(positions, velocities, torch.tensor([[0.3, 0.3]]), state.impact_time_s)


def test_token_that_holds_both_discs_is_not_judged():
    together, apart = (clip_of(DiscState.concatenate([two_discs(gap)] * 2)) for gap in (0.001, 2.5))
    # the centres of the first pair share a token throughout, those of the second pair never
    assert object_following(attends_everywhere(together), together).moments_visible.tolist() == [0, 0]
    found = object_following(attends_everywhere(apart), apart)
    assert found.moments_visible.tolist() == [56, 56]
    # looking at the other disc's earlier places is not following; looking at the own ones is
    red = object_following(follower(apart, 0), apart)
    expected = (1 + 1 / PLACES) / 2  # the red one's tokens follow, the blue one's attend everywhere
    torch.testing.assert_close(red.follows, torch.full((1, 2), expected))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 100))
def test_permuted_clips_permute_the_rows(order, seed):
    clips = moving_discs()
    maps = torch.rand(2, 6, 128, 128, generator=torch.Generator().manual_seed(seed))
    heads, before = head_set("L0H0,L1H1"), maps.clone()
    found = object_following(HeadAttention(heads, maps, BOX, 0.9), clips)
    other = object_following(HeadAttention(heads, maps[:, order], BOX, 0.9), clips[list(order)])
    for name in ("follows", "control", "above_other_way"):
        torch.testing.assert_close(getattr(other, name), getattr(found, name)[:, order], equal_nan=True)
    for name in ("moments", "moments_visible", "other_ways"):
        assert torch.equal(getattr(other, name), getattr(found, name)[list(order)])
    assert torch.equal(maps, before)


def test_following_refuses_what_it_cannot_judge():
    clips = moving_discs()
    attention_of = attends_everywhere(clips)  # of six clips
    with pytest.raises(ValueError, match="maps are of 6 clips, but 5 clips are given"):
        object_following(attention_of, clips[:5])
    with pytest.raises(ValueError, match="at least two clips"):
        object_following(attends_everywhere(clips[:1]), clips[:1])
    with pytest.raises(ValueError, match="no true state; take them from a simulator"):
        object_following(attention_of, replace(clips, state=None))
    for frames in (0, 1, 15):
        short = replace(clips, frames=clips.frames[:, :frames])
        with pytest.raises(ValueError, match=f"{frames} frames do not divide into the 8 token frames"):
            object_following(attention_of, short)


def test_table_by_level_holds_every_head_at_every_level(model, cases):
    heads = head_set("L0H1,L1H3")
    rows = attention_by_level(model, cases, heads, levels=(0.9, 0.4))
    assert [(row["sigma"], row["head"]) for row in rows] == [(s, str(h)) for s in (0.9, 0.4) for h in heads]
    single = attention_maps(model, cases, heads, sigma=0.4)
    assert rows[3]["entropy"] == float(single.statistics()["entropy"][1])
    expected = object_following(single, cases).to_rows()[1]
    assert {name: rows[3][name] for name in expected} == expected
    usual = [row["sigma"] for row in attention_by_level(model, cases[:2], ONE_HEAD)]
    visited = []
    generate(model, cases[:1], steps=5, callback=lambda step, sigma, noised: visited.append(sigma))
    assert usual == visited
    with pytest.raises(ValueError, match="there is no noise level"):
        attention_by_level(model, cases, heads, levels=())
    with pytest.raises(ValueError, match="no true state"):
        attention_by_level(model, replace(cases, state=None), heads)
