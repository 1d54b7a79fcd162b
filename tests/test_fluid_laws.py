from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import Clip, simulate
from physnb.data.fluids import SETTINGS, draw_density, simulate_fluid
from physnb.data.unlawful_fluids import UNLAWFUL, make_unlawful_fluid
from physnb.metrics.fluid_laws import UNITS, metric_fluid_law, read_density, total_density

FLOOR = {"fluid_budget": 0.03, "fluid_transport": 0.001, "fluid_rise": 1e-6}  # of true clips at 32 pixels
BROKEN = {  # the law that a kind breaks, and by how much at least
    "time_reversal": ("fluid_rise", 0.1),
    "sinking": ("fluid_rise", 0.3),
    "vanish": ("fluid_rise", 0.3),
    "teleport": ("fluid_transport", 0.01),
    "frozen": ("fluid_budget", 0.1),
}


@pytest.fixture(scope="module")
def clips() -> dict[str, Clip]:
    return {name: simulate_fluid(name, "train", range(6), frames=11, size=32) for name in SETTINGS}


@pytest.mark.parametrize("phenomenon", SETTINGS)
def test_true_clips_are_at_the_floor(clips, phenomenon):
    found = metric_fluid_law(clips[phenomenon], clips[phenomenon])
    assert found.keys() == UNITS.keys()
    for name, score in found.items():
        assert score.reasons == (None,) * 6 and score.unit == UNITS[name]
        assert score.values.max() <= FLOOR[name], name


@pytest.mark.parametrize("kind", UNLAWFUL)
@pytest.mark.parametrize("phenomenon", SETTINGS)
def test_every_broken_law_shows(clips, phenomenon, kind):
    variants = make_unlawful_fluid(clips[phenomenon], kind)
    judged = [row for row, reason in enumerate(variants.reasons) if reason is None]
    assert len(judged) >= 3
    name, least = BROKEN[kind]
    found = metric_fluid_law(variants.clip, clips[phenomenon])
    assert least > 3 * FLOOR[name] and found[name].values[judged].min() > least
    if kind == "vanish":
        assert found["fluid_budget"].values[judged].min() > 0.03


def test_values_by_hand(clips):
    """Frames that stay blank lack a whole inflow; twice the density of frame 0 is a jump of that much."""
    true = clips["smoke"][[0]]
    blank = replace(true, frames=torch.full_like(true.frames, 255))
    found = metric_fluid_law(blank, true)
    assert float(found["fluid_budget"].values) == pytest.approx(1.0)  # nothing though one inflow a frame came in
    assert float(found["fluid_transport"].values) == 0.0 and float(found["fluid_rise"].values) > 0.5
    # all smoke gone a frame after the start: its whole mass, and an inflow in every step
    gone = replace(true, frames=torch.cat([true.frames[:, :3], blank.frames[:, 3:]], 1))
    mass = float(total_density(read_density(true.frames[0, 2:3], "smoke")))
    expected = 1 + mass / (true.parameters[0]["inflow"] * 0.1) / 8
    assert float(metric_fluid_law(gone, true)["fluid_budget"].values) == pytest.approx(expected, rel=1e-4)
    # a puff in a corner that no flow can have brought there
    frames = true.frames.clone()
    frames[:, 3:, :2, :2] = 128
    puff = float(total_density(read_density(frames[0, 3:4], "smoke") - read_density(true.frames[0, 3:4], "smoke")))
    jumped = metric_fluid_law(replace(true, frames=frames), true)["fluid_transport"].values
    assert float(jumped) == pytest.approx(puff / (true.parameters[0]["inflow"] * 0.1) / 8, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(density=st.floats(0, 2.0), phenomenon=st.sampled_from(list(SETTINGS)))
def test_density_is_read_back_to_8_bits(density, phenomenon):
    field = torch.full((1, 1, 32, 32), density).double()
    read = read_density(draw_density(field, phenomenon, 8), phenomenon)
    limit = {"smoke": 0.002, "flame": 0.0075}[phenomenon]
    assert (read - density).abs().max() <= limit * float(torch.tensor(density * SETTINGS[phenomenon].opacity).exp())


def test_saturated_and_foreign_colours_are_read_as_finite_densities():
    noise = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()
    for phenomenon in SETTINGS:
        assert read_density(noise, phenomenon).isfinite().all()
        assert (read_density(noise, phenomenon) >= 0).all()
    assert float(read_density(torch.zeros(1, 1, 3).byte(), "smoke").max()) == pytest.approx(6.234, abs=1e-3)
    with pytest.raises(ValueError, match="unknown fluid 'steam'"):
        read_density(noise, "steam")


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 2**31))
def test_values_do_not_depend_on_the_batch_and_are_never_silently_nan(clips, order, seed):
    true = Clip.concatenate([clips["smoke"][:2], clips["flame"][:2]])
    generator = torch.Generator().manual_seed(seed)
    noise = replace(true, frames=torch.randint(0, 256, true.frames.shape, generator=generator).byte())
    before = noise.frames.clone()
    found, moved = metric_fluid_law(noise, true), metric_fluid_law(noise[order], true[order])
    for name in UNITS:
        assert torch.equal(found[name].values[order], moved[name].values)
        assert found[name].values.isfinite().all() and found[name].values.min() > FLOOR[name]
    assert torch.equal(noise.frames, before)


def test_clips_of_no_fluid_are_not_judged(clips):
    disc = replace(simulate("uniform", "id", [0], frames=11, size=32), state=None)
    mixed = Clip.concatenate([clips["smoke"][:1], disc])
    for score in metric_fluid_law(mixed, mixed).values():
        assert score.values.isnan().tolist() == [False, True]
        assert score.reasons == (None, "neither smoke nor a flame")


def test_what_cannot_be_judged_is_refused(clips):
    true = clips["smoke"]
    for generated, truth, given_frames, message in (
        (true[:2], true, 3, "do not match"),
        (replace(true, scenarios=("flame",) * 6), true, 3, "do not match"),
        (replace(true, fps=8.0), true, 3, "fluids have 10 frames/s; generated clips have 8"),
        (true, replace(true, parameters=()), 3, "lacks its inlet_x"),
        (true, true, 11, r"frames given must be in \[1, 10\]"),
        (true, true, 0, r"frames given must be in \[1, 10\]"),
        (replace(true, frames=true.frames[..., :16, :]), replace(true, frames=true.frames[..., :16, :]), 3, "square"),
        (replace(true, frames=true.frames[:, :0]), replace(true, frames=true.frames[:, :0]), 3, "frames given"),
    ):
        with pytest.raises(ValueError, match=message):
            metric_fluid_law(generated, truth, frames_given=given_frames)
