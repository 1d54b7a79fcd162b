"""Trajectory metrics: discs are found by colour in every frame and compared with the simulator's true motion.

`clean` is what results use. `compat` follows phyworld's evaluate.py (Kang et al. 2024) with its conventions: pixel i at
i / W, hard colour masks, a lost disc put on the wall, velocities averaged before the absolute value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from physnb.config import choose, require
from physnb.data import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.worlds import frame_times
from physnb.metrics.scores import Scores, scores

MODES = ("clean", "compat")
PRESENT_AREA = 0.25  # a disc with less than this share of its true area counts as missing
TRACKING_CAP = 5.0  # world units: an absent disc counts as this far off in tracking_error, and no disc as further
MIN_FIT_FRAMES = 3  # frames that a fitted velocity needs


@dataclass(frozen=True)
class ParsedDiscs:
    """What colour says about each frame: centre (world units, y up; NaN where nothing is seen) and area (units^2)."""

    positions: Float[Tensor, "batch time disc axis"]
    areas: Float[Tensor, "batch time disc"]

    @property
    def radii(self) -> Float[Tensor, "batch time disc"]:
        return (self.areas / torch.pi).sqrt()


def disc_shades(frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch time disc height width"]:
    """How much of each pixel is red (disc 0) or blue (disc 1), in [0, 1].

    A colour's excess over the other two channels, with 10 % cut from either end so that faint noise counts nothing.
    """
    red, green, blue = frames.float().div(255).unbind(-1)
    excess = torch.stack([red - torch.maximum(green, blue), blue - torch.maximum(red, green)], dim=2)
    return ((excess - 0.1) / 0.8).clamp(0, 1)


def parse_discs(frames: UInt8[Tensor, "batch time height width 3"]) -> ParsedDiscs:
    """Sub-pixel centres and areas of the red and the blue disc: shade-weighted moments, pixel i at (i + 1/2) / W."""
    shade = disc_shades(frames)
    height, width = shade.shape[-2:]
    column = (torch.arange(width) + 0.5) / width * WORLD_SIZE
    row = WORLD_SIZE - (torch.arange(height) + 0.5) / height * WORLD_SIZE
    total = shade.sum((-1, -2))
    x, y = (shade.sum(-2) * column).sum(-1) / total, (shade.sum(-1) * row).sum(-1) / total  # 0 / 0 is NaN: not seen
    return ParsedDiscs(torch.stack([x, y], -1), total * (WORLD_SIZE / height) * (WORLD_SIZE / width))


def fitted_slope(
    times: Float[Tensor, " time"], values: Float[Tensor, "batch time disc axis"], use: Bool[Tensor, "batch time disc"]
) -> Float[Tensor, "batch disc axis"]:
    """Least-squares slope of values over time where `use`, per second; NaN with fewer than MIN_FIT_FRAMES frames.

    Linear in the values, so the slope of an error is the error of the slope.
    """
    weight = use.double()
    count = weight.sum(1)
    centred = times.double()[None, :, None] - ((weight * times[None, :, None]).sum(1) / count)[:, None]
    values = torch.where(use[..., None], values, 0.0).double()
    slope = ((weight * centred)[..., None] * values).sum(1) / (weight * centred.square()).sum(1)[..., None]
    return torch.where((count >= MIN_FIT_FRAMES)[..., None], slope, torch.nan).float()


def _masked_mean(values: Tensor, use: Tensor) -> Float[Tensor, " batch"]:
    """Mean over all but the first dimension where `use`; NaN where nothing is."""
    dims = tuple(range(1, values.ndim))
    return torch.where(use, values, 0.0).sum(dims) / use.sum(dims)


def check_pair(generated: Clip, true: Clip, frames_given: int) -> DiscState:
    """The true state, after refusing clips that do not belong together."""
    require(true.state is not None, "trajectory metrics need the true state; take the true clip from a simulator")
    require(
        generated.frames.shape == true.frames.shape and generated.scenarios == true.scenarios,
        f"generated {tuple(generated.frames.shape)} and true {tuple(true.frames.shape)} clips do not match",
    )
    time = true.frames.shape[1]
    require(
        1 <= frames_given <= time - MIN_FIT_FRAMES,
        f"frames given must be in [1, {time - MIN_FIT_FRAMES}] to judge a trajectory, got {frames_given}",
    )
    return true.state


def metric_trajectory(generated: Clip, true: Clip, *, frames_given: int = 3, mode: str = "clean") -> dict[str, Scores]:
    """Scores of each clip by name; all are better when lower. Judged where the true disc is wholly inside the box.

    clean:
    position_error (world units): mean distance to the true centre over generated frames in which the disc is there.
    velocity_error (units/s): length of the slope fitted to the position error, from the last start frame on; for
        collisions the mean over discs and over the stretches before and after impact that have 3 frames.
    missing_rate: share of judged discs whose area is under a quarter of the true one.
    tracking_error (world units): position error in which a missing disc counts as 5 units: the hunt's objective.
    radius_drift (world units): largest minus smallest radius seen.
    momentum_error, energy_error (shares): of a collision, after impact, against the true total of |m v| and m v^2.

    compat: x_error, y_error, x_velocity_error (mean absolute, frame by frame) and velocity_error (phyworld's headline).

    Raises ValueError for clips that do not match, lack a true state, or leave too few frames.
    Leaves out frames in which the true disc touches a wall, and everything about looks but colour.
    """
    state = check_pair(generated, true, frames_given)
    choose("mode", mode, MODES)
    if mode == "compat":
        return _compat(generated, state, frames_given)
    parsed = parse_discs(generated.frames)
    true_area = torch.pi * state.radii[:, None] ** 2
    seen = parsed.areas >= PRESENT_AREA * true_area
    anchored = state.inside.clone()
    anchored[:, : frames_given - 1] = False
    judged = anchored.clone()
    judged[:, frames_given - 1] = False

    offset = parsed.positions - state.positions
    distance = offset.norm(dim=-1)
    missing = _masked_mean((~seen).float(), judged)
    tracking = _masked_mean(torch.where(seen, distance.clamp(max=TRACKING_CAP), TRACKING_CAP), judged)
    low, high = (torch.where(judged & seen, parsed.radii, fill) for fill in (torch.inf, -torch.inf))
    drift = (high.amax(1) - low.amin(1)).nan_to_num(neginf=torch.nan)
    velocity, momentum, energy = _fitted_errors(offset, state, anchored & seen)
    no_frame = "no generated frame has the true disc inside the box"
    unseen = "the disc is missing in every judged frame"
    no_fit = f"no stretch of motion shows the disc in {MIN_FIT_FRAMES} frames"
    no_impact = "no impact, or a disc is not seen for long enough after it"
    return {
        "position_error": scores("position_error", "units", _masked_mean(distance, judged & seen), unseen),
        "velocity_error": scores("velocity_error", "units/s", velocity, no_fit),
        "missing_rate": scores("missing_rate", "share", missing, no_frame),
        "tracking_error": scores("tracking_error", "units", tracking, no_frame),
        "radius_drift": scores("radius_drift", "units", _masked_mean(drift, ~drift.isnan()), unseen),
        "momentum_error": scores("momentum_error", "share", momentum, no_impact),
        "energy_error": scores("energy_error", "share", energy, no_impact),
    }


def _fitted_errors(
    offset: Float[Tensor, "batch time disc axis"], state: DiscState, use: Bool[Tensor, "batch time disc"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity, momentum and energy error of each clip, from slopes fitted before and after impact."""
    times = torch.from_numpy(frame_times(offset.shape[1])).float()
    impact = state.impact_time_s.nan_to_num(torch.inf)[:, None, None]
    before = fitted_slope(times, offset, use & (times[:, None] < impact))
    after = fitted_slope(times, offset, use & (times[:, None] >= impact))
    sizes = torch.stack([before.norm(dim=-1), after.norm(dim=-1)], dim=1)  # [batch, stretch, disc]
    velocity = _masked_mean(sizes, ~sizes.isnan())

    mass = state.radii**2
    true = state.velocities[:, -1, :, 0]
    found = true + after[..., 0]  # x velocity after impact; NaN without an impact or a fit
    momentum = (mass * (found - true)).sum(1).abs() / (mass * true.abs()).sum(1)
    energy = (mass * (found**2 - true**2)).sum(1).abs() / (mass * true**2).sum(1)
    return velocity, momentum, energy


def _compat(generated: Clip, state: DiscState, frames_given: int) -> dict[str, Scores]:
    """phyworld's evaluate.py: `evaluate_xy` for one disc, the velocity part of its collision routine for two."""
    frames = generated.frames
    width = frames.shape[-2]
    high, low = frames > 127, frames < 127
    masks = (high[..., 0] & low[..., 1] & low[..., 2], low[..., 0] & low[..., 1] & high[..., 2])
    grid = torch.arange(width, dtype=torch.float64) / width * WORLD_SIZE
    inside = state.inside[:, :, 0].clone()
    two = state.present[:, 1]
    walls = (state.positions[:, :, 0, 0] >= state.radii[:, None, 0]) & (
        state.positions[:, :, 1, 0] <= WORLD_SIZE - state.radii[:, None, 1]
    )
    inside[two] = walls[two]
    rows = {name: [] for name in ("x_error", "y_error", "x_velocity_error", "velocity_error")}
    for clip in range(len(frames)):
        keep = [i for i in range(frames_given, frames.shape[1]) if inside[clip, i]]
        discs = range(2 if two[clip] else 1)
        found = [_compat_positions(masks[disc][clip].flip(1), grid, disc, bool(two[clip])) for disc in discs]
        if len(keep) < 2:
            for values in rows.values():
                values.append(torch.nan)
            continue
        truth = [state.positions[clip, :, disc].double() for disc in discs]
        error = torch.stack([(found[d] - truth[d])[keep].abs().mean(0) for d in discs])  # [disc, axis]
        speed = torch.stack([found[d][keep, 0].diff() / FRAME_STEP_S for d in discs])  # [disc, interval]
        true_speed = torch.stack([truth[d][keep, 0].diff() / FRAME_STEP_S for d in discs])
        rows["x_error"].append(float(error[:, 0].mean()))
        rows["y_error"].append(float(error[:, 1].mean()))
        rows["x_velocity_error"].append(float((speed - true_speed).abs().mean()))
        rows["velocity_error"].append(_compat_velocity_error(speed, true_speed, float(state.velocities[clip, 0, 0, 0])))
    units = dict(x_error="units", y_error="units", x_velocity_error="units/s", velocity_error="units/s")
    reason = "fewer than two frames with the true disc inside the box, or the disc was never seen"
    return {name: scores(name, units[name], torch.tensor(values), reason) for name, values in rows.items()}


def _compat_positions(mask: Bool[Tensor, "time height width"], grid: Tensor, disc: int, two: bool) -> Tensor:
    """Centres [time, axis]; a lost disc is put on the wall (collision: its own) and keeps its last height."""
    wall = 0.0 if two and disc == 0 else WORLD_SIZE
    centres, height = [], torch.nan
    for frame in mask:
        rows, columns = frame.nonzero(as_tuple=True)
        if len(rows) == 0:
            centres.append((wall, height))
            continue
        height = float(grid[rows].mean())
        centres.append((float(grid[columns].mean()), height))
    return torch.tensor(centres, dtype=torch.float64)


def _compat_velocity_error(speed: Tensor, true_speed: Tensor, first_speed: float) -> float:
    """One disc: |mean v - v_0|. Two: mean over discs of |mean v - mean true v|, averaged over before and after impact.

    The impact is the first interval in which a true velocity changes by more than 0.1; that interval is dropped.
    """
    if len(speed) == 1:
        return float((speed.mean() - first_speed).abs())
    jumps = ((true_speed[:, 1:] - true_speed[:, :-1]).abs() > 0.1).any(0).nonzero()
    impact = int(jumps[0]) + 1 if len(jumps) else speed.shape[1]
    stretches = [slice(0, impact), slice(impact + 1, None)]
    errors = [(speed[:, s].mean(1) - true_speed[:, s].mean(1)).abs().mean() for s in stretches if speed[:, s].shape[1]]
    return float(torch.stack(errors).mean())
