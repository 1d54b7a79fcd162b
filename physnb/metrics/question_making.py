"""Four-choice questions about clips of discs, answered by the simulator's state or by finding the discs in the frames.

They serve twice: a vision-language judge is shown the frames and asked, and a generated clip is asked in its place:
the share of questions to which it gives the true clip's answer is a score of the generator. The form is PhysBench's
(text, four options, tags), the next-frame question follows WM-ABench's idea of controlled wrong futures. The questions
and pictures are ours: call results "PhysBench-style", not PhysBench.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from physnb.config import choose, require
from physnb.data import FRAME_STEP_S, WORLD_SIZE, Clip
from physnb.data.random import hash_draws
from physnb.data.worlds import FIRST_FRAME_S
from physnb.metrics.questions import LETTERS, Question, option_lines
from physnb.metrics.scores import Scores, scores
from physnb.metrics.trajectory import PRESENT_AREA, disc_shades, parse_discs

KINDS = ("direction", "faster", "touch", "next", "end")
MIN_FRAMES = 4
MIN_AREA = 0.1  # world units^2; the smallest simulated disc has 0.28
MAX_SPREAD = 1.6  # times a disc's own second moment: two blobs, a smear or noise have more
ELSEWHERE = 2.0  # world units between a disc put elsewhere and every true place of it that is offered
RED, BLUE = 0, 1

DIRECTIONS = (  # counter-clockwise, 45 degrees apart
    "to the right",
    "up and to the right",
    "upwards",
    "up and to the left",
    "to the left",
    "down and to the left",
    "downwards",
    "down and to the right",
)
OPTIONS = {
    "faster": ("the red disc", "the blue disc", "both are equally fast", "neither moves"),
    "touch": ("yes, in the first half", "yes, in the second half", "no, never", "yes, all the time"),
    "end": ("upper left", "upper right", "lower left", "lower right"),
    "next": (
        "what comes next",
        "elsewhere",
        "motion reversed",
        "motion stopped",
    ),  # pictures: these words are not shown
}
TEXTS = {
    "direction": "Compare the red disc's place in the middle of the video with that at its end. Which way did it go?",
    "faster": "Which disc moves faster at the end of the video?",
    "touch": "Do the two discs touch during the video, and when?",
    "next": "Which picture shows what comes next?",
    "end": "In which quarter of the picture is the red disc's centre in the last frame?",
}
TAGS = {  # PhysBench's sub type and ability that come closest
    "direction": ("motion", "perception"),
    "faster": ("motion", "comparison"),
    "touch": ("collision", "dynamic"),
    "next": ("motion", "prediction"),
    "end": ("location", "perception"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipQuestion(Question):
    """A question about clip `index` of a scenario, with what it takes to answer it from another clip of that case.

    turns: quarter turns, counter-clockwise, by which the frames are shown; without them every red disc would start out
    to the right, and a judge could answer unseen.
    """

    kind: str
    scenario: str
    index: int
    turns: int


@dataclass(frozen=True)
class MadeQuestions:
    """Questions, and for each that could not be made its kind, its row in the batch and the reason."""

    questions: tuple[ClipQuestion, ...]
    not_made: tuple[tuple[str, int, str], ...]

    def reasons(self) -> Counter[str]:
        """How often each kind of question was not made, by reason."""
        return Counter(f"{kind}: {reason}" for kind, _, reason in self.not_made)


@dataclass(frozen=True)
class Motion:
    """What is known of one clip's discs. impact_frame: when they meet, NaN if never; None where it is to be found."""

    positions: Float[Tensor, "time disc axis"]
    radii: Float[Tensor, " disc"]
    certain: Bool[Tensor, "time disc"]
    impact_frame: float | None

    @property
    def present(self) -> list[int]:
        """Discs that the clip starts with."""
        return [disc for disc in (RED, BLUE) if self.certain[0, disc]]


class _Unclear(Exception):
    """A question that has no certain answer; the message says why."""


def motions_of(clip: Clip) -> list[Motion]:
    """The motion in each clip: the simulator's where there is one, otherwise as found by colour.

    Certain is a true disc that lies wholly inside the box, and a found one that is compact (second moment at most 1.6
    times that of a disc of its area) and has 0.1 units^2 and a quarter of its usual area.
    """
    if clip.state is None:
        return _found_motions(clip.frames)
    state = clip.state
    impact = ((state.impact_time_s - FIRST_FRAME_S) / FRAME_STEP_S).tolist()
    return [Motion(state.positions[i], state.radii[i], state.inside[i], impact[i]) for i in range(len(clip))]


def _found_motions(frames: UInt8[Tensor, "batch time height width 3"]) -> list[Motion]:
    parsed, shade = parse_discs(frames), disc_shades(frames)
    height, width = shade.shape[-2:]
    column = (torch.arange(width) + 0.5) / width * WORLD_SIZE - parsed.positions[..., :1]
    row = WORLD_SIZE - (torch.arange(height) + 0.5) / height * WORLD_SIZE - parsed.positions[..., 1:]
    moment = (shade.sum(-2) * column**2).sum(-1) + (shade.sum(-1) * row**2).sum(-1)
    spread = moment / shade.sum((-1, -2))  # r^2 / 2 for a disc of radius r, NaN where nothing is seen
    usual = torch.where(parsed.areas >= MIN_AREA, parsed.areas, torch.nan).nanmedian(1).values
    certain = (spread <= MAX_SPREAD * parsed.areas / (2 * torch.pi)) & (parsed.areas >= MIN_AREA)
    certain &= parsed.areas >= PRESENT_AREA * usual[:, None]
    radii = (usual / torch.pi).sqrt()
    return [Motion(parsed.positions[i], radii[i], certain[i], None) for i in range(len(frames))]


def _place(motion: Motion, frame: int, disc: int, turns: int = 0) -> Float[Tensor, " axis"]:
    """Centre of a disc relative to the box's centre, turned as the frames are shown."""
    if not motion.certain[frame, disc]:
        raise _Unclear(f"the {('red', 'blue')[disc]} disc is not wholly there, or not one disc, in a frame that counts")
    x, y = (motion.positions[frame, disc] - WORLD_SIZE / 2).tolist()
    for _ in range(turns):
        x, y = -y, x
    return torch.tensor([x, y])


# Each of these returns the option that holds and whether by a margin; they raise _Unclear where none can be named.


def _direction(motion: Motion, turns: int) -> tuple[str, bool]:
    """Compass direction of the red disc from the middle frame to the last; clear from 0.6 units on, within 15 degrees.

    The first half does not count: a clip that freezes after its start frames must not look like one that moves.
    """
    x, y = (_place(motion, -1, RED, turns) - _place(motion, len(motion.positions) // 2, RED, turns)).tolist()
    if np.hypot(x, y) < 0.3:
        raise _Unclear("the red disc hardly moves")
    eighths = np.degrees(np.arctan2(y, x)) / 45
    return DIRECTIONS[round(eighths) % 8], bool(np.hypot(x, y) >= 0.6 and abs(eighths - round(eighths)) <= 1 / 3)


def _impact_frame(motion: Motion) -> float:
    """When the discs meet, in frames; NaN if never.

    In a found motion that is the frame of the smallest gap, if the gap is at most 0.1 units plus half of its largest
    change from one frame to the next.
    """
    if motion.impact_frame is not None:
        return motion.impact_frame
    gap = _gaps(motion)
    touching = gap.min() <= 0.1 + gap.diff().abs().max() / 2
    return float(motion.certain.all(1).nonzero()[gap.argmin()]) if touching else np.nan


def _gaps(motion: Motion) -> Float[Tensor, " time"]:
    """Distances between the discs' edges in the frames that show both."""
    both = motion.certain.all(1)
    if both.float().mean() < 0.75:
        raise _Unclear("both discs are seen in fewer than three frames of four")
    return (motion.positions[both, RED] - motion.positions[both, BLUE]).norm(dim=-1) - motion.radii.sum()


def _faster(motion: Motion, turns: int) -> tuple[str, bool]:
    """The faster disc over the last quarter; clear with no impact in it and a difference over 20 or under 5 %."""
    since = len(motion.positions) - max(len(motion.positions) // 4, 2)
    steps = len(motion.positions) - 1 - since
    red, blue = (float((_place(motion, -1, d) - _place(motion, since, d)).norm()) / steps for d in (RED, BLUE))
    undisturbed = not _impact_frame(motion) > since
    larger, difference = max(red, blue), abs(red - blue)
    if larger < 0.1 * FRAME_STEP_S:
        return OPTIONS["faster"][3], undisturbed
    if difference <= 0.1 * larger:
        return OPTIONS["faster"][2], undisturbed and difference <= 0.05 * larger
    return OPTIONS["faster"][0 if red > blue else 1], undisturbed and difference >= 0.2 * larger


def _touch(motion: Motion, turns: int) -> tuple[str, bool]:
    """When the discs touch; clear a frame away from the middle, in a found motion two. "All the time": in 9 of 10."""
    found = motion.impact_frame is None
    if found and (_gaps(motion) < 0.2).float().mean() >= 0.9:
        return OPTIONS["touch"][3], True
    when, last = _impact_frame(motion), len(motion.positions) - 1
    if not when <= last:  # NaN: they never meet
        return OPTIONS["touch"][2], True
    return OPTIONS["touch"][0 if when < last / 2 else 1], abs(when - last / 2) >= (2 if found else 1)


def _end(motion: Motion, turns: int) -> tuple[str, bool]:
    """Quarter of the picture; clear half a unit away from its middle lines."""
    x, y = _place(motion, -1, RED, turns).tolist()
    return OPTIONS["end"][(0 if y > 0 else 2) + (x > 0)], min(abs(x), abs(y)) >= 0.5


_READ: dict[str, Callable[[Motion, int], tuple[str, bool]]] = {
    "direction": _direction,
    "faster": _faster,
    "touch": _touch,
    "end": _end,
}


def _ahead(frames: int) -> int:
    """How many frames after the last one shown the next-frame question asks for."""
    return max(1, frames // 8)


def _futures(frames: UInt8[Tensor, "time height width 3"], motion: Motion, rng: np.random.Generator) -> list[Tensor]:
    """Pictures of the true next frame, the discs elsewhere, the motion run backwards, and nothing moving."""
    last, ahead = len(frames) - 1, _ahead(len(frames))
    moments = (last, last - 2 * ahead, last - ahead)
    places = [torch.stack([_place(motion, frame, disc) for disc in motion.present]) for frame in moments]
    if min((a - b).norm(dim=-1).max() for a, b in combinations(places, 2)) < 0.5:
        raise _Unclear("the discs hardly move")
    height, width = frames.shape[1:3]
    rows, columns = ((frames[last] < 230).any(-1).any(axis).nonzero()[:, 0].numpy() for axis in (1, 0))
    if len(rows) == 0:
        raise _Unclear("no disc is seen in the last frame")
    down = np.arange(1 - rows.min(), height - 1 - rows.max())  # a pixel of margin for faint edges
    right = np.arange(1 - columns.min(), width - 1 - columns.max())
    shifts = np.stack(np.meshgrid(down, right, indexing="ij"), -1).reshape(-1, 2)
    moved = shifts[:, None, ::-1] / (width, -height) * WORLD_SIZE  # [shift, 1, axis], world units
    far = [np.linalg.norm(moved + (places[0] - other).numpy(), axis=-1).max(1) >= ELSEWHERE for other in places]
    elsewhere = shifts[np.all(far, axis=0)]
    if len(elsewhere) == 0:
        raise _Unclear("the picture has no room for the discs elsewhere")
    shift = elsewhere[rng.integers(len(elsewhere))].tolist()
    return [frames[last], frames[last].roll(shift, dims=(0, 1)), frames[moments[1]], frames[moments[2]]]


def make_questions(clip: Clip, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> MadeQuestions:
    """Questions of the given kinds about every clip, wherever the answer is clear: at most one a kind and clip.

    direction and end ask about the red disc, in frames that are turned by a random number of quarters; faster and touch
    need two discs; next shows all but the last eighth of the clip and offers the true last frame, the discs elsewhere,
    the motion backwards and the motion stopped. The answer derives from the clip's state and is kept if the frames show
    it too; without a state, from the discs found in the frames. Its place among the four options is a function of
    (seed, scenario, bucket, kind, index).
    Raises ValueError for an unknown kind and for clips shorter than 4 frames.
    """
    for kind in kinds:
        choose("kind of question", kind, KINDS)
    require(
        clip.frames.shape[1] >= MIN_FRAMES, f"questions need clips of {MIN_FRAMES} frames, got {clip.frames.shape[1]}"
    )
    questions, not_made = [], []
    for row, (motion, shown) in enumerate(zip(motions_of(clip), _found_motions(clip.frames), strict=True)):
        for kind in kinds:
            try:
                question = _make(clip, row, motion, kind, seed)
                if _answer(question, shown)[0] != question.answer:
                    raise _Unclear("the frames do not show the answer")
                questions.append(question)
            except _Unclear as reason:
                not_made.append((kind, row, str(reason)))
    return MadeQuestions(tuple(questions), tuple(not_made))


def _make(clip: Clip, row: int, motion: Motion, kind: str, seed: int) -> ClipQuestion:
    if RED not in motion.present:
        raise _Unclear("the red disc is not wholly there in the first frame")
    if kind in ("faster", "touch") and BLUE not in motion.present:
        raise _Unclear("there is no blue disc in the first frame")
    scenario, bucket, index = clip.scenarios[row], clip.buckets[row], int(clip.indices[row])
    draw = hash_draws(seed, f"question/{scenario}/{bucket}/{kind}", np.array([index]))[0]
    rng = np.random.default_rng(int(draw))
    turns, order = int(rng.integers(4)) if kind in ("direction", "end") else 0, rng.permutation(4)
    frames, pictures = clip.frames[row], []
    if kind == "next":
        right, offered = OPTIONS["next"][0], OPTIONS["next"]
        pictures = _futures(frames, motion, rng)
        frames = frames[: len(frames) - _ahead(len(frames))]
    else:
        right, clear = _READ[kind](motion, turns)
        if not clear:
            raise _Unclear("too close to call")
        number = DIRECTIONS.index(right) if kind == "direction" else 0
        offered = OPTIONS.get(kind) or tuple(DIRECTIONS[(number + quarter) % 8] for quarter in (0, 2, 4, 6))
    options = tuple(offered[i] for i in order)
    shown = tuple(f"the picture marked {letter}" for letter in LETTERS) if pictures else options
    sub, ability = TAGS[kind]
    return ClipQuestion(
        id=f"{scenario}/{bucket}/{index}/{kind}",
        text=f"{TEXTS[kind]}\n{option_lines(shown)}",
        options=shown,
        answer=LETTERS[options.index(right)],
        media=(frames.rot90(turns, dims=(1, 2)),),
        tags=dict(task="dynamics", sub=sub, ability=ability, kind=kind, scenario=scenario, bucket=bucket),
        option_media=tuple(pictures[i][None] for i in order) if pictures else (),
        kind=kind,
        scenario=scenario,
        index=index,
        turns=turns,
    )


def answer_from_clip(question: ClipQuestion, generated: Clip) -> tuple[str | None, str | None]:
    """The letter that holds in a generated clip of the same case, or None with the reason.

    The discs are found by colour. None where a disc that counts is missing or is not one disc, or where none of the
    four options holds: a future like none of the pictures, a direction between those offered.
    Raises ValueError unless `generated` is the one clip that the question is about.
    """
    require(len(generated) == 1, f"a question is answered from one clip, got {len(generated)}; index it, clip[0:1]")
    require(
        (generated.scenarios[0], int(generated.indices[0])) == (question.scenario, question.index),
        f"question {question.id} is not about clip {int(generated.indices[0])} of {generated.scenarios[0]!r}",
    )
    return _answer(question, _found_motions(generated.frames)[0])


def _answer(question: ClipQuestion, motion: Motion) -> tuple[str | None, str | None]:
    try:
        if question.kind == "next":
            return _nearest_picture(question, motion), None
        option, _ = _READ[question.kind](motion, question.turns)
    except _Unclear as reason:
        return None, str(reason)
    if option not in question.options:
        return None, f"none of the options holds, but {option!r}"
    return LETTERS[question.options.index(option)], None


def _nearest_picture(question: ClipQuestion, motion: Motion) -> str:
    """The option whose discs the last frame shows, within half the distance between any two options."""
    pictures = _found_motions(torch.stack(question.option_media))
    discs = pictures[0].present
    if not discs:
        raise _Unclear("a picture shows no disc as a whole")
    places = [torch.stack([_place(picture, 0, disc) for disc in discs]) for picture in pictures]
    found = torch.stack([_place(motion, -1, disc) for disc in discs])
    apart = min((a - b).norm(dim=-1).max() for a, b in combinations(places, 2))
    distance = torch.stack([(found - place).norm(dim=-1).max() for place in places])
    if distance.min() > apart / 2:
        raise _Unclear("the last frame is like none of the pictures")
    return LETTERS[int(distance.argmin())]


def questions_by_clip(
    true: Clip, kinds: tuple[str, ...] = KINDS, seed: int = 0
) -> tuple[tuple[ClipQuestion, ...], ...]:
    """The questions about each clip, for `metric_answers` to ask again and again; see `make_questions`."""
    return tuple(make_questions(true[row : row + 1], kinds, seed).questions for row in range(len(true)))


def metric_answers(
    generated: Clip,
    true: Clip,
    *,
    kinds: tuple[str, ...] = KINDS,
    seed: int = 0,
    asked: Sequence[Sequence[ClipQuestion]] | None = None,
) -> dict[str, Scores]:
    """Scores of each clip by name, from questions made of the true clip and answered by the generated one.

    answer_agreement (share, higher is better): of the clip's questions, those to which the generated clip has the true
    answer; a random letter gets 0.25. answer_<kind>: 1 or 0 for the question of that kind. A question that the
    generated clip cannot answer, say because the disc is gone, counts as wrong.
    unanswered_rate (share, lower is better): of the clip's questions, those of that sort.
    NaN, with the reason, where no question can be made of the true clip.
    asked: the questions about each true clip, where they are known; made here otherwise.
    Raises ValueError for clips that do not match or lack a true state, an unknown kind, and fewer than 4 frames.
    Leaves out everything about a disc but its centre and size, and whatever the margins of the questions exclude. A
    question can be easy for the wrong reason (in uniform motion every red disc goes right): read the kinds beside a
    baseline such as another case's true clip.
    """
    require(true.state is not None, "questions need the true state; take the true clip from a simulator")
    require(
        generated.frames.shape == true.frames.shape
        and (generated.scenarios, generated.fps) == (true.scenarios, true.fps)
        and torch.equal(generated.indices, true.indices),
        f"generated {tuple(generated.frames.shape)} and true {tuple(true.frames.shape)} clips do not match",
    )
    right = torch.full((len(true), len(kinds)), torch.nan)
    unanswered = right.clone()
    asked = questions_by_clip(true, kinds, seed) if asked is None else asked
    for row, (questions, motion) in enumerate(zip(asked, _found_motions(generated.frames), strict=True)):
        for question in questions:
            letter, _ = _answer(question, motion)
            right[row, kinds.index(question.kind)] = float(letter == question.answer)
            unanswered[row, kinds.index(question.kind)] = float(letter is None)
    reason = "no question has a clear answer in the true clip"
    values = {"answer_agreement": right.nanmean(1)} | {f"answer_{k}": right[:, i] for i, k in enumerate(kinds)}
    found = {}
    for name, value in values.items():
        reasons = scores(name, "share", value, reason).reasons
        found[name] = Scores(name, "share", value, reasons, lower_is_better=False)
    return found | {"unanswered_rate": scores("unanswered_rate", "share", unanswered.nanmean(1), reason)}
