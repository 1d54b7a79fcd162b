"""When and where one head's guidance helps: by noise level, by scenario, in and out of distribution, by strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from physnb.config import Guidance, HeadId, HuntConfig, require
from physnb.flow import sampling_levels
from physnb.search import HeadRanking, check_subject_heads, measure_effects
from physnb.statistics import Estimate, bootstrap_mean
from physnb.subjects import ModelSubject
from physnb.trials import Trials

Profile = dict[str, dict[str, Estimate]]  # by what, and at which value: "noise level", "0.97"


def cases_by_scenario(trials: Trials, a_scenario: int | None = None) -> dict[str, list[int]]:
    """Numbers of the subject's cases by scenario, the first `a_scenario` of each (default: all)."""
    require(isinstance(trials.subject, ModelSubject), "only simulated cases have a scenario")
    found: dict[str, list[int]] = {}
    for number, scenario in enumerate(trials.subject.cases.scenarios):
        found.setdefault(scenario, []).append(number)
    return {scenario: numbers[:a_scenario] for scenario, numbers in found.items()}


def measure_profiles(
    trials: Mapping[str, Trials],
    hunt: HuntConfig,
    heads: Sequence[HeadId],
    *,
    a_scenario: int | None = None,
    strengths: Sequence[float] = (0.25, 0.5, 1.0),
) -> dict[HeadId, Profile]:
    """Each head alone: guided in one sampling step only, in every scenario, on every split, at partial strength.

    trials: by the name of their split, the first being those for the other questions; a_scenario: how many of their
    cases. Effects are the objective minus unguided, negative is better; "noise level" is sigma when the step begins.
    """
    require(len(trials) > 0, "there are no trials to profile heads on")
    first = next(iter(trials.values()))
    heads = check_subject_heads(first, heads)
    subject = first.subject
    levels = sampling_levels(subject.solver, subject.steps, subject.model.config.noise_shift)
    groups = cases_by_scenario(first, a_scenario)
    cases = [number for numbers in groups.values() for number in numbers]
    place = {case: column for column, case in enumerate(cases)}
    asked: dict[tuple[HeadId, str, str], Guidance] = {}
    for head in heads:
        whole = hunt.guidance((head,))
        for step, level in enumerate(levels):
            share = dict(start=step / len(levels), stop=(step + 1) / len(levels))
            asked[head, "noise level", f"{level:.3f}"] = Guidance(weak=whole.weak, **share)
        for u in strengths:
            form = dict(kind=hunt.kind, axis=hunt.axis)
            asked[head, "strength u", f"{u:g}"] = Guidance.from_heads((head,), hunt.weight, u, **form)
    together = [*asked.values(), *(hunt.guidance((head,)) for head in heads)]
    effects = measure_effects(first, together, cases, label="profiles")
    found = {head: {"noise level": {}, "scenario": {}, "split": {}, "strength u": {}} for head in heads}
    for (head, by, at), effect in zip(asked, effects, strict=False):
        found[head][by][at] = bootstrap_mean(effect)
    for head, effect in zip(heads, effects[len(asked) :], strict=True):
        for scenario, numbers in groups.items():
            found[head]["scenario"][scenario] = bootstrap_mean(effect[[place[number] for number in numbers]])
    for split, other in trials.items():
        for head, effect in zip(heads, split_effects(other, hunt, heads, a_scenario), strict=True):
            found[head]["split"][split] = bootstrap_mean(effect)
    return found


def scenario_profiles(ranking: HeadRanking, groups: Mapping[str, Sequence[int]]) -> dict[HeadId, Profile]:
    """What a ranking knows already: the effect of every head in every scenario; groups: case numbers by scenario."""
    return {
        head: {"scenario": {name: bootstrap_mean(effect[list(numbers)]) for name, numbers in groups.items()}}
        for head, effect in zip(ranking.heads, ranking.effects, strict=True)
    }


def split_effects(
    trials: Trials, hunt: HuntConfig, heads: Sequence[HeadId], a_scenario: int | None
) -> Float[Tensor, "head case"]:
    """Effect of each head alone on the first `a_scenario` cases of every scenario of a split."""
    cases = [number for numbers in cases_by_scenario(trials, a_scenario).values() for number in numbers]
    return measure_effects(trials, [hunt.guidance((head,)) for head in heads], cases, label="splits")


def profile_rows(profiles: Mapping[HeadId, Profile]) -> list[dict]:
    """One dict a head, question and value, ready for JSON."""
    return [
        dict(head=str(head), by=by, at=at) | estimate.to_dict()
        for head, profile in profiles.items()
        for by, values in profile.items()
        for at, estimate in values.items()
    ]
