"""Clips drawn from a state that a test chooses."""

import torch

from physnb.data import CAPTIONS, Clip, DiscState, render
from physnb.data.worlds import frame_times


def clip_of(state: DiscState, scenario: str = "uniform", size: int = 64, edge: str = "coverage") -> Clip:
    clips = len(state.radii)
    return Clip(
        frames=render(state, size, edge),
        captions=(CAPTIONS[scenario],) * clips,
        scenarios=(scenario,) * clips,
        buckets=("id",) * clips,
        indices=torch.arange(clips),
        state=state,
    )


def one_disc(speed: float = 2.0, radius: float = 1.0, x: float = 2.0, y: float = 4.0, frames: int = 16) -> DiscState:
    """A red disc in uniform motion, as phyworld places it: frame k at 0.1 k + 0.01 s."""
    positions, velocities = (torch.full((1, frames, 2, 2), torch.nan) for _ in range(2))
    positions[0, :, 0, 0] = x + speed * torch.from_numpy(frame_times(frames)).float()
    positions[0, :, 0, 1] = y
    velocities[0, :, 0] = torch.tensor([speed, 0.0])
    return DiscState(positions, velocities, torch.tensor([[radius, torch.nan]]), torch.tensor([torch.nan]))
