"""Every simulated scenario by name: phyworld's three worlds and the phenomena."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from physnb.config import PHENOMENA, SIMULATED, choose, require
from physnb.data.captions import CAPTIONS
from physnb.data.clips import Clip
from physnb.data.phenomena import simulate_phenomenon
from physnb.data.worlds import simulate_world


def simulate(
    scenario: str, split: str, indices, *, frames: int, size: int, seed: int = 0, edge: str = "coverage"
) -> Clip:
    """Clips number `indices` of a scenario: split "train", "id" (same ranges, other clips) or "ood" (other ranges).

    Clip i is the same alone or in any batch. edge: how worlds are drawn, see `physnb.data.worlds.render`.
    Raises ValueError for an unknown scenario, split or edge, or a bad size.
    """
    choose("scenario", scenario, SIMULATED)
    if scenario not in PHENOMENA:
        return simulate_world(scenario, split, indices, frames=frames, size=size, seed=seed, edge=edge)
    require(edge == "coverage", f"phenomena are drawn by coverage only, not with edge {edge!r}")
    return simulate_phenomenon(scenario, split, indices, frames=frames, size=size, seed=seed)


@dataclass(frozen=True)
class SimulatedSource:
    """A scenario as a source of `count` clips, or as many as one likes; `physnb.data.sources` has the contract."""

    name: str
    frames: int
    size: int
    split: str = "train"
    seed: int = 0
    count: int | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        return (CAPTIONS[self.name],)

    def clips(self, numbers: Int[np.ndarray, " batch"]) -> Clip:
        """Clips number `numbers`."""
        return simulate(self.name, self.split, numbers, frames=self.frames, size=self.size, seed=self.seed)
