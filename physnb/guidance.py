"""Guidance: one formula, excess weights, 0 = off.

    pred = C + text_weight (C - U) + sum_i weight_i (C - P_i)

C is the conditional prediction, U the one without caption, P_i the one with broken heads. The weights sum to 1, so the
formula is the same for clean clips, noise and velocity. Published scales w of CFG are text_weight = w - 1; scales s of
PAG, SEG and HeadHunter are weight = s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from physnb.config import Guidance
from physnb.flow import ClipTensor, Levels, velocity_from_clean
from physnb.hooks import perturb, strength_table
from physnb.model import VideoDiT


def combine_predictions(
    conditional: ClipTensor, others: Sequence[ClipTensor], weights: Sequence[Float[Tensor, " batch"]]
) -> ClipTensor:
    """C + sum_i w_i (C - W_i): C pushed away from each weaker prediction W_i by its excess weight, row by row."""
    combined = conditional
    for other, weight in zip(others, weights, strict=True):
        combined = combined + weight.view(-1, 1, 1, 1, 1).to(conditional) * (conditional - other)
    return combined


def guided_velocity(
    model: VideoDiT,
    start: ClipTensor,
    given: Float[Tensor, "batch time"],
    caption_ids: Int[Tensor, "batch word"],
    guidance: Sequence[Guidance],
) -> Callable[[ClipTensor, Levels], ClipTensor]:
    """A denoiser for `flow.solve`: velocity(z, sigma) under each row's own guidance.

    All predictions that any row asks for run in one batch; rows that do not ask cost nothing.
    Raises ValueError for a head that the model lacks.
    """
    batch = len(guidance)
    terms = []  # (rows, weights of these rows, captions kept, perturbation of these rows)
    text_rows = [b for b, g in enumerate(guidance) if g.text_weight != 0]
    if text_rows:
        terms.append((text_rows, [guidance[b].text_weight for b in text_rows], False, [None] * len(text_rows)))
    for slot in range(max((len(g.weak) for g in guidance), default=0)):
        rows = [b for b, g in enumerate(guidance) if len(g.weak) > slot and g.weak[slot][0] != 0]
        if rows:
            weights, perturbations = zip(*(guidance[b].weak[slot] for b in rows), strict=True)
            terms.append((rows, list(weights), True, list(perturbations)))

    source = torch.tensor([*range(batch), *(row for rows, *_ in terms for row in rows)], device=start.device)
    keep_caption = torch.tensor([True] * batch + [keep for rows, _, keep, _ in terms for _ in rows]).to(start.device)
    strength = strength_table(model, [None] * batch + [p for *_, perturbed in terms for p in perturbed])
    strength = strength.to(start.device)
    all_start, all_given = start[source], given[source]
    all_captions = caption_ids[source] * keep_caption[:, None]

    def velocity(noised: ClipTensor, sigma: Levels) -> ClipTensor:
        with torch.inference_mode(), perturb(model, strength):
            clean = model(noised[source], sigma[source], all_start, all_given, all_captions).sample
        parts = clean.split([batch, *(len(rows) for rows, *_ in terms)])
        conditional, others, weights = parts[0], [], []
        for part, (rows, row_weights, *_) in zip(parts[1:], terms, strict=True):
            other, weight = conditional.clone(), torch.zeros(batch)
            other[rows], weight[rows] = part, torch.tensor(row_weights)
            others.append(other)
            weights.append(weight)
        return velocity_from_clean(noised, combine_predictions(conditional, others, weights), sigma)

    return velocity
