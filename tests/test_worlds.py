import numpy as np
import pytest
import torch

from physnb.config import SCENARIOS, SPLITS
from physnb.data import FRAME_STEP_S, WORLD_SIZE, Clip, render, simulate
from physnb.data.laws import GRAVITY
from physnb.data.worlds import FIRST_FRAME_S
from physnb.metrics import parse_discs

R_RANGES = {  # metrics.md, section 2.1 and 2.2
    "uniform": ((0.7, 1.4), ((0.3, 0.6), (1.5, 2.0))),
    "parabola": ((0.7, 1.4), ((0.3, 0.6), (1.5, 2.0))),
    "collision": ((0.5, 1.5), ((0.3, 0.4), (1.7, 2.0))),
}
V_RANGES = ((1.0, 4.0), ((0.0, 0.8), (4.5, 6.0)))


def assert_same_clips(one: Clip, other: Clip) -> None:
    assert torch.equal(one.frames, other.frames)
    for name, value in vars(one.state).items():
        assert torch.equal(value.nan_to_num(-1), getattr(other.state, name).nan_to_num(-1)), name
    assert (one.captions, one.scenarios, one.buckets) == (other.captions, other.scenarios, other.buckets)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("frames", "size"), [(8, 16), (16, 32), (32, 64)])
def test_clip_alone_is_the_clip_in_a_batch(scenario, split, frames, size):
    batch = simulate(scenario, split, range(24), frames=frames, size=size, seed=3)
    assert batch.frames.shape == (24, frames, size, size, 3)
    for i in (0, 7, 23):
        assert_same_clips(simulate(scenario, split, [i], frames=frames, size=size, seed=3), batch[i : i + 1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_seeds_and_splits_give_other_clips(scenario):
    def first_positions(split, seed):
        return simulate(scenario, split, range(8), frames=8, size=8, seed=seed).state.positions[:, 0, 0]

    train, test, other = first_positions("train", 0), first_positions("id", 0), first_positions("id", 1)
    assert (train != test).any(1).all() and (test != other).any(1).all()


def radii_and_speeds(scenario, split, clips=400, frames=16):
    clip = simulate(scenario, split, range(clips), frames=frames, size=8)
    radii, speeds = clip.state.radii.numpy(), clip.state.velocities[:, 0, :, 0].abs().numpy()
    return np.array(clip.buckets), radii, speeds  # [clip], [clip, disc], [clip, disc]; NaN for an absent disc


def within(values, ranges):
    values = values[~np.isnan(values)]
    tiny = 1e-5  # states are float32
    inside = [(values >= low - tiny) & (values <= high + tiny) for low, high in ranges]
    assert len(values) and np.any(inside, axis=0).all()
    # each range is used nearly to its ends
    for (low, high), used in zip(ranges, inside, strict=True):
        assert np.ptp(values[used]) > 0.6 * (high - low)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("split", ["train", "id"])
def test_in_distribution_ranges(scenario, split):
    buckets, radii, speeds = radii_and_speeds(scenario, split)
    assert set(buckets) == {"id"}
    within(radii, [R_RANGES[scenario][0]])
    within(speeds, [V_RANGES[0]])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_out_of_distribution_ranges_bucket_by_bucket(scenario):
    buckets, radii, speeds = radii_and_speeds(scenario, "ood", clips=900)
    (r_in, r_out), (v_in, v_out) = R_RANGES[scenario], V_RANGES
    for bucket, r_ranges, v_ranges in (("r", r_out, [v_in]), ("v", [r_in], v_out), ("rv", r_out, v_out)):
        rows = buckets == bucket
        assert rows.mean() == pytest.approx(1 / 3, abs=0.07)
        within(radii[rows], r_ranges)
        within(speeds[rows], v_ranges)


@pytest.mark.parametrize("frames", [8, 16, 32])
def test_uniform_motion_has_constant_velocity(frames):
    state = simulate("uniform", "id", range(50), frames=frames, size=8).state
    positions, velocities = state.positions[:, :, 0].double(), state.velocities[:, :, 0].double()
    assert (
        (velocities == velocities[:, :1]).all() and (velocities[..., 1] == 0).all() and (velocities[..., 0] > 0).all()
    )
    torch.testing.assert_close(positions.diff(dim=1) / FRAME_STEP_S, velocities[:, 1:], atol=3e-5, rtol=0)


@pytest.mark.parametrize("split", ["id", "ood"])
def test_parabola_falls_with_gravity(split):
    state = simulate("parabola", split, range(50), frames=16, size=8).state
    positions = state.positions[:, :, 0].double()
    second = positions.diff(n=2, dim=1)
    torch.testing.assert_close(
        second[..., 1], torch.full_like(second[..., 1], -GRAVITY * FRAME_STEP_S**2), atol=5e-6, rtol=0
    )
    torch.testing.assert_close(second[..., 0], torch.zeros_like(second[..., 0]), atol=5e-6, rtol=0)
    # thrown horizontally at t = 0, so frame 0, at 0.01 s, hardly falls yet
    torch.testing.assert_close(
        state.velocities[:, 0, 0, 1].double(), torch.full((50,), -GRAVITY * FIRST_FRAME_S).double()
    )


@pytest.mark.parametrize("split", ["id", "ood"])
@pytest.mark.parametrize("frames", [8, 16, 32])
def test_collision_conserves_momentum_and_energy(split, frames):
    state = simulate("collision", split, range(300), frames=frames, size=8).state
    mass, v = state.radii.double()[:, None] ** 2, state.velocities[..., 0].double()
    scale = (mass * v.abs()).sum(-1).amax(1)
    momentum, energy = (mass * v).sum(-1), (mass * v**2).sum(-1) / 2
    assert ((momentum - momentum[:, :1]).abs().amax(1) < 1e-5 * scale).all()
    torch.testing.assert_close(energy, energy[:, :1].expand_as(energy), atol=1e-6, rtol=1e-5)
    assert (state.velocities[..., 1] == 0).all()


@pytest.mark.parametrize("split", ["id", "ood"])
@pytest.mark.parametrize("frames", [8, 16, 32])
def test_discs_touch_and_never_overlap(split, frames):
    state = simulate("collision", split, range(600), frames=frames, size=8).state
    speeds = state.velocities[:, 0, :, 0].abs().sum(1)
    assert split == "id" or speeds.min() < 1.0  # Box2D's restitution fails below 1 unit/s; ours must not
    gap = (state.positions[:, :, 1] - state.positions[:, :, 0]).norm(dim=-1) - state.radii.sum(1)[:, None]
    assert gap.min() > -1e-5
    # a collision, not a bounce at a distance: at the moment of impact the gap closes to nothing
    times = FIRST_FRAME_S + FRAME_STEP_S * torch.arange(frames)
    closing = state.velocities[:, 0, 0, 0] - state.velocities[:, 0, 1, 0]
    at_impact = gap[:, 0] - closing * (state.impact_time_s - times[0])
    assert at_impact.abs().max() < 1e-4


@pytest.mark.parametrize("split", ["id", "ood"])
@pytest.mark.parametrize("frames", [8, 16, 32])
def test_impact_leaves_frames_to_see_before_and_after(split, frames):
    state = simulate("collision", split, range(300), frames=frames, size=8).state
    frame = (state.impact_time_s - FIRST_FRAME_S) / FRAME_STEP_S
    assert (frame > 3).all()  # frame 3 is the first that a model must predict, and still shows the approach
    assert (frame <= frames * 3 / 4).all()
    before, after = state.velocities[:, 2, :, 0], state.velocities[:, -1, :, 0]
    assert (before != after).any(1).all()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_disc_is_inside_the_box_at_the_start(scenario):
    state = simulate(scenario, "id", range(200), frames=16, size=8).state
    assert state.inside[:, 0][state.present].all()


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("size", [32, 64])
def test_coverage_render_shows_true_centre_and_area(scenario, size):
    clip = simulate(scenario, "id", range(40), frames=16, size=size)
    parsed, inside = parse_discs(clip.frames), clip.state.inside
    if scenario == "collision":  # discs that share a pixel at contact hide a little of each other
        gap = (clip.state.positions[:, :, 1] - clip.state.positions[:, :, 0]).norm(dim=-1) - clip.state.radii.sum(1)[
            :, None
        ]
        inside = inside & (gap > 2 * WORLD_SIZE / size)[..., None]
    offset = (parsed.positions - clip.state.positions).norm(dim=-1)[inside]
    assert offset.max() < 0.06 * WORLD_SIZE / size  # a sixteenth of a pixel
    area = torch.pi * clip.state.radii[:, None].square().expand_as(parsed.areas)
    torch.testing.assert_close(parsed.areas[inside], area[inside], rtol=0.06 * 32 / size, atol=0)


def test_disc_colours_and_ground():
    clip = simulate("collision", "id", [0], frames=8, size=64)
    frame, state = clip.frames[0, 0], clip.state[[0]]
    for disc, colour in enumerate(([255, 0, 0], [0, 0, 255])):
        x, y = state.positions[0, 0, disc].tolist()
        assert frame[int((1 - y / WORLD_SIZE) * 64), int(x / WORLD_SIZE * 64)].tolist() == colour
    assert frame[0, 0].tolist() == [255, 255, 255]


def draw_published(positions, radii, size):
    """One frame by the formula of metrics.md 2.1, every pixel in float64."""
    x, y = np.meshgrid(np.linspace(0, 1, size) * 10, np.linspace(0, 1, size) * 10)
    image = np.ones((size, size, 3))
    for (cx, cy), r, colour in zip(positions, radii, ([1, 0, 0], [0, 0, 1]), strict=True):
        if np.isnan(r):
            continue
        alpha = np.clip((r**2 - (x - cx) ** 2 - (y - cy) ** 2) / (0.03 * r**2), 0, 1)[..., None]
        image = image * (1 - alpha) + np.array(colour) * alpha
    return (255 * image).astype(np.uint8)[::-1]  # y is up in the world, row 0 is the top of the frame


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_phyworld_render_is_the_published_formula(scenario):
    clip = simulate(scenario, "id", range(2), frames=8, size=256, edge="phyworld")
    for i in range(2):
        for k in (0, 4, 7):
            positions, radii = clip.state.positions[i, k].double().numpy(), clip.state.radii[i].double().numpy()
            published = draw_published(positions, radii, 256)
            assert np.abs(clip.frames[i, k].numpy().astype(int) - published.astype(int)).max() <= 1


def test_disc_leaving_the_box_is_cut_off_not_wrapped():
    state = simulate("uniform", "id", [0], frames=2, size=8).state
    state.positions[0, :, 0] = torch.tensor([WORLD_SIZE, 5.0])
    frames = render(state, 32)
    assert (frames[0, 0, :, :16] == 255).all() and (frames[0, 0, :, -1] != 255).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scenario="pendulums"), "unknown scenario 'pendulums'; choose one of uniform, parabola, collision"),
        (dict(split="test"), "unknown split 'test'; choose one of train, id, ood"),
        (dict(edge="soft"), "unknown edge 'soft'; choose one of coverage, phyworld"),
        (dict(indices=[-1]), "indices must be given and not be negative"),
        (dict(indices=[]), "indices must be given and not be negative"),
        (dict(frames=1), "at least 2 frames, got 1"),
        (dict(size=4), "at least 8 pixels, got 4"),
        (dict(seed=-1), "seed must not be negative, got -1"),
    ],
)
def test_bad_request_is_named(change, message):
    request = dict(scenario="uniform", split="id", indices=[0], frames=8, size=16) | change
    with pytest.raises(ValueError, match=message):
        simulate(request.pop("scenario"), request.pop("split"), request.pop("indices"), **request)
