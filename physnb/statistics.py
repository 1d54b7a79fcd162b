"""Means with intervals, over clips: values are paired wherever two methods saw the same noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import hypergeom, norm, rankdata
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


def resampled_means(
    values: Float[Tensor, " clip"], weights: Float[Tensor, " clip"] | None = None, seed: int = 0
) -> tuple[float, Float[np.ndarray, " resample"]]:
    """The mean of the values that are not NaN, and the means of RESAMPLES resamples of them; NaN where there are none.

    weights: of each value, above 0; equal if None. They are resampled with their values.
    """
    values = np.asarray(values, dtype=np.float64)
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return np.nan, np.full(RESAMPLES, np.nan)
    drawn = np.random.default_rng(seed).integers(0, len(known), (RESAMPLES, len(known)))
    if weights is None:
        return float(known.mean()), known[drawn].mean(1)
    w = np.asarray(weights, dtype=np.float64)[~np.isnan(values)]
    return float((w * known).sum() / w.sum()), (w * known)[drawn].sum(1) / w[drawn].sum(1)


def bootstrap_mean(
    values: Float[Tensor, " clip"], seed: int = 0, weights: Float[Tensor, " clip"] | None = None
) -> Estimate:
    """Mean of the values that are not NaN, with the 2.5 and 97.5 % quantiles of resampled means (clips resampled).

    weights: of each value; equal if None. Leaves out the clips that could not be judged: read `judged` beside it.
    """
    mean, drawn = resampled_means(values, weights, seed)
    low, high = np.quantile(drawn, [0.025, 0.975])
    values = np.asarray(values, dtype=np.float64)
    return Estimate(mean, float(low), float(high), int((~np.isnan(values)).sum()), len(values))


def paired_difference(values: Float[Tensor, " clip"], baseline: Float[Tensor, " clip"], seed: int = 0) -> Estimate:
    """Mean of values - baseline over the clips judged in both, with its bootstrap interval."""
    require(len(values) == len(baseline), f"paired values must match: {len(values)} against {len(baseline)}")
    return bootstrap_mean(values - baseline, seed)


def relative_difference(values: Float[Tensor, " clip"], baseline: Float[Tensor, " clip"], seed: int = 0) -> Estimate:
    """Mean of values - baseline as a share of the mean baseline, over the clips judged in both; clips are resampled.

    -0.2 is 20 % less than the baseline. Raises ValueError for values that do not match and where the mean baseline is
    not above 0: a share of nothing says nothing.
    """
    require(len(values) == len(baseline), f"paired values must match: {len(values)} against {len(baseline)}")
    first, second = (np.asarray(x, dtype=np.float64) for x in (values, baseline))
    known = ~np.isnan(first - second)
    if not known.any():
        return Estimate(np.nan, np.nan, np.nan, 0, len(first))
    first, second = first[known], second[known]
    require(second.mean() > 0, f"a relative difference needs a mean baseline above 0, got {second.mean():.3g}")
    drawn = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)))
    low, high = np.quantile(first[drawn].mean(1) / second[drawn].mean(1) - 1, [0.025, 0.975])
    return Estimate(float(first.mean() / second.mean() - 1), float(low), float(high), int(known.sum()), len(known))


def rank_agreement(
    first: Float[Tensor, "item case"],
    second: Float[Tensor, "item case"],
    *,
    paired: bool = True,
    seed: int = 0,
    draws: int = 1000,
) -> Estimate:
    """Spearman's rank correlation of two sets of items' means over cases, such as the effects of heads by two metrics.

    The interval resamples cases: paired ones together, others on each side by itself. judged: items with a mean on both
    sides; NaN with fewer than three. Noise in the means pulls the correlation towards 0: two halves of the same cases
    would not agree fully either. Raises ValueError for other items on either side, and paired sides of other cases.
    """
    sides = [np.asarray(x, dtype=np.float64) for x in (first, second)]
    require(len(sides[0]) == len(sides[1]), f"both sides need the same items: {len(sides[0])} and {len(sides[1])}")
    same = not paired or sides[0].shape == sides[1].shape
    require(same, f"paired sides need the same cases: {sides[0].shape[1]} and {sides[1].shape[1]}")
    known = ~np.logical_or(*(np.isnan(x).all(1) for x in sides))
    if known.sum() < 3:
        return Estimate(np.nan, np.nan, np.nan, int(known.sum()), len(known))
    generator = np.random.default_rng(seed)
    sides = [x[known] for x in sides]
    shares = [np.full((1, x.shape[1]), 1.0) for x in sides]  # what each case counts for: all alike, then resampled
    drawn = [resample_counts(generator, draws, x.shape[1]) for x in sides]
    if paired:
        drawn[1] = drawn[0]
    means = [weighted_means(x, np.concatenate([w, d])) for x, w, d in zip(sides, shares, drawn, strict=True)]
    rho = spearman(*means)
    low, high = np.nanquantile(rho[1:], [0.025, 0.975]) if not np.isnan(rho[1:]).all() else (np.nan, np.nan)
    return Estimate(float(rho[0]), float(low), float(high), int(known.sum()), len(known))


def resample_counts(generator: np.random.Generator, draws: int, cases: int) -> Float[np.ndarray, "draw case"]:
    """How often each case is in each resample."""
    return generator.multinomial(cases, np.full(cases, 1 / cases), size=draws).astype(np.float64)


def weighted_means(
    values: Float[np.ndarray, "item case"], weights: Float[np.ndarray, "draw case"]
) -> Float[np.ndarray, "draw item"]:
    """Mean of every item over its judged cases under each set of weights; over all of them where none is drawn."""
    known = ~np.isnan(values)
    total = weights @ known.T
    sums = weights @ np.nan_to_num(values).T
    return np.divide(sums, total, out=np.broadcast_to(np.nanmean(values, 1), sums.shape).copy(), where=total > 0)


def spearman(x: Float[np.ndarray, "row item"], y: Float[np.ndarray, "row item"]) -> Float[np.ndarray, " row"]:
    """Pearson's correlation of the ranks in each row; NaN where a row has equal values only."""
    x, y = (rankdata(values, axis=1) for values in (x, y))
    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (x, y))
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.divide((x * y).sum(1), size, out=np.full(len(x), np.nan), where=size > 0)


@dataclass(frozen=True)
class Overlap:
    """How many of `chosen` items two choices from `items` share, beside what chance gives.

    p: chance that two random choices share as many or more (hypergeometric); expected: chosen^2 / items.
    """

    shared: int
    chosen: int
    items: int

    @property
    def expected(self) -> float:
        return self.chosen**2 / self.items

    @property
    def p(self) -> float:
        return float(hypergeom.sf(self.shared - 1, self.items, self.chosen, self.chosen))

    def to_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return vars(self) | dict(expected=self.expected, p=self.p)


def sign_flips(
    differences: Float[Tensor, "test case"], *, resamples: int = 10_000, seed: int = 0
) -> tuple[Float[np.ndarray, " test"], Float[np.ndarray, " test"]]:
    """One-sided p values that each row's mean is below 0: alone, and corrected for having looked at all rows.

    Under the null a paired difference is as likely to be d as -d. Signs are drawn case by case, the same for all rows,
    so the rows keep their correlation; z = sum d / sqrt(sum d^2). Corrected: the share of draws in which the smallest z
    of all rows is as small (single-step max-statistic of Westfall and Young 1993), which bounds the chance of one
    false finding or more. A case that could not be judged is left out; a row of zeros has p = 1. Both count the
    observed signs as one draw more, so no p is 0.
    Leaves out skew: many small gains against few large losses of mean 0 are not this null and pass too often, those of
    an exponential distribution at the 5 % level in 11 % of samples of 24 cases and in 8 % of 64.
    """
    values = np.nan_to_num(np.asarray(differences, dtype=np.float64))
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    unit = np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
    observed = unit.sum(1)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, values.shape[1]))
    drawn = signs @ unit.T  # [resample, test]
    close = observed + 1e-9  # equal sums must not differ by rounding
    alone = (1 + (drawn <= close).sum(0)) / (1 + resamples)
    corrected = (1 + (drawn.min(1, keepdims=True) <= close).sum(0)) / (1 + resamples)
    return alone, corrected


def benjamini_hochberg(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """q values: rejecting all tests with q <= level keeps the expected share of false ones at `level` or below.

    Benjamini and Hochberg (1995), for tests that are independent or depend positively.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return q


def cases_needed(deviation: float, effect: float, *, power: float = 0.9, level: float = 0.05, tests: int = 1) -> int:
    """Cases for which a one-sided paired test finds a mean of `effect` with chance `power`. At least 2.

    n / (1 + z^2 / 2n) = ((z + z_power) deviation / effect)^2 with z = z_(1 - level / tests), Bonferroni over `tests`;
    deviation: standard deviation of the paired differences. In large samples n is the right side, the usual normal
    approximation, plus z^2 / 2 because the test has to estimate the deviation (Guenther 1981).
    """
    require(math.isfinite(effect) and effect != 0, f"an effect to be found must be a number other than 0, got {effect}")
    z, z_power = power_quantiles(deviation, power, level, tests)
    right = ((z + z_power) * deviation / effect) ** 2
    return max(2, math.ceil(right / 2 + math.sqrt(right**2 / 4 + right * z**2 / 2)))


def detectable_effect(
    deviation: float, cases: int, *, power: float = 0.9, level: float = 0.05, tests: int = 1
) -> float:
    """The size of the mean difference for which `cases` are enough: `cases_needed` turned round."""
    require(cases > 0, f"cases must be positive, got {cases}")
    z, z_power = power_quantiles(deviation, power, level, tests)
    return (z + z_power) * deviation * math.sqrt((1 + z**2 / (2 * cases)) / cases)


def power_quantiles(deviation: float, power: float, level: float, tests: int) -> tuple[float, float]:
    """z_(1 - level / tests) and z_power; raises ValueError for settings out of range."""
    require(math.isfinite(deviation) and deviation >= 0, f"deviation must be a number of at least 0, got {deviation}")
    require(
        tests > 0 and 0 < level < 1 and level / tests < power < 1,
        f"of {tests} tests at level {level} the power must be above level / tests and below 1, got {power}",
    )
    return float(norm.ppf(1 - level / tests)), float(norm.ppf(power))
