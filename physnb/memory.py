"""What the C library does with freed tensors."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensors instead of returning them to the system: a quarter off a CPU training step.

    Without it every activation of a few MB is mapped and page-faulted anew. Elsewhere than on Linux it does nothing.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((-8, 1), (-3, 1 << 25), (-1, 1 << 30)):  # one arena; map only huge; never trim
                libc.mallopt(option, value)
