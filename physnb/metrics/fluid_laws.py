"""Whether smoke and flames obey their laws, from frames alone: what pixels show is read back as density.

A clip's parameters say how much density its inlet lets in and how fast it is lost; both are exact in the solver, so a
true clip has no more residual than 8 bits of colour leave. Read every value beside that of the true clips.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from physnb.config import choose, require
from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE, Clip
from physnb.data.fluids import SETTINGS, inlet_rate, parameter_columns, pixel_weights, simulate_fluid, time_of_gain
from physnb.data.unlawful_fluids import UNLAWFUL, make_unlawful_fluid
from physnb.metrics.scores import Scores, scores
from physnb.metrics.trajectory import check_match

REACH = 1.2  # world units that the fastest flow of the phenomena goes in a frame
UNITS = {"fluid_budget": "inflow of a frame", "fluid_transport": "inflow of a frame", "fluid_rise": "units/s"}
DARKEST = 0.5 / 255  # share of a pixel left uncovered that counts as none
NO_FLUID = "neither smoke nor a flame"


def read_density(
    frames: UInt8[Tensor, "*batch height width 3"], phenomenon: str
) -> Float[Tensor, "*batch height width"]:
    """The density that every pixel shows, in float64: the inverse of `physnb.data.fluids.draw_density`.

    A colour that is not in the palette is read as the one with the same sum of weighted channels, and a pixel that is
    covered all over as one covered but for DARKEST. Raises ValueError for a phenomenon that is no fluid.
    """
    fluid = SETTINGS[choose("fluid", phenomenon, SETTINGS)]
    shares, colours = (np.array(part) for part in zip(*fluid.palette, strict=True))
    seen = frames.numpy() / 255 @ np.array(fluid.weights)
    covered = np.interp(-seen, -(colours @ fluid.weights), shares)
    return torch.from_numpy(-np.log(np.maximum(1 - covered, DARKEST)) / fluid.opacity)


def metric_fluid_law(generated: Clip, true: Clip, *, frames_given: int = 3) -> dict[str, Scores]:
    """Residuals of each clip of smoke or a flame by name, better when lower; means over steps between frames.

    M is the total density, k the cooling, dt = 0.1 s, I what the inlet lets in during a step and cooling leaves of it,
    and H the sum of density times height. The first two are in shares of the clip's mean I.
    fluid_budget: |M' - exp(-k dt) M - I|. Nothing leaves the box, so this is 0 by law.
    fluid_transport: density above the largest within REACH a frame before, cooled, plus the most that the inlet can
        have added there. A flow without divergence carries density and never gathers it, so this is 0 by law.
    fluid_rise (units/s): difference between generated and true (H' - exp(-k dt) H) / dt, over the true M: how far off
        the fluid's mean velocity upwards is. 0 for the true motion, not for every lawful one.
    At 32 pixels true clips have up to 0.03 of the first in smoke and 0.02 in flames, and below 0.001 of the second; a
    start that differs by 2 % in its draught costs 0.01 to 0.05 of the third.
    Judged are steps from the last start frame on; NaN for clips that show neither.
    Raises ValueError for clips that do not match, of another frame rate, without parameters or without a step to judge.
    Leaves out momentum, swirls, looks, and sideways motion within REACH a frame.
    """
    time, height, width = true.frames.shape[1:4]
    check_match(generated, true, "fluids")
    require(height == width > 0, f"frames of fluids are square, got {width} x {height}")
    require(1 <= frames_given < time, f"frames given must be in [1, {time - 1}] to judge a step, got {frames_given}")
    values = {name: torch.full((len(true),), torch.nan) for name in UNITS}
    for row, scenario in enumerate(true.scenarios):
        if scenario not in SETTINGS:
            continue
        column = parameter_columns(true.parameters[row : row + 1])
        step = SETTINGS[scenario].warm_up + torch.arange(frames_given, time).double()[:, None, None]
        inlet = inlet_rate(column, step)
        seen, lawful = (read_density(clip.frames[row, frames_given - 1 :], scenario) for clip in (generated, true))
        share = (column["inflow"] * time_of_gain(column["cooling"], FRAME_STEP_S)).squeeze()
        values["fluid_budget"][row] = budget_residual(seen, inlet, column["cooling"]).mean() / share
        values["fluid_transport"][row] = transport_residual(seen, inlet, column["cooling"]).mean() / share
        off = upward_flow(seen, column["cooling"]) - upward_flow(lawful, column["cooling"])
        values["fluid_rise"][row] = (off.abs() / total_density(lawful)[1:].clamp(min=1e-9)).mean()
    return {name: scores(name, unit, values[name], NO_FLUID) for name, unit in UNITS.items()}


def total_density(density: Float[Tensor, "time size size"]) -> Float[Tensor, " time"]:
    """Density times area, summed over the box."""
    return density.sum((1, 2)) * (WORLD_SIZE / density.shape[-1]) ** 2


def budget_residual(
    density: Float[Tensor, "time size size"], inlet: Float[Tensor, "step x y"], cooling: Float[Tensor, "1 1 1"]
) -> Float[Tensor, " step"]:
    """Difference between the gain of total density in every step and what the inlet and cooling give."""
    total, inflow = total_density(density), total_density(inlet) * time_of_gain(cooling, FRAME_STEP_S).squeeze()
    return (total[1:] - torch.exp(-cooling * FRAME_STEP_S).squeeze() * total[:-1] - inflow).abs()


def transport_residual(
    density: Float[Tensor, "time size size"], inlet: Float[Tensor, "step x y"], cooling: Float[Tensor, "1 1 1"]
) -> Float[Tensor, " step"]:
    """Density of every step above what can have come where it is."""
    size, gain_s = density.shape[-1], time_of_gain(cooling, FRAME_STEP_S)
    weights = torch.from_numpy(pixel_weights(size))
    added = (weights @ inlet @ weights.T).transpose(1, 2).flip(1) * gain_s
    reach = int(-(-REACH * size // WORLD_SIZE))  # pixels, rounded up

    def largest(field: Tensor) -> Tensor:
        return F.max_pool2d(field[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]

    bound = largest(density[:-1]) * torch.exp(-cooling * FRAME_STEP_S) + largest(added)
    return total_density((density[1:] - bound).clamp(min=0))


def upward_flow(density: Float[Tensor, "time size size"], cooling: Float[Tensor, "1 1 1"]) -> Float[Tensor, " step"]:
    """How fast density times height grows in every step but for cooling, in units of density times units^3/s."""
    size = density.shape[-1]
    height = WORLD_SIZE - (torch.arange(size).double() + 0.5) / size * WORLD_SIZE
    moment = total_density(density * height[:, None])
    return (moment[1:] - torch.exp(-cooling * FRAME_STEP_S).squeeze() * moment[:-1]) / FRAME_STEP_S


def fluid_law_table(phenomenon: str, *, clips: int, frames: int = 16, size: int = 32) -> list[dict]:
    """One row for true clips of a fluid and one a kind of variant: the mean of every residual of `metric_fluid_law`."""
    true = simulate_fluid(phenomenon, "train", range(clips), frames=frames, size=size)
    rows = []
    for kind in ("lawful", *UNLAWFUL):
        shown, judged = true, list(range(clips))
        if kind != "lawful":
            variants = make_unlawful_fluid(true, kind)
            shown, judged = variants.clip, [i for i, reason in enumerate(variants.reasons) if reason is None]
        found = metric_fluid_law(shown[judged], true[judged])
        rows.append(dict(scenario=phenomenon, clips=kind) | {n: float(s.values.nanmean()) for n, s in found.items()})
    return rows
