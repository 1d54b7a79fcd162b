"""Instruments driven as a reader would: values set, buttons pressed, pictures and sentences read."""

import html
import io
import time

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from subjects_for_tests import MOTION_HEAD, MOTION_HUNT, STAY_HEAD, motion_model, motion_trials

from physnb.analysis import attention_maps
from physnb.config import CAPTION_LEVELS, SIMULATED
from physnb.data import simulate, write_captions
from physnb.data.variants import kinds_for, make_impossible
from physnb.families import heads_of
from physnb.plots import effect_colours
from physnb.profiles import measure_profiles, scenario_profiles
from physnb.ranking import head_table, rank_heads
from physnb.store import TrialStore
from physnb.strength import measure_arms, weight_grid
from physnb.widgets import HeadMap, browse, browse_heads, browse_phenomena, browse_strength, long_action

WEIGHTS, STRENGTHS = [0.0, 1.0, 2.0], [0.5, 1.0]


def every_widget(box) -> list[ipywidgets.Widget]:
    return [box, *(found for child in getattr(box, "children", ()) for found in every_widget(child))]


def control(box, name: str):
    """The control or button whose description begins with `name`."""
    return next(w for w in every_widget(box) if getattr(w, "description", "").startswith(name))


def sentences(box) -> list[str]:
    return [html.unescape(w.value) for w in every_widget(box) if "physnb-sentence" in w._dom_classes]


def pictures(box) -> list[bytes]:
    return [w.value for w in every_widget(box) if isinstance(w, ipywidgets.Image)]


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def line(action) -> str:
    return action.children[-1].value


# --- actions


def test_action_shows_progress_and_its_last_sentence():
    seen = []

    def work(report):
        for done in range(1, 4):
            report(done, 3, 63.0)
            seen.append(line(action))
        return "computed <all>"

    action = long_action("Compute", work)
    start, cancel, bar, _ = action.children
    start.click()
    wait_until(lambda: not start.disabled)
    assert seen == ["1 of 3, 1:03 left", "2 of 3, 1:03 left", "3 of 3, 1:03 left"]
    assert (bar.value, bar.max, cancel.disabled, line(action)) == (3, 3, True, "computed &lt;all&gt;")


def test_action_is_cancelled_at_the_next_report_and_can_start_again():
    going = []

    def work(report):
        for done in range(10_000):
            report(done, 10_000, 1.0)
            going.append(done)
            time.sleep(0.001)
        return "computed"

    action = long_action("Compute", work)
    start, cancel, _, _ = action.children
    start.click()
    wait_until(lambda: len(going) > 3)
    assert start.disabled and not cancel.disabled
    cancel.click()
    wait_until(lambda: not start.disabled)
    assert line(action).startswith("cancelled after ") and len(going) < 10_000
    count = len(going)
    start.click()
    wait_until(lambda: len(going) > count + 3)  # the old cancel does not stop the new run
    cancel.click()
    wait_until(lambda: not start.disabled)


def test_error_of_an_action_appears_beside_its_button():
    def work(report):
        raise ValueError("no room & no way")

    action = long_action("Compute", work)
    action.children[0].click()
    wait_until(lambda: not action.children[0].disabled)
    assert line(action) == "ValueError: no room &amp; no way"


# --- browsing


def test_picture_and_sentence_follow_a_control_and_an_error_takes_the_sentence_alone():
    def draw(number):
        if number == 2:
            raise ValueError("two is not drawn")
        figure = Figure(figsize=(1 + number, 1))
        return figure, f"number {number}"

    box = browse(draw, number=ipywidgets.IntSlider(min=0, max=3, value=0, description="number"))
    assert sentences(box) == ["number 0"]
    first = pictures(box)[0]
    control(box, "number").value = 1
    assert sentences(box) == ["number 1"] and pictures(box)[0] != first
    shown = pictures(box)[0]
    control(box, "number").value = 2
    assert sentences(box) == ["ValueError: two is not drawn"] and pictures(box)[0] == shown


# --- strength


@pytest.fixture(scope="module")
def model():
    return motion_model()


@pytest.fixture
def instrument(model, tmp_path):
    with TrialStore(tmp_path / "trials.sqlite") as store:
        trials = motion_trials(model, range(4), store=store)
        arms = measure_arms(trials, weight_grid(MOTION_HUNT, (MOTION_HEAD,), WEIGHTS, STRENGTHS))
        yield trials, browse_strength(trials, MOTION_HUNT, (MOTION_HEAD,), arms, [0, 2])


def test_clip_surface_and_sentence_follow_the_sliders(instrument):
    trials, box = instrument
    rows = trials.rows_run
    assert (
        sentences(box)[0].startswith("tracking_error at w = 2, u = 1: -")
        and "4 cases; this clip: " in sentences(box)[0]
    )
    film, surface = pictures(box)
    assert Image.open(io.BytesIO(film)).n_frames == 6
    control(box, "guidance weight w").value = 0.0
    assert sentences(box)[0].startswith(
        "tracking_error at w = 0, u = 1: +0.000 units against unguided, 95 % interval [+0.000"
    )
    assert pictures(box)[0] != film and pictures(box)[1] != surface
    control(box, "metric").value = "missing_rate"
    assert sentences(box)[0].startswith("missing_rate at w = 0")
    control(box, "clip").value = 2
    assert trials.rows_run == rows  # looking costs nothing


def test_new_point_is_computed_stored_and_shown(instrument):
    trials, box = instrument
    control(box, "new w").value, control(box, "new u").value = 1.5, 0.75
    start = control(box, "Compute this point")
    start.click()
    wait_until(lambda: not start.disabled)
    assert any(getattr(w, "value", "") == "computed w = 1.5, u = 0.75" for w in every_widget(box))
    assert control(box, "guidance weight w").options == (0.0, 1.0, 1.5, 2.0)
    assert sentences(box)[0].startswith("tracking_error at w = 1.5, u = 0.75: -")
    point = weight_grid(MOTION_HUNT, (MOTION_HEAD,), [1.5], [0.75])[1.5, 0.75]
    assert len(trials.store.read(trials.identity(point))) == 4
    # a point between computed ones plays, and says that it is not measured; the button then measures it
    control(box, "perturbation strength u").value = 1.0
    assert sentences(box) == ["w = 1.5, u = 1 plays, but is not measured yet: press Compute this point."]
    assert (control(box, "new w").value, control(box, "new u").value) == (1.5, 1.0)


def test_cancelled_point_keeps_what_was_scored(model, tmp_path, monkeypatch):
    monkeypatch.setattr("physnb.widgets.strength.BATCH", 1)
    with TrialStore(tmp_path / "trials.sqlite") as store:
        trials = motion_trials(model, range(30), store=store)
        arms = measure_arms(trials, weight_grid(MOTION_HUNT, (MOTION_HEAD,), [1.0], [1.0]))
        box = browse_strength(trials, MOTION_HUNT, (MOTION_HEAD,), arms, [0])
        control(box, "new w").value, control(box, "new u").value = 1.5, 0.75
        start, bar = (
            control(box, "Compute"),
            next(w for w in every_widget(box) if isinstance(w, ipywidgets.IntProgress)),
        )
        bar.observe(lambda change: control(box, "Cancel").click() if change.new == 3 else None, names="value")
        start.click()
        wait_until(lambda: not start.disabled)
        point = weight_grid(MOTION_HUNT, (MOTION_HEAD,), [1.5], [0.75])[1.5, 0.75]
        assert any(str(getattr(w, "value", "")).startswith("cancelled after 3 of 30") for w in every_widget(box))
        assert len(store.read(trials.identity(point))) == 3
        bar.unobserve_all()
        start.click()
        wait_until(lambda: not start.disabled)
        assert len(store.read(trials.identity(point))) == 30


# --- heads


@pytest.fixture
def heads_box(model):
    trials = motion_trials(model, range(4))
    ranking = rank_heads(trials, MOTION_HUNT.guidance)
    attention = attention_maps(model, trials.subject.cases[[0, 2]], heads_of(model))
    known = scenario_profiles(ranking, {"uniform": range(4)})
    known |= measure_profiles({"ood": trials}, MOTION_HUNT, (MOTION_HEAD,))
    maps = {"effect": ranking.layer_map(), "entropy": head_table(dict.fromkeys(heads_of(model), 0.5), heads_of(model))}
    return browse_heads(
        maps,
        attention,
        {"ood": trials},
        MOTION_HUNT,
        [0, 2],
        known,
        framed=(MOTION_HEAD,),
        describe=lambda h: f"this is {h}",
    )


def test_pressed_head_is_shown_with_effects_attention_and_clip(heads_box):
    shown = pictures(heads_box)
    assert sentences(heads_box)[0] == f"this is {MOTION_HEAD}" and str(MOTION_HEAD) in sentences(heads_box)[2]
    control(heads_box, str(STAY_HEAD)).click()
    said = sentences(heads_box)
    assert said[0] == f"this is {STAY_HEAD}" and said[1].startswith(
        f"{STAY_HEAD}: the disc's token at token time 2 gives "
    )
    assert said[2] == f"The clip without guidance, and guided away from {STAY_HEAD} alone:"
    assert len(shown) == 3 and all(old != new for old, new in zip(shown, pictures(heads_box), strict=True))


def test_query_moves_along_the_disc_s_path(heads_box):
    before = pictures(heads_box)
    control(heads_box, "query").value = 5
    assert "token time 5" in sentences(heads_box)[1]
    after = pictures(heads_box)
    assert before[1] != after[1] and before[0] == after[0] and before[2] == after[2]


def test_head_without_profile_is_measured_on_demand(heads_box):
    control(heads_box, str(STAY_HEAD)).click()
    before, start = pictures(heads_box)[0], control(heads_box, "Measure this head")
    start.click()
    wait_until(lambda: not start.disabled)
    assert any(getattr(w, "value", "") == f"computed {STAY_HEAD}" for w in every_widget(heads_box))
    assert pictures(heads_box)[0] != before


def test_map_is_coloured_by_what_was_chosen(heads_box):
    button = control(heads_box, str(MOTION_HEAD))
    assert button.layout.border.endswith("#0072b2") and "effect -" in button.tooltip
    before = button.style.button_color
    control(heads_box, "colour by").value = "entropy"
    assert button.style.button_color == effect_colours([0.5])[0] != before
    assert button.tooltip == f"{MOTION_HEAD}: entropy 0.500"
    control(heads_box, str(STAY_HEAD)).click()
    assert button.layout.border == "2px solid black"  # hunted, and no longer the one shown


def test_heads_that_were_not_measured_are_white_and_say_so():
    heads = heads_of(motion_model())
    found = HeadMap({"q": head_table({MOTION_HEAD: 0.3}, heads)}, heads)
    assert found.buttons[STAY_HEAD].style.button_color == "#ffffff"
    assert found.buttons[STAY_HEAD].tooltip == f"{STAY_HEAD}: not measured"
    with pytest.raises(ValueError, match="needs a map and heads"):
        HeadMap({}, heads)


def test_colours_are_around_zero_where_there_is_harm_and_help():
    low, zero, high, unknown = effect_colours([-1.0, 0.0, 1.0, torch.nan])
    red = {name: int(colour[1:3], 16) for name, colour in dict(low=low, high=high).items()}
    blue = {name: int(colour[5:7], 16) for name, colour in dict(low=low, high=high).items()}
    assert red["low"] > blue["low"] and blue["high"] > red["high"]  # orange helps, purple harms
    assert unknown == "#ffffff" and zero not in (low, high)


# --- phenomena


@pytest.fixture(scope="module")
def phenomena():
    return browse_phenomena(frames=10, size=16)


def test_phenomena_begin_with_a_lawful_clip(phenomena):
    (said,), (film,) = sentences(phenomena), pictures(phenomena)
    assert said.startswith("a red disc swings on a rod, its radius is ") and "it trades speed for height. " in said
    assert float(said.split("unexplained by its law: ")[1].removesuffix(" units/s")) < 1e-4
    assert Image.open(io.BytesIO(film)).n_frames == 10


def test_every_scenario_is_drawn_lawful_and_broken(phenomena):
    seen = set()
    for scenario in SIMULATED:
        control(phenomena, "variant").value = "lawful"
        control(phenomena, "scenario").value = scenario
        (lawful,), narrow = sentences(phenomena), Image.open(io.BytesIO(pictures(phenomena)[0])).width
        assert write_captions(simulate(scenario, "id", [0], frames=10, size=16), "law")[0] in lawful
        control(phenomena, "variant").value = "teleport"
        (said,), wide = sentences(phenomena), Image.open(io.BytesIO(pictures(phenomena)[0])).width
        assert "Error" not in said and "not shown" not in said, said
        assert float(said.split(": ")[1].split()[0]) > 1  # a jump of a unit is 10 units/s
        assert wide == 2 * narrow
        seen.add(pictures(phenomena)[0])
    assert len(seen) == len(SIMULATED)


def test_a_variant_of_another_scenario_is_the_lawful_clip(phenomena):
    control(phenomena, "scenario").value = "orbit"
    control(phenomena, "variant").value = "lawful"
    lawful = sentences(phenomena), pictures(phenomena)
    assert "gravity_off" in kinds_for("parabola") and "gravity_off" not in kinds_for("orbit")
    control(phenomena, "variant").value = "gravity_off"
    assert (sentences(phenomena), pictures(phenomena)) == lawful
    control(phenomena, "scenario").value = "parabola"
    assert pictures(phenomena) != lawful[1]


def test_a_vanished_disc_is_not_told_to_obey_its_law(phenomena):
    control(phenomena, "scenario").value, control(phenomena, "variant").value = "pendulum", "vanish"
    assert sentences(phenomena)[0].endswith("until a disc is gone")


def test_a_variant_that_shows_nothing_says_so(phenomena):
    control(phenomena, "variant").value = "energy_gain"
    control(phenomena, "scenario").value, control(phenomena, "split").value = "wave", "ood"
    slow = simulate("wave", "ood", range(32), frames=10, size=16)
    reasons = make_impossible(slow, "energy_gain").reasons
    control(phenomena, "clip").value = next(i for i, reason in enumerate(reasons) if reason is not None)
    assert sentences(phenomena)[0].endswith(f"; energy_gain not shown: {reasons[control(phenomena, 'clip').value]}")


def test_what_is_said_follows_the_level_of_captions(phenomena):
    control(phenomena, "scenario").value, control(phenomena, "variant").value = "spring", "lawful"
    control(phenomena, "split").value, control(phenomena, "clip").value = "id", 0
    clip = simulate("spring", "id", [0], frames=10, size=16)
    for level in CAPTION_LEVELS:
        control(phenomena, "captions").value = level
        said = write_captions(clip, level, 0)[0] or "(nothing)"
        assert sentences(phenomena)[0].startswith(f"{said}. unexplained by its law: ")
