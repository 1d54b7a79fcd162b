"""Tiny pipelines are real ones: saved, loaded, prompted, guided and decoded like pretrained ones."""

import json

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from physnb.config import Perturbation
from physnb.guide import guide
from physnb.guider import HeadGuidance
from physnb.hooks import perturb_rows
from physnb.pretrained import case_generator, generate_clips, load_pipeline
from physnb.tiny_pipelines import PIPELINES, tiny_pipeline

PROMPT = "A red ball, falling; 2 cubes (blue)!"
HEADS = "L0H1,L1H0"


@pytest.fixture(scope="module", params=PIPELINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """A saved pipeline; shared, so never changed."""
    folder = tmp_path_factory.mktemp("pipelines") / name
    tiny_pipeline(name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    """The same, loaded; every test leaves it as it is."""
    return quiet(load_pipeline(folder))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(name, pipe, prompt=PROMPT, number=0):
    call = dict(num_inference_steps=2, generator=case_generator(0, number), output_type="latent", return_dict=False)
    return pipe(prompt, **call, **PIPELINES[name].clip)[0]


def test_folder_is_small_and_whole(folder, pipe):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja"}, "nothing to unpickle"
    optional = type(pipe)._optional_components
    assert all(part is not None for name, part in pipe.components.items() if name not in optional)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__


def test_loading_changes_no_weight_and_no_clip(name, pipe):
    fresh = quiet(tiny_pipeline(name))
    for part, module in fresh.components.items():
        if isinstance(module, torch.nn.Module):
            loaded = pipe.components[part].state_dict()
            assert all(torch.equal(value, loaded[key]) for key, value in module.state_dict().items())
    # Loaded weights may lie elsewhere in memory, and kernels may then round otherwise.
    torch.testing.assert_close(latents(name, pipe), latents(name, fresh), atol=1e-4, rtol=1e-4)


def test_prompt_and_noise_decide_the_clip(name, pipe):
    once = latents(name, pipe)
    assert torch.equal(once, latents(name, pipe))
    assert (once - latents(name, pipe, "green")).abs().max() > 1e-3
    assert (once - latents(name, pipe, number=1)).abs().max() > 1e-1


def test_frames_differ_in_space_and_time(name, pipe):
    clip = generate_clips(pipe, [PROMPT], seed=0, steps=2, fps=16, **PIPELINES[name].clip)
    size = PIPELINES[name].clip
    assert clip.frames.shape == (1, size["num_frames"], size["height"], size["width"], 3)
    pixels = clip.frames[0].float()
    assert pixels.std((1, 2)).min() > 5 and pixels.diff(dim=0).abs().mean() > 0.5
    assert ((pixels == 0) | (pixels == 255)).float().mean() < 0.5, "most of it is not clipped"


def test_heads_are_broken_and_guided_away_from(name, pipe):
    plain = latents(name, pipe)
    with perturb_rows(pipe.transformer, Perturbation(HEADS)):
        broken = latents(name, pipe)
    with guide(pipe, HEADS, 2.0):
        guided = latents(name, pipe)
    with guide(pipe, HEADS, 0.0):
        off = latents(name, pipe)
    assert torch.equal(off, plain) and torch.equal(latents(name, pipe), plain)
    assert (broken - plain).abs().max() > 1e-3 and (guided - plain).abs().max() > 1e-3


def test_seed_decides_weights_and_nothing_else_is_touched(name):
    before = torch.get_rng_state()
    weights = [next(tiny_pipeline(name, seed).transformer.parameters()) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_tokenizers_read_every_word(pipe):
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, part, None)
        if tokenizer is not None:
            ids = tokenizer(PROMPT).input_ids
            unknown = tokenizer.unk_token_id
            assert unknown == tokenizer.eos_token_id or unknown not in ids  # CLIP has no token for unknown
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text.replace(" ", "").lower() == PROMPT.replace(" ", "").lower()


def test_hunyuan_keeps_the_prompt_behind_its_template():
    tokenizer = tiny_pipeline("hunyuan").tokenizer
    before = len(tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]).input_ids)
    assert DEFAULT_PROMPT_TEMPLATE["crop_start"] <= before < DEFAULT_PROMPT_TEMPLATE["crop_start"] + 200


def test_modular_wan_takes_a_saved_guider(tmp_path):
    """Another loop, another way to guide: the clip is the same."""
    tiny_pipeline("wan").save_pretrained(tmp_path / "pipeline")
    pipe = quiet(load_pipeline(tmp_path / "pipeline"))
    HeadGuidance(HEADS, weight=2.0, kind="uniform", guidance_scale=4.0).save_pretrained(tmp_path / "guider")
    modular = quiet(ModularPipeline.from_pretrained(str(tmp_path / "pipeline")))
    modular.load_components(use_safetensors=True)
    modular.update_components(guider=HeadGuidance.from_pretrained(tmp_path / "guider"))
    run = dict(seed=0, steps=2, fps=16, **PIPELINES["wan"].clip)
    plain = generate_clips(pipe, [PROMPT], guidance_scale=4.0, **run).frames.int()
    with guide(pipe, HEADS, 2.0, kind="uniform"):
        guided = generate_clips(pipe, [PROMPT], guidance_scale=4.0, **run).frames.int()
    clip = generate_clips(modular, [PROMPT], **run)
    assert (clip.frames.int() - guided).abs().max() <= 1 < (clip.frames.int() - plain).abs().max()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown tiny pipeline 'sora'; choose one of wan"):
        tiny_pipeline("sora")
