"""Memory: what the C library does with freed tensors, how much work needs, how much there is."""

import ctypes
import sys
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensors instead of returning them to the system: a quarter off a CPU training step.

    Without it every activation of a few MB is mapped and page-faulted anew. Elsewhere than on Linux it does nothing.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((-8, 1), (-3, 1 << 25), (-1, 1 << 30)):  # one arena; map only huge; never trim
                libc.mallopt(option, value)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made inside the block that were alive at once, on a CPU, which keeps no count itself.

    Scratch memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.see((args, kwargs), made_here=False)  # an operation may return a view of what was there before
        output = function(*args, **(kwargs or {}))
        self.see(output, made_here=True)
        self.peak = max(self.peak, self.live)
        return output

    def see(self, values: Any, made_here: bool) -> None:
        """Take account of the tensors among `values` whose memory was not seen before."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                size = storage.nbytes() if made_here else 0
                self.known.add(storage._cdata)
                self.live += size
                weakref.finalize(storage, self.freed, storage._cdata, size)

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of `work` above what was there before, the weights for example."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as meter:
        work()
    return meter.peak


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a device's tensors lie."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
