"""I3D (Carreira and Zisserman 2017, arXiv 1705.07750): Inception-v1 with kernels inflated over time, Kinetics logits.

This is the network of the Frechet video distance. Modules carry the names of the published weights,
i3d_pretrained_400.pt of songweige/TATS, which follow piergiaj/pytorch-i3d: `Mixed_3b.b1a.conv3d.weight` and so on.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import urllib.request
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from physnb.config import require
from physnb.store import written_whole

WEIGHTS_URL = (
    "https://github.com/songweige/TATS/raw/03bbce1daa3da7e9bff8221e9ec433df9484817f/tats/fvd/i3d_pretrained_400.pt"
)
WEIGHTS_BLOB = "a867b87ac3a9097d200598b1d48a1b890d8ec744"  # git's id of that file in that commit
CLASSES = 400
MINIMUM_FRAMES = 9  # fewer leave one frame to the last pool, which averages two
SIZE = 224  # pixels; the last pool covers 7 x 7 = 224 / 32

# Output channels of a module's branches: 1x1; 1x1 then 3x3; 1x1 then 3x3; pool then 1x1.
MIXED = {
    "Mixed_3b": (64, (96, 128), (16, 32), 32),
    "Mixed_3c": (128, (128, 192), (32, 96), 64),
    "Mixed_4b": (192, (96, 208), (16, 48), 64),
    "Mixed_4c": (160, (112, 224), (24, 64), 64),
    "Mixed_4d": (128, (128, 256), (24, 64), 64),
    "Mixed_4e": (112, (144, 288), (32, 64), 64),
    "Mixed_4f": (256, (160, 320), (32, 128), 128),
    "Mixed_5b": (256, (160, 320), (32, 128), 128),
    "Mixed_5c": (384, (192, 384), (48, 128), 128),
}


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """x with zeros around it so that a layer gives ceil(size / stride) outputs an axis; an odd zero goes at the end.

    TensorFlow's "SAME" rule, under which both networks here were trained. x is [batch, channel, *axes].
    """
    zeros = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        zeros += [total // 2, total - total // 2]
    return F.pad(x, zeros)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU. The classifier is the bare convolution with a bias."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, classifier: bool = False):
        super().__init__()
        self.conv3d = nn.Conv3d(channels_in, channels_out, kernel, stride, bias=classifier)
        self.bn = None if classifier else nn.BatchNorm3d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else self.bn(x).relu()


class MaxPool(nn.Module):
    """Largest value of each window; the zeros of the padding take part, which after a ReLU changes nothing."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """An Inception module: four branches side by side, joined along the channels."""

    def __init__(self, channels_in: int, single: int, middle: tuple[int, int], small: tuple[int, int], pooled: int):
        super().__init__()
        self.b0 = Unit(channels_in, single)
        self.b1a, self.b1b = Unit(channels_in, middle[0]), Unit(middle[0], middle[1], kernel=3)
        self.b2a, self.b2b = Unit(channels_in, small[0]), Unit(small[0], small[1], kernel=3)
        self.b3a, self.b3b = MaxPool((3, 3, 3), (1, 1, 1)), Unit(channels_in, pooled)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class InceptionI3D(nn.Sequential):
    """I3D on RGB: its layers in order, under their published names; 12.7 million parameters."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, kernel=7, stride=2)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, kernel=3)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, (single, middle, small, pooled) in MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, Mixed(channels, single, middle, small, pooled))
            channels = single + middle[1] + small[1] + pooled
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = Unit(channels, CLASSES, classifier=True)

    def forward(self, x: Float[Tensor, "batch 3 time 224 224"]) -> Float[Tensor, "batch 400"]:
        """Logits averaged over time, before the softmax; x in [-1, 1]."""
        require(x.shape[2] >= MINIMUM_FRAMES, f"I3D needs at least {MINIMUM_FRAMES} frames, got {x.shape[2]}")
        require(tuple(x.shape[3:]) == (SIZE, SIZE), f"I3D takes frames of 224 x 224, got {tuple(x.shape[3:])}")
        return super().forward(x).mean(dim=(2, 3, 4))  # [batch, 400, time, 1, 1] before the mean


def is_published(path: str | Path) -> bool:
    """Whether the file is byte for byte the published i3d_pretrained_400.pt, by git's SHA-1 of a file."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == WEIGHTS_BLOB


def load_i3d(path: str | Path, sha256: str | None = None) -> InceptionI3D:
    """I3D in evaluation mode with the weights of a .safetensors file or of a state dict saved by torch.

    Raises ValueError where the file is missing, does not have the given sha256, holds more than tensors, or holds the
    weights of another network. Nothing is unpickled but tensors.
    """
    path = Path(path)
    require(path.is_file(), f"I3D weights {path} do not exist; download_i3d(path) fetches them from {WEIGHTS_URL}")
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        require(found == sha256.lower(), f"{path} has sha256 {found}, not the {sha256} asked for")
    try:
        is_safe = path.suffix == ".safetensors"
        weights = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of weights that can be read safely ({type(error).__name__})") from None
    with torch.device("meta"):
        model = InceptionI3D()
    model.load_state_dict(fit_weights(path, model, weights), assign=True)
    return model.eval().requires_grad_(False)


def fit_weights(path: Path, model: nn.Module, weights: object) -> dict[str, Tensor]:
    """The weights in float32 under the model's own names; ValueError where names or shapes are not the model's.

    Counters of training batches may be absent: files written before torch 0.4.1 have none and evaluation reads none.
    """
    require(isinstance(weights, dict), f"{path} holds a {type(weights).__name__}, not a state dict")
    expected = model.state_dict()
    counters = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    weights = counters | weights
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(str(name) for name in weights.keys() - expected.keys())
    require(
        not missing and not unknown,
        f"{path} has another layout than {type(model).__name__}: "
        f"{len(missing)} names missing{' such as ' + missing[0] if missing else ''}, "
        f"{len(unknown)} unknown{' such as ' + unknown[0] if unknown else ''}",
    )
    for name, value in expected.items():
        shape = tuple(getattr(weights[name], "shape", ("no tensor",)))
        require(shape == tuple(value.shape), f"{path}: {name} must be {tuple(value.shape)}, got {shape}")
    return {name: weights[name].to(value.dtype) for name, value in expected.items()}


def download_i3d(path: str | Path, url: str = WEIGHTS_URL) -> Path:
    """Fetches the published weights (about 50 MB) to `path`, which appears whole or not at all.

    Raises ValueError where they cannot be fetched, or where what came is not the published file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        try:
            with part.open("wb") as file, urllib.request.urlopen(url, timeout=60) as response:
                shutil.copyfileobj(response, file)
        except OSError as error:
            raise ValueError(
                f"I3D weights could not be fetched ({error}); fetch {url} where there is a network and pass its path"
            ) from None
        require(is_published(part), f"what {url} sent is not the published i3d_pretrained_400.pt; nothing was kept")
    return path
