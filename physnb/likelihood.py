"""What a video diffusion model itself holds plausible: denoising losses of clips whose motion is lawful or not.

A model that knows the laws denoises a lawful clip better than the same clip with a law broken, under the same noise.
Plausibility preference error after LikePhys (Yuan et al. 2025): the share of pairs in which it does not. Nothing is
generated, so heads can be hunted by it cheaply. Differences from the published code, which mixes up conventions: the
loss is on velocity, on the path the model was trained on, without the start frames, at chosen noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from physnb.config import Guidance, Perturbation, choose, require
from physnb.data import Clip, hash_draws, normal_noise
from physnb.data.impossible import Variants
from physnb.data.variants import kinds_for, make_impossible
from physnb.flow import ClipTensor, add_noise, shift_levels
from physnb.generate import check_cases, conditions
from physnb.guidance import Denoiser, guided_velocity
from physnb.hooks import perturb_rows
from physnb.metrics import Scores
from physnb.model import VideoDiT

TIES = ("half", "strict")
VALID = "valid"  # LikePhys's name for the lawful clips of a scene
OPTIONS = 4


def noise_levels(count: int = 10, shift: float = 1.0) -> tuple[float, ...]:
    """`count` midpoints of (0, 1), moved towards 1 by `shift_levels` where shift > 1.

    >>> noise_levels(2)
    (0.25, 0.75)
    """
    require(count > 0, f"the number of noise levels must be positive, got {count}")
    require(shift > 0, f"noise shift must be positive, got {shift}")
    return tuple(shift_levels((torch.arange(count).double() + 0.5) / count, shift).tolist())


def training_levels(model: VideoDiT) -> tuple[float, ...]:
    """Ten noise levels that part the model's training levels, and its sampling steps, into equal shares."""
    return noise_levels(shift=model.config.noise_shift)


def paired_noise(model: VideoDiT, clips: Clip, seed: int, draw: int, sigma: float) -> ClipTensor:
    """Noise of every clip: a function of (seed, scenario, index, draw, level), so variants of a clip share it."""
    keys = list(zip(clips.scenarios, clips.indices.tolist(), strict=True))
    made = {
        (scenario, index): normal_noise(
            seed, f"likelihood/{scenario}/{draw}/{sigma:.6f}", np.array([index]), model.clip_shape
        )
        for scenario, index in dict.fromkeys(keys)
    }
    return torch.cat([made[key] for key in keys])


def clip_losses(
    model: VideoDiT,
    clips: Clip,
    *,
    frames_given: int = 3,
    levels: Sequence[float] | None = None,
    draws: int = 1,
    seed: int = 0,
    guidance: Guidance | Sequence[Guidance] = Guidance(),
    perturbation: Perturbation | Sequence[Perturbation | None] | None = None,
    others: Mapping[str, VideoDiT] | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "clip level"]:
    """Mean squared error of the predicted velocity of each clip at each noise level sigma, over generated frames.

    |v'(z, sigma) - (e - x)|^2 with z = (1 - sigma) x + sigma e, a mean over pixels and over `draws` of the noise e.
    The first `frames_given` frames are given to the model and leave the loss.
    levels: None is `training_levels`. Of unshifted levels the lowest is most of the mean: loss goes with 1 / sigma^2.
    guidance: one for all clips, or one a clip; it acts at a level as it would when sampling passes there.
    perturbation: the weak model itself, without guidance, for all clips or one a clip (None: the model as it is).
    others: the networks that the guidance names.
    Raises ValueError for clips of another size, levels outside (0, 1], bad counts, or a head or network not there.
    Leaves out the weights that would make the sum a bound on the likelihood.
    """
    check_cases(model, clips, frames_given)
    require(len(clips) > 0, "there is no clip to take the loss of")
    for name, count in dict(draws=draws, batch_size=batch_size).items():
        require(count > 0, f"{name} must be positive, got {count}")
    levels = training_levels(model) if levels is None else tuple(levels)
    require(len(levels) > 0 and all(0 < s <= 1 for s in levels), f"noise levels must be in (0, 1], got {levels}")
    guided, broken = one_a_clip("guidance", guidance, clips), one_a_clip("perturbation", perturbation, clips)
    require(
        not any(broken) or all(g == Guidance() for g in guided),
        "choose guidance or perturbation: a perturbation replaces the model itself",
    )
    model.eval()
    losses = []
    for first in range(0, len(clips), batch_size):
        rows = slice(first, first + batch_size)
        clean, given, caption = conditions(model, clips[rows], frames_given)
        velocity = guided_velocity(model, clean, given, caption, guided[rows], others)
        with perturb_rows(model, broken[rows]) if any(broken[rows]) else nullcontext():
            errors = [
                level_loss(model, clips[rows], clean, velocity, sigma, frames_given, seed, draw)
                for sigma in levels
                for draw in range(draws)
            ]
        losses.append(torch.stack(errors, dim=1).unflatten(1, (len(levels), draws)).mean(-1))
    return torch.cat(losses)


def level_loss(
    model: VideoDiT,
    clips: Clip,
    clean: ClipTensor,
    velocity: Denoiser,
    sigma: float,
    frames_given: int,
    seed: int,
    draw: int,
) -> Float[Tensor, " clip"]:
    """The loss of each clip at one noise level under one draw of its noise."""
    level = torch.full((len(clips),), sigma, device=clean.device)
    progress = 1 - float(shift_levels(torch.tensor(sigma), 1 / model.config.noise_shift))  # of sampling, at this level
    noise = paired_noise(model, clips, seed, draw, sigma).to(clean.device)
    error = velocity(add_noise(clean, noise, level), level, progress) - (noise - clean)
    return error[:, :, frames_given:].square().mean((1, 2, 3, 4)).cpu()


def one_a_clip(name: str, value, clips: Clip) -> list:
    """`value` for every clip, or the list of one a clip that it is."""
    values = list(value) if isinstance(value, Sequence) else [value] * len(clips)
    require(len(values) == len(clips), f"{len(values)} of {name} for {len(clips)} clips; give one, or one a clip")
    return values


def spread_settings(settings: Mapping[str, Any], cases: Clip, rows: Sequence[int]) -> dict[str, Any]:
    """Settings of `clip_losses` for clips made from case rows[0], rows[1] ..., from settings for the cases."""
    spread = dict(settings)
    for name in spread.keys() & {"guidance", "perturbation"}:
        values = one_a_clip(name, spread[name], cases)
        spread[name] = [values[row] for row in rows]
    return spread


def misranked(valid: Tensor, invalid: Tensor, ties: str = "half") -> Tensor:
    """1 where the valid clip has the larger loss, else 0; a tie is 1/2, or 0 if "strict" as LikePhys counts it.

    NaN where either loss is not finite.
    """
    choose("ties", ties, TIES)
    wrong = (valid > invalid).float() + 0.5 * (ties == "half") * (valid == invalid)
    return torch.where(valid.isfinite() & invalid.isfinite(), wrong, torch.nan)


def published_misrank(losses: Mapping[str, Mapping[str, Sequence[float]]], ties: str = "strict") -> dict[str, float]:
    """LikePhys's error of each variation: wrong pairs in a subgroup over all its pairs, then the mean over subgroups.

    losses: mean losses of the videos by subgroup and variation, "valid" for the lawful ones. A subgroup without valid
    videos, or without the variation, does not count. Raises ValueError for a variation that no subgroup can judge,
    where the published evaluator says 0, and for a loss that is not finite.
    """
    found: dict[str, list[float]] = {name: [] for group in losses.values() for name in group if name != VALID}
    for group in losses.values():
        valid = torch.tensor(list(group.get(VALID, ())), dtype=torch.float64)
        for name in group.keys() - {VALID}:
            wrong = misranked(valid[:, None], torch.tensor(list(group[name]), dtype=torch.float64)[None], ties)
            require(not bool(wrong.isnan().any()), f"a loss of {name} or of its valid videos is not finite")
            if wrong.numel():
                found[name].append(float(wrong.mean()))
    empty = sorted(name for name, values in found.items() if not values)
    require(len(found) > 0 and not empty, f"no subgroup has valid videos and {', '.join(empty) or 'a variation'}")
    return {name: sum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class PairLosses:
    """Losses of clips and of their variants under the same noise; NaN where a variant is not judged, with a reason."""

    kinds: tuple[str, ...]
    levels: tuple[float, ...]
    valid: Float[Tensor, "case level"]
    invalid: Float[Tensor, "kind case level"]
    reasons: tuple[tuple[str | None, ...], ...]  # [kind][case]
    matched: Bool[Tensor, "kind case"]  # the same area covered


def pair_losses(model: VideoDiT, cases: Clip, variants: Sequence[Variants], **settings) -> PairLosses:
    """The losses of lawful cases and of variants of them; settings are those of `clip_losses`, one a case.

    The frames given are those that the variants were made with.
    Raises ValueError for variants of other cases or of other start frames, and what `clip_losses` does.
    """
    require(len(variants) > 0, "there is no variant to compare the cases with")
    given = settings.setdefault("frames_given", variants[0].frames_given)
    for v in variants:
        require(
            v.clip.scenarios == cases.scenarios and torch.equal(v.clip.indices, cases.indices),
            f"the variants {v.kind!r} were made from other clips than the cases",
        )
        require(v.frames_given == given, f"{v.kind!r} keeps {v.frames_given} start frames, but {given} are to be given")
    judged = [[i for i, reason in enumerate(v.reasons) if reason is None] for v in variants]
    clips = Clip.concatenate([cases, *(v.clip[rows] for v, rows in zip(variants, judged, strict=True))])
    levels = settings.pop("levels", None)
    levels = training_levels(model) if levels is None else tuple(levels)
    origins = [*range(len(cases)), *(row for rows in judged for row in rows)]
    losses = clip_losses(model, clips, levels=levels, **spread_settings(settings, cases, origins))
    invalid, first = torch.full((len(variants), len(cases), len(levels)), torch.nan), len(cases)
    for table, rows in zip(invalid, judged, strict=True):
        table[rows] = losses[first : first + len(rows)]
        first += len(rows)
    return PairLosses(
        kinds=tuple(v.kind for v in variants),
        levels=levels,
        valid=losses[: len(cases)],
        invalid=invalid,
        reasons=tuple(v.reasons for v in variants),
        matched=torch.stack([v.matched for v in variants]),
    )


def preference_scores(losses: PairLosses, ties: str = "half") -> dict[str, Scores]:
    """Scores of each case by name, from the loss of each clip averaged over noise levels, unweighted as published.

    preference_error: the share of the case's judged variants that the model prefers to it; chance is 0.5.
    preference_error/matched: of those that cover the same area, where less to draw cannot decide.
    preference_error/KIND: of one kind. preference_error/sigma=LEVEL: at one noise level alone.
    preference_margin: log(loss of the variant) - log(loss of the case), mean over the same variants; higher is better,
        0 at chance: smoother than the error. preference_margin/matched: of those that cover the same area.
    Leaves out the certainty behind a preference; which variants are judged depends on the cases and never the model.
    """
    valid, invalid = losses.valid.mean(-1), losses.invalid.mean(-1)
    wrong = misranked(valid, invalid, ties)  # [kind, case]
    usable = (valid > 0) & (invalid > 0) & valid.isfinite() & invalid.isfinite()
    margin = torch.where(usable, invalid.log() - valid.log(), torch.nan)
    tables = {
        "preference_error": wrong,
        "preference_error/matched": torch.where(losses.matched, wrong, torch.nan),
        "preference_margin": margin,
        "preference_margin/matched": torch.where(losses.matched, margin, torch.nan),
    }
    for number, sigma in enumerate(losses.levels):
        at_level = misranked(losses.valid[:, number], losses.invalid[:, :, number], ties)
        tables[f"preference_error/sigma={sigma:.3f}"] = at_level
    found = {name: _case_means(name, table, losses.reasons) for name, table in tables.items()}
    for row, kind in enumerate(losses.kinds):
        name = f"preference_error/{kind}"
        found[name] = _case_means(name, wrong[row : row + 1], losses.reasons[row : row + 1])
    return found


def _case_means(name: str, table: Float[Tensor, "kind case"], reasons: tuple[tuple[str | None, ...], ...]) -> Scores:
    """Mean over the kinds that could be judged; the reason of a case without one is that of the first kind."""
    values = table.nanmean(0)
    known = [column[0] if all(column) else "its loss is zero or not finite" for column in zip(*reasons, strict=True)]
    if name.endswith("/matched"):
        known = ["no variant of the same area could be judged"] * len(known)
    why = tuple(reason if nan else None for reason, nan in zip(known, values.isnan().tolist(), strict=True))
    is_margin = name.startswith("preference_margin")
    return Scores(name, "log ratio" if is_margin else "share", values, why, lower_is_better=not is_margin)


def preference_error(
    model: VideoDiT, cases: Clip, variants: Sequence[Variants], *, ties: str = "half", **settings
) -> dict[str, Scores]:
    """`preference_scores` of a model on cases and variants of them; settings are those of `clip_losses`, one a case."""
    return preference_scores(pair_losses(model, cases, variants, **settings), ties)


@dataclass(frozen=True)
class FourFutures:
    """A question a case: which of four clips with the same start frames is the lawful one?

    options: the first clip of every case, the second, and so on. answer: the number of the lawful one, -1 where the
    case is not judged; all its options are then the lawful clip. kinds: "valid" or which law is broken, [case][option].
    """

    options: tuple[Clip, ...]
    answer: Int[Tensor, " case"]
    kinds: tuple[tuple[str, ...], ...]
    reasons: tuple[str | None, ...]


def four_futures(true: Clip, *, frames_given: int = 3, seed: int = 0) -> FourFutures:
    """The true clips among three variants each, all in an order drawn by (seed, index).

    Variants that cover the same area come first, the others only where fewer than three of those can be made.
    Raises what `make_impossible` does.
    """
    kinds = dict.fromkeys(kind for scenario in dict.fromkeys(true.scenarios) for kind in kinds_for(scenario))
    variants = [make_impossible(true, kind, frames_given=frames_given, seed=seed) for kind in kinds]
    rows, answer, names, reasons = [], [], [], []
    for i, (scenario, index) in enumerate(zip(true.scenarios, true.indices.tolist(), strict=True)):
        stream = f"futures/{scenario}/{index}"
        chance = hash_draws(seed, stream + "/kind", np.arange(len(variants))).tolist()
        judged = [k for k, v in enumerate(variants) if v.reasons[i] is None]
        judged.sort(key=lambda k, i=i, chance=chance: (not bool(variants[k].matched[i]), chance[k]))
        clips = [(VALID, true), *((variants[k].kind, variants[k].clip) for k in judged)][:OPTIONS]
        enough = len(clips) == OPTIONS
        clips = clips if enough else [(VALID, true)] * OPTIONS
        order = hash_draws(seed, stream + "/order", np.arange(OPTIONS)).argsort().tolist()
        rows.append([clips[place][1][i : i + 1] for place in order])
        names.append(tuple(clips[place][0] for place in order))
        answer.append(order.index(0) if enough else -1)
        reasons.append(None if enough else f"only {len(judged)} laws can be broken in this clip, not {OPTIONS - 1}")
    options = tuple(Clip.concatenate(list(column)) for column in zip(*rows, strict=True))
    return FourFutures(options, torch.tensor(answer), tuple(names), tuple(reasons))


def choose_future(model: VideoDiT, options: Sequence[Clip], **settings) -> Int[Tensor, " case"]:
    """The number of the option with the smallest loss for each case, -1 where a loss is not finite.

    settings: those of `clip_losses`, one a case. A tie goes to the first of the tied options.
    Raises ValueError for options that are not futures of the same start frames.
    """
    require(len(options) >= 2, f"a choice needs at least 2 options, got {len(options)}")
    given, cases = settings.get("frames_given", 3), options[0]
    for option in options[1:]:
        require(
            option.scenarios == cases.scenarios
            and torch.equal(option.indices, cases.indices)
            and torch.equal(option.frames[:, :given], cases.frames[:, :given]),
            f"the options must be futures of the same {given} start frames",
        )
    settings = spread_settings(settings, cases, list(range(len(cases))) * len(options))
    losses = clip_losses(model, Clip.concatenate(list(options)), **settings).mean(-1).view(len(options), -1)
    return torch.where(losses.isfinite().all(0), losses.argmin(0), -1)


def futures_accuracy(model: VideoDiT, question: FourFutures, **settings) -> Scores:
    """1 where the model's denoising loss picks the lawful future of four, else 0: WM-ABench-style, chance is 0.25.

    The four-choice form of WM-ABench's prediction tasks (arXiv 2506.21876) on clips made here, not its items.
    settings: those of `choose_future`, one a case. Raises what it does.
    Leaves out how sure the choice is.
    """
    chosen = choose_future(model, question.options, **settings)
    judged = (chosen >= 0) & (question.answer >= 0)
    values = torch.where(judged, (chosen == question.answer).float(), torch.nan)
    why = [reason or "the loss of an option is not finite" for reason in question.reasons]
    reasons = tuple(None if ok else reason for ok, reason in zip(judged.tolist(), why, strict=True))
    return Scores("WM-ABench-style futures", "share", values, reasons, lower_is_better=False)
