from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from physnb.data import Clip, simulate
from physnb.metrics.features import Trajectory
from physnb.metrics.frechet import (
    MINIMUM_CLIPS,
    SetScore,
    compare_scores,
    frechet_distance,
    kernel_distance,
    metric_frechet,
    metric_kernel,
)


def gaussian(clips: int, channels: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(clips, channels, generator=torch.Generator().manual_seed(seed)) * scale + shift


def with_matrix_root(x: torch.Tensor, y: torch.Tensor) -> float:
    """The published form of the distance, with population covariances."""
    x, y = x.double().numpy(), y.double().numpy()
    c, d = (np.cov(z.T, bias=True) for z in (x, y))
    root = sqrtm(c @ d).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root))


@pytest.mark.parametrize("clips", [10, 24, 100])
def test_distance_is_that_with_a_matrix_root(clips):
    mix = gaussian(24, 24, 5)  # correlated channels
    x, y = gaussian(clips, 24, 0) @ mix, gaussian(clips + 3, 24, 1, 1.4, 0.3)
    assert frechet_distance(x, y) == pytest.approx(with_matrix_root(x, y), rel=1e-5)


def test_distance_between_gaussians_on_a_line_by_hand():
    x = torch.tensor([[-1.0], [1.0]])  # mean 0, standard deviation 1
    assert frechet_distance(x, 3 * x + 2) == pytest.approx(2**2 + (3 - 1) ** 2)


def test_distance_between_identical_sets_is_nothing():
    x = gaussian(20, 30, 0, scale=100)
    assert 0 <= frechet_distance(x, x) < 1e-18
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-18


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), st.integers(0, 100))
def test_distance_is_symmetric_never_negative_and_blind_to_order(clips, others, channels, seed):
    x, y = gaussian(clips, channels, seed), gaussian(others, channels, seed + 1, 2.0)
    before = x.clone(), y.clone()
    there, back = frechet_distance(x, y), frechet_distance(y, x)
    assert there >= 0 and there == pytest.approx(back, rel=1e-9, abs=1e-12)
    assert there == pytest.approx(frechet_distance(x.flip(0), y), rel=1e-9, abs=1e-12)
    assert frechet_distance(x, x) < 1e-12
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_distance_between_samples_of_one_gaussian_falls_with_their_size():
    found = [frechet_distance(gaussian(n, 16, n), gaussian(n, 16, n + 1)) for n in (8, 32, 128, 512)]
    assert all(more < 0.5 * fewer for fewer, more in pairwise(found)), found
    unbiased = [kernel_distance(gaussian(8, 16, 2 * n), gaussian(8, 16, 2 * n + 1)) for n in range(200)]
    error = np.std(unbiased) / len(unbiased) ** 0.5
    assert abs(np.mean(unbiased)) < 3 * error and min(unbiased) < 0


def test_kernel_distance_is_its_definition():
    x, y = gaussian(5, 3, 0), gaussian(4, 3, 1, 2.0)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-5)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), r"real features must be \[clip, channel\] of at least two clips"),
        (torch.zeros(4, 3), torch.zeros(0, 3), r"generated features must be .* got \(0, 3\)"),
        (torch.zeros(4, 0), torch.zeros(4, 0), r"got \(4, 0\)"),
        (torch.zeros(4), torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "features have 3 and 2 channels"),
        (torch.zeros(4, 3), torch.full((4, 3), torch.nan), "generated features hold values that are not finite"),
        (torch.full((4, 3), torch.inf), torch.zeros(4, 3), "real features hold values that are not finite"),
    ],
)
def test_features_that_give_no_distance_are_refused(distance, real, generated, message):
    with pytest.raises(ValueError, match=message):
        distance(real, generated)


CLIPS = 33  # a clip more than a Trajectory has numbers


def world(start: int, scenarios=("uniform", "parabola", "collision")) -> Clip:
    each = CLIPS // 3
    return Clip.concatenate([simulate(s, "id", range(start, start + each), frames=16, size=16) for s in scenarios])


@pytest.fixture(scope="module")
def worlds() -> tuple[Clip, Clip, Clip]:
    """Three sets of other clips of the same worlds: reference, held out, and what a perfect generator gives."""
    return world(0), world(100), world(200)


def distances(worlds, frames: torch.Tensor) -> SetScore:
    return metric_frechet(replace(worlds[2], frames=frames, state=None), worlds[0], Trajectory(), held_out=worlds[1])


def test_sanity_ladder_of_trajectory_features(worlds):
    reference, held_out, fresh = worlds
    generator = torch.Generator().manual_seed(0)
    frames = fresh.frames
    copy = metric_frechet(reference, reference, Trajectory(), held_out=held_out)
    real = distances(worlds, frames)
    assert copy.value < 1e-12 and copy.floor == real.floor > 0
    assert 0.3 * real.floor < real.value < 2 * real.floor
    broken = dict(
        reversed=frames.flip(1),
        shuffled=frames[:, torch.randperm(16, generator=generator)],
        static=frames[:, :1].expand_as(frames),
        noise=torch.randint(0, 256, frames.shape, generator=generator).byte(),
        white=torch.full_like(frames, 255),
    )
    found = {name: distances(worlds, other) for name, other in broken.items()}
    assert all(score.low > 5 * real.floor for score in found.values()), {k: str(v) for k, v in found.items()}
    # which case a clip belongs to is invisible to a set
    assert distances(worlds, frames[torch.randperm(CLIPS, generator=generator)]).value == real.value


def test_score_does_not_depend_on_the_order_of_clips(worlds):
    reference, held_out, fresh = worlds
    order = torch.randperm(CLIPS, generator=torch.Generator().manual_seed(1))
    before = fresh.frames.clone()
    score = metric_frechet(fresh, reference, Trajectory(), held_out=held_out)
    assert metric_frechet(fresh[order], reference[order.flip(0)], Trajectory(), held_out=held_out[order]) == score
    assert torch.equal(fresh.frames, before)
    assert metric_frechet(fresh, reference, Trajectory(), held_out=held_out, seed=1).low != score.low


def test_score_says_what_it_is(worlds):
    reference, held_out, fresh = worlds
    score = metric_frechet(fresh, reference, Trajectory(), held_out=held_out)
    assert (score.name, score.unit, score.clips) == ("frechet_trajectory", "units^2", CLIPS)
    assert score.protocol == "16 frames of 16 x 16 at 10 fps" and score.lower_is_better
    assert score.low < score.value < score.high
    kernel = metric_kernel(fresh, reference, Trajectory(), held_out=held_out)
    assert (kernel.name, kernel.unit) == ("kernel_trajectory", "1") and kernel.low < kernel.value < kernel.high


def test_floor_comes_from_halves_of_the_reference_without_held_out_clips(worlds):
    reference, held_out, fresh = worlds
    both = Clip.concatenate([reference, held_out])
    score = metric_frechet(fresh, both, Trajectory())
    assert score.clips == CLIPS and score.floor > 0
    # another seed takes other halves
    assert metric_frechet(fresh, both, Trajectory(), seed=1).floor != score.floor
    with pytest.raises(ValueError, match=f"{CLIPS} generated clips need {2 * CLIPS} reference clips, .* got {CLIPS}"):
        metric_frechet(fresh, reference, Trajectory())


def test_interval_covers_the_mean_distance():
    class Given:
        """Features that were put into the first pixels: the interval's coverage needs samples of a known law."""

        name, unit, dimension, minimum_frames = "given", "1", 6, 1

        def __call__(self, clip):
            return clip.frames.flatten(1)[:, :6].double()

    def sample(seed: int, scale: float) -> Clip:
        frames = (gaussian(64, 12, seed) * scale + 128).round().byte().reshape(64, 1, 2, 2, 3)
        return Clip(frames, ("",) * 64, ("uniform",) * 64, ("id",) * 64, torch.arange(64))

    found = [metric_frechet(sample(3 * i, 24), sample(3 * i + 1, 16), Given(), held_out=sample(3 * i + 2, 16))
             for i in range(20)]  # fmt: skip
    mean = np.mean([score.value for score in found])
    assert sum(score.low < mean < score.high for score in found) >= 16
    assert all(score.floor < score.low for score in found)


def test_distances_measured_differently_are_not_compared():
    score = SetScore("frechet_trajectory", "units^2", 2.0, 1.5, 2.5, 0.5, 64, "16 frames of 32 x 32 at 10 fps")
    assert compare_scores(score, replace(score, value=1.25)) == 0.75
    for change, what in (
        (dict(clips=128), "clips cannot be compared: 64 against 128"),
        (dict(name="fvd"), "name"),
        (dict(protocol="8 frames of 32 x 32 at 10 fps"), "protocol"),
        (dict(floor=0.4), "floor"),
    ):
        with pytest.raises(ValueError, match=f"different {what}"):
            compare_scores(score, replace(score, **change))
    assert str(score) == "frechet_trajectory 2 [1.5, 2.5], floor 0.5, N 64"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, r, h: (g[:32], r, h), "on 32 features needs more than 32 clips, got 32; .* metric_kernel"),
        (lambda g, r, h: (replace(g, fps=5.0), r, h), "generated clips are .* at 5 fps, reference clips .* at 10 fps"),
        (lambda g, r, h: (replace(g, frames=g.frames[:, :8]), r, h), "generated clips are 8 frames of 16 x 16"),
        (lambda g, r, h: (replace(g, frames=g.frames[:, :, :8]), r, h), "16 frames of 16 x 8"),
        (lambda g, r, h: (g, r, replace(h, fps=5.0)), "held-out clips .* at 5 fps"),
        (lambda g, r, h: (g, r[:20], h), f"{CLIPS} generated clips need as many reference clips, got 20"),
        (lambda g, r, h: (g, r, h[:20]), f"{CLIPS} generated clips need as many held-out clips, got 20"),
        (lambda g, r, h: (g, r, r), f"{CLIPS} real clips are in both sets"),
        (lambda g, r, h: tuple(replace(c, frames=c.frames[:, :3]) for c in (g, r, h)), "at least 4 frames, got 3"),
        (
            lambda g, r, h: tuple(replace(c, frames=c.frames[:, :0]) for c in (g, r, h)),
            r"there is no video in \(33, 0, 16, 16, 3\)",
        ),
    ],
)
def test_sets_that_do_not_belong_together_are_refused(worlds, change, message):
    reference, held_out, fresh = worlds
    generated, reference, held_out = change(fresh, reference, held_out)
    with pytest.raises(ValueError, match=message):
        metric_frechet(generated, reference, Trajectory(), held_out=held_out)


def test_few_clips_and_bad_seeds_are_refused(worlds):
    reference, held_out, fresh = worlds
    with pytest.raises(ValueError, match=f"at least {MINIMUM_CLIPS} clips, got 20"):
        metric_kernel(fresh[:20], reference, Trajectory(), held_out=held_out)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        metric_kernel(fresh, reference, Trajectory(), held_out=held_out, seed=-1)
