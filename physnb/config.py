"""Names, settings and presets that every other module shares.

Shape letters used in annotations throughout the package:
``batch`` clips, ``time`` frames, ``height`` and ``width`` pixels, ``disc`` objects, ``axis`` (x, y),
``layer`` transformer blocks, ``head`` attention heads, ``token`` space-time patches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SCENARIOS = ("uniform", "parabola", "collision")  # phyworld's, which a hunt and a reference model use by default
PHENOMENA = ("pendulum", "spring", "bounce", "drag", "orbit", "rolling", "stack", "wave", "glide")
SIMULATED = (*SCENARIOS, *PHENOMENA)  # everything with discs and a law of motion
FLUIDS = ("smoke", "flame")
CAPTION_LEVELS = ("none", "label", "description", "parameters", "law", "augmented")  # what captions say of a clip
SPLITS = ("train", "id", "ood")  # "id" has the ranges of "train" and other clips
PERTURBATION_KINDS = ("identity", "uniform", "mean_query", "blur", "temperature", "zero")
AXES = ("all", "space", "time")
SCOPES = ("all", "video_rows", "video_block")
SEARCHES = ("exhaustive", "race")
PROMISES = ("set", "head")
EXECUTORS = ("local", "ray")
SOLVERS = ("euler", "heun", "unipc", "dpmsolver++")


class HeadId(NamedTuple):
    """One attention head, printed `L3H7`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> HeadId:
        """The head that `text` names; raises ValueError unless it reads like `L3H7`."""
        match = re.fullmatch(r"L(\d+)H(\d+)", text.strip())
        if match is None:
            raise ValueError(f"head {text!r} is not of the form L<layer>H<head>, for example L3H7")
        return cls(int(match[1]), int(match[2]))


HeadSet = tuple[HeadId, ...]


def head_set(heads: str | Iterable[HeadId | str | tuple[int, int]]) -> HeadSet:
    """A sorted, hashable set of heads, from HeadIds, pairs, names or one comma-separated string.

    >>> [str(head) for head in head_set("L3H7,L0H1,L3H7")]
    ['L0H1', 'L3H7']
    """
    if isinstance(heads, str):
        heads = [name for name in heads.split(",") if name.strip()]
    return tuple(sorted({HeadId.parse(h) if isinstance(h, str) else HeadId(*h) for h in heads}))


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`: the one form of input check in the package."""
    if not condition:
        raise ValueError(message)


def choose(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value` if it is one of `allowed`; otherwise a ValueError that names what is."""
    allowed = tuple(allowed)
    require(value in allowed, f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")
    return value


@dataclass(frozen=True)
class Perturbation:
    """What is done to the heads of the weak pass; `physnb.attention` has the definition of each kind.

    heads: which heads; strength u in [0, 1]: 0 leaves attention untouched, 1 replaces it by `kind`.
    kind "identity" is PAG (every token attends to itself alone); u < 1 is SoftPAG.
    axis: "space" and "time" break attention along that axis only. scope: which rows of a sequence that the video shares
    with text are broken. sigma: of "blur", in tokens along time, height and width; inf is the mean.
    temperature: of "temperature", which divides the logits.
    """

    heads: HeadSet
    strength: float = 1.0
    kind: str = "identity"
    axis: str = "all"
    scope: str = "all"
    sigma: tuple[float, float, float] = (1.0, 1.0, 1.0)
    temperature: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", head_set(self.heads))
        object.__setattr__(self, "strength", float(self.strength))
        object.__setattr__(self, "sigma", tuple(float(s) for s in self.sigma))
        choose("perturbation kind", self.kind, PERTURBATION_KINDS)
        choose("perturbation axis", self.axis, AXES)
        choose("perturbation scope", self.scope, SCOPES)
        require(0 <= self.strength <= 1, f"perturbation strength u must be in [0, 1], got {self.strength}")
        require(
            len(self.sigma) == 3 and all(s >= 0 for s in self.sigma),
            f"sigma must be three widths >= 0, got {self.sigma}",
        )
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        require(
            self.axis == "all" or self.kind not in ("temperature", "zero"),
            f"kind {self.kind!r} has no axis; use axis 'all'",
        )
        require(
            self.scope != "video_block" or self.kind == "identity",
            f"scope 'video_block' is defined for kind 'identity' only, not {self.kind!r}",
        )

    @property
    def form(self) -> Perturbation:
        """The same perturbation without its heads and strength: what can share one pass."""
        return dataclasses.replace(self, heads=(), strength=1.0)


@dataclass(frozen=True)
class LayerSkip:
    """A weak model without some of its layers: their blocks pass on what they get (skip layer guidance, STG-R)."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(sorted({int(layer) for layer in self.layers})))
        require(all(layer >= 0 for layer in self.layers), f"layers to skip must not be negative, got {self.layers}")


@dataclass(frozen=True)
class OtherModel:
    """A weak model that is another network, by the name under which it is passed (AutoGuidance, Karras et al. 2024)."""

    name: str


Weak = Perturbation | LayerSkip | OtherModel


@dataclass(frozen=True)
class Guidance:
    """Excess weights of the one guidance formula; 0 is off everywhere.

    `pred = C + text_weight (C - U) + sum_i weight_i (C - P_i)`, with C the conditional prediction,
    U the one without caption, P_i that of weak model i: perturbed heads, skipped layers or another network.
    `physnb.guidance.excess_weight` converts published scales, for example CFG's w to text_weight = w - 1.
    start, stop: the share of the sampling steps in which guidance acts, [start, stop).
    rescale: phi in [0, 1], how far the guided prediction is brought back to the standard deviation of C.
    parallel: eta, how much of the update along C is kept; 1 keeps all, 0 is the projection of APG (Sadat et al. 2024).
    """

    text_weight: float = 0.0
    weak: tuple[tuple[float, Weak], ...] = ()
    start: float = 0.0
    stop: float = 1.0
    rescale: float = 0.0
    parallel: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weak", tuple((float(weight), weak) for weight, weak in self.weak))
        for name in ("text_weight", "start", "stop", "rescale", "parallel"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for weight in (self.text_weight, *(weight for weight, _ in self.weak), self.parallel):
            require(math.isfinite(weight), f"guidance weight must be a finite number, got {weight}")
        require(
            0 <= self.start <= self.stop <= 1,
            f"guidance must start and stop within [0, 1], in this order, got {self.start} and {self.stop}",
        )
        require(0 <= self.rescale <= 1, f"guidance rescale must be in [0, 1], got {self.rescale}")

    @classmethod
    def from_heads(cls, heads: HeadSet | str, weight: float, strength: float = 1.0, **form: Any) -> Guidance:
        """Guidance away from the model whose `heads` are broken; `form` has further settings of the Perturbation."""
        return cls(weak=((weight, Perturbation(head_set(heads), strength, **form)),))


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a VideoDiT; the counts are tokens, channels and layers, not bytes."""

    frames: int = 16
    size: int = 32  # pixels, height and width
    patch: tuple[int, int, int] = (2, 8, 8)  # frames, rows, columns of one token
    channels: int = 3
    width: int = 128  # channels of a token
    depth: int = 6  # transformer blocks
    heads: int = 8  # attention heads of a block
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        for name in ("frames", "size", "channels", "width", "depth", "heads"):
            require(getattr(self, name) > 0, f"model {name} must be positive, got {getattr(self, name)}")
        require(len(self.patch) == 3 and min(self.patch) > 0, f"patch must be three positive sizes, got {self.patch}")
        patch_t, patch_h, patch_w = self.patch
        require(
            self.frames % patch_t == 0 and self.size % patch_h == 0 and self.size % patch_w == 0,
            f"patch {self.patch} must divide frames {self.frames} and size {self.size}",
        )
        require(
            self.width % self.heads == 0 and (self.width // self.heads) % 2 == 0 and self.width // self.heads >= 6,
            f"width {self.width} must split into {self.heads} heads of an even size of at least 6",
        )


@dataclass(frozen=True)
class TextConfig:
    """What captions say and how a model reads them.

    level: one of CAPTION_LEVELS. encoder: folder or hub id of a pretrained text encoder, empty for a learned embedding
    of each word. width: channels of the encoder's embeddings. layers: transformer layers over learned words; without
    any a caption is the mean of its words, and their order is lost.
    """

    level: str = "description"
    encoder: str = ""
    width: int = 0
    layers: int = 0

    def __post_init__(self) -> None:
        choose("caption level", self.level, CAPTION_LEVELS)
        require(self.layers >= 0, f"text layers must not be negative, got {self.layers}")
        require(bool(self.encoder) == (self.width > 0), "a text encoder needs its width, and a width its encoder")
        require(not (self.encoder and self.layers), "text layers read learned words; a pretrained encoder has its own")


@dataclass(frozen=True)
class TrainConfig:
    """How a VideoDiT is trained; everything that decides the weights, and nothing else."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sources: tuple[str, ...] = SCENARIOS  # see physnb.data.catalogue
    source_weights: tuple[float, ...] = (1.0, 1.0, 1.5)  # how often each is seen; collisions are the hardest
    text: TextConfig = field(default_factory=TextConfig)
    clips: int = 0  # distinct clips of each simulated source; 0: no clip is seen twice
    codec: str = ""  # folder or hub id of an autoencoder: the model's sizes are then those of its latents
    steps: int = 3000
    batch: int = 16  # clips a step, over all processes together
    learning_rate: float = 3e-3  # AdamW: embeddings, modulations, output, biases
    matrix_learning_rate: float = 1e-2  # Muon: the matrices of attention and MLP
    warmup_steps: int = 200
    decay_fraction: float = 0.8  # last part of training in which the learning rate falls to 0
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.999  # a memory of 1,000 steps: too long for runs of a few thousand
    frames_given: int = 3  # start frames of most clips
    vary_frames_given: float = 0.03  # chance of 1 to 6 start frames instead
    start_drop: float = 0.03  # chance of no start frames
    caption_drop: float = 0.1  # chance of no caption
    noise_shift: float = 30.0  # sigma -> shift sigma / (1 + (shift - 1) sigma)
    sigma_floor: float = 0.5  # the loss weight 1 / sigma^2 grows no further below this noise level
    start: str = ""  # fingerprint of the model whose weights training begins with; empty: random ones
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in dict(model=ModelConfig, text=TextConfig).items():
            if isinstance(getattr(self, name), dict):
                object.__setattr__(self, name, from_json(kind, getattr(self, name)))
        for name in ("sources", "source_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(len(self.sources) > 0, "sources must name at least one source of clips")
        require(
            len(self.sources) == len(self.source_weights) and min(self.source_weights) > 0,
            f"source_weights {self.source_weights} must give a positive weight to each of {self.sources}",
        )
        for name in ("steps", "batch"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("learning_rate", "matrix_learning_rate"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("seed", "clips"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("start_drop", "caption_drop", "vary_frames_given", "decay_fraction", "ema_decay"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)}")
        require(
            0 <= self.frames_given < self.model.frames,
            f"frames_given must be in [0, {self.model.frames - 1}], got {self.frames_given}",
        )


@dataclass(frozen=True)
class HuntConfig:
    """How heads are hunted and the hunted set is judged."""

    scenarios: tuple[str, ...] = SCENARIOS
    split: str = "ood"
    objective: str = "tracking_error"  # see physnb.objectives
    selection_cases: int = 24  # a scenario; heads are chosen on these
    confirmation_cases: int = 64  # a scenario; the final table is made on these, never on the others
    top_k: int = 8  # heads that a round keeps
    rounds: int = 1  # HeadHunter's R: later rounds add heads to those kept before
    search: str = "exhaustive"  # or "race": heads that can no longer reach the top k get no further cases
    confidence: float = 0.9  # of a race: the chance that what it promises is what the exhaustive search finds
    promise: str = "set"  # of a race: the same top k as a whole; or "head": for each of them, that it is found
    budget: int = 0  # rows (trial and case) that choosing may take; 0: as many as it needs
    weight: float = 2.0  # guidance weight w
    strength: float = 1.0  # perturbation strength u
    kind: str = "identity"  # of the perturbation
    axis: str = "all"
    steps: int = 5  # sampling steps
    random_draws: int = 3  # random head sets in the controls
    frames_given: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scenarios", tuple(self.scenarios))
        for scenario in self.scenarios:
            choose("scenario", scenario, SIMULATED)
        require(len(self.scenarios) > 0, "scenarios must name at least one scenario")
        choose("split", self.split, SPLITS)
        choose("search", self.search, SEARCHES)
        choose("promise", self.promise, PROMISES)
        counts = ("selection_cases", "confirmation_cases", "top_k", "rounds", "steps", "random_draws", "frames_given")
        for name in counts:
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(0 < self.confidence < 1, f"confidence must be in (0, 1), got {self.confidence}")
        for name in ("budget", "seed"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        self.guidance(())  # refuses a weight, strength, kind or axis out of range

    def guidance(self, heads: HeadSet, weight: float | None = None, strength: float | None = None) -> Guidance:
        """Guidance away from the model whose `heads` are broken; weight, strength: if not the hunt's own."""
        w, u = self.weight if weight is None else weight, self.strength if strength is None else strength
        return Guidance.from_heads(heads, w, u, kind=self.kind, axis=self.axis)


@dataclass(frozen=True)
class Preset:
    """One row of the table below: a training and a hunt of matching size."""

    train: TrainConfig
    hunt: HuntConfig


DIT_SHAPES = {  # Peebles and Xie (2022), table 1
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "xl": dict(width=1152, depth=28, heads=16),
}


def _preset(model: dict, train: dict, hunt: dict) -> Preset:
    return Preset(TrainConfig(model=ModelConfig(**model), **train), HuntConfig(**hunt))


FINE_WEIGHTS = (1.0, 1.0, 2.0, *[1 / 6] * len(PHENOMENA))  # collisions are the hardest
FINE_SHAPE = dict(frames=16, size=64, patch=(2, 16, 16), width=128, depth=6, heads=8)
FINE_HUNT = dict(selection_cases=64, confirmation_cases=256)
POLISHING = dict(  # a learning rate that goes to nothing, from weights that --start names
    sources=SIMULATED,
    learning_rate=1e-3,
    matrix_learning_rate=3e-3,
    warmup_steps=100,
    decay_fraction=1.0,
    ema_decay=0.998,
)

# What each preset reached is in the README, with the command that measured it.
PRESETS: dict[str, Preset] = {
    # seconds on a CPU: for tests and for notebooks at their defaults
    "smoke": _preset(
        dict(frames=8, size=16, patch=(2, 8, 8), width=32, depth=2, heads=4),
        dict(steps=20, batch=4, warmup_steps=5),
        dict(selection_cases=4, confirmation_cases=6, top_k=2, steps=2, random_draws=2),
    ),
    # about 10 minutes of training on 2 cores: what `make run` uses
    "quick": _preset(
        dict(frames=16, size=32, patch=(2, 8, 8), width=128, depth=6, heads=8),
        dict(steps=2800, batch=8, source_weights=(1.0, 1.0, 1.0), ema_decay=0.99),
        dict(selection_cases=24, confirmation_cases=64),
    ),
    # two hours on 2 cores: what the committed reference model was refined from
    "full": _preset(
        dict(frames=16, size=32, patch=(2, 8, 8), width=128, depth=6, heads=8),
        dict(steps=17_000, batch=16, ema_decay=0.998),
        dict(selection_cases=64, confirmation_cases=256, steps=10),
    ),
    # an hour more on one core, from the weights of "full" (--start): the committed reference model
    "refine": _preset(
        dict(frames=16, size=32, patch=(2, 8, 8), width=128, depth=6, heads=8),
        dict(
            steps=6000,
            batch=16,
            source_weights=(1.0, 1.25, 1.0),
            learning_rate=1e-3,
            matrix_learning_rate=3e-3,
            warmup_steps=100,
            decay_fraction=1.0,
            ema_decay=0.998,
            noise_shift=8.0,
            seed=1,
        ),
        dict(selection_cases=64, confirmation_cases=256, steps=10),
    ),
    # two hours on 2 cores, from the weights of "refine" (--start): finer pixels, the phenomena beside the worlds
    "fine": _preset(
        FINE_SHAPE,
        dict(
            sources=SIMULATED,
            source_weights=FINE_WEIGHTS,
            steps=14_000,
            batch=16,
            learning_rate=2e-3,
            matrix_learning_rate=6e-3,
            decay_fraction=0.9,
            ema_decay=0.998,
            noise_shift=16.0,
            seed=2,
        ),
        FINE_HUNT,
    ),
    # an hour more on one core, from the weights that "fine" has after 11,000 steps (--keep 11000), at higher noise
    "polish": _preset(
        FINE_SHAPE,
        POLISHING | dict(source_weights=(1.0, 1.0, 2.0, *[0.1] * len(PHENOMENA)), steps=6000, batch=16, seed=3),
        FINE_HUNT,
    ),
    # and more on two cores (torchrun --nproc_per_node=2), from the weights of "polish": collisions above all
    "collide": _preset(
        FINE_SHAPE,
        POLISHING | dict(source_weights=(1.0, 1.0, 4.0, *[0.1] * len(PHENOMENA)), steps=8000, batch=32, seed=4),
        FINE_HUNT,
    ),
    # minutes: the small model that AutoGuidance steers "fine" away from
    "small": _preset(
        dict(frames=16, size=64, patch=(2, 16, 16), width=64, depth=3, heads=4),
        dict(sources=SIMULATED, source_weights=FINE_WEIGHTS, steps=3000, batch=16, ema_decay=0.99, noise_shift=16.0),
        dict(),
    ),
    # phyworld's scale (32 frames, DiT-S); needs GPUs and was never run here
    "paper": _preset(
        dict(frames=32, size=128, patch=(2, 8, 8), width=384, depth=12, heads=6),
        dict(
            steps=100_000, batch=256, learning_rate=1e-4, matrix_learning_rate=1e-3, warmup_steps=2000, ema_decay=0.9999
        ),
        dict(selection_cases=256, confirmation_cases=1024, steps=20),
    ),
}
# phyworld's models in the latents of a codec with 8 x 8 pixels and 4 frames a latent and 4 channels (--codec)
PRESETS |= {
    f"paper-{name}": _preset(
        dict(frames=8, size=16, patch=(1, 2, 2), channels=4, **shape),
        dict(steps=100_000, batch=256, learning_rate=1e-4, matrix_learning_rate=1e-3, ema_decay=0.9999, frames_given=5),
        dict(selection_cases=256, confirmation_cases=1024, steps=20),
    )
    for name, shape in DIT_SHAPES.items()
}


def preset(name: str) -> Preset:
    """The preset called `name`; raises ValueError naming the presets there are."""
    return PRESETS[choose("preset", name, PRESETS)]


def to_json(config: Any) -> str:
    """Any of the dataclasses above as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(kind: type, values: str | dict[str, Any]) -> Any:
    """The dataclass `kind` from `to_json`'s text or a dict; unknown keys raise ValueError."""
    values = json.loads(values) if isinstance(values, str) else values
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    require(not unknown, f"unknown {kind.__name__} setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return kind(**values)
