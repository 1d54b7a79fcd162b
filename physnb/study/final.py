"""The parts of the study that choose the best head set on the selection cases and judge it on others, beside controls.

Every method may choose its weight and its run of sampling steps, with the same choices, by the velocity error of discs
that are there; a setting that loses discs may not be chosen. What was chosen is measured once, on fresh cases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from physnb.config import Guidance, HeadSet, LayerSkip, OtherModel
from physnb.confirm import ArmResult, arm_values, best_layer, layer_heads, random_head_sets, require_disjoint
from physnb.data import Clip
from physnb.metrics.trajectory import shared_motion
from physnb.statistics import Estimate, bootstrap_mean, paired_difference, relative_difference
from physnb.strength import RESTORED_UNITS, SURFACE_UNITS
from physnb.study.plan import INTERVALS, LOSS_MARGIN, MIXED, MOTION, PLAIN, PRESENCE
from physnb.study.subject import Study, generate_trial
from physnb.trials import Trials

METRICS = tuple(RESTORED_UNITS | SURFACE_UNITS)
Draws = tuple[Guidance, ...]  # guidances whose scores are averaged case by case: several random head sets
Method = Callable[[float], Draws]  # of a weight
Key = TypeVar("Key", bound=Hashable)
HUNTED = "hunted: "  # how the names of hunted head sets begin; all other methods are controls


@dataclass(frozen=True)
class Chosen:
    """A method at the setting that did best on the selection cases."""

    name: str
    setting: str
    draws: Draws
    promised: Estimate


def hunted_sets(study: Study) -> dict[str, HeadSet]:
    """The candidates for the best head set, all found on the selection cases."""
    k = study.plan.hunt.top_k
    found = {}
    for objective, name in ((MIXED, "tracking"), (MOTION, "motion")):
        ranking = study.ranking(objective)
        found[f"{HUNTED}1 by {name}"] = ranking.top(1)
        found[f"{HUNTED}{k} by {name}"] = ranking.top(k)
    found[f"{HUNTED}{k} by plain tracking error"] = study.ranking(PLAIN).top(k)
    return found | {f"{HUNTED}{k} by tracking, in rounds": study.rounds(MIXED).heads}


def methods(study: Study) -> dict[str, Method]:
    """Every method of the final tables, by its name: what it does at a weight."""
    hunt, every = study.plan.hunt, study.trials("selection").subject.heads
    layer = best_layer(study.trials("selection", MOTION), hunt, study.map_cases)
    whole, k = layer_heads(every)[layer], hunt.top_k
    random = random_head_sets(every, k, study.plan.draws, hunt.seed)
    guided = {name: lambda w, heads=heads: (hunt.guidance(heads, w),) for name, heads in hunted_sets(study).items()}
    guided |= {
        f"{k} random heads": lambda w: tuple(hunt.guidance(heads, w) for heads in random),
        "all heads": lambda w: (hunt.guidance(every, w),),
        f"PAG, L{layer}": lambda w: (hunt.guidance(whole, w),),
        f"SEG, L{layer}": lambda w: (Guidance.from_heads(whole, w, kind="mean_query"),),
        f"skip, L{layer}": lambda w: (Guidance(weak=((w, LayerSkip((layer,))),)),),
        "CFG": lambda w: (Guidance(text_weight=w),),
    }
    for name in study.others:
        guided[f"AutoGuidance, {name}"] = lambda w, name=name: (Guidance(weak=((w, OtherModel(name)),)),)
    return guided


def settings_of(method: Method, weights: Sequence[float], intervals: Sequence[str]) -> dict[tuple[float, str], Draws]:
    """A method at some weights, in some of INTERVALS."""
    return {
        (w, interval): tuple(replace(guidance, **bounds(interval)) for guidance in method(w))
        for w in weights
        for interval in intervals
    }


def bounds(interval: str) -> dict[str, float]:
    """Start and stop of an interval."""
    return dict(zip(("start", "stop"), INTERVALS[interval], strict=True))


def measure(trials: Trials, arms: Mapping[Key, Draws], cases: Sequence[int] | None = None) -> dict[Key, ArmResult]:
    """Every score of every arm on some cases, draws averaged, beside the unguided clips of the same noise."""
    trials.scores([Guidance(), *dict.fromkeys(g for draws in arms.values() for g in draws)], cases, label="final")
    baseline = arm_values(trials, [Guidance()], cases, METRICS)
    return {
        key: ArmResult(str(key), arm_values(trials, draws, cases, METRICS), baseline) for key, draws in arms.items()
    }


def choose_settings(study: Study) -> list[Chosen]:
    """Each method at its best setting on the selection cases: first the weight, over all steps, then the steps."""
    trials, cases, (whole, *others) = study.trials("selection", MOTION), study.choice_cases, INTERVALS
    found = []
    for name, method in methods(study).items():
        settings = settings_of(method, study.plan.weights, [whole])
        arms = measure(trials, settings, cases)
        weight, _ = best_setting(arms)
        more = settings_of(method, [weight], others)
        arms, settings = arms | measure(trials, more, cases), settings | more
        weight, interval = best = best_setting(arms)
        promised = arms[best].difference(MOTION)
        found.append(Chosen(name, f"w = {weight:g}, {interval}", settings[best], promised))
    return found


def best_setting(arms: Mapping[Key, ArmResult]) -> Key:
    """The setting with the lowest velocity error among those that lose no discs; if all do, that with fewest lost."""
    lost = {setting: arm.difference(PRESENCE).mean for setting, arm in arms.items()}
    allowed = [setting for setting in arms if lost[setting] <= LOSS_MARGIN] or [min(lost, key=lost.get)]
    return min(allowed, key=lambda setting: arms[setting].difference(MOTION).mean)


def best_of(chosen: Sequence[Chosen], hunted: bool) -> Chosen:
    """The hunted set, or the control, that promised most on the selection cases."""
    return min((c for c in chosen if c.name.startswith(HUNTED) == hunted), key=lambda c: c.promised.mean)


def arms_of(study: Study) -> tuple[dict[str, Draws], list[Chosen], str, str]:
    """All methods as chosen, random heads at the best set's setting, and the names of best set and best control."""
    chosen = study.cached("chosen", choose_settings)
    best, control = best_of(chosen, hunted=True), best_of(chosen, hunted=False)
    arms = {"unguided": (Guidance(),)} | {c.name: c.draws for c in chosen}
    random = random_as(study, best.draws[0], study.plan.hunt.seed + 1)
    arms[f"{len(random[0].weak[0][1].heads)} random, as best"] = random
    return arms, chosen, best.name, control.name


def random_as(study: Study, best: Guidance, seed: int) -> Draws:
    """Guidance away from as many heads as `best` breaks, in its form and at its setting, but drawn at random."""
    ((weight, weak),) = best.weak
    every = study.trials("selection").subject.heads
    draws = random_head_sets(every, len(weak.heads), study.plan.draws, seed)
    return tuple(replace(best, weak=((weight, replace(weak, heads=heads)),)) for heads in draws)


def judge_arms(study: Study, trials: Trials) -> list[dict]:
    """The rows of `arm_rows` on all cases of `trials`, the best set against random heads and the best control.

    shared: of these three, both errors on the frames where the guided clip and the unguided one show the disc, so that
    neither is judged on harder ones; the first draw.
    """
    require_disjoint(study.trials("selection"), trials)
    arms, chosen, best, control = arms_of(study)
    random = next(name for name in arms if name.endswith("random, as best"))
    roles = {best: "best set", control: "best control", random: "random"}
    rows = arm_rows(measure(trials, arms), arms, chosen, roles)
    plain = generate_trial(trials, Guidance())
    for row in rows:
        if row["role"]:
            row |= dict(shared=shared_rows(generate_trial(trials, arms[row["method"]][0]), plain, trials))
    return rows


def arm_rows(
    found: Mapping[str, ArmResult], arms: Mapping[str, Draws], chosen: Sequence[Chosen], roles: Mapping[str, str]
) -> list[dict]:
    """One row a method: its scores, its setting and what it promised where it was chosen, its role.

    relative: difference to unguided as a share of the unguided error. against: of the best set, the paired difference
    to every method with another role.
    """
    settings, rows = {c.name: c for c in chosen}, []
    for name, arm in found.items():
        row = arm.to_row() | dict(setting=settings[name].setting if name in settings else "", role=roles.get(name, ""))
        if name in settings:
            row |= dict(promised=settings[name].promised.to_dict(), heads=heads_text(arms[name]))
        if name != "unguided":
            row |= dict(relative={m: relative_or_none(arm, m) for m in (MOTION, MIXED, PRESENCE)})
        if roles.get(name) == "best set":
            row |= {
                f"against {other}": {m: paired_difference(arm.values[m], found[other].values[m]).to_dict()
                                     for m in (MOTION, MIXED, PRESENCE)}
                for other in roles if other != name
            }  # fmt: skip
        rows.append(row)
    return rows


def heads_text(draws: Draws) -> str:
    """The broken heads of a method that has one set of them."""
    heads = [getattr(weak, "heads", ()) for guidance in draws for _, weak in guidance.weak]
    return ", ".join(map(str, heads[0])) if len(heads) == 1 and len(heads[0]) <= 8 else ""


def relative_or_none(arm: ArmResult, metric: str) -> dict | None:
    """The difference as a share of the unguided error; None where that is 0."""
    unguided = arm.baseline[metric].nanmean()
    return relative_difference(arm.values[metric], arm.baseline[metric]).to_dict() if unguided > 0 else None


def shared_rows(made: Clip, plain: Clip, trials: Trials) -> dict[str, dict]:
    """Errors on the frames that both clips show, as differences to unguided and as a share of it."""
    subject = trials.subject
    found = shared_motion(made, plain, subject.cases, frames_given=subject.frames_given)
    rows = {}
    for name, (mine, theirs) in found.items():
        known = bool((~torch.isnan(mine - theirs)).any())
        rows[name] = bootstrap_mean(mine).to_dict() | dict(difference=paired_difference(mine, theirs).to_dict())
        rows[name] |= dict(relative=relative_difference(mine, theirs).to_dict() if known else None)
    return rows


def final(study: Study) -> list[dict]:
    """Every method at its best setting, out of distribution, on cases that nothing was chosen on."""
    return judge_arms(study, study.trials("confirmation", MOTION))


def final_id(study: Study) -> list[dict]:
    """The same methods and settings in distribution: the price."""
    hunt = study.plan.hunt_with(confirmation_cases=study.plan.inside_cases)
    return judge_arms(study, study.trials("confirmation", MOTION, hunt=hunt, split="id"))
