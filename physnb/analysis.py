"""Looking at single heads: what they attend to, how far they reach, and whether they follow a moving disc."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from physnb.config import HeadSet, require
from physnb.data import WORLD_SIZE, Clip
from physnb.families import check_heads
from physnb.flow import add_noise, sampling_levels
from physnb.generate import check_cases, conditions, initial_noise
from physnb.hooks import capture_attention
from physnb.model import VideoDiT
from physnb.statistics import bootstrap_mean, paired_difference

UNKNOWN = -1  # the place of a disc that no token holds, or that cannot be told from another disc


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
        sink_weight: share of a clip's attention that its most attended key token receives, at least 1 / tokens (uniform
        attention) and at most 1 (every query looks at one token); the mean of each clip's maximum over keys.
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
            "sink_weight": self.maps.mean(2).amax(-1).mean(-1),
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
    clean, given, caption = conditions(model, clips, frames_given)
    level = torch.full((len(clips),), sigma, device=model.device)
    noised = add_noise(clean, initial_noise(model, clips, seed).to(model.device), level)
    with torch.inference_mode(), capture_attention(model, heads) as maps:
        model(noised, level, clean, given, caption)
    return HeadAttention(tuple(heads), torch.stack([maps[h] for h in heads]).cpu(), model.grid, sigma)


def disc_token(model: VideoDiT, clips: Clip, clip: int, frame: int, disc: int = 0) -> tuple[int, int, int]:
    """Time, row and column of the token that holds a disc's true centre at a frame, clamped to the box."""
    require(clips.state is not None, "the clip has no true state; take it from a simulator")
    x, y = clips.state.positions[clip, frame, disc].tolist()
    _, rows, columns = model.grid
    row = int((1 - y / WORLD_SIZE) * rows)
    column = int(x / WORLD_SIZE * columns)
    return frame // model.patch[0], min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)


def disc_centres(clips: Clip, grid: tuple[int, int, int]) -> Float[Tensor, "batch disc time axis"]:
    """True centre of every disc in every token frame, the mean over its frames, in world units.

    NaN where the scenario has no such disc or the centre leaves the box in any of these frames.
    Raises ValueError for clips without true state or of a length that the grid's time axis does not divide.
    """
    require(clips.state is not None, "the clips have no true state; take them from a simulator")
    frames = clips.frames.shape[1]
    require(
        frames > 0 and frames % grid[0] == 0,
        f"{frames} frames do not divide into the {grid[0]} token frames of the attention maps",
    )
    positions = clips.state.positions
    require(positions.shape[1] == frames, f"the true state is of {positions.shape[1]} frames, the clips have {frames}")
    outside = ((positions < 0) | (positions > WORLD_SIZE)).any(-1, keepdim=True)
    seen = positions.masked_fill(outside, torch.nan)
    return seen.unflatten(1, (grid[0], -1)).mean(2).transpose(1, 2)


def places_at(centres: Float[Tensor, "*any axis"], grid: tuple[int, int, int]) -> Int[Tensor, "*any"]:
    """Row * columns + column of the token that holds each centre; UNKNOWN where it is NaN or outside of the box."""
    _, rows, columns = grid
    inside = ((centres >= 0) & (centres <= WORLD_SIZE)).all(-1)
    x, y = torch.where(inside[..., None], centres, 0.0).unbind(-1)
    column = (x / WORLD_SIZE * columns).long().clamp(max=columns - 1)  # the far wall belongs to the last token
    row = ((1 - y / WORLD_SIZE) * rows).long().clamp(max=rows - 1)
    return torch.where(inside, row * columns + column, UNKNOWN)


@dataclass(frozen=True)
class Following:
    """How much of its look into the past a head gives to a disc's own path, from `object_following`; NaN: not judged.

    follows: share of attention on the path; chance is 1 / (tokens of a frame). control: the same share, from the same
    query to the same keys, in the other clips, whose discs go other ways; a head that ignores the clip's content has
    control = follows exactly. above_other_way: follows minus that share in those other clips alone whose disc is at the
    query too but came by another way; a head that looks near where it sees a disc has 0.
    moments: pairs of a disc's token and an earlier token frame that were judged. moments_visible: those in which the
    disc is in the box both times, the others being moments at rest. other_ways: pairs of a disc's token and another
    clip behind above_other_way.
    """

    heads: HeadSet
    follows: Float[Tensor, "head clip"]
    control: Float[Tensor, "head clip"]
    above_other_way: Float[Tensor, "head clip"]
    moments: Int[Tensor, " clip"]
    moments_visible: Int[Tensor, " clip"]
    other_ways: Int[Tensor, " clip"]

    def margin(self) -> Float[Tensor, " head"]:
        """How far a head follows the disc beyond the better of both controls, mean over clips; at most 1."""
        return torch.minimum((self.follows - self.control).nanmean(1), self.above_other_way.nanmean(1))

    def to_rows(self) -> list[dict[str, Any]]:
        """One row a head: mean shares, and what is above the controls, each with its 95 % interval over clips."""
        rows = []
        for number, head in enumerate(self.heads):
            estimates = {
                "follows": bootstrap_mean(self.follows[number]),
                "control": bootstrap_mean(self.control[number]),
                "above_control": paired_difference(self.follows[number], self.control[number]),
                "above_other_way": bootstrap_mean(self.above_other_way[number]),
            }
            rows.append(dict(head=str(head)) | {name: estimate.to_dict() for name, estimate in estimates.items()})
        return rows


def path_share(
    looked: Float[Tensor, "*map time place"], path: Int[Tensor, "time"], judged: Bool[Tensor, "*map time"]
) -> Float[Tensor, "*map"]:
    """Share of the attention to the judged token frames that goes to the path's places; NaN where there is none."""
    found = looked[..., torch.arange(len(path)), path.clamp(min=0)]
    return (found * judged).sum(-1) / (looked.sum(-1) * judged).sum(-1)


def object_following(attention: HeadAttention, clips: Clip) -> Following:
    """Share of attention that a disc's token gives to the tokens which held the same disc at earlier token frames.

    For the token at place p_t (that of the disc's centre) and token frame t, with A its attention,
    follows = sum_s A(s, p_s) / sum_s sum_p A(s, p) over the judged moments s < t, averaged over t and discs. control
    has the A of each other clip in turn. A moment is judged when p_s is known and not p_t: a token's look at its own
    place is not following, and a disc at rest has no path. above_other_way compares with clips whose disc of the same
    number is at p_t too, over those judged moments at which it was known to be elsewhere than p_s.
    Unknown is a place outside of the box, and a token that holds both discs, as query and as key.

    Raises ValueError for clips other than those of the maps, fewer than two clips, or clips without true state.
    Leaves out what the disc covers besides the token of its centre, and what the values carry.
    """
    count, (time, rows, columns) = attention.maps.shape[1], attention.grid
    require(count == len(clips), f"the attention maps are of {count} clips, but {len(clips)} clips are given")
    require(count > 1, "following is judged against the attention in other clips: give at least two clips")
    places = places_at(disc_centres(clips, attention.grid), attention.grid)  # [clip, disc, time]
    shared = (places[:, :1] == places[:, 1:]) & (places[:, :1] != UNKNOWN)
    places = places.masked_fill(shared, UNKNOWN)
    maps = attention.maps.unflatten(-1, (time, rows * columns))  # [head, clip, query, time, place]

    shares = torch.full((3, len(attention.heads), count, places.shape[1], time), torch.nan)
    moments, visible, other_ways = torch.zeros(3, count, dtype=torch.long)
    for clip, disc, now in itertools.product(range(count), range(places.shape[1]), range(1, time)):
        here, path = places[clip, disc, now], places[clip, disc, :now]
        if here == UNKNOWN:
            continue
        judged = (path != UNKNOWN) & (path != here)
        looked = maps[:, :, now * rows * columns + here, :now]  # [head, clip, moment, place]
        others = torch.arange(count) != clip
        share = path_share(looked, path, judged)  # [head, clip]
        met = others & (places[:, disc, now] == here)
        apart = judged & (places[met, disc, :now] != path) & (places[met, disc, :now] != UNKNOWN)  # [met, moment]
        own, other = (path_share(side, path, apart) for side in (looked[:, clip, None], looked[:, met]))
        shares[0, :, clip, disc, now] = share[:, clip]
        shares[1, :, clip, disc, now] = share[:, others].nanmean(-1)
        shares[2, :, clip, disc, now] = (own - other).nanmean(-1)
        moments[clip] += judged.sum()
        visible[clip] += (path != UNKNOWN).sum()
        other_ways[clip] += apart.any(-1).sum()
    shares[:2] = shares[:2].masked_fill(shares[:2].isnan().any(0), torch.nan)  # both or neither, so that they pair
    follows, control, above_other_way = shares.flatten(3).nanmean(-1)
    return Following(attention.heads, follows, control, above_other_way, moments, visible, other_ways)


def attention_by_level(
    model: VideoDiT,
    clips: Clip,
    heads: HeadSet,
    *,
    levels: Sequence[float] | None = None,
    frames_given: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Table rows, one a noise level and head: sigma, head, its attention statistics and how it follows the disc.

    levels: noise levels in (0, 1]; None: those that 5 Euler steps of sampling visit. Every level has the same noise.
    Raises ValueError as `attention_maps` and `object_following` do, and for no levels.
    Leaves out that in sampling the model sees its own earlier predictions: here it is the true clip that is noised.
    """
    if levels is None:
        levels = sampling_levels("euler", 5, model.config.noise_shift)
    require(len(levels) > 0, "there is no noise level to look at")
    disc_centres(clips, model.grid)  # refuses clips without truth before any forward
    rows = []
    for sigma in levels:
        attention = attention_maps(model, clips, heads, sigma=sigma, frames_given=frames_given, seed=seed)
        statistics = {name: values.tolist() for name, values in attention.statistics().items()}
        for number, following in enumerate(object_following(attention, clips).to_rows()):
            row = dict(sigma=sigma, head=following.pop("head"))
            rows.append(row | {name: values[number] for name, values in statistics.items()} | following)
    return rows
