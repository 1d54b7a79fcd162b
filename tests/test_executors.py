"""The Ray executor on one local cluster of two workers; its tests run in order, for a worker takes long to start."""

import importlib
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from physnb import executors
from physnb.config import Guidance, HuntConfig
from physnb.executors import RayExecutor, executor_named, move_models
from physnb.families import heads_of
from physnb.store import TrialStore
from physnb.subjects import ModelSubject, Row, simulated_subject
from physnb.trials import LocalExecutor, Trials

pytestmark = pytest.mark.slow

HUNT = HuntConfig(split="id", selection_cases=3, confirmation_cases=4, top_k=2, steps=2, random_draws=2)
ROWS = 9 * 9  # no guidance and eight heads on three cases of three scenarios


@dataclass(eq=False)
class UnluckySubject(ModelSubject):
    """One of its rows raises, or kills the process that scores it."""

    row: Row | None = None
    deadly: bool = False

    def score(self, rows):
        if self.row in rows:
            if self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the discs overlap")
        return super().score(rows)


class NeedsMissingModule:
    """What cannot be unpickled anywhere."""

    def __reduce__(self):
        return importlib.import_module, ("module_of_the_driver_alone",)


@pytest.fixture(scope="module")
def subject(model) -> ModelSubject:
    return simulated_subject(model, HUNT, "selection")


@pytest.fixture(scope="module")
def guidances(model) -> list[Guidance]:
    return [Guidance(), *(HUNT.guidance((head,)) for head in heads_of(model))]


@pytest.fixture(scope="module")
def executor():
    ray = pytest.importorskip("ray", reason="pip install 'ray>=2.60,<3'")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    executor = RayExecutor(workers=2)
    yield executor
    executor.close()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def pids(executor) -> dict:
    """The process of every worker, all of them having started."""
    asked = [worker.actor.describe.remote() for worker in executor.workers]
    return dict(zip(executor.workers, [found["pid"] for found in executor.ray.get(asked)], strict=True))


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def unlucky(subject, **trouble) -> UnluckySubject:
    return UnluckySubject(subject.model, subject.cases, subject.objective, steps=subject.steps, seed=1, **trouble)


def trials_of(subject, executor=None, **settings) -> Trials:
    return Trials(subject, executor=executor, progress=False, **settings)


def test_local_executor_is_the_default_and_takes_no_cluster():
    with executor_named("local") as executor:
        assert isinstance(executor, LocalExecutor)
    for cluster in (dict(workers=2), dict(address="10.0.0.1:6379")):
        with pytest.raises(ValueError, match="are for executor 'ray'"), executor_named("local", **cluster):
            pass
    with pytest.raises(ValueError, match="unknown executor 'slurm'; choose one of local, ray"), executor_named("slurm"):
        pass


def test_missing_ray_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'physnb\[ray\]', or 'ray>=2.60,<3'"):
        RayExecutor()


def test_bad_arguments_are_named():
    for bad, words in (
        (dict(workers=0), "Ray workers must be at least 1, got 0"),
        (dict(threads=0), "threads of a Ray worker must be at least 1, got 0"),
        (dict(address="somewhere"), "'somewhere' is not of the form HOST:PORT or ray://HOST:PORT"),
        (dict(address="127.0.0.1:99999"), "no Ray cluster answers at 127.0.0.1:99999"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            RayExecutor(**bad)


def test_dead_address_is_one_clear_error_at_once():
    begun = time.monotonic()
    with (
        pytest.raises(ValueError, match=r"no Ray cluster answers at 127.0.0.1:1 \(.*refused\); give what"),
        executor_named("ray", address="127.0.0.1:1"),
    ):
        pass
    assert time.monotonic() - begun < executors.PROBE_SECONDS + 20  # 20: to import Ray


def test_models_of_a_subject_move_and_nothing_else(make_model, subject):
    moved = ModelSubject(make_model(), subject.cases, subject.objective, others=dict(weaker=make_model(1)))
    move_models(moved, torch.device("meta"))
    assert moved.model.device.type == moved.others["weaker"].device.type == "meta"
    assert moved.cases is subject.cases and subject.model.device.type == "cpu"


def test_node_with_other_code_is_refused(executor, subject, monkeypatch):
    monkeypatch.setitem(executor._code, "physnb.objectives", "that of yesterday")
    with pytest.raises(ValueError, match=r"has another physnb\.objectives than here; install the same"):
        list(executor.run(subject, [[(Guidance(), 0)], [(Guidance(), 1)]]))


def test_subject_that_workers_cannot_load_is_an_error_that_says_why(executor, subject):
    foreign = unlucky(subject)
    foreign.others = dict(foreign=NeedsMissingModule())
    with pytest.raises(ValueError, match=r"No module named 'module_of_the_driver_alone'.*; install the same"):
        list(executor.run(foreign, [[(Guidance(), 0)]]))


def test_scores_equal_those_of_the_local_executor_to_the_bit(executor, subject, guidances):
    assert len(set(pids(executor).values()) - {os.getpid()}) == 2
    local, ray = trials_of(subject, batch_size=7), trials_of(subject, executor, batch_size=7)
    local.scores(guidances)
    ray.scores(guidances)
    assert len(local.score_names()) > 3
    for name in local.score_names():
        torch.testing.assert_close(ray.scores(guidances, name=name), local.scores(guidances, name=name), rtol=0, atol=0,
                                   equal_nan=True)  # fmt: skip


def test_chunks_in_flight_are_few(executor, subject, guidances):
    rows = [(trial, case) for trial in guidances for case in range(9)]
    seen = set()
    for number, outcome in executor.run(subject, [[row] for row in rows[:30]]):
        assert outcome.rows == [0] and outcome.error is None
        assert all(len(worker.chunks) <= executors.CHUNKS_A_WORKER for worker in executor.workers)
        seen.add(number)
    assert seen == set(range(30))


def test_objective_that_raises_is_the_same_error_as_locally(executor, subject, guidances, tmp_path):
    raising = unlucky(subject, row=(guidances[3], 4))
    said = []
    for where, name in ((None, "local"), (executor, "ray")):
        with TrialStore(tmp_path / f"{name}.sqlite") as store:
            with pytest.raises(ValueError, match="raised ArithmeticError: the discs overlap") as error:
                trials_of(raising, where, store=store, batch_size=36).scores(guidances[:4])
            said.append(str(error.value))
            assert len(store.table()) == 35
    assert said[0] == said[1] and subject.case_names[4] in said[0]


def test_killed_worker_is_replaced_and_every_row_is_there_once(executor, subject, guidances, tmp_path, capfd):
    expected = trials_of(subject, batch_size=2).scores(guidances)
    alive, killed = pids(executor), []

    def kill_one(trials):
        if not killed:
            killed.append(next(worker for worker in executor.workers if worker.chunks))
            os.kill(alive[killed[0]], signal.SIGKILL)

    with TrialStore(tmp_path / "trials.sqlite") as store:
        trials = trials_of(subject, executor, store=store, batch_size=2, on_rows=kill_one)
        assert torch.equal(trials.scores(guidances), expected)
        table = store.table()
    assert trials.rows_run == len(table) == ROWS and not table.duplicated(["trial", "case_name"]).any()
    assert not is_running(alive[killed[0]])
    assert killed[0] not in executor.workers and len(executor.workers) == 2
    assert capfd.readouterr().out == ""  # where --json belongs


def test_interrupted_run_frees_its_workers_and_goes_on_from_the_store(executor, subject, guidances, tmp_path):
    expected = trials_of(subject, batch_size=9).scores(guidances)
    busy = {}

    def interrupt(trials):
        workers = [worker for worker in executor.workers if worker.chunks]
        asked = [worker.actor.describe.remote() for worker in workers]
        busy.update(zip(workers, [found["pid"] for found in executor.ray.get(asked)], strict=True))
        raise KeyboardInterrupt

    with TrialStore(tmp_path / "trials.sqlite") as store:
        first = trials_of(subject, executor, store=store, batch_size=9, on_rows=interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.scores(guidances)
        again = trials_of(subject, executor, store=store, batch_size=9)
        assert torch.equal(again.scores(guidances), expected)
        assert len(store.table()) == ROWS == first.rows_run + again.rows_run
    assert busy and not any(worker in executor.workers or is_running(pid) for worker, pid in busy.items())


def test_rows_that_kill_every_worker_end_with_their_names_and_the_others_stored(
    executor, subject, guidances, tmp_path, monkeypatch
):
    monkeypatch.setattr(executors, "MOST_DEATHS", 2)  # a third worker would take long to start
    deadly = unlucky(subject, row=(guidances[3], 4), deadly=True)
    with TrialStore(tmp_path / "trials.sqlite") as store:
        words = "2 Ray workers died of trials .*L0H2.* on cases .*; mend it and start again"
        with pytest.raises(ValueError, match=words) as error:
            trials_of(deadly, executor, store=store, batch_size=9).scores(guidances)
        assert subject.case_names[4] in str(error.value)
        assert len(store.table()) == ROWS - 9


def test_lost_head_is_one_error_and_closing_leaves_nothing(executor, subject, monkeypatch):
    monkeypatch.setattr(executors, "HEAD_SECONDS", 1)
    run = executor.run(subject, [[(Guidance(), case)] for case in range(9)] * 50)
    next(run)
    started = psutil.Process().children(recursive=True)
    head = next(process for process in started if "gcs_server" in process.name())
    folder = Path(head.environ()["RAY_TMPDIR"])
    assert folder.is_dir()
    head.kill()
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=r"the head of the Ray cluster at .* is lost \(.*refused\)"):
        list(run)
    with pytest.raises(ConnectionError, match="is lost"):  # and a new run does not even begin
        next(executor.run(subject, [[(Guidance(), 0)]]))
    assert time.monotonic() - begun < 30
    executor.close()
    psutil.wait_procs(started, timeout=10)
    assert not [process for process in started if is_running(process.pid)]
    assert not folder.exists() and "RAY_AUTH_TOKEN" not in os.environ
    with pytest.raises(ValueError, match="this RayExecutor is closed"):
        next(executor.run(subject, [[(Guidance(), 0)]]))
