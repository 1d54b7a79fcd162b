"""Laws of motion against closed forms and conserved quantities."""

import numpy as np
import pytest
from scipy.special import ellipk

from physnb.config import SIMULATED
from physnb.data import laws
from physnb.data.laws import GRAVITY, LAWS, Motion
from physnb.data.phenomena import follow


def motion(x, v) -> Motion:
    """One clip with one disc."""
    return Motion(np.array([[x]], dtype=float), np.array([[v]], dtype=float))


def parameters(**values) -> dict[str, np.ndarray]:
    return {name: np.array([float(value)]) for name, value in values.items()}


def speed(m: Motion) -> float:
    return float(np.linalg.norm(m.velocity[0, 0]))


def test_every_simulated_scenario_has_a_law():
    assert tuple(LAWS) == SIMULATED


def test_half_a_period_of_a_wide_swing():
    length, angle = 4.0, 1.0
    p = parameters(pivot_x=5, pivot_y=9, length=length)
    start = motion([5 + length * np.sin(angle), 9 - length * np.cos(angle)], [0, 0])
    half_period = 2 * np.sqrt(length / GRAVITY) * ellipk(np.sin(angle / 2) ** 2)
    end = laws.pendulum(start, p, half_period)
    assert end.position[0, 0] == pytest.approx([5 - length * np.sin(angle), start.position[0, 0, 1]], abs=1e-6)
    assert speed(end) == pytest.approx(0, abs=1e-6)


def test_pendulum_keeps_energy_and_length():
    p = parameters(pivot_x=5, pivot_y=9, length=4)
    path = follow(laws.pendulum, motion([9, 9], [0, -1]), p, 40)
    x, v = path.position[0, :, 0], path.velocity[0, :, 0]
    assert np.linalg.norm(x - [5, 9], axis=1) == pytest.approx(4)
    assert (v**2).sum(1) / 2 + GRAVITY * x[:, 1] == pytest.approx(0.5 + GRAVITY * 9, abs=1e-5)


def test_spring_returns_after_its_period():
    p = parameters(rest_x=5, frequency=2)
    quarter, whole = (laws.spring(motion([6, 3], [0, 0]), p, t) for t in (np.pi / 4, np.pi))
    assert quarter.position[0, 0] == pytest.approx([5, 3]) and quarter.velocity[0, 0] == pytest.approx([-2, 0])
    assert whole.position[0, 0] == pytest.approx([6, 3])


def test_a_bounce_keeps_its_share_of_the_height():
    p = parameters(floor=1, radius=0.5, restitution=0.8)
    fall_time = np.sqrt(2 * 2.0 / GRAVITY)
    top = laws.bounce(motion([5, 3.5], [1, 0]), p, fall_time * 1.8)
    assert top.position[0, 0, 1] - 1.5 == pytest.approx(2.0 * 0.8**2)
    assert top.velocity[0, 0] == pytest.approx([1, 0], abs=1e-9)


def test_one_long_step_of_bounces_is_many_short_ones():
    p = parameters(floor=1, radius=0.5, restitution=0.7)
    many = follow(laws.bounce, motion([5, 3.5], [0.3, -2]), p, 41, 0.1)
    once = laws.bounce(motion([5, 3.5], [0.3, -2]), p, 4.0)
    assert many.position[0, -1, 0] == pytest.approx(once.position[0, 0], abs=1e-9)


def test_a_ball_at_rest_stays_on_the_floor():
    p = parameters(floor=1, radius=0.5, restitution=0.7)
    rest = laws.bounce(motion([5, 1.5], [0, 0]), p, 1.0)
    assert rest.position[0, 0] == pytest.approx([5, 1.5]) and speed(rest) == 0


def test_a_straight_fall_through_air_is_a_hyperbolic_tangent():
    terminal, time = np.sqrt(GRAVITY / 0.4), 1.3
    end = laws.drag(motion([5, 9], [0, 0]), parameters(drag=0.4), time)
    assert end.velocity[0, 0, 1] == pytest.approx(-terminal * np.tanh(GRAVITY * time / terminal), abs=1e-7)


def test_a_full_circle_takes_keplers_time():
    radius, pull = 3.0, 40.0
    period = 2 * np.pi * np.sqrt(radius**3 / pull)
    p = parameters(star_x=5, star_y=5, pull=pull)
    end = laws.orbit(motion([8, 5], [0, np.sqrt(pull / radius)]), p, period)
    assert end.position[0, 0] == pytest.approx([8, 5], abs=1e-5)


def test_an_ellipse_keeps_energy_and_angular_momentum():
    p = parameters(star_x=5, star_y=5, pull=40)
    path = follow(laws.orbit, motion([8, 5], [0, 2.8]), p, 60)
    x, v = path.position[0, :, 0] - 5, path.velocity[0, :, 0]
    energy = (v**2).sum(1) / 2 - 40 / np.linalg.norm(x, axis=1)
    assert energy == pytest.approx(energy[0], abs=1e-5)
    assert x[:, 0] * v[:, 1] - x[:, 1] * v[:, 0] == pytest.approx(3 * 2.8, abs=1e-5)


def test_rolling_keeps_the_energy_of_motion_and_of_turning():
    p = parameters(slope=0.4, foot_y=1)
    path = follow(laws.rolling, motion([7, 5], [np.cos(0.4), np.sin(0.4)]), p, 20)
    x, v = path.position[0, :, 0], path.velocity[0, :, 0]
    energy = (1 + 1 / 2) * (v**2).sum(1) / 2 + GRAVITY * x[:, 1]  # a full disc: I = m r^2 / 2
    assert energy == pytest.approx(energy[0])


def test_stacked_discs_fall_alike_and_land_on_each_other():
    p = parameters(floor=1, radius_1=0.4, radius_2=0.9)
    start = Motion(np.array([[[5, 5.5], [5, 4.0]]]), np.zeros((1, 2, 2)))
    path = follow(laws.stack, start, p, 30)
    red, blue = path.position[0, :, 0, 1], path.position[0, :, 1, 1]
    falling = blue > 1.9 + 1e-9
    assert (red - blue)[falling] == pytest.approx(1.5)
    assert (red[-1], blue[-1]) == pytest.approx((1.9 + 0.9 + 0.4, 1.9)) and not path.velocity[0, -1].any()


def test_deep_and_shallow_water_waves():
    deep, shallow = laws.wave_frequency(2.0, 50.0), laws.wave_frequency(0.01, 1.0)
    assert deep == pytest.approx(np.sqrt(GRAVITY * 2.0)) and shallow / 0.01 == pytest.approx(np.sqrt(GRAVITY), rel=1e-4)


def test_a_float_returns_with_the_wave():
    p = parameters(wave_number=1.2, depth=4, float_height=0.2)
    period = 2 * np.pi / laws.wave_frequency(1.2, 4.0)
    end = laws.wave(motion([5, 4.7], [0, 0.3]), p, period)
    assert end.position[0, 0] == pytest.approx([5, 4.7]) and end.velocity[0, 0] == pytest.approx([0, 0.3])


def test_gliding_without_drag_keeps_energy():
    p = parameters(trim_speed=3, quality=1e12)
    path = follow(laws.glide, motion([2, 5], [4, 0]), p, 30)
    energy = (path.velocity[0, :, 0] ** 2).sum(1) / 2 + GRAVITY * path.position[0, :, 0, 1]
    assert energy == pytest.approx(energy[0], abs=1e-6)


def test_a_trimmed_glide_is_a_straight_line_down():
    # Steady flight: lift and drag together carry the weight, tan(angle) = 1 / quality.
    angle, quality = np.arctan(1 / 10), 10
    pace = 3 * np.sqrt(np.cos(angle))
    end = laws.glide(
        motion([2, 5], [pace * np.cos(angle), -pace * np.sin(angle)]), parameters(trim_speed=3, quality=quality), 1
    )
    assert end.velocity[0, 0] == pytest.approx([pace * np.cos(angle), -pace * np.sin(angle)], abs=1e-9)


def test_a_collision_within_a_step_keeps_momentum_and_energy():
    p = parameters(radius_1=1.0, radius_2=0.5)
    start = Motion(np.array([[[3, 5], [4.6, 5]]], dtype=float), np.array([[[2, 0], [-1, 0]]], dtype=float))
    end = laws.collision(start, p, 0.1)
    mass = np.array([1.0, 0.25])
    for power in (1, 2):
        kept = (mass * end.velocity[0, :, 0] ** power).sum()
        assert kept == pytest.approx((mass * start.velocity[0, :, 0] ** power).sum())
    contact = (4.6 - 3 - 1.5) / 3
    assert end.position[0, 0, 0] == pytest.approx(3 + 2 * contact + end.velocity[0, 0, 0] * (0.1 - contact))
