"""Hunting heads: break one at a time, guide away from it, keep the heads whose guidance helps most.

The plain single-head ranking of HeadHunter (2025, alg. 1 with one round): every head sees the same cases and the same
noise, so each is judged by paired differences to the shared unguided clips. Heads are chosen on selection cases and
judged on confirmation cases; the two never overlap.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from physnb.config import Guidance, HeadId, HeadSet, HuntConfig, head_set, require
from physnb.data import Clip, simulate
from physnb.families import check_heads, heads_of
from physnb.generate import generate
from physnb.metrics import metric_trajectory
from physnb.model import VideoDiT
from physnb.statistics import Estimate, bootstrap_mean, paired_difference
from physnb.store import TrialStore, read_json

OBJECTIVE = "tracking_error"
METRIC_UNITS = {  # the columns of result tables, in order
    "velocity_error": "units/s",
    "position_error": "units",
    "missing_rate": "share",
    "tracking_error": "units",
}
CFG_TEXT_WEIGHT = 1.0  # the control "CFG": published scale 2


def selection_cases(model: VideoDiT, hunt: HuntConfig) -> Clip:
    """The clips that heads are chosen on: the first `selection_cases` of each scenario."""
    return _cases(model, hunt, range(hunt.selection_cases))


def confirmation_cases(model: VideoDiT, hunt: HuntConfig, split: str | None = None) -> Clip:
    """The clips that the choice is judged on: the next `confirmation_cases`, of `split` or of the hunt's own."""
    return _cases(model, hunt, range(hunt.selection_cases, hunt.selection_cases + hunt.confirmation_cases), split)


def _cases(model: VideoDiT, hunt: HuntConfig, indices: range, split: str | None = None) -> Clip:
    shape = dict(frames=model.config.frames, size=model.config.size, seed=hunt.seed)
    return Clip.concatenate([simulate(name, split or hunt.split, indices, **shape) for name in hunt.scenarios])


def require_disjoint(selection: Clip, confirmation: Clip) -> None:
    """Raise ValueError if any case would be used both to choose and to confirm."""
    names = [set(zip(c.scenarios, c.buckets, c.indices.tolist(), strict=True)) for c in (selection, confirmation)]
    shared = sorted(names[0] & names[1])
    require(not shared, f"{len(shared)} cases are used both to choose and to confirm, for example {shared[:1]}")


@dataclass(frozen=True)
class HeadRanking:
    """Effect of guiding away from each head alone: objective minus unguided, per case; negative is better.

    effects[i] belongs to heads[i]. Leaves out how heads act together, and the luck of the best (winner's curse).
    """

    heads: HeadSet
    effects: Float[Tensor, "head case"]
    baseline: Float[Tensor, " case"]
    objective: str
    hunt: HuntConfig

    def estimates(self) -> list[Estimate]:
        """Mean effect of every head with its interval over cases."""
        return [bootstrap_mean(row) for row in self.effects]

    def order(self) -> HeadSet:
        """All heads, most helpful first."""
        means = self.effects.nanmean(1)
        return tuple(self.heads[i] for i in torch.argsort(means, stable=True).tolist())

    def top(self, k: int) -> HeadSet:
        """The k heads that help most, as a head set."""
        require(1 <= k <= len(self.heads), f"top k must be in [1, {len(self.heads)}], got {k}")
        return head_set(self.order()[:k])

    def layer_map(self) -> Float[Tensor, "layer head"]:
        """Mean effects as a layer x head table."""
        shape = (max(h.layer for h in self.heads) + 1, max(h.head for h in self.heads) + 1)
        table = torch.full(shape, torch.nan)
        for head, effect in zip(self.heads, self.effects.nanmean(1), strict=True):
            table[head.layer, head.head] = effect
        return table

    def to_rows(self) -> list[dict]:
        """One dict a head, most helpful first, ready for JSON or a table."""
        estimates = dict(zip(self.heads, self.estimates(), strict=True))
        return [dict(head=str(head)) | estimates[head].to_dict() for head in self.order()]


def measure(
    model: VideoDiT, cases: Clip, guidance: Guidance | Sequence[Guidance], hunt: HuntConfig
) -> dict[str, Float[Tensor, " case"]]:
    """Trajectory scores by name of the clips generated from `cases` under `guidance`, on the hunt's shared noise."""
    made = generate(
        model, cases, frames_given=hunt.frames_given, guidance=guidance, steps=hunt.steps, seed=hunt.seed + 1
    )
    return {name: s.values for name, s in metric_trajectory(made, cases, frames_given=hunt.frames_given).items()}


def trial_key(model_hash: str, hunt: HuntConfig, objective: str, guidance: Guidance) -> str:
    """What decides a trial's numbers besides the case, as canonical JSON: rows of other settings never mix."""
    settings = asdict(hunt)
    for name in ("top_k", "random_draws", "selection_cases", "confirmation_cases", "weight", "strength"):
        settings.pop(name)  # they choose trials and do not change one
    return json.dumps(
        dict(model=model_hash, settings=settings, objective=objective, guidance=asdict(guidance)), sort_keys=True
    )


def hunt_heads(
    model: VideoDiT,
    hunt: HuntConfig,
    *,
    heads: HeadSet | None = None,
    store: TrialStore | None = None,
    model_hash: str = "",
    objective: str = OBJECTIVE,
    batch_size: int = 64,
    progress: bool = True,
) -> HeadRanking:
    """The effect of every head of `heads` (default: all) on the selection cases.

    Many heads run in one batch, each row with its own. With a `store`, each head's scores are written as they finish
    and read back next time, so a killed hunt goes on where it stopped.
    Raises ValueError for a head that the model lacks.
    """
    require(store is None or bool(model_hash), "a trial store needs model_hash, so that models never mix in it")
    heads = heads_of(model) if heads is None else check_heads(model, head_set(heads))
    cases = selection_cases(model, hunt)
    trials = [Guidance()] + [Guidance.from_heads([h], hunt.weight, hunt.strength) for h in heads]
    keys = [trial_key(model_hash, hunt, objective, trial) for trial in trials]
    names = [f"{s}/{i}" for s, i in zip(cases.scenarios, cases.indices.tolist(), strict=True)]
    found = {} if store is None else {i: store.read(key, names) for i, key in enumerate(keys)}
    found = {i: torch.tensor(values) for i, values in found.items() if values is not None}
    pending = [i for i in range(len(trials)) if i not in found]
    together = max(1, batch_size // len(cases))  # head sets evaluated in one batch
    bar = tqdm(total=len(trials), initial=len(found), disable=not progress, unit="head", desc="hunt")
    for first in range(0, len(pending), together):
        group = pending[first : first + together]
        rows = [trials[i] for i in group for _ in range(len(cases))]
        values = measure(model, Clip.concatenate([cases] * len(group)), rows, hunt)[objective]
        for i, row in zip(group, values.view(len(group), -1), strict=True):
            found[i] = row
            if store is not None:
                store.write(keys[i], names, row.tolist())
            bar.update()
    bar.close()
    baseline = found[0]
    effects = torch.stack([found[i + 1] - baseline for i in range(len(heads))])
    return HeadRanking(heads, effects, baseline, objective, hunt)


def random_head_sets(model: VideoDiT, k: int, draws: int, seed: int) -> list[HeadSet]:
    """`draws` sets of k heads drawn without replacement: the control for having chosen."""
    heads, generator = heads_of(model), np.random.default_rng(seed)
    require(1 <= k <= len(heads), f"a set of {k} heads cannot be drawn from {len(heads)}")
    return [head_set([heads[i] for i in generator.choice(len(heads), k, replace=False)]) for _ in range(draws)]


def control_arms(model: VideoDiT, hunt: HuntConfig, hunted: HeadSet) -> dict[str, list[Guidance]]:
    """Every method of the final table by name; several guidances are draws to be averaged case by case."""
    k, w, u = len(hunted), hunt.weight, hunt.strength
    draws = random_head_sets(model, k, hunt.random_draws, hunt.seed)
    return {
        "unguided": [Guidance()],
        "CFG": [Guidance(text_weight=CFG_TEXT_WEIGHT)],
        f"{k} random heads": [Guidance.from_heads(heads, w, u) for heads in draws],
        "all heads": [Guidance.from_heads(heads_of(model), w, u)],
        f"{k} hunted heads": [Guidance.from_heads(hunted, w, u)],
    }


@dataclass(frozen=True)
class ArmResult:
    """One method on the confirmation cases: per-case values by metric, and the same of the unguided clips."""

    name: str
    values: dict[str, Float[Tensor, " case"]]
    baseline: dict[str, Float[Tensor, " case"]]

    def estimate(self, metric: str, rows: list[int] | None = None) -> Estimate:
        """Mean over cases (or `rows` of them) with its interval."""
        values = self.values[metric]
        return bootstrap_mean(values if rows is None else values[rows])

    def difference(self, metric: str, rows: list[int] | None = None) -> Estimate:
        """Mean paired difference to unguided; negative is better."""
        pair = self.values[metric], self.baseline[metric]
        return paired_difference(*(pair if rows is None else (v[rows] for v in pair)))

    def to_row(self, rows: list[int] | None = None) -> dict:
        """Estimates and differences of all table metrics as one dict, ready for JSON."""
        return dict(method=self.name) | {
            metric: self.estimate(metric, rows).to_dict()
            | {"difference": None if self.name == "unguided" else self.difference(metric, rows).to_dict()}
            for metric in METRIC_UNITS
        }


def confirm(
    model: VideoDiT, hunt: HuntConfig, hunted: HeadSet, *, cases: Clip | None = None, progress: bool = True
) -> list[ArmResult]:
    """The hunted heads beside their controls, on cases never used for choosing; the first result is unguided.

    Raises ValueError if `cases` shares one with the hunt's selection cases.
    """
    cases = confirmation_cases(model, hunt) if cases is None else cases
    require_disjoint(selection_cases(model, hunt), cases)
    results: list[ArmResult] = []
    for name, guidances in tqdm(
        control_arms(model, hunt, check_heads(model, hunted)).items(),
        disable=not progress,
        unit="method",
        desc="confirm",
    ):
        runs = [measure(model, cases, guidance, hunt) for guidance in guidances]
        values = {metric: torch.stack([run[metric] for run in runs]).nanmean(0) for metric in METRIC_UNITS}
        results.append(ArmResult(name, values, results[0].values if results else values))
    return results


def strength_surface(
    model: VideoDiT,
    hunt: HuntConfig,
    heads: HeadSet,
    weights: Sequence[float],
    strengths: Sequence[float],
    *,
    cases: Clip | None = None,
    progress: bool = True,
) -> dict[tuple[float, float], ArmResult]:
    """The head set's effect on the confirmation cases at every (weight w, strength u), by (w, u)."""
    cases = confirmation_cases(model, hunt) if cases is None else cases
    require_disjoint(selection_cases(model, hunt), cases)
    baseline = measure(model, cases, Guidance(), hunt)
    grid = [(w, u) for w in weights for u in strengths]
    surface = {}
    for w, u in tqdm(grid, disable=not progress, unit="point", desc="surface"):
        off = w == 0 or u == 0
        values = baseline if off else measure(model, cases, Guidance.from_heads(heads, w, u), hunt)
        surface[w, u] = ArmResult(f"w={w:g} u={u:g}", values, baseline)
    return surface


def head_names(heads: Sequence[HeadId]) -> str:
    """`L0H1, L3H7`."""
    return ", ".join(str(head) for head in heads)


def hunted_heads(names: str, hunted: list[dict[str, str]] | None, model_folder: str | Path) -> HeadSet:
    """The heads to study: those of `names`, else those `hunted` in the same run, else the ones of the committed hunt.

    Raises ValueError if none of the three is there.
    """
    if names:
        return head_set(names)
    rows = hunted or read_json(Path(model_folder).parent / "hunt" / "hunted.json")
    return head_set([row["head"] for row in rows])
