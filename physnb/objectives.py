"""What a hunt can improve: a score of every generated clip, or of the model's own losses.

    objective_named("tracking_error")                 # one of OBJECTIVES
    Objective("my_score", judge=clip_judge(my_score)) # my_score(generated, true) -> Scores, one value a clip

A judge gives several scores at once, and all are stored; the objective says which of them decides. Distances between
sets of clips (Frechet) are no objectives: a head could not be compared case by case.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from physnb.config import Guidance, choose, require
from physnb.data import Clip
from physnb.data.takes import second_take
from physnb.data.variants import kinds_for, make_impossible
from physnb.likelihood import noise_levels, preference_error
from physnb.metrics import Scores, metric_trajectory
from physnb.metrics.colour import oversaturation
from physnb.metrics.physics_iq import measure_takes
from physnb.metrics.preference import UNTRAINED, RewardModel, metric_reward
from physnb.metrics.question_making import metric_answers, questions_by_clip
from physnb.metrics.scores import scores
from physnb.metrics.trajectory import RESTORE
from physnb.model import VideoDiT

ClipScorer = Callable[[Clip, Sequence[int]], Mapping[str, Scores]]  # generated clips of cases number ...
Others = Mapping[str, VideoDiT] | None  # networks that OtherModel guidance names
ModelScorer = Callable[[VideoDiT, Sequence[Guidance], Sequence[int], Others], Mapping[str, Scores]]
LOSS_LEVELS = 3  # noise levels of the preference objective; ten, as elsewhere, order heads no better for their price


@dataclass(frozen=True)
class Judge:
    """What is measured of every trial and case.

    name, version: the key under which its scores are stored; raise the version with any change of a number.
    prepare(cases, frames_given, seed): what scores those cases, after whatever can be made once. cases is None where
    there is no truth, as of prompts. generates: whether it scores generated clips, rather than the guided model itself.
    """

    name: str
    prepare: Callable[[Clip | None, int, int], ClipScorer | ModelScorer]
    version: int = 1
    generates: bool = True


@dataclass(frozen=True)
class Objective:
    """The score of a judge that a hunt improves."""

    name: str
    judge: Judge
    unit: str = ""
    lower_is_better: bool = True

    @property
    def sign(self) -> int:
        """What turns a difference of scores into one that is better when lower."""
        return 1 if self.lower_is_better else -1


def clip_judge(function: Callable[[Clip, Clip | None], Scores | Tensor], version: int = 1) -> Judge:
    """A judge from a function of (generated clips, their true clips or None) that gives one value a clip.

    Its one score has the function's name, it itself that of the module too. NaN is a clip that could not be judged.
    """
    name = function.__name__

    def prepare(cases: Clip | None, frames_given: int, seed: int) -> ClipScorer:
        def score(generated: Clip, rows: Sequence[int]) -> dict[str, Scores]:
            found = function(generated, None if cases is None else cases[list(rows)])
            values = found.values if isinstance(found, Scores) else torch.as_tensor(found).float().cpu()
            require(
                values.shape == (len(generated),),
                f"{name} gave {tuple(values.shape)} values for {len(generated)} clips; give one each",
            )
            if isinstance(found, Scores):
                return {name: replace(found, name=name)}
            return {name: scores(name, "", values, f"{name} says not a number")}

        return score

    return Judge(f"{function.__module__}.{name}", prepare, version)


def joint_judge(*judges: Judge) -> Judge:
    """One judge with the scores of several, so that a clip is generated once for all of them.

    Raises ValueError for fewer than two, and for one that scores the model rather than its clips.
    """
    require(len(judges) > 1, "a joint judge needs two judges or more")
    losses = [judge.name for judge in judges if not judge.generates]
    require(not losses, f"{', '.join(losses)} scores the model, not its clips, and cannot join judges of clips")

    def prepare(cases: Clip | None, frames_given: int, seed: int) -> ClipScorer:
        scorers = [judge.prepare(cases, frames_given, seed) for judge in judges]
        return lambda generated, rows: {k: v for scorer in scorers for k, v in scorer(generated, rows).items()}

    return Judge("+".join(f"{judge.name}@{judge.version}" for judge in judges), prepare)


def simulated(judge: str, cases: Clip | None) -> Clip:
    """The cases, which a judge of simulated worlds cannot do without."""
    require(
        cases is not None and cases.state is not None,
        f"{judge} compares with the true motion, which these cases lack; use an objective of the generated clip alone",
    )
    return cases


def prepare_trajectory(cases: Clip | None, frames_given: int, seed: int) -> ClipScorer:
    """The true motion, and beside it whether guidance burns."""
    cases = simulated("trajectory", cases)

    def score(generated: Clip, rows: Sequence[int]) -> dict[str, Scores]:
        true = cases[list(rows)]
        found = metric_trajectory(generated, true, frames_given=frames_given)
        return found | dict(oversaturation=oversaturation(generated, true, frames_given=frames_given))

    return score


def prepare_restored(cases: Clip | None, frames_given: int, seed: int) -> ClipScorer:
    """The true motion once more, of discs that are brought back to full shade before they are looked for.

    Guidance strengthens contrast, and a faded disc that is found again looks like a disc that was kept. Here all
    clips, guided or not, have their discs restored, so what is left of a difference is not contrast.
    """
    cases = simulated("trajectory", cases)

    def score(generated: Clip, rows: Sequence[int]) -> dict[str, Scores]:
        true = cases[list(rows)]
        found = metric_trajectory(generated, true, frames_given=frames_given, restore=RESTORE)
        return {f"{name}/restored": replace(value, name=f"{name}/restored") for name, value in found.items()}

    return score


def prepare_physics_iq(cases: Clip | None, frames_given: int, seed: int) -> ClipScorer:
    """Physics-IQ beside a second take of every case, measured once."""
    cases = simulated("Physics-IQ", cases)
    takes = measure_takes(cases, second_take(cases, seed), frames_given=frames_given)

    def score(generated: Clip, rows: Sequence[int]) -> dict[str, Scores]:
        found = takes[list(rows)].compare(generated).scores()
        return dict(physics_iq_verified=found["verified"], physics_iq_raw=found["physics_iq_raw"])

    return score


def prepare_answers(cases: Clip | None, frames_given: int, seed: int) -> ClipScorer:
    cases = simulated("made questions", cases)
    asked = questions_by_clip(cases, seed=seed)

    def score(generated: Clip, rows: Sequence[int]) -> dict[str, Scores]:
        return metric_answers(generated, cases[list(rows)], asked=[asked[row] for row in rows])

    return score


def prepare_reward(cases: Clip | None, frames_given: int, seed: int, *, model: RewardModel = UNTRAINED) -> ClipScorer:
    return lambda generated, rows: dict(reward=metric_reward(generated, model))


def prepare_preference(cases: Clip | None, frames_given: int, seed: int) -> ModelScorer:
    """Which of lawful and law-breaking clips the guided model denoises better; nothing is generated.

    Guidance of weight -1 turns C + w (C - P) into P: the broken model itself.
    """
    cases = simulated("plausibility preference", cases)
    kinds = dict.fromkeys(kind for scenario in dict.fromkeys(cases.scenarios) for kind in kinds_for(scenario))
    variants = [make_impossible(cases, kind, frames_given=frames_given, seed=seed) for kind in kinds]

    def score(model: VideoDiT, guidance: Sequence[Guidance], rows: Sequence[int], others: Others) -> dict[str, Scores]:
        rows = list(rows)
        levels = noise_levels(LOSS_LEVELS, model.config.noise_shift)
        mine = [variant[rows] for variant in variants]
        found = preference_error(model, cases[rows], mine, guidance=guidance, others=others, levels=levels, seed=seed)
        return {name: found[name] for name in PREFERENCE}

    return score


TRAJECTORY = Judge("trajectory", prepare_trajectory, version=2)
RESTORED = Judge("trajectory_restored", prepare_restored)
PHYSICS_IQ = Judge("physics_iq", prepare_physics_iq)
ANSWERS = Judge("answers", prepare_answers)
REWARD = Judge("reward", prepare_reward)
PLAUSIBILITY = Judge("plausibility", prepare_preference, generates=False)
PREFERENCE = (
    "preference_error",
    "preference_error/matched",
    "preference_margin",
    "preference_margin/matched",
)
OBJECTIVES = {
    found.name: found
    for found in (
        Objective("tracking_error", TRAJECTORY, "units"),
        Objective("position_error", TRAJECTORY, "units"),  # given presence: read missing_rate beside it
        Objective("velocity_error", TRAJECTORY, "units/s"),
        Objective("missing_rate", TRAJECTORY, "share"),  # a frozen disc is there: for asking what keeps discs alone
        Objective("tracking_error/restored", RESTORED, "units"),  # these are blind to contrast
        Objective("position_error/restored", RESTORED, "units"),
        Objective("velocity_error/restored", RESTORED, "units/s"),
        Objective("physics_iq_verified", PHYSICS_IQ, "points", lower_is_better=False),
        Objective("physics_iq_raw", PHYSICS_IQ, "points", lower_is_better=False),
        Objective("answer_agreement", ANSWERS, "share", lower_is_better=False),
        Objective("reward", REWARD, "log-odds", lower_is_better=False),
        *(Objective(name, PLAUSIBILITY, "share") for name in PREFERENCE[:2]),
        *(Objective(name, PLAUSIBILITY, "log ratio", lower_is_better=False) for name in PREFERENCE[2:]),
    )
}


def reward_objective(model: RewardModel) -> Objective:
    """A reward fitted to choices as an objective; the scores of every fitted model are stored apart."""
    digest = hashlib.sha256(model.weights.numpy().tobytes()).hexdigest()[:8]
    judge = Judge(f"reward/{digest}", partial(prepare_reward, model=model))
    return Objective("reward", judge, "log-odds", lower_is_better=False)


def objective_named(name: str) -> Objective:
    """The objective of OBJECTIVES called `name`, or a function given as `module:function`, lower values being better.

    The version of a function is a hash of its module's source: after a change scores are made anew.
    Raises ValueError naming what there is.
    """
    module, colon, function = name.partition(":")
    if not colon:
        return OBJECTIVES[choose("objective", name, OBJECTIVES)]
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(f"objective {name} cannot be imported ({error}); give module:function") from None
    require(inspect.isfunction(found), f"objective {name} is no function of (generated, true)")
    try:
        source = inspect.getsource(inspect.getmodule(found))
    except (OSError, TypeError):
        raise ValueError(f"objective {name} lies in no file; write it into one, or use clip_judge") from None
    version = int(hashlib.sha256(source.encode()).hexdigest()[:8], 16)
    return Objective(found.__name__, clip_judge(found, version))
