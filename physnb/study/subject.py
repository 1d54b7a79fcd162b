"""What every part of the study works on: models, the trials of each set of cases, rankings and head sets.

A part asks for what it needs; rows that another part measured are in the store and are not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from physnb.captioning import captioner_of
from physnb.checkpoint import fingerprint
from physnb.config import Guidance, HeadSet, HuntConfig, head_set
from physnb.data import Clip, simulate
from physnb.model import VideoDiT
from physnb.objectives import (
    ANSWERS,
    OBJECTIVES,
    PHYSICS_IQ,
    RESTORED,
    REWARD,
    TRAJECTORY,
    Judge,
    Objective,
    joint_judge,
)
from physnb.profiles import first_cases
from physnb.ranking import Guide, HeadRanking, measure_effects, rank_heads
from physnb.search import Hunt, hunt_heads
from physnb.store import TrialStore, read_json, write_json
from physnb.study.plan import FORMS, LIKELIHOOD, MIXED, PRESENCE, Form, StudyPlan
from physnb.subjects import simulated_subject
from physnb.trials import Executor, Trials

JUDGE = joint_judge(TRAJECTORY, RESTORED, PHYSICS_IQ, ANSWERS, REWARD)  # one generation, every score
MOTION_JUDGE = joint_judge(TRAJECTORY, RESTORED)  # of the phenomena, which the others do not know
STORE_FILE = "trials.sqlite"


def scored_by(name: str, judge: Judge = JUDGE) -> Objective:
    """An objective of the package, or the missing rate of restored discs, read from the joint judge."""
    return Objective(name, judge, "share") if name == PRESENCE else replace(OBJECTIVES[name], judge=judge)


def require_words(plan: StudyPlan, **models: VideoDiT | None) -> None:
    """Raises ValueError where a model cannot read the captions of a world or phenomenon: now, not hours later."""
    for name, model in models.items():
        if model is None:
            continue
        captioner, shape = captioner_of(model), dict(frames=model.config.frames, size=model.config.size)
        for world in (*plan.hunt.scenarios, *plan.phenomena):
            try:
                captioner.encode(captioner.write(simulate(world, "id", [0], **shape)))
            except ValueError as fault:
                missing = f"the {name} was not trained on {world}, where the study tests heads too ({fault})"
                raise ValueError(f"{missing}; train it with --source {world} among others") from fault


def generate_trial(trials: Trials, guidance: Guidance, cases: Sequence[int] | None = None) -> Clip:
    """The clips of one trial on some cases, made anew: the store keeps scores."""
    rows = [(guidance, case) for case in (trials.cases if cases is None else cases)]
    chunks = [rows[first : first + trials.batch_size] for first in range(0, len(rows), trials.batch_size)]
    return Clip.concatenate([trials.subject.make(chunk) for chunk in chunks])


@dataclass
class Study:
    """A plan on a model, in a folder that keeps every scored clip and the table of every part.

    others: worse models for AutoGuidance, by name. twin: another training of the same shape, for transfer.
    """

    plan: StudyPlan
    model: VideoDiT
    folder: Path
    others: Mapping[str, VideoDiT]
    twin: VideoDiT | None = None
    executor: Executor | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.store = TrialStore(self.folder / STORE_FILE)
        self._trials: dict[str, Trials] = {}
        self._cached: dict[str, Any] = {}

    def identity(self) -> dict[str, object]:
        """Fingerprints of all models: what the tables are of."""
        twin = {} if self.twin is None else dict(twin=fingerprint(self.twin))
        return dict(model=fingerprint(self.model)) | {k: fingerprint(m) for k, m in self.others.items()} | twin

    def trials(
        self, part: str, objective: str = MIXED, *, hunt: HuntConfig | None = None, split: str | None = None,
        model: VideoDiT | None = None, judge: Judge = JUDGE,
    ) -> Trials:  # fmt: skip
        """The trials of some cases, decided by an objective; made once, whatever the objective."""
        hunt = hunt or self.plan.hunt
        key = repr((part, hunt, split, id(model), judge.name))
        if key not in self._trials:
            settings = dict(split=split, objective=scored_by(objective, judge), others=self.others)
            subject = simulated_subject(model or self.model, hunt, part, **settings)
            self._trials[key] = Trials(subject, self.store, executor=self.executor, progress=self.progress)
        return self._trials[key].judged_by(scored_by(objective, judge))

    @cached_property
    def by_likelihood(self) -> Trials:
        """The selection cases, judged by the guided model's own losses."""
        subject = simulated_subject(self.model, self.plan.hunt, "selection", objective=LIKELIHOOD)
        return Trials(subject, self.store, executor=self.executor, progress=self.progress)

    def guide(self, form: Form = FORMS[0]) -> Guide:
        """The trial of a head set, broken in this form at the hunt's weight and strength."""
        return self.plan.hunt_with(kind=form.kind, axis=form.axis).guidance

    def ranking(self, objective: str, form: Form = FORMS[0]) -> HeadRanking:
        """Every head alone on the selection cases: all of them for the first form, `map_cases` for the others."""
        trials = self.trials("selection", objective)
        cases = None if form == FORMS[0] else self.map_cases
        return rank_heads(trials, self.guide(form), cases=cases)

    @property
    def map_cases(self) -> list[int]:
        """Numbers of the first `map_cases` selection cases of each scenario."""
        return first_cases(self.trials("selection"), self.plan.map_cases)

    @property
    def choice_cases(self) -> list[int]:
        """Numbers of the selection cases on which sets, weights and intervals are compared."""
        return first_cases(self.trials("selection"), 2 * self.plan.map_cases)

    def rounds(self, objective: str) -> Hunt:
        """HeadHunter in rounds, by an objective."""
        plan = self.plan
        hunt = plan.hunt_with(top_k=plan.hunt.top_k // plan.rounds, rounds=plan.rounds, objective=objective)
        return hunt_heads(self.trials("selection", objective), hunt)

    def effects(
        self, trials: Trials, heads: Sequence[HeadSet], cases: Sequence[int] | None = None
    ) -> Float[Tensor, "set case"]:
        """Effect of each head set at the hunt's weight, case by case; negative is better."""
        guidances: list[Guidance] = [self.plan.hunt.guidance(head_set(one)) for one in heads]
        return measure_effects(trials, guidances, cases, label="study")

    def cached(self, name: str, work: Callable[[Study], Any]) -> Any:
        """What `work` makes of this study, once: for what several parts need and the store does not keep."""
        if name not in self._cached:
            self._cached[name] = work(self)
        return self._cached[name]

    def path(self, part: str) -> Path:
        """Where a part's table is."""
        return self.folder / f"{part}.json"

    def table(self, part: str) -> list[dict] | None:
        """A part's table, if it has been made."""
        return read_json(self.path(part)) if self.path(part).exists() else None

    def write(self, part: str, rows: list[dict]) -> list[dict]:
        """Keep a part's table."""
        write_json(self.path(part), rows)
        return rows
