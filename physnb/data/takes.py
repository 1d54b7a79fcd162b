"""Second takes: the same simulated case with a slightly different start, as a repeated experiment would have.

A simulator has no natural variance, and Physics-IQ divides by it: with two equal takes 100 points would need an exact
copy. The spread chosen here is a hand's: 1 % of speed and half a pixel of a 32-pixel frame. Larger jitter makes the two
takes agree less and so inflates every score that is normalised by them: publish the variances beside such a score.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int

from physnb.config import SCENARIOS, choose, require
from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.laws import GRAVITY, elastic_collision
from physnb.data.random import uniform_draws
from physnb.data.worlds import frame_times, render

SPEED_JITTER = 0.01  # share of a disc's own speed
POSITION_JITTER = 0.5 * WORLD_SIZE / 32  # world units: half a pixel of a 32-pixel frame
STATE_TOLERANCE = 1e-3  # world units: what float32 states may be off the exact law


def second_take(
    clip: Clip,
    seed: int,
    *,
    speed_jitter: float = SPEED_JITTER,
    position_jitter: float = POSITION_JITTER,
    edge: str = "coverage",
) -> Clip:
    """The same cases simulated again from a jittered start; a clip's jitter is a function of (seed, index) alone.

    Each disc's start velocity is multiplied by 1 + U(-speed_jitter, speed_jitter). All discs of a clip are moved
    together by U(-position_jitter, position_jitter) world units along x and along y, less where a disc would start
    outside the box. Together, because half a pixel apart a collision would not be head-on, and the impact of a slow
    pair would move by seconds. Radii stay, and the motion that follows is exact: uniform, a throw, an elastic impact.

    Raises ValueError for clips without a true state, of another simulator, or whose state does not obey their law.
    """
    require(clip.state is not None, "a second take needs the true state; take the clip from a simulator")
    for scenario in sorted(set(clip.scenarios)):
        choose("scenario for a second take", scenario, SCENARIOS)
    require(seed >= 0, f"seed must not be negative, got {seed}")
    require(0 <= speed_jitter < 1, f"speed jitter must be a share in [0, 1), got {speed_jitter}")
    require(
        0 <= position_jitter < WORLD_SIZE,
        f"position jitter must be in [0, {WORLD_SIZE:g}) world units, got {position_jitter}",
    )
    frames, height, width = clip.frames.shape[1:4]
    require(height == width, f"the worlds are square, got frames of {width} x {height}")
    require(
        len(clip) > 0 and frames > 0 and clip.state.positions.shape[1] == frames,
        "a second take needs at least one clip, and a state for each of its frames",
    )
    require(clip.fps == 1 / FRAME_STEP_S, f"the worlds have {1 / FRAME_STEP_S:g} frames/s, got clips of {clip.fps:g}")

    gravity = GRAVITY * np.array([s == "parabola" for s in clip.scenarios], dtype=np.float64)
    start, velocity = _initial_state(clip.state, gravity)
    radii = clip.state.radii.double().numpy()
    unchanged = _exact_motion(start, velocity, radii, gravity, frames)
    near = torch.isclose(unchanged.positions, clip.state.positions, rtol=0, atol=STATE_TOLERANCE, equal_nan=True)
    wrong = torch.nonzero(~near.all((1, 2, 3)) | ~clip.state.present[:, 0]).flatten().tolist()
    require(not wrong, f"the state of clips {wrong} does not follow the law of their scenario")

    indices = clip.indices.numpy()
    draws = [uniform_draws(seed, f"second take/speed{disc}", indices, -speed_jitter, speed_jitter) for disc in range(2)]
    velocity = velocity * (1 + np.stack(draws, 1))[..., None]
    start = start + _shift(start, radii, seed, indices, position_jitter)[:, None]
    state = _exact_motion(start, velocity, radii, gravity, frames)
    return replace(clip, frames=render(state, height, edge), state=state)


def _initial_state(state: DiscState, gravity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities [batch, disc, axis] at t = 0, a hundredth of a second before frame 0."""
    time = frame_times(1)[0]
    velocity = state.velocities[:, 0].double().numpy().copy()
    velocity[..., 1] += gravity[:, None] * time
    start = state.positions[:, 0].double().numpy() - velocity * time
    start[..., 1] += gravity[:, None] / 2 * time**2
    return start, velocity


def _shift(
    start: Float[np.ndarray, "batch disc axis"],
    radii: np.ndarray,
    seed: int,
    indices: Int[np.ndarray, " batch"],
    limit: float,
) -> Float[np.ndarray, "batch axis"]:
    """How far each clip is moved; never so far that a disc which starts inside the box starts outside it."""
    room_low = np.nanmin(start - radii[..., None], axis=1)
    room_high = np.nanmin(WORLD_SIZE - radii[..., None] - start, axis=1)
    low, high = -np.clip(room_low, 0, limit), np.clip(room_high, 0, limit)
    streams = [f"second take/{axis}" for axis in "xy"]
    return np.stack([uniform_draws(seed, s, indices, low[:, i], high[:, i]) for i, s in enumerate(streams)], 1)


def _exact_motion(
    start: Float[np.ndarray, "batch disc axis"],
    velocity: Float[np.ndarray, "batch disc axis"],
    radii: Float[np.ndarray, "batch disc"],
    gravity: Float[np.ndarray, " batch"],
    frames: int,
) -> DiscState:
    """Motion from t = 0: free, and for two discs on one height elastic from the moment that they touch."""
    time = frame_times(frames)[:, None, None]
    positions = start[:, None] + velocity[:, None] * time
    velocities = np.broadcast_to(velocity[:, None], positions.shape).copy()
    positions[..., 1] -= gravity[:, None, None] / 2 * time[..., 0] ** 2
    velocities[..., 1] -= gravity[:, None, None] * time[..., 0]

    gap = start[:, 1, 0] - radii[:, 1] - start[:, 0, 0] - radii[:, 0]  # NaN where there is one disc
    closing = velocity[:, 0, 0] - velocity[:, 1, 0]
    impact = np.full(len(gap), np.nan)
    np.divide(gap, closing, out=impact, where=closing > 0)
    after = np.stack(elastic_collision(radii[:, 0] ** 2, radii[:, 1] ** 2, velocity[:, 0, 0], velocity[:, 1, 0]), 1)
    since = time[:, 0, 0] - impact[:, None]  # [batch, time]
    hit = since >= 0  # False where there is no impact
    for disc in range(2):
        contact = start[:, disc, 0] + velocity[:, disc, 0] * impact
        bounced = contact[:, None] + after[:, disc, None] * since
        positions[:, :, disc, 0] = np.where(hit, bounced, positions[:, :, disc, 0])
        velocities[:, :, disc, 0] = np.where(hit, after[:, disc, None], velocities[:, :, disc, 0])
    return DiscState(*(torch.from_numpy(a).float() for a in (positions, velocities, radii, impact)))
