from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import CAPTIONS, Clip, DiscState, render, simulate
from physnb.data.worlds import frame_times
from physnb.metrics.violations import MIN_FRAMES, VIOLATIONS, measure_violations

FRAMES = 16


def path(x=2.0, y=5.0, vx=2.0, vy=0.0, ay=0.0, radius=1.0) -> dict:
    """Motion of one disc: centres over time from start, velocity and vertical acceleration, in world units and s."""
    t = torch.from_numpy(frame_times(FRAMES)).float()
    return dict(centre=torch.stack([x + vx * t, y + vy * t + ay / 2 * t**2], 1), radius=radius)


def clip_of(*paths: dict, size: int = 64) -> Clip:
    """One clip of one or two discs on those paths."""
    positions = torch.full((1, FRAMES, 2, 2), torch.nan)
    radii = torch.full((1, 2), torch.nan)
    for disc, motion in enumerate(paths):
        positions[0, :, disc], radii[0, disc] = motion["centre"], motion["radius"]
    state = DiscState(positions, torch.zeros_like(positions), radii, torch.tensor([torch.nan]))
    return Clip(render(state, size), (CAPTIONS["uniform"],), ("uniform",), ("id",), torch.tensor([0]))


def with_frames(clip: Clip, frames: torch.Tensor) -> Clip:
    return replace(clip, frames=frames, state=None)


def measure(clip: Clip) -> dict[str, float]:
    """Violations of a single clip in their own units: v = half f / (1 - f)."""
    (row,) = measure_violations(clip).tolist()
    return {name: half * f / (1 - f) for (name, half), f in zip(VIOLATIONS.items(), row, strict=True)}


def collision(after: tuple[float, float]) -> Clip:
    """Equal discs of radius 1 meeting at 2 and -2 units/s at 0.76 s, then leaving; exact is (-2, 2)."""
    since = torch.from_numpy(frame_times(FRAMES)).float() - 0.76
    discs = []
    for at, before, then in ((4.0, 2.0, after[0]), (6.0, -2.0, after[1])):
        x = at + torch.where(since < 0, before, then) * since
        discs.append(dict(centre=torch.stack([x, torch.full_like(x, 5.0)], 1), radius=1.0))
    return clip_of(*discs)


@pytest.mark.parametrize("scenario", ["uniform", "parabola", "collision"])
@pytest.mark.parametrize("size", [32, 64])
def test_lawful_clips_violate_next_to_nothing(scenario, size):
    found = measure_violations(simulate(scenario, "id", range(12), frames=FRAMES, size=size))
    assert found.shape == (12, len(VIOLATIONS)) and (found >= 0).all()
    assert (found < 0.55).all()  # after an impact a disc may lawfully rest: stillness
    assert (found.median(0).values < 0.25).all()  # rendering at 32 pixels costs that much jump


def test_disc_erased_in_mid_air_vanishes_for_that_share_and_behind_a_wall_does_not():
    clip = clip_of(path(x=2, vx=2))
    frames = clip.frames.clone()
    frames[:, 6:10] = 255
    assert measure(with_frames(clip, frames))["vanishing"] == pytest.approx(4 / 16)
    assert measure(clip)["vanishing"] == 0
    leaves = clip_of(path(x=5, vx=5, radius=0.8))  # its centre reaches 12.5
    assert (leaves.frames[0, -1] == 255).all() and measure(leaves)["vanishing"] == 0


def test_disc_that_appears_in_mid_air_was_missing_before():
    clip = clip_of(path())
    frames = clip.frames.clone()
    frames[:, :4] = 255
    assert measure(with_frames(clip, frames))["vanishing"] == pytest.approx(4 / 16)


def test_clutter_is_the_share_of_full_scale_that_discs_do_not_explain():
    clip = clip_of(path(y=3))
    frames = clip.frames.clone()
    frames[:, :8] = 204  # the upper eighth of 64 rows is grey: a fifth below white in all three channels
    assert measure(clip)["clutter"] == pytest.approx(0, abs=1e-6)
    grey = frames.clone()
    grey[:, :, 8:] = clip.frames[:, :, 8:]
    grey[:, :, :8] = 204
    assert measure(with_frames(clip, grey))["clutter"] == pytest.approx(0.2 / 8, rel=1e-3)


def test_dispersion_of_two_patches_of_one_colour_by_hand():
    clip = clip_of(path(x=3, vx=0, y=3))
    twin = torch.minimum(clip.frames, clip_of(path(x=7, vx=0, y=3)).frames)
    # radius 1 at +-2 about the common centre: mean square 1/2 + 4, against 2 pi / 2 pi = 1 for a disc of their area
    assert measure(with_frames(clip, twin))["dispersion"] == pytest.approx(torch.tensor(4.5).log().item(), abs=0.05)
    assert measure(clip)["dispersion"] < 0.05


def test_radius_drift_is_the_range_over_the_median():
    frames = torch.cat([clip_of(path()).frames[:, :9], clip_of(path(radius=1.3)).frames[:, 9:]], dim=1)
    assert measure(with_frames(clip_of(path()), frames))["radius_drift"] == pytest.approx(0.3, abs=0.03)


def test_jump_is_the_departure_from_straight_motion_in_one_frame():
    moved = path()
    moved["centre"][8:, 1] += 1.5
    assert measure(clip_of(moved))["jump"] == pytest.approx(1.5, abs=0.03)
    slower = path(vx=3)
    slower["centre"][8:, 0] = slower["centre"][8, 0] + torch.arange(FRAMES - 8) * 0.1  # 3 to 1 units/s without contact
    assert measure(clip_of(slower))["jump"] == pytest.approx(0.2, abs=0.02)


def test_gravity_is_lawful_lift_and_sideways_acceleration_are_not():
    falls = measure(clip_of(path(y=8, ay=-2.5)))
    assert falls["lift"] == 0 and falls["roughness"] < 0.03 and falls["sideways_acceleration"] < 0.1
    rises = measure(clip_of(path(y=2, ay=2.5)))
    assert rises["lift"] == pytest.approx(2.5, abs=0.1)
    bent = path(vx=1)
    bent["centre"][:, 0] += 0.75 * torch.from_numpy(frame_times(FRAMES)).float() ** 2
    assert measure(clip_of(bent))["sideways_acceleration"] == pytest.approx(1.5, abs=0.1)


def test_momentum_and_energy_change_of_a_collision_by_hand():
    exact = measure(collision((-2.0, 2.0)))
    assert exact["momentum_change"] < 0.02 and exact["energy_change"] < 0.02 and exact["jump"] < 0.05
    slow = measure(collision((-1.0, 1.0)))  # momentum kept, three quarters of the energy lost
    assert slow["momentum_change"] < 0.02 and slow["energy_change"] == pytest.approx(3 / 4, abs=0.03)
    drifting = measure(collision((-1.0, 2.0)))  # 1 of 4 units of momentum gained, 3 of 8 of energy lost
    assert drifting["momentum_change"] == pytest.approx(1 / 4, abs=0.03)
    assert drifting["energy_change"] == pytest.approx(3 / 8, abs=0.03)


def test_discs_that_pass_through_each_other_overlap_and_change_places():
    assert measure(collision((-2.0, 2.0)))["overlap"] == 0
    assert measure(collision((2.0, -2.0)))["overlap"] == pytest.approx(1, abs=1e-4)
    # One disc sinks into the other, from 2.2 to 1 unit apart. Where both are they hide each other: a lens of area 1.228
    # is missing from either (area pi), and their centres seem 1 + 1.228 / (pi - 1.228) = 1.642 apart.
    resting = [path(vx=0, x=x) for x in (3.8, 6.0)]
    resting[0]["centre"][11:, 0] += 1.2
    assert measure(clip_of(*resting))["overlap"] == pytest.approx(1 - 1.642 / 2 - 0.1, abs=0.02)


def test_stillness_is_the_share_of_steps_without_motion():
    clip = clip_of(path())
    frames = clip.frames.clone()
    frames[:, 11:] = frames[:, 10:11]
    assert measure(with_frames(clip, frames))["stillness"] == pytest.approx(5 / 15)
    assert measure(clip)["stillness"] == 0


def test_frame_rate_decides_accelerations_and_not_jumps():
    moved = path(y=2, ay=2.5)
    ten, twenty = clip_of(moved), replace(clip_of(moved), fps=20.0)
    assert measure(twenty)["lift"] == pytest.approx(4 * measure(ten)["lift"], rel=1e-3)
    assert measure(twenty)["jump"] == pytest.approx(measure(ten)["jump"], rel=1e-3)


@pytest.mark.parametrize("keep", [slice(0, 0), slice(5, 8), slice(0, FRAMES, 2)])
def test_disc_that_cannot_be_followed_is_not_judged(keep):
    clip = clip_of(path())
    frames = torch.full_like(clip.frames, 255)
    frames[:, keep] = clip.frames[:, keep]
    assert measure_violations(with_frames(clip, frames)).isnan().all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)), height=st.integers(9, 33), width=st.integers(9, 33))
def test_any_frames_give_bounded_numbers_or_no_judgement_clip_by_clip(seed, order, height, width):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (4, 5, height, width, 3), generator=generator).byte()
    frames[1] = 255
    clip = Clip(frames, ("",) * 4, ("uniform",) * 4, ("id",) * 4, torch.arange(4))
    before = frames.clone()
    found = measure_violations(clip)
    assert torch.equal(frames, before)
    judged = ~found.isnan().any(1)
    assert found[~judged].isnan().all() and not judged[1]
    assert ((found[judged] >= 0) & (found[judged] < 1)).all()
    torch.testing.assert_close(measure_violations(clip[order]), found[order], equal_nan=True)


def test_batches_larger_than_a_chunk_are_the_same_clips():
    clip = simulate("collision", "ood", range(20), frames=8, size=16)
    together = measure_violations(clip)
    for row in (0, 7, 8, 19):
        torch.testing.assert_close(measure_violations(clip[row : row + 1])[0], together[row], equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[[]], "there is no clip to measure"),
        (lambda c: with_frames(c, c.frames[:, :0]), f"a clip needs {MIN_FRAMES} frames, got 0"),
        (lambda c: with_frames(c, c.frames[:, :1]), f"a clip needs {MIN_FRAMES} frames, got 1"),
        (lambda c: with_frames(c, c.frames[:, :, :0]), "frames have no pixels"),
        (lambda c: replace(c, fps=0.0), "a clip needs a frame rate above 0, got 0"),
        (lambda c: replace(c, fps=float("nan")), "a clip needs a frame rate above 0, got nan"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        measure_violations(change(simulate("uniform", "id", range(2), frames=6, size=16)))
