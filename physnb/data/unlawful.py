"""Clips of phenomena that break their law after the start frames: what `physnb.data.impossible` does for the worlds.

A variant goes on by the clip's own law where it can, from a velocity that the law did not give, and its scenery follows
the disc: rods and springs stay attached. The edit, its moment and its disc are drawn by (seed, scenario, kind, index).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from physnb.config import PHENOMENA, choose, require
from physnb.data.clips import FRAME_STEP_S, Clip, DiscState
from physnb.data.impossible import (
    JUMPS,
    RESIZE,
    Break,
    Edit,
    Variants,
    make_variants,
    pick_way,
    radius_change,
    teleport,
    time_reversal,
    vanish,
    ways_to_break,
)
from physnb.data.laws import LAWS, Law, Motion, Parameters, uniform
from physnb.data.scenery import render_scene


def go_on(b: Break, law: Law, parameters: Parameters, factor: torch.Tensor) -> DiscState:
    """The motion whose velocity is multiplied at the moment, by `factor` a row, and that follows `law` from there."""
    positions, velocities = (a.double().numpy().copy() for a in (b.state.positions, b.state.velocities))
    last = b.first.numpy() - 1  # the last unchanged frame
    rows = np.arange(len(last))
    velocities[rows, last] *= factor.numpy()[:, None, None]
    for frame in range(1, positions.shape[1]):
        following = law(Motion(positions[:, frame - 1], velocities[:, frame - 1]), parameters, FRAME_STEP_S)
        changed = last < frame
        positions[changed, frame], velocities[changed, frame] = (part[changed] for part in following)
    return b.change(torch.from_numpy(positions), torch.from_numpy(velocities))


def reversal(b: Break, law: Law, parameters: Parameters) -> DiscState:
    """The discs turn back by themselves."""
    return go_on(b, law, parameters, -torch.ones(len(b.moment)))


def energy_gain(b: Break, law: Law, parameters: Parameters) -> DiscState:
    """All speeds grow by the option."""
    return go_on(b, law, parameters, b.option[:, 0])


def law_off(b: Break, law: Law, parameters: Parameters) -> DiscState:
    """The discs go on in straight lines, as if nothing pulled, held or stopped them."""
    return go_on(b, uniform, parameters, torch.ones(len(b.moment)))


Change = Callable[[Break, Law, Parameters], DiscState]


@dataclass(frozen=True)
class Kind:
    """How a law is broken, and the options and moments to choose from, as `impossible.Kind` has them."""

    change: Change
    options: tuple[tuple[float, ...], ...] = ((),)
    moment: str = "any"


def _without_law(edit: Callable[[Break], DiscState]) -> Change:
    return lambda b, law, parameters: edit(b)


KINDS = {
    "teleport": Kind(_without_law(teleport), JUMPS),
    "reversal": Kind(reversal),
    "energy_gain": Kind(energy_gain, ((2.0,), (2.5,))),
    "law_off": Kind(law_off),
    "time_reversal": Kind(_without_law(time_reversal), moment="first"),
    "radius_change": Kind(_without_law(radius_change), tuple(product((0, 1), (RESIZE, 1 / RESIZE)))),
    "vanish": Kind(_without_law(vanish), ((0,), (1,))),
}


def make_unlawful(clip: Clip, kind: str, *, frames_given: int = 3, seed: int = 0) -> Variants:
    """Each clip of one phenomenon with its first `frames_given` frames as they are and its law broken later.

    A row in which nothing would show, or that the box cannot hold, is not judged, and says so. A floating disc that
    stands still when the waves turn is an example.
    Raises ValueError for clips of several scenarios or of none of the phenomena, an unknown kind, clips without a true
    state or not drawn from it, and start frames that leave fewer than 2 to break.
    """
    require(len(clip) > 0, "there is no clip to break a law in")
    choose("kind", kind, KINDS)
    require(
        len(set(clip.scenarios)) == 1, f"break one phenomenon at a time, got {', '.join(sorted(set(clip.scenarios)))}"
    )
    scenario = choose("phenomenon", clip.scenarios[0], PHENOMENA)
    known = dict(zip(clip.indices.tolist(), clip.parameters, strict=True))

    def edit(state: DiscState, scenario: str, index: int) -> Edit:
        ways = ways_to_break(state, KINDS[kind], scenario, frames_given)
        parameters = {name: np.full(len(ways.moment), value) for name, value in known[index].items()}
        return pick_way(ways, KINDS[kind].change(ways, LAWS[scenario], parameters), f"{kind}/{scenario}/{index}", seed)

    def scene(state: DiscState) -> torch.Tensor:
        return render_scene(scenario, clip.parameters, state, clip.frames.shape[2])

    return make_variants(clip, kind, edit, frames_given, scene)
