"""What training at phyworld's scale takes, on paper: tokens, operations, memory, disk and hours.

Published set-up (Kang et al., arXiv 2411.02385v2): 30 K, 300 K and 3 M clips of 32 frames of 128 x 128 pixels; DiT-S to
DiT-XL (table 1) in the latents of a video autoencoder built from Stable Diffusion 1.5's; 100 K steps of 256 clips
whatever the number of clips, on 32 A100 (section 3); for combinations of objects 1 M steps at 256 x 256 pixels, on 64
(section 4). Hours were not published.
Assumed, because the paper does not say: 8 x 8 pixels and 4 frames a latent, 4 channels, patches of 1 x 2 x 2 latents.
Its table counts 12 width^2 a block, so it leaves out the modulations, which add half as much to the parameters here
and hardly anything to the operations: they are computed once a clip, not once a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physnb.bench import matmul_flops_per_sample
from physnb.config import DIT_SHAPES, ModelConfig, choose, require
from physnb.data import VOCABULARY
from physnb.model import LEVEL_FEATURES

CLIPS = (30_000, 300_000, 3_000_000)
STEPS, BATCH, FRAMES, PIXELS = 100_000, 256, 32, 128
PRECISIONS = ("fp32", "bf16")
GIB = 2**30
LAUNCH = Path(__file__).parent / "launch"  # configuration files of accelerate


@dataclass(frozen=True)
class Device:
    """Published figures of an accelerator: dense bf16 operations a second, and bytes."""

    name: str
    peak: float
    memory: float


H100 = Device("H100 SXM", 989.4e12, 80e9)  # data sheet; twice as much is for sparse matrices


def latent_model(
    shape: str, *, frames: int = FRAMES, pixels: int = PIXELS, space_factor: int = 8, time_factor: int = 4
) -> ModelConfig:
    """DiT-S, -B, -L or -XL ("s", "b", "l", "xl") for clips of frames x pixels x pixels in 4-channel latents, patch 2.

    Raises ValueError for an unknown shape and for counts that the factors do not divide.
    """
    choose("shape", shape, DIT_SHAPES)
    require(
        frames % time_factor == 0 and pixels % space_factor == 0,
        f"{frames} frames of {pixels} pixels do not divide by {time_factor} frames and {space_factor} pixels a latent",
    )
    size = dict(frames=frames // time_factor, size=pixels // space_factor)
    return ModelConfig(**size, patch=(1, 2, 2), channels=4, **DIT_SHAPES[shape])


def token_count(model: ModelConfig) -> int:
    """Tokens of one clip."""
    patch_t, patch_h, patch_w = model.patch
    return model.frames // patch_t * (model.size // patch_h) * (model.size // patch_w)


def parameter_counts(model: ModelConfig, words: int = len(VOCABULARY)) -> tuple[int, int, int]:
    """All parameters of a VideoDiT, those of Muon's matrices, and those that every token passes."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    patch = model.patch[0] * model.patch[1] * model.patch[2]
    matrices = model.depth * (4 * width**2 + 2 * width * hidden)  # of attention and MLP
    block_biases = 4 * width + hidden + width
    embed = (2 * model.channels + 1) * patch * width + width
    head = (width + 1) * model.channels * patch
    by_token = matrices + model.depth * block_biases + embed + head
    level = LEVEL_FEATURES * width + width + width**2 + width
    modulations = (6 * model.depth + 2) * (width**2 + width)
    places, captions = token_count(model) * width, (words + 1) * width
    return by_token + level + modulations + places + captions, matrices, by_token


def training_operations(model: ModelConfig, *, steps: int = STEPS, batch: int = BATCH) -> float:
    """Floating-point operations of a whole training: the matrix products of `bench.matmul_flops_per_sample`.

    It is 6 N D (N parameters that a token passes, D tokens seen) and attention's 12 depth width tokens^2 a clip.
    Leaves out encoding the clips (once, see `Codec`), norms, the optimiser, and recomputation under checkpointing.
    """
    require(steps > 0 and batch > 0, f"steps and batch must be positive, got {steps} and {batch}")
    return steps * batch * matmul_flops_per_sample(model)


def attention_share(model: ModelConfig) -> float:
    """Part of the operations that multiplies queries, keys and values, and grows with the square of the tokens."""
    attention = 12 * model.depth * model.width * token_count(model) ** 2
    return attention / matmul_flops_per_sample(model)


def training_hours(operations: float, *, devices: int, utilisation: float, device: Device = H100) -> float:
    """hours = operations / (devices x utilisation x peak x 3600).

    utilisation: share of the published peak that goes into the model's own matrix products (model-flops utilisation);
    recomputation under checkpointing does not count, so that with it at most 3/4 of the share is left.
    Leaves out waiting for data, saving and evaluation.
    """
    require(devices > 0, f"devices must be positive, got {devices}")
    require(0 < utilisation <= 1, f"utilisation must be in (0, 1], got {utilisation}")
    return operations / (devices * utilisation * device.peak * 3600)


def hours_at_rate(operations: float, *, samples_per_second: float, measured: ModelConfig, devices: int = 1) -> float:
    """Hours at a measured rate: `devices` devices like the one on which `measured` trained at samples_per_second.

    The rate becomes operations a second by `bench.matmul_flops_per_sample`: it is assumed that the larger model reaches
    as many, and that devices do not wait for each other. `python -m physnb bench train` measures a rate.
    """
    require(samples_per_second > 0 and devices > 0, "samples per second and devices must be positive")
    return operations / (devices * samples_per_second * matmul_flops_per_sample(measured) * 3600)


def block_activations(model: ModelConfig, batch: int, precision: str) -> float:
    """Bytes that autograd keeps of one block, by counting what `model.Block` saves (r = mlp_ratio, fused attention).

    fp32: 12 + 2r values a token and channel, of 4 bytes each. bf16 (autocast): 4 of 4 bytes, 9 + 2r of 2 bytes.
    Leaves out what does not grow with width: a value a head and token, and the condition.
    """
    r = model.mlp_ratio
    per_value = 4 * (12 + 2 * r) if choose("precision", precision, PRECISIONS) == "fp32" else 4 * 4 + 2 * (9 + 2 * r)
    return per_value * batch * token_count(model) * model.width


def training_memory(
    model: ModelConfig, batch: int, *, shards: int = 1, precision: str = "bf16", checkpointing: bool = False
) -> dict[str, float]:
    """Bytes on one device that trains `batch` clips a step, by part, and their `total`.

    Weights, gradients and running average are fp32; Muon keeps one number a matrix entry, AdamW two of the rest. With
    bf16 autocast adds a copy of the weights. shards: devices over which all of these are cut (FSDP), of whose weights
    one block at a time is whole. checkpointing: of each block only its input is kept, and one block is made anew.
    Leaves out activations outside the blocks, buffers of communication, and what the allocator wastes: keep a tenth.
    """
    require(batch > 0 and shards > 0, f"batch and shards must be positive, got {batch} and {shards}")
    parameters, matrices, _ = parameter_counts(model)
    block = block_activations(model, batch, precision)
    inputs = 4 * model.depth * batch * token_count(model) * model.width
    casts = 2 * parameters if precision == "bf16" else 0
    whole = 0 if shards == 1 else (4 * parameters + casts) / model.depth
    parts = dict(
        weights=4 * parameters / shards + whole,
        casts=casts / shards,
        gradients=4 * parameters / shards,
        moments=(4 * matrices + 8 * (parameters - matrices)) / shards,
        average=4 * parameters / shards,
        activations=inputs + block if checkpointing else model.depth * block,
    )
    return parts | dict(total=sum(parts.values()))


def scaling_table(
    *,
    utilisation: float,
    shapes: tuple[str, ...] = tuple(DIT_SHAPES),
    clips: tuple[int, ...] = CLIPS,
    pixels: int = PIXELS,
    steps: int = STEPS,
    batch: int = BATCH,
    devices: tuple[int, ...] = (1, 8),
    device: Device = H100,
) -> list[dict[str, Any]]:
    """One row a shape, number of clips and number of devices, with the command that launches it.

    Operations and hours do not depend on the clips, because the published number of steps does not: `epochs` does, and
    `disk_gib`, of the clips' fp32 latents. memory_gib is that of one device without sharding; fits is from `fitting`.
    One utilisation stands for all shapes; narrow ones reach less. The command is empty where the training does not fit,
    or would on one device with checkpointing, which needs the sharded launch.
    """
    rows = []
    for shape in shapes:
        model = latent_model(shape, pixels=pixels)
        operations = training_operations(model, steps=steps, batch=batch)
        parameters, _, _ = parameter_counts(model)
        for count in clips:
            for number in devices:
                require(batch % number == 0, f"batch {batch} does not split over {number} devices")
                here = batch // number
                memory, fits = training_memory(model, here)["total"], fitting(model, here, number, device)
                rows.append(
                    dict(
                        model=f"DiT-{shape.upper()}",
                        clips=count,
                        epochs=steps * batch / count,
                        disk_gib=4 * count * model.channels * model.frames * model.size**2 / GIB,
                        tokens=token_count(model),
                        parameters=parameters,
                        operations=operations,
                        attention_share=attention_share(model),
                        devices=number,
                        device=device.name,
                        batch_per_device=here,
                        memory_gib=memory / GIB,
                        fits=fits,
                        utilisation=utilisation,
                        hours=training_hours(operations, devices=number, utilisation=utilisation, device=device),
                        command=launch_command(shape, count, number, steps=steps, fits=fits),
                    )
                )
    return rows


def fitting(model: ModelConfig, batch: int, devices: int, device: Device = H100) -> str:
    """What it takes that `batch` clips fit on one of `devices` devices, with a tenth of its memory to spare.

    "yes": nothing; "sharded": weights and the like cut over the devices; "checkpointed": that, and activations made
    anew; "no": more than these.
    """
    room = 0.9 * device.memory
    if training_memory(model, batch)["total"] <= room:
        return "yes"
    if devices > 1 and training_memory(model, batch, shards=devices)["total"] <= room:
        return "sharded"
    checkpointed = training_memory(model, batch, shards=devices, checkpointing=True)["total"]
    return "checkpointed" if checkpointed <= room else "no"


def launch_command(shape: str, clips: int, devices: int, *, steps: int = STEPS, fits: str = "yes") -> str:
    """The shell command that trains a shape on so many clips and devices of one machine; empty if there is none."""
    out = f"outputs/paper-{shape}-{clips // 1000}k"
    module = f"physnb train --preset paper-{shape} --steps {steps} --clips {clips} --codec CODEC --out {out}"
    if devices == 1:
        return f"python -m {module}" if fits == "yes" else ""
    config = "--config_file physnb/launch/data_parallel.yaml"
    if fits != "yes":
        config = "--config_file physnb/launch/sharded.yaml"
    if fits == "checkpointed":
        config += " --fsdp_activation_checkpointing true"
    return f"accelerate launch {config} --num_processes {devices} -m {module}" if fits != "no" else ""
