import resource
import sys

import psutil
import pytest
import torch

from physnb.memory import PeakMemory, free_bytes, keep_freed_memory, peak_bytes

CPU = torch.device("cpu")


def test_peak_memory_counts_what_is_alive_at_once():
    with PeakMemory() as meter:
        a = torch.ones(1000)  # 4,000 bytes
        a.view(10, 100).add_(1)  # no new memory
        b = a + 1
        del a
        b = b * 2  # three tensors were made, two of them alive at once
    assert meter.peak == 8000 and b.sum() == 6000


def test_what_was_there_before_is_not_counted():
    layer, values = torch.nn.Linear(1000, 500).requires_grad_(False), torch.ones(1, 1000)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert peak_bytes(lambda: layer(values), CPU) == 500 * 4  # the layer transposes its weights: a view of them
    assert peak_bytes(lambda: values.add_(1), CPU) == 0
    assert peak_bytes(lambda: values[:, :10].flatten(), CPU) == 0
    assert peak_bytes(lambda: values[:, :10] + 1, CPU) == 40


def test_what_is_kept_adds_up_and_what_is_dropped_does_not():
    kept = peak_bytes(lambda: [torch.zeros(1000) for _ in range(5)], CPU)
    dropped = peak_bytes(lambda: [float(torch.zeros(1000).sum()) for _ in range(5)], CPU)
    assert kept == 20_000 and 4000 <= dropped < 4100


def test_peak_grows_with_the_batch(model, inputs):
    def forward(rows):
        part = {name: value[:rows] for name, value in inputs.items()}
        with torch.inference_mode():
            return peak_bytes(lambda: model(**part), CPU)

    one, two, six = map(forward, (1, 2, 6))
    assert six - two == pytest.approx(4 * (two - one), rel=0.05)


def test_an_exception_leaves_no_meter_behind():
    def fails():
        torch.zeros(10)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        peak_bytes(fails, CPU)
    with PeakMemory() as meter:
        pass
    torch.zeros(10)
    assert meter.peak == 0


def test_free_memory_is_part_of_what_there_is():
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to keep memory")
def test_kept_memory_serves_the_next_tensors_without_page_faults():
    def faults(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            [torch.ones(1 << 22) for _ in range(4)]  # 64 MB in all, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    faults(2)
    assert faults(5) < 0.5 * 5 * (64 << 20) / resource.getpagesize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_on_a_gpu_leaves_out_what_was_there():
    device = torch.device("cuda")
    before = torch.zeros(1 << 20, device=device)
    assert peak_bytes(lambda: before + 1, device) == pytest.approx(4 << 20, rel=0.01)
    assert 0 < free_bytes(device) < torch.cuda.mem_get_info(device)[1]
