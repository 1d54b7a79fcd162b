import math
from dataclasses import replace

import pytest
import torch
from discs import clip_of, one_disc
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState, render, simulate
from physnb.data.worlds import frame_times
from physnb.metrics import Scores, metric_trajectory, parse_discs
from physnb.metrics.colour import stretch_contrast
from physnb.metrics.trajectory import bucket_table

GIVEN = 3
FLOOR = 0.01  # world units: a sixteenth of a 64-pixel frame's pixel, what parsing an exact render may be off


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


def shorten(clip: Clip, frames: int) -> Clip:
    return replace(clip, frames=clip.frames[:, :frames])


def narrow(clip: Clip) -> Clip:
    return replace(clip, frames=clip.frames[:, :, :, :0])


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
        (lambda t: (replace(t, fps=8.0), t, {}), "the worlds have 10 frames/s; generated clips have 8, true 10"),
        (lambda t: (replace(t, fps=8.0),) * 2 + ({},), "the worlds have 10 frames/s; generated clips have 8, true 8"),
        (lambda t: (shorten(t, 0),) * 2 + ({},), "the true state is of"),
        (lambda t: (shorten(t, 1),) * 2 + ({},), "the true state is of"),
        (lambda t: (narrow(t),) * 2 + ({},), r"frames of \(32, 0\) pixels show nothing to judge"),
    ],
)
def test_clips_that_do_not_belong_together_are_refused(make, message):
    generated, true, settings = make(simulate("uniform", "id", range(2), frames=16, size=32))
    with pytest.raises(ValueError, match=message):
        metric_trajectory(generated, true, **settings)


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


def slow_parse(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and areas by the definition, on all frames at once; `parse_discs` must give the same bits."""
    red, green, blue = frames.float().div(255).unbind(-1)
    excess = torch.stack([red - torch.maximum(green, blue), blue - torch.maximum(red, green)], dim=2)
    shade = ((excess - 0.1) / 0.8).clamp(0, 1)
    height, width = shade.shape[-2:]
    column = (torch.arange(width) + 0.5) / width * WORLD_SIZE
    row = WORLD_SIZE - (torch.arange(height) + 0.5) / height * WORLD_SIZE
    total = shade.sum((-1, -2))
    x, y = (shade.sum(-2) * column).sum(-1) / total, (shade.sum(-1) * row).sum(-1) / total
    return torch.stack([x, y], -1), total * (WORLD_SIZE / height) * (WORLD_SIZE / width)


@pytest.mark.parametrize(("size", "clips", "frames"), [(32, 10, 16), (15, 3, 5), (96, 2, 8)])
def test_parse_in_chunks_gives_the_bits_of_the_definition(size, clips, frames):
    true = simulate("collision", "ood", range(clips), frames=frames, size=size).frames
    noise = torch.randint(0, 256, true.shape, generator=torch.Generator().manual_seed(0)).byte()
    for shown in (true, true.contiguous(), noise, noise[:, :1].expand_as(noise)):
        parsed, (positions, areas) = parse_discs(shown), slow_parse(shown)
        torch.testing.assert_close(parsed.positions, positions, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(parsed.areas, areas, rtol=0, atol=0)


MEANS = {  # over the clips below; made before the parser was cut into chunks
    "uniform": dict(
        position_error=0.3168373, velocity_error=0.001831009, missing_rate=0, tracking_error=0.3168373,
        radius_drift=0.009430416,
    ),
    "parabola": dict(
        position_error=0.4515127, velocity_error=0.2535375, missing_rate=0, tracking_error=0.4515127,
        radius_drift=0.009240896,
    ),
    "collision": dict(
        position_error=0.1521113, velocity_error=0.1636475, missing_rate=0, tracking_error=0.1521113,
        radius_drift=0.01603368, momentum_error=0.05630225, energy_error=0.3424563,
    ),
}  # fmt: skip


def test_values_stay_what_published_results_were_made_with():
    for scenario, expected in MEANS.items():
        true = simulate(scenario, "ood", range(4), frames=16, size=32)
        found = metric_trajectory(with_frames(true, true.frames.roll(1, dims=1)), true)
        for name, mean in expected.items():
            assert float(found[name].values.nanmean()) == pytest.approx(mean, rel=1e-5), (scenario, name)


def test_buckets_are_phyworlds_with_counts_and_intervals():
    true = simulate("uniform", "ood", range(12), frames=16, size=32)
    still = list(true.buckets).index("v")
    true.state.velocities[still, :, 0, 0] = 0
    found = metric_trajectory(true, true)
    table = bucket_table(found, true)
    assert list(table) == ["id", "out", "r", "v", "rv", "zero"]
    cases = {bucket: row["missing_rate"].cases for bucket, row in table.items()}
    kinds = {bucket: true.buckets.count(bucket) for bucket in ("r", "v", "rv")}
    assert cases == kinds | dict(id=0, out=12, zero=1, v=kinds["v"] - 1)
    rows = [i for i, bucket in enumerate(true.buckets) if bucket == "rv"]
    values = found["position_error"].values[rows]
    row = table["rv"]["position_error"]
    assert row.mean == pytest.approx(float(values.nanmean())) and row.low <= row.mean <= row.high
    assert table["id"]["position_error"].judged == 0 and math.isnan(table["id"]["position_error"].mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, state=None), "buckets need the true state"),
        (lambda t: replace(t, buckets=("id", "fast")), "unknown bucket 'fast'; choose one of id, r, v, rv"),
        (lambda t: t[0:1], "position_error has 2 values for 1 clips"),
    ],
)
def test_buckets_of_other_clips_are_refused(change, message):
    true = simulate("uniform", "id", range(2), frames=16, size=32)
    found = metric_trajectory(true, true)
    with pytest.raises(ValueError, match=message):
        bucket_table({"position_error": found["position_error"]}, change(true))


def test_no_clips_give_no_scores():
    true = simulate("uniform", "id", range(1), frames=16, size=32)[0:0]
    for mode in ("clean", "compat"):
        assert all(len(score.values) == 0 for score in metric_trajectory(true, true, mode=mode).values())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scenario=st.sampled_from(("parabola", "collision")), height=st.integers(7, 12))
def test_any_frames_give_numbers_or_reasons_in_any_order(seed, scenario, height):
    true = simulate(scenario, "ood", range(4), frames=7, size=12, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    frames = true.frames.clone()
    frames[1] = torch.randint(0, 256, frames[1].shape, generator=generator).byte()
    frames[2, 3:] = 255
    frames[3] *= (torch.rand(frames[3].shape, generator=generator) > 0.3).byte()
    made, true = (replace(clip, frames=clip.frames[:, :, :height]) for clip in (with_frames(true, frames), true))
    before = made.frames.clone()
    found = metric_trajectory(made, true)  # Scores refuses a NaN without a reason
    order = torch.randperm(4, generator=generator)
    other = metric_trajectory(made[order], true[order])
    for name, score in found.items():
        torch.testing.assert_close(score.values[order], other[name].values, rtol=0, atol=0, equal_nan=True)
        assert not score.values.isinf().any() and not (score.values < 0).any(), name
    assert 0 <= found["missing_rate"].values.nan_to_num(0).max() <= 1
    assert torch.equal(made.frames, before)


# --- faded discs


def faded(clip, share: float):
    """The clip with its contrast to the white ground cut to `share`, after the start frames."""
    frames = clip.frames.float()
    frames[:, 3:] = 255 - share * (255 - frames[:, 3:])
    return replace(clip, frames=frames.round().byte())


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_restored_discs_are_there_and_in_place_however_faded(share):
    true = simulate("collision", "id", range(6), frames=16, size=32, seed=5)
    pale = faded(true, share)
    plain, restored = metric_trajectory(pale, true), metric_trajectory(pale, true, restore=6.0)
    assert restored["missing_rate"].values.max() == 0
    assert restored["tracking_error"].values.max() < 0.05
    if share < 0.25:
        assert plain["missing_rate"].values.min() == 1  # which is what contrast alone can do to the plain metric


def test_restoring_does_not_invent_discs():
    true = simulate("uniform", "id", range(4), frames=16, size=32, seed=5)
    empty, ghost = faded(true, 0.0), faded(true, 0.01)  # nothing, and two grey levels
    for clip in (empty, ghost):
        assert metric_trajectory(clip, true, restore=6.0)["missing_rate"].values.min() == 1


def test_contrast_changes_nothing_about_a_restored_clip():
    true = simulate("parabola", "id", range(6), frames=16, size=32, seed=7)
    pale = faded(true, 0.3)
    stretched = metric_trajectory(stretch_contrast(pale, 2.0), true, restore=6.0)
    for name, found in metric_trajectory(pale, true, restore=6.0).items():
        torch.testing.assert_close(found.values, stretched[name].values, atol=0.02, rtol=0, equal_nan=True)
