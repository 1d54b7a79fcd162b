"""Judging hunted heads on cases that no head was chosen on: beside controls, and one by one.

That selection and confirmation share no case is enforced: every function that judges a choice takes both sets of trials
and raises where they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import Guidance, HeadId, HeadSet, HuntConfig, OtherModel, head_set, require
from physnb.ranking import HeadRanking, check_subject_heads, measure_effects
from physnb.statistics import (
    Estimate,
    benjamini_hochberg,
    bootstrap_mean,
    paired_difference,
    resampled_means,
    sign_flips,
)
from physnb.trials import Trials

METRIC_UNITS = {  # the columns of result tables, in order
    "velocity_error": "units/s",
    "position_error": "units",
    "missing_rate": "share",
    "tracking_error": "units",
}
MOTION = "tracking_error"  # an objective whose judge gives all of them
CFG_TEXT_WEIGHT = 1.0  # the control "CFG": published scale 2
FALSE_DISCOVERY_RATE = 0.1


def require_disjoint(selection: Trials, confirmation: Trials) -> None:
    """Raise ValueError if any case would be used both to choose and to confirm."""
    shared = sorted(set(selection.subject.case_names) & set(confirmation.subject.case_names))
    require(not shared, f"{len(shared)} cases are used both to choose and to confirm, for example {shared[:1]}")


def random_head_sets(heads: HeadSet, k: int, draws: int, seed: int) -> list[HeadSet]:
    """`draws` sets of k heads drawn without replacement: the control for having chosen."""
    require(1 <= k <= len(heads), f"a set of {k} heads cannot be drawn from {len(heads)}")
    generator = np.random.default_rng(seed)
    return [head_set([heads[i] for i in generator.choice(len(heads), k, replace=False)]) for _ in range(draws)]


def layer_heads(heads: HeadSet) -> dict[int, HeadSet]:
    """All heads of every layer."""
    return {layer: tuple(h for h in heads if h.layer == layer) for layer in sorted({h.layer for h in heads})}


def best_layer(selection: Trials, hunt: HuntConfig, cases: Sequence[int] | None = None) -> int:
    """The layer that helps most when broken as a whole, on the selection cases: published PAG, at its best."""
    layers = layer_heads(selection.subject.heads)
    guidances = [hunt.guidance(heads) for heads in layers.values()]
    effects = measure_effects(selection, guidances, cases, label="layers")
    return list(layers)[int(effects.nanmean(1).nan_to_num(nan=torch.inf).argmin())]


def control_arms(
    heads: HeadSet, hunt: HuntConfig, hunted: HeadSet, *, layer: int | None = None, others: Sequence[str] = ()
) -> dict[str, list[Guidance]]:
    """Every method of the final table by name; several guidances are draws to be averaged case by case.

    layer: to break as a whole, by the hunt's perturbation and by SEG (infinite sigma). others: networks to
    steer away from (AutoGuidance). Weight and strength are the hunt's own in every arm, but for CFG.
    """
    k, w = len(hunted), hunt.weight
    arms = {
        "unguided": [Guidance()],
        "CFG": [Guidance(text_weight=CFG_TEXT_WEIGHT)],
        **{f"AutoGuidance {name}": [Guidance(weak=((w, OtherModel(name)),))] for name in others},
        f"{k} random heads": [hunt.guidance(s) for s in random_head_sets(heads, k, hunt.random_draws, hunt.seed)],
        "all heads": [hunt.guidance(heads)],
    }
    if layer is not None:
        whole = layer_heads(heads)[layer]
        arms[f"best layer, L{layer}"] = [hunt.guidance(whole)]
        arms[f"SEG, L{layer}"] = [Guidance.from_heads(whole, w, kind="mean_query")]
    return arms | {f"{k} hunted heads": [hunt.guidance(hunted)]}


@dataclass(frozen=True)
class ArmResult:
    """One method on the confirmation cases: per-case values by metric, and the same of the unguided clips."""

    name: str
    values: dict[str, Float[Tensor, " case"]]
    baseline: dict[str, Float[Tensor, " case"]]

    def estimate(self, metric: str, rows: list[int] | None = None) -> Estimate:
        """Mean over cases (or `rows` of them) with its interval."""
        values = self.values[metric]
        return bootstrap_mean(values if rows is None else values[rows])

    def difference(self, metric: str, rows: list[int] | None = None) -> Estimate:
        """Mean paired difference to unguided; for errors and rates negative is better."""
        pair = self.values[metric], self.baseline[metric]
        return paired_difference(*(pair if rows is None else (v[rows] for v in pair)))

    def to_row(self, rows: list[int] | None = None) -> dict:
        """Estimates and differences of all metrics as one dict, ready for JSON."""
        return dict(method=self.name) | {
            metric: self.estimate(metric, rows).to_dict()
            | {"difference": None if self.name == "unguided" else self.difference(metric, rows).to_dict()}
            for metric in self.values
        }


def metric_units(trials: Trials) -> dict[str, str]:
    """Unit of every column of the final table of a hunt in simulated worlds, its own objective last."""
    objective = trials.subject.objective
    return METRIC_UNITS | {objective.name: objective.unit}


def arm_values(
    trials: Trials,
    guidances: Sequence[Guidance],
    cases: Sequence[int] | None = None,
    metrics: Iterable[str] = METRIC_UNITS,
) -> dict[str, Float[Tensor, " case"]]:
    """Those of `metrics` that the subject's judge gives, and its objective: means over the guidances by case."""
    trials.scores(guidances, cases, label="confirm")  # first: what the judge gives is known from rows
    names = [name for name in metrics if name in trials.score_names()]
    names = dict.fromkeys([*names, trials.subject.objective.name])
    return {name: trials.scores(guidances, cases, name=name, label="confirm").nanmean(0) for name in names}


def confirm(
    selection: Trials,
    confirmation: Trials,
    hunt: HuntConfig,
    hunted: HeadSet,
    *,
    others: Sequence[str] = (),
    beside: Trials | None = None,
) -> list[ArmResult]:
    """The hunted heads beside their controls, on cases never used for choosing; the first result is unguided.

    The best layer is chosen on the selection cases, as the heads were. others: networks that the confirmation's subject
    knows. beside: trials of the same cases with another judge, whose scores join the table: a hunt by any objective
    should show what it does to motion. Raises ValueError if selection and confirmation share a case, if those beside
    are others, or for heads that the model lacks.
    """
    judges = [confirmation] if beside is None else [confirmation, beside]
    for trials in judges:
        require_disjoint(selection, trials)
        same = trials.subject.case_names == confirmation.subject.case_names
        require(same, "the trials beside must have the cases of confirmation, in the same order")
    hunted = check_subject_heads(confirmation, hunted)
    layer = best_layer(selection, hunt)
    arms = control_arms(confirmation.subject.heads, hunt, hunted, layer=layer, others=others)
    every = [guidance for guidances in arms.values() for guidance in guidances]
    for trials in judges:
        trials.scores(every, label="confirm")  # in full batches
    values = {
        name: {metric: value for trials in judges for metric, value in arm_values(trials, guidances).items()}
        for name, guidances in arms.items()
    }
    return [ArmResult(name, found, values["unguided"]) for name, found in values.items()]


@dataclass(frozen=True)
class HeadVerdict:
    """One chosen head: what it promised on the selection cases, and what it did alone on fresh ones.

    gap: fresh minus promised, the winner's curse where above 0, with its interval. p: sign-flip test that the mean on
    fresh cases is below 0; q: its Benjamini-Hochberg value over the heads chosen; confirmed: q at or below the false
    discovery rate.
    """

    head: HeadId
    promised: Estimate
    fresh: Estimate
    gap: Estimate
    p: float
    q: float

    @property
    def confirmed(self) -> bool:
        return self.q <= FALSE_DISCOVERY_RATE

    def to_row(self) -> dict:
        """As one dict, ready for JSON."""
        estimates = {name: getattr(self, name).to_dict() for name in ("promised", "fresh", "gap")}
        return dict(head=str(self.head)) | estimates | dict(p=self.p, q=self.q, confirmed=self.confirmed)


def confirm_heads(
    selection: Trials, confirmation: Trials, ranking: HeadRanking, hunt: HuntConfig, heads: Sequence[HeadId]
) -> list[HeadVerdict]:
    """Each chosen head alone on the confirmation cases, in the order given.

    Over many hunts no more than FALSE_DISCOVERY_RATE of the confirmed heads are false ones, since no case that chose
    them judges them. ranking: of every head alone, the first round of a hunt.
    Raises ValueError if the two sets of trials share a case, and for heads or a ranking that promise nothing alone.
    """
    require_disjoint(selection, confirmation)
    heads = tuple(heads)
    require(len(heads) > 0, "there is no head to confirm")
    require(not ranking.kept, "the ranking is of heads broken together with others; give a hunt's first, Hunt.ranking")
    unranked = [str(head) for head in heads if head not in ranking.heads]
    require(not unranked, f"nothing was promised of {', '.join(unranked)}: the ranking lacks them; rank them first")
    effects = measure_effects(confirmation, [hunt.guidance((head,)) for head in heads], label="heads")
    alone, _ = sign_flips(effects)
    verdicts = []
    for head, fresh, p, q in zip(heads, effects, alone, benjamini_hochberg(alone), strict=True):
        chosen, weights = ranking.of(head)
        gap = mean_gap(chosen, fresh, weights)
        verdicts.append(HeadVerdict(head, ranking.estimate(head), bootstrap_mean(fresh), gap, float(p), float(q)))
    return verdicts


def mean_gap(
    chosen: Float[Tensor, " case"], fresh: Float[Tensor, " case"], weights: Float[Tensor, " case"] | None = None
) -> Estimate:
    """Mean of `fresh` minus (weighted) mean of `chosen`, of different cases, with its 95 % bootstrap interval."""
    promised, drawn_promised = resampled_means(chosen, weights, seed=1)
    found, drawn_found = resampled_means(fresh)
    if np.isnan(promised) or np.isnan(found):
        return Estimate(np.nan, np.nan, np.nan, 0, len(fresh))
    low, high = np.quantile(drawn_found - drawn_promised, [0.025, 0.975])
    return Estimate(found - promised, float(low), float(high), int((~fresh.isnan()).sum()), len(fresh))
