"""Hunts that are killed, interrupted or run out of disk, and objectives that fail."""

import contextlib
import dataclasses
import inspect
import math
import signal
import sqlite3
import time

import pytest
import torch
from hunts import HUNT, ROUNDING, Recorder, brightness, heads_alone, subject_of, trials_of
from jupyter_client.manager import start_new_kernel

from physnb.config import Guidance, HeadId
from physnb.data import simulate
from physnb.families import attention_layers
from physnb.metrics import Scores
from physnb.objectives import Judge, Objective
from physnb.race import race_heads
from physnb.ranking import rank_heads
from physnb.search import hunt_heads, pilot_power
from physnb.store import TrialStore, read_json
from physnb.subjects import ModelSubject
from physnb.trials import trial_name


@pytest.fixture
def store(tmp_path):
    with TrialStore(tmp_path / "trials.sqlite") as opened:
        yield opened


# --- interrupted and resumed


def hunt_on(trials) -> torch.Tensor:
    """The effects of every head in two rounds and a race, after a pilot; many of their rows are the same."""
    pilot_power(trials, HUNT, heads=3, cases=2)
    rounds = hunt_heads(trials, dataclasses.replace(HUNT, rounds=2)).rounds
    race = race_heads(trials, dataclasses.replace(HUNT, kind="uniform").guidance, 2)
    return torch.cat([ranking.effects for ranking in (*rounds, race.ranking)])


@pytest.fixture(scope="module")
def undisturbed(model):
    """The chunks of a hunt from its start to its end, and what it found."""
    trials = trials_of(subject_of(model), batch_size=5)
    return trials.executor.chunks, hunt_on(trials)


class StopAt:
    """Raises KeyboardInterrupt the n-th time it is called, and never again."""

    def __init__(self, call):
        self.left = call

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("between batches", 1),
        ("between batches", 8),
        ("inside a layer", 1),
        ("inside a layer", 9),
        ("in the judge", 5),
    ],
)
def test_interrupted_hunt_goes_on_with_the_same_batches_to_the_same_bits(make_model, store, undisturbed, place, call):
    chunks, expected = undisturbed
    model, stop = make_model(), StopAt(call)
    subject = subject_of(model)
    trials = trials_of(subject, store, batch_size=5)
    if place == "between batches":
        trials.on_rows = stop
    elif place == "inside a layer":
        attention_layers(model)[1].module.register_forward_pre_hook(stop)
    else:
        scorer = subject.scorer
        subject.scorer = lambda *arguments: (stop(), scorer(*arguments))[1]
    with pytest.raises(KeyboardInterrupt):
        hunt_on(trials)
    before = list(trials.executor.chunks)
    assert len(store.table()) == trials.rows_run == sum(map(len, before)) < sum(map(len, chunks))
    resumed = trials_of(subject_of(model), store, batch_size=5)
    assert torch.equal(hunt_on(resumed), expected)
    assert before + resumed.executor.chunks == chunks
    assert len(store.table()) == sum(map(len, chunks))
    assert torch.equal(hunt_on(trials), expected)  # and so does the object that was interrupted


def test_interrupted_hunt_without_a_store_goes_on_where_it_was(model, undisturbed):
    chunks, expected = undisturbed
    trials = trials_of(subject_of(model), batch_size=5, on_rows=StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        hunt_on(trials)
    assert torch.equal(hunt_on(trials), expected)
    assert trials.rows_run == sum(map(len, chunks))


class Backwards(Recorder):
    """Chunks may come back in any order, as from a cluster."""

    def run(self, subject, chunks):
        for number, outcome in super().run(subject, chunks[::-1]):
            yield len(chunks) - 1 - number, outcome


def test_hunt_whose_batches_came_in_another_order_resumes_to_the_same_bits(model, store, undisturbed):
    chunks, expected = undisturbed
    trials = trials_of(subject_of(model), store, batch_size=5, executor=Backwards(), on_rows=StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        hunt_on(trials)
    before = list(trials.executor.chunks)
    resumed = trials_of(subject_of(model), store, batch_size=5)
    assert torch.equal(hunt_on(resumed), expected)
    assert len(before) == 7 and sorted(map(str, before + resumed.executor.chunks)) == sorted(map(str, chunks))


def test_disk_that_fills_up_is_named_and_nothing_is_lost_or_twice(model, undisturbed, tmp_path, full_disk):
    chunks, expected = undisturbed
    path = tmp_path / "small" / "trials.sqlite"
    with TrialStore(path) as store:
        trials = trials_of(subject_of(model), store, batch_size=5)
        with full_disk(90_000), pytest.raises(OSError, match=r"trials\.sqlite cannot be used .* before is kept"):
            hunt_on(trials)
        kept = len(store.table())
        assert 0 < kept == sum(map(len, trials.found.values())) < sum(map(len, chunks))
        assert torch.equal(hunt_on(trials), expected)  # with room again, in the same process
    with TrialStore(path) as store:
        resumed = trials_of(subject_of(model), store, batch_size=5)
        assert torch.equal(hunt_on(resumed), expected) and resumed.rows_run == 0
        assert len(store.table()) == sum(map(len, chunks))


def hunt_with_store(model_folder: str, path: str, result: str) -> None:
    """What a researcher's cell does; other processes run its source."""
    import torch

    from physnb.checkpoint import load_model
    from physnb.config import HuntConfig
    from physnb.search import hunt_heads
    from physnb.store import TrialStore, write_json
    from physnb.subjects import simulated_subject
    from physnb.trials import Trials

    torch.set_num_threads(1)  # sums over other numbers of threads round differently
    hunt = HuntConfig(split="id", selection_cases=4, top_k=2, rounds=2, steps=2)
    with TrialStore(path) as store:
        trials = Trials(simulated_subject(load_model(model_folder), hunt, "selection"), store, batch_size=3)
        found = hunt_heads(trials, hunt)
    effects = [ranking.effects.tolist() for ranking in found.rounds]
    write_json(result, dict(picked=list(map(str, found.picked)), effects=effects, rows=trials.rows_run))


SOURCE = inspect.getsource(hunt_with_store)
FIRST_ROWS = 12  # of 180


def rows_in(path) -> int:
    """Rows that a store has by now; 0 before its tables are there."""
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            return connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def wait_for_first_rows(path, seconds=120) -> None:
    end = time.monotonic() + seconds
    while rows_in(path) < FIRST_ROWS:
        assert time.monotonic() < end, f"no rows after {seconds} s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed_result(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    hunt_with_store(model_folder, folder / "trials.sqlite", folder / "result.json")
    return read_json(folder / "result.json")


@pytest.fixture
def places(model_folder, tmp_path):
    """Arguments of `hunt_with_store`."""
    return str(model_folder), str(tmp_path / "trials.sqlite"), str(tmp_path / "result.json")


def assert_resumed(path, result, stored, undisturbed_result):
    found = read_json(result)
    assert found["picked"] == undisturbed_result["picked"] and found["effects"] == undisturbed_result["effects"]
    rows = undisturbed_result["rows"]
    assert FIRST_ROWS <= stored < rows == stored + found["rows"] == rows_in(path)  # none lost, none run twice
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture(scope="module")
def kernel():
    """A Jupyter kernel: its manager and a client."""
    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def reply_to(client, message):
    """What the kernel says when the cell of a message has ended."""
    while (reply := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != message:
        pass
    return reply["content"]


def test_interrupted_kernel_runs_the_cell_again_to_the_same_numbers(tmp_path, places, undisturbed_result, kernel):
    path, result = tmp_path / "trials.sqlite", tmp_path / "result.json"
    (manager, client), cell = kernel, f"{SOURCE}\nhunt_with_store(*{places!r})"
    message = client.execute(cell, stop_on_error=False)  # else it may abort the next cell too
    wait_for_first_rows(path)
    manager.interrupt_kernel()
    reply = reply_to(client, message)
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt" and not result.exists()
    stored = rows_in(path)
    assert reply_to(client, client.execute(cell))["status"] == "ok"
    assert_resumed(path, result, stored, undisturbed_result)


def test_killed_kernel_leaves_a_hunt_that_resumes_to_the_same_numbers(tmp_path, places, undisturbed_result, kernel):
    path, result = tmp_path / "trials.sqlite", tmp_path / "result.json"
    manager, client = kernel  # the last test of it
    client.execute(f"{SOURCE}\nhunt_with_store(*{places!r})")
    wait_for_first_rows(path)
    manager.signal_kernel(signal.SIGKILL)
    while manager.is_alive():
        time.sleep(0.01)
    stored = rows_in(path)
    assert not result.exists()
    hunt_with_store(*places)
    assert_resumed(path, result, stored, undisturbed_result)


# --- objectives that fail


def failing_on(cases, fail, mended=()):
    """A user's function that takes the value of fail() for the numbers in `cases`, until `mended` holds something."""

    def my_score(generated, true):
        values = brightness(generated, true)
        for row, case in enumerate(true.indices.tolist()):
            if case in cases and not mended:
                values[row] = fail()
        return values

    return my_score


def lookup():
    return {}["disc 7"]


def test_objective_that_raises_on_one_case_costs_no_other_row_and_resumes(model, store):
    mended, asked = [], [Guidance(), *heads_alone(model)[:4]]
    my_score = failing_on({1}, lookup, mended)
    trials, resumed = (trials_of(subject_of(model, my_score, cases=4), store, batch_size=12) for _ in range(2))
    with pytest.raises(ValueError) as error:
        trials.scores(asked)
    for text in ("objective my_score: case uniform/id/1/", "KeyError: 'disc 7'", "(test_hunt_faults.py, line", "kept"):
        assert text in str(error.value)
    assert any(f"of trial {trial_name(trial)} raised" in str(error.value) for trial in asked)
    (chunk,) = trials.executor.chunks  # it stops there: every later batch would fail too
    kept = {(trial_name(trial), trials.subject.case_names[case]) for trial, case in chunk if case != 1}
    table = store.table()
    assert len(chunk) == 12 and 0 < len(kept) < 12
    assert set(zip(table["name"], table["case_name"], strict=True)) == kept

    mended.append(True)
    found = resumed.scores(asked)
    run = {(trial_name(trial), trials.subject.case_names[case]) for trial, case in resumed.executor.rows}
    assert not run & kept and len(run | kept) == resumed.rows_run + len(kept) == 5 * 4
    whole = trials_of(subject_of(model, my_score, cases=4), batch_size=12)
    torch.testing.assert_close(found, whole.scores(asked), atol=ROUNDING, rtol=0)
    assert resumed.executor.chunks[1:] == whole.executor.chunks[1:]  # the batches after it are those of any hunt
    assert torch.equal(trials.scores(asked), found)  # the object that failed goes on too


def test_case_that_cannot_be_judged_is_counted_and_not_run_again(model, store):
    my_score = failing_on({1}, lambda: math.nan)
    ranking = rank_heads(trials_of(subject_of(model, my_score), store), HUNT.guidance)
    assert all((row["judged"], row["cases"]) == (2, 3) for row in ranking.to_rows())
    assert ranking.effects.isnan().sum(0).tolist() == [0, 8, 0]
    again = trials_of(subject_of(model, my_score), store)
    same = rank_heads(again, HUNT.guidance).effects
    torch.testing.assert_close(same, ranking.effects, rtol=0, atol=0, equal_nan=True)
    assert again.rows_run == 0 and store.table()["my_score"].isna().sum() == 9


def absent_in(lost: Guidance) -> Objective:
    """A score of nothing but the guidance: NaN for one trial, else the number of broken heads, the more the better."""

    def prepare(cases, frames_given, seed):
        def score(model, guidance, rows, others):
            broken = [float(sum(len(weak.heads) for _, weak in g.weak)) for g in guidance]
            values = [math.nan if g == lost else -n for g, n in zip(guidance, broken, strict=True)]
            reasons = tuple("no disc" if g == lost else None for g in guidance)
            return dict(made_up=Scores("made_up", "", torch.tensor(values), reasons))

        return score

    return Objective("made_up", Judge("made_up", prepare, generates=False))


def test_head_that_no_case_can_judge_comes_last(model):
    cases, lost = simulate("uniform", "id", range(14), frames=8, size=16), HeadId(0, 2)
    subject = ModelSubject(model, cases, absent_in(HUNT.guidance((lost,))))
    ranking = rank_heads(trials_of(subject), HUNT.guidance)
    assert ranking.order()[-1] == lost and ranking.to_rows()[-1]["mean"] is None
    assert lost not in race_heads(trials_of(subject), HUNT.guidance, 7).winners
    assert lost not in hunt_heads(trials_of(subject), dataclasses.replace(HUNT, top_k=7)).heads


def test_unguided_clips_that_no_case_can_judge_end_the_hunt(model):
    cases = simulate("uniform", "id", range(14), frames=8, size=16)
    for hunt in (HUNT, dataclasses.replace(HUNT, search="race")):
        with pytest.raises(ValueError, match="made_up could not be judged both with and without guidance on any case"):
            hunt_heads(trials_of(ModelSubject(model, cases, absent_in(Guidance()))), hunt)


def test_objective_that_is_never_a_number_is_named(model):
    subject = subject_of(model, failing_on({0, 1, 2}, lambda: math.nan))
    for hunting in (pilot_power, hunt_heads):
        with pytest.raises(ValueError, match="objective my_score is not a number on any") as error:
            hunting(trials_of(subject), HUNT)
        assert "choose another objective" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values / 0, r"case uniform/id/0/\w+ of trial unguided raised .* infinite; give NaN"),
        (lambda values: values[:, None], r"gave \(1, 1\) values for 1 clips; give one each"),
        (lambda values: values.mean(), r"gave \(\) values for 1 clips; give one each"),
        (lambda values: values.mean()[None], r"3 rows at once raised .* gave \(1,\) values for 3 clips"),
        (lambda values: None, "case uniform.* of trial unguided raised"),
    ],
)
def test_objective_that_gives_no_number_a_clip_is_named(model, change, message):
    def my_score(generated, true):
        return change(brightness(generated, true))

    with pytest.raises(ValueError, match=message) as error:
        trials_of(subject_of(model, my_score)).scores([Guidance()])
    assert "objective my_score: " in str(error.value) and "\n" not in str(error.value)


def test_infinite_value_of_one_case_costs_that_row_alone(model, store):
    with pytest.raises(ValueError, match="my_score is infinite; give NaN where a clip cannot be judged"):
        trials_of(subject_of(model, failing_on({2}, lambda: math.inf)), store).scores([Guidance()])
    assert [name.split("/")[2] for name in store.table()["case_name"]] == ["0", "1"]


def test_batch_that_does_not_fit_in_memory_runs_row_by_row(model):
    def brightness_of_one(generated, true):
        if len(generated) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return brightness(generated, true)

    trials, asked = trials_of(subject_of(model, brightness_of_one)), [Guidance(), *heads_alone(model)]
    expected = trials_of(subject_of(model), batch_size=1).scores(asked)
    assert torch.equal(trials.scores(asked), expected) and trials.rows_run == 27
