"""Running the study part by part into one folder, and comparing a rerun with the tables that are committed.

A killed study goes on with --resume: every scored clip is in the folder's store, every finished part has its table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from physnb.config import require, to_json
from physnb.model import VideoDiT
from physnb.store import prepare_folder, read_json, write_json
from physnb.study import final, parts, wider
from physnb.study.plan import StudyPlan
from physnb.study.subject import Study, require_words
from physnb.trials import Executor

PARTS = {
    "maps": parts.maps,
    "kinds": parts.kinds,
    "rounds": parts.rounds,
    "final": final.final,
    "final_id": final.final_id,
    "heads": parts.heads,
    "repetitions": parts.repetitions,
    "objectives": parts.objectives,
    "found_by": parts.found_by,
    "surface": parts.surface,
    "steps": parts.steps,
    "sampling": parts.sampling,
    "transfer": parts.transfer,
    "contributions": parts.contributions,
    "attention": parts.attention,
    "wider": wider.wider,
    "wider_id": wider.wider_id,
    "pull": wider.pull,
}
PLAN_FILE = "plan.json"
AGREEING = 0.95  # share of estimates that a rerun has to find within the committed intervals


def run_study(
    plan: StudyPlan,
    model: VideoDiT,
    folder: str | Path,
    *,
    others: Mapping[str, VideoDiT] | None = None,
    twin: VideoDiT | None = None,
    only: Sequence[str] = (),
    executor: Executor | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, list[dict]]:
    """The tables of the study by part; each is written as it is finished.

    only: these parts (default: all). Raises ValueError for a part that does not exist, a used folder, a model that
    cannot read a caption, and on resuming a study of another plan or other models.
    """
    unknown = [name for name in only if name not in PARTS]
    require(not unknown, f"the study has no part {', '.join(unknown)}; its parts are {', '.join(PARTS)}")
    if "transfer" in (only or PARTS):
        require_words(plan, model=model, twin=twin)
    folder = prepare_folder(Path(folder), resume=resume)
    study = Study(plan, model, folder, dict(others or {}), twin, executor, progress)
    said = dict(plan=json.loads(to_json(plan)), models=study.identity())
    if (folder / PLAN_FILE).exists():
        require(read_json(folder / PLAN_FILE) == said, f"{folder} holds a study of another plan or other models")
    write_json(folder / PLAN_FILE, said)
    with study.store:
        for name in only or PARTS:
            if study.table(name) is None:
                study.write(name, PARTS[name](study))
    return read_tables(folder)


def read_tables(folder: str | Path) -> dict[str, list[dict]]:
    """The tables that are in a study's folder, by part."""
    return {name: read_json(path) for name in PARTS if (path := Path(folder) / f"{name}.json").exists()}


def estimates(value: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every estimate in a table, with where it stands; rows are told by their words."""
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
        yield where, value
        value = {name: part for name, part in value.items() if isinstance(part, Mapping)}
    if isinstance(value, Mapping):
        words = "/".join(str(part) for part in value.values() if isinstance(part, str))
        for name, part in value.items():
            if isinstance(part, Mapping):
                yield from estimates(part, f"{where}/{words}/{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from estimates(part, f"{where}/{number}")


def compare(committed: Mapping[str, list], found: Mapping[str, list]) -> list[dict[str, Any]]:
    """One row a table that both have: how many estimates, the share within the committed intervals, the first outside.

    Raises ValueError where no table is in both.
    """
    shared = [name for name in committed if name in found]
    require(len(shared) > 0, "there is no table to compare; run the study first")
    rows = []
    for name in shared:
        old, new = dict(estimates(committed[name])), dict(estimates(found[name]))
        judged = [k for k, e in old.items() if e["mean"] is not None and e["low"] is not None]
        outside = [k for k in judged if k not in new or not within(new[k]["mean"], old[k])]
        share = 1 - len(outside) / max(1, len(judged))
        row = dict(table=name, estimates=len(judged), within=share, agrees=share >= AGREEING)
        rows.append(row | dict(first_outside=outside[0] if outside else ""))
    return rows


def within(value: float | None, interval: Mapping[str, float]) -> bool:
    """Whether a value lies in a committed interval, up to the rounding of floats."""
    slack = 1e-6
    return value is not None and interval["low"] - slack <= value <= interval["high"] + slack
