"""Physics-IQ of folders of videos in the official layout, for any number of scenarios.

A source clip has 8 s. Its first 3 s condition a model and the other 5 s are the test: "3 s in, 5 s out". The last
conditioning frame is the switch frame, all that an image-to-video model is given. A generated video has the 5 s after
the switch frame and nothing else. Each scenario has three views and two takes; a model is scored against take 1, and
take 2 shows how much the experiment itself varies.

    real       {number}_testing-videos_{fps}FPS_{view}_take-{1|2}_{scenario}.mp4
    generated  {number of take 1}_{view}_{scenario}.mp4

Modes. "clean": `physnb.metrics.physics_iq`, with frame 0 only starting the running average. "compat": the procedure of
google-deepmind/physics-IQ-benchmark at e457754 with its faults: masks at each video's own size go through a lossy mp4v
file, frame 0 scores 1, empty masks score 1, values are rounded on the way. It is for checks against published numbers.
"""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from physnb.config import choose, require
from physnb.metrics.physics_iq import (
    IOUS,
    SIZE,
    TERMS,
    Comparison,
    Motion,
    MotionMasker,
    Terms,
    common_size,
    compare,
    compared_size,
    official_points,
    resize,
    shrink_mask,
    verified_points,
    why_not_judged,
)

MODES = ("clean", "compat")
VIEWS = ("perspective-left", "perspective-center", "perspective-right")
CONDITIONING_S, TEST_S = 3, 5  # seconds
MIN_SIDE = 20  # pixels: compat compares at a quarter of it
REAL_NAME = re.compile(r"(\d+)_testing-videos_(\d+)FPS_(perspective-[a-z]+)_take-([12])_([^_]+)\.mp4")


def real_name(number: str, fps: int, view: str, take: str, scenario: str) -> str:
    """The official file name of a real video; `number` has four digits, `scenario` no underscore."""
    return f"{number}_testing-videos_{fps}FPS_{view}_take-{take}_{scenario}.mp4"


def generated_name(number: str, view: str, scenario: str) -> str:
    """The official file name of a generated video; `number` is that of take 1."""
    return f"{number}_{view}_{scenario}.mp4"


def split_clip(frames: Shaped[np.ndarray, "time ..."], fps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conditioning frames (3 s), switch frame (their last one) and test frames (5 s) of a clip of 8 s."""
    seconds = CONDITIONING_S + TEST_S
    require(
        fps > 0 and len(frames) == seconds * fps,
        f"a clip of {seconds} s at {fps} frames/s has {seconds * fps} frames, got {len(frames)}",
    )
    cut = CONDITIONING_S * fps
    return frames[:cut], frames[cut - 1], frames[cut:]


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "height width *rgb"]], fps: int) -> None:
    """Write RGB or grey frames of an even size as mp4v. Raises ValueError where OpenCV writes nothing."""
    writer = None
    try:
        for frame in frames:
            if writer is None:
                size, colour = frame.shape[1::-1], frame.ndim == 3
                require(size[0] % 2 == 0 and size[1] % 2 == 0, f"{path}: video needs an even size, got {size}")
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size, isColor=colour)
                require(writer.isOpened(), f"{path} cannot be written as mp4v video")
            require(frame.shape[1::-1] == size, f"{path}: frames of {size} and {frame.shape[1::-1]} in one video")
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) if colour else frame)
    finally:
        if writer is not None:
            writer.release()
    require(writer is not None, f"{path}: there are no frames to write")


@dataclass(frozen=True)
class Video:
    """What a video file says about itself."""

    path: Path
    width: int
    height: int
    fps: float
    frames: int


def open_video(path: Path) -> Video:
    """The header of a video file. Raises ValueError for a file that is missing or no video."""
    require(path.is_file(), f"{path} does not exist")
    capture = cv2.VideoCapture(str(path))
    try:
        require(capture.isOpened(), f"{path} cannot be read as a video")
        names = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT)
        width, height, frames = (int(capture.get(name)) for name in names)
        return Video(path, width, height, capture.get(cv2.CAP_PROP_FPS), frames)
    finally:
        capture.release()


def read_frames(path: Path, count: int) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The first `count` RGB frames of a video, one by one. Raises ValueError where fewer can be decoded."""
    capture = cv2.VideoCapture(str(path))
    try:
        for number in range(count):
            there, frame = capture.read()
            require(there, f"{path} has only {number} frames that can be decoded; {count} are needed")
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


@dataclass(frozen=True)
class ViewFiles:
    """The three videos of one view of a scenario."""

    scenario: str
    view: str
    take_1: Path
    take_2: Path
    generated: Path


def find_files(real: Path, generated: Path, fps: int, scenarios: Sequence[str] | None = None) -> list[ViewFiles]:
    """The files of each scenario (all, or those named), by scenario in order of their files, then in order of VIEWS.

    `real` holds the real videos, or is the data set's folder with split-videos/testing/{fps}FPS below it.
    Raises ValueError naming the first file that is missing, doubled, or not named as it should be.
    """
    for folder in (real, generated):
        require(folder.is_dir(), f"{folder} is not a folder")
    below = real / "split-videos" / "testing" / f"{fps}FPS"
    real = below if below.is_dir() else real
    found: dict[tuple[str, str, str], tuple[str, Path]] = {}  # (scenario, view, take) -> (number, file)
    rates = set()
    for path in sorted(real.glob("*.mp4")):
        match = REAL_NAME.fullmatch(path.name)
        require(match is not None, f"{path} is not named {{number}}_testing-videos_{{fps}}FPS_{{view}}_take-{{1|2}}_"
                "{scenario}.mp4, without other underscores")  # fmt: skip
        number, rate, view, take, scenario = match.groups()
        choose(f"view in {path}", view, VIEWS)
        rates.add(int(rate))
        if int(rate) == fps:
            other = found.setdefault((scenario, view, take), (number, path))[1]
            require(other == path, f"{other} and {path.name} are the same view and take")
    there = f"there are {', '.join(f'{rate}FPS' for rate in sorted(rates))}" if rates else "there are none at all"
    require(len(found) > 0, f"{real} has no real videos of {fps}FPS; {there}")
    names = list(dict.fromkeys(scenario for scenario, _, _ in found))
    for name in scenarios or ():
        choose(f"scenario in {real}", name, names)
    files = []
    for scenario in names if scenarios is None else dict.fromkeys(scenarios):
        for view in VIEWS:
            for take in "12":
                wanted = real / real_name("*", fps, view, take, scenario)
                require((scenario, view, take) in found, f"{wanted} is missing: take {take} of this view")
            number, first = found[scenario, view, "1"]
            made = generated / generated_name(number, view, scenario)
            require(made.is_file(), f"{made} is missing: the generated video for {first.name}")
            files.append(ViewFiles(scenario, view, first, found[scenario, view, "2"][1], made))
    return files


def check_files(files: list[ViewFiles], fps: int, mode: str) -> list[str]:
    """Notes on what is cut or resized, after refusing files that do not fit. Reads only headers."""
    count, notes = TEST_S * fps, []
    for view in files:
        first = open_video(view.take_1)
        for path in (view.take_1, view.take_2, view.generated):
            video = open_video(path)
            require(abs(video.fps - fps) < 0.01, f"{path} has {video.fps:g} frames/s, expected {fps}")
            require(
                video.frames >= count,
                f"{path} has {video.frames} frames; {TEST_S} s at {fps} frames/s are {count}",
            )
            require(
                mode == "compat" or path != view.generated or video.frames == count,
                f"{path} has {video.frames} frames, expected {count}; of a video that starts with the conditioning "
                f"{CONDITIONING_S} s keep the test frames of split_clip",
            )
            if video.frames > count:
                notes.append(f"{path.name}: {video.frames} frames, cut to the first {count}")
            if mode == "compat":
                fits = video.width % 2 == 0 and video.height % 2 == 0 and min(video.width, video.height) >= MIN_SIDE
                size = f"{video.width} x {video.height}"
                require(fits, f"{path} is {size}; compat needs even sides of at least {MIN_SIDE} pixels")
            if (video.width, video.height) != (first.width, first.height):
                notes.append(f"{path.name}: {video.width} x {video.height}, compared at {first.width} x {first.height}")
    return notes


def clean_motion(path: Path, count: int, common: tuple[int, int]) -> Motion:
    """Masks of frames 1 to count - 1, made at the `common` size, and all frames, both at the compared size."""
    masker, size = MotionMasker(), compared_size(common)
    masks, frames = [], []
    for frame in read_frames(path, count):
        masks.append(shrink_mask(masker(resize(frame, common)), size))
        frames.append(resize(frame, size))
    return Motion(np.stack(masks[1:]), np.stack(frames))


def compat_motion(path: Path, count: int, size: tuple[int, int], fps: int) -> Motion:
    """Masks of all frames, made at the video's own size, written as lossy video and read again, and all frames."""
    masker, frames = MotionMasker(), []

    def masks() -> Iterator[np.ndarray]:
        for frame in read_frames(path, count):
            frames.append(resize(frame, size))
            yield masker(frame)

    with tempfile.TemporaryDirectory(prefix="physnb-masks-") as folder:
        coded = Path(folder) / "masks.mp4"
        write_video(coded, masks(), fps)
        small = [shrink_mask(mask[..., 0], size) for mask in read_frames(coded, count)]
    return Motion(np.stack(small), np.stack(frames))


def _round_each(values: Float[np.ndarray, "..."], digits: int = 4) -> Float[np.ndarray, "..."]:
    """Every number rounded as Python rounds, which numpy does not do to the last digit."""
    return np.array([round(float(v), digits) for v in values.ravel()]).reshape(values.shape)


def rounded_terms(terms: Terms) -> Terms:
    """The terms with the values of single frames rounded to 4 digits, as the official scorer reads them."""
    return Terms(
        _round_each(terms.spatiotemporal_iou), terms.spatial_iou, terms.weighted_spatial_iou, _round_each(terms.mse)
    )


def compat_score(model: Terms, variance: Terms) -> dict[str, float]:
    """The official scorer's numbers in its order of averaging and rounding; terms are [scenario, view, ...].

    variance_sum is its second return value: the three IoUs of the takes less their mse.
    """
    model, variance = rounded_terms(model), rounded_terms(variance)
    scenarios = len(model.spatial_iou)
    means, takes = {}, {}
    for name in TERMS:
        ours, theirs = getattr(model, name), getattr(variance, name)
        if ours.ndim == 3:  # by frame: over the frames of all views, then over scenarios
            means[name] = float(ours.reshape(scenarios, -1).mean(1).mean())
            exact = np.mean([theirs[:, view].mean() for view in range(len(VIEWS))])
        else:
            means[name] = float(ours.mean(0).mean())
            exact = np.mean(theirs.mean(0))
        takes[name] = round(float(exact), 5 if name == "spatial_iou" else 4)
    require(
        min(takes[name] for name in IOUS) > 0, "the motion of the two takes never overlaps: there is no official score"
    )
    raw = float(official_points(means, takes))
    verified = verified_points(model.means(), variance.means())
    return dict(
        physics_iq=round(max(min(raw, 100.0), 0.0), 2),
        physics_iq_raw=raw,
        verified=float(verified.mean()),
        **means,
        **{f"variance_{name}": value for name, value in takes.items()},
        variance_sum=round(sum(takes[name] for name in IOUS) - takes["mse"], 4),
    )


def read_categories(descriptions: Path) -> dict[str, str]:
    """Category of each scenario in the official descriptions.csv, by name."""
    require(descriptions.is_file(), f"{descriptions} does not exist")
    with descriptions.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    require(
        len(rows) > 0 and {"scenario", "category"} <= rows[0].keys(),
        f"{descriptions} has no rows with the columns scenario and category",
    )
    return {row["scenario"].removesuffix(".mp4").split("_")[-1]: row["category"] for row in rows}


def score_folders(
    real: Path,
    generated: Path,
    *,
    fps: int,
    mode: str = "clean",
    size: int = SIZE,
    scenarios: Sequence[str] | None = None,
    descriptions: Path | None = None,
) -> dict[str, Any]:
    """Physics-IQ of a folder of generated videos against a folder of real ones, for JSON: None is what is not judged.

    physics_iq: the official score, clipped to [0, 100] (compat: and rounded as published); physics_iq_raw: not clipped;
    verified: mean Verified score of the views. Means of the terms and, as variance_*, of the takes. rows: one a
    scenario and view; not_judged: which were not, and why (compat judges everything; there it lists the views whose
    score is void because a real mask is empty). notes: videos cut to 5 s or resized.

    fps: whole frames/s of all videos. size: as in `metric_physics_iq`, for clean alone. scenarios: only these.
    descriptions: the official descriptions.csv; its scenarios are scored, and rows name their category.

    Raises ValueError naming the file for anything missing, unreadable, too short, at another rate, or, in compat, of an
    odd size. Real videos of more than 5 s are cut, as the official code does; a generated one only in compat.
    """
    choose("mode", mode, MODES)
    require(fps == int(fps) and fps > 0, f"frames/s must be a positive whole number, got {fps}")
    require(size >= SIZE, f"motion masks need a size of at least {SIZE} pixels, got {size}")
    categories = {} if descriptions is None else read_categories(Path(descriptions))
    if scenarios is None and categories:
        scenarios = tuple(categories)
    for name in scenarios if categories else ():
        choose(f"scenario in {descriptions}", name, categories)
    files = find_files(Path(real), Path(generated), fps, scenarios)
    notes = check_files(files, fps, mode)

    measured = [_measure_view(view, fps, mode, size) for view in files]
    model, variance = (Terms.stack([terms[i] for terms in measured]) for i in (0, 1))
    share, reasons = np.array([terms[2] for terms in measured]), tuple(terms[3] for terms in measured)
    if mode == "compat":
        by_scenario = [_by_scenario(terms) for terms in (model, variance)]
        views = Comparison(rounded_terms(model), rounded_terms(variance), share, (None,) * len(files))
        result = dict(judged=len(files), cases=len(files), moving_share=float(share.mean()))
        result = compat_score(*by_scenario) | result
    else:
        views = Comparison(model, variance, share, reasons)
        result = views.of_set()
    numbers = views.by_view()
    rows = []
    for i, (view, reason) in enumerate(zip(files, reasons, strict=True)):
        row: dict[str, Any] = dict(scenario=view.scenario, view=view.view)
        row |= dict(category=categories[view.scenario]) if categories else {}
        row |= {name: float(values[i]) if np.isfinite(values[i]) else None for name, values in numbers.items()}
        rows.append(row | dict(reason=reason))
    not_judged = [f"{row['scenario']} {row['view']}: {row['reason']}" for row in rows if row["reason"]]
    return dict(mode=mode, fps=fps) | result | dict(rows=rows, not_judged=not_judged, notes=notes)


def _measure_view(view: ViewFiles, fps: int, mode: str, size: int) -> tuple[Terms, Terms, float, str | None]:
    """Generated beside take 1, take 2 beside take 1, share of frames of take 1 that move, why it cannot be judged."""
    first, count = open_video(view.take_1), TEST_S * fps
    paths = (view.take_1, view.take_2, view.generated)
    if mode == "compat":
        compared = compared_size((first.width, first.height))
        take_1, take_2, made = (compat_motion(path, count, compared, fps) for path in paths)
    else:
        common = common_size(first.width, first.height, size)
        take_1, take_2, made = (clean_motion(path, count, common) for path in paths)
    variance = compare(take_1, take_2)
    share = float(take_1.masks.any((1, 2)).mean())
    return compare(take_1, made), variance, share, why_not_judged(take_1, take_2, variance)


def _by_scenario(terms: Terms) -> Terms:
    """Terms of views one after the other as [scenario, view, ...]."""
    arrays = {name: getattr(terms, name) for name in TERMS}
    return Terms(**{name: values.reshape(-1, len(VIEWS), *values.shape[1:]) for name, values in arrays.items()})
