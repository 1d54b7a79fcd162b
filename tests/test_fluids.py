import sys
import warnings
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import CAPTIONS, WORLD_SIZE, Clip, fluids, unlawful_fluids
from physnb.data.fluids import (
    CELL,
    GRID,
    GROUP,
    MODES,
    SETTINGS,
    FluidSource,
    compiled_step,
    draw_density,
    draw_fluid,
    flow_frames,
    inlet_rate,
    parameter_columns,
    pixel_weights,
    simulate_fluid,
    time_of_gain,
    transport,
)
from physnb.data.sources import Mixture
from physnb.data.unlawful_fluids import UNLAWFUL, make_unlawful_fluid

STILL = {f"draught_{m}{n}": 0.0 for m, n in MODES} | dict(flicker=0.0, flicker_hz=2.0, flicker_phase=0.0, cooling=0.0)
SMOKE = STILL | dict(inlet_x=5.0, inlet_y=0.8, inlet_radius=0.6, inflow=2.0, buoyancy=8.0)
FLAME = SMOKE | dict(inflow=12.0, inlet_radius=1.0, buoyancy=15.0, cooling=5.0)
TRIALS = {
    "smoke": SMOKE,
    "lighter": SMOKE | dict(buoyancy=16.0),
    "weightless": SMOKE | dict(buoyancy=0.0),
    "draughty": SMOKE | dict(draught_11=3.0, draught_23=-1.0, inlet_x=3.5),
    "flame": FLAME,
    "more fuel": FLAME | dict(inflow=24.0),
    "flickering": FLAME | dict(flicker=0.9, flicker_phase=1.0, draught_12=2.0),
}
STEPS = 24


@pytest.fixture(scope="module")
def flows():
    """flows[name] is the flow of one of TRIALS after every step: density, across, up, each [time, ...]."""
    rows = [*TRIALS.values(), *[SMOKE] * (GROUP - len(TRIALS))]
    found = list(islice(flow_frames(rows), STEPS))
    fields = {name: torch.stack([getattr(flow, name) for flow in found], 1) for name in ("density", "across", "up")}
    return {trial: {name: field[k] for name, field in fields.items()} for k, trial in enumerate(TRIALS)}


@pytest.fixture(scope="module", autouse=True)
def young():
    """Clips that begin soon after the inlet opens: quick to compute. The laws' tests have the full warm-up."""
    with pytest.MonkeyPatch.context() as patch:
        for name, fluid in SETTINGS.items():
            patch.setitem(SETTINGS, name, replace(fluid, warm_up=6))
        yield


@pytest.fixture(scope="module")
def smoke() -> Clip:
    return simulate_fluid("smoke", "ood", [3, 2, 5], frames=12, size=32, seed=4)


def totals(flow) -> torch.Tensor:
    return flow["density"].sum((1, 2)) * CELL**2


def centre_height(flow) -> torch.Tensor:
    height = (torch.arange(GRID).double() + 0.5) * CELL
    return (flow["density"].sum(1) * height).sum(1) / flow["density"].sum((1, 2))


@pytest.mark.parametrize("trial", TRIALS)
def test_velocity_is_free_of_divergence_and_does_not_pass_the_walls(flows, trial):
    across = torch.nn.functional.pad(flows[trial]["across"], (0, 0, 1, 1))  # nothing through the walls
    up = torch.nn.functional.pad(flows[trial]["up"], (1, 1))
    divergence = (across.diff(dim=1) + up.diff(dim=2)) / CELL
    assert divergence.abs().max() < 1e-11  # 1/s, of speeds up to 10 units/s over 0.3 units


@pytest.mark.parametrize("trial", TRIALS)
def test_mass_is_what_came_in_less_what_cooled(flows, trial):
    p, total, expected = TRIALS[trial], totals(flows[trial]), torch.zeros(STEPS).double()
    kept, gain_s = (
        np.exp(-p["cooling"] * 0.1),
        0.1 if p["cooling"] == 0 else -np.expm1(-p["cooling"] * 0.1) / p["cooling"],
    )
    before = 0.0
    for step in range(STEPS):
        swing = 1 + p["flicker"] * np.sin(2 * np.pi * p["flicker_hz"] * 0.1 * step + p["flicker_phase"])
        before = expected[step] = before * kept + p["inflow"] * swing * gain_s
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    assert flows[trial]["density"].min() >= 0


def test_buoyancy_accelerates_in_proportion_while_the_flow_is_slow(flows):
    rise = {trial: centre_height(flows[trial]) - 0.8 for trial in ("smoke", "lighter", "weightless")}
    still = rise["weightless"]  # the floor cuts the inlet, so its centre is a little above 0.8
    assert still.std() < 1e-12 and flows["weightless"]["up"].abs().max() == 0
    early = (rise["lighter"] - still)[2:5] / (rise["smoke"] - still)[2:5]
    torch.testing.assert_close(early, torch.full_like(early, 2.0), rtol=0.03, atol=0)
    assert rise["lighter"][-1] > 1.3 * rise["smoke"][-1]


def test_flame_is_higher_with_more_fuel_and_ends_below_the_ceiling(flows):
    def height(trial):
        seen = flows[trial]["density"][-1].amax(0) > 0.1
        return (int(seen.nonzero().max()) + 1) * CELL

    assert 2 < height("flame") < height("more fuel") - 0.5
    assert height("more fuel") < WORLD_SIZE


def test_flow_without_a_draught_is_its_own_mirror_image(flows):
    density = flows["flame"]["density"]
    torch.testing.assert_close(density, density.flip(1), rtol=0, atol=1e-10)
    draughty = flows["draughty"]["density"][-1]
    assert (draughty - draughty.flip(0)).abs().max() > 0.1


def test_projection_is_the_one_of_phiflow():
    from phi import math
    from phi.field import StaggeredGrid
    from phi.geom import Box
    from phi.physics import advect, fluid
    from phiml.backend.torch import TORCH

    generator = torch.Generator().manual_seed(0)
    across, up = (
        torch.randn(GROUP, *shape, generator=generator).double() for shape in ((GRID - 1, GRID), (GRID, GRID - 1))
    )
    density = torch.zeros(GROUP, GRID, GRID).double()
    ours = compiled_step()(density, across, up, torch.zeros(GROUP).double())
    with TORCH, math.precision(64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y = (math.wrap(tensor[0], math.spatial("x,y")) for tensor in (across, up))
        box = dict(x=GRID, y=GRID, bounds=Box(x=WORLD_SIZE, y=WORLD_SIZE))
        velocity = StaggeredGrid(math.stack({"x": x, "y": y}, math.dual("vector")), 0, **box)
        there = advect.semi_lagrangian(velocity, velocity, 0.1)
        velocity = there + (velocity - advect.semi_lagrangian(there, velocity, -0.1)) / 2
        theirs, _ = fluid.make_incompressible(velocity, (), math.Solve("scipy-direct", 1e-9, 1e-9))
        for mine, axis in zip(ours, ("x", "y"), strict=True):
            torch.testing.assert_close(mine[0], theirs.vector[axis].values.native("x,y"), rtol=0, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), speed=st.floats(0.1, 10))
def test_transport_conserves_and_makes_no_extremes(seed, speed):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.zeros(2, GRID + 1, GRID + 1).double()
    stream[:, 1:-1, 1:-1] = torch.randn(2, GRID - 1, GRID - 1, generator=generator)
    across, up = stream.diff(dim=2)[:, 1:-1], -stream.diff(dim=1)[:, :, 1:-1]  # no divergence, nothing through walls
    across, up = (v * speed / max(across.abs().max(), up.abs().max()) for v in (across, up))
    density = torch.rand(2, GRID, GRID, generator=generator).double().clamp(max=0.5)
    before = density.clone()
    carried = transport(density, across, up, CELL / speed / 4)
    assert torch.equal(density, before)
    torch.testing.assert_close(carried.sum((1, 2)), before.sum((1, 2)), rtol=1e-12, atol=0)
    assert carried.min() >= before.min() - 1e-9 and carried.max() <= before.max() + 1e-9


def test_inlet_gives_its_inflow_and_swings_as_it_should():
    column = parameter_columns([TRIALS["flickering"]])
    rate = [float(inlet_rate(column, step).sum()) * CELL**2 for step in range(50)]
    assert np.mean(rate) == pytest.approx(12.0)  # 10 whole periods of 0.5 s
    np.testing.assert_allclose(rate[5:], rate[:-5])
    assert 1.7 * 12 < max(rate) <= 1.9 * 12 and 0 < min(rate) < 0.3 * 12
    assert float(time_of_gain(torch.tensor(1e-7), 0.1)) == pytest.approx(0.1, rel=1e-6)
    assert float(time_of_gain(torch.tensor(0.0), 0.1)) == pytest.approx(0.1)


@pytest.mark.parametrize("phenomenon", SETTINGS)
def test_ranges_bucket_by_bucket(phenomenon):
    parameters, buckets = draw_fluid(phenomenon, "ood", 0, np.arange(600))
    rows = {name: np.array([p[name] for p in parameters]) for name in parameters[0]}
    for name, ranges, out in (
        ("inlet_radius", SETTINGS[phenomenon].radius, ("r", "rv")),
        ("buoyancy", SETTINGS[phenomenon].buoyancy, ("v", "rv")),
    ):
        outside = np.isin(buckets, out)
        inner, (low, high) = rows[name][~outside], (ranges.low, ranges.high)
        assert ranges.inner[0] <= inner.min() < inner.max() <= ranges.inner[1] and np.ptp(inner) > 0.9 * np.ptp(
            ranges.inner
        )
        value = rows[name][outside]
        is_low, is_high = ((a <= value) & (value <= b) for a, b in (low, high))
        assert (is_low | is_high).all() and is_low.any() and is_high.any()
    assert {*draw_fluid(phenomenon, "train", 0, np.arange(50))[1]} == {"id"}
    assert (rows["cooling"] > 0).all() == (phenomenon == "flame")
    one, _ = draw_fluid(phenomenon, "ood", 0, np.array([77]))
    assert one[0] == parameters[77] and parameter_columns(one).keys() == one[0].keys()


@pytest.mark.parametrize("phenomenon", SETTINGS)
def test_palette_can_be_read_back(phenomenon):
    fluid = SETTINGS[phenomenon]
    shares, colours = (np.array(part) for part in zip(*fluid.palette, strict=True))
    assert (np.diff(shares) > 0).all() and shares[0] == 0 and shares[-1] == 1 and (colours[0] == 1).all()
    assert (np.diff(colours @ fluid.weights) < 0).all()


@pytest.mark.parametrize("size", [8, 16, 33, 64, 100])
def test_frames_of_every_size_hold_the_same_density_upright(size):
    weights = pixel_weights(size)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights.sum(0), size / GRID)
    density = torch.zeros(1, 1, GRID, GRID).double()
    density[0, 0, 4, 26] = 2.0  # left and high up
    shade = 255 - draw_density(density, "smoke", size)[0, 0, :, :, 0].int()
    row, column = divmod(int(shade.argmax()), size)
    assert (
        abs((column + 0.5) / size - 4.5 / GRID) <= 1 / size and abs((row + 0.5) / size - (1 - 26.5 / GRID)) <= 1 / size
    )


@pytest.mark.parametrize("phenomenon", SETTINGS)
def test_clip_is_the_same_in_any_batch(phenomenon):
    request = dict(frames=3, size=16, seed=4)
    clips = simulate_fluid(phenomenon, "ood", [3, 17, 5], **request)
    alone = simulate_fluid(phenomenon, "ood", [17], **request)
    assert torch.equal(alone.frames, clips[1:2].frames) and alone.parameters == clips[1:2].parameters
    other = simulate_fluid(phenomenon, "ood", [17], **(request | dict(seed=5)))
    assert (other.frames != alone.frames).any()


def test_clip_says_what_it_shows(smoke):
    assert smoke.indices.tolist() == [3, 2, 5] and smoke.captions == (CAPTIONS["smoke"],) * 3
    assert smoke.scenarios == ("smoke",) * 3 and set(smoke.buckets) <= {"r", "v", "rv"} and smoke.state is None
    assert (smoke.frames[:, :, 0, 0] == 255).all() and smoke.frames[:, 0].min() < 200  # white ground, a plume at once
    assert (smoke.frames[0, 0] != smoke.frames[1, 0]).any()
    assert all(word.isalpha() and word.islower() for name in SETTINGS for word in CAPTIONS[name].split())


def source(tmp_path, **change) -> FluidSource:
    return FluidSource("smoke", **(dict(frames=3, size=8, cache=tmp_path, count=20) | change))


def test_source_computes_each_group_once_and_reads_it_after_that(tmp_path, monkeypatch):
    first = source(tmp_path)
    garbage = first.folder / ".000000.npy.1.part"  # of a killed process
    garbage.parent.mkdir(parents=True)
    garbage.write_bytes(b"half")
    made = first.clips(np.array([18, 1, 18]))
    assert sorted(path.name for path in first.folder.glob("0*")) == ["000000.npy", "000001.npy"]
    simulated = simulate_fluid("smoke", "train", [18, 1, 18], frames=3, size=8)
    assert torch.equal(made.frames, simulated.frames) and made.parameters == simulated.parameters
    monkeypatch.setattr(fluids, "simulate_group", None)  # a second run does not simulate
    again = source(tmp_path).clips(np.array([18, 1, 18]))
    assert torch.equal(again.frames, made.frames)
    examples = Mixture((source(tmp_path),), (1.0,), seed=3).examples(range(20))
    assert sorted(examples.indices.tolist()) == list(range(20))

    shard = first.folder / "000001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"000001\.npy is damaged"):
        first.clips(np.array([17]))
    np.save(shard, np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"000001\.npy does not hold frames"):
        first.clips(np.array([17]))


def test_cache_is_the_users_by_default_and_apart_for_other_clips(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert source(None).folder.is_relative_to(tmp_path / "xdg" / "physnb" / "fluids")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source(None).folder.is_relative_to(tmp_path / ".cache" / "physnb" / "fluids")
    others = [dict(seed=1), dict(split="id"), dict(frames=4), dict(size=16), {}]
    assert len({source(tmp_path, **change).folder for change in others}) == len(others)
    assert source(tmp_path, count=3).folder == source(tmp_path).folder  # the same clips, fewer of them


def test_unwritable_cache_is_named(read_only_folder, monkeypatch):
    monkeypatch.setattr(fluids, "simulate_group", lambda *_: torch.zeros(GROUP, 3, 8, 8, 3).byte())
    with pytest.raises(ValueError, match="cannot be written"):
        source(read_only_folder).clips(np.array([0]))


@pytest.fixture(scope="module")
def variants(smoke):
    return {kind: make_unlawful_fluid(smoke, kind, frames_given=3, seed=1) for kind in UNLAWFUL}


@pytest.mark.parametrize("kind", UNLAWFUL)
def test_variant_keeps_the_start_and_says_what_changed(smoke, variants, kind):
    made = variants[kind]
    assert made.kind == kind and made.frames_given == 3
    assert torch.equal(made.clip.frames[:, :3], smoke.frames[:, :3])
    changed = (made.clip.frames != smoke.frames).flatten(1).any(1).tolist()
    assert changed == [reason is None for reason in made.reasons] and any(changed)
    assert made.area_ratio.isnan().tolist() == [not c for c in changed]


@pytest.mark.parametrize("kind", ["teleport", "vanish"])
def test_variant_depends_on_its_clip_alone(smoke, variants, kind):
    alone = make_unlawful_fluid(smoke[[2]], kind, frames_given=3, seed=1)
    assert torch.equal(alone.clip.frames[0], variants[kind].clip.frames[2])


def test_what_each_kind_does(smoke, variants):
    frames = {kind: made.clip.frames[0] for kind, made in variants.items()}
    assert torch.equal(frames["time_reversal"][3:], smoke.frames[0, 3:].flip(0))
    assert variants["vanish"].area_ratio[0] < 0.9 and variants["teleport"].matched[0]

    def first_changed(kind):
        return int((frames[kind] != smoke.frames[0]).flatten(1).any(1).int().argmax())

    side = 6 if smoke.parameters[0]["inlet_x"] < 5 else -6  # 2 units of 32 / 10 pixels
    moment = first_changed("teleport")
    assert torch.equal(frames["teleport"][moment:], smoke.frames[0, moment:].roll(side, 2))
    moment = first_changed("frozen")
    assert (frames["frozen"][moment:] == smoke.frames[0, moment - 1]).all()
    height = torch.arange(32, 0, -1).double()[:, None]
    low, true = ((255.0 - f[-1, ..., 0]) for f in (frames["sinking"], smoke.frames[0]))
    assert (low * height).sum() / low.sum() < (true * height).sum() / true.sum() - 1
    assert first_changed("sinking") in (3, 4)


def test_variants_of_a_slow_flow_are_not_judged(monkeypatch, smoke):
    monkeypatch.setattr(unlawful_fluids, "VISIBLE_CHANGE", 10.0)
    made = make_unlawful_fluid(smoke, "frozen")
    assert torch.equal(made.clip.frames, smoke.frames) and made.area_ratio.isnan().all()
    assert made.reasons == ("too little of the fluid moves for it to show",) * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(phenomenon="steam"), "unknown fluid 'steam'; choose one of smoke, flame"),
        (dict(split="test"), "unknown split 'test'"),
        (dict(numbers=[]), "numbers must be given and not be negative"),
        (dict(numbers=[-1]), "numbers must be given and not be negative"),
        (dict(frames=1), "at least 2 frames, got 1"),
        (dict(size=7), "at least 8 pixels, got 7"),
        (dict(seed=-1), "seed must not be negative, got -1"),
    ],
)
def test_bad_request_is_named(change, message):
    request = dict(phenomenon="smoke", split="id", numbers=[0], frames=4, size=8) | change
    names = [request.pop(name) for name in ("phenomenon", "split", "numbers")]
    with pytest.raises(ValueError, match=message):
        simulate_fluid(*names, **request)


def test_bad_source_and_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least 1 clip, got 0"):
        source(tmp_path, count=0)
    with pytest.raises(ValueError, match="unknown fluid 'steam'"):
        FluidSource("steam", frames=3, size=8)
    for numbers in ([20], [-1], []):
        with pytest.raises(ValueError, match=r"lie in \[0, 20\)"):
            source(tmp_path).clips(np.array(numbers))


def test_missing_phiflow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "phi", None)
    with pytest.raises(ValueError, match=r"need PhiFlow .*pip install"):
        compiled_step.__wrapped__()


def test_flow_too_fast_for_the_solver_is_refused():
    with pytest.raises(ValueError, match="cells in a substep"):
        next(flow_frames([SMOKE | dict(draught_33=300.0)] * GROUP))
    with pytest.raises(ValueError, match="16 clips are computed together, got 1"):
        next(flow_frames([SMOKE]))


def test_variants_of_what_cannot_be_broken_are_refused(smoke):
    with pytest.raises(ValueError, match="unknown kind 'boiling'"):
        make_unlawful_fluid(smoke, "boiling")
    with pytest.raises(ValueError, match=r"frames given must be in \[1, 10\], got 11"):
        make_unlawful_fluid(smoke, "frozen", frames_given=11)
    with pytest.raises(ValueError, match="no clip to break"):
        make_unlawful_fluid(smoke[0:0], "frozen")
    with pytest.raises(ValueError, match="laws of fluids, not uniform"):
        make_unlawful_fluid(replace(smoke, scenarios=("smoke", "uniform", "smoke")), "frozen")
    for kind in ("teleport", "sinking"):
        with pytest.raises(ValueError, match=r"lacks its inlet_x.*from the simulator"):
            make_unlawful_fluid(replace(smoke, parameters=()), kind)
    with pytest.raises(ValueError, match="must show the flow of its own parameters"):
        make_unlawful_fluid(replace(smoke, frames=smoke.frames.flip(3)), "sinking")
