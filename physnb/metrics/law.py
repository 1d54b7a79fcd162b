"""How much of what moves a law leaves unexplained: of the true motion, or of discs found in generated frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import SIMULATED, choose, require
from physnb.data import FRAME_STEP_S, Clip, DiscState, simulate
from physnb.data.laws import LAWS, Motion
from physnb.data.variants import kinds_for, make_impossible
from physnb.metrics.scores import Scores, scores
from physnb.metrics.trajectory import PRESENT_AREA, check_pair, parse_discs


def predict_frames(
    scenario: str,
    parameters: Sequence[Mapping[str, float]],
    positions: Float[Tensor, "batch time disc axis"],
    velocities: Float[Tensor, "batch time disc axis"],
) -> tuple[Float[Tensor, "batch time disc axis"], Float[Tensor, "batch time disc axis"]]:
    """Where the scenario's law puts each disc a frame later, and how fast, from every frame by itself."""
    batch, time = positions.shape[:2]
    p = {name: np.repeat([row[name] for row in parameters], time) for name in parameters[0]}
    now = Motion(*(part.double().numpy().reshape(batch * time, *part.shape[2:]) for part in (positions, velocities)))
    with np.errstate(invalid="ignore"):  # absent discs are NaN
        later = LAWS[scenario](now, p, FRAME_STEP_S)
    return tuple(torch.from_numpy(part).view(batch, time, *part.shape[1:]) for part in later)


def state_residual(
    scenario: str, parameters: Sequence[Mapping[str, float]], state: DiscState
) -> Float[Tensor, "batch frame"]:
    """What the law leaves unexplained of each step of a true motion, in units/s, the worst disc; NaN where one is gone.

    |x' - x_law| / 0.1 s + |v' - v_law|, with x_law and v_law a frame after x and v by the law. Of a lawful motion it is
    at the rounding of float32 states: below 1e-4.
    """
    choose("scenario", scenario, SIMULATED)
    position, velocity = predict_frames(scenario, parameters, state.positions[:, :-1], state.velocities[:, :-1])
    off = (state.positions[:, 1:] - position).norm(dim=-1) / FRAME_STEP_S
    off = off + (state.velocities[:, 1:] - velocity).norm(dim=-1)
    absent = state.radii.isnan()[:, None]
    return torch.where(absent, 0.0, off).amax(-1)  # amax keeps NaN


def metric_law(generated: Clip, true: Clip, *, frames_given: int = 3) -> dict[str, Scores]:
    """`law_residual` of each clip, in units/s, better when lower: what its scenario's law leaves unexplained a frame.

    |x' - x_law| / 0.1 s, mean over steps: x_law is a frame after x by the law with the true clip's parameters, from the
    velocity between the frames before and after. So a disc on another lawful path has no residual: this asks whether
    the motion is lawful, not whether it is the true one. Read it beside the value of the true clips, the floor: reading
    discs off 32-pixel frames and differences over two of them cost 0.04 to 0.1 units/s, in clips with impacts 0.3.
    Judged are steps from the last start frame on with the disc seen in all three frames and the true one wholly inside.
    Raises ValueError for clips that do not match, or of no simulator.
    Leaves out looks, and everything about discs that are not seen: read `missing_rate` beside it.
    """
    state = check_pair(generated, true, frames_given)
    for scenario in sorted(set(true.scenarios)):
        choose("scenario with a law", scenario, SIMULATED)
    require(all(true.parameters), "a law needs the clips' parameters; take the true clips from a simulator")
    parsed = parse_discs(generated.frames)
    seen = (parsed.areas >= PRESENT_AREA * torch.pi * state.radii[:, None] ** 2) & state.inside
    use = seen[:, :-2] & seen[:, 1:-1] & seen[:, 2:]
    use[:, : max(frames_given - 2, 0)] = False
    x = torch.where(seen[..., None], parsed.positions, torch.nan)
    velocity = (x[:, 2:] - x[:, :-2]) / (2 * FRAME_STEP_S)
    off = torch.zeros(use.shape)
    for scenario in dict.fromkeys(true.scenarios):
        rows = [i for i, name in enumerate(true.scenarios) if name == scenario]
        parameters = [true.parameters[row] for row in rows]
        later, _ = predict_frames(scenario, parameters, x[rows, 1:-1], velocity[rows])
        off[rows] = ((x[rows, 2:] - later).norm(dim=-1) / FRAME_STEP_S).float()
    values = torch.where(use, off, 0.0).sum((1, 2)) / use.sum((1, 2))
    return {"law_residual": scores("law_residual", "units/s", values, "no disc is seen in three frames in a row")}


def law_table(scenarios: Iterable[str], *, clips: int, frames: int = 16, size: int = 32, seed: int = 0) -> list[dict]:
    """One row a scenario: `state_residual` of true clips and of variants that break the law, and `metric_law`'s floor.

    lawful: the largest of any step of a true clip. unlawful: over all variants that move otherwise, the smallest of the
    largest step of each. floor: the mean of `metric_law` on the true clips, read off their pixels. All in units/s.
    """
    rows = []
    for scenario in scenarios:
        true = simulate(scenario, "id", range(clips), frames=frames, size=size, seed=seed)
        broken = []
        for kind in kinds_for(scenario):
            if kind in ("radius_change", "vanish"):  # a law of discs, not of motion
                continue
            found = make_impossible(true, kind, seed=seed)
            judged = [row for row, reason in enumerate(found.reasons) if reason is None]
            parameters = [true.parameters[row] for row in judged]
            if judged:
                broken.append(state_residual(scenario, parameters, found.clip.state[judged]).amax(1).min())
        floor = metric_law(true, true)["law_residual"].values.nanmean()
        lawful = state_residual(scenario, true.parameters, true.state).max()
        rows.append(dict(scenario=scenario, lawful=float(lawful), unlawful=float(min(broken)), floor=float(floor)))
    return rows
