"""Tensors cut over processes (DTensor), which FSDP2 makes of weights; a whole tensor goes through as it is."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor; its parts come together in every process, so all that hold one must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, on the device of `like` and cut as `like` is; a scalar stays whole.

    Needs no communication: each process keeps its part.
    """
    if isinstance(like, DTensor) and tensor.ndim > 0:
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)
