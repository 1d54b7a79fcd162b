"""Sources of training clips behind one interface, and mixtures of them as one endless, reproducible stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from physnb.config import require
from physnb.data.clips import Clip
from physnb.data.random import hash_draws, uniform_draws

BLOCK = 4096  # examples whose sources are drawn and counted together


class Source(Protocol):
    """Where clips come from: a simulator, a file, a folder of videos.

    name: what error messages and shuffles call it. count: how many clips there are, None for as many as one likes.
    captions: every caption that its clips can have.
    """

    name: str
    count: int | None
    captions: tuple[str, ...]

    def clips(self, numbers: Int[np.ndarray, " batch"]) -> Clip:
        """Clips number `numbers`, each the same alone or in any batch; numbers are in [0, count) and may repeat."""
        ...


def shuffled(seed: int, name: str, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """The order of a source's clips in one epoch: a function of its arguments alone."""
    return np.argsort(hash_draws(seed, f"shuffle/{name}/{epoch}", np.arange(count)), kind="stable")


@dataclass
class Mixture:
    """An endless stream of examples, each from a source drawn by `weights`; example n is a function of (seed, n).

    So a run goes on in the middle of an epoch by asking for the next number, and any worker can make any example. A
    source with a count is gone through in a new order every epoch, each clip once; one without gives its clip n as
    example n. Proportions are those of independent draws: after n examples a share p is met within sqrt(p (1 - p) / n).
    Raises ValueError for no source, an empty one, two of one name, or a weight that is not positive.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    seed: int = 0
    _before: list[np.ndarray] = field(default_factory=list, repr=False)  # examples of each source before each block
    _orders: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)  # epoch and order of each

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(len(names) > 0, "a mixture needs at least one source")
        require(len(set(names)) == len(names), f"sources of a mixture must differ, got {', '.join(names)}")
        require(
            len(self.weights) == len(names) and min(self.weights) > 0,
            f"weights {self.weights} must give a positive weight to each of {', '.join(names)}",
        )
        empty = [source.name for source in self.sources if source.count == 0]
        require(not empty, f"there is no clip in {', '.join(empty)}")
        self._before = [np.zeros(len(names), dtype=np.int64)]

    def source_of(self, numbers: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Which source each example comes from."""
        edges = np.cumsum(self.weights) / np.sum(self.weights)
        drawn = np.searchsorted(edges, uniform_draws(self.seed, "mixture", numbers), side="right")
        return np.minimum(drawn, len(edges) - 1)

    def clip_numbers(self, numbers: Int[np.ndarray, " batch"], which: int) -> Int[np.ndarray, " batch"]:
        """The clip of source `which` that each of `numbers`, examples of that source, shows."""
        source = self.sources[which]
        if source.count is None:
            return numbers
        place = np.empty_like(numbers)
        for block in np.unique(numbers // BLOCK).tolist():
            rows, own = numbers // BLOCK == block, self._drawn_in(block) == which
            place[rows] = self._drawn_before(block)[which] + (np.cumsum(own) - own)[numbers[rows] % BLOCK]
        return np.array([self._order(which, int(p // source.count))[p % source.count] for p in place])

    def _drawn_in(self, block: int) -> Int[np.ndarray, " example"]:
        return self.source_of(np.arange(block * BLOCK, (block + 1) * BLOCK))

    def _drawn_before(self, block: int) -> Int[np.ndarray, " source"]:
        """How many examples before a block come from each source."""
        while len(self._before) <= block:
            drawn = self._drawn_in(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.sources)))
        return self._before[block]

    def _order(self, which: int, epoch: int) -> np.ndarray:
        if self._orders.get(which, (None,))[0] != epoch:
            source = self.sources[which]
            self._orders[which] = epoch, shuffled(self.seed, source.name, epoch, source.count)
        return self._orders[which][1]

    def parts(self, numbers) -> tuple[list[tuple[Source, Int[np.ndarray, " clip"]]], Int[Tensor, " batch"]]:
        """The clips to take of each source for examples `numbers`; and what brings all of them into that order."""
        numbers = np.asarray(numbers, dtype=np.int64)
        require(len(numbers) > 0 and numbers.min() >= 0, "example numbers must be given and not be negative")
        drawn = self.source_of(numbers)
        places = {which: np.flatnonzero(drawn == which) for which in np.unique(drawn).tolist()}
        parts = [(self.sources[which], self.clip_numbers(numbers[rows], which)) for which, rows in places.items()]
        return parts, torch.from_numpy(np.argsort(np.concatenate(list(places.values()))))

    def examples(self, numbers) -> Clip:
        """Examples number `numbers`, in this order, from 0 on without end."""
        parts, order = self.parts(numbers)
        return Clip.concatenate([source.clips(wanted) for source, wanted in parts])[order]
