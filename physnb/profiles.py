"""When and where one head's guidance helps: by noise level, by scenario, in and out of distribution, by strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from physnb.config import Guidance, HeadId, HuntConfig, require
from physnb.flow import sampling_levels
from physnb.ranking import HeadRanking, check_subject_heads, measure_effects
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


def first_cases(trials: Trials, a_scenario: int | None = None) -> list[int]:
    """The same numbers in one list, scenario after scenario."""
    return [number for numbers in cases_by_scenario(trials, a_scenario).values() for number in numbers]


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
    cases = first_cases(first, a_scenario)
    asked: dict[tuple[HeadId, str, str], Guidance] = {}
    for head in heads:
        for step, level in enumerate(levels):
            share = dict(start=step / len(levels), stop=(step + 1) / len(levels))
            asked[head, "noise level", f"{level:.3f}"] = replace(hunt.guidance((head,)), **share)
        for u in strengths:
            asked[head, "strength u", f"{u:g}"] = hunt.guidance((head,), strength=u)
    found = {head: {"noise level": {}, "scenario": {}, "split": {}, "strength u": {}} for head in heads}
    for (head, by, at), effect in zip(asked, measure_effects(first, [*asked.values()], cases, "profiles"), strict=True):
        found[head][by][at] = bootstrap_mean(effect)
    whole = {split: split_effects(other, hunt, heads, a_scenario) for split, other in trials.items()}
    scenarios = [first.subject.cases.scenarios[case] for case in cases]
    for number, head in enumerate(heads):
        for scenario in dict.fromkeys(scenarios):
            own = [name == scenario for name in scenarios]
            found[head]["scenario"][scenario] = bootstrap_mean(next(iter(whole.values()))[number][own])
        found[head]["split"] = {split: bootstrap_mean(effects[number]) for split, effects in whole.items()}
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
    guidances = [hunt.guidance((head,)) for head in heads]
    return measure_effects(trials, guidances, first_cases(trials, a_scenario), label="splits")


def profile_rows(profiles: Mapping[HeadId, Profile]) -> list[dict]:
    """One dict a head, question and value, ready for JSON."""
    return [
        dict(head=str(head), by=by, at=at) | estimate.to_dict()
        for head, profile in profiles.items()
        for by, values in profile.items()
        for at, estimate in values.items()
    ]
