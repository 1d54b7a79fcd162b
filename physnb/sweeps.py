"""Running notebooks at many settings: a YAML file lists the values, one table at the end has the rows of all.

parameters:            # every combination of these
  kind: [identity, uniform]
  rounds: [1, 2]
points:                # and each of these by itself
  - {kind: blur, rounds: 1}
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from physnb.config import require
from physnb.runs import FINAL_TABLE, check_parameters, find_notebooks, read_records, run_notebooks
from physnb.store import prepare_folder, read_json, write_json

TABLE, SETTINGS, DONE = "sweep.json", "settings.json", "done.json"


def read_sweep(path: str | Path) -> list[dict[str, Any]]:
    """The settings of a sweep file in order; raises ValueError naming what is wrong with it."""
    path = Path(path)
    require(path.is_file(), f"sweep file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from None
    require(
        isinstance(content, dict) and bool(content) and set(content) <= {"parameters", "points"},
        f"{path} must have `parameters`, a list of values for each name, or `points`, a list of settings, or both",
    )
    grid, points = content.get("parameters") or {}, content.get("points") or []
    fits = isinstance(grid, dict) and all(isinstance(values, list) and values for values in grid.values())
    require(fits, f"{path}: every entry of `parameters` must be a list with a value, for example kind: [identity]")
    require(
        isinstance(points, list) and all(isinstance(point, dict) and point for point in points),
        f"{path}: `points` must be a list of settings, for example - {{kind: blur}}",
    )
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    settings = [*combined, *points]
    require(len(settings) > 0, f"{path} lists no setting")
    twice = next((s for i, s in enumerate(settings) if s in settings[:i]), None)
    require(twice is None, f"{path} lists {twice} twice")
    return settings


def run_sweep(
    names: list[str],
    sweep: str | Path,
    folder: str | Path,
    *,
    preset: str = "quick",
    parameters: dict[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run the notebooks once a setting, each in a folder of its own, and return the rows of their final tables.

    The table in sweep.json grows with every setting. The first failure ends the sweep, with what it finished kept;
    resume goes on there, and runs a setting that was not finished again, beside what is left of it.
    Raises ValueError, before anything runs, for a sweep file, preset, notebook or parameter that does not exist, and
    for a folder of another sweep; NotebookFailed for a cell that raised.
    """
    settings, given, notebooks = read_sweep(sweep), parameters or {}, find_notebooks(names)
    for point in settings:
        check_parameters(notebooks, {**given, **point})
    folder = prepare_folder(folder, resume=resume).resolve()
    plan = dict(
        notebooks=[path.stem for path in find_notebooks(names)], preset=preset, parameters=given, points=settings
    )
    if (folder / SETTINGS).exists():
        same = read_json(folder / SETTINGS) == json.loads(json.dumps(plan))
        require(same, f"{folder} holds another sweep; choose another folder")
    write_json(folder / SETTINGS, plan)
    rows = []
    for number, point in enumerate(settings, start=1):
        turns = (f"{number:03d}" + (f"-{turn}" if turn > 1 else "") for turn in itertools.count(1))
        name = next(n for n in turns if not (folder / n).exists() or (folder / n / DONE).exists())
        if not (folder / name / DONE).exists():
            run_notebooks(names, preset=preset, folder=str(folder / name), parameters={**given, **point})
            write_json(folder / name / DONE, point)
        rows += [dict(setting=name) | point | row for row in final_rows(folder / name)]
        write_json(folder / TABLE, rows)
    return dict(folder=str(folder), settings=len(settings), table=rows)


def final_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the first final table that a run recorded; none if it recorded none."""
    tables = [r for r in read_records(folder) if r["kind"] == "table" and r["name"] == FINAL_TABLE]
    return tables[0]["rows"] if tables else []
