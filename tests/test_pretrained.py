import json

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

from physnb.__main__ import main
from physnb.pretrained import head_report, load_transformer
from physnb.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("slug", ["wan", "cogvideox", "latte", "hunyuan"])
def test_saved_model_loads_by_its_folder(tmp_path, slug):
    model = tiny_model(slug)
    model.save_pretrained(tmp_path / "model")
    assert head_report(load_transformer(tmp_path / "model")) == head_report(model)


def test_saved_pipeline_loads_by_its_folder(tmp_path):
    pipeline = LTXPipeline(
        transformer=tiny_model("ltx"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert type(load_transformer(tmp_path / "pipeline")).__name__ == "LTXVideoTransformer3DModel"


def test_weights_that_need_unpickling_are_refused(tmp_path):
    tiny_model("wan").save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(ValueError, match="no transformer could be loaded from"):
        load_transformer(tmp_path / "model")


@pytest.mark.parametrize("slug", FAMILIES)
def test_command_lists_every_family(capsys, slug):
    assert main(["heads", f"tiny:{slug}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    if slug == "sana-video":
        assert not report["supported"] and "linear" in report["reason"] and report["heads"] == []
        return
    family = FAMILIES[slug]
    assert report["supported"] and len(report["layers"]) == family.layers
    assert len(report["heads"]) == family.layers * family.heads
    assert all(layer["path"] and layer["tokens"] and layer["grid"] for layer in report["layers"])


@pytest.mark.parametrize(
    ("source", "message"),
    [("tiny:dalle", "unknown .*'dalle'; choose one of"), ("nowhere", "nowhere does not exist; name a folder")],
)
def test_unknown_source_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_transformer(source)
