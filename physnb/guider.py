"""Head guidance for every pipeline of diffusers that takes a guider: the modular ones, HunyuanVideo 1.5, Motif-Video.

    pipe.update_components(guider=HeadGuidance(heads="L3H7,L5H1", weight=2.0, guidance_scale=5.0))

A denoising step then makes up to three predictions, one forward each: C with the prompt, U with the negative prompt and
P with the prompt and broken heads, which takes over from C the blocks before the first broken one. `physnb.guide` does
the same for pipelines that have no guider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from physnb.config import Perturbation, require
from physnb.families import check_heads
from physnb.hooks import first_layer, perturb_rows
from physnb.replay import SharedBlocks

SOURCES = {"pred_cond": 0, "pred_uncond": 1, "pred_weak": 0}  # each prediction's place in (prompt, negative prompt)


class HeadGuidance(BaseGuidance):
    """A guider that steers away from the model whose heads are broken, with or without classifier-free guidance.

        pred = C + (guidance_scale - 1) (C - U) + weight (C - P)

    heads: "L3H7,L5H1" or a list of such names. weight: 0 is off, and costs no pass; HeadHunter uses 3 to 8.
    strength, kind, axis, scope, sigma, temperature: of the broken heads; see `physnb.config.Perturbation`.
    guidance_scale: the published scale w of CFG; 1 is off, and costs no pass.
    guidance_rescale: phi in [0, 1]; pred keeps that part of the standard deviation of C.
    start, stop: the weight acts in steps int(start * steps) to int(stop * steps) - 1; CFG acts in all of them.
    enabled: False leaves C alone.
    Two experts (`guider` and `guider_2` of Wan 2.2) may share one object. A forward that raises leaves the heads of its
    model broken until the next run or call of `cleanup_models`.
    Raises ValueError for settings out of range and, at the first pass, for heads that the model lacks; RuntimeError if
    breaking the heads changes nothing.
    """

    _input_predictions: ClassVar = list(SOURCES)  # the base class wants a list, with the names that `forward` takes

    @register_to_config
    def __init__(
        self,
        heads: str | Sequence[str] = (),
        weight: float = 0.0,
        strength: float = 1.0,
        kind: str = "identity",
        axis: str = "all",
        scope: str = "all",
        sigma: Sequence[float] = (1.0, 1.0, 1.0),
        temperature: float = 4.0,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.perturbation = Perturbation(heads, strength, kind, axis, scope, sigma, temperature)
        for value in (weight, guidance_scale):
            require(math.isfinite(value), f"guidance weight and scale must be finite numbers, got {value}")
        require(0 <= guidance_rescale <= 1, f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
        require(weight == 0 or len(self.perturbation.heads) > 0, f"weight {weight} has no heads to break; name some")
        self.weight, self.guidance_scale, self.guidance_rescale = weight, guidance_scale, guidance_rescale
        self._broken = ExitStack()  # what undoes the hooks of the pass that is running
        self._shared: SharedBlocks | None = None  # what the pass of C leaves to that of P
        # One spelling, whatever form they came in: a loaded config equals the saved one. The last entry lists what
        # `from_config` may forget; the decorator puts every positional argument there.
        heads, sigma = [str(head) for head in self.perturbation.heads], list(self.perturbation.sigma)
        self.register_to_config(heads=heads, sigma=sigma, _use_default_values=[])

    @property
    def _breaks_heads(self) -> bool:
        return self._enabled and self.weight != 0 and self.perturbation.strength != 0

    def _active_predictions(self) -> list[str]:
        """The predictions of the present step, in their order; outside a step those of any step."""
        active = ["pred_cond"]
        if self._enabled and self.guidance_scale != 1:
            active.append("pred_uncond")
        if self._breaks_heads and (self._step is None or self._step in self._weak_steps()):
            active.append("pred_weak")
        return active

    def _weak_steps(self) -> range:
        return steps_between(self._start, self._stop, self._num_inference_steps)

    def _present_prediction(self) -> str:
        return self._active_predictions()[max(self._count_prepared - 1, 0)]

    @property
    def num_conditions(self) -> int:
        """Passes of the present step; outside a step the most that any step has.

        Pipelines read it before a run to decide whether to encode the negative prompt.
        """
        return len(self._active_predictions())

    @property
    def is_conditional(self) -> bool:
        """Whether the present pass has the prompt: all but that of U do."""
        return self._present_prediction() != "pred_uncond"

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Begin a step."""
        self._broken.close()  # a forward that raised in the last run left the heads broken
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Tensor | tuple[Tensor, Tensor]]) -> list[Any]:
        """One batch of model inputs (a BlockState) a pass, from tensors and (prompt, negative prompt) pairs."""
        return self._batches(lambda source, name: self._prepare_batch(data, source, name))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, str | tuple[str, str]]) -> list[Any]:
        """The same from the attributes of `data` that `input_fields` names."""
        return self._batches(
            lambda source, name: self._prepare_batch_from_block_state(input_fields, data, source, name)
        )

    def _batches(self, prepare: Callable[[int, str], Any]) -> list[Any]:
        self._broken.close()
        return [prepare(SOURCES[name], name) for name in self._active_predictions()]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Begin a pass: if it is that of P, break the heads of `denoiser` and replay what C computed before them."""
        super().prepare_models(denoiser)  # counts the passes
        self._broken.close()
        if self._breaks_heads:
            check_heads(denoiser, self.perturbation.heads)  # before the first forward, not when the weight sets in
        present = self._present_prediction()
        if present == "pred_cond" and "pred_weak" in self._active_predictions():
            self._shared = SharedBlocks(denoiser, first_layer(denoiser, self.perturbation))
            self._broken.enter_context(self._shared.recording())
        if present == "pred_weak":
            if self._shared is not None and self._shared.model is denoiser:
                self._broken.enter_context(self._shared.replaying())
            self._broken.enter_context(broken_heads(denoiser, self.perturbation))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """End a pass: the model is as it was before. Does nothing if it already is."""
        self._broken.close()

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_weak: Tensor | None = None
    ) -> GuiderOutput:
        """The guided prediction, in the dtype of C; the sums are made in float32."""
        # The step ends here. One kept for longer would answer for the next run, which begins by reading num_conditions.
        self._step, self._num_inference_steps, self._count_prepared, self._shared = None, None, 0, None
        conditional = guided = pred_cond.float()
        if pred_uncond is not None:
            guided = guided + (self.guidance_scale - 1) * (conditional - pred_uncond.float())
        if pred_weak is not None:
            guided = guided + weak_shift(pred_cond, pred_weak, self.weight, self.perturbation)
        if self.guidance_rescale > 0:
            guided = rescale_noise_cfg(guided, conditional, self.guidance_rescale)
        return GuiderOutput(pred=guided.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)


@contextmanager
def broken_heads(model: nn.Module, rows: Sequence[Perturbation | None] | Perturbation) -> Iterator[None]:
    """`perturb_rows` for one forward; a compiled model runs it uncompiled.

    Every entry would be compiled anew, and after eight of them torch.compile gives up on the model altogether.
    """
    with torch.compiler.set_stance("force_eager"), perturb_rows(model, rows):
        yield


def steps_between(start: float, stop: float, steps: int) -> range:
    """The steps of a run of `steps` that lie between two fractions of it: the first included, the last not."""
    return range(int(start * steps), int(stop * steps))


def weak_shift(conditional: Tensor, weak: Tensor, weight: float, perturbation: Perturbation) -> Tensor:
    """weight (C - P) in float32; raises RuntimeError if P equals C exactly, for guidance would then do nothing."""
    if torch.equal(conditional, weak):
        heads = ",".join(map(str, perturbation.heads))
        raise RuntimeError(
            f"breaking {heads} ({perturbation.kind}, strength {perturbation.strength}) changed no bit of the "
            "prediction, so guidance away from it does nothing. Likely reasons: an untrained model, whose "
            "zero-initialised gates or output projections hide its attention; or attention over a single token"
        )
    return weight * (conditional.float() - weak.float())
