"""phyworld's evaluator (Kang et al. 2024, phyworld/phyworld at ee0e473, id_ood_data/evaluate.py), faults included.

For parity with published numbers only; `clean` in `physnb.metrics.trajectory` is what results use. Its conventions:

- pixel i lies at i / W, although frames are drawn at i / (W - 1): everything is read low by the factor (W - 1) / W.
  y too is divided by the width, and counted from the bottom row.
- a pixel is red or blue or nothing (hard thresholds), and one pixel makes a disc.
- a disc that is not seen stands at the right wall (collision: each at its own wall) and keeps its last height and
  radius; before it was ever seen these are NaN, which makes the clip's y errors and `delta_r` NaN, and a bucket's mean
  then leaves the clip out: failures vanish.
- frames in which the true disc leaves the box are dropped first; "previous" and "next" mean the frames that are kept.
- of a collision only x is judged, and the frames kept are those with disc 0 off the left and disc 1 off the right wall.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from physnb.data import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.metrics.scores import Scores
from physnb.statistics import Estimate

IMPACT_CHANGE = 0.1  # units/s: the first change of a true velocity above this is the impact
RADIUS_FRAMES = 5  # kept frames over which a collision's `delta_r` is taken
SMALLEST_RADIUS = 0.6  # one disc: smaller ones are left out of the buckets
LARGEST_SKIPPED_RADIUS = 0.5  # collision: a clip with a disc of this radius or less is left out of the buckets
CHUNK_PIXELS = 2**17  # parsed at a time: few enough to stay in a processor's cache, many enough to be worth a call
BOTH, ONE_DISC, COLLISION = "both", "one disc", "collisions"
QUANTITIES = {  # name: unit, what phyworld reports it for
    "velocity_error": ("units/s", BOTH),
    "delta_r": ("units", BOTH),
    "x_error": ("units", ONE_DISC),
    "y_error": ("units", ONE_DISC),
    "x_velocity_error": ("units/s", ONE_DISC),
    "y_velocity_error": ("units/s", ONE_DISC),
} | {
    f"{when}_{name}": (unit, COLLISION)
    for name, unit in (
        ("velocity_error", "units/s"),
        ("x_error", "units"),
        ("x_velocity_error", "units/s"),
        ("momentum_error", "units^3/s"),
        ("energy_error", "units^4/s^2"),
    )
    for when in ("pre", "post")
}


def score_as_phyworld(
    frames: UInt8[Tensor, "batch time height width 3"], state: DiscState, frames_given: int
) -> dict[str, Scores]:
    """All that evaluate.py reports of each clip in its mode "all", by name; `QUANTITIES` has units and scope.

    velocity_error: of one disc |mean x velocity - first true one|, the published headline. phyworld tabulates a
        collision before and after impact apart; its `velocity_error` here is the mean of the two, or the one there is.
    pre_, post_: before and after the first interval in which a true velocity changes by more than 0.1. That interval is
        dropped. velocity_error is the mean over discs of |mean v - mean true v|, x_velocity_error the mean of
        |v - true v|, momentum_error and energy_error of |sum m v - first| and |sum m v^2 / 2 - first| with m = r^2.
    """
    two = state.present[:, 1]
    keep = kept_frames(state, frames_given)
    kept = keep.sum(1)
    order = (~keep).int().argsort(dim=1, stable=True)  # the kept frames first, as they follow each other
    use = torch.arange(keep.shape[1]) < kept[:, None]

    def take(values: Tensor) -> Tensor:
        rows = order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand_as(values)
        return values.gather(1, rows)

    x, y, radius = (take(values) for values in parse_as_phyworld(frames))
    wall = torch.where(two[:, None], torch.tensor([0.0, WORLD_SIZE]), WORLD_SIZE)[:, None]
    x, y, radius = torch.where(x.isnan(), wall, x), hold_last(y), hold_last(radius)
    truth, first = take(state.positions.double()), state.velocities[:, 0, :, 0].double()
    found = {}
    for axis, (name, values) in enumerate((("x", x), ("y", y))):
        error = (values - truth[..., axis])[..., 0]
        found[f"{name}_error"] = _mean(error.abs(), use)
        found[f"{name}_velocity_error"] = _mean((error.diff(dim=1) / FRAME_STEP_S).abs(), use[:, 1:])
    speed, true_speed = (values.diff(dim=1) / FRAME_STEP_S for values in (x, truth[..., 0]))
    found |= _collision_errors(x, truth[..., 0], speed, true_speed, state.radii.double(), first, use)

    stretches = torch.stack([found["pre_velocity_error"], found["post_velocity_error"]])
    headline = (_mean(speed[..., 0], use[:, 1:]) - first[:, 0]).abs()
    found["velocity_error"] = torch.where(two, stretches.nanmean(0), headline)
    found["delta_r"] = _radius_range(radius, use, two)
    return {name: _scores(name, found[name], two, kept) for name in QUANTITIES}


def kept_frames(state: DiscState, frames_given: int) -> Bool[Tensor, "batch time"]:
    """The frames judged: generated, and the true disc in the box (collision: red off the left, blue off the right)."""
    positions, radii = state.positions.double(), state.radii.double()[:, None]
    low, high = positions - radii[..., None] >= 0, positions + radii[..., None] <= WORLD_SIZE
    alone = (low & high).all(-1)[..., 0]
    keep = torch.where(state.present[:, 1, None], low[:, :, 0, 0] & high[:, :, 1, 0], alone)
    keep[:, :frames_given] = False
    return keep


def parse_as_phyworld(
    frames: UInt8[Tensor, "batch time height width 3"],
) -> tuple[Float[Tensor, "batch time disc"], Float[Tensor, "batch time disc"], Float[Tensor, "batch time disc"]]:
    """x, y and radius of the red and the blue pixels of each frame in world units; NaN where there are none."""
    height, width = frames.shape[2:4]
    across = torch.arange(width, dtype=torch.float64)
    up = torch.arange(height - 1, -1, -1, dtype=torch.float64)
    found = []
    for part in frames.flatten(0, 1).split(max(1, CHUNK_PIXELS // (height * width))):
        red, green, blue = (plane.contiguous() for plane in part.unbind(-1))
        masks = torch.stack(
            [(red > 127) & (green < 127) & (blue < 127), (red < 127) & (green < 127) & (blue > 127)], dim=1
        ).float()  # counts of pixels are exact in float32
        columns, rows = masks.sum(-2).double(), masks.sum(-1).double()
        count = columns.sum(-1)
        x, y = (columns @ across) / count / width, (rows @ up) / count / width  # 0 / 0 is NaN: not seen
        radius = torch.where(count > 0, (count / torch.pi).sqrt() / width, torch.nan)
        found.append(torch.stack([x, y, radius]) * WORLD_SIZE)
    x, y, radius = torch.cat(found, dim=1).unflatten(1, frames.shape[:2])
    return x, y, radius


def hold_last(values: Float[Tensor, "batch time disc"]) -> Float[Tensor, "batch time disc"]:
    """`values` in which each NaN is the last number before it; NaN stays where there was none."""
    moments = torch.arange(values.shape[1])[:, None].expand_as(values)
    last = torch.where(values.isnan(), 0, moments).cummax(dim=1).values  # frame 0 until seen, which is NaN itself
    return values.gather(1, last)


def _mean(values: Float[Tensor, "batch time *disc"], use: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Mean over the frames in `use` and over discs; NaN if there is no frame or one of the values is NaN."""
    use = use.reshape(*use.shape, *[1] * (values.ndim - 2)).expand_as(values).flatten(1)
    return torch.where(use, values.flatten(1), 0.0).sum(1) / use.sum(1)


def _collision_errors(
    x: Float[Tensor, "batch time disc"],
    true_x: Float[Tensor, "batch time disc"],
    speed: Float[Tensor, "batch interval disc"],
    true_speed: Float[Tensor, "batch interval disc"],
    radii: Float[Tensor, "batch disc"],
    first: Float[Tensor, "batch disc"],
    use: Bool[Tensor, "batch time"],
) -> dict[str, Float[Tensor, " batch"]]:
    """Errors before and after impact; without one the last interval counts as the impact, as published."""
    frame, interval = torch.arange(x.shape[1]), torch.arange(speed.shape[1])
    jumps = (true_speed.diff(dim=1).abs() > IMPACT_CHANGE).any(-1) & use[:, 2:]
    none = use.sum(1) - 2  # the last interval between kept frames
    impact = torch.where(jumps.any(1), jumps.int().argmax(1) + 1, none)[:, None]

    mass = radii**2
    momentum, first_momentum = (mass[:, None] * speed).sum(-1), (mass * first).sum(-1)
    energy, first_energy = (mass[:, None] * speed**2).sum(-1) / 2, (mass * first**2).sum(-1) / 2
    errors = {}
    for when, frames, intervals in (
        ("pre", use & (frame <= impact), use[:, 1:] & (interval < impact)),
        ("post", use & (frame > impact), use[:, 1:] & (interval > impact)),
    ):
        drift = torch.stack([_mean((speed - true_speed)[..., disc], intervals) for disc in range(2)], dim=1)
        errors[f"{when}_velocity_error"] = drift.abs().mean(1)
        errors[f"{when}_x_error"] = _mean((x - true_x).abs(), frames)
        errors[f"{when}_x_velocity_error"] = _mean((speed - true_speed).abs(), intervals)
        errors[f"{when}_momentum_error"] = _mean((momentum - first_momentum[:, None]).abs(), intervals)
        errors[f"{when}_energy_error"] = _mean((energy - first_energy[:, None]).abs(), intervals)
    return errors


def _radius_range(
    radius: Float[Tensor, "batch time disc"], use: Bool[Tensor, "batch time"], two: Bool[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Largest minus smallest parsed radius; of a collision the larger over discs, in its first kept frames."""
    frame = torch.arange(radius.shape[1])
    use = use & ((frame < RADIUS_FRAMES) | ~two[:, None])
    high, low = (torch.where(use[..., None], radius, fill_in) for fill_in in (-torch.inf, torch.inf))
    red, blue = (high.amax(1) - low.amin(1)).unbind(1)
    larger = torch.where(two & (blue > red), blue, red)  # Python's max: a NaN counts only if it is the red disc's
    return torch.where(use.any(1), larger, torch.nan)


def _scores(name: str, values: Float[Tensor, " batch"], two: Bool[Tensor, " batch"], kept: Tensor) -> Scores:
    """Scores with NaN and its reason where phyworld does not report the quantity, or has nothing to average."""
    unit, scope = QUANTITIES[name]
    if scope != BOTH:
        values = torch.where(two == (scope == COLLISION), values, torch.nan)
    reasons = []
    for nan, collision, frames in zip(values.isnan().tolist(), two.tolist(), kept.tolist(), strict=True):
        if not nan:
            reasons.append(None)
        elif scope not in (BOTH, COLLISION if collision else ONE_DISC):
            reasons.append(f"phyworld reports {name} of {scope} only")
        elif frames == 0:
            reasons.append("no generated frame has the true disc inside the box")
        else:
            reasons.append("the disc is not seen in the first judged frame, or no frames are left to average over")
    return Scores(name, unit, values.float(), tuple(reasons))


def skipped_by_phyworld(true: Clip) -> Bool[Tensor, " clip"]:
    """Clips that its tables leave out for their small discs: r < 0.6 alone, r <= 0.5 of either disc in a collision."""
    small = (true.state.radii <= LARGEST_SKIPPED_RADIUS).any(1)
    return torch.where(true.state.present[:, 1], small, true.state.radii[:, 0] < SMALLEST_RADIUS)


def phyworld_row(table: Mapping[str, Mapping[str, Estimate]], name: str) -> str:
    """One cell of phyworld's table: means in, out, r_out, v_out, rv_out and v_zero, 4 decimals, nan where empty."""
    return ", ".join(f"{table[bucket][name].mean:.4f}" for bucket in ("id", "out", "r", "v", "rv", "zero"))
