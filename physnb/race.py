"""Racing heads: the k that `rank_heads` would put first, for fewer rows.

Unguided clips of all cases come first, for the price of one head. They sort the cases into strata, from those that the
model gets right by itself, on which heads hardly differ, to those on which they differ most. Each stage adds cases
where it lowers the doubt most, and stops the heads whose place is decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from physnb.config import PROMISES, Guidance, HeadId, HeadSet, choose, head_set, require
from physnb.ranking import Guide, HeadRanking, check_subject_heads, often_judged, require_judged
from physnb.trials import Trials

FIRST_CASES = 12  # of a race: fewer give no usable spread
GROWTH = 1.25  # cases of a stage over those of the stage before
STRATA = 4  # quarters of the cases by their unguided score
STRATUM_CASES = 6  # or more cases in each
DRAWS = 2000  # of the heads' true effects, from what is known of them
STOPPING_SHARE = 0.5  # of the misses that are allowed: by stopping heads early; the rest by ending the race


@dataclass(frozen=True)
class RaceStage:
    """What a race knew after one stage: cases so far, how many heads were in, out or still ran, and expected misses.

    misses: how many of the true top k the winners so far would lack, by (4) of `race_heads`.
    """

    cases: int
    settled: int
    dropped: int
    running: int
    misses: float


@dataclass(frozen=True)
class Race:
    """The winners of a race, its ranking with NaN where it saved a row, and how it went."""

    winners: HeadSet
    ranking: HeadRanking
    stages: tuple[RaceStage, ...]

    @property
    def rows(self) -> int:
        """Rows of heads and cases that were needed, without the unguided ones."""
        return int((self.ranking.weights > 0).sum())


def race_heads(
    trials: Trials,
    guide: Guide,
    k: int,
    heads: Sequence[HeadId] | None = None,
    *,
    kept: HeadSet = (),
    confidence: float = 0.9,
    promise: str = "set",
    seed: int = 0,
    budget: int = 0,
) -> Race:
    """The k heads that `rank_heads` would put first.

    promise "set": all k are the same with a chance of about `confidence`. "head": about that share of the k are, which
    is cheaper where heads at the border are alike.

    The N cases that unguided clips can be judged on are cut into STRATA by their unguided score; N_s of them are in
    stratum s, n_s are run so far, in an order drawn by `seed`. For each head, of its mean effect over all N:

        x   = sum_s W_s x_s,  W_s = N_s / N                  stratified mean                                    (1)
        e^2 = sum_s W_s^2 v_s (1 / n_s - 1 / N_s)            its variance, for drawing without replacement      (2)
        N(m + B (x - m), B e^2),  B = t^2 / (t^2 + e^2)      posterior (Efron and Morris 1975)                  (3)

    v_s: variance within a stratum about the mean of all running heads on each case, for they are compared on the same
    cases; half the head's own, half the mean of all. m, t^2: mean of x over heads, and its variance beyond e^2; t^2 is
    at least sum_s W_s^2 v_s / N_s, by which even equal heads differ on N cases. Without the pull towards m in (3) the
    best of many heads would look surer than they are. With draws from (3),

        misses = sum over the k best of P(not among the top k)                                                  (4)

    is how many of the true top k would be lacking. The race ends when they are at most 1 - confidence, or k times that
    for promise "head". Before, heads stop that are out or in with so little doubt that all such stops together use up
    STOPPING_SHARE of it. New cases go to the stratum where one lowers (2) most, for the spread of the heads that run
    (Neyman 1934). At n = N there is no doubt.

    A case that a head cannot be judged on leaves (1) for this head; one judged on fewer than half of its cases cannot
    win. budget: rows at most, 0 for no limit; a race that would go beyond takes the best so far, and its last stage
    says how many heads still ran. Raises ValueError if not even the first stage fits.
    Leaves out that effects may be far from normal (the bench measures how often the promise is kept), and that the
    chances are over hunts: where two heads at the border are all but equal it is cast like a coin.
    """
    pool = tuple(head for head in check_subject_heads(trials, heads) if head not in kept)
    require(1 <= k <= len(pool), f"top k must be in [1, {len(pool)}], the heads to hunt, got {k}")
    require(0 < confidence < 1, f"confidence must be in (0, 1), got {confidence}")
    choose("promise", promise, PROMISES)
    count = len(trials.cases)
    first = count + len(pool) * min(FIRST_CASES, count)
    require(
        budget == 0 or budget >= first,
        f"a budget of {budget} rows is too small for a race of {len(pool)} heads, which begins with {first}; give "
        "more, or fewer heads",
    )
    baseline = trials.scores([Guidance()], label="race", required=False)[0]
    require_judged(trials, not bool(baseline.isnan().all()))
    strata = Strata(baseline, seed)
    effects, weights = (torch.full((len(pool), count), value) for value in (torch.nan, 0.0))
    allowed = (1 - confidence) * (k if promise == "head" else 1)
    running, settled, stages, spent = list(range(len(pool))), [], [], 0.0
    sizes = stage_sizes(strata.count)
    for number, size in enumerate(sizes):
        new = strata.grow(size)
        if 0 < budget < count + int((weights > 0).sum()) + len(running) * len(new):
            break
        guidances = [guide(head_set((*kept, pool[i]))) for i in running]
        found = trials.scores(guidances, new, label="race", required=False)
        effects[np.ix_(running, new)] = trials.subject.objective.sign * (found - baseline[new])
        weights[running] = strata.weights(count)
        means, errors, least = strata.estimates(effects[running], weights[running])
        known = often_judged(effects, (weights > 0).sum(1, keepdim=True))
        ranking = HeadRanking(pool, known, trials.subject.objective, kept, weights)
        middle, doubts = pull_together(means, errors, ranking.means.numpy(), least)
        wanted = k - len(settled)
        chances = chances_of_top(middle, doubts, wanted, np.random.default_rng((seed, number)))
        best = np.argsort(means, kind="stable")[:wanted]
        misses = spent + float((1 - chances[best]).sum())
        if misses > allowed and size < strata.count:
            wrong = np.where(np.isin(np.arange(len(running)), best), 1 - chances, chances)
            stopped = surest(wrong, STOPPING_SHARE * allowed * (number + 1) / len(sizes) - spent)
            spent += float(wrong[stopped].sum())
            settled += [running[i] for i in best if i in stopped]
            running = [head for i, head in enumerate(running) if i not in stopped]
        stages.append(RaceStage(size, len(settled), len(pool) - len(settled) - len(running), len(running), misses))
        if misses <= allowed or len(settled) == k or len(settled) + len(running) == k:
            break
    require_judged(trials, not bool(effects.isnan().all()))
    order = ranking.means.nan_to_num(nan=math.inf)
    winners = [*settled, *sorted(running, key=lambda i: float(order[i]))[: k - len(settled)]]
    return Race(head_set([pool[i] for i in winners]), ranking, tuple(stages))


def stage_sizes(count: int) -> list[int]:
    """Cases of every head in the stages of a race over `count` cases; the last is all of them."""
    sizes = [min(FIRST_CASES, count)]
    while sizes[-1] < count:
        sizes.append(min(count, math.ceil(sizes[-1] * GROWTH)))
    return sizes


def surest(wrong: Float[np.ndarray, " running"], allowance: float) -> Int[np.ndarray, " stopped"]:
    """Heads whose place is the surest, as many as are wrong with chances that add up to `allowance` at most."""
    order = np.argsort(wrong, kind="stable")
    return order[np.cumsum(wrong[order]) <= allowance]


def pull_together(
    means: Float[np.ndarray, " running"],
    errors: Float[np.ndarray, " running"],
    everyone: Float[np.ndarray, " head"],
    least: float,
) -> tuple[Float[np.ndarray, " running"], Float[np.ndarray, " running"]]:
    """Mean and standard deviation of (3) of `race_heads` for each running head.

    means, errors: (1), infinite where unknown, and the root of (2). everyone: means of all heads, also of those that
    were stopped. least: the variance by which equal heads differ.
    """
    known, finite = everyone[np.isfinite(everyone)], np.isfinite(means)
    if not finite.any():
        return means, errors
    centre, spread = known.mean(), max(least, known.var() - float((errors[finite] ** 2).mean()))
    total = spread + errors**2
    pull = np.divide(spread, total, out=np.ones_like(total), where=total > 0)
    return np.where(finite, centre + pull * (means - centre), np.inf), np.sqrt(pull) * errors


def chances_of_top(
    middle: Float[np.ndarray, " running"], doubts: Float[np.ndarray, " running"], k: int, generator: np.random.Generator
) -> Float[np.ndarray, " running"]:
    """The chance of each head to be among the k best, from draws of normal distributions; none for infinite means."""
    drawn = middle + generator.standard_normal((DRAWS, len(middle))) * doubts
    return ((drawn.argsort(1).argsort(1) < k) & np.isfinite(middle)).mean(0)


class Strata:
    """The cases that unguided clips can be judged on, in strata by their unguided score, and which are run so far."""

    def __init__(self, baseline: Float[Tensor, " case"], seed: int):
        judged = (~baseline.isnan()).nonzero().flatten().numpy()
        ordered = judged[np.argsort(baseline[judged].numpy(), kind="stable")]
        self.count = len(ordered)
        generator = np.random.default_rng(seed)
        parts = max(1, min(STRATA, self.count // STRATUM_CASES))
        self.cases = [generator.permutation(part) for part in np.array_split(ordered, parts)]
        self.taken = [0] * parts
        self.deviations = np.ones(parts)  # of a head's effect within each; equal until seen

    def grow(self, size: int) -> list[int]:
        """Take cases until `size` are taken, and return the new ones."""
        before = list(self.taken)
        shares = np.array([len(part) for part in self.cases]) / self.count
        for _ in range(size - sum(self.taken)):
            gains = [
                -1.0 if n == len(part) else math.inf if n < 2 else (w * d) ** 2 * (1 / n - 1 / (n + 1))
                for part, n, w, d in zip(self.cases, self.taken, shares, self.deviations, strict=True)
            ]
            self.taken[int(np.argmax(gains))] += 1
        return [int(c) for part, a, b in zip(self.cases, before, self.taken, strict=True) for c in part[a:b]]

    def weights(self, count: int) -> Float[Tensor, " case"]:
        """How many cases each case that is run stands for, N_s / n_s; 0 for the others."""
        weights = torch.zeros(count)
        for part, n in zip(self.cases, self.taken, strict=True):
            weights[part[:n]] = len(part) / n
        return weights

    def estimates(
        self, effects: Float[Tensor, "running case"], weights: Float[Tensor, "running case"]
    ) -> tuple[Float[np.ndarray, " running"], Float[np.ndarray, " running"], float]:
        """(1), the root of (2) and the least t^2 of `race_heads`; mean inf, error 0 where a head is seldom judged."""
        values = effects.double().numpy()
        judged: Bool[np.ndarray, "running case"] = ~np.isnan(values)
        counted = np.where(judged, weights.numpy(), 0.0)
        means, variances, least = (counted * np.nan_to_num(values)).sum(1), np.zeros(len(values)), 0.0
        total = counted.sum(1)
        for s, (part, n) in enumerate(zip(self.cases, self.taken, strict=True)):
            run = part[:n]
            own, pooled = variances_within(values[:, run])
            self.deviations[s] = math.sqrt(pooled)
            seen = judged[:, run].sum(1).clip(min=1)
            variances += counted[:, run].sum(1) ** 2 * (own + pooled) / 2 / seen * (1 - n / len(part))
            least += len(part) / self.count**2 * pooled
        often = 2 * judged.sum(1) >= sum(self.taken)
        safe = np.where(total > 0, total, 1.0)
        return np.where(often, means / safe, np.inf), np.where(often, np.sqrt(variances) / safe, 0.0), least


def variances_within(values: Float[np.ndarray, "running case"]) -> tuple[Float[np.ndarray, " running"], float]:
    """Variance over cases of each head about the mean of all on that case, and the mean of these variances.

    A head that has none of its own, being judged on fewer than two cases, takes the mean; 0 where no head has one.
    """
    judged = ~np.isnan(values)
    heads = judged.sum(0).clip(min=1)
    about = np.where(judged, values - np.nansum(values, 0) / heads, 0.0)
    n = judged.sum(1)
    centred = np.where(judged, about - (about.sum(1) / n.clip(min=1))[:, None], 0.0)
    own = (centred**2).sum(1) / (n - 1).clip(min=1) * len(values) / max(1, len(values) - 1)
    pooled = float(own[n > 1].mean()) if (n > 1).any() else 0.0
    return np.where(n > 1, own, pooled), pooled
