"""phyworld's evaluator: its published digits, and a slow version that follows it frame by frame."""

from dataclasses import replace
from functools import partial

import discs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import Clip, simulate
from physnb.metrics import metric_trajectory
from physnb.metrics.trajectory import bucket_table
from physnb.metrics.trajectory_compat import QUANTITIES, parse_as_phyworld, phyworld_row

clip_of = partial(discs.clip_of, edge="phyworld")
one_disc = partial(discs.one_disc, frames=31)


def measure(generated: Clip, true: Clip) -> dict[str, float]:
    return {name: float(s.values[0]) for name, s in metric_trajectory(generated, true, mode="compat").items()}


def erase(clip: Clip, frames: list[int]) -> Clip:
    changed = clip.frames.clone()
    changed[:, frames] = 255
    return replace(clip, frames=changed, state=None)


def damage(clip: Clip, seed: int) -> Clip:
    """The clip with some frames erased, some mirrored, some without the blue disc, and some without the red one."""
    frames, generator = clip.frames.clone(), np.random.default_rng(seed)
    for video in frames:
        for frame in video:
            kind = generator.integers(8)
            if kind == 0:
                frame.fill_(255)
            elif kind == 1:
                frame.copy_(frame.flip(1))
            elif kind < 4:
                frame[frame[..., 0 if kind == 2 else 2] < 127] = 255
    return replace(clip, frames=frames, state=None)


# What phyworld's own evaluate.py gives for its own render of this clip: reference/metrics.md, 2.7.
PUBLISHED = {  # pixels: mean |x error|, mean |y error| in units, mean |x velocity error| in units/s
    256: (0.02054, 0.01562, 0.01959),
    128: (0.0416, 0.02795, 0.07012),
    64: (0.08384, 0.05761, 0.08573),
    32: (0.16704, 0.11217, 0.4525),
}


def box2d_track(start: float, speed: float, frames: int) -> torch.Tensor:
    """Uniform motion as Box2D adds it up, in float32 steps of 0.01 s, recorded after every tenth from the first on."""
    position, recorded = np.float32(start), []
    for step in range(10 * frames):
        position = np.float32(position + np.float32(0.01) * np.float32(speed))
        if step % 10 == 0:
            recorded.append(float(position))
    return torch.tensor(recorded)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_digits(size):
    state = one_disc()
    state.positions[0, :, 0, 0] = box2d_track(2.0, 2.0, 31)
    true = clip_of(state, size=size)
    found = measure(true, true)
    assert tuple(round(found[name], 5) for name in ("x_error", "y_error", "x_velocity_error")) == PUBLISHED[size]


def test_published_cost_of_one_missing_frame():
    true = clip_of(one_disc(), size=128)
    found = measure(erase(true, [10]), true)
    assert (round(found["x_error"], 3), round(found["x_velocity_error"], 2)) == (0.254, 4.52)  # metrics.md 2.5


@pytest.mark.parametrize("speed", [1.0, 2.5, 4.0])
def test_published_floor_of_the_headline_is_the_grid_bias(speed):
    true = clip_of(one_disc(speed=speed, x=1.2), size=256)
    found = measure(true, true)
    assert found["velocity_error"] == pytest.approx(speed / 256, abs=0.003)  # (W - 1) / W, and whole pixels
    assert found["velocity_error"] < found["x_velocity_error"]  # it averages before the absolute value


def slow_parse(frame: np.ndarray, disc: int) -> tuple[float, float, float]:
    """x, y and radius of one frame that is already flipped; NaN where the colour is absent."""
    on, off = (frame > 127), (frame < 127)
    mask = on[..., 0] & off[..., 1] & off[..., 2] if disc == 0 else off[..., 0] & off[..., 1] & on[..., 2]
    if not mask.any():
        return np.nan, np.nan, np.nan
    rows, columns = np.nonzero(mask)
    scale = 10 / frame.shape[1]
    return columns.mean() * scale, rows.mean() * scale, np.sqrt(len(rows) / np.pi) * scale


def slow_clip(clip: Clip, true: Clip, number: int, given: int = 3) -> dict[str, float]:
    """One clip as evaluate.py goes through it; quantities without a value are left out."""
    state, two = true.state[[number]], bool(true.state.present[number, 1])
    position, radius = state.positions[0].double().numpy(), state.radii[0].double().numpy()
    first = state.velocities[0, 0, :, 0].double().numpy()
    kept = []
    for i in range(given, len(position)):
        left, right = position[i, :, 0] - radius, position[i, :, 0] + radius
        down, up = position[i, 0, 1] - radius[0], position[i, 0, 1] + radius[0]
        alone = left[0] >= 0 and right[0] <= 10 and down >= 0 and up <= 10
        if (left[0] >= 0 and right[1] <= 10) if two else alone:
            kept.append(i)
    if not kept:
        return {}
    parsed, height, sizes = [], np.nan, [np.nan, np.nan]
    for i in kept:
        discs = [slow_parse(clip.frames[number, i].numpy()[::-1], disc) for disc in range(2 if two else 1)]
        height = discs[0][1] if discs[0][1] == discs[0][1] else height
        sizes = [d[2] if d[2] == d[2] else old for d, old in zip(discs, sizes, strict=False)]
        lost = (0.0, 10.0) if two else (10.0,)
        parsed.append([(d[0] if d[0] == d[0] else w, height, s) for d, w, s in zip(discs, lost, sizes, strict=False)])
    found, truth = np.array(parsed), position[kept][:, : 2 if two else 1]  # [time, disc, (x, y, r)]
    velocity, true_velocity = np.diff(found[..., :2], axis=0) / 0.1, np.diff(truth, axis=0) / 0.1

    def mean(values):
        return values.mean() if values.size else np.nan

    if not two:
        spread = found[:, 0, 2].max() - found[:, 0, 2].min()
        error, slip = np.abs(found[:, 0, :2] - truth[:, 0]), np.abs(velocity - true_velocity)[:, 0]
        result = dict(delta_r=spread, velocity_error=abs(mean(velocity[:, 0, 0]) - first[0]))
        for axis, name in enumerate("xy"):
            result |= {f"{name}_error": mean(error[:, axis]), f"{name}_velocity_error": mean(slip[:, axis])}
        return result
    ranges = [max(r) - min(r) for r in found[:5, :, 2].T.tolist()]
    result = dict(delta_r=max(ranges))
    v, u, mass = velocity[..., 0], true_velocity[..., 0], radius**2
    impact = len(u) - 1
    for i in range(1, len(u)):
        if np.abs(u[i] - u[i - 1]).max() > 0.1:
            impact = i
            break
    for when, frames, at in (
        ("pre", slice(None, impact + 1), slice(None, impact)),
        ("post", slice(impact + 1, None), slice(impact + 1, None)),
    ):
        drift = [abs(mean(v[at, d]) - mean(u[at, d])) for d in range(2)]
        result[f"{when}_velocity_error"] = np.mean(drift)
        result[f"{when}_x_error"] = mean(np.abs(found[frames, :, 0] - truth[frames, :, 0]))
        result[f"{when}_x_velocity_error"] = mean(np.abs(v[at] - u[at]))
        result[f"{when}_momentum_error"] = mean(np.abs(v[at] @ mass - first @ mass))
        result[f"{when}_energy_error"] = mean(np.abs(v[at] ** 2 @ mass / 2 - first**2 @ mass / 2))
    means = [result["pre_velocity_error"], result["post_velocity_error"]]
    return result | dict(velocity_error=np.mean([m for m in means if m == m] or [np.nan]))


@pytest.mark.parametrize(
    ("scenario", "split", "frames", "size"),
    [("uniform", "ood", 8, 16), ("parabola", "ood", 31, 32), ("collision", "id", 31, 32), ("collision", "ood", 8, 32)],
)
def test_agrees_with_the_slow_version(scenario, split, frames, size):
    true = simulate(scenario, split, range(8), frames=frames, size=size, edge="phyworld")
    for seed in range(2):
        made = damage(true, seed)
        found = metric_trajectory(made, true, mode="compat")
        expected = [slow_clip(made, true, number) for number in range(len(true))]
        for name in QUANTITIES:
            wanted = torch.tensor([row.get(name, np.nan) for row in expected]).float()
            torch.testing.assert_close(found[name].values, wanted, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def test_a_disc_lost_at_first_is_nan_in_y_and_finite_in_x():
    true = clip_of(one_disc(), size=64)
    found = metric_trajectory(erase(true, [3]), true, mode="compat")
    for name in ("y_error", "y_velocity_error", "delta_r"):
        assert found[name].values.isnan().all() and "not seen in the first judged frame" in found[name].reasons[0], name
    assert found["x_error"].values.item() > measure(true, true)["x_error"]
    before = metric_trajectory(erase(true, [0, 1, 2]), true, mode="compat")  # not judged, nor a source of the height
    assert before["y_error"].values.item() == measure(true, true)["y_error"]


def test_a_disc_never_seen_stands_at_the_wall():
    true = clip_of(one_disc(speed=2.0), size=64)
    found = measure(erase(true, list(range(31))), true)
    positions = true.state.positions[0, 3:, 0, 0]
    assert found["x_error"] == pytest.approx(float((10 - positions).mean()), rel=1e-5)
    assert (found["velocity_error"], found["x_velocity_error"]) == pytest.approx((2.0, 2.0), rel=1e-4)


def test_colliding_discs_that_are_lost_stand_at_their_own_walls():
    true = simulate("collision", "id", range(1), frames=16, size=64, edge="phyworld")
    found = measure(erase(true, list(range(16))), true)
    mass, first = true.state.radii[0] ** 2, true.state.velocities[0, 0, :, 0]
    assert found["pre_momentum_error"] == pytest.approx(float((mass * first).sum().abs()), rel=1e-4)
    assert found["post_energy_error"] == pytest.approx(float((mass * first**2).sum() / 2), rel=1e-4)


def test_y_is_read_from_the_flipped_frame():
    true = clip_of(one_disc(y=4.0), size=64)
    upside_down = replace(true, frames=true.frames.flip(2), state=None)
    assert measure(upside_down, true)["y_error"] == pytest.approx(abs(10 - 2 * 4.0), abs=0.2)


def test_parse_of_one_pixel_follows_i_over_width():
    frames = torch.full((1, 1, 8, 16, 3), 255, dtype=torch.uint8)
    frames[0, 0, 6, 3] = torch.tensor([128, 126, 0], dtype=torch.uint8)  # bottom but one
    x, y, radius = (values[0, 0] for values in parse_as_phyworld(frames))
    assert (x[0], y[0], radius[0]) == pytest.approx((3 / 16 * 10, 1 / 16 * 10, (1 / torch.pi) ** 0.5 / 16 * 10))
    assert x[1].isnan() and y[1].isnan() and radius[1].isnan()


def test_what_phyworld_does_not_report_says_so():
    true = Clip.concatenate([simulate(s, "id", range(1), frames=16, size=32) for s in ("uniform", "collision")])
    found = metric_trajectory(true, true, mode="compat")
    assert found["x_error"].reasons == (None, "phyworld reports x_error of one disc only")
    assert found["pre_momentum_error"].reasons == ("phyworld reports pre_momentum_error of collisions only", None)
    assert not found["velocity_error"].values.isnan().any()


def test_clips_without_a_judged_frame_say_why():
    true = clip_of(one_disc(x=9.5), size=32)
    found = metric_trajectory(true, true, mode="compat")
    assert found["velocity_error"].reasons == ("no generated frame has the true disc inside the box",)


def test_buckets_leave_out_small_discs_and_lost_clips_as_published():
    radii = (0.5, 0.7, 1.0, 1.8, 1.0, 1.0)
    true = Clip.concatenate([clip_of(one_disc(radius=r, speed=0.0 if i == 4 else 2.0)) for i, r in enumerate(radii)])
    true = replace(true, buckets=("r", "id", "id", "r", "v", "v"))
    found = metric_trajectory(erase(true, [3]), true, mode="compat")
    table = bucket_table(found, true, mode="compat")
    assert {b: row["x_error"].cases for b, row in table.items()} == dict(id=2, out=3, r=1, v=1, rv=0, zero=1)
    assert (table["id"]["y_error"].judged, table["id"]["y_error"].cases) == (0, 2)  # lost in the first judged frame
    x = found["x_error"].values
    cells = [x[1:3].mean(), x[3:6].mean(), x[3], x[5], torch.nan, x[4]]
    assert phyworld_row(table, "x_error") == ", ".join(f"{float(cell):.4f}" for cell in cells)


def test_colliding_discs_at_the_boundary_radius_are_left_out():
    true = simulate("collision", "id", range(2), frames=16, size=32)
    true.state.radii[0, 1] = 0.5
    table = bucket_table(metric_trajectory(true, true, mode="compat"), true, mode="compat")
    assert table["id"]["post_velocity_error"].cases == 1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scenario=st.sampled_from(("parabola", "collision")), frames=st.integers(6, 9))
def test_any_frames_give_numbers_or_reasons_in_any_order(seed, scenario, frames):
    true = simulate(scenario, "ood", range(4), frames=frames, size=12, seed=seed)
    noise = torch.randint(0, 256, true.frames.shape, generator=torch.Generator().manual_seed(seed)).byte()
    made = replace(true, frames=torch.cat([damage(true, seed).frames[:3], noise[3:]]), state=None)
    before = made.frames.clone()
    found = metric_trajectory(made, true, mode="compat")  # Scores refuses a NaN without a reason
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    other = metric_trajectory(made[order], true[order], mode="compat")
    for name, score in found.items():
        torch.testing.assert_close(score.values[order], other[name].values, rtol=0, atol=0, equal_nan=True)
        assert not score.values.isinf().any(), name
    assert torch.equal(made.frames, before)
