"""Phenomena: reproducible, lawful, in their ranges, and found by colour in spite of their scenery."""

import numpy as np
import pytest
import torch

from physnb.config import PHENOMENA, SIMULATED
from physnb.data import simulate
from physnb.data.phenomena import BEGINNINGS, SEEN_FRAMES
from physnb.data.scenery import SCENERY, render_scene
from physnb.metrics import metric_trajectory
from physnb.metrics.law import state_residual

CLIPS = {
    (name, split): simulate(name, split, range(24), frames=16, size=32) for name in PHENOMENA for split in ("id", "ood")
}
each = pytest.mark.parametrize("scenario", PHENOMENA)


def test_every_phenomenon_has_a_beginning_and_a_scenery():
    assert tuple(BEGINNINGS) == tuple(SCENERY) == PHENOMENA


@each
def test_a_clip_alone_is_the_clip_in_a_batch(scenario):
    batch = CLIPS[scenario, "ood"]
    for number in (0, 17):
        alone = simulate(scenario, "ood", [number], frames=16, size=32)
        assert torch.equal(alone.frames[0], batch.frames[number])
        assert torch.equal(alone.state.positions[0].nan_to_num(0), batch.state.positions[number].nan_to_num(0))
        assert alone.parameters[0] == batch.parameters[number] and alone.buckets[0] == batch.buckets[number]


@each
@pytest.mark.parametrize("split", ["id", "ood"])
def test_parameters_lie_where_the_bucket_says(scenario, split):
    clip, ranges = CLIPS[scenario, split], BEGINNINGS[scenario]
    for p, bucket in zip(clip.parameters, clip.buckets, strict=True):
        for name, out in (("radius", "r"), ("speed", "v")):
            low, high = getattr(ranges, name).inner
            assert (low <= p[name] <= high) == (out not in bucket)


@each
def test_discs_are_in_view_at_first_and_mostly(scenario):
    for split in ("id", "ood"):
        state = CLIPS[scenario, split].state
        inside = state.inside | ~state.present[:, None]
        assert inside[:, :SEEN_FRAMES].all() and (inside.all(2).float().mean(1) >= 0.6).all()


@each
def test_discs_are_found_by_colour_in_spite_of_the_scenery(scenario):
    clip = CLIPS[scenario, "id"]
    found = metric_trajectory(clip, clip)
    assert found["position_error"].values.max() < 0.06 and found["missing_rate"].values.max() == 0


@pytest.mark.parametrize("scenario", SIMULATED)
def test_true_motion_obeys_its_law_to_rounding(scenario):
    for split in ("id", "ood"):
        clip = simulate(scenario, split, range(24), frames=16, size=8)
        assert state_residual(scenario, clip.parameters, clip.state).max() < 1e-4


@each
def test_a_vanished_disc_leaves_its_scenery(scenario):
    clip = CLIPS[scenario, "id"][0:1]
    gone = clip.state.positions.clone()
    gone[:, 8:] = torch.nan
    state = type(clip.state)(gone, clip.state.velocities, clip.state.radii, clip.state.impact_time_s)
    frames = render_scene(scenario, clip.parameters, state, 32)
    assert torch.equal(frames[:, :8], clip.frames[:, :8])
    red = frames[0, 8:, ..., 0].int() - frames[0, 8:, ..., 1:].amax(-1).int()
    assert red.max() <= 0


def test_scenery_has_no_red_and_no_blue():
    for scenario in PHENOMENA:
        clip = CLIPS[scenario, "id"]
        far = torch.full_like(clip.state.radii, torch.nan)
        bare = type(clip.state)(clip.state.positions, clip.state.velocities, far, clip.state.impact_time_s)
        frames = render_scene(scenario, clip.parameters, bare, 32).int()
        assert (frames[..., 0] <= frames[..., 1:].amax(-1)).all()
        assert (frames[..., 2] <= frames[..., :2].amax(-1)).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown scenario 'pendulums'"):
        simulate("pendulums", "id", [0], frames=8, size=16)
    with pytest.raises(ValueError, match="drawn by coverage only"):
        simulate("orbit", "id", [0], frames=8, size=16, edge="phyworld")
    with pytest.raises(ValueError, match="not be negative"):
        simulate("orbit", "id", [-1], frames=8, size=16)
    with pytest.raises(ValueError, match="at least 2 frames"):
        simulate("orbit", "id", [0], frames=1, size=16)


def test_starts_are_drawn_evenly():
    clips = simulate("pendulum", "train", range(400), frames=4, size=8)
    speeds = np.array([p["speed"] for p in clips.parameters])
    low, high = BEGINNINGS["pendulum"].speed.inner
    assert np.quantile(speeds, [0.25, 0.5, 0.75]) == pytest.approx(
        low + (high - low) * np.array([0.25, 0.5, 0.75]), abs=0.3
    )
