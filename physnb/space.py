"""Where a model works: pixels, or the latents of a codec; and the way there and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.codec import Codec, load_codec
from physnb.config import ModelConfig, require
from physnb.data import Clip
from physnb.model import VideoDiT

ClipTensor = Float[Tensor, "batch channel time height width"]


@dataclass(frozen=True)
class Space:
    """frames, size: of the clips in pixels. codec: whose latents the model works on; None: on pixels themselves."""

    frames: int
    size: int
    codec: Codec | None = None

    def given(self, frames_given: int) -> int:
        """How many of the model's frames so many start frames determine.

        Raises ValueError, naming counts that work, if the codec would lose some of them: of three start frames a codec
        that takes four to a latent keeps the first, and with it no motion.
        """
        if self.codec is None:
            return frames_given
        given = self.codec.given_frames(frames_given)
        kept, step = self.codec.start_frames(given), self.codec.time_factor
        require(
            kept == frames_given,
            f"{frames_given} start frames do not fill the latents of {self.codec.name}: use {kept} or {kept + step}",
        )
        return given

    def encode_start(self, clip: Clip, frames_given: int, device: torch.device | str = "cpu") -> ClipTensor:
        """Clips as a model is given them: its first frames come from `frames_given` pixel frames alone.

        With a codec that sees ahead the others are zero, because nothing of them may reach the model.
        """
        pixels = clip.pixels().to(device)
        if self.codec is None:
            return pixels
        if not self.codec.leaks:
            return self.codec.encode(pixels)
        whole = torch.zeros(len(clip), *self.codec.latent_shape(self.frames, self.size), device=device)
        if frames_given:
            start = self.codec.encode_start(pixels, frames_given)
            whole[:, :, : start.shape[2]] = start
        return whole

    def decode(self, made: ClipTensor) -> ClipTensor:
        """What the model made, in pixels."""
        return made if self.codec is None else self.codec.decode(made, self.frames)


@lru_cache(maxsize=4)
def open_space(model: ModelConfig, codec: str = "") -> Space:
    """The space of a model's shape; codec: folder or hub id of an autoencoder, empty for pixels.

    Raises ValueError for a codec whose latents have another number of channels than the model.
    """
    if not codec:
        return Space(model.frames, model.size)
    loaded = load_codec(codec)
    require(
        loaded.channels == model.channels,
        f"latents of {codec} have {loaded.channels} channels, the model has {model.channels}; choose another codec",
    )
    return Space(loaded.start_frames(model.frames), model.size * loaded.space_factor, loaded)


def latent_config(codec: str, pixels: ModelConfig, frames: int | None = None) -> ModelConfig:
    """A model's shape in the latents of a codec, for clips of its own frames and size, or of `frames` frames.

    A shape that has the codec's channels already is in latents and stays. Patches keep what they cover in space, and
    in time are of one latent frame. Raises ValueError for frames or a size that do not fit the codec.
    """
    loaded = load_codec(codec)
    if pixels.channels == loaded.channels:
        return pixels
    channels, time, size, _ = loaded.latent_shape(frames or pixels.frames, pixels.size)
    patch = (1, *(max(1, side // loaded.space_factor) for side in pixels.patch[1:]))
    return replace(pixels, frames=time, size=size, channels=channels, patch=patch)


def space_of(model: VideoDiT) -> Space:
    """Where a model works, with its codec on the model's device."""
    shape = ModelConfig(**{name: getattr(model.config, name) for name in ModelConfig.__dataclass_fields__})
    space = open_space(shape, model.config.codec or "")
    if space.codec is not None:
        space.codec.model.to(model.device)
    return space
