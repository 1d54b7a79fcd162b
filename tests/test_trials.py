import dataclasses
import json
import math
import time

import pytest
import torch
from hunts import HUNT, ROUNDING, brightness, heads_alone, subject_of, trials_of
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.config import PERTURBATION_KINDS, Guidance, LayerSkip, OtherModel, Perturbation, head_set
from physnb.data import simulate
from physnb.objectives import OBJECTIVES, TRAJECTORY, Objective
from physnb.store import TrialStore
from physnb.subjects import ModelSubject, simulated_subject
from physnb.trials import first_broken_layer, trial_name

GUIDE = HUNT.guidance


@pytest.fixture
def store(tmp_path):
    with TrialStore(tmp_path / "trials.sqlite") as opened:
        yield opened


# --- each row once


def test_another_score_of_the_same_judge_needs_no_other_rows(model, store):
    cases = simulate("uniform", "id", range(3), frames=8, size=16)
    trials = trials_of(ModelSubject(model, cases, OBJECTIVES["tracking_error"], steps=1), store)
    whole = trials.scores([Guidance()])
    missing = trials.judged_by(OBJECTIVES["missing_rate"])
    assert torch.equal(missing.scores([Guidance()]), trials.scores([Guidance()], name="missing_rate"))
    guided = missing.scores([GUIDE(head_set("L0H1"))])
    assert torch.equal(trials.scores([GUIDE(head_set("L0H1"))], name="missing_rate"), guided)
    assert trials.subject.objective.name == "tracking_error" and torch.equal(trials.scores([Guidance()]), whole)
    assert len(set(trials.executor.rows)) == len(trials.executor.rows) == 2 * len(trials.cases)
    with pytest.raises(ValueError, match="these rows are judged by trajectory, not by reward"):
        trials.judged_by(OBJECTIVES["reward"])


def test_rows_are_measured_once(model):
    trials, guided = trials_of(subject_of(model)), heads_alone(model)
    table = trials.scores([Guidance(), *guided[:2]], [0, 1])
    assert table.shape == (3, 2) and trials.rows_run == 6
    again = trials.scores([guided[1], Guidance(), guided[1]], [1, 0, 1])
    assert torch.equal(again, table[[2, 0, 2]][:, [1, 0, 1]]) and trials.rows_run == 6
    assert trials.scores(guided).shape == (8, 3)  # all cases, of which two heads know two
    assert trials.rows_run == len(trials.executor.rows) == len(set(trials.executor.rows)) == 6 + 8 * 3 - 4
    trials.scores([GUIDE(head_set("L0H1,L1H1"))], [0, 0])
    assert trials.rows_run == 27


def test_nothing_asked_for_is_an_empty_table(model):
    trials = trials_of(subject_of(model))
    assert trials.scores([]).shape == (0, 3) and trials.scores([Guidance()], []).shape == (1, 0)
    assert trials.rows_run == 0 and trials.score_names() == ()


def test_rows_of_a_store_are_read_and_not_run_again(model, store):
    asked = [Guidance(), *heads_alone(model)]
    first = trials_of(subject_of(model), store).scores(asked, [0, 1])
    reading = trials_of(subject_of(model), store)
    assert torch.equal(reading.scores(asked, [0, 1]), first) and reading.rows_run == 0
    wider = trials_of(subject_of(model, cases=4), store)  # a larger hunt, of the same cases and more
    assert torch.equal(wider.scores(asked)[:, :2], first)
    assert {case for _, case in wider.executor.rows} == {2, 3} and wider.rows_run == 9 * 2


def test_what_is_stored_is_believed(model, store):
    trials_of(subject_of(model), store).scores([Guidance()])
    store.connection.execute("UPDATE scores SET scores = '{\"brightness\": -100}'")  # no run gives this
    assert trials_of(subject_of(model), store).scores([Guidance()]).tolist() == [[-100.0] * 3]


def test_rows_that_another_hunt_wrote_in_the_meantime_stay(model, store):
    one, other = (trials_of(subject_of(model), store) for _ in range(2))
    one.scores([Guidance()], [0])  # it has read what there was
    other.scores([Guidance()])
    store.connection.execute("UPDATE scores SET scores = json_set(scores, '$.mark', 1)")
    one.scores([Guidance()])
    assert one.rows_run == 3 and store.table()["mark"].tolist() == [1.0, 1.0, 1.0]


def test_unknown_cases_and_scores_are_named(model):
    trials = trials_of(subject_of(model))
    for case in (3, -1):
        with pytest.raises(ValueError, match=rf"there is no case \[{case}\]; cases are numbered from 0 to 2"):
            trials.scores([Guidance()], [0, case])
    assert trials.rows_run == 0
    with pytest.raises(ValueError, match="unknown score 'brightnes'; choose one of brightness"):
        trials.scores([Guidance()], name="brightnes")


def test_other_scores_of_the_judge_cost_no_rows(model, store):
    cases = simulate("uniform", "id", range(3), frames=8, size=16)
    subject = ModelSubject(model, cases, Objective("tracking_error", TRAJECTORY), steps=1)
    trials = trials_of(subject, store)
    tracking = trials.scores([Guidance()])
    assert {"position_error", "missing_rate", "velocity_error"} < set(trials.score_names())
    found = {name: trials.scores([Guidance()], name=name) for name in ("velocity_error", "missing_rate")}
    assert trials.rows_run == 3 and torch.equal(tracking, trials.scores([Guidance()], name="tracking_error"))
    assert not torch.equal(found["velocity_error"], found["missing_rate"])
    # another objective of the same judge lives on the same rows
    again = trials_of(dataclasses.replace(subject, objective=Objective("missing_rate", TRAJECTORY)), store)
    assert torch.equal(again.scores([Guidance()]), found["missing_rate"]) and again.rows_run == 0


# --- batches


def test_rows_that_fork_late_run_together_and_the_trials_of_a_case_too(model):
    asked = [
        Guidance(),
        Guidance(text_weight=1.0),
        Guidance(weak=((1.0, LayerSkip((1,))),)),
        *(GUIDE(head_set(names)) for names in ("L0H1", "L1H0", "L1H3", "L0H0,L1H1", "L0H3")),
    ]
    trials, turned = (trials_of(subject_of(model, cases=4), batch_size=3) for _ in range(2))
    trials.scores(asked)
    layers = [first_broken_layer(trial) for trial, _ in trials.executor.rows]
    assert layers == sorted(layers) and set(layers) == {0, 1}
    for layer in (0, 1):
        cases = [case for trial, case in trials.executor.rows if first_broken_layer(trial) == layer]
        assert cases == sorted(cases) and set(cases) == {0, 1, 2, 3}
    assert [len(chunk) for chunk in trials.executor.chunks] == [3] * 10 + [2]
    turned.scores(asked[::-1])
    assert turned.executor.chunks == trials.executor.chunks


def test_batch_size_is_what_fits_unless_given(model, monkeypatch):
    subject = subject_of(model)
    monkeypatch.setattr(subject, "rows_that_fit", lambda: 5)
    for batch_size, expected in ((None, 5), (2, 2), (1000, 9)):
        trials = trials_of(subject, batch_size=batch_size)
        trials.scores([Guidance(), *heads_alone(model)[:2]])
        assert len(trials.executor.chunks[0]) == expected and trials.rows_run == 9
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch size must be positive, got {batch_size}"):
            trials_of(subject, batch_size=batch_size)


def test_scores_of_other_batch_sizes_are_the_same_to_rounding(model):
    asked = [Guidance(), *heads_alone(model)]
    whole = trials_of(subject_of(model)).scores(asked)
    for batch_size in (1, 4):
        found = trials_of(subject_of(model), batch_size=batch_size).scores(asked)
        torch.testing.assert_close(found, whole, atol=ROUNDING, rtol=0)


def test_rows_are_stored_and_the_time_left_is_known_when_on_rows_is_called(model, store):
    seen = []

    def on_rows(trials):
        found = sum(map(len, trials.found.values()))
        seen.append((found, len(store.table()), trials.pending, trials.seconds_left, trials.seconds))

    trials = trials_of(subject_of(model), store, batch_size=4, on_rows=on_rows)
    assert trials.seconds_left == 0
    begun = time.perf_counter()
    trials.scores([Guidance(), *heads_alone(model)[:2]])
    took = time.perf_counter() - begun
    assert [row[:3] for row in seen] == [(4, 4, 5), (8, 8, 1), (9, 9, 0)]
    for found, _, pending, left, seconds in seen:
        assert left == pytest.approx(seconds / found * pending) and 0 < seconds <= took
    assert trials.seconds_left == 0
    trials.scores([Guidance()])
    assert len(seen) == 3  # no batch, no call


# --- what must never mix


def darkness(generated, true):
    return -brightness(generated, true)


SUBJECTS = {
    "model": lambda make: subject_of(make(1)),
    "shape": lambda make: subject_of(make(0, depth=3)),
    "judge": lambda make: subject_of(make(0), darkness),
    "judge version": lambda make: subject_of(make(0), version=2),
    "seed": lambda make: subject_of(make(0), seed=1),
    "steps": lambda make: subject_of(make(0), steps=2),
    "solver": lambda make: subject_of(make(0), solver="heun"),
    "frames given": lambda make: subject_of(make(0), frames_given=2),
}


def test_other_networks_count_where_a_trial_is_guided_by_them(make_model, store):
    away = Guidance(weak=((1.0, OtherModel("weaker")),))
    first, second = (
        trials_of(subject_of(make_model(0), others=dict(weaker=make_model(seed), unused=make_model(3))), store)
        for seed in (1, 2)
    )
    alone = trials_of(subject_of(make_model(0)), store)
    assert first.identity(Guidance()) == second.identity(Guidance()) == alone.identity(Guidance())
    assert first.identity(away) != second.identity(away)
    without_unused = trials_of(subject_of(make_model(0), others=dict(weaker=make_model(1))), store)
    assert first.identity(away) == without_unused.identity(away)
    alone.scores([Guidance()])
    first.scores([Guidance(), away])
    assert first.rows_run == 3  # those of the other network; what it has no part in is there already


def test_clips_are_made_once_and_kept_beside_the_scores(make_model, store):
    trials, guided = trials_of(subject_of(make_model(0)), store), Guidance.from_heads("L0H0", 2.0)
    found = trials.clips([Guidance(), guided], [0, 2])
    assert list(found) == [Guidance(), guided] and found[guided].shape == (2, 8, 16, 16, 3)
    expected = trials.subject.make([(guided, 0), (guided, 2)]).frames
    assert (found[guided].float() - expected.float()).abs().max() <= 1
    again = trials_of(subject_of(make_model(0)), store)
    again.subject.make = None  # whatever is made now would fail
    kept = again.clips([guided], [2, 0])
    assert torch.equal(kept[guided], found[guided].flip(0))
    without = trials_of(subject_of(make_model(0)))
    assert (without.clips([guided], [0])[guided].float() - found[guided][:1].float()).abs().max() <= 1


def test_twin_shares_what_was_found_and_writes_to_the_same_store(make_model, store):
    trials, seen = trials_of(subject_of(make_model(0)), store), []
    trials.scores([Guidance()])
    with trials.twin(lambda twin: seen.append(twin.rows_run), 1) as twin:
        twin.scores([Guidance(), Guidance.from_heads("L0H0", 2.0)])
    assert seen == [1, 2, 3] and len(store.table()) == 6
    trials.scores([Guidance.from_heads("L0H0", 2.0)])
    assert trials.rows_run == 3


def test_rows_of_other_models_judges_seeds_and_settings_never_mix(make_model, store):
    plain = trials_of(subject_of(make_model(0)), store)
    expected = plain.scores([Guidance()])
    identities = {plain.identity(Guidance())}
    for make in SUBJECTS.values():
        trials = trials_of(make(make_model), store)
        identities.add(trials.identity(Guidance()))
        trials.scores([Guidance()])
        assert trials.rows_run == 3
    assert len(identities) == len(SUBJECTS) + 1 and len(store.table()) == 3 * len(identities)
    same = trials_of(subject_of(make_model(0)), store)
    assert torch.equal(same.scores([Guidance()]), expected) and same.rows_run == 0


def test_larger_hunts_and_other_choices_reuse_what_is_stored(model):
    def identity(part="selection", **change):
        return trials_of(simulated_subject(model, dataclasses.replace(HUNT, **change), part)).identity(Guidance())

    for change in (
        dict(selection_cases=10),
        dict(confirmation_cases=20),
        dict(top_k=4, rounds=2, random_draws=5),
        dict(search="race", confidence=0.8),
        dict(scenarios=("parabola", "uniform")),  # other cases have other names
        dict(split="ood"),
        dict(objective="missing_rate"),  # of the same judge
    ):
        assert identity(**change) == identity() == identity("confirmation", **change)
    for change in (dict(seed=1), dict(steps=3), dict(frames_given=2), dict(objective="reward")):
        assert identity(**change) != identity()


GUIDANCE = {
    "unguided": Guidance(),
    "head": GUIDE(head_set("L0H1")),
    "another head": GUIDE(head_set("L0H2")),
    "two heads": GUIDE(head_set("L0H1,L0H2")),
    "weight": Guidance.from_heads("L0H1", 2.0),
    "strength": Guidance.from_heads("L0H1", 3.0, 0.5),
    "kind": Guidance.from_heads("L0H1", 3.0, kind="uniform"),
    "axis": Guidance.from_heads("L0H1", 3.0, axis="time"),
    "scope": Guidance.from_heads("L0H1", 3.0, scope="video_rows"),
    "sigma": Guidance.from_heads("L0H1", 3.0, kind="blur", sigma=(math.inf, 2, 2)),
    "another sigma": Guidance.from_heads("L0H1", 3.0, kind="blur", sigma=(2, math.inf, 2)),
    "temperature": Guidance.from_heads("L0H1", 3.0, kind="temperature", temperature=8.0),
    "text": Guidance(text_weight=1.0),
    "start": Guidance(text_weight=1.0, start=0.5),
    "stop": Guidance(text_weight=1.0, stop=0.5),
    "rescale": Guidance(text_weight=1.0, rescale=0.5),
    "projection": Guidance(text_weight=1.0, parallel=0.0),
    "skip": Guidance(weak=((1.0, LayerSkip((1,))),)),
    "network": Guidance(weak=((1.0, OtherModel("weaker")),)),
    "another network": Guidance(weak=((1.0, OtherModel("smaller")),)),
    "head and network": Guidance(weak=((1.0, OtherModel("weaker")), *GUIDE(head_set("L0H1")).weak)),
}


def test_trials_of_other_guidance_never_mix_and_have_other_names(model):
    trials = trials_of(subject_of(model))
    identities = {trials.identity(guidance) for guidance in GUIDANCE.values()}
    names = {trial_name(guidance) for guidance in GUIDANCE.values()}
    assert len(identities) == len(names) == len(GUIDANCE)
    assert all(json.loads(identity) for identity in identities)


def test_trial_names_read_well():
    assert trial_name(Guidance()) == "unguided"
    assert trial_name(GUIDE(head_set("L1H3,L0H1"))) == "identity u=1 w=3 L0H1,L1H3"
    assert trial_name(GUIDANCE["axis"]) == "identity/time u=1 w=3 L0H1"
    assert trial_name(GUIDANCE["sigma"]) == "blur u=1 w=3 L0H1 sigma=(inf, 2.0, 2.0)"
    assert trial_name(GUIDANCE["start"]) == "text w=1 start=0.5"
    assert trial_name(GUIDANCE["skip"]) == "skip w=1 L1"
    assert trial_name(GUIDANCE["head and network"]) == "weaker w=1 + identity u=1 w=3 L0H1"


numbers = st.sampled_from([0.5, 1, 1.0])  # one of them twice, as an int and as a float
weak_models = st.one_of(
    st.builds(
        Perturbation,
        heads=st.sampled_from(["L0H1", "L0H1,L1H0", "L1H0,L0H1"]),
        strength=numbers,
        kind=st.sampled_from(PERTURBATION_KINDS),
        sigma=st.tuples(numbers, numbers, numbers),
    ),
    st.builds(LayerSkip, st.sampled_from([(0,), (1,), (0, 1), (1, 0)])),
    st.builds(OtherModel, st.sampled_from(["weaker", "L0H1"])),
)
guidances = st.builds(
    Guidance, text_weight=numbers, weak=st.lists(st.tuples(numbers, weak_models), max_size=2).map(tuple), stop=numbers
)


def with_floats(guidance):
    """An equal guidance whose numbers are all floats, as the command line gives them."""
    weak = tuple(
        (float(w), dataclasses.replace(m, strength=float(m.strength)) if isinstance(m, Perturbation) else m)
        for w, m in guidance.weak
    )
    return Guidance(text_weight=float(guidance.text_weight), weak=weak, stop=float(guidance.stop))


@pytest.fixture(scope="module")
def some_trials(model):
    return trials_of(subject_of(model))


@given(one=guidances, other=guidances)
@settings(max_examples=20, deadline=None)
def test_trials_have_the_same_identity_and_name_where_they_are_equal_and_only_there(some_trials, one, other):
    for a, b in ((one, other), (one, with_floats(one))):
        same = some_trials.identity(a) == some_trials.identity(b)
        assert same == (a == b) == (trial_name(a) == trial_name(b))
