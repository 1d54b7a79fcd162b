"""Guidance: one formula, excess weights, 0 = off.

    pred = C + text_weight (C - U) + sum_i weight_i (C - P_i)

C is the conditional prediction, U the one without caption, P_i the one of a weak model: broken heads (PAG, SEG,
HeadHunter), skipped layers (SLG, STG) or another network (AutoGuidance). The weights sum to 1, so the formula is the
same for clean clips, noise and velocity; rescale and projection are not linear and act on clean clips here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from physnb.config import Guidance, LayerSkip, OtherModel, Perturbation, Weak, choose, require
from physnb.flow import ClipTensor, Levels, velocity_from_clean
from physnb.hooks import first_layer, perturb, skip_layers, strength_tables
from physnb.model import Fork, VideoDiT

Denoiser = Callable[[ClipTensor, Levels, float], ClipTensor]

OFF = {  # the value at which a published scale changes nothing: it is 1 where the formula starts from the weaker model
    "cfg": 1.0,  # diffusers: U + w (C - U)
    "cfg-original": 0.0,  # C + w (C - U), also in the papers of PAG and HeadHunter and in the Cosmos pipelines
    "pag": 0.0,  # paper and diffusers pipelines: C + s (C - P)
    "pag-adm": 1.0,  # its ADM code: P + g (C - P)
    "headhunter": 0.0,  # (1 + w) C - w P
    "seg": 0.0,
    "stg": 0.0,
    "slg": 0.0,
    "autoguidance": 1.0,  # P + w (C - P)
    "ltx2-modality": 1.0,
    "diffusers-guider-without-cfg": 1.0,  # its PAG, SLG and SEG: P + s (C - P) as soon as CFG is off
}


def excess_weight(scale: float, convention: str) -> float:
    """The weight of the one formula for a scale as it is published; raises ValueError for an unknown convention."""
    return scale - OFF[choose("guidance convention", convention, OFF)]


def combine_predictions(
    conditional: ClipTensor, others: Sequence[ClipTensor], weights: Sequence[Float[Tensor, " batch"]]
) -> ClipTensor:
    """C + sum_i w_i (C - W_i): C pushed away from each weaker prediction W_i by its excess weight, row by row."""
    combined = conditional
    for other, weight in zip(others, weights, strict=True):
        combined = torch.addcmul(combined, weight.view(-1, 1, 1, 1, 1).to(conditional), conditional - other)
    return combined


def project_update(conditional: ClipTensor, guided: ClipTensor, parallel: Float[Tensor, " batch"]) -> ClipTensor:
    """`guided` with the part of its update along C scaled by eta (Sadat et al. 2024, eq. 8; no momentum, no radius)."""
    update, unit = guided - conditional, torch.nn.functional.normalize(conditional.flatten(1), dim=1)
    along = (update.flatten(1) * unit).sum(1, keepdim=True) * unit
    return guided + ((parallel[:, None].to(along) - 1) * along).view_as(update)


def rescale_deviation(conditional: ClipTensor, guided: ClipTensor, phi: Float[Tensor, " batch"]) -> ClipTensor:
    """phi std(C) / std(guided) guided + (1 - phi) guided, clip by clip (Lin et al. 2024, eq. 15 and 16)."""
    ratio = conditional.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * (1 + phi.to(ratio) * (ratio - 1)).view(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Term:
    """One weak prediction of some rows of the batch; `weak` holds the weak model of each, None for no caption."""

    rows: list[int]
    weights: list[float]
    weak: list[Weak | None]


def guidance_terms(guidance: Sequence[Guidance]) -> list[Term]:
    """The weak predictions that the rows ask for: those without caption first, then each row's weak models in turn."""
    rows = [b for b, g in enumerate(guidance) if g.text_weight != 0]
    terms = [Term(rows, [guidance[b].text_weight for b in rows], [None] * len(rows))] if rows else []
    for slot in range(max((len(g.weak) for g in guidance), default=0)):
        rows = [b for b, g in enumerate(guidance) if len(g.weak) > slot and g.weak[slot][0] != 0]
        if rows:
            weights, weak = zip(*(guidance[b].weak[slot] for b in rows), strict=True)
            terms.append(Term(rows, list(weights), list(weak)))
    return terms


def guided_velocity(
    model: VideoDiT,
    start: ClipTensor,
    given: Float[Tensor, "batch time"],
    caption: Int[Tensor, "batch word"],
    guidance: Sequence[Guidance],
    others: Mapping[str, VideoDiT] | None = None,
) -> Denoiser:
    """A denoiser for `flow.solve`: velocity(z, sigma, progress) under each row's own guidance.

    C, U and every P of the model run in one batch: a P leaves its C at the first layer in which they differ, rows that
    see the same input share one C, and rows that ask for nothing cost nothing. others: the networks that OtherModel
    names. Raises ValueError for a head, layer or network that is not there, or a network that reads other captions.
    """
    others = dict(others or {})
    for weak in (w for g in guidance for _, w in g.weak if isinstance(w, OtherModel)):
        config = others[choose("guiding model", weak.name, others)].config
        require(
            config.vocabulary == model.config.vocabulary and config.text == model.config.text,
            f"guiding model {weak.name!r} reads other captions than the model that it guides; use one that was trained "
            "with the same sources and caption settings",
        )
    terms = guidance_terms(guidance)
    twins = first_twins(start, given, caption)

    @cache
    def plan(active: bool, sources: tuple[int, ...]) -> Plan:
        return Plan(model, terms if active else [], sources)

    plan(True, tuple(range(len(guidance))))  # refuses what the model lacks before the work

    def velocity(noised: ClipTensor, sigma: Levels, progress: float = 0.0) -> ClipTensor:
        active = [g.start <= progress < g.stop for g in guidance]
        inputs = dict(sample=noised, sigma=sigma, start=start, given=given, caption=caption)
        with torch.inference_mode():
            chosen = plan(any(active), same_inputs(twins, noised, sigma))
            clean = chosen.predict(inputs, others)
            conditional, weak = clean[0], clean[1:]
            if not weak:
                return velocity_from_clean(noised, conditional, sigma)
            on = torch.tensor(active).float()
            weights = [chosen.weights(term) * on for term in chosen.terms]
            guided = combine_predictions(conditional, weak, weights)
            settings = torch.tensor([[g.parallel, g.rescale] for g in guidance])
            if bool((settings[:, 0] != 1).any()):
                guided = project_update(conditional, guided, settings[:, 0].to(guided))
            if bool((settings[:, 1] != 0).any()):
                guided = rescale_deviation(conditional, guided, (settings[:, 1] * on).to(guided))
        return velocity_from_clean(noised, guided, sigma)

    return velocity


def first_twins(*conditions: Tensor) -> list[int]:
    """For every row of a batch the first row whose conditions have the same bits."""
    firsts: dict[tuple[bytes, ...], int] = {}
    arrays = [condition.detach().float().cpu().numpy() for condition in conditions]
    return [firsts.setdefault(tuple(a[row].tobytes() for a in arrays), row) for row in range(len(conditions[0]))]


def same_inputs(twins: list[int], noised: ClipTensor, sigma: Levels) -> tuple[int, ...]:
    """For every row the row whose whole input it shares: its twin while their noised clips and levels are equal.

    So it is in the first step of a hunt, where every head starts from the noise of its case, and in all of a loss.
    """
    rows = range(len(twins))
    if twins == list(rows):
        return tuple(rows)
    index = torch.tensor(twins, device=noised.device)
    equal = (noised == noised[index]).flatten(1).all(1) & (sigma == sigma[index])
    return tuple(twin if same else row for row, twin, same in zip(rows, twins, equal.tolist(), strict=True))


def take_rows(clips: ClipTensor, rows: list[int]) -> ClipTensor:
    """clips[rows], without a copy where the rows are neighbours in order."""
    first = rows[0] if rows else 0
    return clips[first : first + len(rows)] if rows == list(range(first, first + len(rows))) else clips[rows]


class Plan:
    """How the predictions of all terms are made in as few rows as possible; row b has the input of row sources[b]."""

    def __init__(self, model: VideoDiT, terms: list[Term], sources: Sequence[int]):
        self.model, self.terms, self.sources = model, terms, list(sources)
        mine = [(term, i) for term in terms for i, weak in enumerate(term.weak) if not isinstance(weak, OtherModel)]
        broken = [(term, i) for term, i in mine if term.weak[i] is not None]
        without_caption = [(term, i) for term, i in mine if term.weak[i] is None]
        # Before the fork every input once, with its caption and, where asked for, without; after it also every P.
        inputs = list(dict.fromkeys(self.sources))
        bare = list(dict.fromkeys(self.sources[term.rows[i]] for term, i in without_caption))
        place = {row: number for number, row in enumerate(inputs)}
        place_bare = {row: len(inputs) + number for number, row in enumerate(bare)}
        self.before = torch.tensor(inputs + bare)
        self.captions = torch.tensor([True] * len(inputs) + [False] * len(bare))
        self.conditional = [place[source] for source in self.sources]
        self.places = {(id(term), term.rows[i]): place_bare[self.sources[term.rows[i]]] for term, i in without_caption}
        self.places |= {(id(term), term.rows[i]): len(self.before) + n for n, (term, i) in enumerate(broken)}
        weak = [None] * len(self.before) + [term.weak[i] for term, i in broken]
        self.strengths = strength_tables(model, [w if isinstance(w, Perturbation) else None for w in weak])
        self.skips = [w if isinstance(w, LayerSkip) else None for w in weak]
        self.fork = None
        if broken:
            layer = min(first_layer(model, term.weak[i]) for term, i in broken)
            copies = [*range(len(self.before)), *(place[self.sources[term.rows[i]]] for term, i in broken)]
            self.fork = Fork(layer, torch.tensor(copies, device=model.device))

    def predict(self, inputs: dict[str, Tensor], others: Mapping[str, VideoDiT]) -> list[ClipTensor]:
        """C, then the prediction of each term, with C itself in the rows that a term does not concern."""
        rows = self.before.to(inputs["sample"].device)
        before = {name: value[rows] for name, value in inputs.items()}
        before["caption"] = before["caption"] * self.captions.to(rows.device)[:, None]
        with ExitStack() as stack:
            for form, strength in self.strengths.items():
                stack.enter_context(perturb(self.model, strength, form))
            if any(self.skips):
                stack.enter_context(skip_layers(self.model, self.skips))
            clean = self.model(**before, fork=self.fork).sample
        conditional = take_rows(clean, self.conditional)
        predictions = [conditional]
        for term in self.terms:
            known = [row for row in term.rows if (id(term), row) in self.places]
            part = take_rows(clean, [self.places[id(term), row] for row in known])
            if known == list(range(len(conditional))):
                prediction = part
            else:
                prediction = conditional.clone()
                prediction[known] = part
            for name in dict.fromkeys(weak.name for weak in term.weak if isinstance(weak, OtherModel)):
                mine = [row for row, weak in zip(term.rows, term.weak, strict=True) if weak == OtherModel(name)]
                seen = list(dict.fromkeys(self.sources[row] for row in mine))
                part = others[name](**{key: value[seen] for key, value in inputs.items()}).sample
                prediction[mine] = part[[seen.index(self.sources[row]) for row in mine]]
            predictions.append(prediction)
        return predictions

    def weights(self, term: Term) -> Float[Tensor, " batch"]:
        """The weight of a term in every row, 0 where it does not concern it."""
        weights = torch.zeros(len(self.sources))
        weights[term.rows] = torch.tensor(term.weights)
        return weights
