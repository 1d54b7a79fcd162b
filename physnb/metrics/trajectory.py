"""Trajectory metrics: discs are found by colour in every frame and compared with the simulator's true motion.

`clean` is what results use; `compat` is phyworld's evaluator (`physnb.metrics.trajectory_compat`), for parity only.

Two questions are kept apart. Is the disc there: `missing_rate`. Given that it is there, does it move as it should:
`position_error`, `velocity_error`, `radius_drift`, `momentum_error`, `energy_error`. These judge the frames that show
the disc and are NaN where none does, so read them beside `missing_rate`. `tracking_error` alone mixes the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from physnb.config import choose, require
from physnb.data import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.worlds import SPEED, frame_times
from physnb.metrics.scores import Scores, scores
from physnb.metrics.trajectory_compat import CHUNK_PIXELS, score_as_phyworld, skipped_by_phyworld
from physnb.statistics import Estimate, bootstrap_mean

MODES = ("clean", "compat")
PRESENT_AREA = 0.25  # a disc with less than this share of its true area counts as missing
TRACKING_CAP = 5.0  # world units: an absent disc counts as this far off in tracking_error, and no disc as further
RESTORE = 6.0  # of the metrics called /restored: a disc at a sixth of its shade still counts as there
MIN_FIT_FRAMES = 3  # frames that a fitted velocity needs
BUCKETS = ("id", "r", "v", "rv")  # Clip.buckets of the worlds


@dataclass(frozen=True)
class ParsedDiscs:
    """What colour says about each frame: centre (world units, y up; NaN where nothing is seen) and area (units^2)."""

    positions: Float[Tensor, "batch time disc axis"]
    areas: Float[Tensor, "batch time disc"]

    @property
    def radii(self) -> Float[Tensor, "batch time disc"]:
        return (self.areas / torch.pi).sqrt()


def disc_shades(
    frames: UInt8[Tensor, "*frames height width 3"], restore: float = 1.0
) -> Float[Tensor, "*frames disc height width"]:
    """How much of each pixel is red (disc 0) or blue (disc 1), in [0, 1].

    A colour's excess over the other two channels, with 10 % cut from either end so that faint noise counts nothing.
    restore: before the cut, the largest excess of each frame and colour is brought to 1 by at most this factor.
    """
    red, green, blue = (plane.contiguous() for plane in frames.unbind(-1))
    shade = torch.empty(*red.shape[:-2], 2, *red.shape[-2:], device=frames.device)
    for disc, (own, others) in enumerate(((red, torch.maximum(green, blue)), (blue, torch.maximum(red, green)))):
        shade.select(-3, disc).copy_(own).div_(255).sub_(others.float().div_(255))
    if restore > 1:
        shade *= (1 / shade.amax((-1, -2), keepdim=True).clamp(min=1e-9)).clamp(max=restore)
    return shade.sub_(0.1).div_(0.8).clamp_(0, 1)


def parse_discs(frames: UInt8[Tensor, "batch time height width 3"], *, restore: float = 1.0) -> ParsedDiscs:
    """Sub-pixel centres and areas of the red and the blue disc: shade-weighted moments, pixel i at (i + 1/2) / W.

    restore: by what factor at most a faded disc is brought back to full shade; see `disc_shades`.
    """
    height, width = frames.shape[2:4]
    require(height > 0 and width > 0, f"frames of {width} x {height} pixels show nothing to parse")
    column = (torch.arange(width) + 0.5) / width * WORLD_SIZE
    row = WORLD_SIZE - (torch.arange(height) + 0.5) / height * WORLD_SIZE
    found = []
    for part in frames.flatten(0, 1).split(max(1, CHUNK_PIXELS // (height * width))):
        shade = disc_shades(part, restore)
        moments = shade.sum((-1, -2)), (shade.sum(-2) * column).sum(-1), (shade.sum(-1) * row).sum(-1)
        found.append(torch.stack(moments))
    total, x, y = torch.cat(found, dim=1).unflatten(1, frames.shape[:2])
    centres = torch.stack([x / total, y / total], -1)  # 0 / 0 is NaN: not seen
    return ParsedDiscs(centres, total * (WORLD_SIZE / height) * (WORLD_SIZE / width))


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


def check_match(generated: Clip, true: Clip, simulated: str) -> None:
    """Raise ValueError unless the clips are of one shape, of the same scenarios and at the rate of `simulated` ones."""
    require(
        generated.frames.shape == true.frames.shape and generated.scenarios == true.scenarios,
        f"generated {tuple(generated.frames.shape)} and true {tuple(true.frames.shape)} clips do not match",
    )
    require(
        generated.fps == true.fps == 1 / FRAME_STEP_S,
        f"{simulated} have {1 / FRAME_STEP_S:g} frames/s; generated clips have {generated.fps:g}, true {true.fps:g}",
    )


def check_pair(generated: Clip, true: Clip, frames_given: int) -> DiscState:
    """The true state, after refusing clips that do not belong together."""
    require(true.state is not None, "trajectory metrics need the true state; take the true clip from a simulator")
    check_match(generated, true, "the worlds")
    time = true.frames.shape[1]
    require(
        true.state.positions.shape[:2] == true.frames.shape[:2],
        f"the true state is of {tuple(true.state.positions.shape[:2])} clips and frames, the videos of "
        f"{tuple(true.frames.shape[:2])}",
    )
    require(min(true.frames.shape[2:4]) > 0, f"frames of {tuple(true.frames.shape[2:4])} pixels show nothing to judge")
    require(
        1 <= frames_given <= time - MIN_FIT_FRAMES,
        f"frames given must be in [1, {time - MIN_FIT_FRAMES}] to judge a trajectory, got {frames_given}",
    )
    return true.state


def seen_discs(parsed: ParsedDiscs, state: DiscState) -> Bool[Tensor, "batch time disc"]:
    """Which discs are there: with at least PRESENT_AREA of their true area."""
    return parsed.areas >= PRESENT_AREA * (torch.pi * state.radii[:, None] ** 2)


def inside_from(state: DiscState, first: int) -> Bool[Tensor, "batch time disc"]:
    """Which true discs are wholly inside the box, from frame `first` on."""
    inside = state.inside.clone()
    inside[:, :first] = False
    return inside


def metric_trajectory(
    generated: Clip, true: Clip, *, frames_given: int = 3, mode: str = "clean", restore: float = 1.0
) -> dict[str, Scores]:
    """Scores of each clip by name; all are better when lower. Judged where the true disc is wholly inside the box.

    clean, presence:
    missing_rate: share of judged discs whose area is under a quarter of the true one.

    clean, motion given presence (frames in which the disc is missing are left out; NaN if it is missing in all):
    position_error (world units): mean distance to the true centre over generated frames in which the disc is there.
    velocity_error (units/s): length of the slope fitted to the position error, from the last start frame on; for
        collisions the mean over discs and over the stretches before and after impact that have 3 frames.
    radius_drift (world units): largest minus smallest radius seen.
    momentum_error, energy_error (shares): of a collision, after impact, against the true total of |m v| and m v^2.

    clean, the mixture of both:
    tracking_error (world units): position error in which a missing disc counts as 5 units, and none as more: the hunt's
        objective. A change in it can come from discs that vanish less as well as from discs that move better; only
        missing_rate and position_error beside it can tell which.

    restore: as of `parse_discs`; above 1 a disc is there however faded it is, so that contrast decides nothing.

    compat: the quantities of phyworld, under the names in `trajectory_compat.QUANTITIES`.

    Raises ValueError for clips that do not match, lack a true state, or leave too few frames.
    Leaves out frames in which the true disc touches a wall, and everything about looks but colour.
    """
    state = check_pair(generated, true, frames_given)
    choose("mode", mode, MODES)
    if mode == "compat":
        return score_as_phyworld(generated.frames, state, frames_given)
    parsed = parse_discs(generated.frames, restore=restore)
    seen = seen_discs(parsed, state)
    anchored, judged = inside_from(state, frames_given - 1), inside_from(state, frames_given)

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


def shared_motion(
    generated: Clip, other: Clip, true: Clip, *, frames_given: int = 3, restore: float = RESTORE
) -> dict[str, tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]]:
    """Position and velocity error of two generations of the same cases, each on the frames where both show the disc.

    `metric_trajectory` judges every clip where its own disc is there, so a clip that keeps a disc through the hard
    frames is judged on more of them than one that loses it. Here both are judged on the same frames: what is left of a
    difference is motion alone. By name the values of `generated` and of `other`; NaN in both where no frame is shared.
    Raises ValueError as `metric_trajectory` does.
    """
    state = check_pair(generated, true, frames_given)
    check_pair(other, true, frames_given)
    parsed = [parse_discs(clip.frames, restore=restore) for clip in (generated, other)]
    seen = seen_discs(parsed[0], state) & seen_discs(parsed[1], state)
    anchored, judged = inside_from(state, frames_given - 1), inside_from(state, frames_given)
    offsets = [found.positions - state.positions for found in parsed]
    position, velocity = (
        tuple(_masked_mean(offset.norm(dim=-1), judged & seen) for offset in offsets),
        tuple(_fitted_errors(offset, state, anchored & seen)[0] for offset in offsets),
    )
    return dict(position_error=position, velocity_error=velocity)


def training_pull(
    generated: Clip, true: Clip, *, frames_given: int = 3, restore: float = RESTORE
) -> dict[str, Float[Tensor, " batch"]]:
    """How far the speeds of discs that start slower or faster than any of training are pulled toward those (units/s).

    "slow": fitted minus true horizontal speed of discs below the training range, "fast": true minus fitted of those
    above; before impact, mean over the discs of a clip, NaN where it has none or shows none in MIN_FIT_FRAMES frames.
    0 is the true motion, above 0 is toward the training range, as case-based generalisation would have it (Kang et al.
    2024, section 5), below 0 away from it. Horizontal, for all three worlds start so.
    Raises ValueError as `metric_trajectory` does. Leaves out falling, and all after an impact.
    """
    state = check_pair(generated, true, frames_given)
    parsed = parse_discs(generated.frames, restore=restore)
    times = torch.from_numpy(frame_times(true.frames.shape[1])).float()
    before = times[:, None] < state.impact_time_s.nan_to_num(torch.inf)[:, None, None]
    use = inside_from(state, frames_given - 1) & seen_discs(parsed, state) & before
    start = state.velocities[:, 0, :, 0]
    slope = fitted_slope(times, parsed.positions - state.positions, use)[..., 0]
    faster = torch.where(start < 0, -slope, slope)
    slow, fast = start.abs() < SPEED.inner[0], start.abs() > SPEED.inner[1]
    judged = ~faster.isnan()
    return dict(slow=_masked_mean(faster, slow & judged), fast=_masked_mean(-faster, fast & judged))


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


def bucket_table(
    found: Mapping[str, Scores], true: Clip, *, mode: str = "clean", seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Mean, interval and counts of every score of `found` by bucket: table[bucket][score name].

    Buckets, as phyworld has them: "zero" (a disc that stands still at first), else what Clip.buckets says: "id", "r",
    "v", "rv"; "out" is all but "id". A bucket without clips has NaN means and counts 0.
    mode "clean" counts every clip; "compat" leaves out those with small discs (r < 0.6; r <= 0.5 in collisions), and
    `trajectory_compat.phyworld_row` prints it as published.
    Raises ValueError for scores of other clips, clips without a true state and bucket names of other data.
    Leaves out, in the mean, clips that could not be judged: read `judged` beside `cases`.
    """
    choose("mode", mode, MODES)
    require(true.state is not None, "buckets need the true state; take the true clip from a simulator")
    for name in sorted(set(true.buckets)):
        choose("bucket", name, BUCKETS)
    for name, score in found.items():
        require(len(score.values) == len(true), f"{name} has {len(score.values)} values for {len(true)} clips")
    still = (true.state.present & (true.state.velocities[:, 0, :, 0] == 0)).any(1).tolist()
    names = ["zero" if stands else bucket for stands, bucket in zip(still, true.buckets, strict=True)]
    skipped = skipped_by_phyworld(true).tolist() if mode == "compat" else [False] * len(true)
    rows: dict[str, list[int]] = {bucket: [] for bucket in ("id", "out", "r", "v", "rv", "zero")}
    for i, (name, skip) in enumerate(zip(names, skipped, strict=True)):
        if not skip:
            rows[name].append(i)
    rows["out"] = sorted(rows["zero"] + rows["r"] + rows["v"] + rows["rv"])
    return {
        bucket: {name: bootstrap_mean(score.values[numbers], seed) for name, score in found.items()}
        for bucket, numbers in rows.items()
    }
