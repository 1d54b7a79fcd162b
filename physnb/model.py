"""VideoDiT: a diffusion transformer (Peebles and Xie 2022) for clips, with full space-time attention and 3-D RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from physnb.config import ModelConfig, TextConfig
from physnb.linear import Linear

LEVEL_FEATURES = 64  # sine features of the noise level
LEVEL_FREQUENCY = 10.0  # of the fastest; faster ones tell neighbouring levels apart and only add noise
ROPE_BASE = 10_000.0  # on small token grids the slow pairs hardly turn: they compare content alone


class Fork(NamedTuple):
    """Where predictions that begin alike part: before block `layer` the batch becomes batch[rows]."""

    layer: int
    rows: Int[Tensor, " copy"]


@dataclass
class VideoDiTOutput(BaseOutput):
    """sample: the predicted clean clip, [batch, channel, time, height, width]."""

    sample: Tensor


def rotary_table(grid: tuple[int, int, int], head_width: int) -> Float[Tensor, "token pair 2"]:
    """cos and sin of axial rotary positions (Su et al. 2021, eq. 34), a share of the channel pairs for each axis.

    Time takes the pairs that do not divide by three.
    """
    pairs = head_width // 2
    share = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    angles = torch.cat(
        [places[:, axis, None] * ROPE_BASE ** (-torch.arange(n) / n) for axis, n in enumerate(share)], dim=1
    )
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def sine_places(grid: tuple[int, int, int], width: int) -> Float[Tensor, "token width"]:
    """Where a token is, in sines and cosines: a third of the channels for each axis, zeros for what is left over."""
    pairs = width // 6
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3, 1)
    angles = places * 100.0 ** (-torch.arange(pairs) / pairs)
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1).flatten(1), (0, width - 6 * pairs))


def rotate(x: Float[Tensor, "batch token channels"], table: Float[Tensor, "token pair 2"]) -> Tensor:
    """x with neighbouring channels turned as complex numbers, head by head: q . k then sees relative positions only."""
    turns = torch.view_as_complex(table.float())
    turns = turns.repeat(1, x.shape[-1] // 2 // table.shape[1])  # the same for every head
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class SelfAttentionProcessor:
    """The work of a SelfAttention, in the form of diffusers: an object that `physnb.hooks` can replace."""

    def __call__(
        self,
        attn: SelfAttention,
        x: Float[Tensor, "batch token width"],
        rotary: Float[Tensor, "token pair 2"],
    ) -> Float[Tensor, "batch token width"]:
        query_key = rotate(attn.query_key(x), rotary).unflatten(-1, (2, attn.heads, -1))
        q, k = query_key.transpose(1, 3).unbind(2)  # [batch, head, token, channel] each
        v = attn.value(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        output = F.scaled_dot_product_attention(q, k, v)
        return attn.out(output.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens of a clip."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key = Linear(width, 2 * width)
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        self.processor = SelfAttentionProcessor()

    def forward(self, x: Float[Tensor, "batch token width"], rotary: Float[Tensor, "token pair 2"]) -> Tensor:
        return self.processor(self, x, rotary)


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-Zero, Peebles and Xie, sec. 3.2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))
        self.modulation = Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Float[Tensor, "batch width"], rotary: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), rotary))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class CaptionReader(nn.Module):
    """Transformer layers over the words of a caption, which are told their order by sines."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        settings = dict(dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **settings) for _ in range(layers))

    def forward(self, words: Float[Tensor, "batch word width"], padding: Bool[Tensor, "batch word"]) -> Tensor:
        x = words + 0.1 * sine_places((words.shape[1], 1, 1), words.shape[2]).to(words)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x


class VideoDiT(ModelMixin, ConfigMixin):
    """Predicts the clean clip from a noised one, the noise level, start frames and a caption."""

    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        frames: int = 16,
        size: int = 32,
        patch: tuple[int, int, int] = (2, 8, 8),
        channels: int = 3,
        width: int = 128,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        vocabulary: tuple[str, ...] = (),
        noise_shift: float = 30.0,
        pixel_mean: float = 1.0,
        text: dict | None = None,
        codec: str | None = None,
    ):
        """The sizes are those of `config.ModelConfig`.

        vocabulary: the words captions are made of. text: what captions say and how they are read, the entries of
        `config.TextConfig`; None: its defaults. noise_shift: noise levels of training, reused in sampling.
        pixel_mean: the usual pixel, in [-1, 1], subtracted from every input; 1 for discs on white.
        codec: folder or hub id of the autoencoder whose latents take the place of pixels; the sizes are then theirs.
        """
        super().__init__()
        ModelConfig(frames, size, patch, channels, width, depth, heads, mlp_ratio)  # refuses sizes that do not fit
        patch_t, patch_h, patch_w = self.patch = tuple(patch)
        self.grid = (frames // patch_t, size // patch_h, size // patch_w)  # tokens along time, height, width
        patch_size = patch_t * patch_h * patch_w
        self.embed = Linear((2 * channels + 1) * patch_size, width)
        self.places = nn.Parameter(0.1 * sine_places(self.grid, width))
        self.level = nn.Sequential(Linear(LEVEL_FEATURES, width), nn.SiLU(), Linear(width, width))
        reading = TextConfig(**(text or {}))
        # Word 0: no caption. A pretrained encoder's embeddings of whole captions are only projected.
        self.words = Linear(reading.width, width) if reading.encoder else nn.Embedding(len(vocabulary) + 1, width)
        self.reader = CaptionReader(width, heads, reading.layers) if reading.layers else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Linear(width, 2 * width)
        self.head = Linear(width, channels * patch_size)
        self.register_buffer("rotary", rotary_table(self.grid, width // heads), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.01)  # small, so that pixels and places start out equally loud
        for layer in [self.head, self.modulation, *(block.modulation for block in self.blocks)]:
            nn.init.zeros_(layer.weight)  # every block starts as the identity
        nn.init.constant_(self.head.bias, self.config.pixel_mean)  # and every clip as empty ground

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of a clip."""
        return self.config.channels, self.config.frames, self.config.size, self.config.size

    def patchify(self, clip: Float[Tensor, "batch channel time height width"]) -> Float[Tensor, "batch token patch"]:
        batch, channels = clip.shape[:2]
        (t, h, w), (pt, ph, pw) = self.grid, self.patch
        split = clip.reshape(batch, channels, t, pt, h, ph, w, pw)
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t * h * w, channels * pt * ph * pw)

    def unpatchify(
        self, tokens: Float[Tensor, "batch token patch"]
    ) -> Float[Tensor, "batch channel time height width"]:
        batch, channels = len(tokens), self.config.channels
        (t, h, w), (pt, ph, pw) = self.grid, self.patch
        split = tokens.reshape(batch, t, h, w, channels, pt, ph, pw)
        return split.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, channels, t * pt, h * ph, w * pw)

    def embed_caption(self, caption: Tensor) -> Float[Tensor, "batch width"]:
        """A caption in one vector: of words their mean, read in order if there is a reader; or a projection."""
        if caption.is_floating_point():
            return self.words(caption.to(self.places.dtype))
        is_word = (caption > 0).to(self.places.dtype)
        is_word[:, 0] += (is_word.sum(1) == 0).to(is_word.dtype)  # an empty caption is one word number 0
        words = self.words(caption)
        if self.reader is not None:
            words = self.reader(words, is_word == 0)
        return (words * is_word[..., None]).sum(1) / is_word.sum(1, keepdim=True)

    def embed_condition(self, sigma: Tensor, caption: Tensor) -> Float[Tensor, "batch width"]:
        """Noise level and caption in one vector."""
        frequency = torch.exp(torch.linspace(0, math.log(LEVEL_FREQUENCY), LEVEL_FEATURES // 2, device=sigma.device))
        angle = sigma[:, None] * frequency
        level = self.level(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.places.dtype))
        return F.silu(level + self.embed_caption(caption))

    def forward(
        self,
        sample: Float[Tensor, "batch channel time height width"],
        sigma: Float[Tensor, " batch"],
        start: Float[Tensor, "batch channel time height width"],
        given: Float[Tensor, "batch time"],
        caption: Int[Tensor, "batch word"] | Float[Tensor, "batch channel"],
        return_dict: bool = True,
        fork: Fork | None = None,
    ) -> VideoDiTOutput | tuple[Tensor]:
        """The predicted clean clip.

        sample: noised clip; sigma: its noise level in (0, 1]; given: 1 for start frames, else 0;
        start: clean clip, which takes the place of the noised one where given is 1;
        caption: from `physnb.captioning`, word ids or an embedding, all 0 for no caption.
        fork: where rows become several, which have to differ by hooks on later blocks; the output has one row a copy.
        """
        mask, mean = given[:, None, :, None, None], self.config.pixel_mean
        mask_channel = mask.expand(-1, 1, -1, *sample.shape[3:])
        centred = sample - mean * (1 - sigma.view(-1, 1, 1, 1, 1))
        known = (start - mean) * mask
        x = self.patchify(torch.cat([centred * (1 - mask), known, mask_channel], 1))  # [batch, token, 7 * patch]
        x = self.embed(x) + self.places  # [batch, token, width]
        condition = self.embed_condition(sigma, caption)  # [batch, width]
        for layer, block in enumerate(self.blocks):
            if fork is not None and layer == fork.layer:
                x, condition = x[fork.rows], condition[fork.rows]
            x = block(x, condition, self.rotary)  # [batch, token, width]
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)  # [batch, 1, width] each
        x = self.head(torch.addcmul(shift, self.norm(x), 1 + scale))  # [batch, token, 3 * patch]
        clean = self.unpatchify(x)  # [batch, channel, time, height, width]
        return VideoDiTOutput(sample=clean) if return_dict else (clean,)
