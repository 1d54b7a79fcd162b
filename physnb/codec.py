"""Codecs: frozen autoencoders of diffusers between clips of pixels and of latents, a cache of latents, a small codec.

A 2-D autoencoder codes frame by frame. A video autoencoder also compresses time: its first latent frame stands for one
pixel frame, every other one for the next k, and none sees later frames unless norms look along time (`leaks`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoModel
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from physnb.checkpoint import fingerprint
from physnb.config import SCENARIOS, choose, require
from physnb.data import Clip, Mixture, Source, simulate, uniform_draws
from physnb.hub import INDEX, LOADING_ERRORS, TINY, check_source, first_line
from physnb.memory import keep_freed_memory
from physnb.metrics import Scores, metric_trajectory
from physnb.store import read_json, write_json, written_whole
from physnb.tiny_pipelines import tiny_pipeline

FRAME_BY_FRAME = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
CAUSAL = ("Wan", "LTXVideo", "Mochi", "Cosmos", "HunyuanVideo15")
LEAKY = ("CogVideoX", "HunyuanVideo")  # the former within the 8 frames that it encodes together
AUTOENCODERS = (*FRAME_BY_FRAME, *(f"AutoencoderKL{name}" for name in (*CAUSAL, *LEAKY)))
PROBE = 64  # pixels a side of the frame that tells a codec's factors
PIXELS_AT_ONCE = 2**20  # coded together; activations take a few hundred bytes a pixel
TOGETHER, SHARD = 32, 256  # clips whose pixels are in memory at once, clips a file of the cache
KL_WEIGHT = 1e-6  # in the loss, as for the autoencoders of Rombach et al. (2022), sec. G

Pixels = Float[Tensor, "batch 3 time height width"]
Latents = Float[Tensor, "batch channel latent_time latent_height latent_width"]


class Codec:
    """An autoencoder that is frozen and gives latents of about unit variance, by the numbers of its configuration.

    time_factor, space_factor: pixel frames a latent frame, pixels a latent row. channels: of a latent.
    leaks: whether a latent frame also sees later pixel frames; in `encode_start` it never does. model: the autoencoder,
    whose device and number format are used: `codec.model.to("cuda")`.
    """

    def __init__(self, model: nn.Module):
        """Raises ValueError for a model that is none of AUTOENCODERS."""
        self.name = choose("autoencoder", type(model).__name__, AUTOENCODERS)
        self.model = model.eval().requires_grad_(False)
        self.frame_by_frame = self.name in FRAME_BY_FRAME
        self.leaks = self.name.removeprefix("AutoencoderKL") in LEAKY
        factors = [getattr(model, "temporal_compression_ratio", 0), model.config.get("temporal_compression_ratio")]
        factors.append(model.config.get("scale_factor_temporal"))  # Wan's name for it
        self.time_factor = 1 if self.frame_by_frame else int(next(factor for factor in factors if factor))
        blank = torch.zeros((1, 3, PROBE, PROBE) if self.frame_by_frame else (1, 3, 1, PROBE, PROBE))
        with torch.no_grad():
            probe = latents_of(model, blank.to(model.device, model.dtype))
        self.channels, self.space_factor = probe.shape[1], PROBE // probe.shape[-1]
        self.mean, self.std = normalisation(model, self.channels)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits of weights and configuration."""
        return fingerprint(self.model)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of so many pixel frames; raises ValueError, naming counts that work, if they do not fit."""
        require(frames > 0, f"frames must be positive, got {frames}")
        k = self.time_factor
        fit = frames - (frames - 1) % k
        takes = f"takes 1 + a multiple of {k}: use {fit} or {fit + k}"
        require(fit == frames, f"{frames} frames do not fit {self.name}, which {takes}")
        return 1 + (frames - 1) // k

    def latent_shape(self, frames: int, size: int) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of a clip of `frames` frames of size x size pixels."""
        require(
            size > 0 and size % self.space_factor == 0,
            f"size {size} must be a multiple of {self.space_factor}, the pixels a latent of {self.name}",
        )
        return self.channels, self.latent_frames(frames), size // self.space_factor, size // self.space_factor

    def given_frames(self, frames_given: int) -> int:
        """How many latent frames the first n pixel frames wholly determine: n, or 1 + (n - 1) / k rounded down.

        Those after the last whole latent frame tell a model nothing: of 3 start frames a codec with k = 4 keeps 1,
        and so no motion. `start_frames` has the counts that lose none.
        """
        require(frames_given >= 0, f"frames given must not be negative, got {frames_given}")
        return 1 + (frames_given - 1) // self.time_factor if frames_given else 0

    def start_frames(self, given: int) -> int:
        """How many pixel frames the first `given` latent frames stand for."""
        return 1 + (given - 1) * self.time_factor if given else 0

    def encode(self, pixels: Pixels) -> Latents:
        """Latents of clips in [-1, 1]: the mode of the posterior, so always the same; float32, on the codec's device.

        Raises ValueError for frames or sizes that do not fit, and for latents that are no finite numbers.
        """
        require(
            pixels.ndim == 5 and pixels.shape[1] == 3 and len(pixels) > 0 and pixels.is_floating_point(),
            f"pixels must be floats [batch, 3, time, height, width], got {pixels.dtype} {tuple(pixels.shape)}",
        )
        frames, height, width = pixels.shape[2:]
        for size in (height, width):
            self.latent_shape(frames, size)
        raw = self._coded(lambda rows: latents_of(self.model, rows), pixels, frames * height * width)
        require(bool(raw.isfinite().all()), f"{self.name} gives no finite numbers; use float32, or check the pixels")
        return (raw - self.mean.to(raw)) / self.std.to(raw)

    def encode_start(self, pixels: Pixels, frames_given: int) -> Latents:
        """Latents of the `given_frames(frames_given)` first latent frames, made without any later pixel.

        They are those of `encode` unless the codec leaks. A sampler must start from these.
        """
        given = self.given_frames(frames_given)
        require(frames_given <= pixels.shape[2], f"{frames_given} frames given of clips of {pixels.shape[2]}")
        return self.encode(pixels[:, :, : max(1, self.start_frames(given))])[:, :, :given]

    def decode(self, latents: Latents, frames: int) -> Pixels:
        """Clips of `frames` pixel frames, around [-1, 1] and not clamped; float32, on the codec's device.

        Raises ValueError for latents of another shape and for pixels that are no finite numbers.
        """
        channels, time, shape = self.channels, self.latent_frames(frames), tuple(latents.shape)
        require(
            latents.ndim == 5 and len(latents) > 0 and shape[1:3] == (channels, time),
            f"latents of {frames} frames must be [batch, {channels}, {time}, height, width], got {shape}",
        )
        raw = latents * self.std.to(latents) + self.mean.to(latents)
        size = frames * shape[3] * shape[4] * self.space_factor**2
        pixels = self._coded(lambda rows: self.model.decode(rows).sample, raw, size)
        require(bool(pixels.isfinite().all()), f"{self.name} decodes to no finite numbers; use float32")
        return pixels

    @torch.no_grad()
    def _coded(self, work: Callable[[Tensor], Tensor], clips: Tensor, pixels: int) -> Tensor:
        """What `work` makes of clips, or of their frames one by one, PIXELS_AT_ONCE at a time; pixels: of a clip."""
        rows, images = clips, clips.shape[2]
        if self.frame_by_frame:
            rows, pixels = clips.transpose(1, 2).flatten(0, 1), pixels // images  # [batch * time, channel, ...]
        parts = rows.to(self.model.device, self.model.dtype).split(max(1, PIXELS_AT_ONCE // pixels))
        coded = torch.cat([work(part).float() for part in parts])
        return coded.unflatten(0, (-1, images)).transpose(1, 2) if self.frame_by_frame else coded


def latents_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """What an autoencoder's `encode` returns, before any scaling; of a distribution the mode."""
    output = model.encode(pixels)
    return output.latent_dist.mode() if "latent_dist" in output else output[0]


def normalisation(model: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, [channel, 1, 1, 1] each, that a latent has by an autoencoder's own numbers.

    As diffusers' pipelines have it: (z - shift_factor) scaling_factor, or (z - latents_mean) scaling_factor / std.
    """
    buffers = dict(model.named_buffers())  # LTX's numbers are not in its configuration

    def numbers(name: str, default: float) -> Tensor:
        value = buffers.get(name, model.config.get(name))
        value = torch.as_tensor(default if value is None else value, dtype=torch.float32, device="cpu")
        return value.expand(channels).reshape(-1, 1, 1, 1)

    mean = numbers("latents_mean", 0.0) + numbers("shift_factor", 0.0)
    return mean, numbers("latents_std", 1.0) / numbers("scaling_factor", 1.0)


def load_codec(where: str | Path) -> Codec:
    """The codec of an autoencoder's folder, of a pipeline's (its `vae`), of a hub id, or of `tiny:NAME`.

    Weights are safetensors; nothing is unpickled. Raises ValueError saying what is wrong with the source.
    """
    source = str(where)
    if source.startswith(TINY):
        return Codec(tiny_pipeline(source.removeprefix(TINY)).vae)
    folder = check_source(source)
    places = [None, "vae"]  # an id does not say whether it is of an autoencoder or of a pipeline
    if folder.is_dir():
        places = ["vae" if (folder / INDEX).exists() else None]
    for place in places:
        try:
            config = AutoModel.load_config(source, subfolder=place)
            kind = choose("autoencoder", str(config.get("_class_name")), AUTOENCODERS)
            model, report = getattr(diffusers, kind).from_pretrained(
                source, subfolder=place, use_safetensors=True, output_loading_info=True
            )
            missing = sorted(report["missing_keys"])
            require(not missing, f"weights are missing, for example {', '.join(missing[:2])}")
            return Codec(model)
        except LOADING_ERRORS as error:
            reason = first_line(error)
    raise ValueError(f"no codec could be loaded from {source}: {reason} (pickled weights are never read)")


def reconstruction_floor(
    codec: Codec, clips: Clip, *, frames_given: int = 3, mode: str = "clean"
) -> dict[str, dict[str, Any]]:
    """What coding alone costs: each trajectory metric of decoded true clips as {mean, low, high, judged, cases, floor}.

    floor: the metric's mean on the true clips themselves, as phyworld's table 3 has both. A model of these latents is
    not expected to get below `mean`. `psnr` (dB) has no floor.
    Raises ValueError as `metric_trajectory` and `Codec.encode` do.
    """
    floor = metric_trajectory(clips, clips, frames_given=frames_given, mode=mode)  # refuses bad settings first
    frames = clips.frames.shape[1]
    parts = [clips[first : first + TOGETHER] for first in range(0, len(clips), TOGETHER)]
    decoded = Clip.concatenate([part.with_pixels(codec.decode(codec.encode(part.pixels()), frames)) for part in parts])
    found = metric_trajectory(decoded, clips, frames_given=frames_given, mode=mode)
    table = {name: score.estimate().to_dict() for name, score in found.items()}
    table = {name: row | dict(floor=floor[name].estimate().to_dict()["mean"]) for name, row in table.items()}
    return table | dict(psnr=signal_to_noise(decoded, clips).estimate().to_dict())


def signal_to_noise(decoded: Clip, clips: Clip) -> Scores:
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean squared error) dB; not judged where the frames are identical.

    Leaves out what matters: a clip whose small disc is gone still has more than 20 dB.
    """
    error = (decoded.frames.float() - clips.frames.float()).square().flatten(1).mean(1)
    decibel = torch.where(error > 0, 10 * torch.log10(255**2 / error), torch.nan)
    reasons = tuple(None if e > 0 else "the frames are identical, the ratio is infinite" for e in error.tolist())
    return Scores("psnr", "dB", decibel, reasons, lower_is_better=False)


@dataclass(frozen=True)
class LatentBatch:
    """Latents of clips, on the CPU, and the clips without frames and state: what captions are written from."""

    latents: Latents
    clips: Clip

    @classmethod
    def encoded(cls, codec: Codec, clips: Clip) -> LatentBatch:
        """The latents of `clips`."""
        return cls(codec.encode(clips.pixels()).cpu(), replace(clips, frames=clips.frames[:, :0, :1, :1], state=None))

    @classmethod
    def joined(cls, parts: list[LatentBatch]) -> LatentBatch:
        """All of them in one."""
        return cls(torch.cat([part.latents for part in parts]), Clip.concatenate([part.clips for part in parts]))


class LatentCache:
    """The latents of a source with a count, each encoded once: memory-mapped .npy files of SHARD clips in a folder.

    The folder's name below `root` holds source, codec and content, so that another codec, size, count, first clip or
    `settings` (whatever decides later clips without showing in the first) has another. Files appear whole: several
    processes may fill one cache. Of an endless source no clip is seen twice, so it is not cached.
    """

    def __init__(self, codec: Codec, source: Source, root: str | Path, settings: Mapping[str, Any] | None = None):
        """Raises ValueError for a source that is endless or empty, and as `Codec.latent_shape` does."""
        count = source.count
        require(count is not None, f"{source.name} is endless; encode its clips as they come, or cut it to a count")
        require(count > 0, f"there is no clip in {source.name}")
        self.codec, self.source = codec, source
        first = source.clips(np.array([0]))
        frames, height, width = first.frames.shape[1:4]
        self.shape = (*codec.latent_shape(frames, height)[:3], codec.latent_shape(frames, width)[3])
        digest = hashlib.sha256(first.frames.contiguous().numpy().tobytes() + first.captions[0].encode())
        content = dict(codec=codec.fingerprint, source=source.name, count=count, shape=list(self.shape))
        content |= dict(first_clip=digest.hexdigest(), settings=dict(settings or {}))
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(root) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', source.name)}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "content.json", content)
        self._open: dict[int, tuple[np.ndarray, Clip]] = {}

    def fill(self, *, part: int = 0, parts: int = 1, progress: bool = True) -> None:
        """Encode all that is missing; of several processes, number `part` of `parts` takes every parts-th file."""
        shards = range(part, -(-self.source.count // SHARD), parts)
        for shard in tqdm(shards, f"latents of {self.source.name}", unit="file", disable=not progress):
            if not self._path(shard).exists():
                self._encode(shard)

    def read(self, numbers) -> LatentBatch:
        """Clips number `numbers`; a file that is missing is encoded first.

        Raises ValueError for numbers that the source does not have and for a damaged file, by name.
        """
        numbers, last = np.asarray(numbers, dtype=np.int64), self.source.count - 1
        known = len(numbers) > 0 and numbers.min() >= 0 and numbers.max() <= last
        require(known, f"clip numbers of {self.source.name} must be given and lie in [0, {last}]")
        rows = [(*self._shard(number // SHARD), number % SHARD) for number in numbers.tolist()]
        latents = np.stack([latents[row] for latents, _, row in rows])
        return LatentBatch(torch.from_numpy(latents), Clip.concatenate([clips[[row]] for _, clips, row in rows]))

    def _path(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:05}.npy"

    def _numbers(self, shard: int) -> np.ndarray:
        return np.arange(shard * SHARD, min((shard + 1) * SHARD, self.source.count))

    def _encode(self, shard: int) -> None:
        together = np.split(self._numbers(shard), range(TOGETHER, len(self._numbers(shard)), TOGETHER))
        batch = LatentBatch.joined([LatentBatch.encoded(self.codec, self.source.clips(part)) for part in together])
        about = {f.name: getattr(batch.clips, f.name) for f in fields(Clip) if f.name not in ("frames", "state")}
        write_json(self._path(shard).with_suffix(".json"), about | dict(indices=batch.clips.indices.tolist()))
        with written_whole(self._path(shard)) as temporary, open(temporary, "wb") as file:
            np.save(file, batch.latents.numpy(), allow_pickle=False)

    def _shard(self, shard: int) -> tuple[np.ndarray, Clip]:
        if shard not in self._open:
            path, count = self._path(shard), len(self._numbers(shard))
            if not path.exists():
                self._encode(shard)
            try:
                latents = np.load(path, mmap_mode="r", allow_pickle=False)
                require(latents.shape == (count, *self.shape), f"it holds {latents.shape}")
                about = read_json(path.with_suffix(".json"))
                about = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
                frames = torch.empty(count, 0, 1, 1, 3, dtype=torch.uint8)
                clips = Clip(frames, **about | dict(indices=torch.tensor(about["indices"])))
            except (ValueError, OSError, EOFError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is damaged ({first_line(error)}); delete it to have it made again") from None
            self._open[shard] = latents, clips
        return self._open[shard]


def latent_examples(
    mixture: Mixture, numbers, codec: Codec, caches: Mapping[str, LatentCache] | None = None
) -> LatentBatch:
    """Examples number `numbers` of a mixture as latents: from the cache of their source's name, or encoded now."""
    caches, (parts, order) = caches or {}, mixture.parts(numbers)
    batch = LatentBatch.joined(
        [
            caches[source.name].read(wanted)
            if source.name in caches
            else LatentBatch.encoded(codec, source.clips(wanted))
            for source, wanted in parts
        ]
    )
    return LatentBatch(batch.latents[order], batch.clips[order])


def disc_images(seed: int, batch: int, size: int) -> Iterator[Float[Tensor, "image 3 height width"]]:
    """Endless batches of frames, 4 of each of `batch` clips, one world after another, in and out of distribution.

    A published codec has seen all of the world; with one that knew no small disc every model would fail on those.
    """
    worlds = list(itertools.product((*SCENARIOS, "collision"), ("train", "ood")))
    for step in itertools.count():
        clips = np.arange(step * batch, (step + 1) * batch)
        pixels = simulate(*worlds[step % len(worlds)], clips, frames=16, size=size, seed=seed).pixels()
        first = uniform_draws(seed, "codec", clips, 0, 4).astype(int)
        frames = torch.from_numpy(first[:, None] + np.arange(0, 16, 4))  # [clip, 4]
        yield pixels.transpose(1, 2)[torch.arange(batch)[:, None], frames].flatten(0, 1)


def train_small_codec(
    folder: str | Path, *, steps: int = 1200, batch: int = 4, size: int = 32, seed: int = 0, progress: bool = True
) -> Codec:
    """A codec of 0.17 M parameters for the disc worlds, 4 x 4 pixels in 4 channels, saved as an AutoencoderKL folder.

    Its configuration says mean and deviation of its latents. batch: clips a step, of 4 frames each. For trying latents:
    it knows discs on white and nothing else. Raises ValueError for a folder that exists and settings out of range.
    """
    require(not Path(folder).exists(), f"codec folder {folder} exists; choose another name or delete it")
    require(steps > 0 and batch > 0, f"steps and batch must be positive, got {steps} and {batch}")
    keep_freed_memory()
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    blocks |= dict(block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(**blocks, latent_channels=4, scaling_factor=1.0).train()
    images, generator = disc_images(seed, batch, size), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1, pct_start=0.1)
    for _ in tqdm(range(steps), desc="codec", unit="step", disable=not progress):
        pixels = next(images)
        posterior = model.encode(pixels).latent_dist
        error = model.decode(posterior.sample(generator)).sample - pixels
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    with torch.no_grad():
        latents = torch.cat([latents_of(model.eval(), next(images)) for _ in range(16)])
    by_channel = latents.transpose(0, 1).flatten(1)
    model.register_to_config(latents_mean=by_channel.mean(1).tolist(), latents_std=by_channel.std(1).tolist())
    with written_whole(folder) as temporary:
        model.save_pretrained(temporary)
    return load_codec(folder)
