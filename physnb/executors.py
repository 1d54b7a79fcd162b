"""Where trials run: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from physnb.config import EXECUTORS, choose
from physnb.trials import Executor, LocalExecutor


@contextmanager
def executor_named(name: str, *, address: str | None = None, workers: int | None = None) -> Iterator[Executor]:
    """The executor called `name`, closed after the block. address, workers: of "ray", see `RayExecutor`."""
    choose("executor", name, EXECUTORS)
    if name == "local":
        yield LocalExecutor()
        return
    raise NotImplementedError
