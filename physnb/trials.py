"""Running trials: every (guidance, case) row once, many rows a batch, stored as they finish, on one machine or many."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from physnb.config import Guidance, LayerSkip, OtherModel, Perturbation, Weak, choose, require
from physnb.objectives import Objective
from physnb.store import TrialStore
from physnb.subjects import Row, Subject

Scored = dict[str, Float[Tensor, " row"]]


@dataclass(frozen=True)
class Outcome:
    """What came of a chunk: the scores of its rows, or of those that could be scored and what the first other raised.

    rows: which rows of the chunk the scores belong to.
    """

    rows: list[int]
    scores: Scored
    error: str | None = None


def score_chunk(subject: Subject, chunk: Sequence[Row]) -> Outcome:
    """The scores of a chunk; if that raises, of its rows one at a time, so that one bad row costs no other."""
    try:
        return Outcome(list(range(len(chunk))), subject.score(chunk))
    except Exception as raised:
        together = describe(raised)  # as text: the exception would hold on to the batch's memory
    kept, parts, error = [], [], None
    for number, (trial, case) in enumerate(chunk):
        try:
            parts.append(subject.score([(trial, case)]))
            kept.append(number)
        except Exception as raised:
            row = f"case {subject.case_names[case]} of trial {trial_name(trial)}"
            error = error or f"{row} raised {describe(raised)}"
    # A batch that does not fit is no fault of the objective; one that fails for another reason is.
    if error is None and "memory" not in together.lower():
        error = f"{len(chunk)} rows at once raised {together}, though each alone did not"
    names = parts[0] if parts else {}
    return Outcome(kept, {name: torch.cat([part[name] for part in parts]) for name in names}, error)


def describe(error: Exception) -> str:
    """`KeyError: 'disc' (my_scores.py, line 12)`: an exception, and the line outside of this package that led to it."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_ours(frame.filename)]
    where = f" ({Path(places[0].filename).name}, line {places[0].lineno})" if places else ""
    return f"{type(error).__name__}: {error}{where}"


def is_ours(file: str) -> bool:
    """Whether a source file is part of this package."""
    return Path(file).is_relative_to(Path(__file__).parent)


class Executor(Protocol):
    """Where chunks are scored. An outcome depends on its chunk alone; chunks may come back in any order."""

    def run(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Iterator[tuple[int, Outcome]]: ...


class LocalExecutor:
    """One chunk after the other, in this process."""

    def run(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Iterator[tuple[int, Outcome]]:
        for number, chunk in enumerate(chunks):
            yield number, score_chunk(subject, chunk)


def trial_name(trial: Guidance) -> str:
    """A trial in a few words: `unguided`, `text w=1`, `identity u=1 w=2 L0H1,L3H7`, then what is not at its default."""
    parts = [f"text w={trial.text_weight:g}"] if trial.text_weight else []
    for weight, weak in trial.weak:
        if isinstance(weak, Perturbation):
            kind = weak.kind if weak.axis == "all" else f"{weak.kind}/{weak.axis}"
            more = unusual_settings(weak, "heads", "strength", "kind", "axis")
            parts.append(f"{kind} u={weak.strength:g} w={weight:g} {','.join(map(str, weak.heads))}{more}")
        elif isinstance(weak, LayerSkip):
            parts.append(f"skip w={weight:g} {','.join(f'L{layer}' for layer in weak.layers)}")
        else:
            parts.append(f"{weak.name} w={weight:g}")
    return (" + ".join(parts) or "unguided") + unusual_settings(trial, "text_weight", "weak")


def unusual_settings(settings: Guidance | Perturbation, *said: str) -> str:
    """` start=0.5 stop=0.8`: the fields that are neither `said` nor at their default."""
    values = {f.name: (getattr(settings, f.name), f.default) for f in fields(settings) if f.name not in said}
    return "".join(f" {name}={value}" for name, (value, default) in values.items() if value != default)


def plain_settings(settings: Guidance | Weak) -> dict[str, Any]:
    """The fields of a guidance or weak model for JSON: the same text for equal ones, though one says 2 and one 2.0."""
    found: dict[str, Any] = {}
    for name, value in ((f.name, getattr(settings, f.name)) for f in fields(settings)):
        if name == "weak":
            found[name] = {
                str(number): dict(type=type(weak).__name__, weight=float(weight)) | plain_settings(weak)
                for number, (weight, weak) in enumerate(value, 1)
            }
        elif isinstance(value, tuple):  # heads, layers, sigma
            found[name] = ",".join(map(str, value))
        else:
            found[name] = value if isinstance(value, str) else float(value)
    return found


def first_broken_layer(trial: Guidance) -> int:
    """The first layer in which a weak model of the trial differs; batches of equal ones fork as late as possible."""
    weak = [weak for _, weak in trial.weak]
    layers = [head.layer for w in weak if isinstance(w, Perturbation) for head in w.heads]
    return min([*layers, *(layer for w in weak if isinstance(w, LayerSkip) for layer in w.layers)], default=0)


class Trials:
    """The scores of trials on a subject's cases, each row measured once.

    store: where rows are written as they finish and read from before they are run. batch_size: rows a batch, or None
    for as many as fit. on_rows(trials) is called after every batch.
    A row's scores do not depend on what else is asked for beyond float rounding: one grey level in a pixel.
    """

    def __init__(
        self,
        subject: Subject,
        store: TrialStore | None = None,
        *,
        executor: Executor | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        on_rows: Callable[[Trials], None] | None = None,
    ):
        require(batch_size is None or batch_size > 0, f"batch size must be positive, got {batch_size}")
        self.subject, self.store, self.executor = subject, store, executor or LocalExecutor()
        self.batch_size = batch_size or subject.rows_that_fit()
        self.progress, self.on_rows = progress, on_rows
        self.found: dict[Guidance, dict[int, dict[str, float]]] = {}
        self.rows_run, self.seconds, self.pending = 0, 0.0, 0
        self._identities: dict[Guidance, str] = {}

    @property
    def cases(self) -> range:
        """Numbers of all cases of the subject."""
        return range(len(self.subject.case_names))

    @property
    def seconds_left(self) -> float:
        """An estimate for what was asked for last."""
        return self.seconds / max(1, self.rows_run) * self.pending

    def identity(self, trial: Guidance) -> str:
        """Canonical JSON of all that decides the trial's scores besides the case; equal trials have the same.

        Of the subject's other networks those count that the trial is guided by.
        """
        if trial not in self._identities:
            subject, others = dict(self.subject.identity), {w.name for _, w in trial.weak if isinstance(w, OtherModel)}
            if "others" in subject:
                subject["others"] = {name: key for name, key in subject["others"].items() if name in others}
            both = dict(guidance=plain_settings(trial), subject=subject)
            self._identities[trial] = json.dumps(both, sort_keys=True, default=str)
        return self._identities[trial]

    @contextmanager
    def twin(self, on_rows: Callable[[Trials], None], batch_size: int) -> Iterator[Trials]:
        """The same trials for another thread, with a connection of its own to the store; what is found is shared."""
        store = None if self.store is None else TrialStore(self.store.path)
        try:
            twin = Trials(self.subject, store, batch_size=batch_size, progress=False, on_rows=on_rows)
            twin.found = self.found
            yield twin
        finally:
            if store is not None:
                store.close()

    def judged_by(self, objective: Objective) -> Trials:
        """The same rows, decided by another score of the same judge; what is found is shared with these trials.

        Raises ValueError for an objective of another judge, whose scores these rows do not have.
        """
        judges = [(o.judge.name, o.judge.version) for o in (self.subject.objective, objective)]
        require(judges[0] == judges[1], f"these rows are judged by {judges[0][0]}, not by {judges[1][0]}")
        other = copy(self)
        other.subject = copy(self.subject)
        other.subject.objective = objective
        return other

    def scores(
        self,
        trials: Sequence[Guidance],
        cases: Sequence[int] | None = None,
        name: str = "",
        label: str = "trials",
        required: bool = True,
    ) -> Float[Tensor, "trial case"]:
        """The objective, or the score `name` of its judge, of every trial on every case (default: all cases).

        Raises ValueError for a case or a score that is not there, for an objective that cannot judge a single row
        (unless `required` is false), and where it raises itself, naming the row; rows that were scored before are kept.
        """
        cases = list(self.cases if cases is None else cases)
        unknown = [case for case in cases if case not in self.cases]
        require(not unknown, f"there is no case {unknown[:1]}; cases are numbered from 0 to {len(self.cases) - 1}")
        self._measure(list(dict.fromkeys(trials)), list(dict.fromkeys(cases)), label)
        objective = self.subject.objective.name
        name = name or objective
        rows = [[self.found[trial][case] for case in cases] for trial in trials]
        for scores in (scores for row in rows for scores in row):
            choose("score", name, scores)
        table = torch.tensor([[scores[name] for scores in row] for row in rows]).reshape(len(rows), len(cases))
        names = ", ".join(trial_name(trial) for trial in trials[:2])
        require(
            not required or table.numel() == 0 or name != objective or not bool(table.isnan().all()),
            f"objective {name} is not a number on any of {len(cases)} cases of {len(trials)} trials ({names}, ...), so "
            "nothing can be compared; look at one clip, then choose another objective or other cases",
        )
        return table

    def clips(
        self, trials: Sequence[Guidance], cases: Sequence[int]
    ) -> dict[Guidance, UInt8[Tensor, "case time height width 3"]]:
        """The generated clip of every trial on a few cases, for looking at; made once where there is a store."""
        names = {case: self.subject.case_names[case] for case in cases}
        found = {trial: {} for trial in trials}
        if self.store is not None:
            found = {trial: self.store.read_clips(self.identity(trial), [*names.values()]) for trial in found}
        rows = [(trial, case) for trial, there in found.items() for case in names if names[case] not in there]
        for first in range(0, len(rows), self.batch_size):
            chunk = rows[first : first + self.batch_size]
            made = list(zip(chunk, self.subject.make(chunk).frames, strict=True))
            for (trial, case), frames in made:
                found[trial][names[case]] = frames
            if self.store is not None:
                self.store.write_clips(
                    (self.identity(t), trial_name(t), names[case], frames) for (t, case), frames in made
                )
        return {trial: torch.stack([there[names[case]] for case in cases]) for trial, there in found.items()}

    def score_names(self) -> tuple[str, ...]:
        """The scores that the judge gives, as far as any row has been measured."""
        return tuple(next((scores for rows in self.found.values() for scores in rows.values()), {}))

    def _measure(self, trials: list[Guidance], cases: list[int], label: str) -> None:
        for trial in trials:
            self._load(trial)
        done = {(trial, case) for trial in trials for case in self.found[trial]}
        # Rows that fork late run together, and the trials of a case too, for they share its first prediction. Chunks
        # are cut before what is known is left out: an interrupted hunt goes on with the very same batches.
        order = sorted(trials, key=lambda trial: (first_broken_layer(trial), self.identity(trial)))
        layers = dict.fromkeys(first_broken_layer(trial) for trial in order)
        groups = [[trial for trial in order if first_broken_layer(trial) == layer] for layer in layers]
        rows = [(trial, case) for group in groups for case in cases for trial in group]
        chunks = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        chunks = [[row for row in chunk if row not in done] for chunk in chunks]
        chunks = [chunk for chunk in chunks if chunk]
        self.pending = sum(map(len, chunks))
        before, error, silent = len(rows) - self.pending, None, not (self.progress and chunks)
        with tqdm(total=len(rows), initial=before, disable=silent, unit="clip", desc=label) as bar:
            begun = time.perf_counter()
            for number, outcome in self.executor.run(self.subject, chunks):
                self._keep([chunks[number][row] for row in outcome.rows], outcome.scores)
                self.seconds += time.perf_counter() - begun
                bar.update(len(outcome.rows))
                if self.on_rows is not None:
                    self.on_rows(self)
                begun, error = time.perf_counter(), outcome.error
                if error:
                    break
        name = self.subject.objective.name
        require(error is None, f"objective {name}: {error}; mend it and start again, what was scored before is kept")

    def _load(self, trial: Guidance) -> None:
        if trial not in self.found:
            stored = {} if self.store is None else self.store.read(self.identity(trial))
            numbers = {name: number for number, name in enumerate(self.subject.case_names)}
            self.found[trial] = {numbers[case]: scores for case, scores in stored.items() if case in numbers}

    def _keep(self, chunk: Sequence[Row], scored: Scored) -> None:
        rows = [
            dict(zip(scored, values, strict=True))
            for values in zip(*(v.tolist() for v in scored.values()), strict=True)
        ]
        if self.store is not None:
            names = self.subject.case_names
            self.store.write(
                (self.identity(trial), trial_name(trial), names[case], scores)
                for (trial, case), scores in zip(chunk, rows, strict=True)
            )
        for (trial, case), scores in zip(chunk, rows, strict=True):
            self.found[trial][case] = scores
        self.rows_run += len(chunk)
        self.pending -= len(chunk)
