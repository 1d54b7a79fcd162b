"""Reading clips out of video files: one file at a time, in processes of their own that may hang or die.

This file is also the program of these processes. They run it by its path and so import nothing but NumPy, PyAV and
jaxtyping, start in half a second and take some 70 MB; hence no other module of the package is imported here.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from multiprocessing.connection import wait

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Float, UInt8

CLOCK_S = 1e-3  # Matroska and WebM round time stamps to this
VARIABLE = 1.5  # a gap between frames that is this much longer or shorter than the median makes the rate variable
START_S = 120.0  # for a process to start, however busy the machine is
ORPHAN_S = 60  # how long after its time is up a process ends by itself: its parent, which should have ended it, is gone
FILES_A_PROCESS = 2000  # then another takes over: the memory of one grows by about a kilobyte a file
READY = b"ready\n"
# area averaging where a frame shrinks, bilinear where it grows; the same bits on every processor
AREA = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT

REASONS = {  # why a file gives no clip
    "missing": "named by a list, but not there",
    "empty": "zero bytes",
    "unreadable": "no container that ffmpeg knows: another kind of file, or cut before its index",
    "no video": "no video stream, only sound or a cover picture",
    "huge": "frames of more than max_pixels",
    "too short": "shorter than one clip",
    "truncated": "cut off, and what is left is shorter than one clip",
    "time stamps": "frames without presentation times, or with times that go back",
    "corrupt": "frames that do not decode",
    "timeout": "took longer than timeout_s",
    "crash": "the decoder died of it",
}


@dataclass(frozen=True)
class ClipSettings:
    """What decides the clips of a file besides the file itself."""

    frames: int
    size: int  # pixels, height and width
    fps: float
    clips_per_video: int = 1
    max_pixels: int = 7680 * 4320  # of one frame of the file
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """A file to read. name: what its outcome is called; draws: numbers in [0, 1) that place its clips, one each."""

    name: str
    path: str
    draws: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a file: clips, or the reason why there is none.

    frames: None if skipped. start_s: of each clip, on the file's own clock. reason: one of REASONS, empty if used.
    notes: (kind, detail) of what one should know of a file that is used: its rate is variable, it is cut off ...
    """

    name: str
    frames: UInt8[np.ndarray, "clip time size size 3"] | None = None
    start_s: tuple[float, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    detail: str = ""


class Unusable(Exception):
    """A file that gives no clip; reason is one of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_video(job: Job, settings: ClipSettings) -> Outcome:
    """The clips of one file, upright, their frames taken at `fps` by presentation time.

    Frame k of a clip is the one on display k / fps after the first: the last whose time stamp is not later. So a file
    of variable rate keeps its true speed, and one slower than `fps` shows frames again, as a player does; both are
    noted. A clip starts with a frame drawn by `draws` among those that leave room for it; several lie in equal parts of
    the file and share no moment, and a file gives as many of those asked for as fit. The data that are there count, not
    the length in the header: what is left of a truncated file is used if a clip fits in, and noted.

    A frame is scaled until its shorter side is `size` (the longer one rounds to whole pixels), then its centre is cut
    out; oblong pixels and quarter turns of the display matrix are honoured. An error that decoders usually conceal is
    an error. Raises Unusable with the reason. Leaves out mirrored display matrices, and damage that happens to decode:
    video streams have no checksums.
    """
    try:
        if os.path.isfile(job.path) and os.path.getsize(job.path) == 0:
            raise Unusable("empty", "zero bytes")
        with closing(_Video(job.path, settings)) as video:
            starts_s, notes = video.draw_starts(job.draws), video.notes()
            clips, repeats, rotations = zip(*(video.read_clip(start_s) for start_s in starts_s), strict=True)
    except FileNotFoundError:
        raise Unusable("missing", "the file does not exist") from None
    except PermissionError:
        raise Unusable("unreadable", "no permission to read it") from None
    except FFmpegError as error:  # of opening: errors of decoding have their own reason by now
        raise Unusable("unreadable", str(error.strerror)) from None
    if any(repeats):
        notes.append(("frames repeated", f"{sum(repeats)} of {len(clips) * settings.frames}"))
    if any(rotations):
        notes.append(("rotated", f"{max(rotations)} degrees"))
    return Outcome(job.name, np.stack(clips), tuple(starts_s), tuple(notes))


class _Video:
    """An open file, its stream of video and what its packets say."""

    def __init__(self, path: str, settings: ClipSettings):
        self.path, self.settings, limit = path, settings, str(settings.max_pixels)
        # the decoder heeds the limit while ffmpeg probes; a text file may be a playlist, and must not reach out
        options = {"max_pixels": limit, "protocol_whitelist": "file"}
        self.container = av.open(path, options=options, metadata_errors="replace")
        self.stream, self.reformatter = self._choose_stream(), VideoReformatter()
        self.stream.codec_context.thread_count = 1  # files are read in parallel instead
        self.stream.codec_context.options = {"max_pixels": limit, "err_detect": "explode"}
        self.oblong = float(self.stream.sample_aspect_ratio or 1)  # width of a pixel over its height

    def close(self) -> None:
        self.container.close()

    def _choose_stream(self) -> av.VideoStream:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = sorted({stream.type for stream in self.container.streams})
            raise Unusable("no video", f"it holds {', '.join(kinds) or 'nothing'}")
        decoder, most = streams[0].codec_context, self.settings.max_pixels
        if decoder is None:
            raise Unusable("unreadable", "ffmpeg has no decoder for it")
        if decoder.width * decoder.height > most:
            raise Unusable("huge", f"{decoder.width} x {decoder.height}, more than {most} pixels")
        return streams[0]

    @cached_property
    def span(self) -> tuple[Float[np.ndarray, " frame"], float]:
        """When each frame that is there as a whole is shown, in order, and when the last ends; nothing is decoded."""
        shown = []
        with suppress(FFmpegError):  # what follows an error is lost, what came before may do
            for packet in self.container.demux(self.stream):
                if packet.pts is not None and not packet.is_corrupt and not packet.is_discard:
                    shown.append((packet.pts, packet.duration or 0))
        if not shown:
            raise Unusable("time stamps", "no frame has a presentation time")
        if len(shown) == 1:
            raise Unusable("too short", "one frame")
        unit_s = float(self.stream.time_base)
        times_s = np.array([pts for pts, _ in sorted(shown)]) * unit_s
        return times_s, float(times_s[-1]) + (max(shown)[1] * unit_s or float(np.median(np.diff(times_s))))

    @property
    def there_s(self) -> float:
        """How long the video is by what is there of it."""
        return self.span[1] - float(self.span[0][0])

    @property
    def promised_s(self) -> float:
        """How long the header says it is where that is clearly longer, else 0."""
        tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", self.stream.metadata.get("DURATION", ""))  # of Matroska
        if self.stream.duration is not None:
            says_s = float(self.stream.duration * self.stream.time_base)
        elif tag:
            says_s = float(np.dot((3600, 60, 1), [float(part) for part in tag.groups()]))
        else:  # of the longest stream, which may be sound
            says_s = (self.container.duration or 0) / av.time_base if len(self.container.streams) == 1 else 0.0
        return says_s if says_s > self.there_s + max(0.25, 0.02 * says_s) else 0.0

    def draw_starts(self, draws: tuple[float, ...]) -> list[float]:
        """When each clip starts, in order."""
        times_s, clip_s = self.span[0], self.settings.frames / self.settings.fps
        count = min(self.settings.clips_per_video, int((self.there_s + CLOCK_S) / clip_s))
        if count == 0:
            reason, of = ("truncated", f" of {self.promised_s:.2f}") if self.promised_s else ("too short", "")
            raise Unusable(reason, f"{self.there_s:.2f}{of} s are there, a clip takes {clip_s:.2f} s")
        starts_s, part_s = [], self.there_s / count
        for part, draw in enumerate(draws[:count]):
            first_s = float(times_s[0]) + part * part_s
            last_s = max(first_s, first_s + part_s - clip_s)
            fits = times_s[(times_s >= first_s - CLOCK_S) & (times_s <= last_s + CLOCK_S)]
            # where a frame lasts so long that none begins there, the clip starts while it is shown
            starts_s.append(float(fits[int(draw * len(fits))]) if len(fits) else first_s + draw * (last_s - first_s))
        return starts_s

    def notes(self) -> list[tuple[str, str]]:
        gaps_s, notes = np.diff(self.span[0]), []
        shortest, usual, longest = float(gaps_s.min()), float(np.median(gaps_s)), float(gaps_s.max())
        if longest > VARIABLE * usual + CLOCK_S or shortest < usual / VARIABLE - CLOCK_S:
            notes.append(("variable rate", f"frames are {shortest:.3f} to {longest:.3f} s apart"))
        if self.promised_s:
            notes.append(("truncated", f"{self.there_s:.2f} of {self.promised_s:.2f} s are there"))
        return notes

    def read_clip(self, start_s: float) -> tuple[UInt8[np.ndarray, "time size size 3"], int, int]:
        """The clip that starts at `start_s`, how many of its frames repeat the one before, its rotation in degrees."""
        times_s = self.span[0]
        try:
            self.container.seek(int(start_s / self.stream.time_base), stream=self.stream)
            return self._take_frames(start_s, times_s)
        except (Unusable, FFmpegError):
            pass  # an index may be wrong, and frames after a seek may lack what they refer to: from the start, then
        try:
            with closing(_Video(self.path, self.settings)) as again:
                return again._take_frames(start_s, times_s)
        except FFmpegError as error:
            raise Unusable("corrupt", str(error.strerror)) from None

    def _take_frames(
        self, start_s: float, times_s: Float[np.ndarray, " frame"]
    ) -> tuple[UInt8[np.ndarray, "time size size 3"], int, int]:
        """Decodes from where the container stands until the clip is full."""
        wanted_s = start_s + np.arange(self.settings.frames) / self.settings.fps
        taken, distinct, shown = [], 0, None
        for frame in chain(self.container.decode(self.stream), [None]):
            time_s = math.inf if frame is None else frame.time
            if time_s is None or (shown is not None and time_s <= shown.time):
                raise Unusable("time stamps", "frames have no time or go back in time; write it anew as mp4 or mkv")
            if frame is not None and frame.is_corrupt:  # later frames are made from it
                raise Unusable("corrupt", f"the frame at {time_s:.2f} s is damaged")
            if frame is None and shown is not None:
                lost = np.sum((times_s > shown.time + CLOCK_S) & (times_s <= wanted_s[-1] + CLOCK_S))
                if lost > 1:  # one may be meant not to be shown
                    raise Unusable("corrupt", f"the last {lost} frames of the clip do not decode")
            due = int(np.sum(wanted_s < time_s - CLOCK_S)) - len(taken)  # moments at which the frame before is shown
            if due > 0:
                if shown is None:
                    raise Unusable("corrupt", f"no frame up to {wanted_s[0]:.2f} s")
                taken.extend([self._upright_square(shown)] * due)
                distinct += 1
            if len(taken) == len(wanted_s):
                break
            shown = frame
        return np.stack(taken), len(taken) - distinct, _quarter_turns(shown) * 90

    def _upright_square(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "size size 3"]:
        """The centre of a frame as it is meant to be seen."""
        size, wide = self.settings.size, frame.width * self.oblong
        scale = size / min(wide, frame.height)
        width, height = round(wide * scale), round(frame.height * scale)
        scaled = self.reformatter.reformat(frame, width, height, "rgb24", interpolation=AREA, threads=1).to_ndarray()
        top, left = (height - size) // 2, (width - size) // 2
        return np.rot90(scaled[top : top + size, left : left + size], _quarter_turns(frame))


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often a frame is to be turned left by 90 degrees."""
    return round(frame.rotation / 90) % 4


def decode_files(
    jobs: Iterable[Job], settings: ClipSettings, *, workers: int = 2, timeout_s: float = 20.0
) -> Iterator[Outcome]:
    """What came of each file, in the order in which they finish; every job gets one outcome.

    A process that takes more than `timeout_s` over a file is killed, and one that dies is replaced: either costs its
    file only. At most `workers` files are in flight, so memory does not grow with their number. Close the iterator to
    end the processes early; they end by themselves when this one is killed. Raises OSError if none can be started.
    """
    jobs, idle, busy = iter(jobs), [], []
    try:
        while True:
            while len(busy) < workers and (job := next(jobs, None)) is not None:
                idle = [worker for worker in idle if worker.process.poll() is None]
                busy.append(idle.pop() if idle else _Worker(settings, timeout_s))
                busy[-1].give(job)
            if not busy:
                return
            soonest = min(worker.deadline for worker in busy) - time.monotonic()
            readable = wait([worker.process.stdout for worker in busy], max(0.0, soonest))
            for worker in tuple(busy):
                outcome = worker.look(worker.process.stdout in readable)
                if outcome is not None:
                    busy.remove(worker)
                    idle.append(worker)
                    if worker.jobs >= FILES_A_PROCESS:
                        worker.end()
                    yield outcome
    finally:
        for worker in (*idle, *busy):
            worker.end()


class _Worker:
    """One decoding process, seen from its parent: takes a job at a time and gives one outcome for each."""

    def __init__(self, settings: ClipSettings, timeout_s: float):
        self.timeout_s, self.job, self.jobs, self.ready, self.answer = timeout_s, None, 0, False, bytearray()
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(asdict(settings)), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,  # an interrupt from the keyboard is for the parent alone
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.deadline = time.monotonic() + START_S

    def give(self, job: Job) -> None:
        self.job, self.jobs, self.answer = job, self.jobs + 1, bytearray()
        if self.ready:
            self.deadline = time.monotonic() + self.timeout_s
        with suppress(BrokenPipeError):  # it died; `look` will see that
            self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self.process.stdin.flush()

    def look(self, readable: bool) -> Outcome | None:
        """The outcome of the job, if it is there or if there will be none."""
        if not readable:
            late = time.monotonic() > self.deadline
            return self._give_up("timeout", f"more than {self.timeout_s:g} s") if late else None
        data = os.read(self.process.stdout.fileno(), 1 << 20)
        if not data:
            code = self.process.wait()
            return self._give_up("crash", signal.Signals(-code).name if code < 0 else f"exit status {code}")
        self.answer += data
        # the clock starts when the process does, and again when an answer comes: this side may be slow to read it
        self.deadline = time.monotonic() + self.timeout_s
        if not self.ready and self.answer.startswith(READY):
            self.ready = True
            del self.answer[: len(READY)]
        line, found, frames = self.answer.partition(b"\n")
        if not found:
            return None
        told = json.loads(line)
        shape = told.pop("shape")
        if shape and len(frames) < math.prod(shape):
            return None
        told |= dict(start_s=tuple(told["start_s"]), notes=tuple((kind, detail) for kind, detail in told["notes"]))
        return Outcome(**told, frames=np.frombuffer(frames, np.uint8).reshape(shape) if shape else None)

    def _give_up(self, reason: str, detail: str) -> Outcome:
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        self.end()
        detail = ": ".join([detail, *said[-1:]])
        if not self.ready:
            raise OSError(f"a video decoding process did not start: {detail}")
        return Outcome(self.job.name, reason=reason, detail=detail)

    def end(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with suppress(BrokenPipeError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):  # stuck in the kernel, on a disk that does not answer
            self.process.wait(timeout=5)


def _serve(settings: ClipSettings, timeout_s: float) -> None:
    """Read jobs from standard input and write their outcomes to standard output until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get between the answers
    answers.write(READY)
    answers.flush()
    for line in sys.stdin.buffer:
        job = Job(**json.loads(line))
        signal.alarm(int(timeout_s) + ORPHAN_S)
        try:
            outcome = read_video(job, settings)
        except Unusable as error:
            outcome = Outcome(job.name, reason=error.reason, detail=error.detail)
        except MemoryError:
            outcome = Outcome(job.name, reason="huge", detail="more than the memory holds")
        signal.alarm(0)
        told = dict(vars(outcome))
        frames = told.pop("frames")
        told["shape"] = None if frames is None else frames.shape
        answers.write(json.dumps(told).encode() + b"\n" + (b"" if frames is None else frames.tobytes()))
        answers.flush()


if __name__ == "__main__":
    _serve(ClipSettings(**json.loads(sys.argv[1])), float(sys.argv[2]))
