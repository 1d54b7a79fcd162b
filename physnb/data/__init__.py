"""Sources of Clips."""

from physnb.data.captions import CAPTIONS, VOCABULARY, encode_captions
from physnb.data.clips import DISC_COLOURS, FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.random import hash_draws, normal_noise, uniform_draws
from physnb.data.takes import second_take
from physnb.data.worlds import render, simulate, simulate_mixture

__all__ = [
    "CAPTIONS", "DISC_COLOURS", "FRAME_STEP_S", "VOCABULARY", "WORLD_SIZE", "Clip", "DiscState", "encode_captions",
    "hash_draws", "normal_noise", "render", "second_take", "simulate", "simulate_mixture", "uniform_draws",
]  # fmt: skip
