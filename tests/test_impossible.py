from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import WORLD_SIZE, Clip, DiscState, render, simulate
from physnb.data.impossible import (
    KINDS,
    LAWFUL_KINDS,
    SMALLER,
    Variants,
    alter_appearance,
    draw,
    kinds_for,
    make_impossible,
    make_lawful,
)
from physnb.data.laws import GRAVITY
from physnb.data.worlds import frame_times
from physnb.metrics import parse_discs

GIVEN, FRAMES, SIZE, CLIPS = 3, 16, 32, 8
TIMES = torch.from_numpy(frame_times(FRAMES))
WORLDS = {
    (s, p): simulate(s, p, range(CLIPS), frames=FRAMES, size=SIZE)
    for s in KINDS["teleport"].scenarios
    for p in ("id", "ood")
}
MIXED = Clip.concatenate([WORLDS[name, "id"][:3] for name in KINDS["teleport"].scenarios])


def judged(variants: Variants) -> list[int]:
    return [row for row, reason in enumerate(variants.reasons) if reason is None]


def first_break(variants: Variants, true: Clip, row: int) -> int:
    """The first frame whose true state or picture was changed."""
    same = (variants.clip.frames[row] == true.frames[row]).flatten(1).all(1)
    return int((~same).nonzero()[0])


def motions(scenario: str, kind: str):
    """Clip by clip: disc positions and velocities, true ones, and the first edited frame."""
    true = WORLDS[scenario, "id"]
    variants = make_impossible(true, kind, frames_given=GIVEN)
    assert len(judged(variants)) >= 4
    for row in judged(variants):
        now, was = variants.clip.state, true.state
        moved = (now.positions[row] != was.positions[row]) & ~was.positions[row].isnan()
        first = int(moved.flatten(1).any(1).nonzero()[0])
        yield now.positions[row], now.velocities[row], was.positions[row], was.velocities[row], first


@pytest.mark.parametrize(("scenario", "split"), WORLDS)
def test_start_frames_stay_and_only_judged_rows_change(scenario, split):
    true = WORLDS[scenario, split]
    frames = true.frames.clone()
    for kind in kinds_for(scenario):
        variants = make_impossible(true, kind, frames_given=GIVEN)
        changed = (variants.clip.frames != true.frames).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == judged(variants), kind
        assert torch.equal(variants.clip.frames[:, :GIVEN], true.frames[:, :GIVEN]), kind
        assert variants.area_ratio.isnan().tolist() == (~changed).tolist(), kind
        assert (variants.clip.captions, variants.clip.scenarios) == (true.captions, true.scenarios)
        assert torch.equal(variants.clip.indices, true.indices)
    assert torch.equal(true.frames, frames)


@pytest.mark.parametrize("scenario", ["uniform", "parabola", "collision"])
def test_pictures_show_the_edited_state(scenario):
    for kind in kinds_for(scenario):
        if kind in ("vanish", "pass_through"):  # there the colour of a hidden disc says nothing of its centre
            continue
        variants = make_impossible(WORLDS[scenario, "id"], kind, frames_given=GIVEN)
        state = variants.clip.state
        seen = parse_discs(variants.clip.frames).positions
        error = (seen - state.positions).norm(dim=-1)[state.inside]
        assert error.max() < 0.1, kind


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(len(MIXED))), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9))
def test_a_variant_depends_on_its_own_clip_and_the_seed_alone(order, kind, seed):
    together = make_impossible(MIXED, kind, frames_given=GIVEN, seed=seed)
    apart = make_impossible(MIXED[list(order)], kind, frames_given=GIVEN, seed=seed)
    assert torch.equal(apart.clip.frames, together.clip.frames[list(order)])
    assert apart.reasons == tuple(together.reasons[i] for i in order)


def test_seeds_draw_other_breaks():
    true = WORLDS["uniform", "id"]
    a, b = (make_impossible(true, "vanish", seed=seed) for seed in (0, 1))
    assert [first_break(a, true, row) for row in range(CLIPS)] != [first_break(b, true, row) for row in range(CLIPS)]


@pytest.mark.parametrize("scenario", ["uniform", "parabola", "collision"])
def test_teleported_disc_goes_on_as_before(scenario):
    for now, v_now, was, v_was, first in motions(scenario, "teleport"):
        jump = (now - was)[first:]
        size = jump.norm(dim=-1).nan_to_num(0).amax(1)
        torch.testing.assert_close(size, size[:1].expand_as(size), atol=1e-4, rtol=0)
        assert float(size[0]) == pytest.approx(1.5, abs=1e-4) or float(size[0]) == pytest.approx(2.5, abs=1e-4)
        torch.testing.assert_close(v_now, v_was, equal_nan=True)
        assert first >= GIVEN


@pytest.mark.parametrize("scenario", ["uniform", "parabola"])
def test_reversed_disc_leaves_with_the_opposite_velocity(scenario):
    gravity = torch.tensor([0.0, GRAVITY if scenario == "parabola" else 0.0])
    for now, _, was, v_was, first in motions(scenario, "reversal"):
        since = (TIMES[first:] - TIMES[first - 1])[:, None]
        expected = was[first - 1, 0] - v_was[first - 1, 0] * since - gravity / 2 * since**2
        torch.testing.assert_close(now[first:, 0], expected.float(), atol=1e-4, rtol=0)


def test_discs_reversed_after_an_impact_do_not_touch_again():
    true = WORLDS["collision", "id"]
    variants = make_impossible(true, "reversal", frames_given=GIVEN)
    for row in judged(variants):
        assert TIMES[first_break(variants, true, row)] > true.state.impact_time_s[row]
        positions = variants.clip.state.positions[row]
        assert ((positions[:, 0] - positions[:, 1]).norm(dim=-1) >= true.state.radii[row].sum() - 2e-3).all()


def test_over_bounce_keeps_momentum_and_gains_energy():
    true = WORLDS["collision", "id"]
    variants = make_impossible(Clip.concatenate([true, WORLDS["collision", "ood"]]), "energy_gain", frames_given=GIVEN)
    rows, state = judged(variants), variants.clip.state
    assert len(rows) >= 4
    mass, v = state.radii[rows] ** 2, state.velocities[rows][..., 0]
    momentum, energy = (mass[:, None] * v).sum(-1), (mass[:, None] * v**2).sum(-1)
    torch.testing.assert_close(momentum[:, 0], momentum[:, -1], atol=1e-3, rtol=1e-4)
    assert (energy[:, -1] > 1.05 * energy[:, 0]).all()


def test_faster_disc_has_that_factor():
    for _, v_now, _, v_was, _ in motions("uniform", "energy_gain"):
        assert round(float(v_now[-1, 0, 0] / v_was[-1, 0, 0]), 4) in (1.25, 1.5, 2.0)


def test_without_gravity_the_path_is_straight():
    for now, v_now, _, v_was, first in motions("parabola", "gravity_off"):
        assert now[first - 1 :, 0].diff(n=2, dim=0).abs().max() < 1e-4
        torch.testing.assert_close(v_now[first:, 0], v_was[first - 1, 0].expand(FRAMES - first, 2), atol=1e-4, rtol=0)


def test_discs_that_ignore_each_other_keep_their_velocity():
    for _, v_now, _, v_was, _ in motions("collision", "pass_through"):
        torch.testing.assert_close(v_now, v_was[:1].expand_as(v_was))


def test_time_reversal_turns_the_generated_frames_round():
    true = WORLDS["collision", "id"]
    variants = make_impossible(true, "time_reversal", frames_given=GIVEN)
    for row in judged(variants):
        expected = torch.cat([true.frames[row, :GIVEN], true.frames[row, GIVEN:].flip(0)])
        assert (variants.clip.frames[row].int() - expected.int()).abs().max() <= 1
        impact = variants.clip.state.impact_time_s[row] + true.state.impact_time_s[row]
        assert float(impact) == pytest.approx(float(TIMES[GIVEN] + TIMES[-1]), abs=1e-4)


def test_vanished_and_resized_discs_are_not_matched():
    true = WORLDS["uniform", "id"]
    gone, resized = (make_impossible(true, kind, frames_given=GIVEN) for kind in ("vanish", "radius_change"))
    assert not gone.matched.any() and not resized.matched.any()
    for row in range(CLIPS):
        first = first_break(gone, true, row)
        assert (gone.clip.frames[row, first:] == 255).all() and (gone.area_ratio[row] < 1)
        last = float(parse_discs(resized.clip.frames[row : row + 1]).radii[0, -1, 0])
        assert last == pytest.approx(float(resized.clip.state.radii[row, 0]), abs=0.05)
    assert make_impossible(true, "teleport", frames_given=GIVEN).matched.all()


def test_slow_discs_are_not_judged_rather_than_hardly_moved():
    true = WORLDS["uniform", "ood"]
    still = replace(true.state, positions=true.state.positions[:, :1].repeat(1, FRAMES, 1, 1))
    still = replace(still, velocities=still.velocities * 0)
    clip = replace(true, frames=render(still, SIZE), state=still)
    for kind in ("reversal", "energy_gain", "time_reversal"):
        variants = make_impossible(clip, kind, frames_given=GIVEN)
        assert judged(variants) == [] and "too slow" in variants.reasons[0]
        assert torch.equal(variants.clip.frames, clip.frames) and variants.area_ratio.isnan().all()


def test_impact_within_the_start_frames_is_not_judged():
    variants = make_impossible(WORLDS["collision", "id"], "pass_through", frames_given=14)
    assert judged(variants) == [] and "impact" in variants.reasons[0]


def test_blue_is_in_front_only_where_discs_overlap():
    for true in (WORLDS["collision", "id"], WORLDS["parabola", "ood"]):
        assert torch.equal(draw(true.state, SIZE, "coverage"), true.frames)
    both = DiscState(
        positions=torch.full((1, 1, 2, 2), WORLD_SIZE / 2),
        velocities=torch.zeros(1, 1, 2, 2),
        radii=torch.tensor([[2.0, 1.0]]),
        impact_time_s=torch.tensor([torch.nan]),
    )
    middle = draw(both, SIZE, "coverage")[0, 0, SIZE // 2]
    assert middle[SIZE // 2].tolist() == [0, 0, 255] and [255, 0, 0] in middle.tolist()


def test_lawful_companions():
    true = WORLDS["collision", "id"]
    mirror, smaller, shift = (make_lawful(true, kind, frames_given=GIVEN) for kind in ("mirror", "smaller", "shift"))
    assert (mirror.clip.frames.int() - true.frames.flip(2).int()).abs().max() <= 1 and mirror.matched.all()
    torch.testing.assert_close(smaller.area_ratio, torch.full((CLIPS,), SMALLER**-2), atol=0.05, rtol=0)
    gap = (smaller.clip.state.positions[:, :, 1] - smaller.clip.state.positions[:, :, 0])[..., 0]
    was = (true.state.positions[:, :, 1] - true.state.positions[:, :, 0])[..., 0]
    touch, touched = (s.radii.sum(1, keepdim=True) for s in (smaller.clip.state, true.state))
    torch.testing.assert_close(gap - touch, was - touched, atol=1e-4, rtol=0)
    moved = (shift.clip.state.positions - true.state.positions)[judged(shift)]
    assert (moved[..., 0].abs() >= 1 - 1e-4).all() and moved[..., 1].abs().max() == 0
    assert judged(make_lawful(WORLDS["parabola", "id"], "mirror")) == []
    assert set(LAWFUL_KINDS) == {"mirror", "smaller", "shift"}


def test_altered_looks():
    true = WORLDS["collision", "id"]
    swapped, dim = alter_appearance(true, "swap_colours"), alter_appearance(true, "dim")
    assert torch.equal(alter_appearance(swapped, "swap_colours").frames, true.frames)
    torch.testing.assert_close(
        parse_discs(swapped.frames).positions, parse_discs(true.frames).positions.flip(2), equal_nan=True
    )
    assert dim.frames.max() == 204
    with pytest.raises(ValueError, match="swap_colours, dim"):
        alter_appearance(true, "blur")


def test_a_kind_that_does_not_apply_names_those_that_do():
    with pytest.raises(ValueError, match=r"gravity_off.*teleport.*vanish"):
        make_impossible(WORLDS["uniform", "id"], "gravity_off")
    mixed = make_impossible(MIXED, "gravity_off", frames_given=GIVEN)
    assert mixed.reasons[0] == "gravity_off does not exist in uniform" and mixed.reasons[3] is None
    with pytest.raises(ValueError, match="mirror, shift, smaller"):
        make_lawful(MIXED, "teleport")
    with pytest.raises(ValueError, match="unknown scenario"):
        kinds_for("rope")


@pytest.mark.parametrize("make", [make_impossible, make_lawful])
def test_hostile_clips_are_refused(make):
    kind = {make_impossible: "vanish", make_lawful: "shift"}[make]
    true = WORLDS["uniform", "id"]
    white = torch.full_like(true.frames, 255)
    for clip, problem in [
        (true[[]], "no clip"),
        (replace(true, state=None), "true state"),
        (replace(true, frames=white), "its own state"),
        (replace(true, frames=true.frames[:, :, :, :-1]), "its own state"),
        (simulate("uniform", "id", [0], frames=2, size=SIZE), "frames given"),
    ]:
        with pytest.raises(ValueError, match=problem):
            make(clip, kind)
    for count in (0, FRAMES - 1, -1):
        with pytest.raises(ValueError, match="frames given"):
            make(true, kind, frames_given=count)


def test_published_edges_and_other_sizes_are_kept():
    for size, edge in ((17, "coverage"), (24, "phyworld")):
        true = simulate("parabola", "id", range(3), frames=9, size=size, edge=edge)
        variants = make_impossible(true, "teleport")
        assert torch.equal(draw(true.state, size, edge), true.frames)
        assert variants.clip.frames.shape == true.frames.shape and judged(variants)
