"""Colour and contrast: where guidance burns, and what is left once contrast no longer matters."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import require
from physnb.data import Clip
from physnb.metrics.scores import Scores, scores


def frame_saturation(frames: Tensor) -> Float[Tensor, "*frames"]:
    """Mean over a frame's pixels of the HSV saturation, (max - min) / max of the three channels, 0 for black.

    frames: uint8 [*frames, height, width, 3].
    """
    pixels = frames.float()
    most, least = pixels.amax(-1), pixels.amin(-1)
    return torch.where(most > 0, (most - least) / most.clamp(min=1), 0.0).mean((-1, -2))


def oversaturation(generated: Clip, true: Clip, *, frames_given: int = 3) -> Scores:
    """How much more saturated the generated frames are than the true ones, as a share of the true; 0 is as saturated.

    max(0, S - S') / S' frame by frame, S and S' the mean saturation of the generated and the true frame, averaged over
    the generated frames. Lower is better. NaN for a clip whose truth has no colour at all.
    Raises ValueError for clips of different sizes or without a generated frame.
    Leaves out where the colour is: a second disc counts like a glowing one. Washed-out or missing discs score 0.
    """
    require(
        generated.frames.shape == true.frames.shape,
        f"generated {tuple(generated.frames.shape)} and true {tuple(true.frames.shape)} clips do not match",
    )
    time = true.frames.shape[1]
    require(0 <= frames_given < time, f"frames given must be in [0, {time - 1}] to judge any, got {frames_given}")
    mine, truth = (frame_saturation(clip.frames[:, frames_given:]) for clip in (generated, true))
    excess = torch.where(truth > 0, (mine - truth).clamp(min=0) / truth, torch.nan).nanmean(1)
    return scores("oversaturation", "share", excess, "the true clip has no colour")


def stretch_contrast(clips: Clip, gain: float) -> Clip:
    """The clips with their contrast to the white ground stretched: a value x becomes 255 - gain (255 - x), cut at 0.

    Raises ValueError for a gain that is not positive.
    """
    require(0 < gain < float("inf"), f"the gain of contrast must be positive, got {gain}")
    frames = (255 - gain * (255 - clips.frames.float())).clamp(0, 255).round().byte()
    return replace(clips, frames=frames)
