"""Head guidance for the classic pipelines of diffusers, which combine their predictions in their own code.

    with guide(pipe, heads="L3H7,L5H1", weight=2.0):
        video = pipe(prompt, guidance_scale=5.0).frames

Inside the block a step makes one forward more, of the conditional rows with broken heads, and weight (C - P) is added
to everything that the transformer returns in that step. The coefficients with which a pipeline adds up its predictions
sum to 1, in U + w (C - U), in C + w (C - U) and with a rescaled or skipped-block term beside them; so what it
arrives at moves by exactly weight (C - P), whichever its convention and its scale, also one that it changes on the way.
Putting C + (weight / w) (C - P) in the place of C would give the same, but several pipelines do not keep their w.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from physnb.config import Perturbation, require
from physnb.families import check_heads, video_of
from physnb.guider import broken_heads, steps_between, weak_shift
from physnb.hooks import check_model, first_layer
from physnb.replay import SharedBlocks

# Read in the source of every pipeline: all that batch their predictions put the unconditional rows first, all that make
# separate calls begin a step with the conditional one.
BATCHED = (
    "CogVideoXPipeline CogVideoXImageToVideoPipeline CogVideoXVideoToVideoPipeline CogVideoXFunControlPipeline "
    "ConsisIDPipeline EasyAnimatePipeline EasyAnimateControlPipeline EasyAnimateInpaintPipeline LTXPipeline "
    "LTXImageToVideoPipeline LTXConditionPipeline LTX2Pipeline LTX2ImageToVideoPipeline MochiPipeline LattePipeline "
    "AllegroPipeline AnyFlowPipeline"
).split()
SEPARATE = (
    "WanPipeline WanImageToVideoPipeline WanVideoToVideoPipeline WanVACEPipeline WanAnimatePipeline LucyEditPipeline "
    "ChronoEditPipeline SkyReelsV2Pipeline SkyReelsV2ImageToVideoPipeline SkyReelsV2DiffusionForcingPipeline "
    "SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingVideoToVideoPipeline HeliosPipeline "
    "HunyuanVideoPipeline HunyuanVideoImageToVideoPipeline HunyuanSkyreelsImageToVideoPipeline "
    "HunyuanVideoFramepackPipeline Kandinsky5T2VPipeline Kandinsky5I2VPipeline CosmosTextToWorldPipeline "
    "CosmosVideoToWorldPipeline Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline Cosmos2_5_PredictBasePipeline "
    "Cosmos2_5_TransferPipeline"
).split()
REFUSED = {
    "HeliosPyramidPipeline": "it may scale U before it adds it, so its coefficients do not sum to 1",
    "LTXI2VLongMultiPromptPipeline": "it calls the transformer once a window of the video in every step",
}


@contextmanager
def guide(
    pipe: DiffusionPipeline, heads: Any, weight: float, *, start: float = 0.0, stop: float = 1.0, **perturbation: Any
) -> Iterator[None]:
    """Inside the block, `pipe` arrives at its own prediction plus weight (C - P), P made with `heads` broken.

    heads: "L3H7,L5H1" or names; of both experts where there are two. weight: 0 is off, and costs no forward.
    perturbation: strength, kind, axis, scope, sigma, temperature; see `physnb.config.Perturbation`.
    start, stop: acts in steps int(start * steps) to int(stop * steps) - 1 of a run. A step ends when the scheduler
    takes it, a run begins when the scheduler is given its timesteps; in pipelines that make a video piece by piece,
    each piece is a run.
    A `guidance_rescale` of the pipeline itself aims at the standard deviation of C + weight (C - P), not of C.
    Afterwards the pipeline is as it was, also after an exception. No other pipeline may use its transformer meanwhile.
    Raises ValueError for settings out of range, for a pipeline that is not known, for heads that its transformer lacks
    and inside another such block; RuntimeError if breaking the heads changes nothing or if the transformer is called
    outside a run.
    """
    broken = Perturbation(heads, **perturbation)
    require(math.isfinite(weight), f"guidance weight must be a finite number, got {weight}")
    require(weight == 0 or len(broken.heads) > 0, f"weight {weight} has no heads to break; name some")
    require(0 <= start <= stop <= 1, f"start and stop must be fractions in order, got {start} and {stop}")
    models = transformers_of(pipe)
    for model in models:
        check_heads(model, broken.heads)
        check_model(model)
        hooks = model._forward_hooks.values()
        require(
            not any(isinstance(getattr(hook, "__self__", None), Guided) for hook in hooks),
            f"{type(pipe).__name__} is already guided; put all heads into one block",
        )
    guided = Guided(pipe, broken, weight, start, stop, batches_predictions(pipe))
    with ExitStack() as stack:
        if weight != 0 and broken.strength != 0:
            stack.enter_context(watched(pipe.scheduler, guided.progress))
            stack.callback(guided.recording.close)
            for model in models:
                stack.callback(model.register_forward_pre_hook(guided.before_forward).remove)
                stack.callback(model.register_forward_hook(guided.after_forward, with_kwargs=True).remove)
        yield


def transformers_of(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The transformer of a pipeline, or both of its experts; raises ValueError where a guider is the better way."""
    name = type(pipe).__name__
    require(
        not isinstance(getattr(pipe, "guider", None), BaseGuidance),
        f"{name} takes a guider; give it a physnb.guider.HeadGuidance instead",
    )
    models = [getattr(pipe, slot, None) for slot in ("transformer", "transformer_2")]
    models = list(dict.fromkeys(model for model in models if isinstance(model, nn.Module)))
    require(len(models) > 0, f"{name} has no transformer whose heads could be broken")
    return models


def batches_predictions(pipe: DiffusionPipeline) -> bool:
    """Whether U and C are rows of one call, rather than two calls; raises ValueError for an unknown pipeline."""
    for kind in type(pipe).__mro__:
        require(kind.__name__ not in REFUSED, f"{kind.__name__} cannot be guided: {REFUSED.get(kind.__name__)}")
        if kind.__name__ in BATCHED or kind.__name__ in SEPARATE:
            return kind.__name__ in BATCHED
    raise ValueError(
        f"{type(pipe).__name__} is not known: how it batches and adds up its predictions must be read in its source "
        f"first; known are {', '.join(BATCHED + SEPARATE)}"
    )


@dataclass
class Progress:
    """Where a run is; `step` is that of the present forward, None before the first run."""

    step: int | None = None
    step_ended: bool = True

    def begin_run(self) -> None:
        self.step, self.step_ended = -1, True

    def end_step(self) -> None:
        self.step_ended = True

    def begin_call(self) -> bool:
        """Whether the present forward is the first of its step."""
        first = self.step_ended and self.step is not None
        if first:
            self.step += 1
        self.step_ended = False
        return first


@contextmanager
def watched(scheduler: Any, progress: Progress) -> Iterator[None]:
    """Inside the block, `scheduler` tells of its steps: the one thing that every pipeline does once a step."""
    kind = type(scheduler)

    def reporting(name: str, report: Callable[[], None]) -> Callable:
        method = getattr(kind, name)

        @functools.wraps(method)  # pipelines read the signature
        def call(self, *args, **kwargs):
            report()
            return method(self, *args, **kwargs)

        return call

    methods = dict(
        set_timesteps=reporting("set_timesteps", progress.begin_run), step=reporting("step", progress.end_step)
    )
    # A class, not attributes of the object: pipelines copy their scheduler, and a copy must step itself.
    scheduler.__class__ = type(kind.__name__, (kind,), methods | {"__module__": kind.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = kind


@dataclass(eq=False)
class Guided:
    """The forward hook of a guided transformer, with what it keeps from call to call of a step."""

    pipe: DiffusionPipeline
    broken: Perturbation
    weight: float
    start: float
    stop: float
    batched: bool
    progress: Progress = field(default_factory=Progress)
    halves: bool = False  # whether the first half of a batch is unconditional, in the present run
    proven: bool = False  # whether breaking the heads was seen to change the prediction, in the present run
    inside: bool = False  # whether the present forward is the one with broken heads
    shift: Tensor | None = None  # weight (C - P) of the present step
    first: bool = False  # whether the present forward is the first of its step: C, or U and C in one batch
    shared: SharedBlocks | None = None  # what that forward leaves to the one of P
    recording: ExitStack = field(default_factory=ExitStack)

    @torch.compiler.disable
    def before_forward(self, model: nn.Module, args: tuple) -> None:
        """Begin a call of the pipeline; the first of a step that is guided is the one that makes C."""
        if self.inside:
            return
        self.recording.close()  # of a forward that raised
        self.first = self.progress.begin_call()
        if self.first and self.progress.step in steps_between(self.start, self.stop, self.pipe.num_timesteps):
            self.shared = SharedBlocks(model, first_layer(model, self.broken))
            self.recording.enter_context(self.shared.recording())

    @torch.compiler.disable  # `model.compile()` would trace hooks along with the forward, and this one calls it again
    def after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """What the model returns instead of `output`; None leaves it as it is."""
        if self.inside:
            return None
        self.recording.close()
        step = self.progress.step
        if step is None or step >= (steps := self.pipe.num_timesteps):
            name = type(self.pipe).__name__
            raise RuntimeError(f"the transformer of {name} was called outside a run of it, while guided")
        if self.first and step == 0:  # later CogVideoX may have changed its guidance_scale
            self.halves, self.proven = self.batched and does_text_guidance(self.pipe), False
        if step not in steps_between(self.start, self.stop, steps):
            return None
        video = video_of(output)
        if self.first:
            rows = len(video) // 2 if self.halves else 0
            self.shift = weak_shift(video[rows:], self.weak(model, args, kwargs, rows), self.weight, self.broken)
            self.proven, self.shared = True, None
        shift = self.shift.repeat(len(video) // len(self.shift), *[1] * (video.ndim - 1))
        return with_video(output, (video.float() + shift).to(video.dtype))

    def weak(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], skipped: int) -> Tensor:
        """P: the forward again with broken heads, without the first `skipped` rows, of as many others.

        All rows run the first time in a run, since another batch size may change bits by itself and pass for an effect;
        and always where rows may be in lists, whose tensors need not belong to the batch.
        """
        self.inside = True
        try:
            if skipped and (not self.proven or hides_rows([*args, *kwargs.values()], 2 * skipped)):
                rows = [None] * skipped + [self.broken] * skipped
                with self.shared.replaying(), broken_heads(model, rows):
                    return video_of(model(*args, **kwargs))[skipped:]
            args = [later_rows(value, skipped) for value in args]
            kwargs = {name: later_rows(value, skipped) for name, value in kwargs.items()}
            with self.shared.replaying(later_half=skipped > 0), broken_heads(model, self.broken):
                return video_of(model(*args, **kwargs))
        finally:
            self.inside = False


def does_text_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline does classifier-free guidance in the run that it begins."""
    known = getattr(pipe, "do_classifier_free_guidance", None)
    return pipe.guidance_scale > 1 if known is None else known


def later_rows(value: Any, skipped: int) -> Any:
    """The second half of a tensor of 2 * `skipped` rows; anything else as it is."""
    halved = skipped and isinstance(value, Tensor) and value.ndim > 0 and len(value) == 2 * skipped
    return value[skipped:] if halved else value


def hides_rows(values: list[Any], rows: int) -> bool:
    """Whether a list, tuple or dict among `values` holds a tensor of so many rows, however deep."""
    inner = tree_leaves([value for value in values if not isinstance(value, Tensor)])
    return any(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows for leaf in inner)


def with_video(output: Any, video: Tensor) -> Any:
    """The same output with another video prediction."""
    if isinstance(output, Tensor):
        return video
    return (video, *output[1:]) if isinstance(output, tuple) else dataclasses.replace(output, sample=video)
