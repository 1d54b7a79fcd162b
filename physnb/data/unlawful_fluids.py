"""Smoke and flames that break a law of flow after their start frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from physnb.config import FLUIDS, choose, require
from physnb.data.clips import WORLD_SIZE, Clip
from physnb.data.fluids import CELL, GRID, GROUP, SETTINGS, Flow, parameter_columns, simulate_group
from physnb.data.impossible import Variants
from physnb.data.random import hash_draws

UNLAWFUL = ("time_reversal", "sinking", "vanish", "teleport", "frozen")
JUMP = 2.0  # world units of a teleport
VISIBLE_CHANGE = 0.1  # share of what is drawn that has to differ in some frame for a variant to be unlawful


def make_unlawful_fluid(clip: Clip, kind: str, *, frames_given: int = 3, seed: int = 0) -> Variants:
    """Each clip with its first `frames_given` frames as they are and a law broken later: a function of (seed, index).

    sinking: buoyancy pulls down from the first generated frame on. vanish: what is above the centre of mass is gone
    from some frame on. Both are computed anew, so that the flow goes on by its laws after the break.
    time_reversal: the generated frames in reverse order. frozen: nothing moves from some frame on.
    teleport: everything JUMP units to a side from some frame on; what crosses a wall comes in at the other.
    A row is not judged where too little of the picture differs. area_ratio: of what covers the ground, as for discs.
    Raises ValueError for an unknown kind, for clips of no fluid or that do not show the flow of their parameters, and
    for start frames that leave fewer than 2 to break.
    """
    require(len(clip) > 0, "there is no clip to break a law in")
    choose("kind", kind, UNLAWFUL)
    foreign, time = sorted(set(clip.scenarios) - set(FLUIDS)), clip.frames.shape[1]
    require(not foreign, f"only smoke and flames break the laws of fluids, not {', '.join(foreign)}")
    require(1 <= frames_given <= time - 2, f"frames given must be in [1, {time - 2}], got {frames_given}")
    last = time - max(2, (time - frames_given) // 3) if kind in ("vanish", "teleport", "frozen") else frames_given
    chance = hash_draws(seed, kind, clip.indices.numpy()) % np.uint64(last + 1 - frames_given)
    moments, frames = frames_given + torch.from_numpy(chance.astype(np.int64)), clip.frames.clone()
    for name in FLUIDS:
        rows = [row for row, scenario in enumerate(clip.scenarios) if scenario == name]
        for part in (rows[k : k + GROUP] for k in range(0, len(rows), GROUP)):
            frames[part] = break_group(clip[part], kind, moments[part])
    broken, true = (255 - f[:, frames_given:].amin(-1).float() for f in (frames, clip.frames))  # covered by the fluid
    moved = (broken - true).abs().sum((2, 3)) / true.sum((2, 3)).clamp(min=1)
    judged = moved.amax(1) >= VISIBLE_CHANGE
    reasons = tuple(None if seen else "too little of the fluid moves for it to show" for seen in judged.tolist())
    ratio = torch.where(judged, broken.sum((1, 2, 3)) / true.sum((1, 2, 3)), torch.nan)
    frames = torch.where(judged[:, None, None, None, None], frames, clip.frames)
    return Variants(kind, replace(clip, frames=frames), reasons, ratio, frames_given)


def break_group(clip: Clip, kind: str, moments: Int[Tensor, " clip"]) -> UInt8[Tensor, "clip time height width 3"]:
    """Frames of up to GROUP clips of one phenomenon, in which a law is broken before frame `moments` of each."""
    frames, phenomenon, (time, _, size) = clip.frames.clone(), clip.scenarios[0], clip.frames.shape[1:4]
    if kind in ("time_reversal", "teleport", "frozen"):
        inlet_x = parameter_columns(clip.parameters)["inlet_x"].flatten().tolist()
        for row, (moment, x) in enumerate(zip(moments.tolist(), inlet_x, strict=True)):
            side = 1 if x < WORLD_SIZE / 2 else -1  # towards the middle
            after = {
                "time_reversal": frames[row, moment:].flip(0),
                "teleport": frames[row, moment:].roll(side * round(JUMP / WORLD_SIZE * size), 2),
                "frozen": frames[row, moment - 1],
            }
            frames[row, moment:] = after[kind].clone()
        return frames

    steps = SETTINGS[phenomenon].warm_up + F.pad(moments, (0, GROUP - len(moments)))
    height = (torch.arange(GRID).double() + 0.5) * CELL

    def change(number: int, flow: Flow) -> Flow:
        now, column = steps == number, flow.density.sum(1)
        if kind == "sinking":
            return replace(flow, buoyancy=torch.where(now, -flow.buoyancy, flow.buoyancy))
        centre = (column * height).sum(1) / column.sum(1)
        gone = now[:, None] & (height > centre[:, None])
        return replace(flow, density=torch.where(gone[:, None], 0.0, flow.density))

    made = simulate_group(clip.parameters, phenomenon, time, size, change)
    before = (torch.arange(time) < moments[:, None])[..., None, None, None]
    fits = made.shape == frames.shape and int(torch.where(before, made.int() - frames.int(), 0).abs().max()) <= 1
    require(fits, "variants are computed anew: the clip must show the flow of its own parameters")
    return torch.where(before, frames, made)
