"""Distances between a set of generated clips and a set of real ones, on the features of an extractor.

One number for a whole set: nothing is said about any single clip, and a generated clip that belongs to another case
than it claims is not noticed. Frechet distances are Heusel et al. 2017 (arXiv 1706.08500) and, on videos, Unterthiner
et al. 2018 (arXiv 1812.01717); the kernel distance is Binkowski et al. 2018 (arXiv 1801.01401).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import require
from physnb.data import Clip
from physnb.metrics.features import FeatureExtractor, Features, check_clips

MINIMUM_CLIPS = 32  # the interval comes from halves, and a half of fewer than 16 clips says little
HALVES = 200  # random halves behind an interval
NAMES = {"frechet_i3d": "fvd", "kernel_i3d": "kvd"}  # only the published I3D weights are called "i3d"


@dataclass(frozen=True)
class SetScore:
    """A distance between `clips` generated and as many real clips.

    low, high: 95 % interval of the value, should other clips be drawn: random halves of both sets, without
        replacement, around their own mean (Shao and Wu 1989). A bootstrap would repeat clips, which shrinks a
        covariance and pushes a Frechet distance up. The interval is about twice too wide where the value is near the
        floor. It does not hold the bias that comes with few clips, and `low` may lie below zero.
    floor: the same distance between the same real clips and as many other real ones: bias and all, what a perfect
        generator would get. A value well below it means copies of the real clips.
    protocol: frames, size and rate of the clips.
    """

    name: str
    unit: str
    value: float
    low: float
    high: float
    floor: float
    clips: int
    protocol: str
    lower_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} [{self.low:.3g}, {self.high:.3g}], floor {self.floor:.3g}, N {self.clips}"


def compare_scores(first: SetScore, second: SetScore) -> float:
    """first.value - second.value, refused unless both were measured alike: same N, protocol and real clips.

    Frechet distances fall with the number of clips, so two of them at different N say nothing about each other.
    The real clips are the same where the floors are.
    """
    for what in ("name", "unit", "clips", "protocol", "floor"):
        a, b = getattr(first, what), getattr(second, what)
        require(a == b, f"distances with different {what} cannot be compared: {a} against {b}")
    return first.value - second.value


def check_features(real: Features, generated: Features) -> tuple[Features, Features]:
    """Both sets in float64; ValueError unless they are two finite [clip, channel] sets of at least two clips."""
    for name, x in (("real", real), ("generated", generated)):
        require(
            x.ndim == 2 and len(x) >= 2 and x.shape[1] >= 1,
            f"{name} features must be [clip, channel] of at least two clips, got {tuple(x.shape)}",
        )
        require(bool(x.isfinite().all()), f"{name} features hold values that are not finite numbers")
    require(real.shape[1] == generated.shape[1], f"features have {real.shape[1]} and {generated.shape[1]} channels")
    return real.double(), generated.double()


def _covariance_root(x: Features) -> Float[Tensor, "row channel"]:
    """A matrix R of at most as many rows as channels with R^T R = the population covariance of x."""
    root = (x - x.mean(0)) / len(x) ** 0.5
    return root if len(root) <= root.shape[1] else torch.linalg.qr(root, mode="r").R


def frechet_distance(real: Features, generated: Features) -> float:
    """Squared 2-Wasserstein distance between Gaussians with the means and covariances of the two sets, in [0, inf).

    |mean_r - mean_g|^2 + Tr(C_r + C_g - 2 (C_r C_g)^(1/2)), covariances divided by N, without a matrix root: for any
    X, Y with X^T X = C_r and Y^T Y = C_g the trace is the smallest |X - Q Y|^2 over orthogonal Q, which U V^T of the
    singular value decomposition X Y^T = U S V^T reaches. A sum of squares is never negative, whatever the rounding.
    Raises ValueError for features that are not finite or do not match.
    Leaves out whatever means and covariances do not see, and is biased upwards by few clips.
    """
    real, generated = check_features(real, generated)
    x, y = _covariance_root(real), _covariance_root(generated)
    rows = max(len(x), len(y))
    x, y = (torch.cat([r, r.new_zeros(rows - len(r), r.shape[1])]) for r in (x, y))
    u, _, vt = torch.linalg.svd(x @ y.T)
    return float((real.mean(0) - generated.mean(0)).square().sum() + (x - u @ vt @ y).square().sum())


def kernel_distance(real: Features, generated: Features) -> float:
    """Squared maximum mean discrepancy under k(x, y) = (x.y / channels + 1)^3, unbiased: below zero by chance.

    Binkowski et al. 2018, equation 4; on I3D features it is the kernel video distance. They average 100 subsets of 1000
    features; here all clips make one estimate, which has the same expectation and the smaller variance.
    Raises ValueError for features that are not finite or do not match.
    Leaves out moments of the features above the third.
    """
    real, generated = check_features(real, generated)

    def kernel(x: Features, y: Features) -> Float[Tensor, "x y"]:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Features) -> Tensor:
        pairs = kernel(x, x)
        return (pairs.sum() - pairs.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(real) + mean_of_pairs(generated) - 2 * kernel(real, generated).mean())


def metric_frechet(
    generated: Clip, reference: Clip, extractor: FeatureExtractor, *, held_out: Clip | None = None, seed: int = 0
) -> SetScore:
    """Frechet distance from the generated clips to as many real ones; "fvd" with the published I3D, lower is better.

    held_out: other real clips, for the floor; None takes them from `reference`, which then has to hold twice as many
        clips as were generated. Take real clips of other cases than the generated ones continue.
    seed: of the choice of real clips and of the halves.
    Raises ValueError for sets of other frame counts, sizes or rates, for too few real clips, for real clips in both
    sets, and unless N exceeds both 31 and the extractor's dimension: up to there the covariances have no full rank, and
    the distance is mostly that between the few directions that either set happens to span. `metric_kernel` has no bias.
    Leaves out single clips, which case a clip belongs to, and all that the features do not see.
    """
    require(
        len(generated) > extractor.dimension,
        f"a Frechet distance on {extractor.dimension} features needs more than {extractor.dimension} clips, "
        f"got {len(generated)}; generate more or use metric_kernel",
    )
    return _score("frechet", frechet_distance, f"{extractor.unit}^2", generated, reference, extractor, held_out, seed)


def metric_kernel(
    generated: Clip, reference: Clip, extractor: FeatureExtractor, *, held_out: Clip | None = None, seed: int = 0
) -> SetScore:
    """Kernel distance from the generated clips to as many real ones; "kvd" with the published I3D, lower is better.

    Settings and errors are those of `metric_frechet`, but 32 clips are enough for any number of features.
    Leaves out what `metric_frechet` does; has no bias from few clips, but the more noise.
    """
    return _score("kernel", kernel_distance, "1", generated, reference, extractor, held_out, seed)


def _score(
    kind: str,
    distance: Callable[[Features, Features], float],
    unit: str,
    generated: Clip,
    reference: Clip,
    extractor: FeatureExtractor,
    held_out: Clip | None,
    seed: int,
) -> SetScore:
    """The distance with its floor and interval."""
    clips, protocol = len(generated), describe_protocol(generated)
    check_clips(extractor, generated)
    require(seed >= 0, f"seed must not be negative, got {seed}")
    require(clips >= MINIMUM_CLIPS, f"a distance between sets needs at least {MINIMUM_CLIPS} clips, got {clips}")
    for name, other in (("reference", reference), ("held-out", held_out)):
        if other is not None:
            theirs = describe_protocol(other)
            require(theirs == protocol, f"generated clips are {protocol}, {name} clips {theirs}; give both one form")
    real, other_real = _draw_real(reference, held_out, clips, seed)
    found, true, other = (extractor(_shuffle(clip, seed)) for clip in (generated, real, other_real))
    value = distance(true, found)
    low, high = _interval(distance, true, found, value, seed)
    name = f"{kind}_{extractor.name}"
    return SetScore(NAMES.get(name, name), unit, value, low, high, distance(true, other), clips, protocol)


def describe_protocol(clip: Clip) -> str:
    """What clips must share to be compared: "16 frames of 32 x 32 at 10 fps"."""
    time, height, width = clip.frames.shape[1:4]
    return f"{time} frames of {width} x {height} at {clip.fps:g} fps"


def _digests(clip: Clip, seed: int) -> list[bytes]:
    """A number for every clip that depends on its frames and the seed alone."""
    key = seed.to_bytes(8, "little")
    return [hashlib.blake2b(frames.contiguous().numpy().tobytes(), key=key).digest() for frames in clip.frames]


def _shuffle(clip: Clip, seed: int) -> Clip:
    """The clips in a random order that does not depend on the order in which they came."""
    digests = _digests(clip, seed)
    return clip[sorted(range(len(clip)), key=digests.__getitem__)]


def _draw_real(reference: Clip, held_out: Clip | None, clips: int, seed: int) -> tuple[Clip, Clip]:
    """Two disjoint sets of `clips` real clips."""
    real = _shuffle(reference, seed)
    if held_out is None:
        require(
            len(real) >= 2 * clips,
            f"{clips} generated clips need {2 * clips} reference clips, half of them for the floor, got {len(real)}; "
            "give more or pass held_out",
        )
        real, other = real[:clips], real[clips : 2 * clips]
    else:
        for name, have in (("reference", len(reference)), ("held-out", len(held_out))):
            require(have >= clips, f"{clips} generated clips need as many {name} clips, got {have}")
        real, other = real[:clips], _shuffle(held_out, seed)[:clips]
    shared = set(_digests(real, seed)) & set(_digests(other, seed))
    require(not shared, f"{len(shared)} real clips are in both sets, so there is no floor; use clips of other cases")
    return real, other


def _interval(
    distance: Callable[[Features, Features], float], real: Features, generated: Features, value: float, seed: int
) -> tuple[float, float]:
    """The value plus the 2.5 and 97.5 % quantiles of what random halves of both sets give, around their mean."""
    generator, half = np.random.default_rng(seed), len(real) // 2
    draws = []
    for _ in range(HALVES):
        ours, theirs = (torch.from_numpy(generator.permutation(len(x))[:half]) for x in (real, generated))
        draws.append(distance(real[ours], generated[theirs]))
    low, high = np.quantile(np.array(draws) - np.mean(draws), [0.025, 0.975])
    return value + float(low), value + float(high)
