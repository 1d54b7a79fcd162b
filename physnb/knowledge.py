"""The controlled experiment of pretraining: what captions say, and what share and variety of clips shows physics.

Every training (an arm with a seed) has the same model, steps and batch. Arms of one seed begin with the same weights,
and arms that differ in captions alone see the same clips, noise and drops in the same order. The unit of every
comparison is a training, not a clip: differences are paired by seed, with t intervals over seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from physnb.config import (
    CAPTION_LEVELS,
    PHENOMENA,
    SCENARIOS,
    ModelConfig,
    TextConfig,
    TrainConfig,
    choose,
    preset,
    require,
)
from physnb.data import Clip, simulate
from physnb.data.catalogue import open_source
from physnb.data.variants import kinds_for, make_impossible
from physnb.evaluate import shape_of
from physnb.generate import generate
from physnb.likelihood import preference_error
from physnb.metrics import metric_trajectory
from physnb.model import VideoDiT
from physnb.statistics import Estimate

PER_WORLD, PER_PHENOMENON, TEMPLATES = 1.0, 1 / 3, 1.0  # how often each is seen, before the share of videos
VARIETIES = {"worlds": SCENARIOS, "many": (*SCENARIOS, *PHENOMENA, "templates")}
QUANTITIES = {  # of `measure_arm`, with units; all are better when lower
    "velocity error": "units/s",
    "position error": "units",
    "missing rate": "share",
    "tracking error": "units",
    "tracking error of templates": "units",
    "preference error": "share",
    "preference error, equal area": "share",
}


@dataclass(frozen=True)
class Arm:
    """One training: level of its captions, share and variety of physics clips among sample videos, and seed."""

    level: str = "description"
    physics: float = 1.0
    variety: str = "many"
    seed: int = 0

    def __post_init__(self) -> None:
        choose("caption level", self.level, CAPTION_LEVELS)
        choose("variety of physics clips", self.variety, VARIETIES)
        object.__setattr__(self, "physics", float(self.physics))
        require(0 < self.physics <= 1, f"the share of physics clips must be in (0, 1], got {self.physics}")

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Arm:
        """The arm written as "LEVEL SHARE VARIETY", for example "law 1.0 many"."""
        try:
            level, physics, variety = text.split()
            physics = float(physics)
        except ValueError:
            raise ValueError(f"arm {text!r} is not of the form LEVEL SHARE VARIETY, for example law 1.0 many") from None
        return cls(level, physics, variety, seed)


def base_config(preset_name: str, steps: int = 0) -> TrainConfig:
    """What all arms share at a preset; steps: instead of its own, unless 0.

    quick trains a smaller model than the preset of that name, because there are many trainings.
    """
    config = preset(preset_name).train
    if preset_name == "quick":
        model = ModelConfig(frames=16, size=32, patch=(2, 8, 8), width=96, depth=4, heads=6)
        config = dataclasses.replace(config, model=model, steps=1500)
    return dataclasses.replace(config, steps=steps or config.steps)


def arm_config(arm: Arm, base: TrainConfig, videos: str = "") -> TrainConfig:
    """The training of an arm. videos: folder of the sample videos that make up what is not physics.

    Raises ValueError for a share below 1 without a folder.
    """
    require(arm.physics == 1 or bool(videos), f"a share of {arm.physics} of physics clips needs a folder of videos")
    kinds = dict(dict.fromkeys(SCENARIOS, PER_WORLD), templates=TEMPLATES)
    weights = np.array([kinds.get(name, PER_PHENOMENON) for name in VARIETIES[arm.variety]])
    sources, weights = VARIETIES[arm.variety], tuple((arm.physics * weights / weights.sum()).tolist())
    if arm.physics < 1:
        sources, weights = (*sources, f"videos:{videos}"), (*weights, 1 - arm.physics)
    text = TextConfig(level=arm.level, layers=1)
    return dataclasses.replace(base, sources=sources, source_weights=weights, text=text, seed=arm.seed)


def measure_arm(model: VideoDiT, *, cases: int, steps: int = 5, seed: int = 1) -> list[dict]:
    """Rows {quantity, split, unit, value} of one trained model: means over clips, then over the three worlds.

    velocity, position (of discs that are there), missing rate, tracking error: of clips generated from 3 start frames.
    tracking error of templates: "id" are the 60 to train on, "ood" the ten held out, of the same parts put together
    anew; they are continued without captions, because not every arm has read their words. preference error: the share
    of law-breaking variants that the model prefers to their clip.
    A value is None where nothing could be judged in one of the worlds.
    Leaves out the spread over clips: the unit of comparison is a training.
    """
    shape = shape_of(model)
    found: list[tuple[str, str, float]] = []
    for split in ("id", "ood"):
        per_world: dict[str, list[float]] = {}
        for scenario in SCENARIOS:
            true = simulate(scenario, split, range(cases), seed=seed, **shape)
            scored = metric_trajectory(generate(model, true, steps=steps, seed=seed), true)
            for name in ("velocity_error", "position_error", "missing_rate", "tracking_error"):
                per_world.setdefault(name.replace("_", " "), []).append(float(scored[name].values.nanmean()))
            for name, value in preferences(model, true, seed).items():
                per_world.setdefault(name, []).append(value)
        found += [(name, split, float(np.mean(values))) for name, values in per_world.items()]
        true = open_source("templates", split=split, seed=seed, **shape).clips(np.arange(cases))
        made = generate(model, true, steps=steps, seed=seed, use_captions=False)
        scored = metric_trajectory(made, true)
        found.append(("tracking error of templates", split, float(scored["tracking_error"].values.nanmean())))
    return [
        dict(quantity=name, split=split, unit=QUANTITIES[name], value=None if np.isnan(value) else value)
        for name, split, value in found
    ]


def preferences(model: VideoDiT, true: Clip, seed: int) -> dict[str, float]:
    """Preference errors of a model on clips of one world, over all variants and over those of equal area."""
    variants = [make_impossible(true, kind, seed=seed) for kind in kinds_for(true.scenarios[0])]
    scored = preference_error(model, true, variants, seed=seed)
    names = {"preference error": "preference_error", "preference error, equal area": "preference_error/matched"}
    return {name: float(scored[key].values.nanmean()) for name, key in names.items()}


def seed_interval(values: Sequence[float]) -> Estimate:
    """Mean over trainings with its 95 % t interval; NaN bounds of fewer than two."""
    known = np.asarray(values, dtype=float)
    require(len(known) > 0, "there is no training to average over")
    half = np.nan
    if len(known) > 1:
        half = float(student.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    mean = float(known.mean())
    return Estimate(mean, mean - half, mean + half, len(known), len(known))


def compare_arms(rows: Sequence[Mapping], baseline: Arm = Arm()) -> list[dict]:
    """One row an arm, quantity and split: its value, and the difference to the baseline paired by seed.

    rows: of `measure_arm`, each with the arm's level, physics, variety and seed. The seed of `baseline` is ignored.
    Raises ValueError if the baseline was not trained.
    """

    def arm_of(row: Mapping) -> tuple[str, float, str]:
        return row["level"], float(row["physics"]), row["variety"]

    known = [row for row in rows if row["value"] is not None]
    values = {(arm_of(row), row["quantity"], row["split"], row["seed"]): row["value"] for row in known}
    own = (baseline.level, baseline.physics, baseline.variety)
    require(any(key[0] == own for key in values), f"no training has the settings of the baseline, {own}")
    out = []
    for arm, quantity, split in dict.fromkeys(key[:3] for key in values):
        seeds = [key[3] for key in values if key[:3] == (arm, quantity, split)]
        mine = {seed: values[arm, quantity, split, seed] for seed in seeds}
        shared = [seed for seed in seeds if (own, quantity, split, seed) in values]
        differences = [mine[seed] - values[own, quantity, split, seed] for seed in shared]
        row = dict(level=arm[0], physics=arm[1], variety=arm[2], quantity=quantity, split=split)
        row |= dict(value=seed_interval(list(mine.values())).to_dict())
        row["difference"] = seed_interval(differences).to_dict() if differences and arm != own else None
        out.append(row)
    return out


def answer(rows: Sequence[Mapping], quantity: str, split: str, unit: str) -> list[str]:
    """What `compare_arms` found of one quantity, a sentence an arm: better, worse, no difference seen, or undecided."""
    said = []
    for row in rows:
        if (row["quantity"], row["split"]) != (quantity, split) or row["difference"] is None:
            continue
        d, name = row["difference"], f"{row['level']} captions, {row['physics']:.0%} physics ({row['variety']})"
        verdict, bounds = "undecided by one training", ""
        if d["low"] is not None:
            sure, bounds = d["high"] < 0 or d["low"] > 0, f" [{d['low']:+.3f}, {d['high']:+.3f}]"
            verdict = ("better" if d["mean"] < 0 else "worse") if sure else "no difference seen at this size"
        said.append(f"{name}: {d['mean']:+.3f}{bounds} {unit}, {verdict}")
    return said
