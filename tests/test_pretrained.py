import json
import shutil

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline
from hypothesis import given, settings, strategies

from physnb.__main__ import main
from physnb.config import HeadId, Perturbation
from physnb.families import attention_layers, heads_of, video_of
from physnb.guide import guide
from physnb.guider import HeadGuidance
from physnb.hooks import perturb_rows
from physnb.pretrained import generate_clips, head_effects, head_report, load_pipeline, load_transformer
from physnb.tiny import FAMILIES, tiny_model
from physnb.tiny_pipelines import tiny_pipeline

SMALL = dict(height=32, width=32, num_frames=5)  # the least that Wan and CogVideoX make
RUN = dict(seed=0, steps=2, **SMALL)


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


# ---- whole pipelines ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved tiny Wan; shared, so never changed."""
    folder = tmp_path_factory.mktemp("saved") / "wan"
    tiny_pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "wan")


@pytest.fixture(scope="module")
def wan():
    """A tiny Wan; every test leaves it as it is."""
    pipe = tiny_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_index(folder):
    (folder / "model_index.json").unlink()


def no_json(folder):
    (folder / "model_index.json").write_text("{")


def unknown_pipeline(folder):
    change_index(folder, _class_name="SoraPipeline")


def no_pipeline(folder):
    change_index(folder, _class_name="AutoencoderKLWan")


def own_code(folder):
    change_index(folder, _class_name=["pipeline", "MyPipeline"])


def unknown_part(folder):
    change_index(folder, transformer=["diffusers", "SoraTransformer3DModel"])


def change_index(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_vae(folder):
    shutil.rmtree(folder / "vae")


def without_weights(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def cut_weights(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickled_weights(folder):
    transformer = folder / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    tiny_model("wan").save_pretrained(transformer, safe_serialization=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_index, "is not a pipeline: it has no model_index.json"),
        (no_json, "model_index.json is not valid JSON"),
        (unknown_pipeline, "describes a SoraPipeline, which is no pipeline of diffusers"),
        (no_pipeline, "describes a AutoencoderKLWan, which is no pipeline of diffusers"),
        (own_code, "which is no pipeline of diffusers"),
        (unknown_part, "no pipeline could be loaded from .*SoraTransformer3DModel"),
        (without_vae, "lacks its vae; copy the folder again"),
        (without_weights, "no pipeline could be loaded from"),
        (cut_weights, "no pipeline could be loaded from"),
        (pickled_weights, "no pipeline could be loaded from"),
    ],
)
def test_damaged_pipelines_are_named_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(folder)
    assert len(str(caught.value).splitlines()) == 1 and str(folder) in str(caught.value)


def test_parts_may_be_given_and_precision_chosen(folder, wan):
    without_vae(folder)
    pipe = load_pipeline(folder, vae=wan.vae, dtype={"default": torch.bfloat16})
    assert pipe.vae is wan.vae and pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("tiny:sora", {}, "unknown tiny pipeline 'sora'"),
        ("tiny:wan", dict(dtype=torch.bfloat16), "tiny:wan is built as it is; leave out dtype"),
        ("nowhere", {}, "nowhere does not exist; name a folder"),
        ("nobody/nothing", dict(local_files_only=True), "no pipeline could be loaded from nobody/nothing"),
    ],
)
def test_sources_that_hold_no_pipeline_are_named(source, more, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(source, **more)


def test_tiny_pipelines_load_by_name():
    assert type(load_pipeline("tiny:ltx")) is LTXPipeline


def test_clips_say_what_they_are(wan):
    clip = generate_clips(wan, ["a", "b"], fps=8, **RUN)
    assert clip.frames.shape == (2, 5, 32, 32, 3) and clip.frames.dtype == torch.uint8
    assert (clip.captions, clip.scenarios, clip.buckets) == (("a", "b"), ("prompt",) * 2, ("id",) * 2)
    assert clip.indices.tolist() == [0, 1] and clip.fps == 8 and clip.state is None
    assert not torch.equal(clip.frames[0], clip.frames[1])


@settings(max_examples=5, deadline=None)
@given(strategies.lists(strategies.sampled_from(["a", "b b", "c"]), min_size=2, max_size=3), strategies.integers(0, 9))
def test_a_clip_depends_on_seed_number_and_prompt_alone(wan, prompts, seed):
    every = generate_clips(wan, prompts, fps=8, **RUN | dict(seed=seed))
    first = generate_clips(wan, prompts[:1], fps=8, **RUN | dict(seed=seed))
    assert torch.equal(every.frames[:1], first.frames)
    again = generate_clips(
        wan, [prompts[0], *["other"] * (len(prompts) - 2), prompts[-1]], fps=8, **RUN | {"seed": seed}
    )
    assert torch.equal(every.frames[-1], again.frames[-1])


def test_clips_of_a_modular_pipeline(wan):
    pipe = diffusers.WanBlocks().init_pipeline()
    parts = {name: part for name, part in wan.components.items() if part is not None}
    pipe.update_components(**parts, guider=HeadGuidance("L0H1", weight=2.0))
    pipe.set_progress_bar_config(disable=True)
    clip = generate_clips(pipe, ["a"], fps=8, **RUN)
    with guide(wan, "L0H1", 2.0):
        twin = generate_clips(wan, ["a"], fps=8, guidance_scale=1.0, **RUN)
    assert (clip.frames.int() - twin.frames.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([], {}, "prompts must be a list of at least one"),
        ("a ball", {}, "prompts must be a list"),
        (["a"], dict(steps=0), "steps and fps must be positive"),
        (["a"], dict(fps=0), "steps and fps must be positive"),
        (["a"], dict(num_videos_per_prompt=2), "prompts and clips are 1 and 2"),
        (["a"], dict(height=33), "divisible by 16"),
        (["a"], dict(seed=-1), "seed must not be negative"),
    ],
)
def test_runs_that_cannot_be_are_refused(wan, prompts, more, message):
    with pytest.raises(ValueError, match=message):
        generate_clips(wan, prompts, **dict(fps=8) | RUN | more)


def test_frames_that_are_no_numbers_are_an_error():
    pipe = tiny_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="no video of finite numbers for 'a'; half precision may overflow"):
        generate_clips(pipe, ["a"], fps=8, **RUN)


# ---- what each head does ----

EFFECTS = RUN | dict(at=[0, 1])


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def pipe(request):
    """One pipeline that calls its transformer twice a step, and one that does so once with both rows."""
    pipe = tiny_pipeline(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_effects_are_those_of_single_forwards(pipe):
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    form = Perturbation((), strength=0.5, kind="uniform")
    effects = head_effects(pipe, "a", **RUN, at=[0], form=form, guidance_scale=4.0)
    handle.remove()
    args, kwargs = calls[0]
    assert effects.shape == (3, 4)
    for head in heads_of(pipe.transformer)[::5]:
        with torch.no_grad():
            normal = video_of(pipe.transformer(*args, **kwargs))[-1]
            with perturb_rows(pipe.transformer, Perturbation((head,), 0.5, "uniform")):
                weak = video_of(pipe.transformer(*args, **kwargs))[-1]
        torch.testing.assert_close(effects[head.layer, head.head], (normal - weak).norm() / normal.norm())


def test_effects_do_not_depend_on_how_many_share_a_forward(pipe):
    alone = head_effects(pipe, "a", **EFFECTS)
    for together in (5, 16):
        torch.testing.assert_close(head_effects(pipe, "a", together=together, **EFFECTS), alone, atol=1e-5, rtol=1e-3)


def test_a_silent_head_has_no_effect(pipe):
    attention, head = attention_layers(pipe.transformer)[1], HeadId(1, 2)
    weight = attention.module.to_out[0].weight
    width = weight.shape[1] // attention.heads
    kept = weight.data.clone()
    weight.data[:, head.head * width : (head.head + 1) * width] = 0
    effects = head_effects(pipe, "a", together=3, **EFFECTS)
    weight.data.copy_(kept)
    assert effects[head] == 0 and (effects > 0).sum() == effects.numel() - 1


def test_nothing_is_left_behind(pipe):
    before = [layer.module.processor for layer in attention_layers(pipe.transformer)]
    scheduler, state = type(pipe.scheduler), torch.get_rng_state()
    head_effects(pipe, "a", **EFFECTS)
    with pytest.raises(ValueError, match="divisible"):
        head_effects(pipe, "a", **EFFECTS | dict(height=33))
    assert [layer.module.processor for layer in attention_layers(pipe.transformer)] == before
    assert not pipe.transformer._forward_hooks and type(pipe.scheduler) is scheduler
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(at=[]), r"at must be steps from 0 to 1, got \[\]"),
        (dict(at=[2]), "at must be steps from 0 to 1"),
        (dict(at=[-1]), "at must be steps from 0 to 1"),
        (dict(together=0), "together must be positive"),
        (dict(seed=-1), "seed must not be negative"),
    ],
)
def test_effects_that_cannot_be_measured_are_refused(wan, more, message):
    with pytest.raises(ValueError, match=message):
        head_effects(wan, "a", **EFFECTS | more)


def test_predictions_that_are_no_numbers_are_an_error():
    pipe = tiny_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.proj_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="WanPipeline predicts no finite numbers"):
        head_effects(pipe, "a", **EFFECTS)


def test_effects_want_a_pipeline_that_is_known(wan):
    class OwnPipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer, scheduler):
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

    with pytest.raises(ValueError, match="OwnPipeline is not known"):
        head_effects(OwnPipeline(wan.transformer, wan.scheduler), "a", **EFFECTS)
