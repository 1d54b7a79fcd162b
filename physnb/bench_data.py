"""Time every source of clips against what training consumes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from physnb.bench import seconds_of, spread
from physnb.config import FLUIDS, SIMULATED, TrainConfig, preset, require
from physnb.data import Mixture, Source, simulate
from physnb.data.catalogue import open_source
from physnb.data.phyworld import encode_mp4, simulate_phyworld
from physnb.memory import keep_freed_memory
from physnb.train import TrainState, batch_loss, make_batch

PRESETS_TIMED = ("quick", "full")
CLIPS = 64  # asked of a source at once, as training does
VIDEO_SIZE, VIDEO_FRAMES, VIDEOS = 256, 96, 8  # of the files that are decoded
AIM, AIM_SIMULATED = 2.0, 10.0  # times what training consumes


def consumption(config: TrainConfig, steps: int = 3) -> float:
    """Clips per second that training takes in here once they are made: forward, backward, both optimisers."""
    state, batch = TrainState(config), make_batch(config, np.arange(config.batch))

    def step() -> None:
        batch_loss(state.model, batch, config).backward()
        for optimizer in state.optimizers:
            optimizer.step()
        state.model.zero_grad()

    seconds_of(step)  # the first step warms up
    return config.batch / seconds_of(step, steps)


def write_videos(folder: Path) -> None:
    """Real mp4 files (h264) for the decoder: discs over a noisy ground, which costs it as much as a photograph."""
    folder.mkdir()
    ground = np.random.default_rng(0).normal(30, 12, (VIDEO_SIZE, VIDEO_SIZE, 3))
    for number in range(VIDEOS):
        clip = simulate("parabola", "train", [number], frames=32, size=VIDEO_SIZE).frames[0].numpy()
        frames = np.clip(np.tile(clip, (VIDEO_FRAMES // 32, 1, 1, 1)) * 0.8 + ground, 0, 255).astype(np.uint8)
        (folder / f"{number}.mp4").write_bytes(encode_mp4(frames))


def reading_rate(source: Source | Mixture, rounds: int) -> dict[str, float]:
    """Clips per second of a source or a mixture, CLIPS at a time, after one turn that warms up."""
    rates = []
    for turn in range(rounds + 1):
        numbers = np.arange(turn * CLIPS, (turn + 1) * CLIPS)
        if isinstance(source, Mixture):
            seconds = seconds_of(lambda n=numbers: source.examples(n))
        else:
            numbers = numbers % (source.count or len(numbers) * (rounds + 1))
            seconds = seconds_of(lambda n=numbers: source.clips(n))
        rates.append(CLIPS / seconds)
    return spread(rates[1:])


def bench_data(rounds: int = 5) -> dict[str, Any]:
    """Clips per second of every source at 16 frames of 32 x 32, on one thread, and how often that feeds training.

    Simulators draw anew; fluids and videos are read from caches that they fill once, at `filling` clips per second; a
    phyworld file is decoded from 256 x 256 every time. ratio_quick, ratio_full: over what a training of the preset
    takes in here, on all threads.
    """
    require(rounds > 0, f"rounds must be positive, got {rounds}")
    keep_freed_memory()
    model, threads = preset("quick").train.model, torch.get_num_threads()
    shape = dict(frames=model.frames, size=model.size)
    consumed = {name: spread([consumption(preset(name).train) for _ in range(rounds)]) for name in PRESETS_TIMED}
    with tempfile.TemporaryDirectory(prefix="physnb-") as temporary:
        folder, filling = Path(temporary), {}
        write_videos(folder / "videos")
        simulate_phyworld(folder / "uniform.hdf5", "uniform", CLIPS, frames=32)
        sources: dict[str, Source | Mixture] = {name: open_source(name, **shape) for name in (*SIMULATED, "templates")}
        sources["all scenarios mixed"] = Mixture(tuple(sources.values()), (1.0,) * len(sources))
        for name in FLUIDS:
            sources[name] = open_source(name, **shape, cache=str(folder / name), count=2 * 16)
            for group in range(2):  # the first compiles the solver
                numbers = np.arange(16 * group, 16 * group + 16)
                filling[name] = 16 / seconds_of(lambda s=sources[name], n=numbers: s.clips(n))
        sources["phyworld file"] = open_source(f"phyworld:{folder / 'uniform.hdf5'}", **shape)
        opened: list[Source] = []
        seconds = seconds_of(lambda: opened.append(open_source(f"videos:{folder / 'videos'}", **shape)))
        sources["videos"], filling["videos"] = opened[0], opened[0].count / seconds
        torch.set_num_threads(1)
        try:
            rates = {name: reading_rate(source, rounds) for name, source in sources.items()}
        finally:
            torch.set_num_threads(threads)
    rows = []
    for name, rate in rates.items():
        ratios = {f"ratio_{p}": rate["median"] / consumed[p]["median"] for p in PRESETS_TIMED}
        met = min(ratios.values()) >= (AIM_SIMULATED if name in SIMULATED else AIM)
        rows.append(
            dict(source=name, clips_per_second=rate["median"], filling=filling.get(name)) | ratios | dict(met=met)
        )
    return dict(benchmark="data", consumed_clips_per_second=consumed, sources=rows)
