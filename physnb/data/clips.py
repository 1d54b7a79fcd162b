"""Clip: the one noun that travels from simulator to model to metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from physnb.config import require

WORLD_SIZE = 10.0  # world units, side of the square box
FRAME_STEP_S = 0.1  # world seconds between frames
DISC_COLOURS = ("red", "blue")


@dataclass(frozen=True)
class DiscState:
    """True motion of up to two discs; an absent disc is NaN throughout.

    positions, velocities: world units and units/s, y up; radii: world units.
    impact_time_s: moment of the collision, NaN where there is none.
    """

    positions: Float[Tensor, "batch time disc axis"]
    velocities: Float[Tensor, "batch time disc axis"]
    radii: Float[Tensor, "batch disc"]
    impact_time_s: Float[Tensor, " batch"]

    def __getitem__(self, rows) -> DiscState:
        return DiscState(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def present(self) -> Bool[Tensor, "batch disc"]:
        """Which discs the scenario has at all."""
        return ~self.radii.isnan()

    @property
    def inside(self) -> Bool[Tensor, "batch time disc"]:
        """Where the whole disc lies in the box; False for absent discs."""
        radii = self.radii[:, None, :, None]
        return ((self.positions >= radii) & (self.positions <= WORLD_SIZE - radii)).all(-1)

    @staticmethod
    def concatenate(states: list[DiscState]) -> DiscState:
        return DiscState(**{f.name: torch.cat([getattr(s, f.name) for s in states]) for f in fields(DiscState)})


@dataclass(frozen=True)
class Clip:
    """A batch of videos with what is known about them.

    frames: RGB, row 0 at the top. captions, scenarios, buckets: one string a clip; bucket is "id" or which quantity
    lies out of the training distribution ("r", "v" or "rv"). indices: the clip's number in its (seed, split) world.
    state: the truth, where a simulator made the clip; a generated clip has none.
    parameters: what is known of each clip in numbers, by name ("speed", "length" ...); empty where nothing is.
    """

    frames: UInt8[Tensor, "batch time height width 3"]
    captions: tuple[str, ...]
    scenarios: tuple[str, ...]
    buckets: tuple[str, ...]
    indices: Int[Tensor, " batch"]
    fps: float = 1 / FRAME_STEP_S
    state: DiscState | None = None
    parameters: tuple[Mapping[str, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters) or ({},) * len(self.frames))
        require(self.frames.dtype == torch.uint8, f"clip frames must be uint8, got {self.frames.dtype}")
        require(
            self.frames.ndim == 5 and self.frames.shape[-1] == 3,
            f"clip frames must be [batch, time, height, width, 3], got {tuple(self.frames.shape)}",
        )
        for name in ("captions", "scenarios", "buckets", "indices", "parameters"):
            have = len(getattr(self, name))
            require(have == len(self), f"clip has {len(self)} videos but {have} {name}")

    def __len__(self) -> int:
        return self.frames.shape[0]

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Clip:
        """The clips at `rows` (a slice or a list), still a Clip."""
        numbers = torch.arange(len(self))[rows].tolist()
        require(isinstance(numbers, list), "index a Clip by a slice or a list of numbers, for example clip[0:1]")
        return replace(
            self,
            frames=self.frames[numbers],
            captions=tuple(self.captions[i] for i in numbers),
            scenarios=tuple(self.scenarios[i] for i in numbers),
            buckets=tuple(self.buckets[i] for i in numbers),
            indices=self.indices[numbers],
            state=None if self.state is None else self.state[numbers],
            parameters=tuple(self.parameters[i] for i in numbers),
        )

    @staticmethod
    def concatenate(clips: list[Clip]) -> Clip:
        """All clips of the list in one; their frame sizes, counts and rates must agree."""
        require(len(clips) > 0, "there is no clip to concatenate")
        for clip in clips[1:]:
            require(
                clip.frames.shape[1:] == clips[0].frames.shape[1:] and clip.fps == clips[0].fps,
                f"clips of {tuple(clips[0].frames.shape[1:])} and {tuple(clip.frames.shape[1:])} do not go together",
            )
        states = [clip.state for clip in clips]
        return Clip(
            frames=torch.cat([clip.frames for clip in clips]),
            captions=sum((clip.captions for clip in clips), ()),
            scenarios=sum((clip.scenarios for clip in clips), ()),
            buckets=sum((clip.buckets for clip in clips), ()),
            indices=torch.cat([clip.indices for clip in clips]),
            fps=clips[0].fps,
            state=None if any(s is None for s in states) else DiscState.concatenate(states),
            parameters=sum((clip.parameters for clip in clips), ()),
        )

    def pixels(self) -> Float[Tensor, "batch 3 time height width"]:
        """Frames as the model sees them: float in [-1, 1], channels first."""
        return self.frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)

    def with_pixels(self, pixels: Float[Tensor, "batch 3 time height width"]) -> Clip:
        """The same cases with other frames and no claim to their true state: what generation returns."""
        frames = pixels.detach().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return replace(self, frames=frames.permute(0, 2, 3, 4, 1).contiguous().cpu(), state=None)
