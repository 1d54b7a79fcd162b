"""Do heads that were hunted under one condition help under another? Scenarios, seeds and models, as one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from physnb.config import HeadSet, HuntConfig, require
from physnb.confirm import random_head_sets, require_disjoint
from physnb.model import VideoDiT
from physnb.profiles import cases_by_scenario, first_cases
from physnb.ranking import measure_effects, rank_heads
from physnb.search import head_names
from physnb.statistics import Estimate, bootstrap_mean, paired_difference
from physnb.store import TrialStore
from physnb.subjects import simulated_subject
from physnb.trials import Trials

RANDOM = "random heads"


@dataclass(frozen=True)
class Condition:
    """Where heads are hunted and tested: some cases for choosing, and others for confirming."""

    selection: Trials
    confirmation: Trials
    selection_cases: Sequence[int]
    confirmation_cases: Sequence[int]

    def __post_init__(self) -> None:
        require_disjoint(self.selection, self.confirmation)


@dataclass(frozen=True)
class Transfer:
    """Heads hunted on one condition, tested on the fresh cases of another.

    effect: objective minus unguided, negative is better. against_own: that effect minus the one of the heads that the
    tested condition chose itself, paired case by case; above 0 where its own are better. against_random: minus the one
    of as many random heads; below 0 where something was carried over. shared: heads in both sets.
    """

    hunted_on: str
    tested_on: str
    heads: HeadSet
    shared: int
    effect: Estimate
    against_own: Estimate
    against_random: Estimate

    def to_row(self) -> dict:
        """As one dict, ready for JSON."""
        words = dict(hunted_on=self.hunted_on, tested_on=self.tested_on, heads=head_names(self.heads))
        names = ("effect", "against_own", "against_random")
        return words | dict(shared=self.shared) | {name: getattr(self, name).to_dict() for name in names}


def simulated_condition(model: VideoDiT, hunt: HuntConfig, store: TrialStore | None, a_scenario: int) -> Condition:
    """Hunting and testing a model on the hunt's worlds, with the hunt's seed for cases and noise.

    Heads are chosen on the first `a_scenario` selection cases of each scenario, and tested on up to three times as many
    confirmation cases, as long as there are so many.
    """
    parts = [simulated_subject(model, hunt, part) for part in ("selection", "confirmation")]
    selection, confirmation = (Trials(part, store) for part in parts)
    cases = first_cases(selection, a_scenario), first_cases(confirmation, 3 * a_scenario)
    return Condition(selection, confirmation, *cases)


def scenario_conditions(whole: Condition) -> dict[str, Condition]:
    """The condition, one scenario at a time."""
    chosen, tested = (set(cases) for cases in (whole.selection_cases, whole.confirmation_cases))
    tests = cases_by_scenario(whole.confirmation)
    return {
        scenario: Condition(
            whole.selection,
            whole.confirmation,
            [case for case in cases if case in chosen],
            [case for case in tests[scenario] if case in tested],
        )
        for scenario, cases in cases_by_scenario(whole.selection).items()
    }


def choose_heads(condition: Condition, hunt: HuntConfig, k: int) -> HeadSet:
    """The k heads that help most alone on the condition's selection cases."""
    return rank_heads(condition.selection, hunt.guidance, cases=condition.selection_cases).top(k)


def measure_transfer(conditions: Mapping[str, Condition], hunt: HuntConfig, k: int) -> list[Transfer]:
    """Every condition's own k heads, and as many random ones, on the fresh cases of every condition.

    Rows: hunted_on by tested_on, random heads (one draw) last. Raises ValueError for models with other heads: a head's
    name then means nothing elsewhere.
    """
    require(len(conditions) > 0, "there is no condition to hunt on")
    every = {name: condition.selection.subject.heads for name, condition in conditions.items()}
    known = next(iter(every.values()))
    odd = [name for name, heads in every.items() if heads != known]
    require(not odd, f"{', '.join(odd)}: a model with other layers and heads; transfer is between models of one shape")
    random = random_head_sets(known, k, 1, hunt.seed)[0]  # refuses a k that no condition could choose
    chosen = {name: choose_heads(condition, hunt, k) for name, condition in conditions.items()}
    sets = chosen | {RANDOM: random}
    found: dict[tuple[str, str], Float[Tensor, " case"]] = {}
    for name, condition in conditions.items():
        trials, cases = condition.confirmation, condition.confirmation_cases
        effects = measure_effects(trials, [hunt.guidance(heads) for heads in sets.values()], cases, label="transfer")
        found |= {(source, name): effect for source, effect in zip(sets, effects, strict=True)}
    return [
        Transfer(
            source,
            target,
            heads,
            len(set(heads) & set(chosen[target])),
            bootstrap_mean(found[source, target]),
            paired_difference(found[source, target], found[target, target]),
            paired_difference(found[source, target], found[RANDOM, target]),
        )
        for source, heads in sets.items()
        for target in conditions
    ]
