"""How a training went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from physnb.config import require
from physnb.plots.style import PALETTE, new_figure


def plot_training(history: dict[str, tuple[Sequence[int], Sequence[float]]], window: int = 20) -> Figure:
    """Training loss over steps on a log scale, single steps and their running mean."""
    steps, losses = (np.asarray(column) for column in history["loss"])
    require(len(steps) > 0, "the training log holds no loss yet")
    figure, axes = new_figure(7, 3)
    axis = axes[0, 0]
    axis.plot(steps, losses, color=PALETTE[7], alpha=0.4, linewidth=0.7, label="every step")
    width = min(window, len(losses))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axis.plot(steps[width - 1 :], smooth, color=PALETTE[0], label=f"mean of {width}")
    axis.set(xlabel="step", ylabel="velocity loss", yscale="log")
    axis.legend(frameon=False)
    return figure
