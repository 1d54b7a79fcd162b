"""How much guidance: a head set at every weight, strength and interval of steps, beside other methods at their best.

weight_grid, interval_grid    the trials to look at
measure_arms                  their scores against no guidance, case by case
describe_surface              where it helps, saturates and breaks
tune                          each method's best setting, chosen on selection cases and judged on others
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from physnb.config import Guidance, HeadSet, HuntConfig, LayerSkip, OtherModel, require
from physnb.confirm import (
    METRIC_UNITS,
    ArmResult,
    arm_values,
    best_layer,
    layer_heads,
    random_head_sets,
    require_disjoint,
)
from physnb.metrics.colour import stretch_contrast
from physnb.ranking import check_subject_heads
from physnb.statistics import Estimate, paired_difference
from physnb.subjects import ModelSubject
from physnb.trials import Trials

SURFACE_UNITS = METRIC_UNITS | {"oversaturation": "share"}
RESTORED_UNITS = {f"{metric}/restored": unit for metric, unit in METRIC_UNITS.items()}  # blind to contrast
Key = TypeVar("Key", bound=Hashable)
Point = tuple[float, float]  # weight w and strength u, or first and last step as shares of the sampling


def weight_grid(
    hunt: HuntConfig, heads: HeadSet, weights: Sequence[float], strengths: Sequence[float]
) -> dict[Point, Guidance]:
    """The trial of every (weight w, strength u); one of 0 is no guidance at all."""
    return {
        (float(w), float(u)): Guidance() if w == 0 or u == 0 else hunt.guidance(heads, w, u)
        for u in strengths
        for w in weights
    }


def interval_grid(guidance: Guidance, steps: int) -> dict[Point, Guidance]:
    """The same guidance in every run of neighbouring steps, by (start, stop) as shares of the sampling."""
    require(steps > 0, f"steps must be positive, got {steps}")
    return {
        (first / steps, last / steps): replace(guidance, start=first / steps, stop=last / steps)
        for first in range(steps)
        for last in range(first + 1, steps + 1)
    }


def measure_arms(
    trials: Trials, arms: Mapping[Key, Guidance], cases: Sequence[int] | None = None, label: str = "strength"
) -> dict[Key, ArmResult]:
    """The subject's judge on every arm and on no guidance, case by case: SURFACE_UNITS or RESTORED_UNITS."""
    trials.scores([Guidance(), *arms.values()], cases, label=label)  # all at once, in full batches
    metrics = SURFACE_UNITS | RESTORED_UNITS
    baseline = arm_values(trials, [Guidance()], cases, metrics)
    return {
        key: ArmResult(str(key), arm_values(trials, [trial], cases, metrics), baseline) for key, trial in arms.items()
    }


def effects_of(arms: Mapping[Key, ArmResult]) -> dict[str, dict[Key, dict]]:
    """Paired difference to no guidance by metric and arm, as dicts for JSON and figures."""
    names = next(iter(arms.values())).values
    return {name: {key: arm.difference(name).to_dict() for key, arm in arms.items()} for name in names}


def saturation_weight(arms: Mapping[Point, ArmResult], u: float, metric: str) -> float:
    """The smallest weight at strength u beyond which no larger one is better: the paired interval holds 0 or is above.

    Intervals are not corrected for how many weights are compared, so the answer errs on the side of a larger weight.
    """
    weights = sorted(w for w, strength in arms if strength == u)
    require(len(weights) > 0, f"no point has strength u = {u:g}")

    def better(more: float, less: float) -> bool:
        return paired_difference(arms[more, u].values[metric], arms[less, u].values[metric]).high < 0

    return next(w for w in weights if not any(better(more, w) for more in weights if more > w))


def describe_surface(arms: Mapping[Point, ArmResult], objective: str) -> list[str]:
    """Sentences on where guidance helps, where more of it adds nothing, and where it breaks something.

    objective: a metric that is better when lower, as all of SURFACE_UNITS are.
    """
    active = {point: arm for point, arm in arms.items() if min(point) > 0}
    require(len(active) > 0, "every point has w = 0 or u = 0; give one that guides")
    effects = {point: arm.difference(objective) for point, arm in active.items()}
    helps = [point for point, effect in effects.items() if effect.high < 0]
    (w, u), best = min(effects.items(), key=lambda item: item[1].mean)
    said = [
        f"helps: {objective} falls beyond doubt at {len(helps)} of {len(active)} points; "
        f"lowest at w = {w:g}, u = {u:g}: {best.mean:+.3f} [{best.low:+.3f}, {best.high:+.3f}]"
    ]
    at = saturation_weight(arms, u, objective)
    larger = [weight for weight, strength in active if strength == u and weight > at]
    no_more = f"no larger weight is better than w = {at:g}" if larger else f"not reached up to w = {at:g}"
    said.append(f"saturates: at u = {u:g} {no_more}")
    for metric in ("missing_rate", "velocity_error", "oversaturation"):
        if metric == objective or metric not in arms[w, u].values:
            continue
        worse = [(w, u) for (w, u), arm in active.items() if arm.difference(metric).low > 0]
        first = f" from w = {min(worse)[0]:g}, u = {min(worse)[1]:g} on" if worse else ""
        said.append(f"breaks: {metric} rises beyond doubt at {len(worse)} of {len(active)} points{first}")
    return said


@dataclass(frozen=True)
class TunedMethod:
    """A method at the setting that did best on the selection cases: what it promised, and what it did on others."""

    name: str
    setting: str
    guidance: Guidance
    promised: Estimate
    arm: ArmResult

    def to_row(self) -> dict:
        """As one dict, ready for JSON and for `plots.plot_differences`."""
        return self.arm.to_row() | dict(method=self.name, setting=self.setting, promised=self.promised.to_dict())


def method_settings(
    selection: Trials, hunt: HuntConfig, heads: HeadSet, weights: Sequence[float], strengths: Sequence[float],
    others: Sequence[str] = (), cases: Sequence[int] | None = None,
) -> dict[str, dict[str, Guidance]]:  # fmt: skip
    """What each method may be set to, by its name in tables and then by setting; nothing here is chosen by hand.

    The hunted heads over (w, u); the same over w alone for as many random heads, for the layer that helps most as a
    whole (PAG), for SEG on that layer, for CFG, for leaving that layer out (STG-R) and for AutoGuidance by others.
    """
    heads = check_subject_heads(selection, heads)
    every = selection.subject.heads
    layer = best_layer(selection, hunt, cases)
    whole, random = layer_heads(every)[layer], random_head_sets(every, len(heads), 1, hunt.seed)[0]
    weights = [w for w in weights if w != 0]
    grid = weight_grid(hunt, heads, weights, [u for u in strengths if u != 0])
    by_weight = {
        f"{len(heads)} random heads": lambda w: hunt.guidance(random, w, 1.0),
        f"best layer, L{layer}": lambda w: hunt.guidance(whole, w, 1.0),
        f"SEG, L{layer}": lambda w: Guidance.from_heads(whole, w, kind="mean_query"),
        f"skip, L{layer}": lambda w: Guidance(weak=((w, LayerSkip((layer,))),)),
        "CFG": lambda w: Guidance(text_weight=w),
        **{f"AutoGuidance {name}": lambda w, name=name: Guidance(weak=((w, OtherModel(name)),)) for name in others},
    }
    settings = {name: {f"w = {w:g}": guided(w) for w in weights} for name, guided in by_weight.items()}
    hunted = {f"w = {w:g}, u = {u:g}": guidance for (w, u), guidance in grid.items()}
    return settings | {f"{len(heads)} hunted heads": hunted}


def most_helpful(tried: Mapping[Key, Estimate], sign: int) -> Key:
    """The setting with the lowest mean, after turning by the objective's sign; one that nothing could judge is last."""
    return min(tried, key=lambda key: math.inf if math.isnan(tried[key].mean) else sign * tried[key].mean)


def tune(
    selection: Trials,
    confirmation: Trials,
    methods: Mapping[str, Mapping[str, Guidance]],
    cases: Sequence[int] | None = None,
) -> list[TunedMethod]:
    """Every method at its own best setting on `cases` of the selection, measured on the confirmation cases.

    A method with more settings to choose from promises more by luck; the confirmation cases know nothing of that.
    Raises ValueError if the two share a case.
    """
    require_disjoint(selection, confirmation)
    flat = {(name, setting): trial for name, found in methods.items() for setting, trial in found.items()}
    objective, sign = selection.subject.objective.name, selection.subject.objective.sign
    tried = {key: arm.difference(objective) for key, arm in measure_arms(selection, flat, cases, "tune").items()}
    best = {
        name: most_helpful({(name, setting): tried[name, setting] for setting in found}, sign)
        for name, found in methods.items()
    }
    arms = measure_arms(confirmation, {name: flat[key] for name, key in best.items()}, label="confirm")
    return [TunedMethod(name, key[1], flat[key], tried[key], arms[name]) for name, key in best.items()]


def contrast_arms(trials: Trials, gains: Sequence[float], cases: Sequence[int] | None = None) -> dict[float, ArmResult]:
    """The unguided clips after `metrics.colour.stretch_contrast`, by gain, against what they were.

    A control of the picture rather than of the motion: a faded disc that counts as missing is found again, and nothing
    moves. The gain is what a painter could do, with no model and no head. Values beyond black are cut off.
    """
    subject = trials.subject
    require(isinstance(subject, ModelSubject), "contrast to a white ground is that of the simulated worlds")
    cases = list(trials.cases if cases is None else cases)
    unguided = trials.clips([Guidance()], cases)[Guidance()]

    def values(gain: float) -> dict[str, Tensor]:
        found = subject.scorer(stretch_contrast(replace(subject.cases[cases], frames=unguided), gain), cases)
        return {name: scores.values for name, scores in found.items() if name in SURFACE_UNITS}

    plain = values(1.0)
    return {gain: ArmResult(f"contrast x {gain:g}", values(gain), plain) for gain in gains}


def tune_contrast(
    selection: Trials, confirmation: Trials, gains: Sequence[float], cases: Sequence[int] | None = None
) -> TunedMethod:
    """The gain of `contrast_arms` that does best on `cases` of the selection, measured on the confirmation cases.

    Raises ValueError if the two share a case.
    """
    require_disjoint(selection, confirmation)
    objective, sign = selection.subject.objective.name, selection.subject.objective.sign
    tried = {gain: arm.difference(objective) for gain, arm in contrast_arms(selection, gains, cases).items()}
    best = most_helpful(tried, sign)
    arm = contrast_arms(confirmation, [best])[best]
    return TunedMethod("contrast alone", f"x {best:g}", Guidance(), tried[best], arm)
