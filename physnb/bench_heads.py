"""What head guidance costs: one guided step, ours against separate passes and against explicit attention maps.

Ours makes C and P in one batch that forks at the first broken layer, and builds no map. `predicted` is the ratio of the
matrix operations of both sides; norms, activations and memory traffic are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from physnb.bench import operations, seconds_of, spread
from physnb.config import Guidance, HeadId, ModelConfig, Perturbation, require
from physnb.flow import velocity_from_clean
from physnb.guidance import combine_predictions, guided_velocity
from physnb.hooks import perturb_rows
from physnb.memory import keep_freed_memory, peak_bytes
from physnb.model import SelfAttention, VideoDiT, rotate

WEIGHT = 2.0
SMALL = ModelConfig(frames=16, size=64, patch=(2, 8, 8), width=192, depth=8, heads=6)  # 512 tokens: seconds on a CPU
DIT_B = ModelConfig(frames=32, size=128, patch=(2, 8, 8), width=768, depth=12, heads=12)  # 4,096 tokens, for a GPU


class ExplicitProcessor:
    """A SelfAttention as published perturbations have it: the map of every head is built, some become the identity."""

    def __init__(self, heads: list[int]):
        self.heads = heads

    def __call__(self, attn: SelfAttention, x: Tensor, rotary: Tensor) -> Tensor:
        query_key = rotate(attn.query_key(x), rotary).unflatten(-1, (2, attn.heads, -1))
        q, k = query_key.transpose(1, 3).unbind(2)
        v = attn.value(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        maps = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)  # [batch, head, token, token]
        maps[:, self.heads] = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
        return attn.out((maps @ v).transpose(1, 2).flatten(2))


@contextmanager
def explicit_maps(model: VideoDiT, perturbation: Perturbation):
    """Inside the block, the layers of `perturbation` run with explicit maps, broken to strength 1."""
    modules = {layer: model.blocks[layer].attn for layer in dict.fromkeys(h.layer for h in perturbation.heads)}
    before = {layer: module.processor for layer, module in modules.items()}
    try:
        for layer, module in modules.items():
            module.processor = ExplicitProcessor([h.head for h in perturbation.heads if h.layer == layer])
        yield
    finally:
        for layer, module in modules.items():
            module.processor = before[layer]


def predicted_ratio(config: ModelConfig, first: int) -> float:
    """Operations of two separate passes over those of one that forks before block `first`."""
    embed, block, head = operations(config)
    ours = embed + first * block + 2 * ((config.depth - first) * block + head)
    return 2 * (embed + config.depth * block + head) / ours


def bench_heads(
    rounds: int = 5, config: ModelConfig | None = None, batches: tuple[int, ...] = (1, 2, 4)
) -> dict[str, Any]:
    """One row for each baseline, depth of the first broken layer and batch size.

    measured: time of the baseline's guided step over ours, the median of neighbouring turns; predicted: the ratio of
    operations; peak_memory_mb: ours, the baseline's, and that of one plain prediction without guidance.
    Runs in bfloat16 at DiT-B's size on a GPU, in float32 and smaller on a CPU.
    """
    require(rounds > 0, f"rounds must be positive, got {rounds}")
    keep_freed_memory()
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    config = config or (DIT_B if on_gpu else SMALL)
    torch.manual_seed(0)
    shape = asdict(config)
    model = VideoDiT(**shape).to(device, dtype).eval()
    rows = []
    for batch in batches:
        for first in sorted({0, config.depth // 3, 2 * config.depth // 3, config.depth - 1}):
            work = guided_steps(model, Perturbation((HeadId(first, 0),)), batch)
            if on_gpu:
                work = {name: synchronised(step) for name, step in work.items()}
            times = {name: [] for name in work}
            for _ in range(rounds + 1):
                for name, step in work.items():
                    times[name].append(seconds_of(step))
            memory = {name: peak_bytes(step, device) / 1e6 for name, step in work.items()}
            for baseline in ("separate passes", "explicit maps"):
                pairs = zip(times[baseline][1:], times["ours"][1:], strict=True)  # the first turn warms up
                rows.append(
                    dict(
                        baseline=baseline,
                        first_layer=first,
                        depth=config.depth,
                        batch=batch,
                        measured=spread([other / ours for other, ours in pairs]),
                        predicted=predicted_ratio(config, first),
                        milliseconds=1e3 * float(np.median(times["ours"][1:])),
                        peak_memory_mb=memory["ours"],
                        baseline_peak_memory_mb=memory[baseline],
                        plain_peak_memory_mb=memory["plain"],
                    )
                )
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    return dict(benchmark="heads", device=name, dtype=str(dtype).removeprefix("torch."), model=shape, rows=rows)


def synchronised(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step`, ended only when the GPU has done its work."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def guided_steps(model: VideoDiT, perturbation: Perturbation, batch: int) -> dict[str, Callable[[], Tensor]]:
    """The ways of making one guided velocity of `batch` clips, and the plain one, as functions without arguments."""
    like = dict(device=model.device, dtype=model.dtype)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, *model.clip_shape, generator=generator).to(**like)
    inputs = dict(
        sample=sample,
        sigma=torch.full((batch,), 0.8, **like),
        start=sample,
        given=torch.zeros(batch, model.config.frames, **like),
        caption=torch.zeros(batch, 1, dtype=torch.long, device=model.device),
    )
    guidance = [Guidance(weak=((WEIGHT, perturbation),))] * batch
    fork = guided_velocity(model, inputs["start"], inputs["given"], inputs["caption"], guidance)
    weights = torch.full((batch,), WEIGHT)

    def two_passes(broken: Callable) -> Tensor:
        with torch.inference_mode():
            conditional = model(**inputs).sample
            with broken(model, perturbation):
                weak = model(**inputs).sample
            return velocity_from_clean(sample, combine_predictions(conditional, [weak], [weights]), inputs["sigma"])

    def plain() -> Tensor:
        with torch.inference_mode():
            return velocity_from_clean(sample, model(**inputs).sample, inputs["sigma"])

    return {
        "ours": lambda: fork(sample, inputs["sigma"], 0.0),
        "separate passes": lambda: two_passes(perturb_rows),
        "explicit maps": lambda: two_passes(explicit_maps),
        "plain": plain,
    }
