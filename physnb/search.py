"""Hunting heads: break them, guide away from the broken model, keep the heads whose guidance helps most.

    ranking.rank_heads    every head on every selection case: the plain single-head ranking
    race.race_heads       the same top k for fewer rows: heads whose place is decided stop early
    hunt_heads            HeadHunter (2025, alg. 1): rounds of either, each adding its k best heads to those kept before

Every trial sees the same cases and the same noise, so heads are compared by paired differences. Heads are chosen here,
on selection cases, and judged by `physnb.confirm` on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from physnb.config import HeadId, HeadSet, HuntConfig, head_set, require
from physnb.race import Race, race_heads
from physnb.ranking import HeadRanking, check_subject_heads, measure_effects, rank_heads
from physnb.statistics import cases_needed, detectable_effect
from physnb.store import read_json
from physnb.trials import Trials


@dataclass(frozen=True)
class Hunt:
    """Rankings round by round, and the heads kept: those of the first round first."""

    rounds: tuple[HeadRanking, ...]
    picked: HeadSet
    races: tuple[Race, ...] = ()

    @property
    def ranking(self) -> HeadRanking:
        """Every head alone: the first round."""
        return self.rounds[0]

    @property
    def heads(self) -> HeadSet:
        """The hunted heads as a head set."""
        return head_set(self.picked)


def hunt_heads(trials: Trials, hunt: HuntConfig, heads: Sequence[HeadId] | None = None) -> Hunt:
    """HeadHunter: in each of `hunt.rounds` the `hunt.top_k` heads that help most join those kept before.

    Heads kept before are broken in every trial of a round and are not generated for again. With `hunt.search` "race" a
    round is a race. A budget is shared evenly by the rounds. Raises ValueError for heads that the model lacks, for more
    picks than there are heads, and for a budget that an exhaustive search would exceed.
    """
    pool = check_subject_heads(trials, heads)
    picks = hunt.top_k * hunt.rounds
    require(
        picks <= len(pool),
        f"{hunt.rounds} rounds of top k {hunt.top_k} keep {picks} heads, but there are {len(pool)}; ask for less",
    )
    rows = sum((1 + len(pool) - hunt.top_k * number) * len(trials.cases) for number in range(hunt.rounds))
    require(
        hunt.search != "exhaustive" or hunt.budget == 0 or rows <= hunt.budget,
        f"the hunt takes {rows} rows, the budget is {hunt.budget}; search by race, or choose on fewer cases",
    )
    picked: HeadSet = ()
    rankings, races = [], []
    for _ in range(hunt.rounds):
        kept = head_set(picked)
        if hunt.search == "race":
            settings = dict(confidence=hunt.confidence, promise=hunt.promise, seed=hunt.seed)
            settings |= dict(budget=hunt.budget // hunt.rounds)
            race = race_heads(trials, hunt.guidance, hunt.top_k, pool, kept=kept, **settings)
            races.append(race)
            rankings.append(race.ranking)
            picked += tuple(head for head in race.ranking.order() if head in race.winners)
        else:
            rankings.append(rank_heads(trials, hunt.guidance, pool, kept=kept))
            picked += rankings[-1].order()[: hunt.top_k]
    return Hunt(tuple(rankings), picked, tuple(races))


@dataclass(frozen=True)
class Power:
    """What a hunt of some size can see, from the spread of a few heads on a few cases.

    deviation: median over the pilot's heads of the standard deviation of paired differences between cases.
    """

    deviation: float
    heads: int
    cases: int
    confirmation_cases: int
    level: float = 0.05
    power: float = 0.9

    @property
    def smallest_seen(self) -> float:
        """The smallest effect of one head that the hunt's cases show, looking at all heads."""
        return detectable_effect(self.deviation, self.cases, power=self.power, level=self.level, tests=self.heads)

    @property
    def smallest_confirmed(self) -> float:
        """The smallest effect of the hunted set that its confirmation cases show."""
        return detectable_effect(self.deviation, self.confirmation_cases, power=self.power, level=self.level)

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        seen = dict(smallest_seen=self.smallest_seen, smallest_confirmed=self.smallest_confirmed)
        return vars(self) | seen

    def __str__(self) -> str:
        return (
            f"{self.cases} selection cases show effects of one of {self.heads} heads from {self.smallest_seen:.3g} on, "
            f"{self.confirmation_cases} confirmation cases those of the chosen from {self.smallest_confirmed:.3g} on "
            f"(spread {self.deviation:.3g}, power {self.power:.0%}, level {self.level:.0%})"
        )

    def to_rows(self, effects: Sequence[float]) -> list[dict]:
        """For each size of effect, the cases to see it among all heads, and to confirm it for one set."""
        shared = dict(power=self.power, level=self.level)
        return [
            dict(
                effect=effect,
                cases_to_find=cases_needed(self.deviation, effect, tests=self.heads, **shared),
                cases_to_confirm=cases_needed(self.deviation, effect, **shared),
            )
            for effect in effects
        ]


def pilot_power(trials: Trials, hunt: HuntConfig, *, heads: int = 6, cases: int = 12) -> Power:
    """The power of a hunt, computed before it from the spread of a few random heads on its first cases.

    Its rows are rows of the hunt, so nothing is run twice. Takes the confirmation to have the same spread.
    """
    known, generator = trials.subject.heads, np.random.default_rng(hunt.seed)
    require(heads > 0 and cases > 1, f"a pilot needs heads and at least 2 cases, got {heads} and {cases}")
    sample = generator.choice(len(known), min(heads, len(known)), replace=False)
    numbers = sorted(generator.choice(len(trials.cases), min(cases, len(trials.cases)), replace=False).tolist())
    effects = measure_effects(trials, [hunt.guidance((known[i],)) for i in sample], numbers, label="pilot")
    spreads = [float(row[~row.isnan()].std()) for row in effects if int((~row.isnan()).sum()) > 1]
    require(len(spreads) > 0, "no head of the pilot could be judged on two cases; choose another objective")
    fresh = hunt.confirmation_cases * len(hunt.scenarios)
    return Power(float(np.median(spreads)), len(known), len(trials.cases), fresh)


def head_names(heads: Sequence[HeadId]) -> str:
    """`L0H1, L3H7`."""
    return ", ".join(str(head) for head in heads)


def hunted_heads(names: str, hunted: list[dict[str, str]] | None, model_folder: str | Path) -> HeadSet:
    """The heads to study: those of `names`, else those `hunted` in the same run, else the ones of the committed hunt.

    Raises ValueError if none of the three is there.
    """
    if names:
        return head_set(names)
    rows = hunted or read_json(Path(model_folder).parent / "hunt" / "hunted.json")
    return head_set([row["head"] for row in rows])
