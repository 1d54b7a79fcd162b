"""Hunting heads: break them, guide away from the broken model, keep the heads whose guidance helps most.

    rank_heads      every head on every selection case: the plain single-head ranking
    race_heads      the same top k for fewer cases: heads that can no longer reach it, or fall out of it, stop early
    hunt_heads      HeadHunter (2025, alg. 1): rounds of either, each adding its k best heads to those kept before

Every trial sees the same cases and the same noise, so heads are compared by paired differences. Heads are chosen here,
on selection cases, and judged by `physnb.confirm` on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from physnb.config import PROMISES, Guidance, HeadId, HeadSet, HuntConfig, choose, head_set, require
from physnb.objectives import Objective
from physnb.statistics import Estimate, bootstrap_mean, cases_needed, detectable_effect, sign_flips
from physnb.store import read_json
from physnb.trials import Trials

Guide = Callable[[HeadSet], Guidance]  # the trial of a head set: `HuntConfig.guidance`
FIRST_CASES = 12  # of a race: fewer give no usable spread
GROWTH = 1.5  # cases of a stage of a race over those of the stage before


@dataclass(frozen=True)
class HeadRanking:
    """Effect of guiding away from each head: objective minus unguided, per case, turned so that negative is better.

    effects[i] belongs to heads[i]; NaN where a case could not be judged, or where a race saved it. kept: heads of
    earlier rounds, broken together with each. Leaves out how heads act together, and the luck of the best.
    """

    heads: HeadSet
    effects: Float[Tensor, "head case"]
    objective: Objective
    kept: HeadSet = ()

    @property
    def label(self) -> str:
        """What the effects are, for an axis: `tracking error minus unguided (units)`."""
        name, unit = self.objective.name.replace("_", " "), f" ({self.objective.unit})" if self.objective.unit else ""
        return f"{name} minus unguided{unit}" if self.objective.lower_is_better else f"unguided minus {name}{unit}"

    def estimates(self) -> list[Estimate]:
        """Mean effect of every head with its interval over cases."""
        return [bootstrap_mean(row) for row in self.effects]

    def order(self) -> HeadSet:
        """All heads, most helpful first; those that no case could judge come last."""
        means = self.effects.nanmean(1).nan_to_num(nan=math.inf)
        return tuple(self.heads[i] for i in torch.argsort(means, stable=True).tolist())

    def top(self, k: int) -> HeadSet:
        """The k heads that help most, as a head set."""
        require(1 <= k <= len(self.heads), f"top k must be in [1, {len(self.heads)}], got {k}")
        return head_set(self.order()[:k])

    def layer_map(self) -> Float[Tensor, "layer head"]:
        """Mean effects as a layer x head table."""
        return head_table(dict(zip(self.heads, self.effects.nanmean(1), strict=True)), self.heads)

    def to_rows(self) -> list[dict]:
        """One dict a head, most helpful first: head, estimate, and p of a mean below 0, alone and for all heads.

        The p values are `statistics.sign_flips`; where a race saved cases they are of those that were run, which were
        not fixed beforehand, so they describe and do not prove: that is what confirmation is for.
        """
        columns = zip(self.heads, self.estimates(), *sign_flips(self.effects), strict=True)
        rows = {
            head: dict(head=str(head)) | estimate.to_dict() | dict(p=float(alone), p_all_heads=float(corrected))
            for head, estimate, alone, corrected in columns
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


@dataclass(frozen=True)
class RaceStage:
    """What a race knew after one stage: cases a head, and how many heads were safely in, safely out, or still ran."""

    cases: int
    settled: int
    dropped: int
    running: int


@dataclass(frozen=True)
class Race:
    """The winners of a race, its ranking with NaN where it saved a row, and how it went."""

    winners: HeadSet
    ranking: HeadRanking
    stages: tuple[RaceStage, ...]

    @property
    def rows(self) -> int:
        """Head and case rows that were needed."""
        return int((~self.ranking.effects.isnan()).sum())


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
    judged = (~effects.isnan()).sum(1, keepdim=True)
    require(
        len(guidances) == 0 or bool(judged.any()),
        f"objective {trials.subject.objective.name} could not be judged both with and without guidance on any case; "
        "choose another objective or other cases",
    )
    return torch.where(2 * judged >= (~baseline.isnan()).sum(), effects, torch.nan)


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


def race_heads(
    trials: Trials,
    guide: Guide,
    k: int,
    heads: Sequence[HeadId] | None = None,
    *,
    kept: HeadSet = (),
    confidence: float = 0.9,
    promise: str = "set",
    seed: int = 0,
    budget: int = 0,
) -> Race:
    """The k heads that `rank_heads` would put first, for fewer rows.

    promise "set": all k are the same with a chance of about `confidence`. "head": each of the k is found with that
    chance, so about that share of them; a good deal cheaper where heads at the border are alike.

    Successive elimination with paired differences. Cases come in an order drawn by `seed`, FIRST_CASES of them for
    every head, GROWTH times as many in every later stage. After a stage a head outside the top k is dropped where its
    mean exceeds that of the k-th best head beyond doubt, and one inside is settled where that of the (k + 1)-th best
    exceeds its own. Beyond doubt: Student's t interval of the paired difference, level (1 - confidence) over stages,
    and over heads for the set (Bonferroni), with the standard error scaled by sqrt((N - n) / (N - 1)): the n cases are
    drawn without replacement from the N that the exhaustive search would average over: at n = N there is no doubt.
    Approximate where differences are far from normal, and as the k-th best is itself an estimate. A case that could not
    be judged for either of two heads leaves their difference.
    budget: rows at most, 0 for no limit; a race that would go beyond takes the best so far, and its last stage says how
    many heads still ran. Raises ValueError if not even the first stage fits.
    """
    pool = tuple(head for head in check_subject_heads(trials, heads) if head not in kept)
    require(1 <= k <= len(pool), f"top k must be in [1, {len(pool)}], the heads to hunt, got {k}")
    require(0 < confidence < 1, f"confidence must be in (0, 1), got {confidence}")
    choose("promise", promise, PROMISES)
    count = len(trials.cases)
    order = np.random.default_rng(seed).permutation(count).tolist()
    sizes = stage_sizes(count)
    level = (1 - confidence) / len(sizes) / (len(pool) if promise == "set" else 1)
    effects = torch.full((len(pool), count), torch.nan)
    running, settled, stages, rows, before = list(range(len(pool))), [], [], 0, 0
    require(
        budget == 0 or budget >= (len(pool) + 1) * sizes[0],
        f"a budget of {budget} rows is too small for a race of {len(pool)} heads, which begins with "
        f"{(len(pool) + 1) * sizes[0]}; give more, or fewer heads",
    )
    for size in sizes:
        rows += (len(running) + 1) * (size - before)  # every head that still runs, and no guidance
        if 0 < budget < rows:
            break
        cases, before = order[:size], size
        found = measure_effects(trials, [guide(head_set((*kept, pool[i]))) for i in running], cases, label="race")
        for i, row in zip(running, found, strict=True):
            effects[i, cases] = row
        running.sort(key=lambda i: float(effects[i].nanmean().nan_to_num(nan=math.inf)))
        wanted = k - len(settled)
        inside, outside = running[:wanted], running[wanted:]
        if outside:
            last, first = inside[-1], outside[0]
            safe = [i for i in inside if surely_below(effects[i, cases], effects[first, cases], count, level)]
            lost = [i for i in outside if surely_below(effects[last, cases], effects[i, cases], count, level)]
            settled += safe
            running = [i for i in running if i not in safe and i not in lost]
        stages.append(RaceStage(size, len(settled), len(pool) - len(settled) - len(running), len(running)))
        if len(settled) + len(running) == k or len(settled) == k or size == count:
            break
    winners = [*settled, *running[: k - len(settled)]]
    ranking = HeadRanking(pool, effects, trials.subject.objective, kept)
    return Race(head_set([pool[i] for i in winners]), ranking, tuple(stages))


def stage_sizes(count: int) -> list[int]:
    """Cases of every head in the stages of a race over `count` cases; the last is all of them."""
    sizes = [min(FIRST_CASES, count)]
    while sizes[-1] < count:
        sizes.append(min(count, math.ceil(sizes[-1] * GROWTH)))
    return sizes


def surely_below(low: Float[Tensor, " case"], high: Float[Tensor, " case"], count: int, level: float) -> bool:
    """Whether the mean of `low` over all `count` cases is below that of `high`, beyond doubt at `level` (one-sided)."""
    difference = (high - low)[~(high - low).isnan()].double()
    n = len(difference)
    if n < 2:
        return n < len(low) and bool(high.isnan().all()) and not bool(low.isnan().all())
    error = difference.std() / math.sqrt(n) * math.sqrt(max(0, count - len(low)) / max(1, count - 1))
    return bool(difference.mean() > student.ppf(1 - level, n - 1) * error)


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
