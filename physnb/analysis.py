"""Looking at single heads: what they attend to in space and time, and how far they reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import HeadSet, require
from physnb.data import WORLD_SIZE, Clip
from physnb.families import check_heads
from physnb.flow import add_noise
from physnb.generate import check_cases, conditions, initial_noise
from physnb.hooks import capture_attention
from physnb.model import VideoDiT


@dataclass(frozen=True)
class HeadAttention:
    """Attention maps of some heads on some clips at one noise level.

    maps[h, b, q, k] is the weight that query token q of clip b gives to key token k in head heads[h]; each row sums
    to 1. grid: tokens along time, height and width, flattened in this order.
    """

    heads: HeadSet
    maps: Float[Tensor, "head batch query key"]
    grid: tuple[int, int, int]
    sigma: float

    def places(self) -> Float[Tensor, "token 3"]:
        """Time, row and column of every token."""
        axes = (torch.arange(n) for n in self.grid)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).float()

    def statistics(self) -> dict[str, Float[Tensor, " head"]]:
        """Averages over clips and queries, one number a head.

        entropy: nats, at most log(tokens). reach_time, reach_space: mean distance to what is looked at, in tokens.
        self_weight: attention a token gives to itself. past_weight: attention given to earlier token frames.
        Leaves out what the values carry: a head can look far and pass nothing on.
        """
        places = self.places()
        apart = (places[:, None] - places[None]).abs()
        weights = self.maps.mean(1)  # [head, query, key]
        entropy = -(self.maps * self.maps.clamp(min=1e-12).log()).sum(-1).mean((1, 2))
        space = apart[..., 1:].norm(dim=-1)
        earlier = places[None, :, 0] < places[:, None, 0]
        return {
            "entropy": entropy,
            "reach_time": (weights * apart[..., 0]).sum(-1).mean(-1),
            "reach_space": (weights * space).sum(-1).mean(-1),
            "self_weight": weights.diagonal(dim1=-2, dim2=-1).mean(-1),
            "past_weight": (weights * earlier).sum(-1).mean(-1),
        }

    def from_query(self, head: int, clip: int, query: tuple[int, int, int]) -> Float[Tensor, "time height width"]:
        """Where the token at (time, row, column) looks, on the token grid."""
        _, height, width = self.grid
        token = (query[0] * height + query[1]) * width + query[2]
        return self.maps[head, clip, token].reshape(self.grid)


def attention_maps(
    model: VideoDiT, clips: Clip, heads: HeadSet, *, sigma: float = 0.9, frames_given: int = 3, seed: int = 0
) -> HeadAttention:
    """Attention of `heads` while the model cleans `clips` noised to level `sigma`.

    Raises ValueError for a head that the model lacks or a sigma outside (0, 1].
    """
    check_cases(model, clips, frames_given)
    check_heads(model, heads)
    require(0 < sigma <= 1, f"sigma must be in (0, 1], got {sigma}")
    clean, given, caption_ids = conditions(model, clips, frames_given, clips.captions)
    level = torch.full((len(clips),), sigma, device=model.device)
    noised = add_noise(clean, initial_noise(model, clips, seed).to(model.device), level)
    with torch.inference_mode(), capture_attention(model, heads) as maps:
        model(noised, level, clean, given, caption_ids)
    return HeadAttention(tuple(heads), torch.stack([maps[h] for h in heads]).cpu(), model.grid, sigma)


def disc_token(model: VideoDiT, clips: Clip, clip: int, frame: int, disc: int = 0) -> tuple[int, int, int]:
    """Time, row and column of the token that holds a disc's true centre at a frame, clamped to the box."""
    require(clips.state is not None, "the clip has no true state; take it from a simulator")
    x, y = clips.state.positions[clip, frame, disc].tolist()
    _, rows, columns = model.grid
    row = int((1 - y / WORLD_SIZE) * rows)
    column = int(x / WORLD_SIZE * columns)
    return frame // model.patch[0], min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
