"""Training a VideoDiT: rectified flow on clips of any sources, on one process or many, resumable bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, PartialState
from jaxtyping import Float
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from physnb.ahead import run_ahead
from physnb.captioning import Captioner, Captions
from physnb.checkpoint import fingerprint, save_model
from physnb.codec import LatentCache, latent_examples
from physnb.config import TextConfig, TrainConfig, from_json, require, to_json
from physnb.data import Mixture, normal_noise, uniform_draws
from physnb.data.catalogue import open_source, words_of_sources
from physnb.flow import add_noise, shift_levels, velocity_loss
from physnb.grow import finer_by, grow, shape_config
from physnb.memory import keep_freed_memory
from physnb.model import VideoDiT
from physnb.optimizer import Muon
from physnb.sharding import gather, shard_like
from physnb.space import open_space
from physnb.store import cache_folder, prepare_folder, read_json, read_tensors, write_json, write_tensors

STATE_FILE = "state.safetensors"
CONFIG_FILE = "train.json"
EXPLODED = 50.0  # a loss this many times its running mean stops the run
MOMENTS = ("momentum", "exp_avg", "exp_avg_sq", "step")  # what Muon and AdamW remember of a parameter's gradients
MADE_TOGETHER = 64  # clips of training that are made at once
CHECKPOINTED = "_checkpoint_wrapped_module."  # what activation checkpointing puts into the names of weights
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class TrainBatch:
    """What one step learns from; every row is a function of (seed, index) alone."""

    clean: Float[Tensor, "batch channel time height width"]
    noise: Float[Tensor, "batch channel time height width"]
    sigma: Float[Tensor, " batch"]
    given: Float[Tensor, "batch time"]
    caption: Captions


@lru_cache(maxsize=4)
def training_stream(config: TrainConfig) -> Mixture:
    """The examples that a configuration is trained on; opens its sources."""
    space = open_space(config.model, config.codec)
    shape = dict(frames=space.frames, size=space.size)
    given = dict(seed=config.seed, count=config.clips or None)
    sources = tuple(open_source(name, **shape, **given) for name in config.sources)
    return Mixture(sources, config.source_weights, config.seed)


@lru_cache(maxsize=4)
def latent_caches(config: TrainConfig) -> dict[str, LatentCache]:
    """Of every source with an end the latents, encoded once: by name of the source."""
    codec, sources = open_space(config.model, config.codec).codec, training_stream(config).sources
    known = dict(seed=config.seed, sources=config.sources)
    return {s.name: LatentCache(codec, s, cache_folder("latents"), known) for s in sources if s.count is not None}


@lru_cache(maxsize=4)
def training_captioner(config: TrainConfig) -> Captioner:
    """How the captions of a training are written and encoded: its vocabulary is that of its sources."""
    sources = () if config.text.encoder else training_stream(config).sources
    return Captioner(config.text, words_of_sources(sources, config.text.level))


def make_batch(config: TrainConfig, indices: np.ndarray) -> TrainBatch:
    """Training examples number `indices`: clips, noise, noise levels, and which conditions are dropped."""
    seed, space, stream = config.seed, open_space(config.model, config.codec), training_stream(config)
    if space.codec is None:
        clip = stream.examples(indices)
        clean = clip.pixels()
    else:
        encoded = latent_examples(stream, indices, space.codec, latent_caches(config))
        clip, clean = encoded.clips, encoded.latents
    # Neighbouring examples get well-spread noise levels: fractions of the golden ratio, less noisy than chance.
    first = uniform_draws(seed, "sigma", np.zeros(1))
    unit = torch.from_numpy((first + indices * GOLDEN_RATIO) % 1.0).float()
    sigma = shift_levels(1 - unit, config.noise_shift)  # in (0, 1]

    count = np.full(len(indices), space.given(config.frames_given))
    chance = uniform_draws(seed, "start", indices)
    some = np.floor(uniform_draws(seed, "start/count", indices, 1, min(6, config.model.frames - 1) + 1)).astype(int)
    count = np.where(chance < config.start_drop + config.vary_frames_given, some, count)
    count = np.where(chance < config.start_drop, 0, count)
    given = (torch.arange(config.model.frames)[None] < torch.from_numpy(count)[:, None]).float()

    dropped = uniform_draws(seed, "caption", indices) < config.caption_drop
    captioner = training_captioner(config)
    written = captioner.write(clip, seed)
    captions = ["" if drop else caption for drop, caption in zip(dropped, written, strict=True)]
    noise = normal_noise(seed, "noise", indices, tuple(clean.shape[1:]))
    return TrainBatch(clean, noise, sigma, given, captioner.encode(captions))


def make_block(config: TrainConfig, place: int, rows: int, steps: range) -> dict[str, np.ndarray]:
    """The batches of several steps in one: what `make_batch` makes of the examples that one process sees in them."""
    starts = np.array(steps) * config.batch + place * rows
    made = make_batch(config, (starts[:, None] + np.arange(rows)).ravel())
    return {name: value.numpy() for name, value in vars(made).items()}


def make_batches(
    config: TrainConfig, first_step: int = 0, place: int = 0, rows: int = 0, workers: int = 0
) -> Iterator[TrainBatch]:
    """The batches of step `first_step` and all later ones; place, rows: the share of one process, by default all.

    Several are made at once, because many sources cost less for many clips. Always the same ones together, so that a
    resumed run sees every bit of a caption's padding again. workers: processes that make them ahead of time; none: they
    are made when they are asked for.
    """
    rows = rows or config.batch
    together = max(1, MADE_TOGETHER // rows)
    blocks = [range(k, k + together) for k in range(first_step - first_step % together, config.steps, together)]
    work = partial(make_block, config, place, rows)
    for steps, made in zip(blocks, run_ahead(work, blocks, workers) if workers else map(work, blocks), strict=True):
        parts = {name: torch.from_numpy(value).split(rows) for name, value in made.items()}
        for number, step in enumerate(steps):
            if step >= first_step:
                yield TrainBatch(**{name: part[number] for name, part in parts.items()})


def schedule(config: TrainConfig, step: int) -> float:
    """The share of the peak learning rates: linear warm-up, constant, linear to 0 over the last `decay_fraction`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.steps - step) / max(1.0, config.decay_fraction * config.steps)
    return min(warm, left, 1.0)


class TrainState:
    """Weights, their running average and the optimiser's moments: all that a resumed run needs besides the config."""

    def __init__(self, config: TrainConfig, start: VideoDiT | None = None):
        self.config, self.step, self.mean_loss = config, 0, math.nan
        torch.manual_seed(config.seed)  # initial weights
        text = None if config.text == TextConfig() else asdict(config.text)
        vocabulary = training_captioner(config).vocabulary
        latents = dict(codec=config.codec, pixel_mean=0.0) if config.codec else {}
        given = dict(vocabulary=vocabulary, noise_shift=config.noise_shift, text=text)
        self.model = VideoDiT(**asdict(config.model), **given, **latents)
        if start is not None:
            grow(start, self.model)
        self.average = self.copy_weights()
        layers = [part for block in self.model.blocks for part in (block.attn, block.mlp)]
        matrices = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
        others = set(self.model.parameters()).difference(matrices)
        others = [p for p in self.model.parameters() if p in others]  # in the model's order
        groups = [
            dict(params=[p for p in others if p.ndim > 1], weight_decay=config.weight_decay),
            dict(params=[p for p in others if p.ndim <= 1], weight_decay=0.0),
        ]
        self.optimizers = (
            Muon(matrices, lr=config.matrix_learning_rate, weight_decay=config.weight_decay),
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True),
        )
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def prepare(self, accelerator: Accelerator) -> tuple[torch.nn.Module, list]:
        """Model and optimisers as the accelerator trains them; FSDP2 makes shards of this state's weights.

        Comes before `load`: moments of whole weights would be lost.
        """
        self.model.to(accelerator.device)
        model, *optimizers = accelerator.prepare(self.model, *self.optimizers)
        self.average = self.copy_weights()
        return model, optimizers

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The parameters by the names that they have in a model without activation checkpointing."""
        return {name.replace(CHECKPOINTED, ""): value for name, value in self.model.named_parameters()}

    def copy_weights(self) -> dict[str, Tensor]:
        """The weights of now, cut over processes as the parameters are."""
        return {name: value.detach().clone() for name, value in self.weights().items()}

    def set_rates(self, share: float) -> None:
        """Every learning rate at a share of its peak."""
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = share * peak

    def update_average(self) -> None:
        """Exponential moving average of the weights, with a shorter memory at the start."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        parameters = self.weights()
        torch._foreach_lerp_(
            [self.average[name] for name in parameters], [p.detach() for p in parameters.values()], 1 - decay
        )

    def averaged_model(self) -> VideoDiT:
        """A whole copy of the model with the averaged weights, ready to generate; all processes have to call this."""
        model = VideoDiT(**{k: v for k, v in self.model.config.items() if not k.startswith("_")})
        model.load_state_dict({name: gather(value) for name, value in self.average.items()})
        return model.to(self.model.device).eval()

    def moments(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """What the optimiser of `parameter` remembers of its gradients."""
        return next(o for o in self.optimizers if parameter in o.state).state[parameter]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, average and moments, by their names in a saved state."""
        for name, parameter in self.weights().items():
            yield f"model.{name}", parameter.detach()
            yield f"average.{name}", self.average[name]
            for moment, value in self.moments(parameter).items():
                yield f"{moment}.{name}", value

    def save(self, path: Path, write: bool = True) -> None:
        """Write what `load` reads, the same file sharded or not; all processes have to call this, and one writes."""
        tensors = {}
        for name, value in self.tensors():
            whole = gather(value)
            if write:
                tensors[name] = whole.cpu()
        if write:
            progress = dict(step=str(self.step), mean_loss=repr(self.mean_loss), config=to_json(self.config))
            write_tensors(path, tensors, progress)

    def load(self, path: Path) -> None:
        """Continue from `path`; raises ValueError if it is damaged or belongs to another configuration."""
        tensors, progress = read_tensors(path)
        require(progress.get("config") == to_json(self.config), f"{path} was saved with another configuration")
        self.step, self.mean_loss = int(progress["step"]), float(progress["mean_loss"])
        names = {parameter: name for name, parameter in self.weights().items()}
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(shard_like(tensors[f"model.{name}"], parameter))
                self.average[name].copy_(shard_like(tensors[f"average.{name}"], parameter))
            for optimizer in self.optimizers:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    found = {name: tensors.get(f"{name}.{names[parameter]}") for name in MOMENTS}
                    optimizer.state[parameter] = {
                        name: shard_like(value, parameter) for name, value in found.items() if value is not None
                    }


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    start: VideoDiT | None = None,
    resume: bool = False,
    save_every: int = 250,
    sample_every: int = 0,
    on_sample: Callable[[VideoDiT, int, Path], dict[str, float]] | None = None,
    keep: Collection[int] = (),
    stop_after: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> VideoDiT:
    """The trained model, with averaged weights; `folder` keeps state, log and, at the end, the model.

    start: the model whose weights training begins with, where the config names one by its fingerprint; the one to
    train may be finer, deeper and know more words (`physnb.grow`).
    resume continues a stopped run to the same weights, bit for bit on a CPU. on_sample(model, step, folder) is called
    every `sample_every` steps and its numbers are logged. keep: steps after which the model is kept as `model-STEP`
    in the folder, for AutoGuidance. stop_after ends this call early, as an interruption would.
    workers: processes of each training process that make batches ahead; the weights do not depend on them.
    Launched by `torchrun` or `accelerate launch`, the processes share each batch; with physnb/launch/sharded.yaml
    they also share weights, average and moments. Both ran on CPU processes; on several GPUs it was not run.
    Raises ValueError for a used folder, a foreign state, another start than the config names or one that does not grow
    to it, a batch that the processes cannot share evenly, or another sharding than FSDP2, and
    FloatingPointError when the loss is not finite or explodes; the last saved state is then kept.
    """
    keep_freed_memory()
    accelerator = Accelerator(cpu=without_accelerator(), log_with=None)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    require(not sharded or accelerator.is_fsdp2, "weights are sharded by FSDP2 alone; set fsdp_version to 2")
    folder = Path(folder)
    check_start(config, start)
    beyond = [step for step in keep if not 0 < step <= config.steps]
    require(not beyond, f"a model can be kept after step 1 to {config.steps}, not after {beyond[:1]}")
    if accelerator.is_main_process:
        prepare_folder(folder, resume=resume)
        if resume and (folder / CONFIG_FILE).exists():
            stored = from_json(TrainConfig, read_json(folder / CONFIG_FILE))
            require(stored == config, f"{folder} holds a run with another configuration; choose another folder")
        write_json(folder / CONFIG_FILE, json.loads(to_json(config)))
    accelerator.wait_for_everyone()
    rows = config.batch // accelerator.num_processes
    require(
        rows * accelerator.num_processes == config.batch,
        f"batch {config.batch} does not split over {accelerator.num_processes} processes; change --batch",
    )
    state = TrainState(config, start)
    model, optimizers = state.prepare(accelerator)
    if resume and (folder / STATE_FILE).exists():
        state.load(folder / STATE_FILE)
    model.train()
    main = accelerator.is_main_process
    log = SummaryWriter(folder / "log", purge_step=state.step + 1) if main else None
    bar = tqdm(total=config.steps, initial=state.step, disable=not (progress and main), unit="step", mininterval=1)

    batches = make_batches(config, state.step, accelerator.process_index, rows, workers)
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    while state.step < last:
        state.set_rates(schedule(config, state.step))
        loss, norm = train_step(accelerator, model, optimizers, config, next(batches))
        check_loss(loss, norm, state, folder)
        state.step += 1
        state.mean_loss = loss if math.isnan(state.mean_loss) else 0.98 * state.mean_loss + 0.02 * loss
        state.update_average()
        bar.update()
        bar.set_postfix(loss=f"{state.mean_loss:.4f}", refresh=False)
        if main:
            log.add_scalar("loss", loss, state.step)
            log.add_scalar("learning_rate", config.learning_rate * schedule(config, state.step - 1), state.step)
        if state.step % save_every == 0 or state.step == last:
            state.save(folder / STATE_FILE, write=main)
        if state.step in keep:
            early, place = state.averaged_model(), folder / f"model-{state.step}"
            if main and not place.exists():  # a run that was stopped may pass the step twice
                save_model(early, place)
        if on_sample is not None and sample_every and state.step % sample_every == 0:
            averaged = state.averaged_model()
            for name, value in (on_sample(averaged, state.step, folder) if main else {}).items():
                log.add_scalar(name, value, state.step)
    bar.close()
    if main:
        log.close()
    accelerator.wait_for_everyone()
    return state.averaged_model()


def check_start(config: TrainConfig, start: VideoDiT | None) -> None:
    """Raise ValueError unless `start` is the model that the config names and can be grown to the one to train."""
    found = "" if start is None else fingerprint(start)
    require(found == config.start, f"training starts from model {found or 'none'}, the config says {config.start!r}")
    if start is not None:
        finer_by(shape_config(start), config.model)


def batch_loss(model: torch.nn.Module, batch: TrainBatch, config: TrainConfig) -> Float[Tensor, ""]:
    """The mean velocity loss of a model on one batch, over the frames it has to predict."""
    noised = add_noise(batch.clean, batch.noise, batch.sigma)
    predicted = model(noised, batch.sigma, batch.clean, batch.given, batch.caption).sample
    return velocity_loss(predicted, batch.clean, batch.sigma, 1 - batch.given, config.sigma_floor).mean()


def train_step(accelerator, model, optimizers, config: TrainConfig, batch: TrainBatch):
    """One step of all optimisers; the loss over all processes and the norm of the gradient before clipping."""
    batch = TrainBatch(**{name: value.to(accelerator.device) for name, value in vars(batch).items()})
    loss = batch_loss(model, batch, config)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
    loss = float(accelerator.reduce(loss.detach(), "mean"))
    if math.isfinite(loss) and math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad()
    return loss, float(norm)


def check_loss(loss: float, norm: float, state: TrainState, folder: Path) -> None:
    """Stop on a loss that is not finite or exploded; nothing is saved after the damage."""
    exploded = state.step > state.config.warmup_steps and loss > EXPLODED * state.mean_loss
    if exploded or not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"training stopped at step {state.step}: loss {loss:.4g}, gradient norm {norm:.4g}, running loss "
            f"{state.mean_loss:.4g}; the last good state is in {folder / STATE_FILE}, try a lower learning rate"
        )


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that `torchrun` or `accelerate launch` started."""
    return PartialState(cpu=without_accelerator()).is_main_process  # whoever asks first decides for all


def without_accelerator() -> bool:
    """What accelerate has to be told, or it ignores the launcher on such a machine: every process is alone."""
    return not torch.accelerator.is_available()


def read_history(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every number logged in a run folder's TensorBoard log, by name."""
    log = EventAccumulator(str(Path(folder) / "log"))
    log.Reload()
    events = {name: log.Scalars(name) for name in log.Tags()["scalars"]}
    return {name: ([e.step for e in series], [e.value for e in series]) for name, series in events.items()}
