"""Clips that break a law of whatever they show, of the worlds, a phenomenon or a fluid, by the same call."""

from __future__ import annotations

from physnb.config import FLUIDS, PHENOMENA, SIMULATED, choose
from physnb.data import impossible, unlawful, unlawful_fluids
from physnb.data.clips import Clip
from physnb.data.impossible import Variants


def kinds_for(scenario: str) -> tuple[str, ...]:
    """The ways in which clips of a scenario can break its law; raises ValueError for one that is not simulated."""
    choose("scenario", scenario, (*SIMULATED, *FLUIDS))
    if scenario in FLUIDS:
        return unlawful_fluids.UNLAWFUL
    return tuple(unlawful.KINDS) if scenario in PHENOMENA else impossible.kinds_for(scenario)


def make_impossible(clip: Clip, kind: str, *, frames_given: int = 3, seed: int = 0) -> Variants:
    """Each clip with a law broken after its start frames; clips of a phenomenon have to come by themselves.

    Raises what `impossible.make_impossible`, `unlawful.make_unlawful` or `unlawful_fluids.make_unlawful_fluid` do.
    """
    makes = impossible.make_impossible
    if set(clip.scenarios) & set(PHENOMENA):
        makes = unlawful.make_unlawful
    elif set(clip.scenarios) & set(FLUIDS):
        makes = unlawful_fluids.make_unlawful_fluid
    return makes(clip, kind, frames_given=frames_given, seed=seed)
