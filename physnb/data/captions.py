"""What clips are said to show: the same knowledge at several levels, and the closed vocabulary of it.

Levels, each with all that the one before says: "none"; "label", the scenario's name; "description"; "parameters", the
description with the numbers behind the clip; "law", with the law in words besides. "augmented" is for training: every
clip draws one of many phrasings of any of these, its facts in any order, as knowledge augmentation in the pretraining
of language models does (Allen-Zhu and Li 2023, arXiv 2309.14316). Asked without a seed it is "law".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from physnb.config import CAPTION_LEVELS, SCENARIOS, choose, require
from physnb.data.clips import Clip
from physnb.data.random import hash_draws

SHORTEST = 12  # words that encoded captions are padded to at least


@dataclass(frozen=True)
class Knowledge:
    """How a scenario is put into words; the first phrasing is the usual one.

    facts: names of a clip's parameters, and phrasings of each with {} for its number. What has no phrasing here is
    left out.
    """

    descriptions: tuple[str, ...]
    laws: tuple[str, ...]
    facts: Mapping[str, tuple[str, ...]]


RADIUS = ("its radius is {}", "the disc has radius {}", "a disc of radius {}")
SPEED = ("its speed is {}", "it moves at speed {}", "the disc starts with speed {}")
FALL = ("gravity pulls it down ever faster", "its fall gets faster at a constant rate", "it falls faster and faster")

KNOWLEDGE: dict[str, Knowledge] = {
    "uniform": Knowledge(
        ("a red disc moves at constant speed", "a red disc glides along without a force", "a red ball moves evenly"),
        ("its velocity never changes", "without a force motion stays as it is", "it covers equal ways in equal times"),
        dict(radius=RADIUS, speed=SPEED),
    ),
    "parabola": Knowledge(
        ("a red disc is thrown and falls", "a red ball flies sideways and falls", "a red disc is thrown to the side"),
        FALL,
        dict(radius=RADIUS, speed=SPEED),
    ),
    "collision": Knowledge(
        ("a red disc and a blue disc collide", "a red ball hits a blue ball", "two discs meet and bounce off"),
        ("momentum and energy are kept", "the impact is elastic", "nothing of their energy is lost"),
        dict(
            radius_1=("the red radius is {}", "the red disc has radius {}"),
            radius_2=("the blue radius is {}", "the blue disc has radius {}"),
            speed_1=("the red speed is {}", "the red disc comes at speed {}"),
            speed_2=("the blue speed is {}", "the blue disc comes at speed {}"),
        ),
    ),
    "pendulum": Knowledge(
        ("a red disc swings on a rod", "a pendulum with a red bob", "a red ball hangs from a rod and swings"),
        ("it trades speed for height", "gravity pulls it to the lowest point", "the rod keeps its distance"),
        dict(radius=RADIUS, speed=SPEED, length=("the rod has length {}", "its rod is {} long")),
    ),
    "spring": Knowledge(
        ("a red disc on a spring moves back and forth", "a spring pulls a red ball", "a red disc swings on a spring"),
        ("the pull grows with the distance from rest", "it swings like a sine", "every swing takes the same time"),
        dict(radius=RADIUS, speed=SPEED, frequency=("its frequency is {}", "it swings with frequency {}")),
    ),
    "bounce": Knowledge(
        ("a red disc falls and bounces on the floor", "a red ball jumps on the floor", "a bouncing red disc"),
        ("every impact takes a share of its speed", "each jump is lower than the last", "it loses energy at the floor"),
        dict(radius=RADIUS, speed=SPEED, restitution=("it keeps {} of its speed", "the share kept is {}")),
    ),
    "drag": Knowledge(
        ("a red disc is thrown through thick air", "air slows a red ball", "a red disc flies against the air"),
        ("drag grows with the square of speed", "drag acts against its motion", "the faster the more drag"),
        dict(radius=RADIUS, speed=SPEED, drag=("the drag is {}", "air has drag {}")),
    ),
    "orbit": Knowledge(
        ("a red disc circles a star", "a red planet flies round a star", "a red ball is bound to a green star"),
        ("the pull falls with the square of distance", "near the star it is faster", "it sweeps equal areas"),
        dict(radius=RADIUS, speed=("it has {} of circular speed",), pull=("the pull is {}",)),
    ),
    "rolling": Knowledge(
        ("a red disc rolls on a slope", "a red ball rolls on an incline", "a red wheel on a slope"),
        ("two thirds of the pull drive it and one third turns it", "it gets faster down the slope", "it never slips"),
        dict(radius=RADIUS, speed=SPEED, slope=("the slope is {}", "the angle is {}")),
    ),
    "stack": Knowledge(
        ("a red disc on a blue disc falls down", "two discs fall one above the other", "a stack of balls falls"),
        ("both fall alike whatever their mass", "they stop where they land", "heavy and light fall at the same rate"),
        dict(radius_1=("the red radius is {}",), radius_2=("the blue radius is {}",), speed=SPEED),
    ),
    "wave": Knowledge(
        ("a red disc floats on water with waves", "a red ball rides on waves", "waves lift a red float"),
        ("it goes up and down with the wave", "short waves swing faster", "the float only rises and sinks"),
        dict(radius=RADIUS, amplitude=("the waves are {} high",), depth=("the water is {} deep",)),
    ),
    "glide": Knowledge(
        ("a red glider flies through the air", "a red glider sails along", "a glider with green wings"),
        ("lift carries it and speed is traded for height", "diving makes it faster", "lift grows with speed"),
        dict(radius=RADIUS, speed=("it is trimmed for speed {}", "its speed of balance is {}")),
    ),
    "smoke": Knowledge(
        ("grey smoke rises from a hole in the floor", "a plume of smoke goes up", "smoke streams from the floor"),
        ("what is warm and light rises", "no smoke is lost in the box", "what flows in moves other air away"),
        dict(inflow=("the inflow is {}",), buoyancy=("the buoyancy is {}", "it is lifted by {}")),
    ),
    "flame": Knowledge(
        ("a flame burns on the floor and flickers", "a fire flickers on the floor", "a small fire burns"),
        ("hot gas rises and cools", "what cools no longer glows", "more fuel makes a taller flame"),
        dict(inflow=("the fuel is {}",), cooling=("the cooling is {}",), buoyancy=("the buoyancy is {}",)),
    ),
}  # fmt: skip
CAPTIONS = {name: knowledge.descriptions[0] for name, knowledge in KNOWLEDGE.items()}


def number_word(value: float) -> str:
    """A number as captions have it: one decimal below 10, none from there on.

    >>> number_word(2.345), number_word(31.4)
    ('2.3', '31')
    """
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


NUMBER_WORDS = tuple(number_word(n / 10) for n in range(100)) + tuple(str(n) for n in range(10, 100))


def write_captions(clip: Clip, level: str, seed: int | None = None) -> tuple[str, ...]:
    """The caption of each clip at a level: a function of (seed, scenario, index), and without a seed the usual one.

    Clips of scenarios without knowledge here (real videos) keep their own caption at all levels but "none", and so do
    all clips at "description". Raises ValueError for an unknown level.
    """
    choose("caption level", level, CAPTION_LEVELS)
    if level == "none":
        return ("",) * len(clip)
    rows = zip(clip.captions, clip.scenarios, clip.indices.tolist(), clip.parameters, strict=True)
    out = []
    for caption, scenario, index, parameters in rows:
        if scenario not in KNOWLEDGE or level == "description":
            out.append(caption)
        elif level == "label":
            out.append(scenario)
        elif level == "augmented" and seed is not None:
            draws = hash_draws(seed, f"caption/{scenario}", np.array([index]))
            said = paraphrase(KNOWLEDGE[scenario], scenario, parameters, int(draws[0]))
            is_blue = "red" not in caption and "blue" in caption  # phyworld's files have discs of either colour
            out.append(said.replace("red", "blue") if is_blue else said)
        else:
            facts = [phrases[0] for phrases in fact_phrases(KNOWLEDGE[scenario], parameters)]
            laws = KNOWLEDGE[scenario].laws[:1] if level != "parameters" else ()
            out.append(", ".join([caption, *facts, *laws]))
    return tuple(out)


def fact_phrases(knowledge: Knowledge, parameters: Mapping[str, float]) -> list[list[str]]:
    """Every phrasing of every number of a clip that has one."""
    known = {name: number_word(parameters[name]) for name in knowledge.facts if name in parameters}
    return [[phrase.format(word) for phrase in knowledge.facts[name]] for name, word in known.items()]


def paraphrase(knowledge: Knowledge, label: str, parameters: Mapping[str, float], draw: int) -> str:
    """One of the many ways to say something of a clip: each part is there or not, in some phrasing, in any order.

    The whole caption is the bare label in one case of eight; else it has a description, facts and law with chances
    3/4, 1/2 each and 1/2, and is never empty.
    """
    chances = hash_draws(draw % 2**63, "paraphrase", np.arange(32))
    share = (chances >> np.uint64(11)).astype(float) * 2.0**-53
    if share[0] < 1 / 8:
        return label
    facts = [(phrases, 0.5) for phrases in fact_phrases(knowledge, parameters)]
    kinds = [(knowledge.descriptions, 0.75), *facts, (knowledge.laws, 0.5)]
    said = [phrases[int(share[8 + i] * len(phrases))] for i, (phrases, p) in enumerate(kinds) if share[1 + i] < p]
    order = np.argsort(share[16 : 16 + len(said)])
    return ", ".join(said[i] for i in order) if said else knowledge.descriptions[0]


@cache
def vocabulary_of(scenarios: tuple[str, ...], level: str) -> tuple[str, ...]:
    """Every word that captions of these scenarios can have at a level, sorted."""
    choose("caption level", level, CAPTION_LEVELS)
    if level == "none" or not scenarios:
        return ()
    texts: list[str] = []
    for scenario in scenarios:
        known = KNOWLEDGE[scenario]
        facts = [phrase for phrases in known.facts.values() for phrase in phrases]
        texts += {
            "label": [scenario],
            "description": [known.descriptions[0]],
            "parameters": [known.descriptions[0], *(phrases[0] for phrases in known.facts.values())],
            "law": [known.descriptions[0], known.laws[0], *(phrases[0] for phrases in known.facts.values())],
            "augmented": [scenario, *known.descriptions, *known.laws, *facts],
        }[level]
    words = {word for text in texts for word in words_of(text)} - {"{}"}
    return tuple(sorted(words.union(NUMBER_WORDS if level in ("parameters", "law", "augmented") else ())))


def words_of(caption: str) -> list[str]:
    """The words of a caption; commas only part them."""
    return caption.replace(", ", " ").split()


VOCABULARY = vocabulary_of(SCENARIOS, "description")


def encode_captions(captions: Iterable[str], vocabulary: tuple[str, ...] = VOCABULARY) -> Int[Tensor, "batch word"]:
    """Word ids, 1-based and padded with 0; the empty caption is all 0. Raises ValueError on a word not in the list."""
    numbers = {word: number for number, word in enumerate(vocabulary, 1)}
    some = ", ".join(vocabulary[:40]) + (f" and {len(vocabulary) - 40} more" if len(vocabulary) > 40 else "")
    rows = [words_of(caption) for caption in captions]
    ids = torch.zeros(len(rows), max([SHORTEST, *map(len, rows)]), dtype=torch.long)
    for row, words in zip(ids, rows, strict=True):
        for i, word in enumerate(words):
            require(word in numbers, f"caption word {word!r} is not in the model's vocabulary: {some}")
            row[i] = numbers[word]
    return ids
