"""Where trials run: in this process, or on a Ray cluster (`pip install "physnb[ray]"`)."""

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

import torch
from diffusers import DiffusionPipeline
from torch import nn

import physnb
from physnb.config import EXECUTORS, choose, require
from physnb.memory import keep_freed_memory
from physnb.subjects import Row, Subject
from physnb.trials import Executor, LocalExecutor, Outcome, score_chunk, trial_name

PROBE_SECONDS = 5  # an address that takes longer to accept a connection counts as dead
CONNECT_SECONDS = 60  # to join a cluster
HEAD_SECONDS = 20  # without a head until a hunt gives up; after 60 Ray itself would end the process
START_SECONDS = 600  # for a cluster or its first worker to start; a minute is usual where all cores are busy
CHUNKS_A_WORKER = 2  # the second waits at the worker, which never idles while outcomes are written
MOST_DEATHS = 3  # of workers that score the same chunk, and of new workers in a row
LOCAL_SETTINGS = {  # of a cluster that is started here
    "RAY_AUTH_MODE": "token",  # else every user of the network could run code in it
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray would package the working directory under `uv run`
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",  # Ray's 30 are short where all cores are busy
    "RAY_worker_niceness": "0",  # with Ray's 15, importing torch took minutes beside other work
}


@contextmanager
def executor_named(name: str, *, address: str | None = None, workers: int | None = None) -> Iterator[Executor]:
    """The executor called `name`, closed after the block. address, workers: of "ray", see `RayExecutor`."""
    choose("executor", name, EXECUTORS)
    if name == "local":
        require(address is None and workers is None, "an address and workers belong to executor 'ray'; choose it")
        yield LocalExecutor()
        return
    with RayExecutor(address, workers) as executor:
        yield executor


class ScoreWorker:
    """What runs in a process of the cluster: it keeps the subject that it scored last."""

    def __init__(self, threads: int, gpu: bool):
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.gpu = gpu
        self.subject = self.reference = None

    def describe(self) -> dict[str, Any]:
        """Who and what this worker is."""
        return dict(node=platform.node(), pid=os.getpid(), threads=torch.get_num_threads(), code=code_digest())

    def score(self, reference: list, chunk: Sequence[Row]) -> Outcome:
        """The outcome of a chunk. reference: of the subject, in a list, for Ray would fetch a bare one every time."""
        if reference != self.reference:
            import ray

            self.subject = self.reference = None  # two subjects may not fit at once
            subject = ray.get(reference[0])
            if self.gpu:
                move_models(subject, torch.device("cuda"))
            self.subject, self.reference = subject, reference
        return score_chunk(self.subject, chunk)


def code_digest() -> str:
    """A hash of PyTorch's version and the source of this package: what must be equal on all nodes of a cluster."""
    digest = hashlib.sha256(torch.__version__.encode())
    folder = Path(physnb.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def move_models(subject: Subject, device: torch.device) -> None:
    """Move the networks and pipelines that a subject holds, alone or in a mapping, to a device."""
    for value in vars(subject).values():
        for part in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(part, nn.Module | DiffusionPipeline):
                part.to(device)


@dataclass(eq=False)
class Worker:
    """A ScoreWorker seen from here. chunks: the numbers of those it has, by the reference of their outcome, in order."""

    actor: Any
    hello: Any  # reference of its description
    started: bool = False
    chunks: dict[Any, int] = field(default_factory=dict)

    @property
    def next_reference(self) -> Any:
        """Of what it will answer next, or None."""
        return next(iter(self.chunks), None) if self.started else self.hello


class RayExecutor:
    """Chunks scored by the workers of a Ray cluster, each in a process of its own, on a GPU where nodes have some.

    address: HOST:PORT of the head of a running cluster, from one of its nodes, or ray://HOST:PORT from outside (which
    needs `ray[client]`). Without it, the Ray that this process is connected to, or a cluster started on this machine,
    of which nothing is left after `close`. workers: how many, by default as many as the cluster holds. threads: of each
    worker on the CPU, by default as many as PyTorch uses in this process.

    Scores are those of LocalExecutor to the bit given the same chunks (`batch_size`), number of threads, kind of device
    and of processor; how many workers there are, and which of them scored a chunk, decides nothing. All nodes must have
    the same physnb and PyTorch, which is checked.

    A worker that dies is replaced and what it had is scored again; a chunk that MOST_DEATHS workers died of is an error
    in its outcome. Raises ValueError where no cluster or no worker can be had, ConnectionError within HEAD_SECONDS or so
    where the head is lost in between.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, *, threads: int | None = None):
        require(workers is None or workers > 0, f"Ray workers must be at least 1, got {workers}")
        require(threads is None or threads > 0, f"threads of a Ray worker must be at least 1, got {threads}")
        self.threads = threads or torch.get_num_threads()
        self.workers: list[Worker] = []
        self.code = code_digest()
        self._run: Generator | None = None
        with ExitStack() as opened:
            self.ray, self.head = opened.enter_context(connect(address, self.threads * (workers or 0)))
            self.gpu = self.ray.cluster_resources().get("GPU", 0) >= 1
            self.needs = dict(num_gpus=1, num_cpus=1) if self.gpu else dict(num_cpus=self.threads)
            self.size = workers or self._room()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the cluster if it was started here. What was not scored yet is not."""
        if self._run is not None:
            self._run.close()
        for worker in list(self.workers):
            self._dismiss(worker)
        self._opened.close()

    def run(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Iterator[tuple[int, Outcome]]:
        """Number and outcome of every chunk, as they come; workers stay for the next run.

        An iterator that is closed or that another run replaces ends the workers that still score for it.
        """
        if self._run is not None:
            self._run.close()  # an interrupted run may still be held by a traceback
        self._run = self._score(subject, chunks)
        return self._run

    def _score(self, subject: Subject, chunks: Sequence[Sequence[Row]]) -> Generator[tuple[int, Outcome]]:
        reference = [self.ray.put(subject)]
        waiting, deaths, false_starts = deque(range(len(chunks))), Counter(), 0
        alive, staffed = time.monotonic(), time.monotonic()
        probed = 0.0
        try:
            while waiting or any(worker.chunks for worker in self.workers):
                self._hire(len(waiting) + sum(len(worker.chunks) > 0 for worker in self.workers))
                self._hand_out(waiting, reference, chunks)
                pending = {worker.next_reference: worker for worker in self.workers if worker.next_reference}
                ready, _ = self.ray.wait(list(pending), timeout=1.0)
                now = time.monotonic()
                if now - probed > PROBE_SECONDS:
                    probed, alive = now, now if listens(*self.head) is None else alive
                    ...
        finally:
            ...
