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
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, Self

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

import physnb
from physnb.config import EXECUTORS, choose, require
from physnb.memory import keep_freed_memory
from physnb.subjects import Row, Subject
from physnb.trials import Executor, LocalExecutor, Outcome, score_chunk, trial_name

CONNECT_SECONDS = 60  # to join a cluster
PROBE_SECONDS = 3  # to accept a connection; and between two looks at the head
HEAD_SECONDS = 20  # without a head until a run gives up; after 60 Ray would end this process
START_SECONDS = 600  # for a cluster, and for its first worker; a minute is usual where all cores are busy
CHUNKS_A_WORKER = 2  # the second waits at the worker, which then never waits for what is done with outcomes here
MOST_DEATHS = 3  # of workers that score the same chunk, and of workers in a row that do not even start
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
    folder = Path(physnb.__file__).parent
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
        self._probed, self._lost = 0.0, None
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
        waiting, deaths, false_starts, staffed = deque(range(len(chunks))), Counter(), 0, time.monotonic()
        try:
            while waiting or any(worker.chunks for worker in self.workers):
                self._hire(len(waiting) + sum(len(worker.chunks) for worker in self.workers))
                self._hand_out(waiting, chunks)
                asked = {worker.next_answer: worker for worker in self.workers if worker.next_answer is not None}
                ready, _ = self.ray.wait(list(asked), timeout=1.0)
                self._check_head()
                if any(worker.hello is None for worker in self.workers):
                    staffed = time.monotonic()
                require(time.monotonic() - staffed < START_SECONDS, self._no_worker())
                for reference in ready:
                    worker = asked[reference]
                    try:
                        answer = self.ray.get(reference, timeout=CONNECT_SECONDS)
                    except self.ray.exceptions.RayTaskError as error:  # the worker lives, but is of no use
                        raise ValueError(f"a Ray worker failed ({last_line(error)}); {INSTALL_EVERYWHERE}") from None
                    except self.ray.exceptions.RayError as error:
                        self._dismiss(worker)
                        waiting.extendleft(reversed(worker.chunks.values()))
                        if worker.hello is not None:
                            false_starts += 1
                            require(false_starts < MOST_DEATHS, f"Ray workers do not start ({last_line(error)})")
                            continue
                        number = waiting[0]  # workers score in order
                        deaths[number] += 1
                        if deaths[number] == MOST_DEATHS:
                            yield number, Outcome([], {}, died_of(subject, chunks[number]))
                            return
                        continue
                    if reference == worker.hello:
                        self._check_code(answer)
                        worker.hello, false_starts = None, 0
                    else:
                        yield worker.chunks.pop(reference), answer
        finally:
            for worker in [worker for worker in self.workers if worker.chunks]:
                self._dismiss(worker)
