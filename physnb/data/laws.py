"""Laws of motion: for every simulated scenario, where its discs are and how fast, a time later.

A law is a flow: advance(motion, parameters, duration_s) -> motion. The simulator iterates it, a variant that breaks the
law continues by it, and `physnb.metrics.law` asks how much of a step between two frames it leaves unexplained. Absent
discs are NaN and stay so. World units, seconds, y up; gravity as in the worlds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

GRAVITY = 2.5  # world units / s^2, downward
DOWN = np.array([0.0, -GRAVITY])
STEPS_PER_S = 80  # of Runge and Kutta's method where there is no closed form: 1e-8 units a frame on the tightest orbit
MOST_BOUNCES = 12  # in one duration, after which what is left of a bounce is rest


class Motion(NamedTuple):
    """positions in world units, velocities in units/s."""

    position: Float[np.ndarray, "batch disc axis"]
    velocity: Float[np.ndarray, "batch disc axis"]


Parameters = Mapping[str, Float[np.ndarray, " batch"]]
Law = Callable[[Motion, Parameters, float], Motion]


def _column(values: np.ndarray) -> Float[np.ndarray, "batch 1 1"]:
    return values[:, None, None]


def integrate(
    acceleration: Callable[[np.ndarray, np.ndarray], np.ndarray], motion: Motion, duration_s: float
) -> Motion:
    """The motion under acceleration(position, velocity), by Runge and Kutta's classical method of fourth order."""
    steps = max(1, round(duration_s * STEPS_PER_S))
    h, (x, v) = duration_s / steps, motion
    for _ in range(steps):
        a1 = acceleration(x, v)
        v2 = v + h / 2 * a1
        a2 = acceleration(x + h / 2 * v, v2)
        v3 = v + h / 2 * a2
        a3 = acceleration(x + h / 2 * v2, v3)
        v4 = v + h * a3
        a4 = acceleration(x + h * v3, v4)
        x = x + h / 6 * (v + 2 * v2 + 2 * v3 + v4)
        v = v + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return Motion(x, v)


def _under(acceleration: np.ndarray, motion: Motion, duration_s) -> Motion:
    """Constant acceleration."""
    x, v = motion
    return Motion(x + v * duration_s + acceleration / 2 * duration_s**2, v + acceleration * duration_s)


def _oscillate(offset: np.ndarray, speed: np.ndarray, frequency: np.ndarray, duration_s: float):
    """Offset and speed of a harmonic motion, x'' = -omega^2 x, with omega in rad/s."""
    cos, sin = np.cos(frequency * duration_s), np.sin(frequency * duration_s)
    return offset * cos + speed / frequency * sin, speed * cos - offset * frequency * sin


def uniform(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """x'' = 0."""
    return _under(np.zeros(2), motion, duration_s)


def parabola(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """x'' = g."""
    return _under(DOWN, motion, duration_s)


def elastic_collision(mass_1, mass_2, velocity_1, velocity_2):
    """Velocities after a head-on elastic impact: momentum and kinetic energy are conserved."""
    centre = (mass_1 * velocity_1 + mass_2 * velocity_2) / (mass_1 + mass_2)
    return 2 * centre - velocity_1, 2 * centre - velocity_2


def collision(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """x'' = 0 but for one elastic impact along x, masses as radius squared."""
    x, v = motion
    gap = x[:, 1, 0] - x[:, 0, 0] - p["radius_1"] - p["radius_2"]
    closing = v[:, 0, 0] - v[:, 1, 0]
    impact = np.full(len(gap), np.inf)
    np.divide(np.maximum(gap, 0), closing, out=impact, where=closing > 0)
    hits = impact <= duration_s
    before = _column(np.where(hits, impact, duration_s))
    after_velocity = v.copy()
    pair = elastic_collision(p["radius_1"] ** 2, p["radius_2"] ** 2, v[:, 0, 0], v[:, 1, 0])
    after_velocity[:, :, 0] = np.where(hits[:, None], np.stack(pair, 1), v[:, :, 0])
    return Motion(x + v * before + after_velocity * (duration_s - before), after_velocity)


def pendulum(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """theta'' = -(g / L) sin theta, theta from straight down, on a stiff rod of `length` L about the pivot."""
    pivot = np.stack([p["pivot_x"], p["pivot_y"]], 1)[:, None]
    arm, length = motion.position - pivot, p["length"][:, None]
    angle = np.arctan2(arm[..., 0], -arm[..., 1])
    along = np.stack([np.cos(angle), np.sin(angle)], -1)
    spin = (motion.velocity * along).sum(-1) / length
    angle, spin = integrate(lambda a, _: -GRAVITY / length * np.sin(a), Motion(angle, spin), duration_s)
    out, along = np.stack([np.sin(angle), -np.cos(angle)], -1), np.stack([np.cos(angle), np.sin(angle)], -1)
    return Motion(pivot + length[..., None] * out, (length * spin)[..., None] * along)


def spring(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """x'' = -omega^2 (x - x_rest) along x, omega = sqrt(k / m) in rad/s."""
    x, v = motion.position.copy(), motion.velocity.copy()
    rest, frequency = p["rest_x"][:, None], p["frequency"][:, None]
    offset, v[..., 0] = _oscillate(x[..., 0] - rest, v[..., 0], frequency, duration_s)
    x[..., 0] = rest + offset
    return Motion(x, v)


def bounce(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """x'' = g above the floor; an impact turns the vertical velocity and keeps the share `restitution` of it."""
    x, v = motion
    lowest = _column(p["floor"] + p["radius"])[..., 0]
    left = np.full(x.shape[:2], duration_s)
    for _ in range(MOST_BOUNCES):
        height, speed = np.maximum(x[..., 1] - lowest, 0), v[..., 1]
        until = (speed + np.sqrt(speed**2 + 2 * GRAVITY * height)) / GRAVITY
        hits = until <= left
        x, v = _under(DOWN, Motion(x, v), np.where(hits, until, left)[..., None])
        left = np.where(hits, left - until, 0.0)
        x[..., 1] = np.where(hits, lowest, x[..., 1])
        v[..., 1] = np.where(hits, -p["restitution"][:, None] * v[..., 1], v[..., 1])
        if not left.any():
            break
    x[..., 0] += v[..., 0] * left  # at rest on the floor: it only glides
    v[..., 1] = np.where(left > 0, 0.0, v[..., 1])
    return Motion(x, v)


def drag(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """v' = g - c |v| v, with the `drag` coefficient c in 1/units: turbulent air."""
    c = _column(p["drag"])
    return integrate(lambda _, v: DOWN - c * np.linalg.norm(v, axis=-1, keepdims=True) * v, motion, duration_s)


def orbit(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """x'' = -GM (x - star) / |x - star|^3, `pull` GM in units^3/s^2."""
    star = np.stack([p["star_x"], p["star_y"]], 1)[:, None]

    def acceleration(x, _):
        away = x - star
        return -_column(p["pull"]) * away / np.linalg.norm(away, axis=-1, keepdims=True) ** 3

    return integrate(acceleration, motion, duration_s)


def rolling(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """A full disc that rolls without slipping: 2/3 g sin(slope) down the slope, the other third turns it."""
    down = np.stack([-np.cos(p["slope"]), -np.sin(p["slope"])], 1)[:, None]  # the slope rises to the right
    return _under(2 / 3 * GRAVITY * _column(np.sin(p["slope"])) * down, motion, duration_s)


def stack(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """Both discs fall with x'' = g, whatever their mass; each stops dead on what it lands on, floor or disc."""
    fallen, velocity = _under(DOWN, motion, duration_s)
    x, v = fallen.copy(), velocity.copy()
    bottom = p["floor"] + p["radius_2"]
    for disc, lowest in ((1, bottom), (0, None)):
        lowest = x[:, 1, 1] + p["radius_2"] + p["radius_1"] if lowest is None else lowest
        lands = x[:, disc, 1] <= lowest
        x[:, disc, 1] = np.where(lands, lowest, x[:, disc, 1])
        v[:, disc, 1] = np.where(lands, 0.0 if disc == 1 else v[:, 1, 1], v[:, disc, 1])
    return Motion(x, v)


def wave_frequency(wave_number, depth):
    """omega in rad/s of waves on water of a depth, omega^2 = g k tanh(k h): Airy's linear theory."""
    return np.sqrt(GRAVITY * wave_number * np.tanh(wave_number * depth))


def wave(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """A float on a passing wave: y'' = -omega^2 (y - depth), omega from `wave_frequency`; x stays."""
    x, v = motion.position.copy(), motion.velocity.copy()
    frequency = wave_frequency(p["wave_number"], p["depth"])[:, None]
    level = (p["depth"] + p["float_height"])[:, None]
    offset, v[..., 1] = _oscillate(x[..., 1] - level, v[..., 1], frequency, duration_s)
    x[..., 1] = level + offset
    x[..., 0] = x[..., 0] + v[..., 0] * duration_s
    return Motion(x, v)


def glide(motion: Motion, p: Parameters, duration_s: float) -> Motion:
    """v' = g + l |v| R v - (l / quality) |v| v: lift across the path and drag along it (Lanchester's phugoid).

    R turns by a right angle to the left; l = g / trim_speed^2, so that lift carries the weight at `trim_speed`;
    `quality` is lift over drag.
    """
    lift = _column(GRAVITY / p["trim_speed"] ** 2)
    loss = lift / _column(p["quality"])

    def acceleration(_, v):
        across = np.stack([-v[..., 1], v[..., 0]], -1)
        return DOWN + np.linalg.norm(v, axis=-1, keepdims=True) * (lift * across - loss * v)

    return integrate(acceleration, motion, duration_s)


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (uniform, parabola, collision, pendulum, spring, bounce, drag, orbit, rolling, stack, wave, glide)
}
