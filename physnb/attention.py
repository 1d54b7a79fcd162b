"""Broken attention: what a head puts out when its map is replaced, without ever building a map.

One head has queries Q, keys K, values V, the map A = softmax(Q K^T scale + mask) and the output O = A V. Attention is
linear in A, so a head broken to strength u puts out exactly lerp(O, O', u), with O' that of the map in A's place:

    identity     I                     O' = V                            PAG (Ahn et al. 2024); u < 1 is SoftPAG
    uniform      equal on allowed keys attention of the query 0
    mean_query   softmax(mean(Q) K^T)  attention of the mean query       SEG at infinite sigma (Hong 2024)
    blur         softmax(blur(Q) K^T)  attention of blurred queries      SEG; Gaussian on the time x height x width grid
    temperature  softmax(Q K^T / tau)  attention of Q / tau              an additive mask is left as it is
    zero         0                     O' = 0                            ablation

Everything acts on what the attention sees: queries and keys after their norms and rotary positions, so a head never
leaks into another one.

axis "space" or "time" breaks attention along that axis and keeps it along the other: a query broken in space attends to
its own place at every time, one broken in time to its own frame (identity); it is then averaged over that axis
(uniform), or its query is (mean_query, blur).

scope says what happens where text or history tokens share the attention with the video (guidance of joint models):
"all" breaks every row (a blur: every row with a place on the grid), "video_rows" the rows of video tokens alone,
"video_block" keeps what video tokens read from the others and breaks only what they read from each other (identity
only; the form of SD3-PAG).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from physnb.config import Perturbation, require

HeadTensor = Float[Tensor, "row head token channel"]


@dataclass(frozen=True)
class TokenLayout:
    """Where the video lies in a token sequence: `before` other tokens, time x height x width, then other tokens."""

    grid: tuple[int, int, int]
    before: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    @property
    def video(self) -> slice:
        return slice(self.before, self.before + self.count)


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled dot product attention: what went in, and how the video lies in the queries' sequence.

    Keys may outnumber queries (text first); the last ones are then the queries' own. mask broadcasts to
    [row, head, query, key]: booleans allow, numbers add. clip: which one of the batch, where each has its own calls.
    """

    query: HeadTensor
    key: HeadTensor
    value: HeadTensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    layout: TokenLayout | None = None
    clip: int | None = None

    def __post_init__(self) -> None:
        groups = self.query.shape[1] // self.key.shape[1]
        if groups > 1:  # grouped-query attention: heads share keys and values
            object.__setattr__(self, "key", self.key.repeat_interleave(groups, 1))
            object.__setattr__(self, "value", self.value.repeat_interleave(groups, 1))
        if self.mask is not None:
            mask = self.mask
            if mask.ndim == 2 and len(mask) == len(self.query) != self.query.shape[2]:
                mask = mask[:, None, None]  # [row, key]
            object.__setattr__(self, "mask", mask[(None,) * (4 - mask.ndim)])

    def attend(self, **changes) -> HeadTensor:
        """The output of attention, with some inputs changed."""
        call = replace(self, **changes) if changes else self
        return F.scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=call.mask, is_causal=call.causal, scale=call.scale
        )

    def attention_map(self, head: int) -> Float[Tensor, "row query key"]:
        """The map A of one head, explicitly: to look at, not to compute with."""
        scale = self.scale if self.scale is not None else self.query.shape[-1] ** -0.5
        logits = self.query[:, head] @ self.key[:, head].transpose(1, 2) * scale
        if self.mask is not None:
            logits = logits + _additive(self)[:, min(head, self.mask.shape[1] - 1)]
        if self.causal:
            logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -math.inf)
        return logits.softmax(-1)

    def select(self, rows: Tensor, heads: Tensor) -> AttentionCall:
        """The same call for some rows and heads alone."""
        mask = self.mask
        if mask is not None:
            mask = mask[rows] if len(mask) > 1 else mask
            mask = mask[:, heads] if mask.shape[1] > 1 else mask
        query, key, value = (x[rows][:, heads] for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=mask)

    @property
    def own_value(self) -> HeadTensor:
        """The value of each query's own token."""
        return self.value[:, :, -self.query.shape[2] :]

    def video_layout(self) -> TokenLayout:
        require(self.layout is not None, "this perturbation needs the token grid; the model's family does not tell it")
        return self.layout


def broken_output(call: AttentionCall, form: Perturbation, output: HeadTensor) -> HeadTensor:
    """O' of every row and head of a call whose normal output is `output`; heads and strength of `form` are not read.

    Raises ValueError where the form does not fit the call: an axis or a blur without a token grid, scope "all" with an
    axis among other tokens, a causal attention along one axis or with scope "video_block".
    """
    require(
        form.axis == "all" or form.scope != "all" or call.video_layout().count == call.key.shape[2],
        f"axis {form.axis!r} among other tokens needs scope 'video_rows': those have no place on the grid",
    )
    if form.scope == "video_block" and call.video_layout().count < call.key.shape[2]:
        broken = _video_block_identity(call, form, output)
    elif form.axis != "all" and form.kind in ("identity", "uniform"):
        broken = _along_axis(call, form, output)
    elif form.kind == "identity":
        broken = call.own_value
    elif form.kind == "zero":
        broken = torch.zeros_like(output)
    else:
        broken = call.attend(query=broken_query(call, form))
    if form.scope == "video_rows" and call.video_layout().count < call.query.shape[2]:
        layout = call.video_layout()
        broken = _with_video_rows(output, layout, broken[:, :, layout.video])
    return broken


def broken_query(call: AttentionCall, form: Perturbation) -> HeadTensor:
    """The queries whose ordinary attention is that of the broken map."""
    query = call.query
    if form.kind == "uniform":
        return torch.zeros_like(query)
    if form.kind == "temperature":
        return query / form.temperature
    if form.kind == "mean_query" and form.axis == "all" and form.scope == "all":
        return query.mean(2, keepdim=True).expand_as(query)
    layout = call.video_layout()
    video = query[:, :, layout.video].unflatten(2, layout.grid)
    widths = form.sigma if form.kind == "blur" else (math.inf,) * 3
    blurred = dict(all=(0, 1, 2), space=(1, 2), time=(0,))[form.axis]
    for axis in blurred:
        matrix = blur_matrix(layout.grid[axis], widths[axis]).to(video)
        video = torch.einsum(("ta,nhayxc->nhtyxc", "ya,nhtaxc->nhtyxc", "xa,nhtyac->nhtyxc")[axis], matrix, video)
    return _with_video_rows(query, layout, video.flatten(2, 4))


def blur_matrix(side: int, sigma: float) -> Float[Tensor, "side side"]:
    """Gaussian blur along one axis as a matrix, borders reflected; sigma 0 is the identity, infinite sigma the mean.

    The kernel is that of the official SEG code: ceil(6 sigma) + 1 taps, made odd, no wider than the side (an even side
    plus 1).
    """
    if math.isinf(sigma) or sigma > 9999:
        return torch.full((side, side), 1 / side)
    if sigma == 0 or side == 1:
        return torch.eye(side)
    taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    reach = min(taps, side if side % 2 else side + 1) // 2
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(offsets.float() ** 2) / (2 * sigma**2))
    places = torch.arange(side)[:, None] + offsets  # [side, tap]
    places = torch.where(places < 0, -places, places)
    places = torch.where(places >= side, 2 * (side - 1) - places, places)
    return torch.zeros(side, side).scatter_add(1, places, (weights / weights.sum()).expand_as(places).contiguous())


def _with_video_rows(whole: HeadTensor, layout: TokenLayout, video: HeadTensor) -> HeadTensor:
    """`whole` with the rows of video tokens replaced."""
    if layout.count == whole.shape[2]:
        return video
    rows = layout.video
    return torch.cat([whole[:, :, : rows.start], video, whole[:, :, rows.stop :]], 2)


def _video_keys(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Indices of the keys that are video tokens, and of the others."""
    layout = call.video_layout()
    first = layout.before + call.key.shape[2] - call.query.shape[2]
    keys = torch.arange(call.key.shape[2], device=call.key.device)
    inside = (keys >= first) & (keys < first + layout.count)
    return keys[inside], keys[~inside]


def _group(x: Tensor, layout: TokenLayout, axis: str) -> Tensor:
    """[row, head, token, channel] -> [row, head, group, token, channel]: a group's tokens still see each other."""
    frames = x.unflatten(2, (layout.grid[0], -1))  # [row, head, time, place, channel]
    return frames.transpose(2, 3) if axis == "space" else frames


def _grouped_mask(call: AttentionCall, keys: Tensor, axis: str) -> Tensor | None:
    """The mask between the tokens of a group, [row, head, group, query of the group, key of the group]."""
    if call.mask is None:
        return None
    layout, mask = call.video_layout(), _additive(call)[..., keys]
    if mask.shape[2] == 1:
        return _group(mask.transpose(2, 3), layout, axis).transpose(3, 4)
    sides = (layout.grid[0], layout.count // layout.grid[0])
    mask = mask[:, :, layout.video].unflatten(3, sides).unflatten(2, sides)  # [row, head, time, place, time, place]
    mask = mask.diagonal(dim1=3, dim2=5) if axis == "space" else mask.diagonal(dim1=2, dim2=4)
    return mask.movedim(-1, 2)


def _additive(call: AttentionCall) -> Tensor:
    """The mask as numbers to add for every key: 0 where a boolean one allows, else -inf."""
    mask = call.mask.expand(-1, -1, -1, call.key.shape[2])
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=call.query.dtype, device=mask.device).masked_fill(~mask, -math.inf)


def _attend_in_groups(call: AttentionCall, axis: str, others: Tensor | None = None) -> HeadTensor:
    """Attention of the video rows along the axis that is kept; `others` are keys that every row sees besides."""
    require(not call.causal, "a causal attention cannot be restricted to one axis; use axis 'all'")
    layout = call.video_layout()
    video, _ = _video_keys(call)
    query = _group(call.query[:, :, layout.video], layout, axis)
    key, value = (_group(x[:, :, video], layout, axis) for x in (call.key, call.value))
    mask = _grouped_mask(call, video, axis)
    groups = query.shape[2]
    if others is not None:
        shared = (x[:, :, others, None].transpose(2, 3).expand(-1, -1, groups, -1, -1) for x in (call.key, call.value))
        key, value = (torch.cat(pair, 3) for pair in zip((key, value), shared, strict=True))
        if mask is not None:
            rest = _additive(call)[..., others]
            rest = rest.expand(-1, -1, layout.count, -1) if rest.shape[2] == 1 else rest[:, :, layout.video]
            rest = _group(rest, layout, axis)
            mask = torch.cat([mask.expand(*mask.shape[:3], rest.shape[3], -1), rest], 4)
    if mask is not None:
        mask = mask.expand(-1, query.shape[1], groups, -1, -1).flatten(1, 2)
    heads = (x.flatten(1, 2) for x in (query, key, value))  # each group of each head is a head of its own
    output = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=call.scale)
    output = output.unflatten(1, (-1, groups))
    return (output.transpose(2, 3) if axis == "space" else output).flatten(2, 3)


def _along_axis(call: AttentionCall, form: Perturbation, output: HeadTensor) -> HeadTensor:
    """Identity or uniform along one axis of the video, attention along the other."""
    layout = call.video_layout()
    video = _attend_in_groups(call, form.axis)
    if form.kind == "uniform":
        frames = video.unflatten(2, (layout.grid[0], -1))
        video = frames.mean(3 if form.axis == "space" else 2, keepdim=True).expand_as(frames).flatten(2, 3)
    return _with_video_rows(output, layout, video)


def _video_block_identity(call: AttentionCall, form: Perturbation, output: HeadTensor) -> HeadTensor:
    """Video rows that read themselves (or along the kept axis) and every other token: one softmax over both."""
    layout = call.video_layout()
    video, others = _video_keys(call)
    if form.axis != "all":
        return _with_video_rows(output, layout, _attend_in_groups(call, form.axis, others))
    require(not call.causal, "a causal attention cannot be broken with scope 'video_block'; use 'video_rows'")
    scale = call.scale if call.scale is not None else call.query.shape[-1] ** -0.5
    query, key, own_value = call.query[:, :, layout.video].float(), call.key.float(), call.value[:, :, video]
    own = (query * key[:, :, video]).sum(-1, keepdim=True) * scale  # [row, head, video token, 1]
    rest = query @ key[:, :, others].transpose(2, 3) * scale  # [row, head, video token, other token]
    if call.mask is not None:
        mask = _additive(call)
        if mask.shape[2] == 1:
            own, rest = own + mask[..., video].transpose(2, 3), rest + mask[..., others]
        else:
            mask = mask[:, :, layout.video]
            own = own + mask[..., video].diagonal(dim1=2, dim2=3).unsqueeze(-1)
            rest = rest + mask[..., others]
    logits = torch.cat([own, rest], 3)
    closed = (logits == -math.inf).all(3, keepdim=True)  # queries that may read nothing get 0, as in normal attention
    weights = logits.softmax(3).masked_fill(closed, 0).to(own_value)
    return _with_video_rows(output, layout, weights[..., :1] * own_value + weights[..., 1:] @ call.value[:, :, others])
