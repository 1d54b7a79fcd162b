"""Pretrained models of diffusers by folder, hub id or `tiny:NAME`: their heads, their clips, what each head changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline, ModularPipeline
from jaxtyping import Float
from torch import Tensor, nn

from physnb.checkpoint import CONFIG, load_model
from physnb.config import HeadId, HeadSet, Perturbation, require
from physnb.data import Clip, hash_draws
from physnb.families import FAMILIES, REFUSED, attention_layers, family_of, heads_of, video_of
from physnb.guide import Progress, batches_predictions, transformers_of, watched
from physnb.guider import broken_heads
from physnb.hooks import IDENTITY, check_model
from physnb.hub import INDEX, LOADING_ERRORS, TINY, check_source, first_line
from physnb.store import read_json
from physnb.tiny import tiny_model
from physnb.tiny_pipelines import tiny_pipeline

OTHERS = {"none": "video only", "first": "others, then video", "last": "video, then others"}


def load_transformer(source: str | Path) -> nn.Module:
    """The video transformer of a model folder (ours, a diffusers model or pipeline), a hub id or `tiny:FAMILY`.

    Weights are safetensors; nothing is unpickled. Raises ValueError saying what is wrong with the source.
    """
    source = str(source)
    if source.startswith(TINY):
        return tiny_model(source.removeprefix(TINY))
    folder = check_source(source)
    is_model = folder.is_dir() and not (folder / INDEX).exists()  # rather than a pipeline or a hub id
    if is_model:
        config = read_json(folder / CONFIG)
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind == "VideoDiT":
            return load_model(folder)
        require(
            kind in FAMILIES or kind in REFUSED,
            f"{folder / CONFIG} describes a {kind}, which is no known video transformer; choose another checkpoint",
        )
    try:
        model = AutoModel.from_pretrained(source, subfolder=None if is_model else "transformer", use_safetensors=True)
    except LOADING_ERRORS as error:
        raise ValueError(f"no transformer could be loaded from {source}: {first_line(error)}") from None
    return model.eval()


def load_pipeline(source: str | Path, **settings: Any) -> DiffusionPipeline:
    """The whole pipeline of a folder, a hub id or `tiny:NAME` (see `physnb.tiny_pipelines.PIPELINES`).

    settings: of `DiffusionPipeline.from_pretrained`, for example dtype=torch.bfloat16, or components to use
    instead of the saved ones (vae=...). Weights are safetensors; nothing is unpickled.
    Raises ValueError saying what is wrong with the source.
    """
    source = str(source)
    if source.startswith(TINY):
        require(not settings, f"{source} is built as it is; leave out {', '.join(settings)}")
        return tiny_pipeline(source.removeprefix(TINY))
    folder = check_source(source)
    if folder.is_dir():
        check_index(folder, settings)
    try:
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **settings)
    except LOADING_ERRORS as error:
        raise ValueError(f"no pipeline could be loaded from {source}: {first_line(error)}") from None


def check_index(folder: Path, replaced: dict[str, Any]) -> None:
    """Raise ValueError unless a folder holds a pipeline of diffusers with all components that are not `replaced`."""
    require(
        (folder / INDEX).exists(),
        f"{folder} is not a pipeline: it has no {INDEX}; for a transformer alone use load_transformer",
    )
    index = read_json(folder / INDEX)
    name = index.get("_class_name") if isinstance(index, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    require(
        isinstance(kind, type) and issubclass(kind, DiffusionPipeline),
        f"{folder / INDEX} describes a {name}, which is no pipeline of diffusers {diffusers.__version__}",
    )
    for part, origin in index.items():
        saved = isinstance(origin, list) and len(origin) == 2 and None not in origin  # [library, class]
        require(
            not saved or part in replaced or (folder / part).is_dir(),
            f"the pipeline in {folder} lacks its {part}; copy the folder again",
        )


def head_report(model: nn.Module) -> dict[str, Any]:
    """The heads of a model: its layers with their paths and tokens, or the reason why they cannot be broken."""
    report: dict[str, Any] = dict(model=type(model).__name__, supported=True, reason="")
    try:
        layers = attention_layers(model)
        check_model(model)
    except ValueError as error:
        return report | dict(supported=False, reason=str(error), layers=[], heads=[])
    family = family_of(model)
    tokens = OTHERS.get(family.others, "video among others")
    axes = dict(thw="time x height x width", hw="height x width", t="time")
    rows = [dict(path=layer.path, heads=layer.heads, tokens=tokens, grid=axes[layer.axes]) for layer in layers]
    names = [str(HeadId(number, head)) for number, layer in enumerate(layers) for head in range(layer.heads)]
    return report | dict(layers=rows, heads=names)


def case_generator(seed: int, number: int) -> torch.Generator:
    """The generator of case `number`: on the CPU, so that every device gets the same noise."""
    require(seed >= 0, f"seed must not be negative, got {seed}")
    return torch.Generator().manual_seed(int(hash_draws(seed, "pipeline", np.array([number]))[0] >> np.uint64(1)))


def generate_clips(
    pipe: DiffusionPipeline | ModularPipeline, prompts: Sequence[str], *, seed: int, steps: int, fps: float, **settings
) -> Clip:
    """One clip a prompt, as `pipe` makes them at this moment: guided inside `guide`, broken inside `perturb_rows`.

    fps: frames per second that the model was trained for; a pipeline does not know it.
    settings: further arguments of the pipeline's call, for example height, width, num_frames, guidance_scale.
    Case i is (seed, i, prompt) and runs alone with `case_generator(seed, i)`: no clip depends on the others. Scenario
    is "prompt", bucket "id".
    Raises ValueError for settings out of range and for frames that are no video of finite numbers.
    """
    require(not isinstance(prompts, str) and len(prompts) > 0, "prompts must be a list of at least one text")
    require(steps > 0 and fps > 0, f"steps and fps must be positive, got {steps} and {fps}")
    videos = []
    for number, prompt in enumerate(prompts):
        call = dict(prompt=prompt, num_inference_steps=steps, generator=case_generator(seed, number), output_type="np")
        if isinstance(pipe, ModularPipeline):
            video = pipe(**call, **settings, output="videos")
        else:
            video = pipe(**call, **settings, return_dict=False)[0]
        video = np.asarray(video)
        require(
            video.ndim == 5 and video.shape[-1] == 3 and bool(np.isfinite(video).all()),
            f"{type(pipe).__name__} made no video of finite numbers for {prompt!r}; half precision may overflow: try "
            "torch.bfloat16, with the vae in torch.float32",
        )
        videos.append(torch.from_numpy((video * 255).round().astype(np.uint8)))
    frames = torch.cat(videos)
    require(len(frames) == len(prompts), f"prompts and clips are {len(prompts)} and {len(frames)}; ask for one each")
    names = {name: (value,) * len(frames) for name, value in (("scenarios", "prompt"), ("buckets", "id"))}
    return Clip(frames, captions=tuple(prompts), indices=torch.arange(len(frames)), fps=fps, **names)


@torch.no_grad()
def head_effects(
    pipe: DiffusionPipeline,
    prompt: str,
    *,
    seed: int,
    steps: int,
    at: Sequence[int],
    together: int = 1,
    form: Perturbation = IDENTITY,
    **settings: Any,
) -> Float[Tensor, "layer head"]:
    """How far breaking each head alone moves the prediction: |C - P| / |C|, averaged over the steps `at` of one run.

    The run itself is unguided; 0 means that a head changes no bit. together: how many heads share a forward. The batch
    then holds the prompt as often, all rows with the same noise and each with another head broken.
    form: what is done to a head, at which strength; its own heads are not read. settings: of the pipeline's call.
    NaN stands where a layer has fewer heads than another. Raises ValueError for settings out of range, for a pipeline
    that `guide` refuses and for predictions that are not finite.
    Leaves out whether the change is for the better, how it grows over steps, and what heads do together.
    """
    require(len(at) > 0 and 0 <= min(at) and max(at) < steps, f"at must be steps from 0 to {steps - 1}, got {at}")
    require(together > 0, f"together must be positive, got {together}")
    models, measured = transformers_of(pipe), []
    batches_predictions(pipe)  # refuses pipelines whose first call of a step may not be the conditional one
    for model in models:
        check_model(model)
    heads = heads_of(models[0])
    progress, inside = Progress(), False

    @torch.compiler.disable  # see physnb.guide: a hook that calls its model again must not be traced
    def look(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal inside
        if inside or not progress.begin_call() or progress.step not in at:
            return
        inside = True
        try:
            measured.append(relative_changes(model, args, kwargs, output, heads, together, form))
        finally:
            inside = False

    handles = [model.register_forward_hook(look, with_kwargs=True) for model in models]
    try:
        with watched(pipe.scheduler, progress):
            generators = [case_generator(seed, 0) for _ in range(together)]
            pipe([prompt] * together, num_inference_steps=steps, generator=generators, output_type="latent", **settings)
    finally:
        for handle in handles:
            handle.remove()
    require(len(measured) >= len(set(at)), f"the run had fewer steps than {max(at) + 1}; measure at earlier ones")
    effects = torch.stack(measured).mean(0)
    require(bool(effects.isfinite().all()), f"{type(pipe).__name__} predicts no finite numbers; try torch.bfloat16")
    table = torch.full((1 + heads[-1].layer, 1 + max(head.head for head in heads)), torch.nan)
    for head, effect in zip(heads, effects, strict=True):
        table[head.layer, head.head] = effect
    return table


def relative_changes(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, heads: HeadSet, rows: int, form: Perturbation
) -> Float[Tensor, " head"]:
    """|C - P| / |C| of each head, C being the last `rows` rows of `output`, all of one and the same case."""
    normal = video_of(output)[-rows:].float().flatten(1)
    others = [None] * (len(video_of(output)) - rows)  # unconditional rows come first
    changes = []
    for first in range(0, len(heads), rows):
        broken = [dataclasses.replace(form, heads=(head,)) for head in heads[first : first + rows]]
        idle = [None] * (rows - len(broken))
        with broken_heads(model, [*others, *broken, *idle]):
            weak = video_of(model(*args, **kwargs))[-rows:].float().flatten(1)
        changes.append(((normal - weak).norm(dim=1) / normal.norm(dim=1))[: len(broken)])
    return torch.cat(changes).cpu()
