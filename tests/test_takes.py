from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.config import SCENARIOS, SPLITS
from physnb.data import WORLD_SIZE, Clip, DiscState, simulate
from physnb.data.laws import GRAVITY
from physnb.data.takes import POSITION_JITTER, SPEED_JITTER, second_take
from physnb.data.worlds import frame_times


def cases(scenario: str, split: str = "id", clips: int = 12) -> Clip:
    return simulate(scenario, split, range(clips), frames=16, size=32)


def assert_same_state(one: DiscState, other: DiscState, tolerance: float = 1e-5) -> None:
    for name, value in vars(one).items():
        torch.testing.assert_close(value, getattr(other, name), atol=tolerance, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("split", SPLITS)
def test_take_without_jitter_is_the_same_case(scenario, split):
    clip = cases(scenario, split)
    take = second_take(clip, 0, speed_jitter=0, position_jitter=0)
    assert_same_state(take.state, clip.state)
    assert (take.frames.int() - clip.frames.int()).abs().max() <= 1
    assert (take.captions, take.scenarios, take.buckets) == (clip.captions, clip.scenarios, clip.buckets)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_jitter_stays_within_its_size_and_is_used(scenario):
    clip = cases(scenario, clips=60)
    take = second_take(clip, 3)
    speed, jittered = clip.state.velocities[:, 0, :, 0], take.state.velocities[:, 0, :, 0]
    share = (jittered / speed - 1)[clip.state.present]
    assert share.abs().max() <= SPEED_JITTER + 1e-6 and share.abs().max() > 0.9 * SPEED_JITTER
    shift = take.state.positions[:, 0] - clip.state.positions[:, 0]
    shift = shift[clip.state.present]
    assert shift.abs().max() <= POSITION_JITTER + 1e-3 and shift.abs().max() > 0.9 * POSITION_JITTER
    assert torch.equal(take.state.radii.nan_to_num(-1), clip.state.radii.nan_to_num(-1))


def test_throw_still_falls_with_gravity():
    take = second_take(cases("parabola"), 1)
    time = torch.from_numpy(frame_times(16)).float()
    fall = take.state.positions[:, :1, 0, 1] - take.state.positions[:, :, 0, 1]
    torch.testing.assert_close(fall, (GRAVITY / 2 * (time**2 - time[0] ** 2)).expand(12, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", SPLITS)
def test_collision_still_conserves_momentum_and_energy_at_contact(split):
    clip = cases("collision", split, clips=40)
    state = second_take(clip, 1).state
    mass, velocity = state.radii**2, state.velocities[..., 0]
    for power in (1, 2):
        total = (mass[:, None] * velocity**power).sum(-1)
        torch.testing.assert_close(total[:, 0], total[:, -1], atol=1e-4, rtol=1e-4)
    assert (velocity[:, 0] != velocity[:, -1]).all()  # it does happen within the clip
    apart = state.positions[:, :, 1] - state.positions[:, :, 0]
    assert (apart[..., 0] >= state.radii.sum(1, keepdim=True) - 1e-4).all() and apart[..., 1].abs().max() < 1e-5
    assert (state.impact_time_s != clip.state.impact_time_s).any()


def test_no_disc_starts_outside_the_box():
    clip = cases("uniform", "ood", clips=100)
    take = second_take(clip, 0, position_jitter=2.0)
    start, radius = take.state.positions[:, 0, 0], take.state.radii[:, 0, None]
    assert (start >= radius - 1e-4).all() and (start <= WORLD_SIZE - radius + 0.1).all()


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 2**31))
def test_take_of_a_clip_does_not_depend_on_the_batch(order, seed):
    clip = Clip.concatenate([cases(scenario, clips=2) for scenario in SCENARIOS])
    before = clip.frames.clone()
    whole, shuffled = second_take(clip, seed), second_take(clip[list(order)], seed)
    assert torch.equal(whole.frames[list(order)], shuffled.frames)
    assert torch.equal(clip.frames, before)
    assert not whole.state.positions[:, :, 0].isnan().any()


def test_seeds_give_other_takes():
    clip = cases("uniform")
    assert (second_take(clip, 0).state.positions != second_take(clip, 1).state.positions)[:, :, 0].any((1, 2)).all()


def changed(clip: Clip, **settings) -> Clip:
    return replace(clip, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: changed(c, state=None), "needs the true state"),
        (lambda c: changed(c, scenarios=("pendulum",) * 12), "unknown scenario for a second take 'pendulum'"),
        (lambda c: changed(c, scenarios=("parabola",) * 12), "does not follow the law"),
        (lambda c: changed(c, fps=8.0), "10 frames/s"),
        (lambda c: changed(c, frames=c.frames[:, :, :20]), "square"),
        (lambda c: changed(c, frames=c.frames[:, :0]), "state for each of its frames"),
        (lambda c: c[0:0], "at least one clip"),
    ],
)
def test_clips_that_have_no_second_take_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        second_take(change(cases("uniform")), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(seed=-1), "seed"),
        (dict(seed=0, speed_jitter=1.0), "speed jitter"),
        (dict(seed=0, speed_jitter=-0.1), "speed jitter"),
        (dict(seed=0, position_jitter=10.0), "position jitter"),
        (dict(seed=0, position_jitter=float("nan")), "position jitter"),
        (dict(seed=0, edge="soft"), "unknown edge"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        second_take(cases("uniform"), **settings)
