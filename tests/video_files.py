"""Small real videos for tests, and ways to damage them, each named by the reason for which it is to be skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}
MAX_PIXELS = 200_000  # what DAMAGES goes beyond with its huge frames


def grey_of(frame: int) -> int:
    """The grey level of one frame of `ramp`."""
    return 16 + 3 * frame


def frame_of(pixels: np.ndarray) -> np.ndarray:
    """Which frames of `ramp` clips show: int [...] of uint8 [..., height, width, 3]."""
    return np.round((pixels.astype(float).mean((-1, -2, -3)) - 16) / 3).astype(int)


def ramp(count: int = 75, width: int = 64, height: int = 48) -> np.ndarray:
    """A video whose frame k is all of grey level `grey_of(k)`; at most 79 frames differ."""
    levels = np.array([grey_of(k) for k in range(count)], dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def noise(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A video that compresses badly, so that most of its file is pictures."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([np.roll(picture, k, axis=1) for k in range(count)])


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float = 30,
    codec: str | None = None,
    times_s: Sequence[float] | None = None,
    rotation: int = 0,
    sound_s: float = 0.0,
    pixel_aspect: Fraction | None = None,
    container: dict[str, str] | None = None,
    title: str = "",
    **options: str,
) -> Path:
    """A video file.

    times_s: of each frame, for a variable rate; rotation: of the display matrix, in degrees to the left; sound_s:
    length of a silent sound track; container: options of the file format; title: a tag; options: of the encoder.
    """
    codec = codec or CODECS[path.suffix]
    if codec == "libx264":
        options = {"qp": "4", "preset": "ultrafast"} | options
    with av.open(str(path), "w", options=container or {}) as file:
        file.metadata["title"] = title
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        if codec != "libx264":
            stream.codec_context.bit_rate = 4_000_000
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound = _add_sound(file) if sound_s else None
        unit = Fraction(1, 1000) if times_s is not None else 1 / stream.codec_context.framerate
        stream.codec_context.time_base = unit
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = k if times_s is None else round(times_s[k] * 1000), unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound:
            _write_silence(file, sound, sound_s)
    return path


def write_sound(path: Path, seconds: float = 2.0) -> Path:
    """A file of the same container with nothing but sound."""
    with av.open(str(path), "w") as file:
        _write_silence(file, _add_sound(file), seconds)
    return path


def _add_sound(file: av.container.OutputContainer) -> av.AudioStream:
    return file.add_stream("libopus" if file.format.name in ("webm", "matroska") else "aac", rate=48000, layout="mono")


def _write_silence(file: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for first in range(0, int(seconds * 48000), 960):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, first
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def cut(path: Path, share: float) -> Path:
    """The file with only the first `share` of its bytes left."""
    os.truncate(path, int(path.stat().st_size * share))
    return path


def garble(path: Path, at: float = 0.4, count: int = 4000) -> Path:
    """The file with `count` bytes overwritten by noise."""
    data = bytearray(path.read_bytes())
    first = int(len(data) * at)
    data[first : first + count] = np.random.default_rng(1).bytes(count)
    path.write_bytes(data)
    return path


def _link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere.mp4"))


# What makes an .mp4 unusable for clips of 0.8 s and frames of at most MAX_PIXELS: the reason, and what writes one.
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "zero bytes": ("empty", lambda path: path.touch()),
    "text": ("unreadable", lambda path: path.write_text("This is no video.\n" * 40)),
    "random bytes": ("unreadable", lambda path: path.write_bytes(np.random.default_rng(2).bytes(5000))),
    "cut before its index": ("unreadable", lambda path: cut(write_video(path, noise(60)), 0.6)),
    "sound only": ("no video", write_sound),
    "huge frames": ("huge", lambda path: write_video(path, ramp(3, 640, 480))),
    "one frame": ("too short", lambda path: write_video(path, ramp(1))),
    "half a second": ("too short", lambda path: write_video(path, ramp(15))),
    "cut": ("truncated", lambda path: cut(write_video(path, noise(60), container={"movflags": "faststart"}), 0.3)),
    "garbled": ("corrupt", lambda path: garble(write_video(path, noise(26), preset="veryfast"))),
    "link to nothing": ("missing", _link_to_nothing),
}
