import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.choices import ANSWERS, ChoiceStore, Pair, design_pairs
from physnb.data import simulate
from physnb.metrics.preference import UNTRAINED, bradley_terry, fit_reward, pair_choices
from physnb.metrics.violations import VIOLATIONS, measure_violations

METHODS, CASES = ("true", "unguided", "hunted"), ("a/0", "a/1", "b/0", "b/1")


@pytest.fixture
def store(tmp_path):
    with ChoiceStore(tmp_path / "new" / "choices.sqlite") as store:
        store.plan(design_pairs(METHODS, CASES))
        yield store


# --- design


def spread(values, everything) -> int:
    """Most minus least often."""
    counts = Counter(values)
    return max(counts[v] for v in everything) - min(counts[v] for v in everything)


@settings(max_examples=20, deadline=None)
@given(methods=st.integers(2, 7), cases=st.integers(1, 9), seed=st.integers(0, 2**32), data=st.data())
def test_design_is_balanced_wherever_it_stops(methods, cases, seed, data):
    methods, cases = [f"m{i}" for i in range(methods)], [f"c{i}" for i in range(cases)]
    whole = design_pairs(methods, cases, seed=seed)
    assert len({p.name for p in whole}) == len(whole) == len(list(combinations(methods, 2))) * len(cases)
    stop = data.draw(st.integers(1, len(whole)))
    design = design_pairs(methods, cases, pairs=stop, seed=seed)
    assert design == whole[:stop]
    meetings = [tuple(sorted((p.left_method, p.right_method))) for p in design]
    assert spread(meetings, list(combinations(methods, 2))) <= 1
    assert spread([p.case_name for p in design], cases) <= 1
    assert spread([m for meeting in meetings for m in meeting], methods) <= 2


def test_sides_are_drawn_by_seed_and_pair_and_fall_evenly():
    cases = [str(i) for i in range(1000)]
    design = design_pairs(("a", "b"), cases, seed=3)
    assert design == design_pairs(("a", "b"), cases, seed=3)
    first_left = sum(p.left_method == "a" for p in design)
    assert abs(first_left - 500) < 5 * (1000 / 4) ** 0.5  # 5 standard deviations of a fair coin
    sides = {p.name: p.left_method for p in design}
    assert sides != {p.name: p.left_method for p in design_pairs(("a", "b"), cases, seed=4)}
    # the side belongs to the pair, whatever else is compared
    for pair in design_pairs(("b", "a", "c"), cases[:50], seed=3):
        assert pair.name not in sides or sides[pair.name] == pair.left_method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a",), ("c",)), "at least 2 methods, got 1"),
        ((("a", "b"), ()), "at least 1 cases, got 0"),
        ((("a", "a"), ("c",)), "methods must differ, got a, a"),
        ((("a", "b"), ("c", "c")), "cases must differ"),
    ],
)
def test_design_of_nothing_or_doubles_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        design_pairs(*arguments)


@pytest.mark.parametrize("pairs", [0, 13, -1])
def test_a_number_of_pairs_that_there_is_not_is_refused(pairs):
    with pytest.raises(ValueError, match=r"there are 12 pairs to show, so the number of them must be in \[1, 12\]"):
        design_pairs(METHODS, CASES, pairs=pairs)


# --- store


def answer_all(store, rater, answers="left right tie skip".split(), limit=None):
    """Names of the pairs in the order shown."""
    shown = []
    while (pair := store.next_pair(rater)) is not None and len(shown) != limit:
        store.write(pair, answers[len(shown) % len(answers)], rater, 1.5)
        shown.append(pair.name)
    return shown


def test_a_row_says_what_was_shown_where_and_what_was_answered(store):
    pair = store.next_pair("ann")
    store.write(pair, "tie", "ann", 2.25)
    (row,) = store.read().to_dict("records")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", row.pop("time_utc"))
    assert row == dict(
        pair=pair.name, case_name=pair.case_name, left_method=pair.left_method, right_method=pair.right_method,
        left_clip=f"{pair.left_method}/{pair.case_name}", right_clip=f"{pair.right_method}/{pair.case_name}",
        answer="tie", rater="ann", seconds=2.25,
    )  # fmt: skip


def test_a_rater_sees_every_pair_once_in_the_order_of_the_design(store):
    assert answer_all(store, "ann") == [p.name for p in design_pairs(METHODS, CASES)]
    assert store.next_pair("ann") is None and len(store.read()) == 12
    assert store.counts("ann") == dict(left=3, right=3, tie=3, skip=3)


def test_raters_share_the_pairs_out_before_they_repeat_each_other(store):
    first = answer_all(store, "ann", ["left"], limit=5)
    second = answer_all(store, "bob", ["right"])
    assert set(second[:7]).isdisjoint(first) and set(second[7:]) == set(first)
    assert len(answer_all(store, "ann")) == 7


def test_a_skip_leaves_the_pair_to_others_first(store):
    skipped = answer_all(store, "ann", ["skip"], limit=1)
    assert answer_all(store, "ann", ["left"], limit=2)[0] not in skipped
    assert store.next_pair("bob").name == skipped[0]


def test_choices_go_on_after_closing_and_a_longer_plan_goes_on_from_the_old(tmp_path):
    path, short = tmp_path / "c.sqlite", design_pairs(METHODS, CASES, pairs=6)
    with ChoiceStore(path) as store:
        store.plan(short)
        seen = answer_all(store, "ann", limit=4)
    with ChoiceStore(path) as store:
        store.plan(short)
        assert store.pairs() == short
        seen += answer_all(store, "ann")
        store.plan(design_pairs(METHODS, CASES))
        seen += answer_all(store, "ann")
        store.plan(short)  # a part of it is no other plan
        assert len(store.pairs()) == 12
    assert seen == [p.name for p in design_pairs(METHODS, CASES)]


def test_another_plan_is_refused_and_the_old_kept(store):
    before = store.pairs()
    with pytest.raises(ValueError, match=r"choices.sqlite holds another plan of pairs; choose another file"):
        store.plan(design_pairs(METHODS, CASES, seed=1))
    with pytest.raises(ValueError, match="a pair is planned twice"):
        store.plan([*before, Pair(before[0].case_name, before[0].right_method, before[0].left_method)])
    assert store.pairs() == before


def test_undo_takes_back_the_raters_own_last_choice_and_shows_it_again(store):
    assert store.undo("ann") is None
    shown = answer_all(store, "ann", limit=3)
    answer_all(store, "bob", limit=2)
    assert store.undo("ann").name == shown[-1]
    assert store.undo("ann").name == shown[-2]
    found = store.read()
    assert found[found.rater == "ann"].pair.tolist() == shown[:1] and (found.rater == "bob").sum() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(answer="both"), "unknown answer 'both'; choose one of left, right, tie, skip"),
        (dict(rater=" "), "a choice needs the rater's name"),
        (dict(seconds=-1.0), "seconds taken must be finite and not negative, got -1"),
        (dict(seconds=float("nan")), "seconds taken must be finite"),
        (dict(pair=Pair("z", "true", "hunted")), r"pair 'z \| hunted \| true' is not planned in .*choices.sqlite"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(store, change, message):
    choice = dict(pair=store.next_pair("ann"), answer="left", rater="ann", seconds=1.0) | change
    with pytest.raises(ValueError, match=message):
        store.write(**choice)
    assert len(store.read()) == 0


def test_swapped_sides_and_a_second_judgement_are_refused(store):
    pair = store.next_pair("ann")
    with pytest.raises(ValueError, match="or its sides are swapped"):
        store.write(Pair(pair.case_name, pair.right_method, pair.left_method), "left", "ann", 1.0)
    store.write(pair, "left", "ann", 1.0)
    with pytest.raises(ValueError, match=r"ann has already judged .*; undo that choice first"):
        store.write(pair, "right", "ann", 1.0)
    assert store.read().answer.tolist() == ["left"]


def test_reading_an_empty_store_gives_an_empty_table(tmp_path):
    with ChoiceStore(tmp_path / "c.sqlite") as store:
        assert len(store.read()) == 0 and store.pairs() == () and store.next_pair("ann") is None
        assert store.counts("ann") == dict.fromkeys(ANSWERS, 0)


def test_killed_writers_lose_the_choice_in_flight_at_most(tmp_path, start_python):
    path = tmp_path / "choices.sqlite"
    program = f"""
import sys
from physnb.choices import ChoiceStore, design_pairs
store, rater = ChoiceStore({str(path)!r}), sys.argv[1]
store.plan(design_pairs(["a", "b"], [str(i) for i in range(3000)]))
while True:
    pair = store.next_pair(rater)
    store.write(pair, "left", rater, 0.5)
    print(pair.name, flush=True)
"""
    raters = ("ann", "bob")
    processes = [start_python("-c", program, rater) for rater in raters]  # both write at once
    done = {rater: [p.stdout.readline().strip() for _ in range(20)] for rater, p in zip(raters, processes, strict=True)}
    for rater, process in zip(raters, processes, strict=True):
        process.kill()
        done[rater] += process.stdout.read().split("\n")[:-1]
        assert process.wait() == -9
    with ChoiceStore(path) as store:
        found = store.read()
        for rater in raters:
            kept = found[found.rater == rater].pair.tolist()
            assert kept[: len(done[rater])] == done[rater] and len(kept) <= len(done[rater]) + 1
        assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_full_disk_is_named_and_what_was_written_is_kept(tmp_path, full_disk):
    with ChoiceStore(tmp_path / "c.sqlite") as store:
        store.plan(design_pairs(METHODS, CASES))
        answer_all(store, "ann", limit=2)
        with full_disk(), pytest.raises(OSError, match=r"c.sqlite cannot be used .*what was written before is kept"):
            answer_all(store, "ann")
    with ChoiceStore(tmp_path / "c.sqlite") as store:
        assert len(store.read()) >= 2


# --- what choices are for


def test_choices_of_a_store_teach_the_reward(tmp_path):
    cases = [f"uniform/{i}" for i in range(8)]
    clip = simulate("uniform", "id", range(8), frames=16, size=32)
    stopped = clip.frames.clone()
    stopped[:, 3:] = stopped[:, 2:3].clone()
    batches = {"true": clip, "frozen": replace(clip, frames=stopped)}
    found = {
        f"{name}/{case}": row
        for name, batch in batches.items()
        for case, row in zip(cases, measure_violations(batch), strict=True)
    }
    with ChoiceStore(tmp_path / "c.sqlite") as store:
        store.plan(design_pairs(list(batches), cases))
        while (pair := store.next_pair("ann")) is not None:
            likes_left = pair.left_method == "true"
            store.write(pair, "skip" if pair.case_name == cases[0] else "left" if likes_left else "right", "ann", 1.0)
        choices = store.read()
    left, right, share = pair_choices(choices, found)
    assert left.shape == right.shape == (7, len(VIOLATIONS)) and set(share.tolist()) <= {0.0, 1.0}
    still = list(VIOLATIONS).index("stillness")
    assert fit_reward(left, right, share).weights[still] < UNTRAINED.weights[still]
    strengths = bradley_terry(choices)
    assert strengths.items == ("frozen", "true") and strengths.values[1] > 0 and strengths.skipped == 1
    with pytest.raises(ValueError, match="8 clips have no violations measured, for example true/uniform/0"):
        pair_choices(choices.assign(answer="tie"), {k: v for k, v in found.items() if k.startswith("frozen")})
