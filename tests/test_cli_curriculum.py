"""Commands of the data side: sources and captions of a training, phyworld files, codecs, scaling."""

import json

import h5py
import numpy as np
import pytest
from video_files import write_video

from physnb.__main__ import main
from physnb.data.phyworld import GROUPS


def said(capsys, *arguments: str) -> dict:
    """The JSON object that a command prints; the test fails with its error if it ends with another status than 0."""
    status = main([*arguments, "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out.splitlines()[-1])


def refused(capsys, *arguments: str) -> str:
    """The one line that a command ends with."""
    assert main(list(arguments)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_train_takes_sources_and_captions(capsys, tmp_path):
    asked = ["train", "--preset", "smoke", "--out", str(tmp_path / "run"), "--dry-run"]
    sources = ["--source", "orbit@2", "--source", "templates", "--clips", "100", "--level", "law", "--layers", "1"]
    config = said(capsys, *asked, *sources)
    assert (config["sources"], config["source_weights"], config["clips"]) == (["orbit", "templates"], [2.0, 1.0], 100)
    assert config["text"] == dict(level="law", encoder="", width=0, layers=1)
    assert "NAME@WEIGHT" in refused(capsys, *asked, "--source", "orbit@much")
    assert "--frames goes with --codec" in refused(capsys, *asked, "--frames", "9")


def test_train_on_other_sources_measures_them(capsys, tmp_path):
    asked = ["train", "--preset", "smoke", "--steps", "3", "--cases", "4", "--out", str(tmp_path / "run")]
    found = said(capsys, *asked, "--source", "orbit", "--source", "wave", "--level", "augmented", "--layers", "1")
    worlds = [(row["split"], row["scenario"]) for row in found["result"]]
    assert worlds == [("id", "orbit"), ("id", "wave"), ("ood", "orbit"), ("ood", "wave")]


def test_an_unknown_source_is_named_before_training(capsys, tmp_path):
    line = refused(capsys, "train", "--preset", "smoke", "--source", "pendulums", "--out", str(tmp_path / "run"))
    assert "unknown source 'pendulums'" in line and "videos:FOLDER" in line
    assert not (tmp_path / "run").exists()


def test_a_training_on_videos_says_what_it_skipped(capsys, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "good.mp4", np.stack([np.full((32, 32, 3), 3 * k, np.uint8) for k in range(72)]))
    (folder / "empty.mp4").touch()
    asked = ["train", "--preset", "smoke", "--steps", "2", "--cases", "2", "--out", str(tmp_path / "run")]
    found = said(capsys, *asked, "--source", f"videos:{folder}?clips_per_video=2", "--source", "uniform")
    assert found["videos"] == [dict(files=2, clips=2, skipped={"empty": 1})]


def test_export_writes_the_layout_of_phyworld(capsys, tmp_path):
    file = str(tmp_path / "uniform.hdf5")
    assert said(capsys, "export", "--scenario", "uniform", "--cases", "3", "--out", file)["clips"] == 3
    with h5py.File(file) as opened:
        assert set(opened) == set(GROUPS) and opened["position_streams"]["00000"].shape == (3, 32, 2)
    assert "exists" in refused(capsys, "export", "--scenario", "uniform", "--out", file)


def test_scaling_has_a_row_a_shape_size_and_device_count(capsys):
    table = said(capsys, "scaling", "--utilisation", "0.5")["table"]
    assert len(table) == 4 * 3 * 2 and all(row["hours"] > 0 for row in table)
    assert "utilisation must be in (0, 1]" in refused(capsys, "scaling", "--utilisation", "2")


def test_codec_measures_a_floor(capsys, tmp_path):
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    AutoencoderKL(**blocks, block_out_channels=(4,), norm_num_groups=4).save_pretrained(tmp_path / "codec")
    found = said(capsys, "codec", str(tmp_path / "codec"), "--cases", "4", "--size", "16")
    assert found["kind"] == "AutoencoderKL" and found["floor"]["psnr"]["mean"] > 0
    assert "--out to train a small one" in refused(capsys, "codec")


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_what_is_no_codec_is_named(capsys, where):
    assert where in refused(capsys, "codec", where)
