"""The three phyworld worlds (Kang et al. 2024, arXiv 2411.02385): exact motion, rendered in batches.

Box of 10 x 10 world units, 0.1 s between frames, frame k at t = 0.1 k + 0.01 s, masses proportional to radius squared.
Where this differs from the published generator, and why:

- pixel map: pixel i is the square around (i + 1/2) / W, shaded by how much of it the disc covers, so that a clip of
  32 pixels still shows sub-pixel motion. Published: point samples at i / (W - 1), `edge="phyworld"` here.
- motion is analytic. Published: Box2D, whose semi-implicit Euler step adds 0.0125 t to a parabola's fall.
- collisions are elastic at every speed. Box2D ignores restitution below a closing speed of 1 unit/s.
- every clip has its own random numbers. Published: each chunk of 1000 repeats the same placements.
- clips shorter than 32 frames: a disc stays inside for min(24, frames) frames where the box allows it, and an impact
  comes after at least max(frames / 4, 4) frames and before the last quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from physnb.config import SCENARIOS, SPLITS, choose, require
from physnb.data.captions import CAPTIONS
from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.laws import GRAVITY, elastic_collision
from physnb.data.random import uniform_draws

FIRST_FRAME_S = 0.01  # phyworld records frame 0 after one physics step
VISIBLE_FRAMES = 24  # phyworld's NUM_MIN_FRAMES
MAX_ATTEMPTS = 200  # draws of a clip before giving up; the box rejects large fast pairs
EDGES = ("coverage", "phyworld")


@dataclass(frozen=True)
class Ranges:
    """In-distribution range and the two out-of-distribution sides of a quantity."""

    inner: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]


SPEED = Ranges((1.0, 4.0), (0.0, 0.8), (4.5, 6.0))  # world units / s
RADIUS = {  # world units
    "uniform": Ranges((0.7, 1.4), (0.3, 0.6), (1.5, 2.0)),
    "parabola": Ranges((0.7, 1.4), (0.3, 0.6), (1.5, 2.0)),
    "collision": Ranges((0.5, 1.5), (0.3, 0.4), (1.7, 2.0)),
}
OOD_BUCKETS = ("r", "v", "rv")


class Draws:
    """Uniform numbers of one scenario and split, by name: a function of (seed, name, index) alone."""

    def __init__(self, scenario: str, split: str, seed: int, indices: np.ndarray, attempt: int = 0):
        self.prefix, self.seed, self.indices = f"{scenario}/{split}/{attempt}/", seed, indices

    def uniform(self, name: str, low=0.0, high=1.0) -> np.ndarray:
        return uniform_draws(self.seed, self.prefix + name, self.indices, low, high)

    def quantity(self, name: str, ranges: Ranges, out: np.ndarray) -> np.ndarray:
        """Inside `ranges.inner`, or where `out` on either side of it, each side with chance 1/2."""
        unit, low_side = self.uniform(name), self.uniform(name + "/side") < 0.5
        bounds = np.where(out[:, None], np.where(low_side[:, None], ranges.low, ranges.high), ranges.inner)
        return bounds[:, 0] + (bounds[:, 1] - bounds[:, 0]) * unit


# Arrays by name, a row a clip, and which rows fit the box.
Attempt = Callable[[Draws, np.ndarray, int], tuple[dict[str, np.ndarray], np.ndarray]]


def draw_buckets(scenario: str, split: str, seed: int, indices: np.ndarray) -> np.ndarray:
    """Which quantity lies out of the training range: "id", or "r", "v", "rv" with equal chance out of distribution."""
    if split != "ood":
        return np.full(len(indices), "id")
    return np.array(OOD_BUCKETS)[Draws(scenario, split, seed, indices).uniform("bucket", 0, 3).astype(int)]


def frame_times(frames: int) -> np.ndarray:
    """Time of every frame in seconds, [frames]."""
    return FIRST_FRAME_S + FRAME_STEP_S * np.arange(frames)


def _one_disc(scenario: str, draws: Draws, bucket: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Uniform motion or a horizontal throw: the red disc alone, moving right."""
    radius = draws.quantity("radius", RADIUS[scenario], np.isin(bucket, ("r", "rv")))
    speed = draws.quantity("speed", SPEED, np.isin(bucket, ("v", "rv")))
    room = WORLD_SIZE - min(VISIBLE_FRAMES, frames) * FRAME_STEP_S * speed - radius
    x0 = np.where(
        room >= radius,
        draws.uniform("x", radius, np.maximum(room, radius)),
        draws.uniform("x", radius, radius + draws.uniform("x/narrow", 0, 0.5)),
    )
    falls = scenario == "parabola"
    y0 = draws.uniform("y", 8.5 - radius if falls else radius + 0.5, 9.5 - radius)

    t, gravity = frame_times(frames), GRAVITY if falls else 0.0
    positions = np.full((len(x0), frames, 2, 2), np.nan)
    velocities = positions.copy()
    positions[:, :, 0, 0] = x0[:, None] + speed[:, None] * t
    positions[:, :, 0, 1] = y0[:, None] - gravity / 2 * t**2
    velocities[:, :, 0, 0] = speed[:, None]
    velocities[:, :, 0, 1] = -gravity * t
    radii = np.stack([radius, np.full_like(radius, np.nan)], 1)
    return dict(positions=positions, velocities=velocities, radii=radii, impact_time_s=np.full_like(radius, np.nan))


def _two_discs(draws: Draws, bucket: np.ndarray, frames: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Red from the left meets blue from the right at one height; also, which draws the box can hold."""
    wide, fast = np.isin(bucket, ("r", "rv")), np.isin(bucket, ("v", "rv"))
    r1, r2 = (draws.quantity(f"radius{i}", RADIUS["collision"], wide) for i in (1, 2))
    v1, v2 = (draws.quantity(f"speed{i}", SPEED, fast) for i in (1, 2))
    before = max(-(-frames // 4), min(4, frames // 2)) * FRAME_STEP_S
    after = max(frames // 4, 1) * FRAME_STEP_S

    # The gap at the start decides the moment of impact; the box decides how wide the gap can be.
    latest = np.minimum((WORLD_SIZE - 2 * r1 - 2 * r2) / np.maximum(v1 + v2, 1e-9), frames * FRAME_STEP_S - after)
    impact = draws.uniform("impact", before, np.maximum(latest, before))
    left, right = 2 * r1 + v1 * impact, WORLD_SIZE - 2 * r2 - v2 * impact
    contact = draws.uniform("contact", left, np.maximum(right, left))
    widest = np.maximum(r1, r2)
    height = draws.uniform("y", widest + 0.5, 9.5 - widest)
    w1, w2 = elastic_collision(r1**2, r2**2, v1, -v2)
    fits = (latest >= before) & (right >= left)
    fits &= (contact - r1 + w1 * after >= r1) & (contact + r2 + w2 * after <= WORLD_SIZE - r2)

    since = frame_times(frames)[None] - impact[:, None]
    positions, velocities = np.empty((len(r1), frames, 2, 2)), np.zeros((len(r1), frames, 2, 2))
    for disc, (at, before_v, after_v) in enumerate(((contact - r1, v1, w1), (contact + r2, -v2, w2))):
        velocities[:, :, disc, 0] = np.where(since < 0, before_v[:, None], after_v[:, None])
        positions[:, :, disc, 0] = at[:, None] + velocities[:, :, disc, 0] * since
        positions[:, :, disc, 1] = height[:, None]
    state = dict(positions=positions, velocities=velocities, radii=np.stack([r1, r2], 1), impact_time_s=impact)
    return state, fits


def check_request(split: str, seed: int, frames: int) -> None:
    """Raise ValueError unless a simulator can be asked for clips like this."""
    choose("split", split, SPLITS)
    require(seed >= 0, f"seed must not be negative, got {seed}")
    require(frames >= 2, f"a clip needs at least 2 frames, got {frames}")


def draw_until_fits(
    scenario: str, split: str, seed: int, indices: np.ndarray, bucket: np.ndarray, frames: int, draw: Attempt
) -> dict[str, np.ndarray]:
    """What draw(draws, bucket, frames) gives of every clip in the first attempt that it says fits.

    Raises ValueError naming the clips for which none does.
    """
    kept, pending = None, np.arange(len(indices))
    for attempt in range(MAX_ATTEMPTS):
        drawn, fits = draw(Draws(scenario, split, seed, indices[pending], attempt), bucket[pending], frames)
        kept = drawn if kept is None else kept
        for name in kept:
            kept[name][pending[fits]] = drawn[name][fits]
        pending = pending[~fits]
        if len(pending) == 0:
            return kept
    raise ValueError(f"no {scenario} of {frames} frames fits the box for clips {indices[pending].tolist()}")


def sample_states(
    scenario: str, split: str, seed: int, indices: np.ndarray, frames: int
) -> tuple[DiscState, np.ndarray]:
    """True motion of the clips `indices` and their buckets; a function of (scenario, split, seed, index, frames)."""
    choose("scenario", scenario, SCENARIOS)
    check_request(split, seed, frames)
    require(len(indices) > 0 and np.min(indices) >= 0, "clip indices must be given and not be negative")
    bucket = draw_buckets(scenario, split, seed, indices)
    if scenario != "collision":
        state = _one_disc(scenario, Draws(scenario, split, seed, indices), bucket, frames)
    else:
        state = draw_until_fits(scenario, split, seed, indices, bucket, frames, _two_discs)
    return DiscState(**{name: torch.from_numpy(value).float() for name, value in state.items()}), bucket


def render(state: DiscState, size: int, edge: str = "coverage") -> UInt8[Tensor, "batch time height width 3"]:
    """Frames of `size` x `size` pixels, white ground, red disc 0 and blue disc 1, row 0 at the top.

    edge "coverage": pixel (i + 1/2) / W, shade = share of the pixel covered, from the edge's distance.
    edge "phyworld": pixel i / (W - 1), alpha = clip((r^2 - d^2) / (0.03 r^2), 0, 1), truncated to uint8 as published.
    """
    choose("edge", edge, EDGES)
    require(size >= 8, f"frame size must be at least 8 pixels, got {size}")
    batch, time = state.positions.shape[:2]
    canvas = np.full((batch * time, 3, size, size), 255, np.uint8)  # planes: a disc darkens two of the three
    pixel = WORLD_SIZE / (size if edge == "coverage" else size - 1)
    offset = 0.5 if edge == "coverage" else 0.0
    for disc in range(2):
        rows = np.flatnonzero(np.repeat(state.present[:, disc].numpy(), time))
        if len(rows) == 0:
            continue
        centre = state.positions[:, :, disc].reshape(-1, 2).numpy()[rows]
        centre = np.stack([centre[:, 0], WORLD_SIZE - centre[:, 1]], 1) / pixel - offset  # in pixels, y down
        radius = np.repeat(state.radii[:, disc].numpy(), time)[rows] / pixel
        # Only the square around the disc is drawn: the rest of the frame stays white.
        side = min(size, int(2 * radius.max()) + 4)
        corner = np.clip(np.round(centre - side / 2).astype(int), 0, size - side)
        squares = (corner[:, None, :] + np.arange(side)[:, None] - centre[:, None, :]).astype(np.float32) ** 2
        distance2 = squares[:, :, None, 1] + squares[:, None, :, 0]
        if edge == "coverage":
            shade = np.clip(radius[:, None, None].astype(np.float32) - np.sqrt(distance2) + 0.5, 0, 1)
            ground = np.rint(255 * (1 - shade)).astype(np.uint8)
        else:
            r2 = radius[:, None, None].astype(np.float32) ** 2
            ground = (255 * (1 - np.clip((r2 - distance2) / (0.03 * r2), 0, 1))).astype(np.uint8)
        dark = (1, 2) if disc == 0 else (0, 1)
        for row, patch, (x, y) in zip(rows, ground, corner, strict=True):
            for plane in dark:
                region = canvas[row, plane, y : y + side, x : x + side]
                np.minimum(region, patch, out=region)  # discs never overlap, so the darker one is the one that is there
    return torch.from_numpy(canvas.reshape(batch, time, 3, size, size)).permute(0, 1, 3, 4, 2)


def world_parameters(scenario: str, state: DiscState) -> tuple[dict[str, float], ...]:
    """Radii (world units) and speeds along x at the start (units/s) of each clip, by name."""
    names = ("",) if scenario != "collision" else ("_1", "_2")
    radii, speeds = state.radii.tolist(), state.velocities[:, 0, :, 0].abs().tolist()
    return tuple(
        {f"radius{end}": r for end, r in zip(names, radius, strict=False)}
        | {f"speed{end}": v for end, v in zip(names, speed, strict=False)}
        for radius, speed in zip(radii, speeds, strict=True)
    )


def simulate_world(
    scenario: str, split: str, indices, *, frames: int, size: int, seed: int = 0, edge: str = "coverage"
) -> Clip:
    """Clips number `indices` of a phyworld world, as `physnb.data.simulate` gives them."""
    indices = np.asarray(indices, dtype=np.int64)
    state, buckets = sample_states(scenario, split, seed, indices, frames)
    return Clip(
        frames=render(state, size, edge),
        captions=(CAPTIONS[scenario],) * len(indices),
        scenarios=(scenario,) * len(indices),
        buckets=tuple(buckets.tolist()),
        indices=torch.from_numpy(indices),
        state=state,
        parameters=world_parameters(scenario, state),
    )
