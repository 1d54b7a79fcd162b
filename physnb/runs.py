"""Running notebooks headless through papermill, and collecting what they recorded into one report.html."""

from __future__ import annotations

import base64
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import papermill
from papermill.exceptions import PapermillExecutionError

from physnb.config import preset as preset_named
from physnb.config import require
from physnb.results import RECORDS, environment
from physnb.store import prepare_folder, read_json, write_json, written_whole
from physnb.tables import flatten_row

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = PROJECT / "notebooks"
FINAL_TABLE = "final"  # what a run prints at its end: the first of its tables of this name


class NotebookFailed(RuntimeError):
    """A notebook stopped on an error: says which cell and why."""


def find_notebooks(names: list[str]) -> list[Path]:
    """Notebook files by path, name or number; all numbered ones if `names` is empty. Raises ValueError if not found."""
    numbered = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    require(len(numbered) > 0, f"there are no notebooks in {NOTEBOOKS}; run from a checkout of the project")
    if not names:
        return numbered
    found = []
    for name in names:
        matches = (
            [Path(name)] if Path(name).is_file() else [n for n in numbered if n.stem == name or n.name[:2] == name]
        )
        require(bool(matches), f"notebook {name!r} not found; there are {', '.join(n.stem for n in numbered)}")
        found.append(matches[0])
    return found


def known_parameters(notebook: Path) -> dict[str, str]:
    """Default of every parameter in the notebook's `parameters` cell, by name, as source text."""
    return {name: info["default"] for name, info in papermill.inspect_notebook(str(notebook)).items()}


def parse_value(text: str) -> Any:
    """A parameter from the command line: JSON if it reads as JSON (numbers, true, lists), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_parameters(notebooks: list[Path], given: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that none of the notebooks has."""
    every = sorted(set().union(*(known_parameters(notebook) for notebook in notebooks)))
    for name in given:
        require(name in every, f"no notebook of this run has a parameter {name!r}; there are {', '.join(every)}")


def run_notebooks(
    names: list[str], *, preset: str = "quick", folder: str | None = None, parameters: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Execute notebooks in order into a new run folder and write its report.html.

    Every notebook that knows the parameters `preset` and `run_dir` gets them. The first failure ends the run: the
    notebook is kept as far as it came. Raises ValueError, before anything runs, for a preset, notebook or parameter
    that does not exist and for a used folder; NotebookFailed for a cell that raised.
    """
    preset_named(preset)
    notebooks = find_notebooks(names)
    given = dict(parameters or {})
    check_parameters(notebooks, given)
    folder = Path(folder) if folder else PROJECT / "outputs" / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = prepare_folder(folder).resolve()
    write_json(folder / "params.json", dict(preset=preset, notebooks=[n.stem for n in notebooks], parameters=given))
    write_json(folder / "env.json", environment())
    for notebook in notebooks:
        values = {"preset": preset, "run_dir": str(folder)} | given
        values = {name: value for name, value in values.items() if name in known_parameters(notebook)}
        print(f"{notebook.stem} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            papermill.execute_notebook(
                str(notebook), str(folder / notebook.name), values,
                cwd=str(NOTEBOOKS), kernel_name="python3", progress_bar=False,
            )  # fmt: skip
        except PapermillExecutionError as error:
            write_report(folder)
            raise NotebookFailed(
                f"{notebook.name} failed in cell {error.cell_index}: {error.ename}: {error.evalue}; "
                f"as far as it came it is in {folder / notebook.name}"
            ) from None
        print(f"{notebook.stem} done in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    report = write_report(folder)
    result = dict(folder=str(folder), report=str(report))
    tables = [record for record in read_records(folder) if record["kind"] == "table" and record["name"] == FINAL_TABLE]
    return result | (dict(table=tables[0]["rows"]) if tables else {})


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What the notebooks of a run recorded, notebook by notebook, in the order of recording."""
    records = []
    for path in sorted(folder.glob(f"*/{RECORDS}")):
        for record in read_json(path):
            records.append(record | {"notebook": path.parent.name, "folder": path.parent})
    return records


_TEMPLATE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>physnb: {{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #1b1b1b; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5em; border-bottom: 1px solid #ccc; } nav a { margin-right: 1em; }
figure { margin: 1.5em 0; } figcaption { color: #444; max-width: 75ch; } img, video { max-width: 100%; }
video { image-rendering: pixelated; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12px; }
th, td { padding: 3px 7px; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #888; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) { background: #f5f5f5; }
.facts { color: #555; font-size: 12px; }
</style></head><body>
<h1>physnb: {{ title }}</h1>
<p class="facts">{{ facts }}</p>
<nav>{% for name in sections %}<a href="#{{ name }}">{{ name }}</a>{% endfor %}</nav>
{% for name, items in sections.items() %}<h2 id="{{ name }}">{{ name }}</h2>
{% for item in items %}<figure>
{% if item.kind == "figure" %}<img alt="{{ item.name }}" src="data:image/png;base64,{{ item.data }}">
{% elif item.kind == "video" %}<video controls loop muted autoplay src="data:video/mp4;base64,{{ item.data }}"></video>
{% else %}<div class="scroll"><table><tr>{% for c in item.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in item.cells %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% endif %}<figcaption>{{ item.caption }}</figcaption></figure>
{% endfor %}{% endfor %}</body></html>
""",
    autoescape=True,
)


def write_report(folder: str | Path) -> Path:
    """One self-contained report.html of everything the run's notebooks recorded. Raises ValueError for no such run."""
    folder = Path(folder)
    require(folder.is_dir(), f"run folder {folder} does not exist")
    records = read_records(folder)
    final = [record | {"notebook": "result"} for record in records if record["name"] == FINAL_TABLE]
    sections: dict[str, list[dict]] = {}
    for record in [*final, *records]:  # the result comes first, and again in its place
        item = dict(kind=record["kind"], name=record["name"], caption=record["caption"])
        if record["kind"] == "table":
            rows = [flatten_row(row) for row in record["rows"]]
            item["columns"] = list(rows[0]) if rows else []
            item["cells"] = [list(row.values()) for row in rows]
        else:
            item["data"] = base64.b64encode((record["folder"] / record["file"]).read_bytes()).decode()
        sections.setdefault(record["notebook"], []).append(item)
    facts = ", ".join(f"{name} {value}" for name, value in environment().items())
    path = folder / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(_TEMPLATE.render(title=folder.name, facts=facts, sections=sections))
    return path
