"""What the study will do, written down before any of its clips is made: sizes, methods, hypotheses, rules.

Nothing here reads a result. `physnb.study.verdicts` holds each hypothesis against the tables that the parts leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from physnb.config import PHENOMENA, HuntConfig, from_json, require


class Form(NamedTuple):
    """A way to break a head: a kind of perturbation, and the axis along which it acts."""

    kind: str
    axis: str = "all"

    def __str__(self) -> str:
        return self.kind if self.axis == "all" else f"{self.kind}, {self.axis}"


FORMS = (  # the first is the study's own; uniform, mean query and blur differ in what a broken head still sees
    Form("identity"),
    Form("identity", "space"),
    Form("identity", "time"),
    Form("uniform"),
    Form("mean_query"),
    Form("blur"),
    Form("temperature"),
    Form("zero"),
)
MOTION = "velocity_error/restored"  # lawful motion, where the disc is there, blind to contrast: the primary measure
MIXED = "tracking_error/restored"  # the same with presence: a missing disc counts as 5 units
PRESENCE = "missing_rate/restored"
PLACE = "position_error/restored"
PLAIN = "tracking_error"  # rewards contrast: what the first hunts of this project were misled by
OBJECTIVES = (MOTION, MIXED, PLACE, PLAIN, "physics_iq_verified", "answer_agreement", "reward")  # one judge has all
LIKELIHOOD = "preference_margin/matched"  # PPE: scores the model's losses and generates nothing
INTERVALS = {"all steps": (0.0, 1.0), "first 3 of 5": (0.0, 0.6), "last 3 of 5": (0.4, 1.0)}
LOSS_MARGIN = 0.01  # a setting may be chosen if it loses no more than this share of discs, in the mean
NEGLIGIBLE = 0.05  # an effect whose whole interval is within 5 % of the unguided error is none
WORTHWHILE = 0.20  # the aim: 20 % less error than unguided
# The second study: planned when the tables of the first were known, run on cases and noise drawn from this seed alone.
SECOND_SEED = 4000
SECOND_SIZES = (1, 2, 4, 8)  # of head sets, up to top_k
SECOND_WEIGHTS = (1.0, 2.0, 4.0, 8.0)
SECOND_STEPS = 1  # sampling steps that every method may choose instead of the hunt's
EXPLORATION = "exploration on cases of the first study"


@dataclass(frozen=True)
class StudyPlan:
    """Sizes of the study; cases are those of each scenario.

    hunt: worlds, split, cases, steps, seed and the weight at which heads are compared. map_cases: for every form but
    the first, for likelihood and for the other conditions of transfer; twice as many to compare settings.
    phenomenon_cases: of each phenomenon, to choose on. repetition_seeds: of whole hunts on other cases and noise.
    rounds: of HeadHunter, which keeps top_k / rounds in each. draws: of random head sets. few_steps_cases: to compare
    the hunt's sampling steps with `many_steps`. step_counts: of unguided sampling, a table beside.
    """

    hunt: HuntConfig = field(
        default_factory=lambda: HuntConfig(
            objective=MOTION, selection_cases=32, confirmation_cases=192, top_k=8, random_draws=3
        )
    )
    map_cases: int = 16
    inside_cases: int = 64
    phenomena: tuple[str, ...] = PHENOMENA
    phenomenon_cases: int = 6
    starts: tuple[int, ...] = (1, 6)
    repetition_seeds: tuple[int, ...] = (1000, 2000)
    rounds: int = 2
    weights: tuple[float, ...] = (1.0, 2.0, 4.0)
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    draws: int = 3
    orders: int = 4
    many_steps: int = 20
    step_counts: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    few_steps_cases: int = 6
    attention_clips: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.hunt, dict):
            object.__setattr__(self, "hunt", from_json(HuntConfig, self.hunt))
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
            if isinstance(value, int):
                require(value > 0, f"study {item.name} must be positive, got {value}")
        require(self.hunt.top_k % self.rounds == 0, f"{self.rounds} rounds cannot share top k {self.hunt.top_k} evenly")
        enough = 2 * self.map_cases <= self.hunt.selection_cases
        require(enough, "twice the map cases must be among the selection cases, for settings are compared on them")

    def hunt_with(self, **settings: Any) -> HuntConfig:
        """The hunt with other settings, for example another seed."""
        return replace(self.hunt, **settings)


PLANS = {
    "full": StudyPlan(),
    "smoke": StudyPlan(  # a minute: shows that every part runs, and nothing else
        hunt=HuntConfig(
            objective=MOTION, selection_cases=4, confirmation_cases=6, top_k=2, steps=2, random_draws=2
        ),
        map_cases=2, inside_cases=4, phenomena=("pendulum", "drag"), phenomenon_cases=2, starts=(1,),
        repetition_seeds=(1000, 2000), weights=(1.0, 2.0), strengths=(0.5, 1.0), draws=2, orders=2, many_steps=4,
        step_counts=(1, 2), few_steps_cases=2, attention_clips=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Hypothesis:
    """One claim, where it comes from, and the rule that decides it; fixed before the runs.

    table: the part whose table decides. rule: when the claim holds; when it is refuted; anything else is undecided.
    """

    name: str
    claim: str
    source: str
    table: str
    rule: str


HYPOTHESES = (
    Hypothesis(
        "aim",
        "Guidance away from the best head set lowers the velocity error of discs that are there, out of distribution, "
        "by at least 20 %.",
        "the question of the project",
        "final",
        "Relative difference to unguided on fresh cases: holds if the interval is below 0 and the mean at most -20 %; "
        "refuted if the whole interval is above -20 %; a well-powered no if it lies within 5 % of zero.",
    ),
    Hypothesis(
        "better than random",
        "The best head set lowers that error more than as many random heads at the same setting.",
        "the question of the project",
        "final",
        "Paired difference to the mean of 3 random draws: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "better than controls",
        "The best head set lowers that error more than the best of the other methods at its own best setting.",
        "the question of the project",
        "final",
        "Paired difference to the control with the lowest mean on the selection cases: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "presence first",
        "Most of what hunted heads do to the tracking error is keeping discs, not moving them.",
        "pilot",
        "final",
        "Heads hunted by tracking error, restored: holds if the missing rate falls and motion given presence does not "
        "change by more than 5 % either way; refuted if motion given presence falls beyond doubt.",
    ),
    Hypothesis(
        "price",
        "In distribution the same guidance hurts.",
        "pilot",
        "final_id",
        "Best head set, velocity error restored, id: holds if the paired difference is above 0, refuted if below.",
    ),
    Hypothesis(
        "few steps",
        "Five sampling steps rank heads as twenty do.",
        "pilot",
        "steps",
        "Rank correlation of head effects by tracking error, restored: holds if the interval is above 0.7, refuted if "
        "below.",
    ),
    Hypothesis(
        "one head",
        "L2H0 alone, the best head of the coarser model that this one was grown from, lowers the velocity error of "
        "discs that are there.",
        "the last hunt on that model, blind to contrast",
        "heads",
        "Effect on fresh cases at w = 2: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "kinds agree",
        "Which heads help does not depend on how they are broken.",
        "the note: what perturbation should we use?",
        "kinds",
        "Rank correlation of identity with uniform, mean query, blur and zero, tracking error restored: holds if all "
        "four intervals are above 0, refuted if any is below.",
    ),
    Hypothesis(
        "objectives agree",
        "Objectives that need no true motion (PPE, reward) find the heads that the motion error finds.",
        "the note: what evaluation score can we use?",
        "objectives",
        "Rank correlation of each with tracking error, restored: holds if both intervals are above 0, refuted if "
        "either is below.",
    ),
    Hypothesis(
        "hunts repeat",
        "Whole hunts with other seeds choose the same heads more often than chance.",
        "the question of the project",
        "repetitions",
        "Shared heads of each pair of hunts by tracking error, restored: holds if every pair has p < 0.05 "
        "(hypergeometric), refuted if no pair has.",
    ),
    Hypothesis(
        "transfer",
        "Heads hunted on the worlds help on phenomena that no head was hunted on.",
        "the question of the project",
        "transfer",
        "Effect on phenomena minus that of random heads, tracking error restored: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "another training",
        "The places of helpful heads are an accident of training: those of this model do nothing for another one.",
        "the question of the project",
        "transfer",
        "Effect of this model's heads in the other training minus that of random heads: holds if the interval contains "
        "0, refuted if below.",
    ),
    Hypothesis(
        "attention",
        "Heads that look along the disc's path are those that help when guided away from.",
        "the question of the project",
        "attention",
        "Rank correlation over heads of following with effect, tracking error restored: holds if the interval is below "
        "0 (helpful effects are negative), refuted if above.",
    ),
    Hypothesis(
        "aim, wider choice",
        "With form, number of heads, strength and sampling steps among the choices, guidance away from the best head "
        "set lowers the velocity error of discs that are there, out of distribution, by at least 20 %.",
        EXPLORATION,
        "wider",
        "As the aim, on the cases of the second study; unguided clips have the usual number of steps.",
    ),
    Hypothesis(
        "better than random, wider choice",
        "That set lowers that error more than as many random heads in the same form and setting.",
        EXPLORATION,
        "wider",
        "Paired difference to the mean of 3 random draws: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "better than controls, wider choice",
        "That set lowers that error more than the best of the other methods at its own best setting.",
        EXPLORATION,
        "wider",
        "Paired difference to the control with the lowest mean on the selection cases: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "better than one step",
        "That set lowers that error more than unguided sampling in one step does.",
        "the table of sampling steps, which nobody had expected",
        "wider",
        "Paired difference to unguided clips of one step: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "first set again",
        "The best head set of the first study, at its setting, lowers that error on new cases.",
        "the first study",
        "wider",
        "Paired difference to unguided: holds below 0, refuted above 0.",
    ),
    Hypothesis(
        "pull",
        "Out of distribution unguided discs move at speeds pulled toward those of training, and guidance away from the "
        "best set lessens the pull on slow and on fast discs alike: it does not just speed up motion.",
        EXPLORATION,
        "pull",
        "Pull is the error of the speed before impact, positive toward the training range: holds if it is above 0 "
        "unguided and its paired difference below 0, both for slow and for fast discs; refuted if any of the four is "
        "on the other side.",
    ),
)  # fmt: skip

STOPPING_RULE = (
    "Every number of cases is fixed here. No part is repeated with more cases because of what it shows; a part that "
    "was interrupted goes on with the same cases. A fault of the code that is found in a part is mended, the part "
    "is run again whole, and the findings say so."
)
