"""Where trials run: in this process, or on a Ray cluster (an optional extra of the package)."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, Self

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from physnb.config import EXECUTORS, choose, require
from physnb.memory import keep_freed_memory
from physnb.subjects import Row, Subject
from physnb.trials import Executor, LocalExecutor, Outcome, score_chunk, trial_name

CONNECT_SECONDS = 60  # to join a cluster
PROBE_SECONDS = 3  # to accept a connection; and between two looks at the head
HEAD_SECONDS = 20  # without a head until a run gives up; after 60 Ray would end this process
START_SECONDS = 600  # for the first worker to start; a minute is usual where all cores are busy
CHUNKS_A_WORKER = 2  # the second waits at the worker, which then never waits for what is done with outcomes here
MOST_DEATHS = 3  # of workers that score the same chunk, and of workers in a row that do not even start
SAME_EVERYWHERE = "install the same physnb, PyTorch and what the objective imports on every node"
LOCAL_SETTINGS = {  # of a cluster that is started here
    "RAY_AUTH_MODE": "token",  # else whoever reaches this machine could run code on it
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray packages the working directory under `uv run`
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",  # Ray's 30 are short where all cores are busy
    "RAY_worker_niceness": "0",  # at Ray's 15 a worker's imports take minutes beside other work
}


@contextmanager
def executor_named(name: str, *, address: str | None = None, workers: int | None = None) -> Iterator[Executor]:
    """The executor called `name`, closed after the block. address, workers: of "ray", see `RayExecutor`."""
    choose("executor", name, EXECUTORS)
    if name == "local":
        require(address is None and workers is None, "an address and workers are for executor 'ray'; choose that")
        yield LocalExecutor()
        return
    with RayExecutor(address, workers) as executor:
        yield executor


class ScoreWorker:
    """What runs in a process of the cluster. It keeps the subject that it scored last."""

    def __init__(self, threads: int, gpu: bool):
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.gpu = gpu
        self.subject = self.reference = None

    def describe(self) -> dict[str, Any]:
        """Where this worker runs and what its code is."""
        return dict(node=platform.node(), pid=os.getpid(), code=code_digest())

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


def code_digest() -> str:
    """A hash of PyTorch's version and this package's source: what must be the same on all nodes of a cluster."""
    digest = hashlib.sha256(torch.__version__.encode())
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def move_models(subject: Subject, device: torch.device) -> None:
    """Move the networks and pipelines among a subject's fields, or in a mapping there, to a device."""
    for value in vars(subject).values():
        for part in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(part, nn.Module | DiffusionPipeline):
                part.to(device)


@dataclass(eq=False)
class Worker:
    """A ScoreWorker seen from here: what it was asked, in order, by the reference of the answer.

    hello: the reference of its description, until that came. chunks: their numbers by the reference of their outcome.
    """

    actor: Any
    hello: Any
    chunks: dict[Any, int] = field(default_factory=dict)

    @property
    def next_answer(self) -> Any:
        """The reference of what comes next from it, or None."""
        return self.hello or next(iter(self.chunks), None)


class RayExecutor:
    """Chunks scored by workers of a Ray cluster, each a process, with a GPU each where the cluster has some.

    address: HOST:PORT of the head of a running cluster, from one of its nodes; ray://HOST:PORT from elsewhere, for which
    `ray[client]` must be installed. Without it, the cluster that this process is connected to, else one is started on
    this machine, of which `close` leaves nothing. workers: by default as many as the cluster has room for now. threads:
    of a worker, by default those of PyTorch in this process.

    Scores equal those of LocalExecutor to the bit for the same chunks (so the same batch size), number of threads and
    kind of device and processor. How many workers there are and which of them scores a chunk decides nothing. That all
    nodes run the same code of this package and the same PyTorch is checked.

    A worker that dies is replaced and what it had is scored again; of a chunk that MOST_DEATHS of them died of the
    outcome is an error. Raises ValueError where a cluster or workers cannot be had, and ConnectionError where nothing
    answers at the head for HEAD_SECONDS in the middle of a run.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, *, threads: int | None = None):
        require(workers is None or workers > 0, f"Ray workers must be at least 1, got {workers}")
        require(threads is None or threads > 0, f"threads of a Ray worker must be at least 1, got {threads}")
        self.threads = threads or torch.get_num_threads()
        self.workers: list[Worker] = []
        self._code = code_digest()
        self._subject: tuple[Subject | None, list] = None, []
        self._run: Generator | None = None
        with ExitStack() as opened:
            self.ray, self._head = opened.enter_context(connect(address, self.threads * workers if workers else None))
            nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            self.gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
            # no more than the largest node has: on small nodes the threads share cores, but the numbers stay the same
            cpus = min(self.threads, int(max(node.get("CPU", 0) for node in nodes)) or self.threads)
            self.needs = dict(GPU=1, CPU=1) if self.gpu else dict(CPU=cpus)
            room = sum(min(int(node.get(name, 0) // need) for name, need in self.needs.items()) for node in nodes)
            require(workers or room > 0, f"no node of the Ray cluster has room for a worker, which needs {self.needs}")
            self.size = workers or room
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the cluster if it was started here; what runs is dropped."""
        if self._run is not None:
            self._run.close()
        for worker in list(self.workers):
            self._dismiss(worker)
        self._opened.close()

    def run(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Iterator[tuple[int, Outcome]]:
        """Number and outcome of every chunk as they come. Workers stay for the next run.

        One run at a time: the next ends the one before. A run that ends early ends the workers that are at work for it.
        """
        if self._run is not None:
            self._run.close()  # a traceback may still hold an interrupted one
        self._run = self._score(subject, chunks)
        return self._run

    def _score(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Generator[tuple[int, Outcome]]:
        require(self.ray.is_initialized(), "this RayExecutor is closed; make another")
        if self._subject[0] is not subject:
            self._subject = subject, [self.ray.put(subject)]
        self._staffed = self._probed = time.monotonic()
        self._headless = None
        waiting, deaths = deque(range(len(chunks))), Counter()  # deaths by chunk; None is a worker that did not start
        try:
            while waiting or any(worker.chunks for worker in self.workers):
                self._hire(len(waiting) + sum(len(worker.chunks) for worker in self.workers))
                self._hand_out(waiting, chunks)
                for worker in self._answered():
                    try:
                        answer = self.ray.get(worker.next_answer, timeout=CONNECT_SECONDS)
                    except self.ray.exceptions.RayTaskError as error:  # what `score_chunk` cannot have raised
                        raise ValueError(f"a Ray worker failed ({last_line(error)}); {SAME_EVERYWHERE}") from None
                    except self.ray.exceptions.RayError as error:
                        self._dismiss(worker)
                        waiting.extendleft(reversed(worker.chunks.values()))
                        cause = None if worker.hello else waiting[0]  # a worker scores in order
                        deaths[cause] += 1
                        if deaths[cause] == MOST_DEATHS:
                            require(cause is not None, f"Ray workers do not start ({last_line(error)})")
                            yield (
                                cause,
                                Outcome(
                                    [], {}, f"{name_rows(subject, chunks[cause])} killed {MOST_DEATHS} Ray workers"
                                ),
                            )
                            return
                    else:
                        if worker.hello:
                            self._welcome(worker, answer)
                            deaths.pop(None, None)
                        else:
                            yield worker.chunks.pop(worker.next_answer), answer
        finally:
            for worker in [worker for worker in self.workers if worker.chunks]:
                self._dismiss(worker)

    def _hire(self, chunks: int) -> None:
        """Start workers, up to the number wanted and not more than there are chunks."""
        while len(self.workers) < min(self.size, chunks):
            remote = self.ray.remote(ScoreWorker).options(
                num_cpus=self.needs["CPU"], num_gpus=self.needs.get("GPU", 0), max_restarts=0, max_task_retries=0
            )
            actor = remote.remote(self.threads, self.gpu)
            self.workers.append(Worker(actor, actor.describe.remote()))

    def _hand_out(self, waiting: deque[int], chunks: Sequence[Sequence[Row]]) -> None:
        """Give a chunk to every idle worker, then a second one to each unless few are left, which all shall share."""
        for most in range(1, CHUNKS_A_WORKER + 1):
            for worker in self.workers:
                enough = len(waiting) > (len(self.workers) if most > 1 else 0)
                if enough and not worker.hello and len(worker.chunks) < most:
                    number = waiting.popleft()
                    worker.chunks[worker.actor.score.remote(self._subject[1], chunks[number])] = number

    def _answered(self) -> list[Worker]:
        """A worker whose next answer has come, or none within a second; raises where that cannot get better."""
        asked = {worker.next_answer: worker for worker in self.workers if worker.next_answer}
        ready, _ = self.ray.wait(list(asked), timeout=1.0)
        now = time.monotonic()
        if any(not worker.hello for worker in self.workers):
            self._staffed = now
        require(
            now - self._staffed < START_SECONDS,
            f"no Ray worker started in {START_SECONDS} s; one needs {self.needs}, and of the cluster's resources "
            f"{self.ray.available_resources()} are free",
        )
        if now - self._probed > PROBE_SECONDS:
            self._probed = now
            host, port = self._head
            fault = connection_fault(host, port)
            self._headless = (self._headless or now) if fault else None
            if fault and now - self._headless > HEAD_SECONDS:
                raise ConnectionError(f"the head of the Ray cluster at {host}:{port} is lost ({fault}); start it again")
        return [asked[reference] for reference in ready]

    def _welcome(self, worker: Worker, description: dict[str, Any]) -> None:
        require(
            description["code"] == self._code,
            f"node {description['node']} has another physnb or PyTorch than this process; {SAME_EVERYWHERE}",
        )
        worker.hello = None

    def _dismiss(self, worker: Worker) -> None:
        self.workers.remove(worker)
        if self.ray.is_initialized():  # else Ray would start a cluster to kill it in
            self.ray.kill(worker.actor)


def name_rows(subject: Subject, chunk: Sequence[Row], most: int = 3) -> str:
    """`case c of trial t, ... and 5 more`."""
    names = [f"case {subject.case_names[case]} of trial {trial_name(trial)}" for trial, case in chunk]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def last_line(error: BaseException) -> str:
    """What an error says in the end; those of Ray begin with pages of tracebacks."""
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def import_ray() -> ModuleType:
    """Ray; raises ValueError saying how to install it."""
    try:
        import ray
    except ImportError:
        raise ValueError(
            "executor 'ray' needs Ray, which is not installed: pip install 'physnb[ray]', or pip install 'ray>=2.60,<3'"
        ) from None
    return ray


@contextmanager
def connect(address: str | None, cpus: int | None) -> Iterator[tuple[ModuleType, tuple[str, int]]]:
    """Ray, connected to a cluster, and host and port of its head. cpus: of a cluster that is started for it."""
    token = dict(RAY_AUTH_TOKEN=secrets.token_hex(32))  # else Ray leaves one in the home folder
    with environment(LOCAL_SETTINGS | token if address is None else {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}):
        ray = import_ray()
        if ray.is_initialized():
            require(address is None, "this process is connected to Ray already; leave the address out to use that")
            yield ray, head_of(ray)
        elif address is None:
            with local_cluster(ray, cpus):
                yield ray, head_of(ray)
        else:
            found = re.fullmatch(r"(?:ray://)?([^/\s]+):(\d+)", address)
            require(found is not None, f"Ray address {address!r} is not of the form HOST:PORT or ray://HOST:PORT")
            head = found[1], int(found[2])
            fault = connection_fault(*head)
            advice = "give the address that `ray start --head` prints, or none to start a cluster here"
            require(fault is None, f"no Ray cluster answers at {address} ({fault}); {advice}")
            within(
                CONNECT_SECONDS,
                partial(ray.init, address=address, log_to_driver=False, logging_level="ERROR"),
                f"cannot join a Ray cluster at {address}",
            )
            try:
                yield ray, head
            finally:
                ray.shutdown()


def head_of(ray: ModuleType) -> tuple[str, int]:
    """Host and port of the head of the cluster that Ray is connected to."""
    host, port = ray.get_runtime_context().gcs_address.rsplit(":", 1)
    return host, int(port)


@contextmanager
def local_cluster(ray: ModuleType, cpus: int | None) -> Iterator[None]:
    """Ray connected to a cluster of its own on this machine; its processes and its files end with the block."""
    # paths of Unix sockets must not be longer than 107 characters, and some temporary folders are half of that
    folder = tempfile.mkdtemp(prefix="physnb-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    settings = dict(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:  # in this thread: Linux ends the processes with the thread that started them
        ray.init(address="local", _temp_dir=folder, **settings)
    except Exception as error:  # what was started ends with this process, which would not survive its death before
        advice = "try again when the cores are less busy, or give the address of one that `ray start --head` started"
        raise ValueError(f"no Ray cluster could be started here ({last_line(error)}); {advice}") from None
    try:
        yield
    finally:
        ray.shutdown()
        for process in psutil.process_iter(["cmdline"]):
            if any(folder in argument for argument in process.info["cmdline"] or ()):
                process.kill()
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
