"""What guiding away from each head does: every head on the same cases and the same noise, compared with no guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from physnb.config import Guidance, HeadId, HeadSet, head_set, require
from physnb.objectives import Objective
from physnb.statistics import Estimate, bootstrap_mean, sign_flips
from physnb.trials import Trials

Guide = Callable[[HeadSet], Guidance]  # the trial of a head set: `HuntConfig.guidance`


@dataclass(frozen=True)
class HeadRanking:
    """Effect of guiding away from each head: objective minus unguided, per case, turned so that negative is better.

    effects[i] belongs to heads[i]; NaN where a case could not be judged, or where a race saved it. kept: heads of
    earlier rounds, broken together with each. weights: how many cases each row stands for, where a race drew some
    sooner than others; None where all count alike. Leaves out how heads act together, and the luck of the best.
    """

    heads: HeadSet
    effects: Float[Tensor, "head case"]
    objective: Objective
    kept: HeadSet = ()
    weights: Float[Tensor, "head case"] | None = None

    @property
    def label(self) -> str:
        """What the effects are, for an axis: `tracking error minus unguided (units)`."""
        name, unit = self.objective.name.replace("_", " "), f" ({self.objective.unit})" if self.objective.unit else ""
        return f"{name} minus unguided{unit}" if self.objective.lower_is_better else f"unguided minus {name}{unit}"

    @property
    def means(self) -> Float[Tensor, " head"]:
        """Mean effect of every head over all cases that could be judged, NaN where none could."""
        if self.weights is None:
            return self.effects.nanmean(1)
        weights = self.weights.where(~self.effects.isnan(), 0.0)
        return (weights * self.effects.nan_to_num()).sum(1) / weights.sum(1)

    def estimate(self, head: HeadId) -> Estimate:
        """Mean effect of one head with its interval over cases."""
        effects, weights = self.of(head)
        return bootstrap_mean(effects, weights=weights)

    def of(self, head: HeadId) -> tuple[Float[Tensor, " case"], Float[Tensor, " case"] | None]:
        """Effects of one head, and what each counts for."""
        row = self.heads.index(head)
        return self.effects[row], None if self.weights is None else self.weights[row]

    def order(self) -> HeadSet:
        """All heads, most helpful first; those that no case could judge come last."""
        means = self.means.nan_to_num(nan=math.inf)
        return tuple(self.heads[i] for i in torch.argsort(means, stable=True).tolist())

    def top(self, k: int) -> HeadSet:
        """The k heads that help most, as a head set."""
        require(1 <= k <= len(self.heads), f"top k must be in [1, {len(self.heads)}], got {k}")
        return head_set(self.order()[:k])

    def layer_map(self) -> Float[Tensor, "layer head"]:
        """Mean effects as a layer x head table."""
        return head_table(dict(zip(self.heads, self.means, strict=True)), self.heads)

    def to_rows(self) -> list[dict]:
        """One dict a head, most helpful first: head, estimate, and p of a mean below 0, alone and for all heads.

        The p values are `statistics.sign_flips`; where a race saved cases they are of those that were run, which were
        not fixed beforehand, so they describe and do not prove: that is what confirmation is for.
        """
        counted = self.effects if self.weights is None else self.effects * self.weights
        rows = {
            head: dict(head=str(head)) | self.estimate(head).to_dict() | dict(p=float(p), p_all_heads=float(corrected))
            for head, p, corrected in zip(self.heads, *sign_flips(counted), strict=True)
        }
        return [rows[head] for head in self.order()]


def head_table(values: Mapping[HeadId, float], heads: HeadSet) -> Float[Tensor, "layer head"]:
    """One number a head as a layer x head table as large as `heads` need, NaN where there is none."""
    shape = (max(head.layer for head in heads) + 1, max(head.head for head in heads) + 1)
    table = torch.full(shape, torch.nan)
    for head, value in values.items():
        table[head.layer, head.head] = value
    return table


def effects_so_far(trials: Trials, guide: Guide, heads: HeadSet) -> HeadRanking:
    """The ranking of heads alone from the rows that are there, NaN where there is none yet."""
    found, name, sign = trials.found, trials.subject.objective.name, trials.subject.objective.sign
    baseline = found.get(Guidance(), {})
    effects = torch.full((len(heads), len(trials.cases)), torch.nan)
    for row, head in zip(effects, heads, strict=True):
        for case, scores in found.get(guide((head,)), {}).items():
            if case in baseline:
                row[case] = sign * (scores[name] - baseline[case][name])
    return HeadRanking(heads, effects, trials.subject.objective)


def check_subject_heads(trials: Trials, heads: Sequence[HeadId] | None) -> HeadSet:
    """`heads`, or all of the subject; raises ValueError naming the first that it lacks."""
    known = trials.subject.heads
    heads = known if heads is None else head_set(heads)
    for head in heads:
        last = max(h.layer for h in known), max(h.head for h in known)
        require(
            head in known, f"head {head} does not exist: the model has layers 0 to {last[0]} with heads 0 to {last[1]}"
        )
    return heads


def measure_effects(
    trials: Trials, guidances: Sequence[Guidance], cases: Sequence[int] | None = None, label: str = "trials"
) -> Float[Tensor, "trial case"]:
    """Objective of each trial minus that of no guidance, case by case, turned so that negative is better.

    NaN where either could not be judged; throughout, where that is so of more than half of the cases that the unguided
    clips could be judged on: a mean over the few that are left would say little, and absence must not win.
    Raises ValueError where no case of any trial could be judged both with and without guidance.
    """
    baseline, *values = trials.scores([Guidance(), *guidances], cases, label=label)
    effects = trials.subject.objective.sign * (torch.stack(values) - baseline)
    require_judged(trials, len(guidances) == 0 or not bool(effects.isnan().all()))
    return often_judged(effects, (~baseline.isnan()).sum())


def often_judged(effects: Float[Tensor, "trial case"], cases: Int[Tensor, "*trial"]) -> Float[Tensor, "trial case"]:
    """The effects, NaN throughout for trials that could be judged on fewer than half of their `cases`."""
    judged = (~effects.isnan()).sum(1, keepdim=True)
    return torch.where(2 * judged >= cases, effects, torch.nan)


def require_judged(trials: Trials, judged: bool) -> None:
    """Raise ValueError unless something was judged both with and without guidance."""
    require(
        judged,
        f"objective {trials.subject.objective.name} could not be judged both with and without guidance on any case; "
        "choose another objective or other cases",
    )


def rank_heads(
    trials: Trials,
    guide: Guide,
    heads: Sequence[HeadId] | None = None,
    *,
    kept: HeadSet = (),
    cases: Sequence[int] | None = None,
) -> HeadRanking:
    """The effect of every head, broken together with `kept`, on `cases` (default: all); `kept` ones are left out."""
    pool = tuple(head for head in check_subject_heads(trials, heads) if head not in kept)
    require(len(pool) > 0, "no head is left to rank")
    effects = measure_effects(trials, [guide(head_set((*kept, head))) for head in pool], cases, label="hunt")
    return HeadRanking(pool, effects, trials.subject.objective, kept)
