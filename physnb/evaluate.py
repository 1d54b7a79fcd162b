"""Generate and measure: a model's trajectory table in one world, with the floor of the metric beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from physnb.config import Guidance, require
from physnb.data import simulate
from physnb.generate import generate
from physnb.metrics import metric_trajectory
from physnb.model import VideoDiT

HEADLINE = ("velocity_error", "position_error", "missing_rate")


def evaluate_trajectory(
    model: VideoDiT,
    scenario: str,
    split: str,
    *,
    cases: int,
    frames_given: int = 3,
    seed: int = 0,
    steps: int = 10,
    guidance: Guidance = Guidance(),
    mode: str = "clean",
    metrics: Iterable[str] = HEADLINE,
) -> dict[str, Any]:
    """Each metric as {mean, low, high, floor, judged}; low and high bound 95 % of bootstrapped means over clips.

    The floor is the metric's value on the true clips themselves: pixels cannot tell errors below it.
    Out of distribution, `buckets` splits the table by what lies outside (radius, velocity or both).
    """
    require(cases > 0, f"cases must be positive, got {cases}")
    true = simulate(scenario, split, range(cases), frames=model.config.frames, size=model.config.size, seed=seed)
    made = generate(model, true, frames_given=frames_given, guidance=guidance, steps=steps, seed=seed)
    found = metric_trajectory(made, true, frames_given=frames_given, mode=mode)
    floor = metric_trajectory(true, true, frames_given=frames_given, mode=mode)
    metrics = [name for name in metrics if name in found]

    def table(rows: list[int]) -> dict[str, Any]:
        result = {}
        for name in metrics:
            estimate = type(found[name])(
                name, found[name].unit, found[name].values[rows], tuple(found[name].reasons[i] for i in rows)
            ).estimate()
            result[name] = estimate.to_dict() | {"floor": _mean(floor[name].values[rows])}
        return result

    buckets = sorted(set(true.buckets))
    result = dict(scenario=scenario, split=split, mode=mode, cases=cases, frames_given=frames_given, seed=seed)
    result |= dict(steps=steps) | table(list(range(cases)))
    result["judged"] = min(result[name]["judged"] for name in metrics)
    if len(buckets) > 1:
        result["buckets"] = {b: table([i for i, name in enumerate(true.buckets) if name == b]) for b in buckets}
    return result


def _mean(values) -> float | None:
    mean = float(values.nanmean())
    return None if mean != mean else mean
