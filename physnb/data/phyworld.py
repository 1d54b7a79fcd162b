"""Files in phyworld's HDF5 layout (github.com/phyworld/phyworld, id_ood_data): read as a source of clips, and written.

    video_streams/00000     [N] byte strings of varying length, each a whole MP4
    position_streams/00000  [N, time, 2], or [N, time, 2, 2] for two discs, float64, world units, y up
    init_streams/00000      [N, 2] radius and speed; [N, 3] and a colour, 0 red or 1 blue; [N, 4] r1, r2, v1, v2 of two
                            discs that meet, the second moving left; float64

and so on in chunks of at most 1000 clips: 00001, 00002 ... Frames are 0.1 s apart whatever rate the MP4 claims.
Published pictures put pixel i at i / (W - 1) of the box's side, and everything else here puts it at (i + 1/2) / W.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8

from physnb.config import SCENARIOS, choose, require
from physnb.data.captions import CAPTIONS
from physnb.data.clips import FRAME_STEP_S, Clip, DiscState
from physnb.data.laws import GRAVITY, elastic_collision
from physnb.data.worlds import RADIUS, SPEED, frame_times, simulate_world
from physnb.store import written_whole

GROUPS = ("video_streams", "position_streams", "init_streams")
CHUNK_CLIPS = 1000
CODECS = {"libx264": {"crf": "18", "preset": "veryfast"}, "mpeg4": {"qmin": "1", "qmax": "3"}}  # and their settings
CODEC = "libx264" if "libx264" in av.codecs_available else "mpeg4"
RANGE_TOLERANCE = 1e-6  # a quantity stored as float32 may be this far outside its range
MOTION_TOLERANCE = 0.1  # world units: how far positions may be from the law; Box2D's steps make a throw 0.04 late


def encode_mp4(frames: UInt8[np.ndarray, "time height width 3"], codec: str = CODEC) -> bytes:
    """The frames as a whole MP4 of 10 frames/s, in 4:2:0 colour as the published files have; sides must be even."""
    choose("codec", codec, CODECS)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=round(1 / FRAME_STEP_S), options=CODECS[codec])
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.thread_count = 1  # more threads than one make other bytes
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode_mp4(data: bytes, frames: int, total: int) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The first `frames` frames of an MP4 that should have `total`; raises ValueError for a damaged or another one."""
    found, reformatter = 0, VideoReformatter()  # one of them for all frames is five times as fast
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            require(len(container.streams.video) == 1, "there is not exactly one video in it")
            stream = container.streams.video[0]
            require(stream.frames in (0, total), f"it has {stream.frames} frames, its state {total}")  # 0: not said
            stream.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}  # or damaged parts are painted over
            for frame in container.decode(stream):
                require(not frame.is_corrupt, f"frame {found} is corrupt")
                yield reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                found += 1
                if found == frames:
                    break
    except av.error.FFmpegError as error:
        raise ValueError(str(error)) from None
    require(found == frames, f"it ends after {found} frames, {frames} are asked for")


def resize_weights(source: int, size: int) -> Float[np.ndarray, "size source"]:
    """How much of each of `size` pixels, (k + 1/2) / size, is covered by each published one, i / (source - 1)."""
    edges = (np.arange(source + 1) - 0.5) / (source - 1)
    low, high = np.arange(size)[:, None] / size, np.arange(1, size + 1)[:, None] / size
    overlap = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=8)
def resize_bands(source: int, size: int) -> tuple[tuple[slice, Float[np.ndarray, "rows covered"]], ...]:
    """`resize_weights` in bands of 8 rows: the published pixels that each covers, and the weights without the zeros."""
    weights, bands = resize_weights(source, size), []
    for first in range(0, size, 8):
        band = weights[first : first + 8]
        places = band.any(0).nonzero()[0]
        covered = slice(int(places[0]), int(places[-1]) + 1)
        bands.append((covered, np.ascontiguousarray(band[:, covered])))
    return tuple(bands)


def resize(frame: UInt8[np.ndarray, "side side 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Area averages of a published picture, in which pixel i is at (i + 1/2) / size."""
    side = len(frame)
    bands, pixels = resize_bands(side, size), frame.reshape(side, side * 3)
    rows = np.concatenate([weights @ pixels[covered].astype(np.float32) for covered, weights in bands])
    planes = np.ascontiguousarray(rows.reshape(size, side, 3).swapaxes(1, 2)).reshape(size * 3, side)
    small = np.concatenate([planes[:, covered] @ weights.T for covered, weights in bands], axis=1)
    return np.rint(small.reshape(size, 3, size).swapaxes(1, 2)).astype(np.uint8)


class PhyworldSource:
    """The clips of one file in phyworld's layout, numbered through its chunks.

    path: any published or written file of uniform motion, parabola or collision. frames: of each clip, from the first
    on. size: side of the frames in pixels; area averages that undo the published pixel map, so that discs are seen
    where the state says, but at the file's own size the frames as they were decoded.
    scenario: found in the positions if not given (two discs collide, one that drops is thrown).

    State: positions and radii as stored. Velocities by the law: one disc has the speed of `init` along its path, and
    the fall of GRAVITY if thrown; two have it until they touch, and after that the difference of the last two positions
    in the file, because Box2D's slow impacts are not elastic (if they touch later than that, the elastic law). There is
    no impact after the last frame. Buckets by the ranges of `physnb.data.worlds`. Each process opens the file anew.

    Raises ValueError naming the file for one that is missing, truncated or of another layout, or has fewer frames, and
    naming chunk and index for a clip whose video is damaged or does not fit its state.
    Leaves out whether the video shows what the state says, and files of shapes other than discs.
    """

    def __init__(self, path: str | Path, *, frames: int, size: int, scenario: str | None = None):
        require(frames >= 2, f"a clip needs at least 2 frames, got {frames}")
        require(size >= 8, f"frame size must be at least 8 pixels, got {size}")
        self.path, self.frames, self.size = Path(path), frames, size
        self.name = f"phyworld {self.path.stem}"
        self._file: h5py.File | None = None
        self._process = -1
        self._datasets: dict[str, tuple[h5py.Dataset, ...]] = {}  # of chunks; to look one up takes as long as a read
        lengths = self._chunk_lengths()
        self._chunks = list(lengths)
        self._starts = np.cumsum([0, *lengths.values()])
        self.count = int(self._starts[-1])
        require(self.count > 0, f"{self.path} holds no clip; use another file")
        self.scenario = self._find_scenario(scenario)
        own = CAPTIONS[self.scenario]
        self.captions = (own,) if self.scenario == "collision" else (own, own.replace("red", "blue"))

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: all but the open file."""
        return self.__dict__ | {"_file": None, "_process": -1, "_datasets": {}}

    def _opened(self) -> h5py.File:
        """The file, opened in this process: an open HDF5 file does not survive a fork."""
        if self._process != os.getpid():
            require(self.path.is_file(), f"{self.path} does not exist")
            try:
                self._file, self._process, self._datasets = h5py.File(self.path, "r"), os.getpid(), {}
            except OSError as error:
                raise ValueError(f"{self.path} is truncated or not an HDF5 file ({error}); fetch it again") from None
        return self._file

    def _chunk_lengths(self) -> dict[str, int]:
        """Clips in each chunk, in order, after a look at every dataset's shape."""
        file, lengths = self._opened(), {}
        for group in GROUPS:
            require(
                isinstance(file.get(group), h5py.Group),
                f"{self.path} has no group {group}; phyworld's layout has {', '.join(GROUPS)}",
            )
        names = sorted(set().union(*(file[group] for group in GROUPS)))
        for name in names:
            for group in GROUPS:
                require(name in file[group], f"{self.path}: chunk {name} is missing in {group}; write the file again")
            videos, positions, init = (file[group][name].shape for group in GROUPS)
            where = f"{self.path}, chunk {name}"
            require(
                len(videos) == 1 and videos[0] == positions[0] == init[0],
                f"{where}: videos {videos}, positions {positions} and init {init} are not of the same clips",
            )
            discs = {(3, 2): 1, (3, 3): 1, (4, 4): 2}.get((len(positions), init[-1]))  # dimensions, values
            require(
                discs is not None and set(positions[2:]) == {2} and len(init) == 2,
                f"{where}: positions {positions} with init {init} are not of one disc or two",
            )
            require(
                len(positions) == len(file["position_streams"][names[0]].shape),
                f"{where}: {discs} discs a clip, unlike chunk {names[0]}; use a file of one scenario",
            )
            require(
                positions[1] >= self.frames, f"{where}: clips have {positions[1]} frames, {self.frames} are asked for"
            )
            lengths[name] = videos[0]
        return lengths

    def _find_scenario(self, given: str | None) -> str:
        """The scenario that the first clip shows."""
        _, positions, _ = self._read(0)
        found = "collision"
        if positions.ndim == 2:
            time = frame_times(len(positions))
            fall = GRAVITY / 2 * (time[-1] ** 2 - time[0] ** 2)
            found = "parabola" if positions[0, 1] - positions[-1, 1] > fall / 2 else "uniform"
        if given is not None:
            choose("scenario", given, SCENARIOS)
            require(given == found, f"{self.path} shows {found}, not {given}; leave the scenario out")
        return found

    def _where(self, number: int) -> tuple[str, int, str]:
        """Chunk and index of a clip, and how an error names them."""
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        name, index = self._chunks[chunk], int(number - self._starts[chunk])
        return name, index, f"{self.path}, chunk {name}, index {index}"

    def _read(self, number: int) -> tuple[bytes, np.ndarray, np.ndarray]:
        """MP4, positions and init of one clip as stored."""
        chunk, index, where = self._where(number)
        file = self._opened()
        try:
            if chunk not in self._datasets:
                self._datasets[chunk] = tuple(file[group][chunk] for group in GROUPS)
            video, positions, init = (dataset[index] for dataset in self._datasets[chunk])
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{where}: cannot be read ({error}); fetch the file again") from None
        require(
            bool(np.isfinite(positions).all() and np.isfinite(init).all() and (init >= 0).all()),
            f"{where}: positions and init must be finite and init not negative, got init {init.tolist()}",
        )
        return np.asarray(video, dtype=np.uint8).tobytes(), positions, init

    def clips(self, numbers: Int[np.ndarray, " batch"]) -> Clip:
        """Clips number `numbers`; raises ValueError for a number that there is not, or a damaged clip."""
        numbers = np.asarray(numbers, dtype=np.int64)
        require(
            len(numbers) > 0 and numbers.min() >= 0 and numbers.max() < self.count,
            f"clip numbers of {self.path} are in [0, {self.count}), got {numbers.tolist()}",
        )
        return Clip.concatenate([self._clip(number) for number in numbers.tolist()])

    def _clip(self, number: int) -> Clip:
        """One clip, decoded, resized and with its state."""
        video, positions, init = self._read(number)
        where = self._where(number)[2]
        frames = self._decode(video, len(positions), where)
        try:
            if self.scenario == "collision":
                state, parameters = _two_discs(positions, init)
            else:
                state, parameters = _one_disc(positions, init, GRAVITY if self.scenario == "parabola" else 0.0)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; leave the clip out") from None
        caption, blue = CAPTIONS[self.scenario], np.isnan(state["radii"][0])
        state = {name: torch.from_numpy(np.asarray(value)[None]).float() for name, value in state.items()}
        state |= {name: state[name][:, : self.frames] for name in ("positions", "velocities")}
        impact = state["impact_time_s"]
        impact[impact > frame_times(self.frames)[-1]] = torch.nan
        return Clip(
            frames=torch.from_numpy(frames)[None],
            captions=(caption.replace("red", "blue") if blue else caption,),
            scenarios=(self.scenario,),
            buckets=(_bucket(self.scenario, parameters),),
            indices=torch.tensor([number]),
            state=DiscState(**state),
            parameters=(parameters,),
        )

    def _decode(self, video: bytes, frames: int, where: str) -> UInt8[np.ndarray, "time size size 3"]:
        """The first frames of a clip that should have `frames`, at this source's size."""
        small = np.empty((self.frames, self.size, self.size, 3), np.uint8)
        try:
            for time, frame in enumerate(decode_mp4(video, self.frames, frames)):
                height, width = frame.shape[:2]
                if height != width or height < self.size:
                    break
                small[time] = frame if height == self.size else resize(frame, self.size)
            else:
                return small
        except ValueError as error:
            raise ValueError(f"{where}: the video is damaged ({error}); leave the clip out") from None
        raise ValueError(f"{where}: frames of {width} x {height} pixels do not shrink to squares of {self.size}")


def _one_disc(
    positions: Float[np.ndarray, "time axis"], init: Float[np.ndarray, " value"], gravity: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """State and parameters of uniform motion (gravity 0) or a throw; the disc is blue if a third value of init is 1."""
    radius, speed, colour = (*init, 0.0)[:3]
    require(colour in (0.0, 1.0), f"init {init.tolist()} is not radius, speed and colour 0 or 1")
    time = frame_times(len(positions))
    path = positions[-1] - positions[0]
    if gravity:
        path = np.array([path[0], 0.0])
    length = np.hypot(*path)
    launch = speed * path / length if length > 0 else np.zeros(2)
    velocity = launch - np.outer(time, [0.0, gravity])
    since = (time - time[0])[:, None]
    expected = positions[0] + (velocity[0] + velocity) / 2 * since
    off = np.abs(expected - positions).max()
    require(off <= MOTION_TOLERANCE, f"positions are {off:.2g} units off a disc of {speed:g} units/s")
    state = dict(positions=np.full((len(time), 2, 2), np.nan), radii=np.full(2, np.nan), impact_time_s=np.nan)
    state["velocities"] = state["positions"].copy()
    disc = int(colour)
    state["positions"][:, disc], state["velocities"][:, disc], state["radii"][disc] = positions, velocity, radius
    return state, {"radius": float(radius), "speed": float(speed)}


def _two_discs(
    positions: Float[np.ndarray, "time disc axis"], init: Float[np.ndarray, " value"]
) -> tuple[dict[str, Any], dict[str, float]]:
    """State and parameters of a head-on collision; the impact may come after the last frame."""
    r1, r2, v1, v2 = init.tolist()
    time = frame_times(len(positions))
    gap = positions[0, 1, 0] - positions[0, 0, 0] - r1 - r2
    require(gap >= -MOTION_TOLERANCE, f"the discs overlap by {-gap:.2g} units in the first frame")
    meet = time[0] + max(gap, 0.0) / (v1 + v2) if v1 + v2 > 0 else np.inf
    before, hit = np.array([[v1, 0.0], [-v2, 0.0]]), (time >= meet)[:, None, None]
    after = np.array([[v, 0.0] for v in elastic_collision(r1**2, r2**2, v1, -v2)])
    if (time >= meet).sum() >= 3:  # the first of them may lie within Box2D's step of the impact
        after = (positions[-1] - positions[-2]) / FRAME_STEP_S
    off = np.abs(np.where(hit, 0.0, positions[0] + before * (time - time[0])[:, None, None] - positions)).max()
    require(off <= MOTION_TOLERANCE, f"positions are {off:.2g} units off discs of {v1:g} and {v2:g} units/s")
    state = dict(
        positions=positions,
        velocities=np.where(hit, after, before),
        radii=np.array([r1, r2]),
        impact_time_s=meet,
    )
    return state, {"radius_1": r1, "radius_2": r2, "speed_1": v1, "speed_2": v2}


def _bucket(scenario: str, parameters: dict[str, float]) -> str:
    """Which quantities lie out of the training ranges: "r", "v", "rv", or "id" for none."""
    out = ""
    for letter, name, (low, high) in (("r", "radius", RADIUS[scenario].inner), ("v", "speed", SPEED.inner)):
        values = [value for key, value in parameters.items() if key.startswith(name)]
        if min(values) < low - RANGE_TOLERANCE or max(values) > high + RANGE_TOLERANCE:
            out += letter
    return out or "id"


def write_phyworld(path: str | Path, batches: Iterable[Clip]) -> int:
    """Write clips of one scenario with their states; how many were written.

    Frames are stored as they are given: render them with edge="phyworld" at 256 pixels for what the published files
    hold. The codec changes them by 0.2 to 0.3 grey levels on average, by up to 200 in pixels at a disc's edge, where
    colour is halved in resolution. States keep all their digits. Chunks are written as they fill up, so memory holds a
    batch and the MP4s of one chunk. The file appears whole or not at all, and replaces what was there.
    Raises ValueError for no clip, clips without a state, of several or other scenarios, frame counts or odd sizes.
    """
    path = Path(path)
    with written_whole(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                for group in GROUPS:
                    file.create_group(group)
                count, chunk, first = 0, [], None
                for clip in batches:
                    first = clip if first is None else first
                    _check_writable(clip, first)
                    for row in range(len(clip)):
                        chunk.append(_stored(clip, row))
                        count += 1
                        if len(chunk) == CHUNK_CLIPS:
                            _write_chunk(file, count, chunk)
                            chunk = []
                require(count > 0, f"there is no clip to write to {path}")
                if chunk:
                    _write_chunk(file, count, chunk)
        except RuntimeError as error:  # HDF5 reports a full disk in this class when it closes the file
            raise OSError(f"{path} cannot be written ({error})") from None
    return count


def _check_writable(clip: Clip, first: Clip) -> None:
    scenario = choose("scenario", first.scenarios[0], SCENARIOS)
    require(clip.state is not None, "phyworld's layout holds the true state; take the clips from a simulator")
    require(set(clip.scenarios) == {scenario}, f"a file holds one scenario, got {scenario} and {clip.scenarios}")
    require(clip.fps == 1 / FRAME_STEP_S, f"the worlds have {1 / FRAME_STEP_S:g} frames/s, got {clip.fps:g}")
    time, height, width = clip.frames.shape[1:4]
    require(
        clip.frames.shape[1:] == first.frames.shape[1:] and height == width and height % 2 == 0,
        f"frames must be squares of one even size, got {width} x {height}",
    )
    require(
        clip.state.positions.shape[1] == time > 1,
        f"clips need 2 frames and a state for each, got {time} and {clip.state.positions.shape[1]}",
    )


def _stored(clip: Clip, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MP4, positions and init of one clip, in the order of GROUPS."""
    state, discs = clip.state, 2 if clip.scenarios[row] == "collision" else 1
    positions = state.positions[row, :, :discs].double().numpy()
    speeds = state.velocities[row, 0, :discs, 0].abs()
    init = torch.cat([state.radii[row, :discs], speeds]).double().numpy()
    require(bool(np.isfinite(positions).all() and np.isfinite(init).all()), f"the state of clip {row} has no red disc")
    video = np.frombuffer(encode_mp4(clip.frames[row].numpy()), dtype=np.uint8)
    return video, positions if discs == 2 else positions[:, 0], init


def _write_chunk(file: h5py.File, count: int, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """The rows that end at clip `count` as the next chunk."""
    name = f"{(count - 1) // CHUNK_CLIPS:05d}"
    videos, positions, init = zip(*rows, strict=True)
    for group, values in zip(GROUPS[1:], (positions, init), strict=True):
        file[group].create_dataset(name, data=np.stack(values))
    dataset = file[GROUPS[0]].create_dataset(name, shape=(len(rows),), dtype=h5py.vlen_dtype(np.uint8))
    for row, video in enumerate(videos):
        dataset[row] = video


def simulate_phyworld(
    path: str | Path,
    scenario: str,
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    frames: int = 32,
    size: int = 256,
    batch: int = 16,
) -> int:
    """Simulate clips 0 to count - 1 of a scenario and write them in phyworld's layout, pictures as published."""
    require(count > 0, f"there is no clip to write to {path}")
    numbers = (range(start, min(start + batch, count)) for start in range(0, count, batch))
    form = dict(frames=frames, size=size, seed=seed, edge="phyworld")
    return write_phyworld(path, (simulate_world(scenario, split, part, **form) for part in numbers))
