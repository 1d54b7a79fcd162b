"""Muon (Jordan et al. 2024): steps along the orthogonal factor of the momentum, for the matrices inside a network.

torch.optim.Muon iterates in bfloat16, one matrix after another; a processor without bfloat16 arithmetic spends more on
that than on the network itself. Here matrices of one shape go through one batched float32 iteration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from physnb.sharding import gather, shard_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of x -> a x + b x^3 + c x^5: steep at 0, singular values near 1
ITERATIONS = 5
MATCHED_RMS = 0.2  # of an update's entries at learning rate 1: that of AdamW's (Liu et al. 2025, eq. 4)


def orthogonal_factor(matrices: Float[Tensor, "matrix row column"]) -> Float[Tensor, "matrix row column"]:
    """U V^T of each U S V^T, to within the iteration: singular values come out between about 0.7 and 1.2.

    Rows must not outnumber columns: the iteration multiplies by the smaller square.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, scaled by 0.2 sqrt(longer side); weight decay is decoupled.

    Takes two-dimensional parameters only; a step leaves out those without a gradient.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon moves matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Move every parameter that has a gradient; a closure, which torch's interface allows for, is not called."""
        for group in self.param_groups:
            of_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = torch.lerp(parameter.grad, momentum, group["momentum"])
                wide = (parameter, ahead) if ahead.shape[0] <= ahead.shape[1] else (parameter.T, ahead.T)
                of_shape[wide[1].shape].append(wide)
            for shape, pairs in of_shape.items():
                # The factor of a shard is not a shard of the factor.
                updates = orthogonal_factor(gather(torch.stack([ahead for _, ahead in pairs])))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(shard_like(update, parameter), alpha=-group["lr"] * MATCHED_RMS * max(shape) ** 0.5)
