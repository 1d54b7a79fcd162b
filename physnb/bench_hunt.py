"""What a hunt costs: HeadHunter's published loop against ours, and where the difference comes from.

The published loop is the oracle too: one case at a time, every head, C and P as two rows of one full forward (as in the
PAG pipelines that HeadHunter's script drives), a mean a head. Ours must give the same scores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from physnb.bench import spread
from physnb.config import PROMISES, Guidance, HeadSet, HuntConfig, require
from physnb.flow import solve, velocity_from_clean
from physnb.generate import conditions, initial_noise
from physnb.hooks import perturb_rows
from physnb.memory import keep_freed_memory
from physnb.model import VideoDiT
from physnb.race import race_heads
from physnb.ranking import rank_heads
from physnb.subjects import ModelSubject, Row, simulated_subject
from physnb.trials import Trials

SAMPLED_CASES = 4  # on which the published loop is timed, one head a layer; more of it would take an hour
BATCHED_CASES = 16  # on which the steps between the two are timed
STEPS_CASES = 24  # on which hunts of few and of many sampling steps are compared
MANY_STEPS = 20  # HeadHunter's


def published_scores(subject: ModelSubject, rows: Sequence[Row]) -> Float[Tensor, " row"]:
    """The objective of rows generated together, without fork or sharing: every step is a full forward of C and P."""
    model, trials, cases = subject.model, [trial for trial, _ in rows], [case for _, case in rows]
    part = subject.cases[cases]
    weights, broken = zip(*(trial.weak[0] for trial in trials), strict=True)
    weight = torch.tensor(weights, device=model.device).view(-1, 1, 1, 1, 1)
    known = conditions(model, part, subject.frames_given)
    start, given, caption = (torch.cat([x, x]) for x in known)

    def velocity(noised: Tensor, sigma: Tensor, progress: float) -> Tensor:
        with torch.inference_mode(), perturb_rows(model, [*[None] * len(rows), *broken]):
            both = model(torch.cat([noised, noised]), torch.cat([sigma, sigma]), start, given, caption).sample
        conditional, weak = both.chunk(2)
        return velocity_from_clean(noised, conditional + weight * (conditional - weak), sigma)

    noise = initial_noise(model, part, subject.seed).to(model.device)
    clean = solve(velocity, noise, steps=subject.steps, solver=subject.solver, shift=model.config.noise_shift)
    made = part.with_pixels(torch.where(known[1][:, None, :, None, None] > 0, known[0], clean))
    return subject.scorer(made, cases)[subject.objective.name].values


def published_loop(subject: ModelSubject, rows: Sequence[Row]) -> Float[Tensor, " row"]:
    """HeadHunter's loop: one head and one case after the other."""
    return torch.cat([published_scores(subject, [row]) for row in rows])


def seconds_a_row(work: Callable[[list[Row]], Any], chunks: Sequence[list[Row]]) -> float:
    """Seconds that one row takes when these chunks run one after the other."""
    begun = time.perf_counter()
    for chunk in chunks:
        work(chunk)
    return (time.perf_counter() - begun) / sum(map(len, chunks))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def ways_to_score(subject: ModelSubject, hunt: HuntConfig, heads: HeadSet) -> dict[str, Callable[[], float]]:
    """Seconds a row of each way from the published loop to ours, one change at a time, on one head a layer."""
    few, many = range(SAMPLED_CASES), range(BATCHED_CASES)
    trials = [hunt.guidance((head,)) for head in heads]
    batch = subject.rows_that_fit()
    by_head = [[(trial, case) for case in many] for trial in trials]
    mixed = [(trial, case) for case in many for trial in trials]
    mixed = [mixed[first : first + batch] for first in range(0, len(mixed), batch)]

    def ours() -> float:
        fresh = Trials(subject, progress=False)
        seconds, _ = timed(lambda: fresh.scores(trials, many))
        return seconds / fresh.rows_run

    single = [[(trial, case)] for trial in trials for case in few]
    return {
        "published": lambda: seconds_a_row(lambda rows: published_loop(subject, rows), single),
        "many rows a batch": lambda: seconds_a_row(lambda rows: published_scores(subject, rows), mixed),
        "and a fork at the first broken layer": lambda: seconds_a_row(subject.score, by_head),
        "and one first prediction a case": ours,
    }


def bench_hunt(model: VideoDiT, hunt: HuntConfig, rounds: int = 7) -> dict[str, Any]:
    """A hunt by the published loop against ours, on one model, in one run.

    exhaustive_ratio: seconds of the published loop, timed on one head a layer and SAMPLED_CASES cases and scaled to all
    heads and cases, over the seconds of `rank_heads`, which runs whole. racing_ratio: the same over those of a race
    promising each head, which also runs whole; recall: the share of the exhaustive top k that such races find.
    races: the same for both promises. max_score_difference: between both loops, on the sample.
    factors: seconds a row, one change after the other. steps: what hunts of fewer sampling steps find of the one of
    MANY_STEPS, on STEPS_CASES cases; that factor is in no ratio. growth: seconds of exhaustive hunts of other sizes.
    """
    require(rounds > 0, f"rounds must be positive, got {rounds}")
    keep_freed_memory()
    subject = simulated_subject(model, hunt, "selection")
    require(len(subject.case_names) >= STEPS_CASES, f"the bench needs {STEPS_CASES} selection cases or more")
    layers = sorted({head.layer for head in subject.heads})
    sample = tuple(next(head for head in subject.heads if head.layer == layer) for layer in layers)

    ways = ways_to_score(subject, hunt, sample)
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            value = way()
            if turn > 0:  # the first turn warms up
                seconds[name].append(value)
    published = float(np.median(seconds["published"]))
    factors = [
        dict(
            way=name,
            milliseconds_a_row=1e3 * float(np.median(found)),
            times_published=spread([p / s for p, s in zip(seconds["published"], found, strict=True)]),
        )
        for name, found in seconds.items()
    ]

    trials = Trials(subject, progress=False)
    exhaustive_seconds, ranking = timed(lambda: rank_heads(trials, hunt.guidance))
    count = ranking.effects.numel()
    races = {promise: bench_races(subject, trials, hunt, promise, max(5, rounds)) for promise in PROMISES}
    for result in races.values():
        result["racing_ratio"] = published * count / result["seconds"]
    rows = [(hunt.guidance((head,)), case) for head in sample for case in range(SAMPLED_CASES)]
    slow = published_loop(subject, rows).view(len(sample), -1)
    fast = trials.scores([hunt.guidance((head,)) for head in sample], range(SAMPLED_CASES))
    return dict(
        benchmark="hunt",
        hunt=dict(heads=len(subject.heads), cases=len(subject.case_names), top_k=hunt.top_k, steps=hunt.steps),
        exhaustive_ratio=published * count / exhaustive_seconds,
        racing_ratio=races["head"]["racing_ratio"],
        max_score_difference=float((slow - fast).abs().nan_to_num().max()),
        recall=races["head"]["recall"],
        published_seconds=published * count,
        published_timed_on=dict(heads=len(sample), cases=SAMPLED_CASES),
        exhaustive_seconds=exhaustive_seconds,
        factors=factors,
        races=races,
        steps=compare_steps(model, hunt),
        growth=growth(subject, hunt),
        layers=layer_costs(subject, hunt, sample),
    )


def bench_races(
    subject: ModelSubject, known: Trials, hunt: HuntConfig, promise: str, repetitions: int
) -> dict[str, Any]:
    """Seconds of one whole race; recall and share of rows over orders of the cases, from rows that are known."""
    settings = dict(k=hunt.top_k, confidence=hunt.confidence, promise=promise)
    top = rank_heads(known, hunt.guidance).top(hunt.top_k)
    seconds, race = timed(
        lambda: race_heads(Trials(subject, progress=False), hunt.guidance, seed=hunt.seed, **settings)
    )
    known_rows = len(known.subject.heads) * len(known.cases)
    races = [race_heads(known, hunt.guidance, seed=hunt.seed + turn, **settings) for turn in range(repetitions)]
    return dict(
        seconds=seconds,
        recall=spread([len(set(r.winners) & set(top)) / len(top) for r in races]),
        mean_recall=float(np.mean([len(set(r.winners) & set(top)) / len(top) for r in races])),
        same_set=float(np.mean([r.winners == top for r in races])),
        rows=spread([r.rows / known_rows for r in races]),
        stages=[dataclasses.asdict(stage) for stage in race.stages],
    )


def compare_steps(model: VideoDiT, hunt: HuntConfig) -> list[dict[str, Any]]:
    """What hunts of fewer sampling steps find of the one of MANY_STEPS, on the same cases."""
    few = dataclasses.replace(hunt, selection_cases=STEPS_CASES // len(hunt.scenarios))
    rankings, seconds = {}, {}
    for steps in sorted({hunt.steps, 2 * hunt.steps, MANY_STEPS}):
        trials = Trials(simulated_subject(model, dataclasses.replace(few, steps=steps), "selection"), progress=False)
        seconds[steps], rankings[steps] = timed(lambda trials=trials: rank_heads(trials, hunt.guidance))
    top = set(rankings[MANY_STEPS].top(hunt.top_k))
    means = {steps: ranking.means for steps, ranking in rankings.items()}
    return [
        dict(
            steps=steps,
            seconds=seconds[steps],
            rank_correlation=float(spearmanr(means[steps], means[MANY_STEPS]).statistic),
            recall=len(top & set(ranking.top(hunt.top_k))) / len(top),
        )
        for steps, ranking in rankings.items()
    ]


def growth(subject: ModelSubject, hunt: HuntConfig) -> list[dict[str, Any]]:
    """Seconds of exhaustive hunts with a half and a quarter of the heads and of 24 cases."""
    heads, cases = subject.heads, 24
    sizes = [(len(heads) // 4, cases), (len(heads) // 2, cases), (len(heads), cases // 4), (len(heads), cases // 2)]
    rows = []
    for many, few in sizes:
        chosen = heads[:: max(1, len(heads) // many)][:many]
        trials = Trials(subject, progress=False)
        guidances = [Guidance(), *(hunt.guidance((head,)) for head in chosen)]
        seconds, _ = timed(lambda trials=trials, g=guidances, n=few: trials.scores(g, range(n)))
        rows.append(dict(heads=many, cases=few, seconds=seconds, milliseconds_a_row=1e3 * seconds / trials.rows_run))
    return rows


def layer_costs(subject: ModelSubject, hunt: HuntConfig, sample: HeadSet) -> list[dict[str, Any]]:
    """Milliseconds a row when the first broken layer is each of the model's: later ones share more with C."""
    cases = range(BATCHED_CASES)
    return [
        dict(
            layer=head.layer,
            milliseconds_a_row=1e3 * seconds_a_row(subject.score, [[(hunt.guidance((head,)), case) for case in cases]]),
        )
        for head in sample
    ]
