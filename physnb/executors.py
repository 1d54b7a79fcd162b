"""Where trials run: in this process, or on a Ray cluster (an optional extra of the package)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from physnb.config import EXECUTORS, choose, require
from physnb.memory import keep_freed_memory
from physnb.subjects import Row, Subject
from physnb.trials import Executor, LocalExecutor, Outcome, score_chunk, trial_name

CONNECT_SECONDS = 60  # to join a cluster, and to end one
PROBE_SECONDS = 3  # for the head to accept a connection
ANSWER_SECONDS = 20  # for a worker to say that it lives, or to hand over what it has
HEAD_SECONDS = 20  # without a head until a run gives up; after 60 Ray would end this process
START_SECONDS = 600  # for the first worker to start; a minute is usual where all cores are busy
CHUNKS_A_WORKER = 2  # the second waits at the worker, which then never waits for what is done with outcomes here
MOST_DEATHS = 3  # of workers that score the same chunk, and of workers in a row that do not even start
SAME_EVERYWHERE = "install the same physnb, PyTorch and what the objective imports on every node"
START_ATTEMPTS = 4  # of a cluster here: Ray gives its helpers 15 s, too few at times where all cores are busy
SETTINGS = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}  # else Ray uploads the working directory under `uv run`
LOCAL_SETTINGS = SETTINGS | {  # of a cluster that is started here
    "RAY_AUTH_MODE": "token",  # else whoever reaches this machine could run code on it
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "20",  # if the helpers are too late it never starts
    "RAY_worker_niceness": "0",  # at Ray's 15 a worker's imports take minutes beside other work
}
HEAD = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
print(cluster.address, flush=True)
sys.stdin.read()  # ends when the process that started this one closes it, or ends
cluster.shutdown()
"""


@contextmanager
def executor_named(name: str, *, address: str | None = None, workers: int | None = None) -> Iterator[Executor]:
    """The executor called `name`, closed after the block. address, workers: of "ray", see `RayExecutor`."""
    choose("executor", name, EXECUTORS)
    if name == "local":
        require(address is None and workers is None, "an address and workers are for executor 'ray'; choose that")
        yield LocalExecutor()
        return
    with closing(RayExecutor(address, workers)) as executor:
        yield executor


class ScoreWorker:
    """What runs in a process of the cluster. It keeps the subject that it scored last."""

    def __init__(self, threads: int, gpu: bool):
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.gpu, self.subject, self.reference = gpu, None, None

    def describe(self) -> dict[str, Any]:
        """Where this worker runs and what its code is."""
        return dict(node=platform.node(), pid=os.getpid(), code=code_hashes())

    def score(self, reference: list, chunk: Sequence[Row]) -> Outcome:
        """What comes of a chunk. reference: of the subject, in a list, for Ray would fetch a bare one every time."""
        if reference != self.reference:
            import ray

            self.subject = self.reference = None  # two may not fit in memory
            subject = ray.get(reference[0])
            if self.gpu:
                move_models(subject, torch.device("cuda"))
            self.subject, self.reference = subject, reference
        return score_chunk(self.subject, chunk)


def code_hashes() -> dict[str, str]:
    """What must be the same on all nodes: PyTorch's version and a hash of each loaded file of this package, by name."""
    files = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "physnb"}
    code = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()}
    return code | dict(torch=torch.__version__)


def move_models(subject: Subject, device: torch.device) -> None:
    """Move the networks and pipelines among a subject's fields, or in a mapping there, to a device."""
    for value in vars(subject).values():
        for part in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(part, nn.Module | DiffusionPipeline):
                part.to(device)


@dataclass(eq=False)
class Worker:
    """A ScoreWorker seen from here."""

    actor: Any
    hello: Any  # reference of its description, until that has come
    chunks: dict[Any, int] = field(default_factory=dict)  # numbers by the reference of their outcome, oldest first

    @property
    def next_answer(self) -> Any:
        """The reference of what comes next from it, or None."""
        return self.hello or next(iter(self.chunks), None)


class RayExecutor:
    """Chunks scored by workers of a Ray cluster, each a process, with a GPU each where the cluster has some.

    address: HOST:PORT of the head of a running cluster, from one of its nodes; ray://HOST:PORT from elsewhere, which
    needs `ray[client]`. Without it one is started on this machine, of which `close` leaves nothing. workers: by default
    as many as the cluster has room for. threads: of a worker, by default those of PyTorch in this process.

    Scores equal those of LocalExecutor to the bit for the same chunks (so the same batch size), number of threads and
    kind of device and processor. How many workers there are and which of them scores a chunk decides nothing. That all
    nodes run the same code of this package and the same PyTorch is checked.

    A worker that dies is replaced and its chunks are scored again; the outcome of a chunk that MOST_DEATHS of them died
    of is an error. Raises ValueError where a cluster or workers cannot be had, and ConnectionError where the head is
    lost in the middle of a run, HEAD_SECONDS after that.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, *, threads: int | None = None):
        require(workers is None or workers > 0, f"Ray workers must be at least 1, got {workers}")
        require(threads is None or threads > 0, f"threads of a Ray worker must be at least 1, got {threads}")
        self.threads = threads or torch.get_num_threads()
        self.workers: list[Worker] = []
        self._code = code_hashes()
        self._subject, self._run = (None, []), None
        cores = self.threads * (workers or (os.cpu_count() or 1) // self.threads or 1)
        with ExitStack() as opened:
            self.ray, self._head = opened.enter_context(connect(address, cores))
            nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            self.gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
            # no more than the largest node has: on small nodes the threads share cores, but the numbers stay the same
            cpus = min(self.threads, int(max((node.get("CPU", 0) for node in nodes), default=0)) or self.threads)
            self.needs = dict(GPU=1, CPU=1) if self.gpu else dict(CPU=cpus)
            room = sum(min(int(node.get(name, 0) // need) for name, need in self.needs.items()) for node in nodes)
            require(workers or room > 0, f"no node of the Ray cluster has room for a worker, which needs {self.needs}")
            self.size = workers or room
            self._opened = opened.pop_all()

    def close(self) -> None:
        """End the workers, and the cluster if it was started here; what runs is dropped."""
        self._end_run()
        for worker in list(self.workers):
            self._dismiss(worker)
        self._opened.close()

    def run(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Iterator[tuple[int, Outcome]]:
        """Number and outcome of every chunk as they come. Workers stay for the next run.

        One run at a time: the next ends the one before. A run that ends early ends the workers that are at work for it.
        """
        self._end_run()
        run = self._score(subject, chunks)
        self._run = weakref.ref(run)  # a strong one would keep it from ending where its consumer breaks off
        return run

    def _end_run(self) -> None:
        run = self._run and self._run()  # an interrupted one, which a traceback may still hold
        if run is not None:
            run.close()

    def _score(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Generator[tuple[int, Outcome]]:
        require(self.ray.is_initialized(), "this RayExecutor is closed; make another")
        if self._subject[0] is not subject:
            self._subject = subject, [self.ray.put(subject)]
        self._staffed, self._headless = time.monotonic(), None
        while not self._head_answers():  # Ray itself would wait for it, and then end this process
            time.sleep(1.0)
        self._forget_dead()
        waiting, deaths = deque(range(len(chunks))), Counter()  # deaths by chunk; None is a worker that did not start
        try:
            while waiting or any(worker.chunks for worker in self.workers):
                if self._head_answers():
                    self._hire(len(waiting) + sum(len(worker.chunks) for worker in self.workers))
                self._hand_out(waiting, chunks)
                worker, answer = self._next_answer()
                if worker is None:
                    continue
                if isinstance(answer, self.ray.exceptions.RayError):
                    self._dismiss(worker)
                    cause, *others = list(worker.chunks.values()) or [None]  # a worker scores in order
                    deaths[cause] += 1
                    require(deaths[None] < MOST_DEATHS, f"Ray workers do not start ({last_line(answer)})")
                    if deaths[cause] == MOST_DEATHS:
                        error = f"{MOST_DEATHS} Ray workers died of {name_rows(subject, chunks[cause])}"
                        yield cause, Outcome([], {}, error)
                        return
                    waiting.extendleft(reversed(others))
                    waiting.extend([] if cause is None else [cause])  # last: it costs the others nothing then
                elif worker.hello:
                    other = ", ".join(name for name, code in answer["code"].items() if self._code.get(name) != code)
                    require(not other, f"node {answer['node']} has another {other} than here; {SAME_EVERYWHERE}")
                    worker.hello = None
                    deaths.pop(None, None)
                else:
                    yield worker.chunks.pop(worker.next_answer), answer
        finally:
            for worker in [worker for worker in self.workers if worker.chunks]:
                self._dismiss(worker)

    def _forget_dead(self) -> None:
        """Drop workers that died since the last run, so that no chunk is blamed for it."""
        for worker in [worker for worker in self.workers if not worker.hello]:
            try:
                self.ray.get(worker.actor.describe.remote(), timeout=ANSWER_SECONDS)
            except self.ray.exceptions.RayError:
                self._dismiss(worker)

    def _hire(self, chunks: int) -> None:
        """Start workers, up to the number wanted and not more than there are chunks."""
        share = dict(num_cpus=self.needs["CPU"], num_gpus=self.needs.get("GPU", 0))
        while len(self.workers) < min(self.size, chunks):
            actor = self.ray.remote(ScoreWorker).options(**share).remote(self.threads, self.gpu)
            self.workers.append(Worker(actor, actor.describe.remote()))

    def _hand_out(self, waiting: deque[int], chunks: Sequence[Sequence[Row]]) -> None:
        """Give a chunk to every idle worker, then a second one to each unless few are left, which all shall share."""
        for most in range(1, CHUNKS_A_WORKER + 1):
            for worker in self.workers:
                enough = len(waiting) > (len(self.workers) if most > 1 else 0)
                if enough and not worker.hello and len(worker.chunks) < most:
                    number = waiting.popleft()
                    worker.chunks[worker.actor.score.remote(self._subject[1], chunks[number])] = number

    def _next_answer(self) -> tuple[Worker | None, Any]:
        """A worker and its answer, or the error that it died of; no worker where none answers within a second."""
        asked = {worker.next_answer: worker for worker in self.workers if worker.next_answer}
        ready, _ = self.ray.wait(list(asked), timeout=1.0) if asked else ([], time.sleep(1.0))
        if any(not worker.hello for worker in self.workers):
            self._staffed = time.monotonic()
        elif time.monotonic() - self._staffed > START_SECONDS:
            free = self.ray.available_resources()
            raise ValueError(f"no Ray worker started in {START_SECONDS} s; one needs {self.needs}, free are {free}")
        if not ready:
            return None, None
        try:
            return asked[ready[0]], self.ray.get(ready[0], timeout=ANSWER_SECONDS)
        except self.ray.exceptions.RayTaskError as error:  # not of a row, and no other worker would do better
            asked[ready[0]].chunks.pop(ready[0], None)
            raise ValueError(f"a Ray worker failed ({last_line(error)}); {SAME_EVERYWHERE}") from None
        except self.ray.exceptions.RayError as error:
            return asked[ready[0]], error

    def _head_answers(self) -> bool:
        """Whether something listens at the head's address; raises ConnectionError where it has not for long."""
        host, port = self._head
        fault = connection_fault(host, port)
        self._headless = None if fault is None else self._headless or time.monotonic()
        if fault is not None and time.monotonic() - self._headless > HEAD_SECONDS:
            raise ConnectionError(f"the head of the Ray cluster at {host}:{port} is lost ({fault}); start it again")
        return fault is None

    def _dismiss(self, worker: Worker) -> None:
        self.workers.remove(worker)
        if self.ray.is_initialized():  # else Ray would start a cluster to kill it in
            self.ray.kill(worker.actor)


def name_rows(subject: Subject, chunk: Sequence[Row]) -> str:
    """`trials t1; t2 on cases c1; c2`."""
    trials = dict.fromkeys(trial_name(trial) for trial, _ in chunk)
    cases = dict.fromkeys(subject.case_names[case] for _, case in chunk)
    return f"trials {'; '.join(trials)} on cases {'; '.join(cases)}"


def last_line(error: BaseException | str) -> str:
    """What an error says in the end; those of Ray begin with pages of tracebacks."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


@contextmanager
def connect(address: str | None, cpus: int) -> Iterator[tuple[ModuleType, tuple[str, int]]]:
    """Ray, connected to a cluster, and host and port of its head. cpus: of a cluster that is started for it."""
    head = None if address is None else head_at(address)
    with environment(LOCAL_SETTINGS if address is None else SETTINGS), ExitStack() as opened:
        try:
            import ray
        except ImportError:
            raise ValueError("executor 'ray' needs Ray: pip install 'physnb[ray]', or 'ray>=2.60,<3'") from None
        require(not ray.is_initialized(), "this process is connected to Ray already; call ray.shutdown() first")
        attempts = 0
        while not address:
            address, fault = opened.enter_context(local_cluster(cpus))
            attempts += 1
            require(address or attempts < START_ATTEMPTS, f"no Ray cluster could be started ({fault}); try again later")
            ray._raylet.Config.initialize("")  # Ray may have been imported before the token was set
        join = partial(ray.init, address=address, log_to_driver=False, logging_level="ERROR")
        within(CONNECT_SECONDS, join, f"cannot join a Ray cluster at {address}")
        opened.callback(ray.shutdown)
        ray._private.worker._worker_logs_enabled = False  # Ray reports deaths on stdout, where --json belongs
        yield ray, head or head_at(address)


def head_at(address: str) -> tuple[str, int]:
    """Host and port that an address names; raises ValueError unless something listens there."""
    found = re.fullmatch(r"(?:ray://)?([^/\s]+):(\d+)", address)
    require(found is not None, f"Ray address {address!r} is not of the form HOST:PORT or ray://HOST:PORT")
    host, port = found[1], int(found[2])
    fault = connection_fault(host, port)
    require(fault is None, f"no Ray cluster answers at {address} ({fault}); give what `ray start --head` prints")
    return host, port


@contextmanager
def local_cluster(cpus: int) -> Iterator[tuple[str, str]]:
    """The address of a cluster on this machine, or nothing and the reason; it ends with the block or this process."""
    # not in any temporary folder: the path of a Unix socket has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="physnb-ray-", dir="/tmp" if os.path.isdir("/tmp") else None))
    settings = dict(num_cpus=cpus, num_gpus=torch.cuda.device_count(), no_monitor=True)
    settings |= dict(include_dashboard=False, include_log_monitor=False)
    settings |= dict(object_store_memory=psutil.virtual_memory().available // 4)
    with open(folder / "errors", "w") as errors:
        head = psutil.Popen(
            [sys.executable, "-c", HEAD, json.dumps(settings)], env=os.environ | {"RAY_TMPDIR": str(folder)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    try:
        yield head.stdout.readline().strip(), last_line((folder / "errors").read_text())
    finally:
        processes = [head]
        with suppress(psutil.NoSuchProcess):
            processes += head.children(recursive=True)
        head.stdin.close()
        psutil.wait_procs([head], timeout=CONNECT_SECONDS)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=PROBE_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables within the block; one that is set already keeps its value."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def connection_fault(host: str, port: int) -> str | None:
    """Why no TCP connection can be made, or None."""
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def within(seconds: float, action: Callable[[], Any], failure: str) -> Any:
    """What `action` returns; raises ValueError(failure) where it raises, or has not ended after `seconds`.

    It runs in a thread, which is then left alone: some of Ray's waits cannot be interrupted.
    """
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(action())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise ValueError(f"{failure} (no answer in {seconds} s)") from None
    except Exception as error:
        raise ValueError(f"{failure} ({last_line(error)})") from None
