"""What each head adds to a set that is broken together: what is lost without it, and its Shapley value.

With v(S) the effect of guidance away from the heads S (objective minus unguided, negative helps):

    alone             v({i})
    leave one out     v(N) - v(N without i)
    Shapley           mean over orders of the set of v(heads up to i) - v(heads before i)     (Shapley 1953)

The three differ where heads do the same work (each looks dispensable) or need each other (none does it alone). Shapley
values sum to v(N), in every order and so for every sample of orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import HeadSet, HuntConfig, head_set, require
from physnb.ranking import check_subject_heads, measure_effects
from physnb.statistics import RESAMPLES, Estimate, bootstrap_mean
from physnb.trials import Trials


@dataclass(frozen=True)
class Contributions:
    """Effects case by case, negative is better; the first axis of marginals is the sampled order."""

    heads: HeadSet
    together: Float[Tensor, " case"]
    alone: Float[Tensor, "head case"]
    leave_one_out: Float[Tensor, "head case"]
    marginals: Float[Tensor, "order head case"]

    def shapley(self) -> list[Estimate]:
        """Mean marginal contribution of every head, with an interval over cases and orders."""
        return [both_ways_mean(self.marginals[:, number]) for number in range(len(self.heads))]

    def to_rows(self) -> list[dict]:
        """One dict a head: the three estimates."""
        columns = zip(self.heads, self.alone, self.leave_one_out, self.shapley(), strict=True)
        return [
            dict(
                head=str(head),
                alone=bootstrap_mean(alone).to_dict(),
                leave_one_out=bootstrap_mean(without).to_dict(),
                shapley=shapley.to_dict(),
            )
            for head, alone, without, shapley in columns
        ]


def sampled_orders(count: int, orders: int, seed: int = 0) -> list[list[int]]:
    """`orders` permutations of range(count), each followed by its reverse: their errors partly cancel.

    Antithetic sampling after Mitchell et al. 2022, "Sampling permutations for Shapley value estimation".
    """
    require(count > 0, "there is no head in the set")
    require(orders >= 2 and orders % 2 == 0, f"orders come in pairs; give an even number of at least 2, got {orders}")
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(count).tolist() for _ in range(orders // 2)]
    return [order for forward in drawn for order in (forward, forward[::-1])]


def measure_contributions(
    trials: Trials,
    hunt: HuntConfig,
    heads: HeadSet,
    *,
    orders: int = 6,
    cases: Sequence[int] | None = None,
    seed: int = 0,
) -> Contributions:
    """Alone, leave-one-out and Shapley contributions of the heads of one set, all from the same cases and noise.

    About orders x heads sets are measured, each set once whatever the number of orders that pass it.
    Raises ValueError for heads that the model lacks and for an odd number of orders.
    """
    heads = check_subject_heads(trials, heads)
    sequences = sampled_orders(len(heads), orders, seed)
    everyone = frozenset(range(len(heads)))
    sets = {frozenset(), everyone}
    sets |= {frozenset({number}) for number in everyone} | {everyone - {number} for number in everyone}
    sets |= {frozenset(order[:count]) for order in sequences for count in range(len(order))}
    wanted = sorted((s for s in sets if s), key=sorted)
    guidances = [hunt.guidance(head_set([heads[number] for number in chosen])) for chosen in wanted]
    effects = measure_effects(trials, guidances, cases, label="contributions")
    value = dict(zip(wanted, effects, strict=True)) | {frozenset(): torch.zeros_like(effects[0])}
    marginals = torch.empty(len(sequences), len(heads), effects.shape[1])
    for row, order in zip(marginals, sequences, strict=True):
        for place, number in enumerate(order):
            row[number] = value[frozenset(order[: place + 1])] - value[frozenset(order[:place])]
    return Contributions(
        heads,
        value[everyone],
        torch.stack([value[frozenset({number})] for number in range(len(heads))]),
        torch.stack([value[everyone] - value[everyone - {number}] for number in range(len(heads))]),
        marginals,
    )


def both_ways_mean(values: Float[Tensor, "order case"], seed: int = 0) -> Estimate:
    """Mean over orders and cases with a 95 % interval that resamples both (pigeonhole bootstrap, Owen 2007).

    Orders are resampled in the pairs that they were drawn in. A case that could not be judged in any order is left out.
    Errs on the side of width: it never covers less than resampling cases alone.
    """
    table = np.asarray(values, dtype=np.float64)
    pairs = table.reshape(-1, 2, table.shape[1]).mean(1)  # NaN where either order could not be judged
    known = ~np.isnan(pairs).any(0)
    if not known.any():
        return Estimate(np.nan, np.nan, np.nan, 0, table.shape[1])
    pairs = pairs[:, known]
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(pairs), (RESAMPLES, len(pairs)))
    columns = generator.integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    drawn = [pairs[r][:, c].mean() for r, c in zip(rows, columns, strict=True)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(pairs.mean()), float(low), float(high), int(known.sum()), table.shape[1])
