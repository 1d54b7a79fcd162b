import pytest
import torch

from physnb.data import Clip, simulate
from physnb.metrics.colour import frame_saturation, oversaturation, stretch_contrast


@pytest.fixture(scope="module")
def true():
    return simulate("collision", "id", range(4), frames=8, size=16, seed=3)


def painted(clip: Clip, change) -> Clip:
    frames = clip.frames.clone()
    change(frames)
    return Clip(**(vars(clip) | dict(frames=frames)))


def test_saturation_is_that_of_hsv():
    colours = torch.tensor([[255, 0, 0], [255, 255, 255], [0, 0, 0], [200, 100, 150]], dtype=torch.uint8)
    assert frame_saturation(colours[:, None, None]).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5])


def test_the_truth_and_missing_discs_do_not_burn(true):
    assert oversaturation(true, true).values.tolist() == [0.0] * 4
    gone = painted(true, lambda frames: frames[:, 3:].fill_(255))
    assert oversaturation(gone, true).values.tolist() == [0.0] * 4


def test_a_burnt_patch_counts_by_its_area(true):
    def burn(frames):
        frames[0, :, 0, 0] = torch.tensor([255, 0, 0], dtype=torch.uint8)

    before = frame_saturation(true.frames[0])
    corner = 1.0 - frame_saturation(true.frames[0, :, :1, :1])
    found = oversaturation(painted(true, burn), true).values
    assert found[0].item() == pytest.approx((corner / 256 / before)[3:].mean().item(), rel=1e-4) and found[0] > 0
    assert found[1:].tolist() == [0.0] * 3


def test_start_frames_do_not_count(true):
    assert oversaturation(painted(true, lambda frames: frames[:, :3].zero_()), true).values.tolist() == [0.0] * 4


def test_truth_without_colour_cannot_be_judged(true):
    grey = painted(true, lambda frames: frames[1].fill_(128))
    found = oversaturation(true, grey)
    assert found.values.isnan().tolist() == [False, True, False, False]
    assert found.reasons[1] == "the true clip has no colour"


def test_other_clips_are_refused(true):
    with pytest.raises(ValueError, match="do not match"):
        oversaturation(true, true[:2])
    with pytest.raises(ValueError, match="frames given must be in"):
        oversaturation(true, true, frames_given=8)


def test_stretched_contrast_darkens_what_is_faint_and_nothing_else():
    frames = torch.tensor([255, 254, 215, 100], dtype=torch.uint8).reshape(1, 1, 2, 2, 1).repeat(1, 1, 1, 1, 3)
    clip = Clip(frames=frames, captions=("",), scenarios=("",), buckets=("id",), indices=torch.zeros(1))
    assert stretch_contrast(clip, 3.0).frames[0, 0, ..., 0].flatten().tolist() == [255, 252, 135, 0]
    assert torch.equal(stretch_contrast(clip, 1.0).frames, frames) and frames.min() == 100
    with pytest.raises(ValueError, match="must be positive"):
        stretch_contrast(clip, 0.0)
