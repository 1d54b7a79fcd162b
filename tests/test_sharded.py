"""Training with physnb/launch/sharded.yaml on two processes of the CPU, against the same training on one.

As a program, this file is what each of the two processes does.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import physnb
from physnb.config import preset
from physnb.optimizer import Muon
from physnb.sharding import gather
from physnb.store import read_tensors, write_json, write_tensors
from physnb.train import STATE_FILE, TrainState, make_batches, read_history, train, train_step

pytestmark = pytest.mark.slow  # three interpreters have to start

CONFIG = dataclasses.replace(preset("smoke").train, steps=6)
LAUNCH_FILE = Path(physnb.__file__).parent / "launch" / "sharded.yaml"
MATRICES = ((6, 10), (10, 6), (7, 5), (5, 7), (32, 64))  # an odd number of rows does not split evenly


def train_until(step: int, folder: Path) -> None:
    """Train from where the folder's state is, and log the size of the weights that are sampled."""

    def on_sample(model, step, folder):
        return {"size": float(sum(value.abs().sum() for value in model.state_dict().values()))}

    resume = (folder / STATE_FILE).exists()
    train(CONFIG, folder, resume=resume, stop_after=step, sample_every=2, on_sample=on_sample, progress=False)


def load_and_save(source: Path, target: Path) -> tuple[TrainState, float]:
    """Load a state, save it and take a step; the state, and the gradient norm of the step."""
    accelerator = Accelerator(cpu=True)
    state = TrainState(CONFIG)
    model, optimizers = state.prepare(accelerator)
    state.load(source)
    state.save(target, write=accelerator.is_main_process)
    rows = CONFIG.batch // accelerator.num_processes
    batch = next(make_batches(CONFIG, state.step, accelerator.process_index, rows))
    return state, train_step(accelerator, model, optimizers, CONFIG, batch)[1]


def move_matrices(cut: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of several shapes after three steps of Muon; weights and gradients are first passed through `cut`."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(cut(torch.randn(shape, generator=generator))) for shape in MATRICES]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = cut(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return {str(tuple(parameter.shape)): gather(parameter.detach()) for parameter in parameters}


# --- what each of two processes does


def shard_next(**settings: str) -> None:
    """Have the next Accelerator shard, with some of the launcher's settings changed.

    accelerate shards over devices other than CPUs only; so it is told that these processes have some.
    """
    os.environ.update(settings)
    AcceleratorState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run_sharded(folder: Path) -> None:
    """Write what the tests look at into a folder that holds `whole`, a run that one process stopped after 3 steps."""
    shard_next()
    main = PartialState().is_main_process
    train_until(3, folder / "sharded")
    if main:
        shutil.copytree(folder / "sharded", folder / "sharded-3")
        shutil.copytree(folder / "whole", folder / "continued")
    shard_next(FSDP_ACTIVATION_CHECKPOINTING="true")
    train_until(6, folder / "sharded")

    shard_next(FSDP_ACTIVATION_CHECKPOINTING="false")
    train_until(6, folder / "continued")
    state, norm = load_and_save(folder / "whole" / STATE_FILE, folder / "again.safetensors")
    tensors = [value for _, value in state.tensors() if value.ndim > 0]
    local = sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in tensors)
    share = local / sum(value.numel() for value in tensors)
    mesh = tensors[0].device_mesh
    moved = move_matrices(lambda matrix: distribute_tensor(matrix, mesh, [Shard(0)]))

    shard_next(ACCELERATE_MIXED_PRECISION="bf16")
    train_until(6, folder / "bf16")
    shard_next(FSDP_VERSION="1", FSDP_RESHARD_AFTER_FORWARD="FULL_SHARD", FSDP_SYNC_MODULE_STATES="false")
    with pytest.raises(ValueError, match="weights are sharded by FSDP2 alone; set fsdp_version to 2"):
        train_until(1, folder / "version-1")
    if main:
        write_tensors(folder / "moved.safetensors", moved, {})
        write_json(folder / "report.json", dict(share=share, norm=norm))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_sharded(Path(sys.argv[1]))


# --- the tests


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, all of the same training: `whole` by this process, the others by two that share the weights."""
    folder = tmp_path_factory.mktemp("runs")
    train_until(3, folder / "whole")
    shutil.copytree(folder / "whole", folder / "whole-3")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILE)]
    launch += ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0", __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    train_until(6, folder / "whole")
    return folder


@pytest.fixture(scope="module")
def report(runs) -> dict[str, float]:
    return json.loads((runs / "report.json").read_text())


def assert_close_states(one: Path, other: Path) -> None:
    (one, _), (other, _) = read_tensors(one), read_tensors(other)
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max() < 1e-4, name


def assert_same_states(one: Path, other: Path) -> None:
    (one, about_one), (other, about_other) = read_tensors(one), read_tensors(other)
    assert one.keys() == other.keys() and about_one == about_other
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_process_holds_half_of_weights_average_and_moments(report):
    assert report["share"] == pytest.approx(0.5, abs=0.01)


def test_sharded_training_equals_that_of_one_process(runs):
    one, two = (read_history(runs / name)["loss"] for name in ("whole", "sharded"))
    assert one[0] == two[0] == [1, 2, 3, 4, 5, 6]
    assert two[1] == pytest.approx(one[1], abs=1e-4, rel=0)
    assert_close_states(runs / "whole-3" / STATE_FILE, runs / "sharded-3" / STATE_FILE)
    assert_close_states(runs / "whole" / STATE_FILE, runs / "sharded" / STATE_FILE)  # resumed, blocks checkpointed


def test_gradient_norm_is_that_of_all_shards(runs, report, tmp_path):
    _, norm = load_and_save(runs / "whole-3" / STATE_FILE, tmp_path / "again.safetensors")
    assert report["norm"] == pytest.approx(norm, rel=1e-4)


def test_sampled_model_is_whole(runs):
    one, two = (read_history(runs / name)["size"] for name in ("whole", "sharded"))
    assert one[0] == two[0] == [2, 4, 6]
    assert two[1] == pytest.approx(one[1], rel=1e-4)


def test_state_saved_sharded_goes_on_whole(runs, tmp_path):
    load_and_save(runs / "sharded-3" / STATE_FILE, tmp_path / "again.safetensors")
    assert_same_states(runs / "sharded-3" / STATE_FILE, tmp_path / "again.safetensors")
    train_until(6, shutil.copytree(runs / "sharded-3", tmp_path / "run"))
    assert_close_states(runs / "whole" / STATE_FILE, tmp_path / "run" / STATE_FILE)


def test_state_saved_whole_goes_on_sharded(runs):
    assert_same_states(runs / "whole-3" / STATE_FILE, runs / "again.safetensors")
    assert_close_states(runs / "whole" / STATE_FILE, runs / "continued" / STATE_FILE)


def test_muon_moves_shards_as_it_moves_the_whole(runs):
    sharded, _ = read_tensors(runs / "moved.safetensors")
    for name, value in move_matrices(lambda matrix: matrix).items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-6, msg=name)


def test_bfloat16_training_is_near_and_keeps_its_state_in_float32(runs):
    one, two = (read_history(runs / name)["loss"][1] for name in ("whole", "bf16"))
    assert two == pytest.approx(one, rel=0.02) and two != one
    assert {value.dtype for value in read_tensors(runs / "bf16" / STATE_FILE)[0].values()} == {torch.float32}
