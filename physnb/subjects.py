"""What a hunt experiments on: a model or a pipeline, its cases, and the objective that scores every trial and case.

A trial is a guidance; row (guidance, case) has the same cases and the same noise in every trial, so differences
between trials are paired. A subject knows nothing of batches, stores or search: `physnb.trials` runs it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from physnb.checkpoint import config_json, fingerprint
from physnb.config import Guidance, HeadSet, HuntConfig, Perturbation, choose, require
from physnb.data import Clip, simulate
from physnb.families import heads_of
from physnb.generate import check_cases, conditions, generate
from physnb.guidance import guided_velocity
from physnb.guide import guide, transformers_of
from physnb.memory import free_bytes, peak_bytes
from physnb.metrics import Scores
from physnb.model import VideoDiT
from physnb.objectives import Objective, objective_named
from physnb.pretrained import generate_clips
from physnb.space import space_of

MOST_ROWS = {False: 64, True: 512}  # on a CPU, on a GPU; more were no faster on a CPU
CACHED_BYTES = 3 << 22  # of clips, on a CPU: more of them leave its caches, and are slower by a third
Row = tuple[Guidance, int]  # a trial and the number of a case


class Subject(Protocol):
    """What the search needs to know of whatever it searches.

    case_names: unique, also between subjects of one store. identity: all that decides a row's scores besides its
    guidance and its case; what differs in it never mixes.
    """

    objective: Objective
    heads: HeadSet
    case_names: tuple[str, ...]
    identity: dict[str, Any]

    def score(self, rows: Sequence[Row]) -> dict[str, Float[Tensor, " row"]]:
        """Scores of every row by name, the objective among them; NaN where a row cannot be judged."""
        ...

    def make(self, rows: Sequence[Row]) -> Clip:
        """The generated clip of every row: what a judge of clips scores."""
        ...

    def rows_that_fit(self) -> int:
        """How many rows run best together."""
        ...


def judged(objective: Objective, scores: Mapping[str, Scores], rows: Sequence[Row]) -> dict[str, Float[Tensor, " row"]]:
    """The values of a judge's scores; raises ValueError unless the objective is among them, one value a row."""
    require(objective.name in scores, f"judge {objective.judge.name} gives {', '.join(scores)}, no {objective.name}")
    better = {True: "lower", False: "higher"}
    says, wanted = (better[x.lower_is_better] for x in (scores[objective.name], objective))
    require(
        says == wanted, f"{objective.name} is better when {says}, but the objective is told {wanted}; make both agree"
    )
    values = {name: found.values.float() for name, found in scores.items()}
    for name, found in values.items():
        require(found.shape == (len(rows),), f"{name} has {tuple(found.shape)} values for {len(rows)} rows")
        require(not bool(found.isinf().any()), f"{name} is infinite; give NaN where a clip cannot be judged")
    return values


@dataclass(eq=False)
class ModelSubject:
    """A VideoDiT on simulated cases.

    seed: of the noise. others: networks that OtherModel guidance names.
    Raises ValueError for cases that do not fit the model or the objective.
    """

    model: VideoDiT
    cases: Clip
    objective: Objective
    frames_given: int = 3
    steps: int = 5
    solver: str = "euler"
    seed: int = 0
    others: Mapping[str, VideoDiT] | None = None

    def __post_init__(self) -> None:
        check_cases(self.model, self.cases, self.frames_given)
        self.scorer = self.objective.judge.prepare(self.cases, self.frames_given, self.seed)
        self.heads = heads_of(self.model)

    @cached_property
    def case_names(self) -> tuple[str, ...]:
        """`collision/v/12/0a1b2c`: scenario, what lies out of distribution, number, and a hash of the true clip."""
        parts = zip(self.cases.scenarios, self.cases.buckets, self.cases.indices.tolist(), strict=True)
        hashes = (hashlib.sha256(frames.numpy().tobytes()).hexdigest()[:6] for frames in self.cases.frames)
        return unique("/".join(map(str, (*part, digest))) for part, digest in zip(parts, hashes, strict=True))

    @cached_property
    def identity(self) -> dict[str, Any]:
        judge = self.objective.judge
        settings = dict(frames_given=self.frames_given, seed=self.seed)
        if judge.generates:
            settings |= dict(steps=self.steps, solver=self.solver)
        others = {name: fingerprint(model) for name, model in sorted((self.others or {}).items())}
        return dict(model=fingerprint(self.model), judge=f"{judge.name}@{judge.version}", **settings, others=others)

    def rows_that_fit(self) -> int:
        """As many as half of the free memory holds, and no more than a processor's caches or a GPU's cores make use of.

        Measured on a forward of two rows whose first layer is broken.
        """
        on_gpu = self.model.device.type == "cuda"
        clip_bytes = 4 * math.prod(self.model.clip_shape)
        most = MOST_ROWS[on_gpu] if on_gpu else min(MOST_ROWS[on_gpu], max(1, CACHED_BYTES // clip_bytes))
        part = self.cases[[0, 0]]
        start, given, caption = conditions(self.model, part, self.frames_given)
        guidance = [Guidance.from_heads([head], 1.0) for head in self.heads[:2]]
        velocity = guided_velocity(self.model, start, given, caption, guidance * (2 // len(guidance)))
        noise = torch.stack([torch.full_like(start[0], row) for row in range(2)])  # else both share one prediction
        level = torch.ones(2, device=self.model.device)
        bytes_a_row = peak_bytes(lambda: velocity(noise, level, 0.0), self.model.device) / 2
        return max(1, min(most, int(0.5 * free_bytes(self.model.device) / bytes_a_row)))

    def score(self, rows: Sequence[Row]) -> dict[str, Float[Tensor, " row"]]:
        guidance, numbers = [g for g, _ in rows], [case for _, case in rows]
        if not self.objective.judge.generates:
            return judged(self.objective, self.scorer(self.model, guidance, numbers, self.others), rows)
        return judged(self.objective, self.scorer(self.make(rows), numbers), rows)

    def make(self, rows: Sequence[Row]) -> Clip:
        return generate(
            self.model,
            self.cases[[case for _, case in rows]],
            frames_given=self.frames_given,
            guidance=[guidance for guidance, _ in rows],
            steps=self.steps,
            solver=self.solver,
            seed=self.seed,
            batch_size=len(rows),
            others=self.others,
        )


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names, none of them twice."""
    names = tuple(names)
    require(len(names) > 0, "there is no case")
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"case {twice} is there twice")
    return names


def simulated_subject(
    model: VideoDiT,
    hunt: HuntConfig,
    part: str,
    *,
    split: str | None = None,
    objective: str | Objective | None = None,
    others: Mapping | None = None,
) -> ModelSubject:
    """The selection or the confirmation cases of a hunt in simulated worlds; the two have no case in common.

    part: "selection", the first `selection_cases` of each scenario, or "confirmation", the next `confirmation_cases`.
    split, objective: if not the hunt's own.
    """
    choose("part of a hunt", part, ("selection", "confirmation"))
    first, count = hunt.selection_cases, hunt.confirmation_cases
    numbers = range(first) if part == "selection" else range(first, first + count)
    space = space_of(model)
    shape = dict(frames=space.frames, size=space.size, seed=hunt.seed)
    cases = Clip.concatenate([simulate(name, split or hunt.split, numbers, **shape) for name in hunt.scenarios])
    settings = dict(frames_given=hunt.frames_given, steps=hunt.steps, seed=hunt.seed + 1)
    if not isinstance(objective, Objective):
        objective = objective_named(objective or hunt.objective)
    return ModelSubject(model, cases, objective, **settings, others=others)


@dataclass(eq=False)
class PipelineSubject:
    """A diffusers pipeline on (prompt, seed) pairs, HeadHunter's cases; rows run one at a time.

    objective: of the generated clip alone, for a prompt has no true clip. fps: what the model was trained for.
    settings: further arguments of the pipeline's call, for example height, width, num_frames, guidance_scale.
    """

    pipe: DiffusionPipeline
    cases: Sequence[tuple[str, int]]
    objective: Objective
    steps: int = 20
    fps: float = 8.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.objective.name
        require(self.objective.judge.generates, f"{name} judges a VideoDiT by its losses; choose one that judges clips")
        self.scorer = self.objective.judge.prepare(None, 0, 0)
        self.heads = heads_of(transformers_of(self.pipe)[0])

    @cached_property
    def case_names(self) -> tuple[str, ...]:
        """`a red ball falls/0`: prompt and seed."""
        return unique(f"{prompt}/{seed}" for prompt, seed in self.cases)

    @cached_property
    def identity(self) -> dict[str, Any]:
        judge, kind = self.objective.judge, type(self.pipe).__name__
        parts = {  # the decoder and the scheduler shape a clip as the transformer does
            name: fingerprint(part) if isinstance(part, nn.Module) else config_json(getattr(part, "config", None))
            for name, part in sorted(self.pipe.components.items())
        }
        settings = dict(
            pipeline=kind, config=config_json(self.pipe.config), parts=parts, steps=self.steps, fps=self.fps
        )
        return settings | dict(judge=f"{judge.name}@{judge.version}", settings=dict(self.settings))

    def score(self, rows: Sequence[Row]) -> dict[str, Float[Tensor, " row"]]:
        return judged(self.objective, self.scorer(self.make(rows), []), rows)

    def make(self, rows: Sequence[Row]) -> Clip:
        return Clip.concatenate([self._clip(*row) for row in rows])

    def _clip(self, trial: Guidance, case: int) -> Clip:
        prompt, seed = self.cases[case]
        call = dict(seed=seed, steps=self.steps, fps=self.fps) | dict(self.settings)
        if trial.text_weight != 0:  # an excess weight adds to a scale, whichever its convention
            require("guidance_scale" in call, "text guidance needs the pipeline's own guidance_scale in settings")
            call["guidance_scale"] += trial.text_weight
        if trial == Guidance(text_weight=trial.text_weight):
            return generate_clips(self.pipe, [prompt], **call)
        weight, weak = trial.weak[0] if len(trial.weak) == 1 else (0.0, None)
        require(
            isinstance(weak, Perturbation) and trial == Guidance(weak=trial.weak, start=trial.start, stop=trial.stop),
            f"pipelines can be guided by one set of broken heads, or by text alone, not by {trial}",
        )
        form = {f.name: getattr(weak, f.name) for f in fields(weak) if f.name != "heads"}
        with guide(self.pipe, weak.heads, weight, start=trial.start, stop=trial.stop, **form):
            return generate_clips(self.pipe, [prompt], **call)

    def rows_that_fit(self) -> int:
        return 1
