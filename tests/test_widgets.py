import re

import pytest
import torch
from matplotlib.figure import Figure

from physnb.choices import ChoiceStore, design_pairs
from physnb.data import simulate
from physnb.widgets import choice_widget, draw_pair

METHODS, CASES = ("true", "unguided"), ("uniform/0", "uniform/1", "uniform/2")


@pytest.fixture
def store(tmp_path):
    with ChoiceStore(tmp_path / "choices.sqlite") as store:
        store.plan(design_pairs(METHODS, CASES))
        yield store


@pytest.fixture(scope="module")
def clips():
    frames = simulate("uniform", "id", range(6), frames=4, size=16).frames
    names = [f"{method}/{case}" for method in METHODS for case in CASES]
    return dict(zip(names, frames, strict=True))


class Screen:
    """What the rater sees and can press."""

    def __init__(self, box):
        self.box = box
        self.heading, self.video, buttons, self.progress, self.error = box.children
        self.buttons = {button.description: button for button in buttons.children}

    def press(self, *names: str) -> None:
        for name in names:
            self.buttons[name].click()


@pytest.fixture
def screen(store, clips):
    return Screen(choice_widget(store, clips, "ann", scale=2))


def test_first_pair_is_there_at_once_without_names(screen):
    assert screen.video.value.count("<video") == 1  # both clips in one file cannot drift apart
    for wanted in ("autoplay", "loop", "muted", "aria-label=", "data:video/mp4;base64,"):
        assert wanted in screen.video.value
    assert screen.progress.value == "1 of 3. So far: left 0, right 0, tie 0, skip 0."
    assert "lawfully" in screen.heading.value
    assert not any(method in screen.heading.value + screen.progress.value for method in METHODS)


def test_every_press_is_a_row_at_once(screen, store):
    for number, name in enumerate(("Left", "Tie", "Skip"), 1):
        before = screen.video.value
        screen.press(name)
        assert len(store.read()) == number and screen.video.value != before
    found = store.read()
    assert found.answer.tolist() == ["left", "tie", "skip"] and set(found.rater) == {"ann"}
    assert found.pair.tolist() == [p.name for p in store.pairs()]
    assert (found.seconds >= 0).all() and (found.seconds < 60).all()
    assert screen.error.value == ""


def test_at_the_end_nothing_is_left_to_press_but_undo(screen, store):
    screen.press("Left", "Right", "Right")
    assert screen.progress.value == "All 3 pairs are judged. So far: left 1, right 2, tie 0, skip 0."
    assert screen.video.value == ""
    assert {name for name, button in screen.buttons.items() if not button.disabled} == {"Undo"}


def test_undo_shows_the_last_pair_again(screen, store):
    first = screen.video.value
    assert screen.buttons["Undo"].disabled
    screen.press("Left", "Undo")
    assert len(store.read()) == 0 and screen.video.value == first and screen.buttons["Undo"].disabled
    screen.press("Right", "Left", "Left", "Undo", "Tie")
    assert store.read().answer.tolist() == ["right", "left", "tie"]
    assert store.read().pair.tolist() == [p.name for p in store.pairs()]


def test_running_the_cell_again_goes_on(screen, store, clips):
    screen.press("Left", "Right")
    again = Screen(choice_widget(store, clips, "ann", scale=2))
    assert again.progress.value == "3 of 3. So far: left 1, right 1, tie 0, skip 0."
    assert Screen(choice_widget(store, clips, "bob", scale=2)).progress.value.startswith("1 of 3.")


def test_buttons_take_the_keyboard_and_say_what_they_do(screen):
    assert list(screen.buttons) == ["Left", "Right", "Tie", "Skip", "Undo"]
    for button in screen.buttons.values():
        assert button.tabbable and "Enter or Space" in button.tooltip


def test_an_error_appears_in_the_cell_and_nothing_moves(screen, store):
    video = screen.video.value
    store.write(store.next_pair("ann"), "left", "ann", 1.0)  # from another tab
    screen.press("Right")
    assert re.fullmatch(r"ValueError: ann has already judged .*; undo that choice first", screen.error.value)
    assert screen.video.value == video and store.read().answer.tolist() == ["left"]
    screen.press("Undo", "Right")
    assert screen.error.value == "" and store.read().answer.tolist() == ["right"]


def test_a_video_that_cannot_be_made_is_reported_and_no_other_pair_is_judged(screen, store, monkeypatch):
    def fail(*_, **__):
        raise OSError("no <space> left")

    monkeypatch.setattr("physnb.widgets.choosing.write_video", fail)
    screen.press("Left")
    assert screen.error.value == "OSError: no &lt;space&gt; left" and len(store.read()) == 1
    screen.press("Right")  # still the pair on screen, which is judged
    assert "already judged" in screen.error.value and len(store.read()) == 1


def test_the_same_pair_as_a_figure(store, clips):
    figure = draw_pair(clips, store.pairs()[0])
    assert isinstance(figure, Figure)
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["left", "right"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {k: v for k, v in c.items() if k != "true/uniform/1"}, "1 clips .* for example true/uniform/1"),
        (lambda c: c | {"true/uniform/1": c["true/uniform/1"][:2]}, "the clips must have one size and length"),
        (lambda c: {k: v[:0] for k, v in c.items()}, "the clips must have one size and length"),
    ],
)
def test_clips_that_cannot_be_shown_are_named_before_anything_shows(store, clips, change, message):
    with pytest.raises(ValueError, match=message):
        choice_widget(store, change(clips), "ann")


def test_nothing_planned_or_no_rater_is_named(tmp_path, store, clips):
    with pytest.raises(ValueError, match="choices need the rater's name"):
        choice_widget(store, clips, "")
    with ChoiceStore(tmp_path / "empty.sqlite") as empty, pytest.raises(ValueError, match="no pair is planned; call"):
        choice_widget(empty, clips, "ann")


def test_frames_are_left_alone(store, clips):
    before = {name: frames.clone() for name, frames in clips.items()}
    choice_widget(store, clips, "ann", scale=2)
    assert all(torch.equal(clips[name], frames) for name, frames in before.items())
