"""Rectified flow (Liu, Gong and Liu 2022, arXiv 2209.03003): path, velocity, loss and solvers.

Notation: x clean clip, e noise, sigma noise level in [0, 1], z noised clip, v velocity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from jaxtyping import Float
from torch import Tensor

from physnb.config import SOLVERS, choose, require

ClipTensor = Float[Tensor, "batch channel time height width"]
Levels = Float[Tensor, " batch"]
TRAIN_TIMESTEPS = 1000  # diffusers counts time as 1000 sigma


def _per_clip(sigma: Levels) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)


def shift_levels(sigma: Tensor, shift: float) -> Tensor:
    """sigma -> shift sigma / (1 + (shift - 1) sigma): more weight on high noise (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: ClipTensor, noise: ClipTensor, sigma: Levels) -> ClipTensor:
    """z = (1 - sigma) x + sigma e (eq. 1, time reversed: sigma = 1 is pure noise)."""
    return torch.lerp(clean, noise, _per_clip(sigma))


def velocity_from_clean(noised: ClipTensor, clean: ClipTensor, sigma: Levels) -> ClipTensor:
    """v = e - x = (z - x) / sigma: what the solvers integrate, from a predicted clean clip. Needs sigma > 0."""
    return (noised - clean) / _per_clip(sigma)


def velocity_loss(
    predicted: ClipTensor, clean: ClipTensor, sigma: Levels, frame_weight: Float[Tensor, "batch time"], floor: float
) -> Levels:
    """Squared velocity error of each clip: |v' - v|^2 = |x' - x|^2 / sigma^2, with sigma no smaller than `floor`.

    frame_weight: 1 for frames to predict, 0 for given start frames; every clip must have one of the former.
    """
    error = (predicted - clean).square().mean(dim=(1, 3, 4))  # [batch, time]
    per_clip = (error * frame_weight).sum(1) / frame_weight.sum(1)
    return per_clip / sigma.clamp(min=floor).square()


def make_scheduler(solver: str, shift: float):
    """The diffusers flow scheduler called `solver`, with the noise levels of training."""
    choose("solver", solver, SOLVERS)
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=shift)
    if solver == "heun":
        return FlowMatchHeunDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=shift)
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if solver == "unipc":
        return UniPCMultistepScheduler(num_train_timesteps=TRAIN_TIMESTEPS, **flow)
    return DPMSolverMultistepScheduler(num_train_timesteps=TRAIN_TIMESTEPS, **flow)


def sampling_levels(solver: str, steps: int, shift: float) -> list[float]:
    """The noise level sigma of every call of the model in a sampling, from 1 down."""
    scheduler = make_scheduler(solver, shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()[:-1]


def solve(
    velocity: Callable[[ClipTensor, Levels, float], ClipTensor],
    noise: ClipTensor,
    *,
    steps: int,
    solver: str = "euler",
    shift: float = 30.0,
    callback: Callable[[int, float, ClipTensor], None] | None = None,
) -> ClipTensor:
    """The clean clips at the end of the flow from `noise` (sigma = 1) to sigma = 0.

    velocity(z, sigma, progress) is any denoiser, guided or not, with the share of its calls that lie behind;
    `steps` solver steps (heun calls it twice a step but the last).
    callback(step, sigma, z) sees every call.
    """
    require(steps > 0, f"sampling steps must be positive, got {steps}")
    scheduler = make_scheduler(solver, shift)
    scheduler.set_timesteps(steps, device=noise.device)
    scheduler.set_begin_index(0)  # else the step is looked up by its time, which some round to whole thousandths
    sample = noise
    levels = scheduler.sigmas.tolist()[:-1]  # exact, for the same reason
    for step, (time, sigma) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        if callback is not None:
            callback(step, sigma, sample)
        drift = velocity(sample, torch.full((len(sample),), sigma, device=sample.device), step / len(levels))
        sample = scheduler.step(drift, time, sample).prev_sample
    return sample
