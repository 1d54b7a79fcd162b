"""Tiny real models and clips for every test.

Session fixtures are read-only: a test that changes a model makes its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from physnb.config import preset
from physnb.data import VOCABULARY, Clip, simulate
from physnb.model import VideoDiT

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives

NOBODY = 65534


@pytest.fixture(scope="session")
def make_model() -> Callable[..., VideoDiT]:
    """make_model(seed=0) is a new smoke-sized VideoDiT with random weights everywhere.

    As constructed, the gates and the output layer are zero and no head could matter.
    """

    def make(seed: int = 0, **sizes) -> VideoDiT:
        shape = asdict(preset("smoke").train.model) | sizes
        model = VideoDiT(**shape, vocabulary=VOCABULARY)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def model(make_model) -> VideoDiT:
    """A smoke-sized model that does something; shared, so never changed."""
    return make_model()


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory) -> Path:
    """The shared model saved as a checkpoint; shared, so never changed."""
    from physnb.checkpoint import save_model

    return save_model(model, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def cases() -> Clip:
    """Two clips of every scenario at the shared model's size."""
    return Clip.concatenate(
        [simulate(name, "id", range(2), frames=8, size=16) for name in ("uniform", "parabola", "collision")]
    )


@pytest.fixture
def inputs(model, cases) -> dict[str, torch.Tensor]:
    """Arguments of one forward of the shared model on `cases`, with mixed levels, start frames and captions."""
    from physnb.data import encode_captions

    generator = torch.Generator().manual_seed(1)
    clean = cases.pixels()
    given = torch.zeros(len(cases), clean.shape[2])
    given[:4, :3] = 1
    return dict(
        sample=torch.randn(clean.shape, generator=generator),
        sigma=torch.linspace(0.2, 1.0, len(cases)),
        start=clean,
        given=given,
        caption=encode_captions((*cases.captions[:5], "")),
    )


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder in which nothing can be written, with the process demoted to a user for whom that holds.

    Not below pytest's own folders: those are closed to other users as a whole, which is another error.
    """
    with tempfile.TemporaryDirectory(prefix="physnb-read-only-") as name:
        folder = Path(name)
        folder.chmod(0o555)
        was_root = os.geteuid() == 0
        try:
            if was_root:
                os.seteuid(NOBODY)
            yield folder
        finally:
            if was_root:
                os.seteuid(0)
            folder.chmod(0o755)


@pytest.fixture
def full_disk() -> Callable:
    """full_disk(limit) is a block in which no file of this process can grow past `limit` bytes."""
    import resource

    @contextmanager
    def limited(limit: int = 1000) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen]]:
    """start_python(*arguments) starts this interpreter with them; whatever still runs at the end is killed.

    The thread count is this process's own, because sums over other numbers of threads round differently.
    """
    started: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()
