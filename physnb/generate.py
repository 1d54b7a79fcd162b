"""Generating clips: case i gets the same noise, and so the same clip, alone or in any batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.captioning import Captions, captioner_of
from physnb.config import Guidance, require
from physnb.data import Clip, normal_noise
from physnb.flow import ClipTensor, solve
from physnb.guidance import guided_velocity
from physnb.model import VideoDiT
from physnb.space import space_of


def check_cases(model: VideoDiT, cases: Clip, frames_given: int) -> None:
    """Raise ValueError unless the model can continue these clips from `frames_given` start frames."""
    space = space_of(model)
    makes, have = (space.frames, space.size, space.size), tuple(cases.frames.shape[1:4])
    require(have == makes, f"the model makes clips of {makes}, the cases are {have}")
    require(0 <= frames_given < space.frames, f"frames given must be in [0, {space.frames - 1}], got {frames_given}")
    space.given(frames_given)


def initial_noise(model: VideoDiT, cases: Clip, seed: int) -> torch.Tensor:
    """Noise of every case, [batch, channel, time, height, width]: a function of (seed, scenario, case index)."""
    noise = [
        normal_noise(seed, f"generate/{scenario}", index[None].numpy(), model.clip_shape)
        for scenario, index in zip(cases.scenarios, cases.indices, strict=True)
    ]
    return torch.cat(noise)


def conditions(
    model: VideoDiT, cases: Clip, frames_given: int, *, use_captions: bool = True
) -> tuple[ClipTensor, Float[Tensor, "batch time"], Captions]:
    """What the model is told of each case, on its device: the clean clip, which frames of it are given, the caption."""
    captioner = captioner_of(model)
    captions = captioner.write(cases) if use_captions else ("",) * len(cases)
    space = space_of(model)
    start, count = space.encode_start(cases, frames_given, model.device), space.given(frames_given)
    given = (torch.arange(start.shape[2], device=model.device) < count).float().expand(len(cases), -1)
    return start, given, captioner.encode(captions).to(model.device)


def generate(
    model: VideoDiT,
    cases: Clip,
    *,
    frames_given: int = 3,
    guidance: Guidance | Sequence[Guidance] = Guidance(),
    steps: int = 10,
    solver: str = "euler",
    seed: int = 0,
    batch_size: int = 64,
    use_captions: bool = True,
    others: Mapping[str, VideoDiT] | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> Clip:
    """One generated clip a case, continuing its first `frames_given` frames, which are kept as they are.

    guidance: one for all cases, or one a case. frames_given 0 and use_captions False generate unconditionally.
    others: the networks that the OtherModel entries of the guidance name.
    A clip does not depend on the batch it is made in beyond float rounding: at most 1 grey level of 255.
    callback(step, sigma, noised batch) sees every call of the model.
    Raises ValueError for cases of another size, a head the model lacks, an unknown solver or a bad count.
    """
    check_cases(model, cases, frames_given)
    require(batch_size > 0, f"batch size must be positive, got {batch_size}")
    rows = [guidance] * len(cases) if isinstance(guidance, Guidance) else list(guidance)
    require(len(rows) == len(cases), f"{len(rows)} guidances for {len(cases)} cases; give one, or one a case")
    model.eval()
    parts = []
    for first in range(0, len(cases), batch_size):
        part = cases[first : first + batch_size]
        start, given, caption = conditions(model, part, frames_given, use_captions=use_captions)
        velocity = guided_velocity(model, start, given, caption, rows[first : first + batch_size], others)
        noise = initial_noise(model, part, seed).to(model.device)
        shift = model.config.noise_shift
        clean = solve(velocity, noise, steps=steps, solver=solver, shift=shift, callback=callback)
        made = part.with_pixels(space_of(model).decode(torch.where(given[:, None, :, None, None] > 0, start, clean)))
        made.frames[:, :frames_given] = part.frames[:, :frames_given]
        parts.append(made)
    return Clip.concatenate(parts)
