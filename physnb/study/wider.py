"""The second study: what the first one left open, with a wider choice and on cases that no part of it has seen.

The first chose among sets that were broken by identity, at full strength. Here the heads that help however they are
broken may be broken in any form; they, and every control, may choose weight, strength, run of steps and a single step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from physnb.config import Guidance, HeadSet, OtherModel, head_set
from physnb.confirm import ArmResult, arm_values, best_layer, layer_heads, require_disjoint
from physnb.metrics.trajectory import training_pull
from physnb.ranking import rank_heads
from physnb.statistics import bootstrap_mean, paired_difference
from physnb.study.final import (
    HUNTED,
    METRICS,
    Chosen,
    Draws,
    Key,
    arm_rows,
    arms_of,
    best_of,
    best_setting,
    bounds,
    measure,
    random_as,
    shared_rows,
)
from physnb.study.plan import (
    FORMS,
    INTERVALS,
    MOTION,
    SECOND_SEED,
    SECOND_SIZES,
    SECOND_STEPS,
    SECOND_WEIGHTS,
    Form,
)
from physnb.study.subject import MOTION_JUDGE, Study, generate_trial
from physnb.trials import Trials

ONE_STEP, FIRST = "unguided, one step", "best set of the first study"
Method = Callable[[float, float], Draws]  # of weight w and strength u


class Setting(NamedTuple):
    """What every method may choose."""

    steps: int
    weight: float
    strength: float
    interval: str

    def __str__(self) -> str:
        when = "one step" if self.steps == SECOND_STEPS else self.interval
        return f"w = {self.weight:g}, u = {self.strength:g}, {when}"


class Arm(NamedTuple):
    """A method at a setting: in how many steps, and away from what."""

    steps: int
    draws: Draws


def second_trials(study: Study, part: str, steps: int, split: str | None = None) -> Trials:
    """The second study's cases, twice as many as the first one had, with noise of their own; none is of the first."""
    hunt = study.plan.hunt
    count = study.plan.inside_cases if split == "id" else 2 * hunt.confirmation_cases
    own = study.plan.hunt_with(
        seed=SECOND_SEED, steps=steps, selection_cases=2 * hunt.selection_cases, confirmation_cases=count
    )
    trials = study.trials(part, MOTION, hunt=own, split=split, judge=MOTION_JUDGE)
    require_disjoint(study.trials("selection"), trials)
    return trials


def measure_steps(study: Study, part: str, arms: Mapping[Key, Arm], split: str | None = None) -> dict[Key, ArmResult]:
    """Every score of every arm beside unguided clips in the usual number of steps, from the same noise."""
    unguided = arm_values(second_trials(study, part, study.plan.hunt.steps, split), [Guidance()], None, METRICS)
    found: dict[Key, ArmResult] = {}
    for steps in dict.fromkeys(arm.steps for arm in arms.values()):
        own = {key: arm.draws for key, arm in arms.items() if arm.steps == steps}
        found |= measure(second_trials(study, part, steps, split), own)
    return {key: replace(found[key], baseline=unguided) for key in arms}


def heads_of_all_forms(study: Study) -> HeadSet:
    """All heads, best first, by the mean of their effects on motion over every form of breaking: the first study's."""
    trials = study.trials("selection", MOTION)
    rankings = [rank_heads(trials, study.guide(form), cases=study.map_cases) for form in FORMS]
    means = torch.stack([ranking.effects.nanmean(1) for ranking in rankings]).nanmean(0)
    return tuple(rankings[0].heads[i] for i in means.nan_to_num(nan=torch.inf).argsort(stable=True).tolist())


def hunted_methods(study: Study) -> dict[str, Method]:
    """The best 1, 2, 4 and 8 heads of all forms, broken in every form."""
    order = heads_of_all_forms(study)
    return {
        f"{HUNTED}{k}, {form}": broken(head_set(order[:k]), form)
        for k in SECOND_SIZES if k <= study.plan.hunt.top_k
        for form in FORMS
    }  # fmt: skip


def broken(heads: HeadSet, form: Form) -> Method:
    """Guidance away from these heads, broken in this form."""
    return lambda w, u: (Guidance.from_heads(heads, w, u, kind=form.kind, axis=form.axis),)


def controls(study: Study) -> dict[str, Method]:
    """The other methods; those that break heads may break them weakly too."""
    trials = second_trials(study, "selection", study.plan.hunt.steps)
    layer = best_layer(trials, study.plan.hunt)
    whole = layer_heads(trials.subject.heads)[layer]
    found = {f"PAG, L{layer}": broken(whole, Form("identity")), f"SEG, L{layer}": broken(whole, Form("mean_query"))}
    found["CFG"] = lambda w, u: (Guidance(text_weight=w),)
    for name in study.others:
        found[f"AutoGuidance, {name}"] = lambda w, u, name=name: (Guidance(weak=((w, OtherModel(name)),)),)
    return found


def settings_of(study: Study, method: Method) -> dict[Setting, Arm]:
    """A method at every weight and strength in every run of the usual steps, and in one step; nothing twice."""
    whole, *others = INTERVALS
    runs = [(study.plan.hunt.steps, name) for name in (whole, *others)] + [(SECOND_STEPS, whole)]
    arms: dict[Arm, Setting] = {}
    for (steps, interval), w, u in itertools.product(runs, SECOND_WEIGHTS, sorted(study.plan.strengths, reverse=True)):
        draws = tuple(replace(guidance, **bounds(interval)) for guidance in method(w, u))
        arms.setdefault(Arm(steps, draws), Setting(steps, w, u, interval))
    return {setting: arm for arm, setting in arms.items()}


def choose_wider(study: Study) -> list[tuple[Chosen, Setting]]:
    """Every control, and the hunted set that did best at the hunt's own setting, each at its best setting."""
    hunt, found = study.plan.hunt, []
    hunted = hunted_methods(study)
    plain = {name: Arm(hunt.steps, method(hunt.weight, hunt.strength)) for name, method in hunted.items()}
    leading = best_setting(measure_steps(study, "selection", plain))
    for name, method in ({leading: hunted[leading]} | controls(study)).items():
        settings = settings_of(study, method)
        arms = measure_steps(study, "selection", settings)
        best = best_setting(arms)
        found.append((Chosen(name, str(best), settings[best].draws, arms[best].difference(MOTION)), best))
    return found


def arms_of_second(study: Study) -> tuple[dict[str, Arm], list[Chosen], dict[str, str]]:
    """All methods as chosen, beside what they have to beat; what was chosen; the role of each that has one."""
    found = study.cached("wider", choose_wider)
    chosen, steps = [c for c, _ in found], {c.name: setting.steps for c, setting in found}
    best, control = (best_of(chosen, hunted) for hunted in (True, False))
    usual = study.plan.hunt.steps
    arms = {"unguided": Arm(usual, (Guidance(),)), ONE_STEP: Arm(SECOND_STEPS, (Guidance(),))}
    arms |= {c.name: Arm(steps[c.name], c.draws) for c in chosen}
    first, *_, name, _ = arms_of(study)
    arms[FIRST] = Arm(usual, first[name])
    random = random_as(study, best.draws[0], SECOND_SEED)
    as_best = f"{len(random[0].weak[0][1].heads)} random, as best"
    arms[as_best] = Arm(steps[best.name], random)
    roles = {best.name: "best set", control.name: "best control", as_best: "random"}
    return arms, chosen, roles | {ONE_STEP: "one step", FIRST: "first best set"}


def wider(study: Study) -> list[dict]:
    """Every method at its best setting, out of distribution, on cases that nothing was chosen on."""
    arms, chosen, roles = arms_of_second(study)
    return second_rows(study, arms, chosen, roles)


def wider_id(study: Study) -> list[dict]:
    """The same methods and settings in distribution: the price."""
    arms, chosen, roles = arms_of_second(study)
    return second_rows(study, arms, chosen, roles, split="id")


def second_rows(study: Study, arms: dict[str, Arm], chosen: list[Chosen], roles: dict, split: str | None = None):
    """The rows of `arm_rows` on the second study's confirmation cases."""
    found = measure_steps(study, "confirmation", arms, split)
    return arm_rows(found, {name: arm.draws for name, arm in arms.items()}, chosen, roles)


def pull(study: Study) -> list[dict]:
    """What guidance does to speeds that lie outside those of training, and to motion on the frames that both show.

    One row for unguided clips and for every method with a role; several draws by their first. slow, fast: the pull of
    `training_pull`, and its paired difference to unguided. shared: as in the final table.
    """
    arms, _, roles = arms_of_second(study)
    trials = {s: second_trials(study, "confirmation", s) for s in (study.plan.hunt.steps, SECOND_STEPS)}
    usual = trials[study.plan.hunt.steps]
    cases, given = usual.subject.cases, usual.subject.frames_given
    plain = generate_trial(usual, Guidance())
    unguided = training_pull(plain, cases, frames_given=given)
    rows = [dict(method="unguided", role="unguided") | {k: bootstrap_mean(v).to_dict() for k, v in unguided.items()}]
    for name, role in roles.items():
        made = generate_trial(trials[arms[name].steps], arms[name].draws[0])
        row = dict(method=name, role=role)
        for side, values in training_pull(made, cases, frames_given=given).items():
            difference = paired_difference(values, unguided[side])
            row[side] = bootstrap_mean(values).to_dict() | dict(difference=difference.to_dict())
        rows.append(row | dict(shared=shared_rows(made, plain, usual)))
    return rows
