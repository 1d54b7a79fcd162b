"""Random numbers that are functions of (seed, stream, index) and of nothing else."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014), elementwise on uint64; wraps around by design."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash_draws(seed: int, stream: str, indices: np.ndarray) -> np.ndarray:
    """Independent uint64 numbers, one an index: the same whatever else is in the batch."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64([seed]) * _GOLDEN + np.uint64(zlib.crc32(stream.encode())))
        return _mix(_mix(np.asarray(indices, dtype=np.uint64) * _GOLDEN + key) + key)


def uniform_draws(seed: int, stream: str, indices: np.ndarray, low=0.0, high=1.0) -> np.ndarray:
    """Numbers uniform in [low, high), one an index; `low` and `high` may be arrays."""
    unit = (hash_draws(seed, stream, indices) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return low + (np.asarray(high) - low) * unit


def normal_noise(seed: int, stream: str, indices: np.ndarray, shape: tuple[int, ...]) -> Float[Tensor, "batch ..."]:
    """Standard normal noise [batch, *shape], a generator a row, drawn on the CPU: the same on any device."""
    generator, out = torch.Generator(), torch.empty(len(indices), *shape)
    for row, draw in zip(out, hash_draws(seed, stream, indices), strict=True):
        torch.randn(shape, generator=generator.manual_seed(int(draw >> np.uint64(1))), out=row)
    return out
