"""The contract of every metric: metric(generated, true) -> per-clip Scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import require
from physnb.statistics import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Scores:
    """One number a clip; NaN where the clip could not be judged, with the reason why (None where it could).

    Absence never counts as success: what is missing is NaN here and counted in `missing_rate`.
    """

    name: str
    unit: str
    values: Float[Tensor, " clip"]
    reasons: tuple[str | None, ...]
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        explained = [bool(v != v) == (r is not None) for v, r in zip(self.values.tolist(), self.reasons, strict=True)]
        require(all(explained), f"{self.name}: every value that is not a number needs a reason, and no other")

    def estimate(self, seed: int = 0) -> Estimate:
        """Mean and 95 % interval over the clips that could be judged."""
        return bootstrap_mean(self.values, seed)


def scores(name: str, unit: str, values: Float[Tensor, " clip"], reason: str) -> Scores:
    """Scores whose NaN values all have the same `reason`."""
    return Scores(name, unit, values, tuple(reason if nan else None for nan in torch.isnan(values).tolist()))
