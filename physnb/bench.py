"""Benchmarks: the simulator and the training step against what one would use instead, in the same run.

Machines are noisy, so the two sides take turns and each figure is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from physnb import linear
from physnb.config import ModelConfig, preset, require
from physnb.data import VOCABULARY, WORLD_SIZE, simulate
from physnb.memory import keep_freed_memory
from physnb.model import VideoDiT
from physnb.train import batch_loss, make_batch

PUBLISHED_SIZE, PUBLISHED_FRAMES = 256, 32


def seconds_of(work: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds that one call of `work` takes, the mean of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of several runs."""
    return dict(median=float(np.median(values)), low=float(min(values)), high=float(max(values)), runs=len(values))


def draw_as_published(state, clip: int) -> np.ndarray:
    """One clip drawn as phyworld's generator does: a float64 grid a frame, every pixel of it for every disc."""
    x, y = np.meshgrid(*(np.linspace(0, 1, PUBLISHED_SIZE) * WORLD_SIZE,) * 2)
    positions, radii = state.positions[clip].double().numpy(), state.radii[clip].double().numpy()
    frames = []
    for centres in positions:
        image = np.ones((PUBLISHED_SIZE, PUBLISHED_SIZE, 3))
        for (cx, cy), radius, colour in zip(centres, radii, ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)), strict=True):
            if np.isnan(radius):
                continue
            distance2 = (x - cx) ** 2 + (y - cy) ** 2
            alpha = np.clip((radius**2 - distance2) / (0.03 * radius**2), 0, 1)[..., None]
            image = image * (1 - alpha) + np.array(colour) * alpha
        frames.append((image * 255).astype(np.uint8)[::-1])
    return np.stack(frames)


def bench_simulator(clips: int = 16, rounds: int = 5, scenario: str = "collision") -> dict[str, Any]:
    """Clips per second of `simulate` against per-clip float64 drawing, both at 256 x 256 and 32 frames.

    `ratio` compares equal frames; `ratio_at_training_size` compares ours at 32 x 32 and 16 frames, what training asks
    for, with the published clip that would have to be resized. The published physics stepping is not counted.
    """
    require(clips > 0 and rounds > 0, f"clips and rounds must be positive, got {clips} and {rounds}")
    full = dict(frames=PUBLISHED_FRAMES, size=PUBLISHED_SIZE, edge="phyworld")
    small = dict(frames=16, size=32)
    state = simulate(scenario, "id", range(2), frames=PUBLISHED_FRAMES, size=8).state
    ours, ours_small, published = [], [], []
    for turn in range(rounds + 1):
        indices = range(turn * clips, (turn + 1) * clips)
        ours.append(clips / seconds_of(lambda i=indices: simulate(scenario, "id", i, **full)))
        ours_small.append(clips / seconds_of(lambda i=indices: simulate(scenario, "id", i, **small)))
        published.append(2 / seconds_of(lambda: [draw_as_published(state, clip) for clip in range(2)]))
    ours, ours_small, published = ours[1:], ours_small[1:], published[1:]  # the first turn warms up
    return dict(
        benchmark="sim",
        clips_per_second=spread(ours),
        clips_per_second_at_training_size=spread(ours_small),
        published_clips_per_second=spread(published),
        ratio=spread([a / b for a, b in zip(ours, published, strict=True)]),
        ratio_at_training_size=spread([a / b for a, b in zip(ours_small, published, strict=True)]),
    )


class WanBaseline(nn.Module):
    """diffusers' Wan transformer at a VideoDiT's depth, width and token count, called the same way."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY) + 1, config.width)
        self.wan = WanTransformer3DModel(
            patch_size=config.patch,
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=2 * config.channels + 1,
            out_channels=config.channels,
            text_dim=config.width,
            freq_dim=64,
            ffn_dim=int(config.width * config.mlp_ratio),
            num_layers=config.depth,
            rope_max_seq_len=64,
        )

    def forward(self, sample, sigma, start, given, caption):
        mask = given[:, None, :, None, None]
        mask_channel = mask.expand(-1, 1, -1, *sample.shape[3:])
        return self.wan(torch.cat([sample, start * mask, mask_channel], 1), 1000 * sigma, self.words(caption))


def operations(config: ModelConfig) -> tuple[float, float, float]:
    """Multiply-adds of one clip in its embedding, in one block, and in the output layer; matrix products alone."""
    patch_t, patch_h, patch_w = config.patch
    tokens = config.frames // patch_t * (config.size // patch_h) * (config.size // patch_w)
    patch = patch_t * patch_h * patch_w
    embed = tokens * config.width * patch * (2 * config.channels + 1)
    block = tokens * config.width * (config.width * (4 + 2 * config.mlp_ratio) + 2 * tokens)
    return embed, block, tokens * config.width * patch * config.channels


def matmul_flops_per_sample(config: ModelConfig) -> float:
    """Multiply-adds counted as two, of all matrix products of one training sample: forward, and twice that backward.

    Leaves out norms, activations, the optimiser and the simulator: time spent there lowers the fraction.
    """
    embed, block, head = operations(config)
    return 3 * 2 * (embed + config.depth * block + head)


def measured_matmul_rate(size: int = 1024, seconds: float = 0.4) -> float:
    """Floating-point operations per second of a square fp32 matrix product on this machine, right now."""
    layer, x = linear.Linear(size, size), torch.randn(size, size)
    count, start = 0, time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - start < seconds:
            layer(x)
            count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def bench_training(preset_name: str = "quick", rounds: int = 7, steps: int = 3) -> dict[str, Any]:
    """Training samples per second, data included, of VideoDiT against Wan; and the share of the fp32 matrix rate.

    All learn from the same batches with the same loss and optimiser. linear_ratio: against ourselves with linear layers
    by torch instead of `physnb.linear`. matmul_fraction: matrix operations of our step over its time, against a 1024 x
    1024 fp32 product timed in the same turn, by what our layers use.
    """
    require(rounds > 0 and steps > 0, f"rounds and steps must be positive, got {rounds} and {steps}")
    keep_freed_memory()
    config = preset(preset_name).train
    torch.manual_seed(0)
    models = {
        "ours": VideoDiT(**asdict(config.model), vocabulary=VOCABULARY),
        "by torch": VideoDiT(**asdict(config.model), vocabulary=VOCABULARY),
        "wan": WanBaseline(config.model),
    }
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for name, m in models.items()}

    def step(name: str, number: int) -> None:
        batch = make_batch(config, np.arange(number * config.batch, (number + 1) * config.batch))
        with linear.by_torch() if name == "by torch" else nullcontext():
            batch_loss(models[name], batch, config).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    rates: dict[str, list[float]] = {name: [] for name in models}
    matmul = []
    for turn in range(rounds + 1):
        for name in models:
            numbers = iter(range(turn * steps, (turn + 1) * steps))
            rates[name].append(config.batch / seconds_of(lambda n=name, i=numbers: step(n, next(i)), steps))
        matmul.append(measured_matmul_rate())
    ours, by_torch, wan = (rate[1:] for rate in rates.values())  # the first turn warms up
    matmul = matmul[1:]
    flops = matmul_flops_per_sample(config.model)
    return dict(
        benchmark="train",
        preset=preset_name,
        baseline="diffusers WanTransformer3DModel",
        samples_per_second=spread(ours),
        baseline_samples_per_second=spread(wan),
        ratio=spread([a / b for a, b in zip(ours, wan, strict=True)]),
        linear_ratio=spread([a / b for a, b in zip(ours, by_torch, strict=True)]),
        matmul_gflops=spread([rate / 1e9 for rate in matmul]),
        matmul_fraction=spread([r * flops / m for r, m in zip(ours, matmul, strict=True)]),
    )
