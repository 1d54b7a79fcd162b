"""Nine phenomena of one or two discs: what is drawn at random, in and out of distribution, and where motion begins.

The laws are in `physnb.data.laws`, what else is in the picture in `physnb.data.scenery`. As in the worlds, "r" says
that a radius lies outside the ranges of training, "v" that `speed` does; everything else has one range. What a
phenomenon's `speed` is stands beside it below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from physnb.config import PHENOMENA, choose, require
from physnb.data.captions import CAPTIONS
from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.laws import LAWS, Law, Motion, Parameters, wave_frequency
from physnb.data.scenery import render_scene
from physnb.data.worlds import Draws, Ranges, check_request, draw_buckets, draw_until_fits

SEEN_FRAMES = 4  # first frames in which every disc must be wholly in the box
SEEN_SHARE = 0.6  # of all frames, in which it must

SMALL = Ranges((0.5, 0.9), (0.3, 0.4), (1.1, 1.4))
MEDIUM = Ranges((0.6, 1.1), (0.35, 0.5), (1.3, 1.6))
SLOW = Ranges((0.5, 2.5), (0.0, 0.3), (3.0, 4.5))
FAST = Ranges((2.0, 5.0), (0.5, 1.5), (5.5, 7.0))


@dataclass(frozen=True)
class Phenomenon:
    """radius, speed: their ranges. begin(draws, radius, speed): the motion of disc 0, and the parameters of the law."""

    radius: Ranges
    speed: Ranges
    begin: Callable[[Draws, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]

    def start(self, draws: Draws, bucket: np.ndarray) -> tuple[Motion, Parameters]:
        """Motion at frame 0 and the parameters of each clip, `radius` and `speed` among them."""
        radius = draws.quantity("radius", self.radius, np.isin(bucket, ("r", "rv")))
        speed = draws.quantity("speed", self.speed, np.isin(bucket, ("v", "rv")))
        position, velocity, parameters = self.begin(draws, radius, speed)
        if position.ndim == 2:  # one disc; the other is absent
            position, velocity = (np.stack([a, np.full_like(a, np.nan)], 1) for a in (position, velocity))
        return Motion(position, velocity), dict(radius=radius, speed=speed) | parameters


def _direction(draws: Draws) -> np.ndarray:
    return np.where(draws.uniform("direction") < 0.5, -1.0, 1.0)


def _swing(draws: Draws, radius, speed):
    """Speed: of the bob at the start, along its circle."""
    angle, length = draws.uniform("angle", -1.0, 1.0), draws.uniform("length", 3.5, 6.0)
    p = dict(pivot_x=draws.uniform("pivot_x", 4, 6), pivot_y=draws.uniform("pivot_y", 8, 9.5), length=length)
    out, along = (np.stack(pair, 1) for pair in ((np.sin(angle), -np.cos(angle)), (np.cos(angle), np.sin(angle))))
    position = np.stack([p["pivot_x"], p["pivot_y"]], 1) + length[:, None] * out
    return position, (_direction(draws) * speed)[:, None] * along, p


def _on_spring(draws: Draws, radius, speed):
    """Speed: at the start, towards the wall or away from it."""
    p = dict(rest_x=draws.uniform("rest_x", 4.5, 6.5), frequency=draws.uniform("frequency", 1.5, 4.0))
    x = p["rest_x"] + draws.uniform("offset", -1.5, 1.5)
    y = draws.uniform("y", 2.0, 7.0)
    return np.stack([x, y], 1), np.stack([_direction(draws) * speed, np.zeros_like(x)], 1), p


def _thrown_down(draws: Draws, radius, speed):
    """Speed: downward at the start."""
    floor = draws.uniform("floor", 0.5, 3.0)
    p = dict(floor=floor, restitution=draws.uniform("restitution", 0.6, 0.95))
    height, x = draws.uniform("height", 0.3, 3.5), draws.uniform("x", 2.0, 8.0)
    position = np.stack([x, np.minimum(floor + radius + height, 9.5 - radius)], 1)
    return position, np.stack([draws.uniform("sideways", -2, 2), -speed], 1), p


def _thrown(draws: Draws, radius, speed):
    """Speed: at the start, within 45 degrees of the horizontal."""
    angle, side = draws.uniform("angle", -0.3, 0.8), _direction(draws)
    x = np.where(side > 0, draws.uniform("x", 1.0, 4.0), draws.uniform("x", 6.0, 9.0))
    velocity = speed[:, None] * np.stack([side * np.cos(angle), np.sin(angle)], 1)
    return np.stack([x, draws.uniform("y", 4.0, 8.0)], 1), velocity, dict(drag=draws.uniform("drag", 0.2, 0.6))


def _round_a_star(draws: Draws, radius, speed):
    """Speed: across the line to the star, over that of a circular orbit."""
    p = dict(star_x=draws.uniform("star_x", 4.5, 5.5), star_y=draws.uniform("star_y", 4.5, 5.5))
    p["pull"] = draws.uniform("pull", 20.0, 60.0)
    distance, angle = draws.uniform("distance", 2.2, 3.4), draws.uniform("angle", 0, 2 * np.pi)
    out = np.stack([np.cos(angle), np.sin(angle)], 1)
    across = np.stack([-out[:, 1], out[:, 0]], 1) * (_direction(draws) * np.sqrt(p["pull"] / distance) * speed)[:, None]
    return np.stack([p["star_x"], p["star_y"]], 1) + distance[:, None] * out, across, p


def _on_a_slope(draws: Draws, radius, speed):
    """Speed: along the slope at the start, up or down."""
    slope, foot = draws.uniform("slope", 0.15, 0.6), draws.uniform("foot_y", 0.2, 1.5)
    x = draws.uniform("x", 2.0, 8.0)
    contact = np.stack([x, foot + x * np.tan(slope)], 1)
    position = contact + radius[:, None] * np.stack([-np.sin(slope), np.cos(slope)], 1)
    along = np.stack([np.cos(slope), np.sin(slope)], 1)
    return position, (_direction(draws) * speed)[:, None] * along, dict(slope=slope, foot_y=foot)


def _stacked(draws: Draws, radius, speed):
    """Speed: of both, downward at the start. The lower disc has a radius of its own, the gap may be none."""
    below = np.clip(radius * draws.uniform("ratio", 0.8, 1.25), 0.3, 2.0)
    p = dict(floor=draws.uniform("floor", 0.5, 2.0), radius_1=radius, radius_2=below)
    gap = np.maximum(draws.uniform("gap", -0.5, 1.0), 0.0)
    x, blue = draws.uniform("x", 2.0, 8.0), p["floor"] + below + draws.uniform("height", 0.5, 3.5)
    position = np.stack([np.stack([x, blue + below + gap + radius], 1), np.stack([x, blue], 1)], 1)
    velocity = np.broadcast_to(np.stack([np.zeros_like(speed), -speed], 1)[:, None], position.shape).copy()
    return position, velocity, p


def _afloat(draws: Draws, radius, speed):
    """Speed: the largest of the float, up and down: amplitude times frequency."""
    p = dict(depth=draws.uniform("depth", 3.0, 5.5), wave_number=draws.uniform("wave_number", 0.6, 2.0))
    frequency, x = wave_frequency(p["wave_number"], p["depth"]), draws.uniform("x", 2.0, 8.0)
    p["amplitude"], p["phase"] = speed / frequency, draws.uniform("phase", 0, 2 * np.pi)
    p["float_height"] = 0.3 * radius  # of the centre over the water
    angle = p["wave_number"] * x + p["phase"]
    position = np.stack([x, p["depth"] + p["float_height"] + p["amplitude"] * np.cos(angle)], 1)
    return position, np.stack([np.zeros_like(x), speed * np.sin(angle)], 1), p


def _aloft(draws: Draws, radius, speed):
    """Speed: the trim speed, at which lift carries the weight; the flight begins slower or faster."""
    p = dict(trim_speed=speed, quality=draws.uniform("quality", 6.0, 15.0))
    angle, pace = draws.uniform("angle", -0.4, 0.4), speed * draws.uniform("pace", 0.6, 1.4)
    position = np.stack([draws.uniform("x", 1.5, 3.0), draws.uniform("y", 3.5, 8.0)], 1)
    return position, pace[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), p


BEGINNINGS: dict[str, Phenomenon] = {
    "pendulum": Phenomenon(SMALL, Ranges((0.8, 3.0), (0.0, 0.4), (3.5, 5.0)), _swing),
    "spring": Phenomenon(SMALL, SLOW, _on_spring),
    "bounce": Phenomenon(MEDIUM, Ranges((1.0, 4.0), (0.0, 0.6), (4.5, 6.0)), _thrown_down),
    "drag": Phenomenon(MEDIUM, FAST, _thrown),
    "orbit": Phenomenon(SMALL, Ranges((0.85, 1.1), (0.65, 0.75), (1.18, 1.3)), _round_a_star),
    "rolling": Phenomenon(MEDIUM, SLOW, _on_a_slope),
    "stack": Phenomenon(SMALL, Ranges((0.3, 2.0), (0.0, 0.1), (2.5, 4.0)), _stacked),
    "wave": Phenomenon(SMALL, Ranges((0.4, 1.2), (0.05, 0.2), (1.5, 2.2)), _afloat),
    "glide": Phenomenon(SMALL, Ranges((2.0, 4.0), (1.2, 1.6), (4.5, 6.0)), _aloft),
}


def follow(law: Law, motion: Motion, parameters: Parameters, frames: int, step_s: float = FRAME_STEP_S) -> Motion:
    """The motion at every frame from its first on, [batch, time, disc, axis] each."""
    steps = [motion]
    for _ in range(frames - 1):
        steps.append(law(steps[-1], parameters, step_s))
    return Motion(*(np.stack(parts, 1) for parts in zip(*steps, strict=True)))


def _radii(parameters: Parameters, scenario: str) -> np.ndarray:
    second = parameters["radius_2"] if scenario == "stack" else np.full_like(parameters["radius"], np.nan)
    return np.stack([parameters["radius"], second], 1)


def sample_phenomenon(
    scenario: str, split: str, seed: int, indices: np.ndarray, frames: int
) -> tuple[DiscState, tuple[dict[str, float], ...], np.ndarray]:
    """True motion, parameters and buckets of clips; a function of (scenario, split, seed, index, frames).

    Starts are drawn again until every disc is wholly in the box in the first frames and in most of all.
    Raises ValueError for unknown names, bad numbers, and a clip that the box cannot hold.
    """
    choose("phenomenon", scenario, PHENOMENA)
    check_request(split, seed, frames)
    require(len(indices) > 0 and np.min(indices) >= 0, "clip indices must be given and not be negative")
    bucket = draw_buckets(scenario, split, seed, indices)

    def attempt(draws: Draws, bucket: np.ndarray, frames: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        start, parameters = BEGINNINGS[scenario].start(draws, bucket)
        path = follow(LAWS[scenario], start, parameters, frames)
        drawn = dict(positions=path.position, velocities=path.velocity, radii=_radii(parameters, scenario)) | parameters
        return drawn, _in_view(scenario, drawn)

    kept = draw_until_fits(scenario, split, seed, indices, bucket, frames, attempt)
    arrays = {name: kept.pop(name) for name in ("positions", "velocities", "radii")}
    state = {name: torch.from_numpy(value).float() for name, value in arrays.items()}
    nothing = torch.full((len(indices),), torch.nan)
    rows = tuple({name: float(value[i]) for name, value in kept.items()} for i in range(len(indices)))
    return DiscState(**state, impact_time_s=nothing), rows, bucket


def _in_view(scenario: str, drawn: dict[str, np.ndarray]) -> np.ndarray:
    """Which draws keep their discs in the box, and off a star."""
    positions, reach = drawn["positions"], drawn["radii"][:, None, :, None]
    inside = ((positions >= reach) & (positions <= WORLD_SIZE - reach)).all(-1)
    inside |= np.isnan(reach[..., 0])
    first, most = inside[:, :SEEN_FRAMES].all((1, 2)), inside.all(2).mean(1) >= SEEN_SHARE
    if scenario != "orbit":
        return first & most
    star = np.stack([drawn["star_x"], drawn["star_y"]], 1)[:, None]
    near = np.linalg.norm(positions[:, :, 0] - star, axis=-1).min(1)
    return first & most & (near > drawn["radius"] + 0.7)


def simulate_phenomenon(scenario: str, split: str, indices, *, frames: int, size: int, seed: int = 0) -> Clip:
    """Clips number `indices` of a phenomenon, as `physnb.data.simulate` gives them."""
    indices = np.asarray(indices, dtype=np.int64)
    state, parameters, buckets = sample_phenomenon(scenario, split, seed, indices, frames)
    return Clip(
        frames=render_scene(scenario, parameters, state, size),
        captions=(CAPTIONS[scenario],) * len(indices),
        scenarios=(scenario,) * len(indices),
        buckets=tuple(buckets.tolist()),
        indices=torch.from_numpy(indices),
        state=state,
        parameters=parameters,
    )
