from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.config import SCENARIOS
from physnb.data import CAPTIONS, Clip, DiscState, render, simulate
from physnb.data.worlds import frame_times
from physnb.metrics.question_making import (
    DIRECTIONS,
    KINDS,
    OPTIONS,
    answer_from_clip,
    make_questions,
    metric_answers,
    motions_of,
    questions_by_clip,
)
from physnb.metrics.questions import CHANCE, LETTERS, Reply, read_options, score_answers

FRAMES, SIZE = 16, 32


def test_a_disc_that_no_picture_shows_whole_asks_nothing_of_the_future():
    small = simulate("collision", "ood", range(24), frames=8, size=16)  # discs of half a pixel
    made = make_questions(small, ("next",))
    assert len(made.questions) + len(made.not_made) == 24


def clip_of(paths: list[torch.Tensor], radii: list[float], impact_s: float = torch.nan, scenario="uniform") -> Clip:
    """One clip of discs on given paths [time, axis], red first."""
    frames = len(paths[0])
    positions = torch.full((1, frames, 2, 2), torch.nan)
    for disc, path in enumerate(paths):
        positions[0, :, disc] = path
    sizes = torch.tensor([[*radii, *[torch.nan] * (2 - len(radii))]])
    state = DiscState(positions, torch.zeros_like(positions), sizes, torch.tensor([impact_s]))
    return Clip(render(state, 64), (CAPTIONS[scenario],), (scenario,), ("id",), torch.tensor([0]), state=state)


def line(start, velocity, frames=FRAMES) -> torch.Tensor:
    """Points of a straight path, [time, axis]."""
    return torch.tensor(start) + torch.from_numpy(frame_times(frames)).float()[:, None] * torch.tensor(velocity)


def right_option(question) -> str:
    return question.options[LETTERS.index(question.answer)]


def made(clip: Clip, kind: str, seed: int = 0):
    (question,) = make_questions(clip, (kind,), seed).questions
    return question


def as_shown(clip: Clip, question) -> torch.Tensor:
    """Where the red disc is in the frames that a judge sees, found by colour, [time, axis]."""
    return motions_of(replace(clip, frames=question.media[0][None], state=None))[0].positions[:, 0]


def unseen(clip: Clip) -> Clip:
    """The same frames without the simulator's word."""
    return replace(clip, state=None)


@pytest.fixture(scope="module")
def clips() -> Clip:
    return Clip.concatenate([simulate(name, "id", range(12), frames=FRAMES, size=SIZE) for name in SCENARIOS])


@pytest.mark.parametrize(
    ("velocity", "way"),
    [
        ((2.0, 0.0), 0),
        ((1.5, 1.5), 1),
        ((0.0, 2.0), 2),
        ((-2.0, 0.0), 4),
        ((-2.0, -2.0), 5),
        ((0.0, -2.0), 6),
    ],
)
def test_direction_and_end_follow_the_path_as_it_is_shown(velocity, way):
    middle = frame_times(FRAMES).mean()
    start = [5.7 - velocity[0] * middle, 5.7 - velocity[1] * middle]
    clip = clip_of([line(start, velocity)], [1.0])
    turns = set()
    for seed in range(8):
        question = made(clip, "direction", seed)
        assert right_option(question) == DIRECTIONS[(way + 2 * question.turns) % 8]
        turns.add(question.turns)
        x, y = (as_shown(clip, question)[-1] - as_shown(clip, question)[FRAMES // 2]).sign().tolist()
        sides = {"right": x > 0, "left": x < 0, "up": y > 0, "down": y < 0}
        assert all(sides[word] for word in sides if word in right_option(question))
        question = made(clip, "end", seed)
        x, y = as_shown(clip, question)[-1].tolist()
        assert right_option(question) == f"{'upper' if y > 5 else 'lower'} {'right' if x > 5 else 'left'}"
    assert len(turns) > 2


@pytest.mark.parametrize(
    ("red", "blue", "option"),
    [
        ((2.0, 0.0), (1.0, 0.0), 0),
        ((1.0, 0.0), (-2.0, 0.0), 1),
        ((1.0, 0.0), (-1.0, 0.0), 2),
        ((0.0, 0.0), (0.0, 0.0), 3),
    ],
)
def test_the_faster_disc_is_the_faster_disc(red, blue, option):
    clip = clip_of([line([2.0, 2.5], red), line([6.0, 7.5], blue)], [1.0, 1.0])
    assert right_option(made(clip, "faster")) == OPTIONS["faster"][option]
    assert right_option(made(unseen(clip), "faster")) == OPTIONS["faster"][option]


def meeting(at_s: float, gap: float = 0.0) -> Clip:
    """Equal discs on one line that turn back at `at_s` with `gap` between them."""
    since = torch.from_numpy(frame_times(FRAMES)).float() - at_s
    red = torch.stack([4 - gap / 2 - 2 * since.abs(), torch.full_like(since, 5.0)], 1)
    return clip_of(
        [red, torch.tensor([10.0, 0.0]) + torch.tensor([-1.0, 1.0]) * red], [1.0, 1.0], at_s if gap == 0 else torch.nan
    )


@pytest.mark.parametrize(
    ("clip", "option"),
    [
        (meeting(0.4), 0),
        (meeting(1.1), 1),
        (meeting(0.76, gap=1.2), 2),
    ],
)
def test_touching_is_told_with_its_half(clip, option):
    assert right_option(made(clip, "touch")) == OPTIONS["touch"][option]
    assert right_option(made(unseen(clip), "touch")) == OPTIONS["touch"][option]


def test_discs_that_move_together_touch_all_the_time():
    clip = clip_of([line([2.0, 5.0], [2.0, 0.0]), line([4.0, 5.0], [2.0, 0.0])], [1.0, 1.0])
    assert right_option(made(unseen(clip), "touch")) == OPTIONS["touch"][3]


def test_the_next_picture_is_the_last_frame_and_the_others_are_not(clips):
    questions = make_questions(clips, ("next",)).questions
    assert len(questions) > 15
    for question in questions:
        row = [
            i
            for i in range(len(clips))
            if (clips.scenarios[i], int(clips.indices[i])) == (question.scenario, question.index)
        ]
        frames = clips.frames[row[0]]
        pictures = {letter: picture[0] for letter, picture in zip(LETTERS, question.option_media, strict=True)}
        assert torch.equal(pictures.pop(question.answer), frames[15])
        others = [next((k for k in (11, 13) if torch.equal(p, frames[k])), "elsewhere") for p in pictures.values()]
        assert sorted(map(str, others)) == ["11", "13", "elsewhere"]
        assert torch.equal(question.media[0], frames[:14])
        assert "comes next" not in "".join(question.options)


def test_every_question_has_four_distinct_options_in_the_official_form(clips):
    for question in make_questions(clips).questions:
        assert len(set(question.options)) == 4 and read_options(question.text) == question.options
        if question.option_media:
            flat = {picture.numpy().tobytes() for picture in question.option_media}
            assert len(flat) == 4
        assert {"task", "sub", "ability", "kind", "scenario", "bucket"} == question.tags.keys()


def test_answers_come_from_the_state_and_agree_with_the_frames(clips):
    from_state, from_frames = make_questions(clips), make_questions(unseen(clips))
    found = {q.id: q for q in from_frames.questions}
    shared = [(q, found[q.id]) for q in from_state.questions if q.id in found]
    assert len(shared) > 0.8 * len(from_state.questions)
    assert all(a.answer == b.answer and a.options == b.options for a, b in shared if a.kind != "direction")
    assert all(right_option(a) == right_option(b) for a, b in shared)


def test_the_place_of_the_answer_is_drawn_from_seed_and_index():
    clip = simulate("collision", "id", range(40), frames=FRAMES, size=SIZE)
    first = make_questions(clip).questions
    assert [q.answer for q in make_questions(clip).questions] == [q.answer for q in first]
    assert [q.answer for q in make_questions(clip, seed=1).questions] != [q.answer for q in first]
    counts = Counter(q.answer for q in first)
    assert all(abs(counts[letter] / len(first) - 0.25) < 0.13 for letter in LETTERS), counts
    always = score_answers(first, [Reply(q.id, "A") for q in first])
    assert always.overall.mean == counts["A"] / len(first)


@given(st.permutations(range(6)))
@settings(max_examples=5, deadline=None)
def test_a_clip_has_the_same_questions_in_any_batch(order):
    clip = simulate("collision", "ood", range(6), frames=FRAMES, size=SIZE)
    before = clip.frames.clone()
    together = {q.id: q for q in make_questions(clip[list(order)]).questions}
    alone = [q for i in range(6) for q in make_questions(clip[i : i + 1]).questions]
    assert {q.id: (q.text, q.answer) for q in alone} == {i: (q.text, q.answer) for i, q in together.items()}
    assert torch.equal(clip.frames, before)


def test_what_is_not_asked_is_counted_with_its_reason():
    clip = simulate("uniform", "id", range(5), frames=FRAMES, size=SIZE)
    reasons = make_questions(clip, ("faster", "touch")).reasons()
    assert reasons == {f"{kind}: there is no blue disc in the first frame": 5 for kind in ("faster", "touch")}
    white = replace(unseen(clip), frames=torch.full_like(clip.frames, 255))
    empty = make_questions(white)
    assert empty.questions == () and len(empty.not_made) == 25
    assert set(empty.reasons()) == {f"{kind}: the red disc is not wholly there in the first frame" for kind in KINDS}
    still = clip_of([line([3.0, 3.0], [0.0, 0.0])], [1.0])
    assert make_questions(still, ("direction", "next")).reasons() == {
        "direction: the red disc hardly moves": 1,
        "next: the discs hardly move": 1,
    }
    oblique = clip_of([line([3.0, 3.0], [2.0, 0.85])], [1.0])  # 23 degrees: between two directions
    assert make_questions(oblique, ("direction",)).reasons() == {"direction: too close to call": 1}


def test_noise_and_two_blobs_are_not_taken_for_a_disc():
    clip = clip_of([line([2.0, 5.0], [3.0, 0.0])], [1.0])
    noise = torch.randint(0, 256, clip.frames.shape, generator=torch.Generator().manual_seed(0)).byte()
    two = torch.minimum(clip.frames, clip.frames.flip(3))
    for frames in (noise, two):
        assert not motions_of(replace(unseen(clip), frames=frames))[0].certain[0, 0]
    assert motions_of(unseen(clip))[0].certain[:, 0].all()


# --- the generator's score ---


def test_a_copy_answers_all_and_the_sanity_ladder_holds(clips):
    static = torch.cat([clips.frames[:, :3], clips.frames[:, 2:3].expand(-1, FRAMES - 3, -1, -1, -1)], dim=1)
    others = dict(
        copy=clips.frames,
        reversed=clips.frames.flip(1),
        static=static,
        white=torch.full_like(clips.frames, 255),
        noise=torch.randint(0, 256, clips.frames.shape, generator=torch.Generator().manual_seed(0)).byte(),
    )
    found = {name: metric_answers(replace(unseen(clips), frames=f.clone()), clips) for name, f in others.items()}
    means = {name: found[name]["answer_agreement"].estimate().mean for name in found}
    assert means["copy"] == 1 and means["white"] == means["noise"] == 0
    assert means["reversed"] < 0.5 and means["static"] < 0.5, means
    assert found["white"]["unanswered_rate"].estimate().mean == 1  # absence is wrong, not unjudged
    assert found["copy"]["unanswered_rate"].estimate().mean == 0
    for kind in KINDS:
        values = found["copy"][f"answer_{kind}"].values
        assert set(values[~values.isnan()].tolist()) == {1.0}
        assert not found["copy"][f"answer_{kind}"].lower_is_better
    assert found["copy"]["answer_touch"].values[:24].isnan().all()  # one disc
    assert found["copy"]["answer_touch"].reasons[0] == "no question has a clear answer in the true clip"


def test_random_answers_score_chance():
    clip = simulate("collision", "id", range(60), frames=FRAMES, size=SIZE)
    questions = make_questions(clip).questions
    draws = torch.randint(0, 4, (len(questions),), generator=torch.Generator().manual_seed(0)).tolist()
    found = score_answers(questions, [Reply(q.id, LETTERS[i]) for q, i in zip(questions, draws, strict=True)])
    assert found.overall.mean == pytest.approx(CHANCE, abs=3 * (0.1875 / len(questions)) ** 0.5)


def test_a_generated_clip_answers_by_what_it_shows():
    true = clip_of([line([2.0, 5.7], [3.0, 0.0])], [1.0])
    back = clip_of([line([8.0, 5.7], [-3.0, 0.0])], [1.0])
    for kind in ("direction", "end", "next"):
        question = made(true, kind)
        assert answer_from_clip(question, unseen(true)) == (question.answer, None)
        letter, _ = answer_from_clip(question, unseen(back))
        assert letter != question.answer
    gone = unseen(true).frames.clone()
    gone[:, -1] = 255
    letter, reason = answer_from_clip(made(true, "end"), replace(unseen(true), frames=gone))
    assert letter is None and "the red disc is not wholly there, or not one disc" in reason
    upwards = clip_of([line([3.0, 3.0], [2.0, 2.0])], [1.0])
    letter, reason = answer_from_clip(made(true, "direction"), unseen(upwards))
    assert letter is None and reason.startswith("none of the options holds, but ")
    far = clip_of([line([2.0, 5.7], [3.0, 0.0])[:, [1, 0]]], [1.0])
    assert answer_from_clip(made(true, "next"), unseen(far))[0] != made(true, "next").answer


@pytest.mark.parametrize(
    ("generated", "true", "message"),
    [
        (lambda c: c[:3], lambda c: c, r"generated \(3, 16, 32, 32, 3\) and true \(36, 16, 32, 32, 3\) clips do not"),
        (lambda c: c, unseen, "questions need the true state"),
        (lambda c: replace(c, fps=24.0), lambda c: c, "clips do not match"),
        (lambda c: replace(c, indices=c.indices + 1), lambda c: c, "clips do not match"),
        (lambda c: replace(c, frames=c.frames[:, :, :, :30]), lambda c: c, "clips do not match"),
    ],
)
def test_clips_that_do_not_belong_together_are_refused(clips, generated, true, message):
    with pytest.raises(ValueError, match=message):
        metric_answers(generated(clips), true(clips))


def test_questions_made_before_give_the_same_scores(clips):
    generated, asked = unseen(clips[[1, 0, *range(2, len(clips))]]), questions_by_clip(clips, seed=3)
    generated = replace(generated, indices=clips.indices, scenarios=clips.scenarios)
    fresh, again = metric_answers(generated, clips, seed=3), metric_answers(generated, clips, asked=asked)
    for name, value in fresh.items():
        assert torch.equal(value.values.nan_to_num(-1), again[name].values.nan_to_num(-1)), name
    few = metric_answers(generated[[2, 0]], clips[[2, 0]], asked=[asked[2], asked[0]])["answer_agreement"].values
    assert torch.equal(few.nan_to_num(-1), fresh["answer_agreement"].values[[2, 0]].nan_to_num(-1))


def test_bad_input_is_named(clips):
    with pytest.raises(ValueError, match="unknown kind of question 'colour'"):
        make_questions(clips, ("colour",))
    for frames in (0, 1, 3):
        with pytest.raises(ValueError, match=f"questions need clips of 4 frames, got {frames}"):
            make_questions(replace(unseen(clips), frames=clips.frames[:, :frames]))
        with pytest.raises(ValueError, match=f"questions need clips of 4 frames, got {frames}"):
            short = replace(clips, frames=clips.frames[:, :frames])
            metric_answers(short, short)
    question = made(clips[0:1], "direction")
    with pytest.raises(ValueError, match="a question is answered from one clip, got 2"):
        answer_from_clip(question, clips[0:2])
    with pytest.raises(ValueError, match="question uniform/id/0/direction is not about clip 1 of 'uniform'"):
        answer_from_clip(question, clips[1:2])


def test_odd_and_oblong_frames_are_judged_like_square_ones():
    clip = clip_of([line([2.0, 5.7], [3.0, 0.0])], [1.0])
    wide = clip.frames.repeat_interleave(2, dim=3)[:, :, :63]
    (question,) = make_questions(replace(unseen(clip), frames=wide), ("end",)).questions
    assert set(question.options) == set(OPTIONS["end"])
