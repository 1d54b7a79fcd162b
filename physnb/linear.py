"""Linear layers by oneDNN, which takes a processor's widest vectors whoever made it; torch's own products may not.

With torch's wheels on an AMD processor with AVX-512 they are 2.4 times as fast, to the rounding of float32, and a row's
numbers do not depend on how many others there are. PHYSNB_ONEDNN=0 in the environment leaves all to torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_enabled = (
    os.environ.get("PHYSNB_ONEDNN", "1") != "0"
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(
    x: Float[Tensor, "*batch channel"], weight: Float[Tensor, "feature channel"], bias: Tensor | None = None
) -> Float[Tensor, "*batch feature"]:
    """x W^T + b by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@contextmanager
def by_torch() -> Iterator[None]:
    """Inside, linear layers are torch's own: for comparisons."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            product(gradient, weight.T) if of_input else None,
            product(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can do it: plain float32 rows on a CPU, outside of autocast."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return _enabled and plain and float32 and x.ndim > 1 and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """nn.Linear with a bias, by oneDNN where that can be done, else by torch."""

    def forward(self, x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch feature"]:
        if not takes(x, self.weight):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)
