"""Means with intervals, over clips: values are paired wherever two methods saw the same noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from physnb.config import require

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over `judged` of `cases` clips with its 95 % bootstrap interval; all NaN where nothing was judged."""

    mean: float
    low: float
    high: float
    judged: int
    cases: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: NaN becomes None."""
        return {name: None if value != value else value for name, value in vars(self).items()}


def bootstrap_mean(values: Float[Tensor, " clip"], seed: int = 0) -> Estimate:
    """Mean of the values that are not NaN, with the 2.5 and 97.5 % quantiles of resampled means (clips resampled).

    Leaves out the clips that could not be judged: read `judged` beside it.
    """
    values = np.asarray(values, dtype=np.float64)
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, len(values))
    resamples = np.random.default_rng(seed).integers(0, len(known), (RESAMPLES, len(known)))
    low, high = np.quantile(known[resamples].mean(1), [0.025, 0.975])
    return Estimate(float(known.mean()), float(low), float(high), len(known), len(values))


def paired_difference(values: Float[Tensor, " clip"], baseline: Float[Tensor, " clip"], seed: int = 0) -> Estimate:
    """Mean of values - baseline over the clips judged in both, with its bootstrap interval."""
    require(len(values) == len(baseline), f"paired values must match: {len(values)} against {len(baseline)}")
    return bootstrap_mean(values - baseline, seed)
