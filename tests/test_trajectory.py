from dataclasses import replace

import pytest
import torch

from physnb.data import CAPTIONS, FRAME_STEP_S, WORLD_SIZE, Clip, DiscState, render, simulate
from physnb.data.worlds import frame_times
from physnb.metrics import Scores, metric_trajectory, parse_discs

GIVEN = 3
FLOOR = 0.01  # world units: a sixteenth of a 64-pixel frame's pixel, what parsing an exact render may be off


def clip_of(state: DiscState, scenario: str = "uniform", size: int = 64, edge: str = "coverage") -> Clip:
    clips = len(state.radii)
    return Clip(
        frames=render(state, size, edge),
        captions=(CAPTIONS[scenario],) * clips,
        scenarios=(scenario,) * clips,
        buckets=("id",) * clips,
        indices=torch.arange(clips),
        state=state,
    )


def one_disc(speed: float = 2.0, radius: float = 1.0, x: float = 2.0, y: float = 4.0, frames: int = 16) -> DiscState:
    """A red disc in uniform motion, as phyworld places it: frame k at 0.1 k + 0.01 s."""
    positions, velocities = (torch.full((1, frames, 2, 2), torch.nan) for _ in range(2))
    positions[0, :, 0, 0] = x + speed * torch.from_numpy(frame_times(frames)).float()
    positions[0, :, 0, 1] = y
    velocities[0, :, 0] = torch.tensor([speed, 0.0])
    return DiscState(positions, velocities, torch.tensor([[radius, torch.nan]]), torch.tensor([torch.nan]))


def measure(generated: Clip, true: Clip, **settings) -> dict[str, float]:
    """Scores of a single clip."""
    return {name: float(s.values[0]) for name, s in metric_trajectory(generated, true, **settings).items()}


def with_frames(clip: Clip, frames: torch.Tensor) -> Clip:
    return replace(clip, frames=frames, state=None)


def test_true_clip_scores_next_to_nothing():
    for scenario in ("uniform", "parabola", "collision"):
        true = simulate(scenario, "id", range(30), frames=16, size=64)
        found = metric_trajectory(true, true)
        assert found["missing_rate"].values.max() == 0
        assert found["position_error"].values.max() < 3 * FLOOR
        assert found["velocity_error"].values.nanmean() < 0.02


@pytest.mark.parametrize("pixels", [1, 2, -2])
def test_clip_shifted_by_whole_pixels_is_off_by_exactly_that(pixels):
    true = simulate("uniform", "id", range(20), frames=16, size=64)  # discs keep 0.5 units from floor and ceiling
    found = metric_trajectory(with_frames(true, true.frames.roll(pixels, dims=2)), true)
    expected = abs(pixels) * WORLD_SIZE / 64
    torch.testing.assert_close(found["position_error"].values, torch.full((20,), expected), atol=FLOOR, rtol=0)
    assert found["velocity_error"].values.max() < 0.05 and found["missing_rate"].values.max() == 0


@pytest.mark.parametrize("difference", [-1.5, -0.5, 0.5])
def test_disc_at_another_speed_has_that_velocity_error(difference):
    true = clip_of(one_disc(speed=2.0))
    found = measure(clip_of(one_disc(speed=2.0 + difference)), true)
    assert found["velocity_error"] == pytest.approx(abs(difference), abs=0.01)
    # the distance grows from t = 0, so its mean over frames is the difference times their mean time
    assert found["position_error"] == pytest.approx(abs(difference) * frame_times(16)[GIVEN:].mean(), abs=FLOOR)


def test_velocity_error_counts_both_axes():
    state = one_disc(speed=2.0)
    state.positions[0, :, 0, 1] += 0.75 * torch.from_numpy(frame_times(16)).float()
    faster = one_disc(speed=3.0)
    faster.positions[0, :, 0, 1] = 4.0
    assert measure(clip_of(faster), clip_of(state))["velocity_error"] == pytest.approx((1 + 0.75**2) ** 0.5, abs=0.02)


def test_static_copy_of_the_last_start_frame_does_not_win():
    true = clip_of(one_disc(speed=2.0))
    static = with_frames(true, true.frames[:, GIVEN - 1 : GIVEN].expand_as(true.frames).clone())
    found = measure(static, true)
    since = frame_times(16)[GIVEN:] - frame_times(16)[GIVEN - 1]
    assert found["velocity_error"] == pytest.approx(2.0, abs=0.01)
    assert found["position_error"] == pytest.approx(2.0 * since.mean(), abs=FLOOR)


def test_erased_frames_are_the_missing_rate_and_not_the_position_error():
    true = clip_of(one_disc())
    frames = true.frames.clone()
    frames[:, 5:8] = 255
    found = measure(with_frames(true, frames), true)
    assert found["missing_rate"] == pytest.approx(3 / 13)
    assert found["position_error"] < FLOOR
    # the objective of the hunt lets a lost disc count as 5 units
    assert found["tracking_error"] == pytest.approx(5 * 3 / 13, abs=FLOOR)


def test_a_shrunken_disc_counts_as_missing():
    true = clip_of(one_disc(radius=1.2))
    assert measure(clip_of(one_disc(radius=0.7)), true)["missing_rate"] == 0  # 34 % of the area
    assert measure(clip_of(one_disc(radius=0.5)), true)["missing_rate"] == 1  # 17 %


def test_absent_disc_is_nan_with_a_reason_and_no_success():
    true = clip_of(one_disc())
    found = metric_trajectory(with_frames(true, torch.full_like(true.frames, 255)), true)
    for name in ("position_error", "velocity_error", "radius_drift"):
        assert found[name].values.isnan().all() and all(found[name].reasons), name
    assert "missing in every judged frame" in found["position_error"].reasons[0]
    assert found["missing_rate"].values.item() == 1
    assert found["tracking_error"].values.item() == 5


def test_a_far_disc_is_no_worse_than_an_absent_one():
    true = clip_of(one_disc(speed=0.0, x=1.5, y=1.5))
    assert measure(clip_of(one_disc(speed=0.0, x=8.5, y=8.5)), true)["tracking_error"] == pytest.approx(5)


def test_frames_with_the_true_disc_at_a_wall_are_not_judged():
    true = clip_of(one_disc(speed=4.0, x=4.0))  # its edge leaves the box after 1.25 s
    frames = true.frames.clone()
    inside = true.state.inside[0, :, 0]
    assert 0 < inside[GIVEN:].sum() < 13
    frames[:, ~inside] = 255
    assert measure(with_frames(true, frames), true)["missing_rate"] == 0


def test_clip_that_cannot_be_judged_says_why():
    true = clip_of(one_disc(speed=0.0, x=0.2))  # never wholly inside
    found = metric_trajectory(true, true)
    assert found["missing_rate"].values.isnan().all()
    assert found["missing_rate"].reasons == ("no generated frame has the true disc inside the box",)


def test_radius_drift_is_largest_minus_smallest_radius():
    true = clip_of(one_disc(radius=1.0))
    frames = torch.cat([true.frames[:, :8], clip_of(one_disc(radius=1.3)).frames[:, 8:]], dim=1)
    assert measure(with_frames(true, frames), true)["radius_drift"] == pytest.approx(0.3, abs=0.03)
    assert measure(true, true)["radius_drift"] < 0.03


def two_discs(after: tuple[float, float], frames: int = 16) -> DiscState:
    """Equal discs meeting at 2 and -2 units/s halfway, leaving with the given velocities; exact is (-2, 2)."""
    since = torch.from_numpy(frame_times(frames)).float() - 0.76
    positions, velocities = torch.empty(1, frames, 2, 2), torch.zeros(1, frames, 2, 2)
    for disc, (at, before) in enumerate(((4.0, 2.0), (6.0, -2.0))):
        velocities[0, :, disc, 0] = torch.where(since < 0, before, after[disc])
        positions[0, :, disc, 0] = at + velocities[0, :, disc, 0] * since
        positions[0, :, disc, 1] = 5.0
    return DiscState(positions, velocities, torch.ones(1, 2), torch.tensor([0.76]))


def test_momentum_and_energy_errors_of_a_collision_by_hand():
    true = clip_of(two_discs((-2.0, 2.0)), "collision")
    assert max(measure(true, true)[name] for name in ("momentum_error", "energy_error")) < 0.02
    slow = measure(clip_of(two_discs((-1.0, 1.0)), "collision"), true)  # momentum kept, three quarters of energy lost
    assert slow["momentum_error"] == pytest.approx(0, abs=0.02)
    assert slow["energy_error"] == pytest.approx(0.75, abs=0.02)
    drifting = measure(clip_of(two_discs((-1.0, 2.0)), "collision"), true)
    assert drifting["momentum_error"] == pytest.approx(1 / 4, abs=0.02)
    assert drifting["energy_error"] == pytest.approx(3 / 8, abs=0.02)


def test_collision_velocity_error_is_the_mean_over_discs_and_stretches():
    true = clip_of(two_discs((-2.0, 2.0)), "collision")
    found = measure(clip_of(two_discs((-1.0, 2.0)), "collision"), true)
    assert found["velocity_error"] == pytest.approx(1 / 4, abs=0.01)  # one of two discs, one of two stretches


def test_motion_without_impact_has_no_momentum_error():
    true = clip_of(one_disc())
    found = metric_trajectory(true, true)
    assert found["momentum_error"].values.isnan().all() and "no impact" in found["momentum_error"].reasons[0]


def test_clips_are_judged_one_by_one():
    true = simulate("collision", "ood", range(12), frames=16, size=32)
    frames = true.frames.clone()
    frames[3] = 255
    frames[7] = frames[7].roll(1, dims=1)
    together = metric_trajectory(with_frames(true, frames), true)
    for i in (0, 3, 7):
        alone = metric_trajectory(with_frames(true, frames)[i : i + 1], true[i : i + 1])
        for name, score in together.items():
            torch.testing.assert_close(score.values[i : i + 1], alone[name].values, equal_nan=True)


@pytest.mark.parametrize("mode", ["clean", "compat"])
def test_inputs_are_left_alone(mode):
    true = simulate("collision", "ood", range(6), frames=16, size=32)
    made = with_frames(true, true.frames.flip(1))
    before = made.frames.clone(), true.frames.clone(), {k: v.clone() for k, v in vars(true.state).items()}
    metric_trajectory(made, true, mode=mode)
    assert torch.equal(made.frames, before[0]) and torch.equal(true.frames, before[1])
    for name, value in vars(true.state).items():
        torch.testing.assert_close(value, before[2][name], rtol=0, atol=0, equal_nan=True)


def test_sanity_ladder_copy_beats_reversed_static_and_noise():
    true = simulate("uniform", "id", range(20), frames=16, size=32)
    static = true.frames[:, 2:3].expand_as(true.frames)
    noise = torch.randint(0, 256, true.frames.shape, generator=torch.Generator().manual_seed(0)).byte()
    others = dict(reversed=true.frames.flip(1), static=static, noise=noise)
    tracking = {
        name: float(metric_trajectory(with_frames(true, frames.clone()), true)["tracking_error"].values.mean())
        for name, frames in dict(copy=true.frames, **others).items()
    }
    assert all(tracking[name] > 10 * tracking["copy"] for name in others), tracking


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: (t[0:1], t, {}), r"generated \(1, 16, 32, 32, 3\) and true \(2, 16, 32, 32, 3\) clips do not match"),
        (lambda t: (simulate("parabola", "id", range(2), frames=16, size=32), t, {}), "do not match"),
        (lambda t: (simulate("uniform", "id", range(2), frames=16, size=64), t, {}), "do not match"),
        (lambda t: (t, replace(t, state=None), {}), "need the true state"),
        (lambda t: (t, t, dict(frames_given=0)), r"frames given must be in \[1, 13\] to judge a trajectory, got 0"),
        (lambda t: (t, t, dict(frames_given=14)), r"frames given must be in \[1, 13\] to judge a trajectory, got 14"),
        (lambda t: (t, t, dict(mode="exact")), "unknown mode 'exact'; choose one of clean, compat"),
    ],
)
def test_clips_that_do_not_belong_together_are_refused(make, message):
    generated, true, settings = make(simulate("uniform", "id", range(2), frames=16, size=32))
    with pytest.raises(ValueError, match=message):
        metric_trajectory(generated, true, **settings)


# What phyworld's own evaluate.py gives for its own render of this clip: reference/metrics.md, 2.7.
PUBLISHED = {  # pixels: mean |x error|, mean |y error| in units, mean |x velocity error| in units/s
    256: (0.02054, 0.01562, 0.01959),
    128: (0.0416, 0.02795, 0.07012),
    64: (0.08384, 0.05761, 0.08573),
    32: (0.16704, 0.11217, 0.4525),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_compat_reproduces_the_published_numbers(size):
    true = clip_of(one_disc(speed=2.0, radius=1.0, x=2.0, y=4.0, frames=31), size=size, edge="phyworld")
    found = measure(true, true, mode="compat")
    assert (found["x_error"], found["y_error"], found["x_velocity_error"]) == pytest.approx(
        PUBLISHED[size], abs=6e-6, rel=5e-4
    )


def test_compat_velocity_error_averages_before_the_absolute_value():
    true = clip_of(one_disc(speed=2.5, frames=31), size=256, edge="phyworld")
    found = measure(true, true, mode="compat")
    assert found["velocity_error"] == pytest.approx(0.010, abs=0.001)  # metrics.md 2.5: v / 256
    assert found["velocity_error"] < found["x_velocity_error"]


def test_compat_puts_a_lost_disc_on_the_wall():
    true = clip_of(one_disc(speed=2.0, frames=31), size=128, edge="phyworld")
    frames = true.frames.clone()
    frames[:, 15] = 255
    lost, kept = (measure(with_frames(true, f), true, mode="compat") for f in (frames, true.frames))
    x = float(true.state.positions[0, 15, 0, 0])
    assert lost["x_error"] - kept["x_error"] == pytest.approx((10 - x) / 28, abs=0.01)  # 28 frames from frame 3 on


def test_parse_of_an_empty_frame_sees_nothing():
    parsed = parse_discs(torch.full((1, 2, 16, 16, 3), 255, dtype=torch.uint8))
    assert parsed.positions.isnan().all() and (parsed.areas == 0).all()


def test_parse_tells_colours_apart():
    state = two_discs((-2.0, 2.0))
    parsed = parse_discs(render(state, 64))
    torch.testing.assert_close(parsed.positions[:, :5], state.positions[:, :5], atol=FLOOR, rtol=0)
    torch.testing.assert_close(parsed.radii[:, :5], torch.ones(1, 5, 2), atol=0.03, rtol=0)


def test_scores_without_a_reason_for_nan_are_refused():
    values = torch.tensor([1.0, torch.nan])
    Scores("error", "units", values, (None, "why"))
    for reasons in ((None, None), ("why", "why")):
        with pytest.raises(ValueError, match="error: every value that is not a number needs a reason"):
            Scores("error", "units", values, reasons)


def test_frame_step_is_phyworlds():
    assert FRAME_STEP_S == 0.1 and frame_times(3).tolist() == pytest.approx([0.01, 0.11, 0.21])
