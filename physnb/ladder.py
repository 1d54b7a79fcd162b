"""The sanity ladder: what a metric must order before its numbers mean anything, and how small an error it can see.

Each rung is a fake generation of known worth. A usable metric puts the copy first, a second take of the same case next,
and the second take before every broken rung: frozen, reversed, shuffled, another case's clip, noise. One that may steer
a hunt also puts a faded clip, whose motion is right, before those whose motion is not: guidance strengthens contrast.
Climb it on the data that the metric will be used on; one that judges collisions only needs collisions.

Leaves out clips from which things vanish: an error given presence can pass and be blind to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor

from physnb.config import choose, require
from physnb.data import Clip, DiscState, hash_draws, render, uniform_draws
from physnb.data.worlds import frame_times
from physnb.metrics import Scores
from physnb.metrics.colour import stretch_contrast
from physnb.statistics import Estimate, bootstrap_mean, paired_difference, spearman

BROKEN = ("static", "reversed", "shuffled", "swapped", "noise")
RUNGS = ("copy", "second_take", "faded", *BROKEN)
FADED = 0.2  # contrast of the faded rung; one in ten frames of the reference model is as faint out of distribution
MIN_JUDGED = 0.5  # share of clips that must be judged in a rung, and in its difference to the second take
SPEED_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TWO_SIDED = 1.96  # standard normal quantile of a 5 % test
RESAMPLES = 1000
MIN_PAIRS = 3  # clips that a rank correlation needs


def make_rung(name: str, true: Clip, *, second: Clip, frames_given: int, seed: int = 0) -> Clip:
    """The clips of rung `name`, without a state, as if generated: start frames as in `true`, the rest by the rung.

    copy: as in `true`. second_take: of `second`. faded: as in `true` with its contrast times FADED.
    static: the last start frame, repeated. reversed: in reverse order.
    shuffled: in an order drawn from (seed, clip index), never the true one. swapped: those of the next clip of the same
    scenario, in an order drawn from (seed, clip index). noise: every byte uniform, from (seed, clip index).
    Raises ValueError for an unknown rung, takes that do not match, fewer than 2 generated frames, or a scenario with
    one clip only where clips are to be swapped.
    """
    choose("rung", name, RUNGS)
    check_takes(true, second, frames_given)
    indices, generated = true.indices.numpy(), true.frames[:, frames_given:]
    if name == "copy":
        made = generated
    elif name == "second_take":
        made = second.frames[:, frames_given:]
    elif name == "faded":
        made = stretch_contrast(true, FADED).frames[:, frames_given:]
    elif name == "static":
        made = true.frames[:, frames_given - 1 : frames_given].expand_as(generated)
    elif name == "reversed":
        made = generated.flip(1)
    elif name == "shuffled":
        order = _shuffled_order(seed, indices, generated.shape[1])
        made = generated[torch.arange(len(true))[:, None], order]
    elif name == "swapped":
        made = generated[_other_cases(true, seed)]
    else:
        made = torch.empty_like(generated)
        generator = torch.Generator()
        for clip, draw in zip(made, hash_draws(seed, "ladder/noise", indices), strict=True):
            clip.random_(0, 256, generator=generator.manual_seed(int(draw >> np.uint64(1))))
    return replace(true, frames=torch.cat([true.frames[:, :frames_given], made], dim=1), state=None)


def check_takes(true: Clip, second: Clip, frames_given: int) -> None:
    """Refuse takes that are not of the same cases, or that leave too little to break."""
    require(len(true) > 0, "a ladder needs at least one clip")
    require(
        second.frames.shape == true.frames.shape and second.fps == true.fps,
        f"true clips {tuple(true.frames.shape)} at {true.fps:g} frames/s and second takes {tuple(second.frames.shape)} "
        f"at {second.fps:g} do not match",
    )
    require(
        second.scenarios == true.scenarios and torch.equal(second.indices, true.indices),
        "the second takes are of other cases than the true clips; give both in one order",
    )
    time = true.frames.shape[1]
    require(
        1 <= frames_given <= time - 2,
        f"frames given must be in [1, {time - 2}] for a ladder on {time} frames, got {frames_given}",
    )


def _shuffled_order(seed: int, indices: np.ndarray, frames: int) -> Tensor:
    """An order of the generated frames for each clip; where the true order was drawn, it is rotated by one."""
    keys = [uniform_draws(seed, f"ladder/shuffled/{frame}", indices) for frame in range(frames)]
    order = torch.from_numpy(np.argsort(np.stack(keys, 1), axis=1))
    unchanged = (order == torch.arange(frames)).all(1)
    return torch.where(unchanged[:, None], order.roll(1, dims=1), order)


def _other_cases(true: Clip, seed: int) -> list[int]:
    """For each clip another one of its scenario: the next in a drawn order, whatever order the batch has."""
    draws = hash_draws(seed, "ladder/swapped", true.indices.numpy())
    partner = [0] * len(true)
    for scenario in sorted(set(true.scenarios)):
        rows = sorted((i for i, name in enumerate(true.scenarios) if name == scenario), key=lambda i: int(draws[i]))
        require(len(rows) > 1, f"one clip of scenario {scenario!r} cannot be swapped with another; give at least two")
        for i, other in zip(rows, rows[1:] + rows[:1], strict=True):
            partner[i] = other
    return partner


@dataclass(frozen=True)
class RungScore:
    """A metric on one rung: its mean, and its mean paired difference to the second take, positive where worse.

    A set-level metric has one value and no pairs: `difference` then has no interval.
    """

    rung: str
    mean: Estimate
    difference: Estimate
    set_level: bool = False

    @property
    def judged(self) -> bool:
        """Whether enough clips could be judged, here and in pairs with the second take."""
        return min(self.mean.judged, self.difference.judged) >= MIN_JUDGED * self.mean.cases and self.mean.judged > 0

    @property
    def against_second(self) -> str:
        """One of "better", "worse", "tie" (the interval holds 0; set level: equal) and "not judged" (too few clips)."""
        if not self.judged:
            return "not judged"
        d = self.difference
        low, high = (d.mean, d.mean) if self.set_level else (d.low, d.high)
        return "worse" if low > 0 else "better" if high < 0 else "tie"

    def to_dict(self) -> dict[str, Any]:
        """One row of a table, for JSON."""
        shared = dict(rung=self.rung, against_second=self.against_second, set_level=self.set_level)
        return shared | dict(mean=self.mean.to_dict(), difference=self.difference.to_dict())


def climb(
    metric: Callable[[Clip], Any], true: Clip, second: Clip, *, frames_given: int = 3, seed: int = 0
) -> list[RungScore]:
    """The score of every rung, in the order of RUNGS, with intervals.

    metric: a function of the generated clips alone, for example
    `lambda made: metric_trajectory(made, true)["tracking_error"]`. It returns Scores, or for a set-level metric an
    object with `value` and `lower_is_better` (and its interval in `low` and `high`, where it has one).
    Raises ValueError for a metric that returns something else, or another number of clips.
    """
    results = {}
    for name in ("second_take", *(rung for rung in RUNGS if rung != "second_take")):
        results[name] = metric(make_rung(name, true, second=second, frames_given=frames_given, seed=seed))
        _check_result(results[name], results["second_take"], len(true))
    return [_rung_score(name, results[name], results["second_take"], len(true), seed) for name in RUNGS]


def _check_result(result: Any, other: Any, clips: int) -> None:
    if isinstance(result, Scores):
        require(len(result.values) == clips, f"{result.name} has {len(result.values)} values for {clips} clips")
    else:
        require(
            hasattr(result, "value") and hasattr(result, "lower_is_better"),
            f"a ladder needs Scores, or an object with value and lower_is_better; the metric returned {type(result)}",
        )
    require(
        type(result) is type(other) and result.lower_is_better == other.lower_is_better,
        "the metric must return the same kind of score, with the same direction, for every rung",
    )


def _rung_score(name: str, result: Any, second: Any, clips: int, seed: int) -> RungScore:
    sign = 1 if result.lower_is_better else -1
    if isinstance(result, Scores):
        difference = paired_difference(sign * result.values, sign * second.values, seed)
        return RungScore(name, bootstrap_mean(result.values, seed), difference)
    value, gap = float(result.value), sign * (float(result.value) - float(second.value))
    low, high = (float(getattr(result, end, np.nan)) for end in ("low", "high"))
    mean = Estimate(value, low, high, clips if value == value else 0, clips)
    return RungScore(name, mean, Estimate(gap, np.nan, np.nan, clips if gap == gap else 0, clips), set_level=True)


def verdict(rows: Sequence[RungScore], companion: Sequence[RungScore] | None = None) -> dict[str, Any]:
    """Whether the ladder holds, what failed, what tied or was not judged, and what the metric may be used for here.

    The rules, on paired differences to the second take with 95 % intervals (set-level metrics: on plain values):
    1. the copy is not worse than the second take. A tie is listed and allowed: a second take is lawful too.
    2. every broken rung is worse than the second take; a tie is a failure.
    3. no broken rung has a mean as good as the copy's; where static has, it wins by doing nothing.
    4. at least half of the clips are judged in every rung. A broken rung that fails this alone is excused where
       `companion`, the same ladder under a measure of presence such as missing_rate, finds it worse than the
       second take.
    5. to steer a hunt: the faded rung is judged and has a better mean than every broken one; what it does not is in
       `contrast`. A hunt by such a metric can be won by what makes discs darker and moves none.
    usable: "hunting" where the ladder of a per-clip metric holds with rule 5 and every clip is judged in every rung;
    "reporting" where it holds otherwise; else "not on this data". Rungs with clips that were not judged are always
    listed.
    """
    found, beside = {row.rung: row for row in rows}, {row.rung: row for row in companion or ()}
    require(tuple(found) == RUNGS, f"a verdict needs one row for each of {', '.join(RUNGS)}, as `climb` returns them")
    failures, ties, unjudged, excused, contrast = [], [], [], [], []
    copy, faded = found["copy"], found["faded"]
    for name, row in found.items():
        outcome, counts = row.against_second, f"{name}: {row.mean.judged} of {row.mean.cases} clips judged"
        if row.mean.judged < row.mean.cases:
            unjudged.append(counts)
        if name == "faded":
            continue
        if outcome == "tie" and name != "second_take":
            ties.append(f"{name} ties with the second take")
        if outcome == "not judged" and name in BROKEN and name in beside and beside[name].against_second == "worse":
            excused.append(f"{counts}, but the companion finds it worse than the second take")
        elif outcome == "not judged":
            failures.append(counts)
        elif name == "copy" and outcome == "worse":
            failures.append("the copy is worse than the second take")
        elif name in BROKEN and outcome != "worse":
            failures.append(f"{name} is not worse than the second take ({outcome})")
        # All differences are to the second take, so they rank the rungs whatever the metric's direction.
        if name in BROKEN and row.judged and copy.judged and row.difference.mean <= copy.difference.mean:
            failures.append("static wins" if name == "static" else f"{name} is as good as the copy")
        if name in BROKEN and row.judged and faded.judged and row.difference.mean <= faded.difference.mean:
            contrast.append(f"faded is no better than {name}")
    if not faded.judged:
        contrast.append("faded clips are not judged")
    steers = not any(row.set_level for row in rows) and not unjudged and not contrast
    usable = "not on this data" if failures else "hunting" if steers else "reporting"
    listed = dict(failures=failures, ties=ties, unjudged=unjudged, excused=excused, contrast=contrast)
    return dict(holds=not failures, usable=usable) | listed


def speed_up(true: Clip, error: float, *, frames_given: int = 3, edge: str = "coverage") -> Clip:
    """The clips simulated on from their last start frame with every velocity times 1 + error; start frames as given.

    Free motion keeps its acceleration; an impact comes where the discs then meet and stays elastic, so that both
    velocities after it are 1 + error times the true ones too.
    """
    require(true.state is not None, "a speed error needs the true state; take the true clip from a simulator")
    require(error > -1, f"a speed error must be above -1, which is standing still, got {error}")
    time, height, width = true.frames.shape[1:4]
    require(height == width, f"the worlds are square, got frames of {width} x {height}")
    require(
        1 <= frames_given < time, f"frames given must be in [1, {time - 1}] to change what follows, got {frames_given}"
    )
    state, times = true.state, torch.from_numpy(frame_times(time)).float()
    moment = times[frames_given - 1]
    since = (times - moment).clamp(min=0)[:, None, None]  # [time, 1, 1]
    start, first = state.positions[:, frames_given - 1, None], state.velocities[:, frames_given - 1, None]
    last = state.velocities[:, -1:]
    until_impact = (state.impact_time_s - moment).clamp(min=0)  # NaN without an impact
    past = since - (until_impact / (1 + error))[:, None, None, None]  # negative before the impact
    straight = start + (1 + error) * first * since
    bounced = start + first * until_impact[:, None, None, None] + (1 + error) * last * past
    curved = state.positions + error * first * since  # keeps the acceleration
    positions = torch.where(past >= 0, bounced, torch.where(past < 0, straight, curved))
    before = torch.where(past < 0, (1 + error) * first, state.velocities + error * first)
    velocities = torch.where(past >= 0, (1 + error) * last, before)
    moved = DiscState(
        positions=torch.where(since > 0, positions, state.positions),
        velocities=torch.where(since > 0, velocities, state.velocities),
        radii=state.radii,
        impact_time_s=torch.where(until_impact > 0, moment + until_impact / (1 + error), state.impact_time_s),
    )
    frames = torch.cat([true.frames[:, :frames_given], render(moved, height, edge)[:, frames_given:]], dim=1)
    return replace(true, frames=frames, state=moved)


@dataclass(frozen=True)
class Sensitivity:
    """How sure a metric is to see each speed error at `clips` clips, and the smallest one it sees (None if none)."""

    clips: int
    power_wanted: float
    rows: tuple[dict[str, float], ...]
    smallest: float | None


def detectable_error(
    metric: Callable[[Clip], Scores],
    true: Clip,
    *,
    clips: int,
    reference: Clip | None = None,
    errors: Sequence[float] = SPEED_ERRORS,
    frames_given: int = 3,
    power: float = 0.95,
    edge: str = "coverage",
) -> Sensitivity:
    """The smallest of `errors` from which on a test on `clips` clips finds the metric worse with chance `power`.

    For each error e all speeds are scaled by 1 + e (`speed_up`), and the metric is compared clip by clip with what it
    says of `reference`: the true clips by default, which gives the metric's own resolution; second takes give what it
    resolves beyond natural variation. With the mean d and standard deviation s of these differences (positive where
    worse), a two-sided 5 % test on n clips has power Phi(d sqrt(n) / s - 1.96), by the normal approximation; n is
    `clips` times the share of clips judged in both. Rows: error, difference d, spread s, judged, power (NaN where under
    2 clips are judged, and then not seen) and clips_needed for `power`, infinite where the error is not even worse.
    Raises ValueError for set-level metrics, under 2 clips, and errors or power out of range.
    """
    require(len(true) > 1, f"a spread needs at least 2 clips, got {len(true)}")
    require(clips > 1, f"clips must be at least 2, got {clips}")
    require(0 < power < 1, f"power must be in (0, 1), got {power}")
    require(len(errors) > 0 and min(errors) > 0, f"errors must be positive shares of the speed, got {tuple(errors)}")
    base = metric(true if reference is None else reference)
    require(isinstance(base, Scores), "sensitivity needs per-clip Scores; a set-level metric has no spread over clips")
    rows = []
    for error in sorted(errors):
        faster = replace(speed_up(true, error, frames_given=frames_given, edge=edge), state=None)
        worse = (metric(faster).values - base.values).double().numpy() * (1 if base.lower_is_better else -1)
        worse = worse[~np.isnan(worse)]
        row = dict(error=error, difference=np.nan, spread=np.nan, judged=len(worse), power=np.nan, clips_needed=np.inf)
        if len(worse) > 1:
            d, s = float(worse.mean()), float(worse.std(ddof=1))
            root = np.sqrt(clips * len(worse) / len(true))
            distance = d * root / s if s > 0 else np.inf * np.sign(d) if d else 0.0
            row |= dict(difference=d, spread=s, power=float(norm.cdf(distance - TWO_SIDED)))
            if d > 0:
                seen = ((TWO_SIDED + float(norm.ppf(power))) * s / d) ** 2
                row["clips_needed"] = max(2.0, seen * len(true) / len(worse))
        rows.append(row)
    unseen = [i for i, row in enumerate(rows) if not row["power"] >= power]
    seen = rows[unseen[-1] + 1 :] if unseen else rows  # from this error on every larger one is seen too
    return Sensitivity(clips, power, tuple(rows), seen[0]["error"] if seen else None)


@dataclass(frozen=True)
class RankCorrelations:
    """Spearman's rho of every pair of scores with 95 % intervals; where undefined NaN, with a reason for the pair."""

    names: tuple[str, ...]
    rho: Float[Tensor, "score score"]
    low: Float[Tensor, "score score"]
    high: Float[Tensor, "score score"]
    judged: Int[Tensor, "score score"]  # clips judged by both
    reasons: Mapping[tuple[str, str], str]


def rank_correlation(scores: Mapping[str, Float[Tensor, " clip"]], seed: int = 0) -> RankCorrelations:
    """Spearman's rank correlation over clips of every two scores, ties at their average rank.

    Signs are the scores' own: one where lower is better runs against one where higher is. Clips that either score could
    not judge (NaN) are left out of the pair; `judged` counts the others. Intervals are the 2.5 and 97.5 % quantiles
    over 1000 resamples of the pair's clips.
    Raises ValueError for scores of unequal length, or fewer than two.
    """
    names = tuple(scores)
    require(len(names) > 1, f"a rank correlation needs two scores or more, got {len(names)}")
    values = [np.asarray(scores[name], dtype=np.float64) for name in names]
    lengths = {len(v) for v in values}
    require(len(lengths) == 1, f"scores must be over the same clips, got lengths {sorted(lengths)}")
    rho, low, high = (torch.full((len(names),) * 2, torch.nan, dtype=torch.float64) for _ in range(3))
    judged = torch.zeros(len(names), len(names), dtype=torch.int64)
    reasons = {}
    for i, first in enumerate(values):
        for j, second in enumerate(values[: i + 1]):
            both = ~(np.isnan(first) | np.isnan(second))
            judged[i, j] = judged[j, i] = int(both.sum())
            x, y = first[both], second[both]
            pairs = {(names[i], names[j]), (names[j], names[i])}
            if len(x) < MIN_PAIRS:
                reasons |= dict.fromkeys(pairs, f"{len(x)} clips judged by both, under {MIN_PAIRS}")
            elif (x == x[0]).all() or (y == y[0]).all():
                same = names[i] if (x == x[0]).all() else names[j]
                reasons |= dict.fromkeys(pairs, f"{same} is the same for every clip")
            else:
                draws = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
                resampled = spearman(x[draws], y[draws])
                ends = np.nanquantile(resampled, [0.025, 0.975])  # a resample of equal values has no correlation
                for matrix, value in zip((rho, low, high), (spearman(x[None], y[None])[0], *ends), strict=True):
                    matrix[i, j] = matrix[j, i] = float(value)
    return RankCorrelations(names, rho, low, high, judged, reasons)
