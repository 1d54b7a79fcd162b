"""The parts of the study that look for heads and ask how far the choice goes: each makes one table.

Every part is a function of the Study alone and gives the rows of its table; what parts share is measured once.
`physnb.study.final` has those that judge the best head set.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.analysis import attention_maps, object_following
from physnb.config import Guidance, HeadSet, head_set
from physnb.confirm import arm_values, confirm_heads
from physnb.contributions import measure_contributions
from physnb.metrics.features import Trajectory
from physnb.metrics.frechet import kernel_distance
from physnb.profiles import cases_by_scenario, first_cases
from physnb.ranking import rank_heads
from physnb.search import head_names
from physnb.statistics import Overlap, bootstrap_mean, paired_difference, rank_agreement
from physnb.strength import effects_of, interval_grid, measure_arms, weight_grid
from physnb.study.plan import FORMS, LIKELIHOOD, MIXED, MOTION, OBJECTIVES, PLACE, PRESENCE
from physnb.study.subject import MOTION_JUDGE, Study, generate_trial
from physnb.transfer import Condition, measure_transfer, scenario_conditions

KERNEL_GROUP = 12  # clips of one kernel distance: it has no bias from few
COARSE_BEST = head_set("L2H0")  # the best head of the model that this one was grown from
JUDGED = (MOTION, MIXED, PLACE, PRESENCE)  # what the effect of a head set is told in


def maps(study: Study) -> list[dict]:
    """Every head alone, in every form of breaking, by every objective: effects on the selection cases."""
    rows = []
    for form in FORMS:
        for objective in OBJECTIVES:
            ranking = study.ranking(objective, form)
            shared = dict(form=str(form), objective=objective)
            rows += [shared | dict(head=str(head), **ranking.estimate(head).to_dict()) for head in ranking.heads]
    return rows


def kinds(study: Study) -> list[dict]:
    """How far the ways to break heads agree on which help; `halves`: one with itself on other cases, the ceiling."""
    cases, rows = study.map_cases, []
    for objective in (MIXED, MOTION):
        trials = study.trials("selection", objective)
        found = {form: rank_heads(trials, study.guide(form), cases=cases).effects for form in FORMS}
        for first, second in itertools.combinations(FORMS, 2):
            agreement = rank_agreement(found[first], found[second])
            rows.append(dict(objective=objective, first=str(first), second=str(second), agreement=agreement.to_dict()))
        whole = study.ranking(objective).effects
        halves = rank_agreement(whole[:, ::2], whole[:, 1::2], paired=False)
        rows.append(dict(objective=objective, first=str(FORMS[0]), second="halves", agreement=halves.to_dict()))
    return rows


def objective_effects(study: Study) -> dict[str, Float[Tensor, "head case"]]:
    """Effects of all heads on the selection cases by every objective, likelihood and the kernel distance among them."""
    found = {name: study.ranking(name).effects for name in OBJECTIVES}
    found[LIKELIHOOD] = rank_heads(study.by_likelihood, study.guide(), cases=study.map_cases).effects  # the dearest
    return found | dict(kernel_distance=kernel_effects(study))


def kernel_effects(study: Study) -> Float[Tensor, "head group"]:
    """Kernel distance of guided clips to true ones of other cases minus that of unguided ones, in groups of cases.

    The Frechet distance's relative without its bias from few clips, on the paths of the discs: a group of cases is to a
    distance between sets what a case is to a metric of clips.
    """
    trials, cases = study.trials("selection"), study.choice_cases
    extractor, count = Trajectory(), len(cases)
    real = extractor(study.trials("confirmation").subject.cases)
    groups = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(KERNEL_GROUP)
    groups = [group.tolist() for group in groups if len(group) == min(KERNEL_GROUP, count)]

    def distances(guidance: Guidance) -> list[float]:
        made = extractor(generate_trial(trials, guidance, cases))
        return [kernel_distance(real, made[group]) for group in groups]

    unguided = torch.tensor(distances(Guidance()))
    heads = trials.subject.heads
    return torch.stack([torch.tensor(distances(study.plan.hunt.guidance((head,)))) - unguided for head in heads])


def objectives(study: Study) -> list[dict]:
    """How far objectives agree on which heads help, pair by pair, and how many of their top k they share."""
    found, heads = study.cached("objective_effects", objective_effects), study.trials("selection").subject.heads
    top = {name: top_heads(heads, values, study.plan.hunt.top_k) for name, values in found.items()}
    rows = []
    for first, second in itertools.combinations(found, 2):
        same_cases = found[first].shape == found[second].shape  # likelihood has fewer, the kernel distance has groups
        agreement = rank_agreement(found[first], found[second], paired=same_cases)
        shared = overlap(top[first], top[second], heads)
        rows.append(dict(first=first, second=second, agreement=agreement.to_dict(), top=shared.to_dict()))
    return rows


def found_by(study: Study) -> list[dict]:
    """The k heads that each objective chose, on fresh cases: what they do to motion, to presence and to both."""
    plan, found = study.plan, study.cached("objective_effects", objective_effects)
    heads = study.trials("selection").subject.heads
    fresh = study.trials("confirmation")
    cases = first_cases(fresh, 4 * plan.map_cases)
    sets = {name: top_heads(heads, values, plan.hunt.top_k) for name, values in found.items()}
    values = {name: study.effects(study.trials("confirmation", name), [*sets.values()], cases) for name in JUDGED}
    return [
        dict(objective=name, heads=head_names(chosen))
        | {metric: bootstrap_mean(effects[i]).to_dict() for metric, effects in values.items()}
        for i, (name, chosen) in enumerate(sets.items())
    ]


def top_heads(heads: HeadSet, effects: Float[Tensor, "head case"], k: int) -> HeadSet:
    """The k heads with the lowest mean effect."""
    return head_set([heads[i] for i in effects.nanmean(1).nan_to_num(nan=torch.inf).argsort()[:k].tolist()])


def overlap(first: HeadSet, second: HeadSet, heads: HeadSet) -> Overlap:
    """What two choices of as many from `heads` share."""
    return Overlap(len(set(first) & set(second)), len(first), len(heads))


def rounds(study: Study) -> list[dict]:
    """HeadHunter in rounds beside the plain top k, by tracking error restored: the heads of each."""
    hunt = study.rounds(MIXED)
    plain = study.ranking(MIXED).order()[: study.plan.hunt.top_k]
    shared = overlap(plain, hunt.picked, hunt.ranking.heads)
    return [dict(objective=MIXED, plain=head_names(plain), rounds=head_names(hunt.picked), shared=shared.to_dict())]


def surface(study: Study) -> list[dict]:
    """The heads hunted by tracking and by motion, at every weight and strength and in every run of steps."""
    plan, rows, cases = study.plan, [], study.choice_cases
    for objective in (MIXED, MOTION):
        heads = study.ranking(objective).top(plan.hunt.top_k)
        guidance = plan.hunt.guidance(heads)
        grids = dict(strength=weight_grid(plan.hunt, heads, plan.weights, plan.strengths))
        grids |= dict(interval=interval_grid(guidance, plan.hunt.steps))
        for grid, trials in grids.items():
            effects = effects_of(measure_arms(study.trials("selection", objective), trials, cases, "surface"))
            rows += [
                dict(found_by=objective, grid=grid, x=x, y=y) | {name: effects[name][x, y] for name in JUDGED}
                for x, y in trials
            ]
    return rows


def heads(study: Study) -> list[dict]:
    """The heads that either motion objective chose, one by one on fresh cases, by that objective and by motion."""
    plan = study.plan
    hunt = plan.hunt_with(confirmation_cases=max(1, plan.hunt.confirmation_cases // 3))
    rows = []
    for objective in (MIXED, MOTION):
        ranking = study.ranking(objective)
        chosen = ranking.order()[: plan.hunt.top_k]
        chosen = chosen if not set(COARSE_BEST) <= set(ranking.heads) else dict.fromkeys((*chosen, *COARSE_BEST))
        for judge in dict.fromkeys((objective, MOTION)):
            parts = study.trials("selection", judge), study.trials("confirmation", judge, hunt=hunt)
            verdicts = confirm_heads(*parts, study.ranking(judge), plan.hunt, tuple(chosen))
            rows += [dict(found_by=objective, judged_by=judge) | verdict.to_row() for verdict in verdicts]
    return rows


def repetitions(study: Study) -> list[dict]:
    """Whole hunts with other cases and other noise: what they share with each other, beside chance."""
    plan, rows = study.plan, []
    seeds = (plan.hunt.seed, *plan.repetition_seeds)
    for objective in (MIXED, MOTION):
        rankings = {
            seed: rank_heads(study.trials("selection", objective, hunt=plan.hunt_with(seed=seed)), study.guide())
            for seed in seeds
        }
        for first, second in itertools.combinations(seeds, 2):
            pair = rankings[first], rankings[second]
            top = [ranking.top(plan.hunt.top_k) for ranking in pair]
            shared = overlap(*top, pair[0].heads)
            agreement = rank_agreement(*(ranking.effects for ranking in pair), paired=False)
            row = dict(objective=objective, first=first, second=second, both=head_names(sorted({*top[0]} & {*top[1]})))
            rows.append(row | dict(shared=shared.to_dict(), agreement=agreement.to_dict()))
    return rows


def transfer(study: Study) -> list[dict]:
    """Heads hunted in one condition, tested on the fresh cases of every other, by tracking error restored."""
    plan = study.plan
    small = plan.hunt_with(confirmation_cases=2 * plan.map_cases, selection_cases=plan.map_cases)
    whole = Condition(
        study.trials("selection"),
        study.trials("confirmation"),
        study.map_cases,
        first_cases(study.trials("confirmation"), 2 * plan.map_cases),
    )
    many = dict(selection_cases=plan.phenomenon_cases, confirmation_cases=2 * plan.phenomenon_cases)
    conditions = dict(worlds=whole) | scenario_conditions(whole)
    conditions["phenomena"] = condition(study, hunt=replace(small, scenarios=plan.phenomena, **many))
    conditions["in distribution"] = condition(study, hunt=small, split="id")
    for count in plan.starts:
        name = f"{count} start frame{'s' if count > 1 else ''}"
        conditions[name] = condition(study, hunt=replace(small, frames_given=count))
    if study.twin is not None:
        conditions["another training"] = condition(study, hunt=small, model=study.twin)
    return [row.to_row() for row in measure_transfer(conditions, plan.hunt, plan.hunt.top_k)]


def condition(study: Study, **settings) -> Condition:
    """All cases of a hunt with other settings, by the trajectory alone: the other judges know the three worlds."""
    parts = [study.trials(part, judge=MOTION_JUDGE, **settings) for part in ("selection", "confirmation")]
    return Condition(*parts, *(list(part.cases) for part in parts))


def contributions(study: Study) -> list[dict]:
    """What each of the heads hunted by tracking does alone, in its set, and what the set loses without it."""
    plan = study.plan
    heads = study.ranking(MIXED).top(plan.hunt.top_k)
    trials, cases = study.trials("confirmation"), first_cases(study.trials("confirmation"), plan.map_cases)
    return measure_contributions(trials, plan.hunt, heads, orders=plan.orders, cases=cases).to_rows()


def attention(study: Study) -> list[dict]:
    """What every head looks at, beside its effect; the rows named `all` have the rank correlations over heads."""
    selection, count = study.trials("selection"), study.plan.attention_clips
    groups = cases_by_scenario(selection, count).values()
    clips = selection.subject.cases[[case for cases in groups for case in cases]]
    every = selection.subject.heads
    effects = {name: study.ranking(name).effects for name in (MIXED, MOTION)}
    found = attention_maps(study.model, clips, every, frames_given=study.plan.hunt.frames_given)
    following = object_following(found, clips)
    margins = torch.minimum(following.follows - following.control, following.above_other_way)
    columns = {"following": margins.nanmean(1)} | found.statistics()
    rows = [
        dict(head=str(head))
        | {name: number(values[i]) for name, values in columns.items()}
        | {name: number(values[i].nanmean()) for name, values in effects.items()}
        for i, head in enumerate(every)
    ]
    for name, values in columns.items():
        same = values[:, None].expand(-1, len(clips)) if name != "following" else margins
        for objective, effect in effects.items():
            correlation = rank_agreement(same, effect, paired=False).to_dict()
            rows.append(dict(head="all", statistic=name, objective=objective, correlation=correlation))
    return rows


def sampling(study: Study) -> list[dict]:
    """Unguided clips by the number of sampling steps, in and out of distribution: what costs nothing to choose."""
    plan, rows = study.plan, []
    for split in ("id", plan.hunt.split):
        values = {}
        for count in (*plan.step_counts, plan.hunt.steps):
            hunt = plan.hunt_with(steps=count, confirmation_cases=plan.inside_cases)
            values[count] = arm_values(study.trials("confirmation", hunt=hunt, split=split), [Guidance()], None, JUDGED)
        usual = values[plan.hunt.steps]
        for count in plan.step_counts:
            found = {
                name: bootstrap_mean(value).to_dict() | dict(difference=paired_difference(value, usual[name]).to_dict())
                for name, value in values[count].items()
            }
            rows.append(dict(split=split, steps=count, cases=len(usual[MIXED])) | found)
    return rows


def number(value: Tensor) -> float | None:
    """For JSON: None where it could not be judged."""
    return None if bool(value.isnan()) else float(value)


def steps(study: Study) -> list[dict]:
    """Does sampling with more steps rank the heads otherwise? The same cases and noise."""
    plan, rows = study.plan, []
    cases = first_cases(study.trials("selection"), plan.few_steps_cases)
    longer = plan.hunt_with(steps=plan.many_steps, selection_cases=plan.few_steps_cases)
    for objective in (MIXED, MOTION):
        found = [
            rank_heads(study.trials("selection", objective, hunt=hunt), study.guide(), cases=numbers)
            for hunt, numbers in ((plan.hunt, cases), (longer, None))
        ]
        agreement = rank_agreement(*(ranking.effects for ranking in found))
        row = dict(objective=objective, few=plan.hunt.steps, many=plan.many_steps, cases=len(cases))
        rows.append(row | dict(agreement=agreement.to_dict()))
    return rows
