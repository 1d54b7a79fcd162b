"""Files that appear whole or not at all: run folders, JSON, checkpoints, and the trial database."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas
import torch
from jaxtyping import UInt8
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


def cache_folder(name: str) -> Path:
    """Where what can be computed again is kept for this user: `physnb/NAME` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "physnb" / name


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


TIMEOUT_S = 60.0  # how long a process waits for others that write to the same database


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
            self.connection = sqlite3.connect(self.path, timeout=TIMEOUT_S)
        try:
            with self._named():
                self.connection.execute("BEGIN")  # both reads of one moment: another process may be making the tables
                version = self.connection.execute("PRAGMA user_version").fetchone()[0]
                found = {name for (name,) in self.connection.execute("SELECT name FROM sqlite_master")}
                self.connection.rollback()
                found = {name for name in found if not name.startswith("sqlite_")}
                # tables and version are made together, so tables without a version are not ours
                ours = found <= self.tables and (version != 0 or not found)
                require(ours, f"{self.path} is the database of another program; choose another file")
                require(
                    version in (0, self.version),
                    f"{self.path} has schema version {version}, not {self.version}; choose another file",
                )
                self._log_ahead()
                if version == 0:
                    stamp = f"PRAGMA user_version={self.version};"
                    self.connection.executescript(f"BEGIN IMMEDIATE;{self.schema}{stamp}COMMIT;")
        except BaseException:
            self.connection.close()
            raise

    def _log_ahead(self) -> None:
        """Switch to the write-ahead log. SQLite refuses that at once while another process does it, so ask again."""
        give_up = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                kind = error.sqlite_errorcode & 0xFF  # without what the extended code adds
                if kind != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                    raise
                time.sleep(0.01)

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
    """A SQLite file with one row a trial and case, written as they finish, and the clips of those that were looked at.

    A trial is known by the hash of all that decides its numbers, so that rows of other models, metrics or seeds never
    mix. Several processes may write at once; a row that is there already stays. kill -9 loses the rows in flight.
    Raises ValueError if the file is not a trial store or has another schema version.
    """

    kind = "trial store"
    version = 3
    tables = frozenset({"trials", "scores", "clips"})
    schema = """
CREATE TABLE IF NOT EXISTS trials (
    trial TEXT PRIMARY KEY,  -- SHA-256 of what follows
    identity TEXT NOT NULL,  -- JSON of all that decides its numbers besides the case
    name TEXT NOT NULL       -- for reading: `identity u=1 w=2 L0H1`
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    trial TEXT NOT NULL,
    case_name TEXT NOT NULL,
    scores TEXT NOT NULL,    -- JSON of every score by name, null where the case could not be judged
    written TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (trial, case_name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clips (
    trial TEXT NOT NULL,
    case_name TEXT NOT NULL,
    shape TEXT NOT NULL,     -- JSON of [time, height, width, 3]
    frames BLOB NOT NULL,    -- zlib of the uint8 pixels in this order
    PRIMARY KEY (trial, case_name)
);
"""

    @staticmethod
    def key(identity: str) -> str:
        """The trial that a canonical JSON text stands for."""
        return hashlib.sha256(identity.encode()).hexdigest()[:20]

    def _insert(self, rows: Iterable[tuple[str, str, str, Any]], into: str, pack: Callable[[Any], tuple]) -> None:
        """Rows of (identity, name, case, value) with their trials, in one transaction; what is there already stays."""
        rows = [(self.key(identity), identity, name, case, value) for identity, name, case, value in rows]
        packed = [(key, case, *pack(value)) for key, _, _, case, value in rows]
        with self._named(), self.connection:
            self.connection.executemany(
                "INSERT OR IGNORE INTO trials VALUES (?, ?, ?)", sorted({row[:3] for row in rows})
            )
            self.connection.executemany(f"INSERT OR IGNORE INTO {into}", packed)

    def write(self, rows: Iterable[tuple[str, str, str, Mapping[str, float]]]) -> None:
        """Rows of (identity, name, case, scores), in one transaction."""

        def pack(scores: Mapping[str, float]) -> tuple[str]:
            # 9 digits tell every float32 from its neighbours
            return (json.dumps({n: None if v != v else float(f"{v:.9g}") for n, v in scores.items()}),)

        self._insert(rows, "scores (trial, case_name, scores) VALUES (?, ?, ?)", pack)

    def read(self, identity: str) -> dict[str, dict[str, float]]:
        """The scores of a trial by case, NaN where a case could not be judged."""
        query = "SELECT case_name, scores FROM scores WHERE trial = ?"
        with self._named():
            rows = self.connection.execute(query, (self.key(identity),)).fetchall()
        return {
            case: {name: math.nan if value is None else value for name, value in json.loads(scores).items()}
            for case, scores in rows
        }

    def write_clips(self, rows: Iterable[tuple[str, str, str, UInt8[Tensor, "time height width 3"]]]) -> None:
        """Rows of (identity, name, case, frames), in one transaction; a clip that is there already stays."""

        def pack(frames: UInt8[Tensor, "time height width 3"]) -> tuple[str, bytes]:
            return json.dumps(list(frames.shape)), zlib.compress(frames.contiguous().numpy().tobytes())

        self._insert(rows, "clips VALUES (?, ?, ?, ?)", pack)

    def read_clips(self, identity: str, cases: Sequence[str]) -> dict[str, UInt8[Tensor, "time height width 3"]]:
        """The clips of a trial that are there, by case; raises ValueError for one that is damaged."""
        query = f"""SELECT case_name, shape, frames FROM clips
            WHERE trial = ? AND case_name IN ({", ".join("?" * len(cases))})"""
        with self._named():
            rows = self.connection.execute(query, (self.key(identity), *cases)).fetchall()
        return {case: self._unpack(case, shape, frames) for case, shape, frames in rows}

    def _unpack(self, case: str, shape: str, frames: bytes) -> UInt8[Tensor, "time height width 3"]:
        try:
            return torch.frombuffer(bytearray(zlib.decompress(frames)), dtype=torch.uint8).reshape(json.loads(shape))
        except (zlib.error, RuntimeError, ValueError) as error:
            raise ValueError(f"clip {case} in {self.path} is damaged ({error}); use another file") from None

    def table(self) -> pandas.DataFrame:
        """One row a trial and case: trial, name, case_name, written, then what identities hold and every score.

        `guidance.weak.1.heads` is of the first weak model, `subject.judge` the metric and its version. A score is NaN
        where the case could not be judged, or the judge of that row does not give it.
        """
        query = "SELECT trial, name, identity, case_name, scores, written FROM scores JOIN trials USING (trial)"
        with self._named():
            found = pandas.read_sql_query(f"{query} ORDER BY name, trial, case_name", self.connection)
        identities, scores = ([json.loads(text) for text in found.pop(name)] for name in ("identity", "scores"))
        found = found.join(pandas.json_normalize(identities))
        scores = pandas.DataFrame(scores, dtype=float)  # a column of nothing but null is one of numbers too
        return found.merge(scores, left_index=True, right_index=True, suffixes=("", "_score"))
