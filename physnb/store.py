"""Files that appear whole or not at all: run folders, JSON, checkpoints, and the trial database."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from physnb.config import require


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; it takes the name `path` when the block ends well, and vanishes otherwise.

    Works for files and for folders; a file replaces what was there, a folder must be new.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            yield temporary
        except SafetensorError as error:  # safetensors reports a full disk in a class of its own
            raise OSError(f"{path} cannot be written ({error})") from None
        except OSError as error:
            if error.filename is None and error.errno is not None:  # a write does not know its file
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file, or a folder and the files in it, to disk: a rename must not outrun its contents."""
    for target in [*path.iterdir(), path] if path.is_dir() else [path]:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN is refused because JSON has none."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file; raises ValueError naming the file if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore or delete it") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Tensors and their text metadata as one safetensors file."""
    with written_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises ValueError naming a missing, truncated or foreign file."""
    require(Path(path).is_file(), f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); use another checkpoint") from None


def prepare_folder(path: Path, *, resume: bool = False) -> Path:
    """`path` as a folder that can be written to: new, or an existing run if `resume`.

    Raises ValueError before any work starts if the run exists, the disk is full or the place is read-only.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ValueError(f"output folder {path} already holds a run; choose another name, or pass --resume to go on")
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(65536))
    except OSError as error:
        if new and path.is_dir():
            path.rmdir()
        raise ValueError(f"output folder {path} cannot be written ({error.strerror}); choose another place") from None
    return path


class Database:
    """A SQLite file of one kind and schema version, safe to kill and open to several processes at once.

    Raises ValueError if the file is of another kind or version.
    """

    kind: ClassVar[str]  # in error messages
    schema: ClassVar[str]  # CREATE TABLE IF NOT EXISTS ...
    tables: ClassVar[frozenset[str]]  # all that the schema makes
    version: ClassVar[int] = 1

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._named():
            self.connection = sqlite3.connect(self.path, timeout=60)
        try:
            with self._named():
                version = self.connection.execute("PRAGMA user_version").fetchone()[0]
                found = {name for (name,) in self.connection.execute("SELECT name FROM sqlite_master")}
                found = {name for name in found if not name.startswith("sqlite_")}
                require(found <= self.tables, f"{self.path} is the database of another program; choose another file")
                require(
                    version in (0, self.version),
                    f"{self.path} has schema version {version}, not {self.version}; choose another file",
                )
                self.connection.execute("PRAGMA journal_mode=WAL")
                with self.connection:
                    self.connection.executescript(self.schema)
                    self.connection.execute(f"PRAGMA user_version={self.version}")
        except BaseException:
            self.connection.close()
            raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn SQLite's errors into ones that name the file: a full or read-only disk, or a file of another kind."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path} cannot be used ({error}); what was written before is kept") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a {self.kind} ({error}); choose another file") from None

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TrialStore(Database):
    """A SQLite file with one row a trial and case, written as they finish; kill -9 loses the trial in flight at most.

    Raises ValueError if the file is not a trial store or has another schema version.
    """

    kind = "trial store"
    tables = frozenset({"trials"})
    schema = """
CREATE TABLE IF NOT EXISTS trials (
    trial TEXT NOT NULL,  -- canonical JSON of everything that decides the numbers: model hash, settings, guidance
    case_name TEXT NOT NULL,
    value REAL,           -- NULL where the case could not be judged
    PRIMARY KEY (trial, case_name)
) WITHOUT ROWID;
"""

    def write(self, trial: str, cases: list[str], values: list[float]) -> None:
        """All cases of one trial, in one transaction."""
        rows = [(trial, case, None if value != value else value) for case, value in zip(cases, values, strict=True)]
        with self._named(), self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO trials VALUES (?, ?, ?)", rows)

    def read(self, trial: str, cases: list[str]) -> list[float] | None:
        """The trial's values in the order of `cases`, or None unless every one of them is there."""
        with self._named():
            found = dict(self.connection.execute("SELECT case_name, value FROM trials WHERE trial = ?", (trial,)))
        if not all(case in found for case in cases):
            return None
        return [float("nan") if found[case] is None else found[case] for case in cases]
