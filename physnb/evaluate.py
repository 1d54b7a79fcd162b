"""Measure a model in one world: errors of what it generates, distances between sets, and what it holds plausible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from physnb.config import SCENARIOS, Guidance, Perturbation, choose, require
from physnb.data import Clip, simulate
from physnb.data.variants import kinds_for, make_impossible
from physnb.generate import generate
from physnb.likelihood import four_futures, futures_accuracy, preference_error
from physnb.metrics import Scores, metric_trajectory
from physnb.metrics.features import I3D, EfficientNetLite0, Trajectory
from physnb.metrics.frechet import metric_frechet, metric_kernel
from physnb.metrics.law import metric_law
from physnb.model import VideoDiT
from physnb.space import space_of
from physnb.statistics import bootstrap_mean
from physnb.store import written_whole

HEADLINE = ("velocity_error", "position_error", "missing_rate", "law_residual")


def shape_of(model: VideoDiT) -> dict[str, int]:
    """Frames and pixels of the clips that a model makes, as `simulate` takes them."""
    space = space_of(model)
    return dict(frames=space.frames, size=space.size)


def evaluate_trajectory(
    model: VideoDiT,
    scenario: str,
    split: str,
    *,
    cases: int,
    frames_given: int = 3,
    seed: int = 0,
    steps: int = 10,
    solver: str = "euler",
    guidance: Guidance = Guidance(),
    mode: str = "clean",
    metrics: Iterable[str] = HEADLINE,
) -> dict[str, Any]:
    """Each metric as {mean, low, high, floor, judged}; low and high bound 95 % of bootstrapped means over clips.

    The floor is the metric's value on the true clips themselves: pixels cannot tell errors below it.
    Out of distribution, `buckets` splits the table by what lies outside (radius, velocity or both).
    """
    require(cases > 0, f"cases must be positive, got {cases}")
    true = simulate(scenario, split, range(cases), **shape_of(model), seed=seed)
    floor = judge_motion(true, true, frames_given, mode)  # refuses bad settings before the work
    made = generate(model, true, frames_given=frames_given, guidance=guidance, steps=steps, solver=solver, seed=seed)
    found = judge_motion(made, true, frames_given, mode)
    metrics = [name for name in metrics if name in found]

    def table(rows: list[int]) -> dict[str, Any]:
        result = {}
        for name in metrics:
            result[name] = bootstrap_mean(found[name].values[rows]).to_dict()
            result[name]["floor"] = bootstrap_mean(floor[name].values[rows]).to_dict()["mean"]
        return result

    buckets = sorted(set(true.buckets))
    result = dict(scenario=scenario, split=split, mode=mode, cases=cases, frames_given=frames_given, seed=seed)
    result |= dict(steps=steps, solver=solver) | table(list(range(cases)))
    result["judged"] = min(result[name]["judged"] for name in metrics)
    if len(buckets) > 1:
        result["buckets"] = {b: table([i for i, name in enumerate(true.buckets) if name == b]) for b in buckets}
    return result


def judge_motion(generated: Clip, true: Clip, frames_given: int, mode: str) -> dict[str, Scores]:
    """The trajectory metrics of a mode, and in "clean" the residual of the law."""
    found = metric_trajectory(generated, true, frames_given=frames_given, mode=mode)
    return found | (metric_law(generated, true, frames_given=frames_given) if mode == "clean" else {})


def evaluate_plausibility(
    model: VideoDiT,
    scenario: str,
    split: str,
    *,
    cases: int,
    frames_given: int = 3,
    seed: int = 0,
    guidance: Guidance = Guidance(),
    perturbation: Perturbation | None = None,
) -> dict[str, Any]:
    """Whether a model prefers lawful clips to law-breaking ones, as rows {score, mean, low, high, judged, cases}.

    Nothing is generated. The scores are those of `preference_scores`, and `futures`: the lawful one of four. guidance
    or perturbation judge the guided or the broken model instead.
    """
    require(cases > 0, f"cases must be positive, got {cases}")
    true = simulate(scenario, split, range(cases), **shape_of(model), seed=seed)
    variants = [make_impossible(true, kind, frames_given=frames_given, seed=seed) for kind in kinds_for(scenario)]
    settings = dict(frames_given=frames_given, seed=seed, guidance=guidance, perturbation=perturbation)
    found = preference_error(model, true, variants, **settings)
    found["futures"] = futures_accuracy(model, four_futures(true, frames_given=frames_given, seed=seed), **settings)
    rows = [dict(score=name) | scores.estimate().to_dict() for name, scores in found.items()]
    return dict(scenario=scenario, split=split, cases=cases, frames_given=frames_given, seed=seed, scores=rows)


def evaluate_frechet(
    model: VideoDiT,
    scenario: str,
    split: str,
    *,
    cases: int,
    features: str = "trajectory",
    weights: str | None = None,
    frames_given: int = 3,
    seed: int = 0,
    steps: int = 10,
    solver: str = "euler",
    guidance: Guidance = Guidance(),
) -> dict[str, Any]:
    """Frechet and kernel distance between generated clips and as many true ones of other cases, with their floors.

    features: one of "trajectory", "efficientnet", "i3d", the last with the path of its weights.
    Raises ValueError for fewer clips than the features need.
    """
    choose("features", features, ("trajectory", "efficientnet", "i3d"))
    require(features != "i3d" or weights is not None, "I3D needs its weights; give --weights, a local file")
    extractor = dict(trajectory=Trajectory, efficientnet=EfficientNetLite0, i3d=partial(I3D, weights))[features]()
    shape = shape_of(model) | dict(seed=seed)
    true = simulate(scenario, split, range(cases), **shape)
    reference = simulate(scenario, split, range(cases, 3 * cases), **shape)
    metric_kernel(true, reference, extractor, seed=seed)  # refuses bad settings before the work
    made = generate(model, true, frames_given=frames_given, guidance=guidance, steps=steps, solver=solver, seed=seed)
    metrics = [metric_kernel] if cases <= extractor.dimension else [metric_frechet, metric_kernel]
    rows = [asdict(metric(made, reference, extractor, seed=seed)) for metric in metrics]
    return dict(scenario=scenario, split=split, cases=cases, seed=seed, steps=steps, solver=solver, scores=rows)


def result_table(
    model: VideoDiT, *, cases: int, seed: int, frames_given: int = 3, scenarios: Sequence[str] = SCENARIOS
) -> list[dict[str, Any]]:
    """`evaluate_trajectory` in every scenario, in and out of distribution, as one row each."""
    return [
        evaluate_trajectory(model, scenario, split, cases=cases, frames_given=frames_given, seed=seed)
        for split in ("id", "ood")
        for scenario in scenarios
    ]


def error_rows(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The headline columns of a `result_table`: estimates, floor of the position error, clips judged."""
    names = ("scenario", "split", "position_error", "velocity_error", "missing_rate")
    return [
        {name: row[name] for name in names} | dict(floor=row["position_error"]["floor"], judged=row["judged"])
        for row in table
    ]


def sample_grid(model: VideoDiT, step: int, folder: Path, scenarios: Sequence[str] = SCENARIOS) -> dict[str, float]:
    """Position errors on 8 unseen clips a scenario, after writing the first of each, true above generated, as a PNG."""
    errors, rows = {}, []
    for scenario in scenarios:
        true = simulate(scenario, "id", range(8), **shape_of(model))
        made = generate(model, true, steps=5)
        scored = metric_trajectory(made, true)["position_error"]
        errors[f"position_error/{scenario}"] = float(scored.values.nanmean())
        rows += [clip.frames[0].transpose(0, 1).flatten(1, 2) for clip in (true, made)]
    (folder / "samples").mkdir(exist_ok=True)
    with written_whole(folder / "samples" / f"step-{step:06d}.png") as temporary:
        Image.fromarray(torch.cat(rows).numpy()).save(temporary, format="png")
    return errors
