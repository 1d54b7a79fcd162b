"""What a notebook leaves behind: figures, tables and videos with captions, listed in one file for the report."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from physnb.plots import save_figure, write_video
from physnb.store import TrialStore, read_json, write_json

RECORDS = "records.json"
PACKAGES = ("torch", "diffusers", "accelerate", "numpy")


def environment() -> dict[str, str]:
    """Versions and processor count that a result depends on."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | versions | {"cores": str(os.cpu_count())}


class Recorder:
    """The folder of one notebook in a run; with an empty `run_dir`, a temporary one that goes with the kernel.

    Recording a name again replaces it, so a cell can be run twice.
    """

    def __init__(self, run_dir: str, notebook: str):
        self._temporary = None if run_dir else tempfile.TemporaryDirectory(prefix="physnb-")
        self.run = Path(run_dir or self._temporary.name)
        self.folder = self.run / notebook
        self.folder.mkdir(parents=True, exist_ok=True)

    def store(self, reference: str | Path | None = None) -> TrialStore:
        """The run's trial store, shared by its notebooks: what one has measured, no other measures again.

        Without a run it is a copy of `reference`, a store whose rows are then at hand, or a new one if that is not
        there. The copy goes with the kernel.
        """
        path = self.run / "trials.sqlite"
        if self._temporary is not None and not path.exists() and reference is not None and Path(reference).is_file():
            shutil.copyfile(reference, path)
        return TrialStore(path)

    def _record(self, name: str, kind: str, caption: str, **more: Any) -> None:
        path = self.folder / RECORDS
        records = read_json(path) if path.exists() else []
        entry = dict(name=name, kind=kind, caption=caption) | more
        write_json(path, [r for r in records if (r["kind"], r["name"]) != (kind, name)] + [entry])

    def figure(self, name: str, figure: Any, caption: str) -> Any:
        """The figure itself, after saving it as <name>.png."""
        save_figure(self.folder / f"{name}.png", figure)
        self._record(name, "figure", caption, file=f"{name}.png")
        return figure

    def table(self, name: str, rows: list[dict], caption: str, shown: int | None = None) -> list[dict]:
        """The rows, after saving them as <name>.json; the report shows the first `shown` (default: all)."""
        write_json(self.folder / f"{name}.json", rows)
        if shown is not None and shown < len(rows):
            caption = f"{caption} The first {shown} of {len(rows)}; all are in {name}.json."
        self._record(name, "table", caption, rows=rows[:shown])
        return rows

    def video(self, name: str, clips: dict[str, Any], caption: str, *, scale: int = 4) -> Path:
        """The path of <name>.mp4, which shows the clips side by side, one case a row; scale: screen pixels a pixel."""
        path = write_video(self.folder / f"{name}.mp4", clips, scale=scale)
        self._record(name, "video", f"{', '.join(clips)} (left to right). {caption}", file=path.name)
        return path

    def find(self, notebook: str, name: str) -> Any:
        """The JSON that an earlier notebook of the same run left, or None."""
        path = self.run / notebook / f"{name}.json"
        return read_json(path) if path.exists() else None
