"""Real videos as a source of clips: Kinetics, UCF-101, or any folder; decoded once, then read from a memory map."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm

from physnb.config import choose, require
from physnb.data.clips import Clip
from physnb.data.decoding import REASONS, ClipSettings, Job, Outcome, decode_files
from physnb.data.random import uniform_draws
from physnb.store import prepare_folder, read_json, write_json, written_whole

SUFFIXES = frozenset(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
SPLITS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}  # names of folders
SPLIT_PLACES = ("", "videos")  # where such folders are
UCF_PLACES = ("", "ucfTrainTestlist", "annotations")  # where the lists of UCF-101 are
REPLACEMENTS = "replacement/replacement_for_corrupted_k400"  # of Kinetics-400: whole copies of broken files
CACHE_VERSION = 1  # goes up when the same settings give other pixels
SHARD_FILES = 256  # at most this many files in a shard: what a kill can cost
SHARD_BYTES = 32 * 2**20  # about as many bytes of clips in one: what preparation holds in memory


@dataclass(frozen=True)
class VideoFile:
    """One file of an index. name: its path within the folder; path: None if a list names it and it is not there."""

    name: str
    path: Path | None
    caption: str

    @classmethod
    def of(cls, folder: Path, path: Path | None, listed_as: str, label: str) -> VideoFile:
        """One that was found, or else goes by the name that a list gives it."""
        name = os.fsencode(os.path.relpath(path, folder) if path else listed_as)
        return cls(name.decode(errors="backslashreplace"), path, caption_of(label))  # can be printed, whatever it is


@dataclass(frozen=True)
class Index:
    """The videos of a folder. layout: how they were found, in words; unlisted: there, but not in the list used."""

    layout: str
    files: tuple[VideoFile, ...]
    unlisted: int = 0


def caption_of(label: str) -> str:
    """A label or the name of a class folder in plain words: "riding a bike" of "riding_a_bike" or "RidingABike"."""
    if re.fullmatch(r"([A-Z][a-z]*)+", label):  # UCF-101
        label = re.sub(r"(?<!^)(?=[A-Z])", " ", label).lower()
    return " ".join(label.replace("_", " ").split())


def index_videos(folder: str | Path, split: str = "train", fold: int = 1) -> Index:
    """The videos of one split of a folder, by name. What is there decides, in this order:

    - `annotations/{split}.csv` or `{split}.csv`: Kinetics, with columns youtube_id, time_start, time_end and, but for
      the held-out labels of test, label. Files are {youtube_id}_{time_start:06d}_{time_end:06d} or {youtube_id} with
      any suffix, flat or in class folders below {split}, videos/{split} or the folder itself; those in
      replacement/replacement_for_corrupted_k400 come first. The label is the caption.
    - `trainlist01.txt` and `testlist01.txt` (01: `fold`), also below ucfTrainTestlist or annotations: UCF-101, lines of
      `Class/video.avi [number]`, below UCF-101, videos or the folder itself.
    - a folder {split} or videos/{split}, or else, as split "train", the folder itself: its videos and those in its
      class folders, whose names become captions; a video in none has the empty caption.

    Raises ValueError if the folder is not there, has no such split or no video, or its list lacks columns.
    """
    folder = Path(folder)
    choose("split", split, SPLITS)
    require(folder.is_dir(), f"video folder {folder} does not exist or is no folder")
    if found := _first(folder, ("annotations", ""), [f"{name}.csv" for name in SPLITS[split]]):
        index = _index_kinetics(folder, found, split)
    elif found := _first(folder, UCF_PLACES, [f"{kind}list{fold:02d}.txt" for kind in (split, "train")]):
        index = _index_ucf(folder, found, split)
    else:
        index = _index_folders(folder, split)
    require(any(file.path for file in index.files), f"there is no video in {folder} ({index.layout})")
    return index


def _videos_below(folder: Path) -> list[Path]:
    """Videos in a folder and in its class folders, by name; hidden ones do not count."""
    entries = sorted(folder.glob("[!.]*"))  # none where there is no folder
    classes = [path for path in entries if path.is_dir()]
    inside = [path for name in classes for path in sorted(name.glob("[!.]*"))]
    return [path for path in entries + inside if path.suffix.lower() in SUFFIXES and not path.is_dir()]


def _by_name(files: list[VideoFile]) -> tuple[VideoFile, ...]:
    """The files in order, each once."""
    return tuple(file for _, file in sorted({file.name: file for file in files}.items()))


def _first(folder: Path, below: Iterable[str], names: Iterable[str]) -> Path | None:
    """The first of `names` that there is in the folder or in one of those `below` it."""
    places = [folder / sub / name for sub in below for name in names]
    return next((place for place in places if place.exists()), None)


def _index_kinetics(folder: Path, table: Path, split: str) -> Index:
    with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns, rows = reader.fieldnames or [], list(reader)
    needed = ["youtube_id", "time_start", "time_end"] + ["label"] * (split != "test")
    missing = [name for name in needed if name not in columns]
    require(not missing, f"{table} has no column {', '.join(missing)}; Kinetics lists have {', '.join(needed)}")
    root = _first(folder, SPLIT_PLACES, SPLITS[split]) or folder
    there = {path.stem: path for path in [*_videos_below(root), *_videos_below(folder / REPLACEMENTS)]}
    files = []
    for number, row in enumerate(rows, start=2):
        try:
            stem = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (TypeError, ValueError):
            raise ValueError(f"{table} line {number} has no whole time_start and time_end; mend or delete it") from None
        path = there.get(stem) or there.get(row["youtube_id"])
        files.append(VideoFile.of(folder, path, f"{split}/{stem}", row.get("label") or ""))
    layout = f"Kinetics, {table.relative_to(folder)} and videos below {root.name}"
    return Index(layout, _by_name(files), len(set(there.values()) - {file.path for file in files}))


def _index_ucf(folder: Path, table: Path, split: str) -> Index:
    require(table.name.startswith(split), f"{folder} has UCF-101 lists, but none of split {split}")
    roots = (folder, folder / "videos", folder / "UCF-101")
    there = {path.relative_to(root).as_posix(): path for root in roots for path in _videos_below(root)}
    lines = [line.split()[0] for line in table.read_text().splitlines() if line.strip()]
    files = [VideoFile.of(folder, there.get(line), line, line.rpartition("/")[0]) for line in lines]
    return Index(f"UCF-101, {table.relative_to(folder)}", _by_name(files))


def _index_folders(folder: Path, split: str) -> Index:
    roots = {name: _first(folder, SPLIT_PLACES, SPLITS[name]) for name in SPLITS}
    there = [name for name, root in roots.items() if root]
    hint = f"only {', '.join(there)}" if there else "nor any other; videos in no split are of split train"
    known = split in there or (not there and split == "train")
    require(known, f"{folder} has no split {split} (a folder, a .csv file or UCF-101 lists), {hint}")
    paths = _videos_below(root := roots[split] or folder)
    labels = ["" if path.parent == root else path.parent.name for path in paths]
    files = [VideoFile.of(folder, path, "", label) for path, label in zip(paths, labels, strict=True)]
    kind = f"videos in {len(set(labels))} class folders" if any(labels) else "videos without classes"
    return Index(f"{kind} below {root.name}", _by_name(files))


@dataclass(frozen=True)
class FileNote:
    """What there is to say about one file. kind: why it is skipped (one of REASONS), or what is unusual about it."""

    file: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What became of the files of a source. skipped: gave no clip; noted: gave clips, and one should know this."""

    layout: str
    files: int
    clips: int
    unlisted: int
    skipped: tuple[FileNote, ...]
    noted: tuple[FileNote, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many files were skipped for each reason."""
        return dict(Counter(note.kind for note in self.skipped))

    def __str__(self) -> str:
        used = self.files - len(self.skipped)
        lines = [f"{self.layout}: {self.clips} clips from {used} of {self.files} files, {len(self.skipped)} skipped"]
        lines += [f"  {self.unlisted} videos are in no list"] * bool(self.unlisted)
        for notes, about in ((self.skipped, REASONS), (self.noted, {})):
            for kind, count in Counter(note.kind for note in notes).most_common():
                lines.append(f"  {count} {kind}" + (f" ({about[kind]})" if kind in about else ""))
                named = [note for note in notes if note.kind == kind]
                lines += [f"    {note.file}: {note.detail}" for note in named[:5]]
                lines += [f"    and {len(named) - 5} more"] * (len(named) > 5)
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Record:
    """What the cache knows of a file: its outcome, whose pixels are rows of a shard from `row` on."""

    shard: str
    row: int
    bytes: int
    mtime_ns: int
    outcome: Outcome


@dataclass
class ClipCache:
    """A folder of shards, each with the outcomes of some files of the same settings, whole or not there at all.

    A shard is clips.npy, uint8 [clip, time, height, width, 3], and files.json. records: the last word on each file by
    its name, true as long as its size and time of change are the same.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set, repr=False)  # shards that were read
    _maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in writing, of all processes that use this cache: others wait. The lock of a killed process is free."""
        prepare_folder(self.folder, resume=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(".*.part"):  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield

    def read(self) -> None:
        """Learns what the shards hold."""
        for shard in sorted(self.folder.glob("shard-*")):
            if shard.name not in self._known:
                self._known.add(shard.name)
                for told in read_json(shard / "files.json"):
                    outcome = Outcome(**told.pop("outcome"))
                    self.records[outcome.name] = Record(shard.name, **told, outcome=outcome)

    def write(self, outcomes: list[tuple[Outcome, os.stat_result]]) -> None:
        """One more shard; call it with the lock held."""
        row, told, clips = 0, [], [outcome.frames for outcome, _ in outcomes if outcome.frames is not None]
        for outcome, stat in outcomes:
            known = dict(row=row, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
            told.append(known | {"outcome": vars(outcome) | {"frames": None}})
            row += len(outcome.start_s)
        last = max((shard.name for shard in self.folder.glob("shard-*")), default="shard-0")
        shard = self.folder / f"shard-{int(last.removeprefix('shard-')) + 1:06d}"
        with written_whole(shard) as temporary:
            temporary.mkdir()
            (temporary / "files.json").write_text(json.dumps(told))
            if clips:
                header = {"descr": "|u1", "fortran_order": False, "shape": (row, *clips[0].shape[1:])}
                with open(temporary / "clips.npy", "wb") as file:  # np.save would copy all, and not name a full disk
                    np.lib.format.write_array_header_1_0(file, header)
                    file.writelines(clip.data for clip in clips)

    def clip(self, record: Record, number: int) -> np.ndarray:
        """Pixels of one clip of a file, in the file's memory map."""
        if record.shard not in self._maps:
            path = self.folder / record.shard / "clips.npy"
            try:
                self._maps[record.shard] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete {path.parent} and prepare again") from None
        return self._maps[record.shard][record.row + number]


class VideoSource:
    """Clips of the videos of one split of a folder (see `index_videos`), numbered by file name and then by time.

    What a clip shows is told in `physnb.data.decoding.read_video`. Where in its file it starts is drawn by (seed, file
    name): neither the folders above nor the files beside it matter. Every clip is of scenario "videos" and bucket "id",
    its parameter start_s is the second of the file at which it starts. `prepare` decodes what the cache lacks; then the
    source has a count and reads clips from a memory map.

    fps: of the clips; clips_per_video: at most; cache: a folder, by default one in `folder`; workers: processes that
    decode; timeout_s: for one file; max_pixels: of a frame of a file; fold: of UCF-101's lists; name: of the source.
    Raises ValueError if the folder holds no such videos or a number is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        frames: int,
        size: int,
        fps: float = 10.0,
        split: str = "train",
        seed: int = 0,
        clips_per_video: int = 1,
        cache: str | Path | None = None,
        workers: int = 2,
        timeout_s: float = 20.0,
        max_pixels: int = ClipSettings.max_pixels,
        fold: int = 1,
        name: str = "videos",
    ):
        self.settings = ClipSettings(frames, size, float(fps), clips_per_video, max_pixels, seed)
        given = asdict(self.settings) | {"workers": workers}
        for what, least in dict(frames=2, size=8, clips_per_video=1, max_pixels=1, seed=0, workers=1).items():
            require(given[what] >= least, f"{what} must be at least {least}, got {given[what]}")
        require(math.isfinite(fps) and fps > 0, f"fps must be positive, got {fps}")
        require(timeout_s > 0, f"timeout_s must be positive, got {timeout_s}")
        self.name, self.workers, self.timeout_s = name, workers, timeout_s
        self.index = index_videos(folder, split, fold)
        key = hashlib.sha256(json.dumps([CACHE_VERSION, asdict(self.settings)]).encode()).hexdigest()[:16]
        self.cache = ClipCache(Path(cache or Path(folder) / ".physnb") / f"clips-{key}")
        self.report_path = self.cache.folder / f"report-{split}.json"
        self._look_up()

    def _look_up(self) -> None:
        """What the cache knows of each file: its clips, its fate, or nothing yet."""
        self.cache.read()
        self._clips: list[tuple[VideoFile, Record, int]] = []  # and the number within the file
        self._lacking, self._skipped, skipped, noted = [], [], [], []
        for file in self.index.files:
            try:
                stat = os.stat(file.path or "")
            except OSError:
                skipped.append(FileNote(file.name, "missing", "the file does not exist"))
                continue
            record = self.cache.records.get(file.name)
            if record is None or (record.bytes, record.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                self._lacking.append((file, stat))
                continue
            outcome = record.outcome
            if outcome.reason:
                self._skipped.append((file, stat))
                skipped.append(FileNote(file.name, outcome.reason, outcome.detail))
            self._clips.extend((file, record, number) for number in range(len(outcome.start_s)))
            noted.extend(FileNote(file.name, kind, detail) for kind, detail in outcome.notes)
        counts = len(self.index.files), len(self._clips), self.index.unlisted
        self._report = Report(self.index.layout, *counts, tuple(skipped), tuple(noted))

    def prepare(self, *, retry: bool = False, progress: bool = False) -> Report:
        """Decode every file that the cache knows nothing of, and tell what became of all, also in `report_path`.

        retry: also files that were skipped before, for example by a timeout on a busy machine. A killed preparation
        loses the shard in flight, and the next call goes on. Of several processes one decodes; the others wait. Raises
        ValueError if the cache cannot be written, OSError if the disk is full or decoding cannot be started.
        """
        if self._lacking or (retry and self._skipped):
            with self.cache.locked():
                self._look_up()  # another process may have been here
                self._decode(self._lacking + self._skipped * retry, progress)
                self._look_up()
                facts = {"reasons": self._report.reasons, "settings": asdict(self.settings)}
                write_json(self.report_path, asdict(self._report) | facts)
        return self._report

    def _decode(self, files: list[tuple[VideoFile, os.stat_result]], progress: bool) -> None:
        stats, batch, held = {file.name: stat for file, stat in files}, [], 0
        jobs = (Job(file.name, os.path.abspath(file.path), self._draws(file)) for file, _ in files)
        outcomes = decode_files(jobs, self.settings, workers=self.workers, timeout_s=self.timeout_s)
        with closing(outcomes), tqdm(total=len(files), disable=not progress, unit="file", desc="decode") as bar:
            for outcome in outcomes:
                batch.append((outcome, stats[outcome.name]))
                held += 0 if outcome.frames is None else outcome.frames.nbytes
                bar.update()
                if len(batch) >= SHARD_FILES or held >= SHARD_BYTES:
                    self.cache.write(batch)
                    batch, held = [], 0
        if batch:
            self.cache.write(batch)

    def _draws(self, file: VideoFile) -> tuple[float, ...]:
        stream, numbers = f"videos/{Path(file.name).name}", np.arange(self.settings.clips_per_video)
        return tuple(uniform_draws(self.settings.seed, stream, numbers).tolist())

    @property
    def count(self) -> int:
        """How many clips there are; ValueError before `prepare`."""
        lacking, files = len(self._lacking), len(self.index.files)
        require(lacking == 0, f"{lacking} of {files} videos are not decoded yet; call prepare() of source {self.name}")
        return len(self._clips)

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption of its files."""
        return tuple(dict.fromkeys(file.caption for file in self.index.files))

    def clips(self, numbers: Int[np.ndarray, " batch"]) -> Clip:
        """Clips number `numbers`, read from the cache."""
        numbers, count = np.asarray(numbers, dtype=np.int64), self.count
        require(
            numbers.ndim == 1 and len(numbers) > 0 and numbers.min() >= 0 and numbers.max() < count,
            f"clip numbers of {self.name} must be given and in [0, {count})",
        )
        chosen = [self._clips[number] for number in numbers.tolist()]
        return Clip(
            frames=torch.from_numpy(np.stack([self.cache.clip(record, number) for _, record, number in chosen])),
            captions=tuple(file.caption for file, _, _ in chosen),
            scenarios=("videos",) * len(chosen),
            buckets=("id",) * len(chosen),
            indices=torch.tensor(numbers),
            fps=self.settings.fps,
            parameters=tuple({"start_s": record.outcome.start_s[number]} for _, record, number in chosen),
        )
