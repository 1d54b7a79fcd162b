"""Phenomena that break their law: only after the start frames, visibly, and seen by the law's residual."""

from dataclasses import replace

import pytest
import torch

from physnb.config import PHENOMENA
from physnb.data import Clip, simulate
from physnb.data.unlawful import KINDS, make_unlawful
from physnb.data.variants import kinds_for, make_impossible
from physnb.metrics.law import metric_law, state_residual

TRUE = {name: simulate(name, "id", range(12), frames=16, size=32) for name in PHENOMENA}
each = pytest.mark.parametrize("scenario", PHENOMENA)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_variants_break_the_law_after_the_start_frames(scenario, kind):
    true = TRUE[scenario]
    found = make_unlawful(true, kind, frames_given=3)
    judged = [row for row, reason in enumerate(found.reasons) if reason is None]
    assert len(judged) >= 4
    assert torch.equal(found.clip.frames[:, :3], true.frames[:, :3])
    assert (found.clip.frames[judged] != true.frames[judged]).flatten(1).any(1).all()
    if kind == "radius_change":  # the disc's law, not the motion's
        assert (found.clip.state.radii[judged] != true.state.radii[judged]).any(1).all()
        return
    parameters = [true.parameters[row] for row in judged]
    residual = state_residual(scenario, parameters, found.clip.state[judged])
    assert (residual.isnan() | (residual > 0.05)).any(1).all()


@each
def test_metric_sees_teleports_above_its_floor(scenario):
    true = TRUE[scenario]
    found = make_unlawful(true, "teleport")
    judged = [row for row, reason in enumerate(found.reasons) if reason is None]
    floor, seen = (metric_law(clip, true)["law_residual"].values[judged] for clip in (true, found.clip))
    assert (seen > floor + 0.3).all()


def test_unshown_rows_hold_the_clip_and_say_why():
    slow = simulate("wave", "ood", range(12), frames=16, size=32)
    found = make_unlawful(slow, "energy_gain")
    rows = [row for row, reason in enumerate(found.reasons) if reason is not None]
    assert rows and torch.equal(found.clip.frames[rows], slow.frames[rows])
    assert found.area_ratio[rows].isnan().all()


def test_variants_are_functions_of_the_index():
    whole = make_unlawful(TRUE["orbit"], "reversal", seed=3)
    alone = make_unlawful(TRUE["orbit"][5:6], "reversal", seed=3)
    assert torch.equal(whole.clip.frames[5], alone.clip.frames[0])


def test_impossible_clips_of_phenomena_come_by_the_same_call():
    assert kinds_for("orbit") == tuple(KINDS)
    found = make_impossible(TRUE["orbit"], "reversal", seed=3)
    assert torch.equal(found.clip.frames, make_unlawful(TRUE["orbit"], "reversal", seed=3).clip.frames)


def test_bad_input_is_named():
    both = Clip.concatenate([TRUE["orbit"], TRUE["wave"]])
    with pytest.raises(ValueError, match="one phenomenon at a time, got orbit, wave"):
        make_unlawful(both, "teleport")
    with pytest.raises(ValueError, match="unknown kind 'melt'"):
        make_unlawful(TRUE["orbit"], "melt")
    with pytest.raises(ValueError, match="unknown phenomenon 'uniform'"):
        make_unlawful(simulate("uniform", "id", [0], frames=16, size=32), "teleport")
    with pytest.raises(ValueError, match="must show its own state"):
        make_unlawful(replace(TRUE["orbit"], frames=255 - TRUE["orbit"].frames), "teleport")
