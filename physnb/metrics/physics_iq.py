"""Physics-IQ (Motamed et al. 2025, arXiv 2501.09038): where, when and how much moves, beside two real takes.

Masks and terms are the official ones, less their faults: no video codec between mask and score, masks at one common
size (their kernels do not scale with the frame), and no score for a clip whose true motion the mask cannot see.
`physnb.metrics.physics_iq_files` scores folders of videos, and has the official procedure with its faults as "compat".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from physnb.config import require
from physnb.data import Clip
from physnb.metrics.scores import Scores

SIZE = 256  # pixels: smaller clips are enlarged to it before the mask, whose kernels suit nothing smaller
SHRINK = 4  # masks and frames are compared at a quarter of the mask's size
KERNEL = np.ones((5, 5), np.uint8)
THRESHOLD = 10  # grey levels: a pixel further than this from the running average moves
AVERAGE_RATE = 0.3  # weight of the newest frame in the running average
STILL_RANGE = 12  # levels: a pixel that varies by less is never in a mask, which needs 15 and loses 3 to roundings
VERIFIED_EPSILON = 1e-8
IOUS = ("spatiotemporal_iou", "spatial_iou", "weighted_spatial_iou")
TERMS = (*IOUS, "mse")


class MotionMasker:
    """Called with one RGB frame after the other, gives the mask {0, 255} of what moves in it.

    Grey, 5 x 5 blur, |g_t - A_t| > 10, opened and closed with a 5 x 5 square, where A_0 = g_0 and A_t = 0.7 A_{t-1} +
    0.3 g_t is updated before the comparison. So the first frame never moves, a step of under 15 grey levels is not
    seen, and a pixel that something has left goes on counting for some frames.
    """

    def __init__(self) -> None:
        self.average: Float[np.ndarray, "height width"] | None = None

    def __call__(self, frame: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
        grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (5, 5), 0)
        if self.average is None:
            self.average = grey.astype(np.float64)
            return np.zeros_like(grey)
        cv2.accumulateWeighted(grey, self.average, AVERAGE_RATE)
        difference = cv2.absdiff(grey, cv2.convertScaleAbs(self.average))
        moved = cv2.threshold(difference, THRESHOLD, 255, cv2.THRESH_BINARY)[1]
        return cv2.morphologyEx(cv2.morphologyEx(moved, cv2.MORPH_OPEN, KERNEL), cv2.MORPH_CLOSE, KERNEL)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image at size (width, height), bilinear and without smoothing first, as published."""
    return image if image.shape[1::-1] == size else cv2.resize(image, size)


def shrink_mask(mask: UInt8[np.ndarray, "height width"], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """A mask {0, 255} at size (width, height); what is half covered counts."""
    return resize(mask, size) > 127


def common_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) at which masks are made: the clip's own, enlarged if its shorter side has less than `size`."""
    scale = max(size / min(width, height), 1.0)
    return round(width * scale), round(height * scale)


def compared_size(common: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which masks and frames are compared."""
    return common[0] // SHRINK, common[1] // SHRINK


@dataclass(frozen=True)
class Motion:
    """What is compared of one video, at a quarter of the size of its masks."""

    masks: Bool[np.ndarray, "mask_time height width"]
    frames: UInt8[np.ndarray, "time height width 3"]


def find_motion(frames: UInt8[np.ndarray, "time height width 3"], common: tuple[int, int], frames_given: int) -> Motion:
    """Masks of one video, made at the `common` size (width, height), and its frames, both of generated frames only.

    The running average starts as the video's own last given frame, whose mask is empty by definition and is dropped;
    without given frames it starts as frame 0, which then has no mask. Masks are made only around what changes.
    """
    frames = np.ascontiguousarray(frames[max(frames_given - 1, 0) :])
    width, height = compared_size(common)
    masks = np.zeros((len(frames), height, width), bool)
    rows, columns = _changing_box(frames, common)
    scale_x, scale_y = common[0] / frames.shape[2], common[1] / frames.shape[1]
    box = (round((columns.stop - columns.start) * scale_x), round((rows.stop - rows.start) * scale_y))
    top, left = round(rows.start * scale_y) // SHRINK, round(columns.start * scale_x) // SHRINK
    if min(box) > 0:
        masker = MotionMasker()
        for frame, mask in zip(frames[:, rows, columns], masks, strict=True):
            small = shrink_mask(masker(resize(np.ascontiguousarray(frame), box)), compared_size(box))
            mask[top : top + small.shape[0], left : left + small.shape[1]] = small
    return Motion(masks[1:], np.stack([resize(f, (width, height)) for f in frames[min(frames_given, 1) :]]))


def _changing_box(frames: np.ndarray, common: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that hold every mask of the video, with a margin for enlarging, blur and closing.

    All of them unless the frame is enlarged by whole numbers to a size that SHRINK divides: only then is the enlarged
    box a part of the enlarged frame, pixel by pixel.
    """
    height, width = frames.shape[1:3]
    if common[0] % width or common[1] % height or common[0] % SHRINK or common[1] % SHRINK:
        return slice(0, height), slice(0, width)
    changes = (frames.max(0) - frames.min(0) >= STILL_RANGE).any(-1)
    slices = []
    for line, whole, enlarged in ((changes.any(1), height, common[1]), (changes.any(0), width, common[0])):
        found = np.flatnonzero(line)
        if len(found) == 0:
            return slice(0, 0), slice(0, 0)
        margin = 1 + math.ceil(8 * whole / enlarged)
        start = max(int(found[0]) - margin, 0) // SHRINK * SHRINK
        slices.append(slice(start, min(math.ceil((int(found[-1]) + 1 + margin) / SHRINK) * SHRINK, whole)))
    return slices[0], slices[1]


@dataclass(frozen=True)
class Terms:
    """The four terms of two videos, or of many in leading dimensions; the two of single frames still by frame.

    spatiotemporal_iou: of the masks frame by frame; spatial_iou: of the pixels that ever move; weighted_spatial_iou:
    sum of min over sum of max of the share of time that each pixel moves. All three are 1 where neither video moves.
    mse: of pixel values in [0, 1].
    """

    spatiotemporal_iou: Float[np.ndarray, "*view mask_time"]
    spatial_iou: Float[np.ndarray, "*view"]
    weighted_spatial_iou: Float[np.ndarray, "*view"]
    mse: Float[np.ndarray, "*view time"]

    def means(self) -> dict[str, Float[np.ndarray, "*view"]]:
        """Each term of each view, averaged over frames."""
        values = {name: getattr(self, name) for name in TERMS}
        return values | {name: values[name].mean(-1) for name in ("spatiotemporal_iou", "mse")}

    def __getitem__(self, views: list[int]) -> Terms:
        """The terms of some of the views."""
        return Terms(**{f.name: getattr(self, f.name)[views] for f in fields(Terms)})

    @staticmethod
    def stack(terms: Sequence[Terms]) -> Terms:
        return Terms(**{f.name: np.stack([getattr(t, f.name) for t in terms]) for f in fields(Terms)})


def _ratio(part: np.ndarray, whole: np.ndarray) -> Float[np.ndarray, "..."]:
    """part / whole, and 1 where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)


def compare(one: Motion, other: Motion) -> Terms:
    """The four terms of two videos of the same compared size and length."""
    require(
        one.masks.shape == other.masks.shape and one.frames.shape == other.frames.shape,
        f"videos of {one.frames.shape} and {other.frames.shape} cannot be compared",
    )
    ever_one, ever_other = one.masks.any(0), other.masks.any(0)
    count_one, count_other = one.masks.sum(0), other.masks.sum(0)
    squares = [cv2.norm(a, b, cv2.NORM_L2SQR) for a, b in zip(one.frames, other.frames, strict=True)]
    return Terms(
        spatiotemporal_iou=_ratio((one.masks & other.masks).sum((1, 2)), (one.masks | other.masks).sum((1, 2))),
        spatial_iou=_ratio((ever_one & ever_other).sum(), (ever_one | ever_other).sum()),
        weighted_spatial_iou=_ratio(np.minimum(count_one, count_other).sum(), np.maximum(count_one, count_other).sum()),
        mse=np.array(squares) / (255**2 * one.frames[0].size),
    )


def official_points(model: dict[str, np.ndarray], variance: dict[str, np.ndarray]) -> np.ndarray:
    """100 (mean of the three IoUs, each over that of the takes, less mse plus mse of the takes), not clipped."""
    ratios = sum(model[name] / variance[name] for name in IOUS) / len(IOUS)
    return 100 * (ratios - (model["mse"] - variance["mse"]))


def verified_points(model: dict[str, np.ndarray], variance: dict[str, np.ndarray]) -> np.ndarray:
    """100 times the mean of four ratios clipped to [0, 1]: three IoUs over the takes', and the takes' mse over mse.

    "Physics-IQ Verified" (arXiv 2606.18943), of one view: no term can make up for another.
    """
    ratios = [model[name] / (variance[name] + VERIFIED_EPSILON) for name in IOUS]
    ratios.append(_ratio(variance["mse"] + VERIFIED_EPSILON, model["mse"]))
    return 100 * np.clip(ratios, 0, 1).mean(0)


def why_not_judged(take_1: Motion, take_2: Motion, variance: Terms) -> str | None:
    """Why no score of this case would mean anything; None where it would."""
    if not take_1.masks.any():
        return "the motion mask of take 1 is empty: its motion is too faint or too small"
    if not take_2.masks.any():
        return "the motion mask of take 2 is empty: its motion is too faint or too small"
    if min(float(variance.means()[name]) for name in IOUS) == 0:
        return "the motion of the two takes does not overlap, so there is nothing to normalise by"
    return None


@dataclass(frozen=True)
class Comparison:
    """Generated videos beside take 1, and take 2 beside take 1; one row a view, which for Clips is a clip."""

    model: Terms
    variance: Terms
    moving_share: Float[np.ndarray, " view"]  # of frames with a mask of take 1 that is not empty
    reasons: tuple[str | None, ...]

    @property
    def judged(self) -> Bool[np.ndarray, " view"]:
        return np.array([reason is None for reason in self.reasons])

    def by_view(self) -> dict[str, Float[np.ndarray, " view"]]:
        """Every number of every view, by name; NaN where a view is not judged, but for `moving_share`."""
        model, variance = self.model.means(), self.variance.means()
        values = model | {f"variance_{name}": value for name, value in variance.items()}
        with np.errstate(divide="ignore", invalid="ignore"):  # views that cannot be normalised are not judged
            values["physics_iq_raw"] = official_points(model, variance)
        values["verified"] = verified_points(model, variance)
        values = {name: np.where(self.judged, value, np.nan) for name, value in values.items()}
        return values | dict(moving_share=self.moving_share)

    def scores(self) -> dict[str, Scores]:
        """One Scores a number of `by_view`."""
        units = dict(physics_iq_raw="points", verified="points", mse="squared intensity")
        found = {}
        for name, values in self.by_view().items():
            term = name.removeprefix("variance_")
            reasons = self.reasons if name != "moving_share" else (None,) * len(values)
            unit = units.get(term, "share")
            found[name] = Scores(name, unit, torch.from_numpy(values), reasons, lower_is_better=term == "mse")
        return found

    def of_set(self) -> dict[str, float | int | None]:
        """Scores and means over all judged views together; None where there is no such view.

        physics_iq_raw: the official score, from the means of every term over views; physics_iq: the same, clipped to
        [0, 100] as published. verified: mean of the views' own scores. moving_share is over all views.
        """
        values, judged = self.by_view(), self.judged
        found = dict(judged=int(judged.sum()), cases=len(judged), moving_share=float(self.moving_share.mean()))
        names = ("verified", *TERMS, *(f"variance_{name}" for name in TERMS))
        if not judged.any():
            return found | dict.fromkeys(("physics_iq", "physics_iq_raw", *names))
        means = {name: float(values[name][judged].mean()) for name in names}
        raw = float(official_points(means, {name: means[f"variance_{name}"] for name in TERMS}))
        return dict(physics_iq=min(max(raw, 0.0), 100.0), physics_iq_raw=raw) | means | found


@dataclass(frozen=True)
class Takes:
    """Both takes of a batch of cases, measured once: any number of generated batches can be compared with them."""

    true: Clip
    frames_given: int
    size: int
    first: tuple[Motion, ...]
    variance: Terms
    reasons: tuple[str | None, ...]

    def __getitem__(self, rows: list[int]) -> Takes:
        """The takes of some of the cases."""
        first, reasons = (tuple(values[row] for row in rows) for values in (self.first, self.reasons))
        return replace(self, true=self.true[rows], first=first, variance=self.variance[rows], reasons=reasons)

    def compare(self, generated: Clip) -> Comparison:
        """Generated clips of these cases beside them. Raises ValueError for other cases, sizes, lengths or rates."""
        _check_same_cases("generated", generated, self.true)
        motions = clip_motions(generated, self.size, self.frames_given)
        model = Terms.stack([compare(one, other) for one, other in zip(self.first, motions, strict=True)])
        share = np.array([take.masks.any((1, 2)).mean() for take in self.first])
        return Comparison(model, self.variance, share, self.reasons)


def clip_motions(clip: Clip, size: int, frames_given: int) -> list[Motion]:
    """The motion in every clip. One clip after the other: its running average then stays in the processor's cache."""
    height, width = clip.frames.shape[2:4]
    common = common_size(width, height, size)
    return [find_motion(frames.cpu().numpy(), common, frames_given) for frames in clip.frames]


def _check_same_cases(name: str, clip: Clip, true: Clip) -> None:
    require(
        clip.frames.shape == true.frames.shape,
        f"{name} {tuple(clip.frames.shape)} and true {tuple(true.frames.shape)} clips do not match",
    )
    require(
        clip.scenarios == true.scenarios and torch.equal(clip.indices, true.indices),
        f"{name} and true clips are not of the same cases in the same order",
    )
    require(clip.fps == true.fps, f"{name} clips have {clip.fps:g} frames/s and true ones {true.fps:g}")


def measure_takes(true: Clip, second_take: Clip, *, frames_given: int = 3, size: int = SIZE) -> Takes:
    """The two takes of every case, ready to be compared with; arguments and errors as in `metric_physics_iq`."""
    _check_same_cases("second take", second_take, true)
    require(true.frames.numel() > 0, f"there is nothing to judge in clips of shape {tuple(true.frames.shape)}")
    require(size >= SIZE, f"motion masks need a size of at least {SIZE} pixels, got {size}")
    time = true.frames.shape[1]
    require(
        0 <= frames_given <= time - 2,
        f"clips of {time} frames with {frames_given} given leave fewer than the 2 generated frames that are needed",
    )
    first, second = (clip_motions(clip, size, frames_given) for clip in (true, second_take))
    variance = [compare(one, two) for one, two in zip(first, second, strict=True)]
    reasons = tuple(why_not_judged(*case) for case in zip(first, second, variance, strict=True))
    return Takes(true, frames_given, size, tuple(first), Terms.stack(variance), reasons)


def metric_physics_iq(
    generated: Clip, true: Clip, second_take: Clip, *, frames_given: int = 3, size: int = SIZE
) -> dict[str, Scores]:
    """Scores of each clip by name, over its generated frames.

    spatiotemporal_iou, spatial_iou, weighted_spatial_iou (shares, higher is better), mse (squared intensity in [0, 1],
    lower is better): generated against true, see `Terms`. variance_*: the same of the second take against the true
    clip; despite the published name the IoUs are agreements. Publish them beside every score.
    physics_iq_raw: 100 [(st / v_st + sp / v_sp + ws / v_ws) / 3 - (mse - v_mse)], points, neither clipped nor rounded.
    verified: "Physics-IQ Verified", 0 to 100, see `verified_points`.
    moving_share: share of frames in which the mask of the true clip is not empty.

    frames_given: start frames, which are not judged; each video's running average starts as its own last one of them.
    size: pixels of the shorter side to which smaller clips are enlarged before the mask. 512 orders the same, at twice
    the cost. To compare many batches with the same takes, use `measure_takes(...).compare(generated)`; `of_set` of
    what that returns has the official score of the whole batch.

    A clip is not judged where the mask of either take is empty, or where the takes' motions do not overlap.
    Raises ValueError for clips that do not match, a size under 256, or fewer than 2 generated frames.
    Leaves out motion of less than 15 grey levels, the order of frames in two of the four terms (a reversed clip keeps
    its spatial and weighted spatial IoU), and everything about looks but the squared difference.
    """
    return measure_takes(true, second_take, frames_given=frames_given, size=size).compare(generated).scores()
