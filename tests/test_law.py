"""What a law leaves unexplained: by hand for motions that break it by a known amount, at the floor for lawful ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from discs import clip_of, one_disc
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.config import SIMULATED
from physnb.data import FRAME_STEP_S, Clip, DiscState, simulate
from physnb.data.laws import GRAVITY, LAWS, Motion
from physnb.data.scenery import render_scene
from physnb.metrics import metric_trajectory
from physnb.metrics.law import law_table, metric_law, predict_frames, state_residual

PARSING = 0.01  # units/s, what reading a disc of uniform motion off its pixels costs
REASON = "no disc is seen in three frames in a row"


def shown(state: DiscState, scenario: str = "uniform") -> Clip:
    return replace(clip_of(state, scenario), parameters=({"radius": 1.0, "speed": 3.0},) * len(state.radii))


def residual(generated: Clip, true: Clip, **settings) -> torch.Tensor:
    return metric_law(generated, true, **settings)["law_residual"].values


STATE = one_disc(speed=3.0, x=4.0)
TRUE = shown(STATE)


def bent(frame: int, speed: float = -3.0) -> DiscState:
    """The disc of STATE with another speed from one frame on."""
    positions, velocities = STATE.positions.clone(), STATE.velocities.clone()
    positions[0, frame:, 0, 0] = positions[0, frame, 0, 0] + speed * FRAME_STEP_S * torch.arange(16 - frame)
    velocities[0, frame:, 0, 0] = speed
    return replace(STATE, positions=positions, velocities=velocities)


# --- of true motion


def test_a_true_motion_has_no_residual_and_a_broken_one_that_of_its_break():
    assert state_residual("uniform", TRUE.parameters, STATE).shape == (1, 15)
    assert state_residual("uniform", TRUE.parameters, STATE).max() < 1e-4
    turned = state_residual("uniform", TRUE.parameters, bent(8))[0]
    assert turned.argmax() == 7 and turned[7] == pytest.approx(6, abs=1e-4)  # |v' - v_law|, from frame 7 to frame 8
    assert turned[[*range(7), *range(8, 15)]].max() < 1e-4
    moved = STATE.positions.clone()
    moved[0, 8:, 0] += torch.tensor([0.3, 0.4])
    jumped = state_residual("uniform", TRUE.parameters, replace(STATE, positions=moved))[0]
    assert jumped[7] == pytest.approx(0.5 / FRAME_STEP_S, abs=1e-4) and jumped[[6, 8]].max() < 1e-4


def test_a_disc_that_is_gone_is_not_a_number_but_one_that_never_was_is_nothing():
    gone = STATE.positions.clone()
    gone[0, 10:, 0] = torch.nan
    found = state_residual("uniform", TRUE.parameters, replace(STATE, positions=gone))[0]
    assert found[:9].max() < 1e-4 and found[9:].isnan().all()  # the second disc of STATE is absent throughout


def test_the_law_moves_every_frame_a_frame_on():
    clip = simulate("collision", "id", range(3), frames=16, size=16)
    position, velocity = predict_frames("collision", clip.parameters, clip.state.positions, clip.state.velocities)
    assert position.shape == velocity.shape == (3, 16, 2, 2)
    torch.testing.assert_close(position[:, :-1].float(), clip.state.positions[:, 1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(velocity[:, :-1].float(), clip.state.velocities[:, 1:], rtol=0, atol=1e-4)


# --- of frames


def test_the_true_clip_is_at_its_floor():
    assert residual(TRUE, TRUE) < PARSING
    for scenario in ("parabola", "pendulum", "drag"):
        true = simulate(scenario, "id", range(4), frames=16, size=64)
        assert (residual(true, true) < 0.06).all(), scenario


@pytest.mark.parametrize("frame", [3, 8, 14])
@pytest.mark.parametrize("speed", [-3.0, 0.0])
def test_a_kink_costs_half_its_change_of_velocity_in_one_step_of_thirteen(frame, speed):
    # from the mean of the velocities before and after, the next frame is off by half the change, over 0.1 s once
    found = residual(shown(bent(frame, speed)), TRUE)
    assert float(found) == pytest.approx(abs(speed - 3.0) / 2 / 13, abs=PARSING)


@pytest.mark.parametrize(("frame", "kinks"), [(1, 0), (2, 1)])
def test_judging_begins_with_the_step_from_the_last_start_frame(frame, kinks):
    assert float(residual(shown(bent(frame, 0.0)), TRUE)) == pytest.approx(kinks * 1.5 / 13, abs=PARSING)
    every = residual(shown(bent(1, 0.0)), TRUE, frames_given=1)
    assert float(every) == pytest.approx(1.5 / 14, abs=PARSING)


def test_a_disc_without_gravity_misses_half_a_step_of_it():
    found = residual(shown(STATE, "parabola"), shown(STATE, "parabola"))  # x+ - x_law = g dt^2 / 2 in every step
    assert float(found) == pytest.approx(GRAVITY * FRAME_STEP_S / 2, abs=PARSING)


def test_another_uniform_motion_is_lawful_too():
    other = shown(one_disc(speed=1.5, x=3.0, y=6.0))
    assert residual(other, TRUE) < PARSING
    assert metric_trajectory(other, TRUE)["position_error"].values > 1  # though it is not the true one


@pytest.mark.parametrize("scenario", ["pendulum", "spring", "parabola"])
def test_another_path_of_the_same_law_is_at_the_floor(scenario):
    true = simulate(scenario, "id", range(4), frames=16, size=64)
    p = {name: np.array([row[name] for row in true.parameters]) for name in true.parameters[0]}
    motion = Motion(*(part[:, 0].double().numpy() for part in (true.state.positions, true.state.velocities)))
    path = [Motion(motion.position, 0.5 * motion.velocity)]  # the same place and parameters, half as fast
    for _ in range(15):
        path.append(LAWS[scenario](path[-1], p, FRAME_STEP_S))
    positions, velocities = (torch.from_numpy(np.stack(part, 1)).float() for part in zip(*path, strict=True))
    state = replace(true.state, positions=positions, velocities=velocities)
    frames = render_scene(scenario, true.parameters, state, 64) if scenario != "parabola" else clip_of(state).frames
    other = replace(true, frames=frames)
    assert metric_trajectory(other, true)["position_error"].values.mean() > 0.2
    assert (residual(other, true) < residual(true, true) + 0.03).all()


def test_discs_that_are_not_seen_are_not_judged():
    white = replace(TRUE, frames=torch.full_like(TRUE.frames, 255))
    assert metric_law(white, TRUE)["law_residual"].reasons == (REASON,) and residual(white, TRUE).isnan().all()
    flickering = TRUE.frames.clone()
    flickering[:, 2::2] = 255  # never three frames in a row
    assert metric_law(replace(TRUE, frames=flickering), TRUE)["law_residual"].reasons == (REASON,)
    some = TRUE.frames.clone()
    some[:, 10:] = 255
    assert residual(replace(TRUE, frames=some), TRUE) < PARSING  # missing_rate tells of the rest
    outside = shown(one_disc(speed=0.0, x=-3.0))
    assert residual(TRUE, outside).isnan().all()


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(8)))
def test_scenarios_mix_in_any_order_and_nothing_is_changed(order):
    true = Clip.concatenate([simulate(name, "id", range(2), frames=8, size=16) for name in SIMULATED[:8:2]])
    made = replace(true, frames=true.frames.roll(1, 0))
    before = made.frames.clone(), true.state.positions.clone()
    found = metric_law(made, true)["law_residual"]
    shuffled = metric_law(made[order], true[order])["law_residual"]
    torch.testing.assert_close(shuffled.values, found.values[order], equal_nan=True)
    assert found.reasons == tuple(REASON if nan else None for nan in found.values.isnan())
    assert torch.equal(made.frames, before[0])
    torch.testing.assert_close(true.state.positions, before[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("generated", "true", "message"),
    [
        (TRUE, replace(TRUE, state=None), "take the true clip from a simulator"),
        (TRUE, replace(TRUE, parameters=({},)), "a law needs the clips' parameters"),
        (TRUE, TRUE[:0], "do not match"),
        (replace(TRUE, fps=8.0), TRUE, "10 frames/s; generated clips have 8"),
        (replace(TRUE, frames=TRUE.frames[:, :8]), TRUE, "do not match"),
        (*(replace(TRUE, scenarios=("videos",)),) * 2, "unknown scenario with a law 'videos'"),
    ],
)
def test_clips_that_cannot_be_judged_are_named(generated, true, message):
    with pytest.raises(ValueError, match=message):
        metric_law(generated, true)


@pytest.mark.parametrize("given_", [0, 14])
def test_start_frames_must_leave_something_to_judge(given_):
    with pytest.raises(ValueError, match=r"frames given must be in \[1, 13\]"):
        metric_law(TRUE, TRUE, frames_given=given_)


def test_no_clips_are_no_numbers():
    assert metric_law(TRUE[:0], TRUE[:0])["law_residual"].values.shape == (0,)


# --- the table


def test_a_row_a_scenario_with_the_lawful_far_below_the_unlawful():
    rows = law_table(("uniform", "collision", "orbit"), clips=3, size=16)
    assert [row["scenario"] for row in rows] == ["uniform", "collision", "orbit"]
    for row in rows:
        assert 0 <= row["lawful"] < 1e-4 and row["unlawful"] > 0.1 and 0 < row["floor"] < 1
    true = simulate("orbit", "id", range(3), frames=16, size=16)
    assert rows[2]["lawful"] == pytest.approx(float(state_residual("orbit", true.parameters, true.state).max()))
    assert rows[2]["floor"] == pytest.approx(float(residual(true, true).nanmean()))
    assert law_table((), clips=3) == []


def test_bad_tables_and_scenarios_are_named():
    with pytest.raises(ValueError, match="unknown scenario 'smoke'"):
        law_table(("smoke",), clips=2)
    with pytest.raises(ValueError, match="clip indices must be given"):
        law_table(("uniform",), clips=0)
    with pytest.raises(ValueError, match="unknown scenario 'templates'"):
        state_residual("templates", TRUE.parameters, STATE)
