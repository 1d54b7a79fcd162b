"""Every judge of clips on one contract, what each is worth on given data, and what each costs.

`judges` makes functions of the generated clips alone; `rank_judges` climbs the sanity ladder with all of them;
`bench_metrics` times them. Judges of models (`physnb.likelihood`), judges that need weights (FVD, PickScore) and
questions that need a vision-language model are no functions of clips alone: `NOT_CLIMBED` says why, one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from physnb.bench import seconds_of, spread
from physnb.config import SCENARIOS, require
from physnb.data import Clip, simulate
from physnb.data.takes import second_take
from physnb.ladder import SPEED_ERRORS, RungScore, Sensitivity, climb, detectable_error, verdict
from physnb.metrics import Scores, metric_trajectory
from physnb.metrics.features import EfficientNetLite0, Trajectory
from physnb.metrics.frechet import SetScore, metric_frechet, metric_kernel
from physnb.metrics.physics_iq import (
    AVERAGE_RATE,
    IOUS,
    KERNEL,
    SHRINK,
    SIZE,
    TERMS,
    THRESHOLD,
    measure_takes,
    metric_physics_iq,
)
from physnb.metrics.preference import UNTRAINED, RewardModel, metric_reward
from physnb.metrics.question_making import metric_answers, questions_by_clip
from physnb.metrics.trajectory import RESTORE

Judge = Callable[[Clip], Scores | SetScore]
TRAJECTORY = ("missing_rate", "position_error", "velocity_error", "tracking_error", "radius_drift")
RESTORED = ("position_error", "velocity_error", "tracking_error")  # also with faded discs brought back
AFTER_IMPACT = ("momentum_error", "energy_error")
GIVEN_PRESENCE = ("position_error", "velocity_error", "radius_drift", *AFTER_IMPACT)  # judged beside missing_rate
PHYSICS_IQ = {"physics_iq_verified": "verified", "physics_iq_raw": "physics_iq_raw"}
EXTRACTORS = dict(trajectory=Trajectory, efficientnet=EfficientNetLite0)
NOT_CLIMBED = (  # benchmark, use, reason
    ("PPE (LikePhys)", "hunting", "judges a model and not its clips; paired and cheap, see its section"),
    ("FVD", "not on this data", "needs I3D weights and hundreds of clips, and is blind to single cases"),
    ("PhysBench", "not on this data", "questions about real photographs, for a vision-language model"),
    ("WM-ABench", "not on this data", "its items need a vision-language judge; its four-choice form is in `futures`"),
    ("PickScore", "not on this data", "scores how well a picture fits a natural prompt; coloured discs have none"),
)


def judges(
    true: Clip, second: Clip, *, frames_given: int = 3, reward: RewardModel = UNTRAINED, seed: int = 0
) -> dict[str, Judge]:
    """Every metric of single clips as a function of the clips generated for the cases `true`, by name.

    second: the takes that Physics-IQ divides by; its motion masks are made here, once. Climb with yet other takes, for
    by these ones any metric that knows them is flattered. momentum_error and energy_error come with collisions alone.
    Raises ValueError for clips that do not match, lack a true state, or are too short.
    Leaves out judges of sets: see `set_judges`.
    """
    takes = measure_takes(true, second, frames_given=frames_given)

    def trajectory(name: str, made: Clip, restore: float = 1.0) -> Scores:
        return metric_trajectory(made, true, frames_given=frames_given, restore=restore)[name]

    def physics_iq(name: str, made: Clip) -> Scores:
        return takes.compare(made).scores()[name]

    names = TRAJECTORY + (AFTER_IMPACT if set(true.scenarios) == {"collision"} else ())
    found: dict[str, Judge] = {name: partial(trajectory, name) for name in names}
    found |= {f"{name}/restored": partial(trajectory, name, restore=RESTORE) for name in RESTORED}
    found |= {name: partial(physics_iq, official) for name, official in PHYSICS_IQ.items()}
    asked = questions_by_clip(true, seed=seed)
    found["answers"] = lambda made: metric_answers(made, true, asked=asked)["answer_agreement"]
    found["reward"] = lambda made: metric_reward(made, reward)
    return found


def set_judges(reference: Clip, features: Sequence[str] = ("trajectory",), *, seed: int = 0) -> dict[str, Judge]:
    """Frechet and kernel distances to `reference`, true clips of other cases, on each kind of features, by name.

    Give at least 33 clips a call, and twice as many in `reference`. "efficientnet" needs its package and is slow.
    """
    found: dict[str, Judge] = {}
    for name in features:
        extractor = EXTRACTORS[name]()
        for kind, metric in (("frechet", metric_frechet), ("kernel", metric_kernel)):
            found[f"{kind}_{name}"] = partial(metric, reference=reference, extractor=extractor, seed=seed)
    return found


@dataclass(frozen=True)
class Standing:
    """What a judge is worth on some data: its ladder and verdict, its cost, the speed error it sees (per clip only)."""

    name: str
    rows: tuple[RungScore, ...]
    verdict: dict[str, Any]
    clips_per_second: float
    sensitivity: Sensitivity | None

    @property
    def usable(self) -> str:
        return self.verdict["usable"]

    def to_row(self) -> dict[str, Any]:
        """One row of a table, for JSON: use, mean of every rung, and why the use is not better."""
        v = self.verdict
        rungs = {row.rung: row.mean.to_dict() for row in self.rows}
        why = [*v["failures"], *v["contrast"], *v["unjudged"]]
        why = why or (["judges sets alone"] if self.rows[0].set_level else [])
        return dict(metric=self.name, usable=self.usable) | rungs | dict(why="; ".join(why))

    def to_cost(self) -> dict[str, Any]:
        """Clips per second as measured, and the smallest speed error seen (None: none of those tried, or a set)."""
        smallest = None if self.sensitivity is None else self.sensitivity.smallest
        return dict(metric=self.name, clips_per_second=self.clips_per_second, smallest_speed_error=smallest)


def rank_judges(
    found: Mapping[str, Judge],
    true: Clip,
    second: Clip,
    *,
    frames_given: int = 3,
    clips: int = 48,
    errors: Sequence[float] = SPEED_ERRORS,
    seed: int = 0,
) -> dict[str, Standing]:
    """The standing of every judge on the cases `true`, with `second` as the second take of its ladder.

    clips, errors: `detectable_error` says which of the speed errors a test on so many clips sees with chance 0.95.
    What is judged given presence has missing_rate as its companion in the verdict, where that is among the judges.
    Raises what `climb` and the judges do.
    """
    ladders, costs = {}, {}
    for name, judge in found.items():
        costs[name] = len(true) / seconds_of(lambda judge=judge: judge(true))
        ladders[name] = tuple(climb(judge, true, second, frames_given=frames_given, seed=seed))
    standings = {}
    for name, rows in ladders.items():
        companion = ladders.get("missing_rate") if name in GIVEN_PRESENCE else None
        seen = None
        if not rows[0].set_level:
            seen = detectable_error(found[name], true, clips=clips, errors=errors, frames_given=frames_given)
        standings[name] = Standing(name, rows, verdict(rows, companion), costs[name], seen)
    return standings


def aligned_scores(found: Mapping[str, Judge], made: Clip) -> dict[str, Float[Tensor, " clip"]]:
    """Every per-clip score of generated clips, turned so that lower is better, for `rank_correlation`."""
    scored = {name: judge(made) for name, judge in found.items()}
    return {name: s.values.double() if s.lower_is_better else -s.values.double() for name, s in scored.items()}


# --- costs


def plain_motion(
    video: UInt8[np.ndarray, "time height width 3"], size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks and shrunk frames of one video, whole frame after whole frame, of all frames but the first."""
    masks, frames, average = [], [], None
    for frame in video:
        grey = cv2.GaussianBlur(cv2.cvtColor(cv2.resize(frame, (size, size)), cv2.COLOR_RGB2GRAY), (5, 5), 0)
        average = grey.astype("float") if average is None else average
        cv2.accumulateWeighted(grey, average, AVERAGE_RATE)
        moved = cv2.threshold(cv2.absdiff(grey, cv2.convertScaleAbs(average)), THRESHOLD, 255, cv2.THRESH_BINARY)[1]
        for operation in (cv2.MORPH_OPEN, cv2.MORPH_CLOSE):
            moved = cv2.morphologyEx(moved, operation, KERNEL)
        masks.append(cv2.resize(moved, (size // SHRINK,) * 2) > 127)
        frames.append(cv2.resize(frame, (size // SHRINK,) * 2) / 255.0)
    return masks[1:], frames[1:]


def plain_physics_iq(
    generated: Clip, true: Clip, second: Clip, *, frames_given: int = 3, size: int = SIZE
) -> dict[str, list[float]]:
    """The terms of every clip as the published scripts take them, video by video and frame by frame, without files.

    What `metric_physics_iq` is timed against, and must agree with. Square clips only.
    """
    rows: dict[str, list[float]] = {name: [] for term in TERMS for name in (term, f"variance_{term}")}
    for case in range(len(true)):
        videos = (clip.frames[case, frames_given - 1 :].numpy() for clip in (true, generated, second))
        (masks, frames), *others = (plain_motion(video, size) for video in videos)
        for prefix, (other_masks, other_frames) in zip(("", "variance_"), others, strict=True):
            ious = []
            for one, two in zip(masks, other_masks, strict=True):
                union = np.logical_or(one, two).sum()
                ious.append(np.logical_and(one, two).sum() / union if union else 1.0)
            ever_one, ever_two = np.any(masks, axis=0), np.any(other_masks, axis=0)
            mean_one, mean_two = np.mean(masks, axis=0), np.mean(other_masks, axis=0)
            values = (
                np.mean(ious),
                (ever_one & ever_two).sum() / (ever_one | ever_two).sum(),
                np.minimum(mean_one, mean_two).sum() / np.maximum(mean_one, mean_two).sum(),
            )
            for term, value in zip(IOUS, values, strict=True):
                rows[prefix + term].append(float(value))
            squares = [np.mean((a - b).astype(np.float32) ** 2) for a, b in zip(frames, other_frames, strict=True)]
            rows[prefix + "mse"].append(float(np.mean(squares)))
    return rows


def bench_metrics(clips: int = 36, rounds: int = 5) -> dict[str, Any]:
    """Clips per second of each metric on `clips` clips of 16 frames of 32 x 32, a third of them of each scenario.

    physics_iq: with both takes measured anew, as the plain implementation does too; `ratio` is how many times faster it
    is than that, the median over neighbouring turns. physics_iq_verified, _raw: the takes measured beforehand. The
    distances between sets are left out under 33 clips.
    """
    require(clips >= 6 and clips % 3 == 0, f"clips must be at least 6 and divisible by 3, got {clips}")
    require(rounds > 0, f"rounds must be positive, got {rounds}")
    shape, third = dict(frames=16, size=32), clips // 3
    true = Clip.concatenate([simulate(name, "id", range(third), **shape) for name in SCENARIOS])
    others = [simulate(name, "id", range(third, 3 * third), **shape) for name in SCENARIOS]
    second, made = second_take(true, 1), second_take(true, 2)
    found = judges(true, second)
    if clips > Trajectory.dimension:
        found |= set_judges(Clip.concatenate(others), ("trajectory", "efficientnet"))
    work = {name: partial(judge, made) for name, judge in found.items()}
    work["physics_iq"] = partial(metric_physics_iq, made, true, second)
    work["physics_iq_plain"] = partial(plain_physics_iq, made, true, second)
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            rates[name].append(clips / seconds_of(call))
    rates = {name: values[1:] for name, values in rates.items()}  # the first turn warms up
    ratio = [a / b for a, b in zip(rates["physics_iq"], rates["physics_iq_plain"], strict=True)]
    return dict(
        benchmark="metrics",
        clips=clips,
        clips_per_second={name: spread(values) for name, values in rates.items()},
        physics_iq_baseline="plain per-frame implementation of the published procedure",
        ratio=spread(ratio),
    )
