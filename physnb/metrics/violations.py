"""What a clip shows against the laws of motion, from its frames alone: no true state, no model, no weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from physnb.config import require
from physnb.data import WORLD_SIZE, Clip
from physnb.metrics.trajectory import disc_shades, parse_discs

SEEN_AREA = 0.07  # world units^2: a quarter of the smallest disc that the worlds draw
WALL_REACH = 0.6  # world units that the fastest disc of the worlds moves between frames
CONTACT_GAP = 0.45  # world units between discs that may touch between two frames
STILL_SPEED = 0.3  # units/s; parsing a lawful 32-pixel clip errs by up to 0.2
CHUNK_CLIPS = 8  # measured at a time, to bound the memory
MIN_FRAMES = 4  # in a row, the fewest that show a change of acceleration
VIOLATIONS = {  # v / (v + half): 0 where lawful, 1/2 at this value v, below 1; measure_violations says what v is
    "vanishing": 0.1,
    "clutter": 0.02,
    "dispersion": 0.3,
    "radius_drift": 0.2,
    "jump": 0.2,
    "roughness": 0.1,
    "sideways_acceleration": 1.0,
    "lift": 1.0,
    "momentum_change": 0.3,
    "energy_change": 0.3,
    "overlap": 0.2,
    "stillness": 0.3,
}


def _mean_where(values: Tensor, use: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Mean over `dims` where `use`; 0 where nothing is."""
    return torch.where(use, values, 0.0).sum(dims) / use.sum(dims).clamp(min=1)


def _windows(flags: Bool[Tensor, "batch time disc"], length: int) -> Bool[Tensor, "batch window disc"]:
    """Where `length` frames in a row are all flagged."""
    return flags.unfold(1, length, 1).all(-1)


def measure_violations(clip: Clip) -> Float[Tensor, "batch violation"]:
    """VIOLATIONS of each clip in [0, 1), from its frames alone: 0 is lawful; NaN throughout if no disc can be followed.

    vanishing (share of frames): the disc is gone though it was last seen away from the walls.
    clutter (share of full scale): mean difference between the frames and shades of red and blue discs on white.
    dispersion: mean |log| of the shade's second moment over that of a disc of its area.
    radius_drift: largest minus smallest radius, over the median radius.
    jump, roughness (units): largest second difference, and mean third difference, of the centre between frames.
    sideways_acceleration, lift (units/s^2): mean |a_x|, and mean a_y where upward.
    momentum_change, energy_change (shares): after contact against before, along x, masses as radius squared.
    overlap: depth of two discs in each other over the sum of their radii, beyond a tenth; 1 if they swap places.
    stillness: share of steps in which nothing moves faster than STILL_SPEED.
    Motion is judged where a disc is wholly in the box, and jump to lift away from contact; the worst disc counts.

    Raises ValueError for no clip, fewer than MIN_FRAMES frames or without a frame rate.
    Leaves out whether the motion fits the caption or the start frames, and lawful slow motion counts as stillness.
    """
    require(len(clip) > 0, "there is no clip to measure")
    require(clip.frames.shape[1] >= MIN_FRAMES, f"a clip needs {MIN_FRAMES} frames, got {clip.frames.shape[1]}")
    require(clip.frames.shape[2] > 0 and clip.frames.shape[3] > 0, "the clip's frames have no pixels")
    require(0 < clip.fps < float("inf"), f"a clip needs a frame rate above 0, got {clip.fps}")
    return torch.cat([_measure(frames, 1 / clip.fps) for frames in clip.frames.split(CHUNK_CLIPS)])


def _measure(frames: UInt8[Tensor, "batch time height width 3"], step_s: float) -> Float[Tensor, "batch violation"]:
    parsed = parse_discs(frames)
    seen = parsed.areas >= SEEN_AREA
    positions = torch.where(seen[..., None], parsed.positions, 0.0)
    radii = torch.where(seen, parsed.radii, torch.nan).nanmedian(1).values.nan_to_num(0.0)
    to_wall = torch.minimum(positions, WORLD_SIZE - positions).amin(-1)
    whole = seen & (to_wall >= radii[:, None] - 0.05)

    spans = torch.where(whole, parsed.radii, torch.nan)
    low, high = spans.nan_to_num(torch.inf).amin(1), spans.nan_to_num(-torch.inf).amax(1)
    found = {
        "vanishing": _vanishing(seen, seen & (to_wall < radii[:, None] + WALL_REACH)),
        "clutter": _clutter(frames),
        "dispersion": _mean_where(_dispersion(frames, positions, parsed.areas), seen, (1, 2)),
        "radius_drift": torch.where(whole.any(1), (high - low) / radii, 0.0).amax(1),
        **_motion(positions, radii, whole, seen, step_s),
    }
    values = torch.stack([found[name] / (found[name] + half) for name, half in VIOLATIONS.items()], dim=1)
    followed = _windows(whole, MIN_FRAMES).any(2).any(1)
    return torch.where(followed[:, None], values, torch.nan)


def _vanishing(
    seen: Bool[Tensor, "batch time disc"], at_wall: Bool[Tensor, "batch time disc"]
) -> Float[Tensor, " batch"]:
    """Share of frames without a disc that was last (before the first sighting: is next) seen away from the walls."""
    excused = at_wall.gather(1, seen.int().argmax(1, keepdim=True))[:, 0]
    gone = torch.zeros(seen.shape[0], seen.shape[2])
    for time in range(seen.shape[1]):
        excused = torch.where(seen[:, time], at_wall[:, time], excused)
        gone += ~seen[:, time] & ~excused & seen.any(1)
    return gone.amax(1) / seen.shape[1]


def _clutter(frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, " batch"]:
    """Mean absolute difference, in shares of full scale, between frames and their own red and blue on white."""
    pixels = frames.float().div(255)
    red, green, blue = pixels.unbind(-1)
    is_red = (red - torch.maximum(green, blue)).clamp(min=0)
    is_blue = (blue - torch.maximum(red, green)).clamp(min=0)
    explained = 1 - torch.stack([is_blue, is_red + is_blue, is_red], -1)
    return (pixels - explained).abs().mean((1, 2, 3, 4))


def _dispersion(frames: Tensor, positions: Tensor, areas: Tensor) -> Float[Tensor, "batch time disc"]:
    """|log| of the shade's mean squared distance from its centre over A / 2 pi, that of a disc of area A."""
    shade = disc_shades(frames)
    height, width = shade.shape[-2:]
    x = (torch.arange(width) + 0.5) / width * WORLD_SIZE - positions[..., :1]
    y = WORLD_SIZE - (torch.arange(height) + 0.5) / height * WORLD_SIZE - positions[..., 1:]
    squared = (shade.sum(-2) * x**2).sum(-1) + (shade.sum(-1) * y**2).sum(-1)
    ratio = squared / shade.sum((-1, -2)).clamp(min=1e-6) * 2 * torch.pi / areas.clamp(min=1e-6)
    return ratio.clamp(min=1e-6).log().abs()


def _motion(
    positions: Float[Tensor, "batch time disc axis"],
    radii: Float[Tensor, "batch disc"],
    whole: Bool[Tensor, "batch time disc"],
    seen: Bool[Tensor, "batch time disc"],
    step_s: float,
) -> dict[str, Float[Tensor, " batch"]]:
    """The violations that motion shows, before they are squashed."""
    between, both = positions[:, :, 1] - positions[:, :, 0], seen.all(-1)
    gap = between.norm(dim=-1) - radii.sum(1)[:, None]
    contact = both & (gap < CONTACT_GAP)
    free = whole & ~contact[..., None]
    second, third = positions.diff(n=2, dim=1), positions.diff(n=3, dim=1)
    acceleration = _mean_where(second / step_s**2, _windows(free, 3)[..., None], 1)
    depth = torch.where(both, -gap / radii.sum(1)[:, None].clamp(min=1e-6) - 0.1, 0.0)
    at_first = between[torch.arange(len(both)), both.int().argmax(1)]
    swapped = both & ((between * at_first[:, None]).sum(-1) < 0)

    moved = _windows(whole, 2)
    velocity = positions.diff(dim=1) / step_s
    still = ((velocity.norm(dim=-1) < STILL_SPEED) | ~moved).all(-1)
    touched, touches_later = contact.cumsum(1) > 0, contact.flip(1).cumsum(1).flip(1) > 0
    stretches = (moved.all(-1) & ~touched[:, 1:], moved.all(-1) & ~touches_later[:, :-1])
    before, after = (_mean_where(velocity[..., 0], use[..., None], 1) for use in stretches)
    compared = contact.any(1) & stretches[0].any(1) & stretches[1].any(1)
    mass, slow = radii**2, 0.05  # slow: a floor to the totals, so that two discs at rest do not divide by zero
    momentum = (mass * (after - before)).sum(1).abs() / (mass * before.abs()).sum(1).clamp(min=slow)
    energy = (mass * (after**2 - before**2)).sum(1).abs() / (mass * before**2).sum(1).clamp(min=slow)
    return {
        "jump": torch.where(_windows(free, 3), second.norm(dim=-1), 0.0).amax((1, 2)),
        "roughness": _mean_where(third.norm(dim=-1), _windows(free, 4), (1, 2)),
        "sideways_acceleration": acceleration[..., 0].abs().amax(1),
        "lift": acceleration[..., 1].clamp(min=0).amax(1),
        "momentum_change": torch.where(compared, momentum, 0.0),
        "energy_change": torch.where(compared, energy, 0.0),
        "overlap": torch.where(swapped, 1.0, depth.clamp(min=0)).amax(1),
        "stillness": _mean_where(still.float(), moved.any(-1), 1),
    }
