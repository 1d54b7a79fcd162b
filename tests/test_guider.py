"""Head guidance inside real pipelines of diffusers around tiny random transformers; embeddings stand in for text."""

import dataclasses
import inspect
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.modular_pipelines.hunyuan_video1_5.denoise import HunyuanVideo15DenoiseStep
from diffusers.modular_pipelines.ltx.denoise import LTXDenoiseStep
from diffusers.modular_pipelines.wan.denoise import Wan22DenoiseStep, WanDenoiseStep
from torch import nn

from physnb.config import Perturbation
from physnb.families import attention_layers
from physnb.guide import BATCHED, REFUSED, SEPARATE, guide, hides_rows
from physnb.guider import HeadGuidance
from physnb.hooks import perturb_rows
from physnb.tiny import FAMILIES, tiny_model

HEADS = "L0H1,L1H0"
MASK = torch.ones(2, 6)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(slug, **config):
    """The tiny model of a family with some settings changed."""
    with pytest.MonkeyPatch.context() as patch:
        family = FAMILIES[slug]
        patch.setitem(FAMILIES, slug, dataclasses.replace(family, config=family.config | config))
        return tiny_model(slug)


def processors(model):
    return [layer.module.processor for layer in attention_layers(model)]


@contextmanager
def counted(*models):
    """A list with an entry for every forward of some models."""
    seen = []
    handles = [model.register_forward_pre_hook(lambda model, args: seen.append(model)) for model in models]
    yield seen
    for handle in handles:
        handle.remove()


@contextmanager
def failing(model, call):
    """Inside the block, forward number `call` of the model raises."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("stop")

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        yield
    handle.remove()


# ---- HeadGuidance in modular pipelines ----

LATENTS = noise(2, 4, 3, 8, 10)
PROMPT, NEGATIVE = noise(2, 6, 16, seed=1), noise(2, 6, 16, seed=2)


def modular(guider, model=None, step=WanDenoiseStep, **more):
    pipe = step().init_pipeline()
    pipe.update_components(
        guider=guider, transformer=model or tiny_model("wan"), scheduler=FlowMatchEulerDiscreteScheduler(), **more
    )
    return pipe


def denoise(pipe, steps=2, **more):
    pipe.scheduler.set_timesteps(steps)
    inputs = dict(latents=LATENTS.clone(), prompt_embeds=PROMPT, negative_prompt_embeds=NEGATIVE, dtype=torch.float32)
    inputs |= dict(timesteps=pipe.scheduler.timesteps, num_inference_steps=steps) | more
    return pipe(**{name: value for name, value in inputs.items() if value is not None}, output="latents")


def wan_predictions(model, perturbation, latents=LATENTS, t=1000.0):
    """C, U and P of a step, one after the other."""

    def predict(text):
        with torch.no_grad():
            return model(latents, torch.full((2,), t), text, return_dict=False)[0]

    with perturb_rows(model, perturbation):
        weak = predict(PROMPT)
    return predict(PROMPT), predict(NEGATIVE), weak


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_weight_zero_is_classifier_free_guidance(scale):
    model = tiny_model("wan")
    stock = denoise(modular(diffusers.ClassifierFreeGuidance(guidance_scale=scale), model))
    with counted(model) as passes:
        ours = denoise(modular(HeadGuidance(HEADS, weight=0.0, guidance_scale=scale), model))
    torch.testing.assert_close(ours, stock, atol=1e-6, rtol=1e-6)
    assert len(passes) == (2 if scale == 1 else 4)


@pytest.mark.parametrize(
    ("scale", "form"),
    [
        (1.0, {}),
        (4.0, {}),
        (4.0, dict(strength=0.5)),
        (0.5, dict(kind="uniform", axis="space")),
        (4.0, dict(kind="blur", sigma=[0.5, 1.0, float("inf")])),
    ],
)
def test_a_step_is_the_formula(scale, form):
    model = tiny_model("wan")
    before = processors(model)
    pipe = modular(HeadGuidance(HEADS, weight=3.0, guidance_scale=scale, **form), model)
    with counted(model) as passes:
        result = denoise(pipe, steps=1)
    assert len(passes) == 2 + (scale != 1)
    assert all(now is then for now, then in zip(processors(model), before, strict=True))
    conditional, unconditional, weak = wan_predictions(model, Perturbation(HEADS, **form))
    pred = conditional + (scale - 1) * (conditional - unconditional) + 3 * (conditional - weak)
    pipe.scheduler.set_timesteps(1)
    expected = pipe.scheduler.step(pred, pipe.scheduler.timesteps[0], LATENTS, return_dict=False)[0]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (conditional - weak).abs().max() > 1e-3


def test_weight_acts_between_start_and_stop_and_text_guidance_throughout():
    model = tiny_model("wan")
    guider = HeadGuidance(HEADS, weight=2.0, guidance_scale=4.0, start=0.25, stop=0.75)
    passes = []
    pipe = modular(guider, model)
    active = guider.prepare_inputs_from_block_state
    guider.prepare_inputs_from_block_state = lambda *args: passes.append(batches := active(*args)) or batches
    denoise(pipe, steps=4)
    assert [len(batches) for batches in passes] == [2, 3, 3, 2]
    never = HeadGuidance(HEADS, weight=2.0, guidance_scale=4.0, start=0.5, stop=0.5)
    stock = denoise(modular(diffusers.ClassifierFreeGuidance(guidance_scale=4.0), model))
    torch.testing.assert_close(denoise(modular(never, model)), stock, atol=1e-6, rtol=1e-6)


def test_number_of_conditions_is_the_maximum_outside_a_step():
    guider = HeadGuidance(HEADS, weight=2.0, guidance_scale=4.0, stop=0.5)
    pipe = modular(guider)
    assert guider.num_conditions == 3
    guider.set_state(step=1, num_inference_steps=2, timestep=None)
    assert guider.num_conditions == 2
    denoise(pipe)
    assert guider.num_conditions == 3
    assert pipe.requires_unconditional_embeds
    with failing(pipe.transformer, call=4):  # in the second step, which has no weak pass
        denoise(pipe)
    assert pipe.requires_unconditional_embeds
    guider.disable()
    assert guider.num_conditions == 1


def test_passes_say_which_prompt_they_have():
    guider, model = HeadGuidance(HEADS, weight=2.0, guidance_scale=4.0), tiny_model("wan")
    guider.set_state(step=0, num_inference_steps=1, timestep=None)
    batches = guider.prepare_inputs({"text": (PROMPT, NEGATIVE), "both": LATENTS})
    assert [batch.__guidance_identifier__ for batch in batches] == ["pred_cond", "pred_uncond", "pred_weak"]
    assert [batch.text is NEGATIVE for batch in batches] == [False, True, False]
    assert all(batch.both is LATENTS for batch in batches)
    conditional = []
    for _ in batches:
        guider.prepare_models(model)
        conditional.append(guider.is_conditional)
        guider.cleanup_models(model)
        guider.cleanup_models(model)  # a second time does nothing
    assert conditional == [True, False, True]


@pytest.mark.parametrize("again", ["set_state", "prepare_inputs", "cleanup_models"])
def test_a_forward_that_raised_leaves_no_broken_heads(again):
    model = tiny_model("wan")
    guider, before = HeadGuidance(HEADS, weight=2.0), processors(model)
    with failing(model, call=2):
        denoise(modular(guider, model))
    assert processors(model) != before
    arguments = dict(set_state=(0, 2, None), prepare_inputs=({},), cleanup_models=(model,))[again]
    getattr(guider, again)(*arguments)
    assert all(now is then for now, then in zip(processors(model), before, strict=True))


def test_settings_survive_saving_and_copying(tmp_path):
    guider = HeadGuidance("L1H0,L0H1", 2.0, 0.5, "blur", sigma=(1, 2, float("inf")), guidance_scale=3.0, stop=0.5)
    guider.save_pretrained(tmp_path)
    for other in (HeadGuidance.from_pretrained(tmp_path), guider.new()):
        assert other.config == guider.config
        assert other.perturbation == guider.perturbation == Perturbation(HEADS, 0.5, "blur", sigma=(1, 2, float("inf")))
        assert (other.weight, other.guidance_scale, other._stop) == (2.0, 3.0, 0.5)
    assert guider.config.heads == ["L0H1", "L1H0"]
    assert guider.new(weight=1.0).weight == 1.0
    assert "L1H0" in repr(guider)


def test_two_experts_share_a_guider_or_have_their_own():
    experts = tiny_model("wan"), tiny_model("wan", seed=1)

    def run(guider, guider_2):
        pipe = modular(guider, experts[0], Wan22DenoiseStep, guider_2=guider_2, transformer_2=experts[1])
        return denoise(pipe, denoiser_input_fields={})

    plain = run(HeadGuidance(), HeadGuidance())
    first, second = HeadGuidance("L0H1", weight=2.0), HeadGuidance("L1H1", weight=1.0)
    with counted(*experts) as passes:
        own = run(first, second)
    shared = run(first, first)
    assert len(passes) == 4  # one step each
    assert not torch.allclose(own, plain) and not torch.allclose(own, shared)
    with pytest.raises(ValueError, match="head L5H0 does not exist"):
        run(first, HeadGuidance("L5H0", weight=1.0))


def ltx_loop():
    model = tiny_model("ltx")
    text = dict(
        prompt_attention_mask=MASK, negative_prompt_attention_mask=MASK, rope_interpolation_scale=(0.32, 32, 32)
    )
    return model, LTXDenoiseStep, dict(latents=noise(2, 60, 4), num_frames=17, height=128, width=160) | text


def hunyuan_15_loop():
    model, drawn = changed("hunyuan-1.5", out_channels=2), FAMILIES["hunyuan-1.5"].inputs(batch=2)
    names = dict(
        prompt_embeds_2="encoder_hidden_states_2",
        prompt_embeds_mask="encoder_attention_mask",
        prompt_embeds_mask_2="encoder_attention_mask_2",
    )
    texts = {side + name: drawn[key] for name, key in names.items() for side in ("", "negative_")}
    latents = drawn["hidden_states"]
    images = dict(cond_latents_concat=latents[:, :1], mask_concat=latents[:, 1:2], image_embeds=drawn["image_embeds"])
    return model, HunyuanVideo15DenoiseStep, dict(latents=latents[:, 2:], dtype=None) | texts | images


@pytest.mark.parametrize("loop", [ltx_loop, hunyuan_15_loop])
def test_other_loops_take_it_too(loop):
    """LTX sets cache contexts, HunyuanVideo 1.5 hands over its inputs the other way."""
    model, step, more = loop()
    stock = denoise(modular(diffusers.ClassifierFreeGuidance(guidance_scale=4.0), model, step), **more)
    none = denoise(modular(HeadGuidance(guidance_scale=4.0), model, step), **more)
    torch.testing.assert_close(none, stock, atol=1e-6, rtol=1e-6)
    broken = denoise(modular(HeadGuidance(HEADS, weight=2.0, guidance_scale=4.0), model, step), **more)
    assert (broken - stock).abs().max() > 1e-3


def test_sums_are_made_in_float32_and_rescaled():
    conditional, unconditional, weak = (noise(2, 3, 4, seed=seed).bfloat16() for seed in range(3))
    guider = HeadGuidance(HEADS, weight=2.0, guidance_scale=3.0, guidance_rescale=0.7)
    out = guider.forward(conditional, unconditional, weak)
    c, u, p = conditional.float(), unconditional.float(), weak.float()
    expected = rescale_noise_cfg(c + 2 * (c - u) + 2 * (c - p), c, 0.7)
    assert out.pred.dtype == torch.bfloat16 and torch.equal(out.pred, expected.bfloat16())
    assert out.pred_cond is conditional and out.pred_uncond is unconditional
    alone = HeadGuidance(enabled=False).forward(conditional)
    assert torch.equal(alone.pred, conditional)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(heads="L0H", weight=1.0), "'L0H' is not of the form"),
        (dict(weight=1.0), "weight 1.0 has no heads to break"),
        (dict(heads=HEADS, weight=float("nan")), "must be finite"),
        (dict(guidance_scale=float("inf")), "must be finite"),
        (dict(heads=HEADS, strength=1.5), r"strength u must be in \[0, 1\]"),
        (dict(heads=HEADS, kind="nonsense"), "unknown perturbation kind"),
        (dict(guidance_rescale=2.0), "guidance_rescale must be in"),
        (dict(start=1.0), "start"),
        (dict(start=0.5, stop=0.2), "stop"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HeadGuidance(**settings)


def test_heads_that_the_model_lacks_are_named_before_anything_runs():
    model = tiny_model("wan")
    with counted(model) as passes, pytest.raises(ValueError, match="head L0H2 does not exist"):
        denoise(modular(HeadGuidance("L0H2", weight=1.0, start=0.5), model))
    assert not passes


def zero_gates(model):
    """The model as if untrained: its attention reaches nothing."""
    for layer in attention_layers(model):
        layer.module.to_out[0].weight.data.zero_()
        layer.module.to_out[0].bias.data.zero_()
    return model


def test_guidance_that_does_nothing_is_an_error():
    model = zero_gates(tiny_model("wan"))
    with pytest.raises(RuntimeError, match=r"breaking L0H1,L1H0 .* changed no bit .* zero-initialised"):
        denoise(modular(HeadGuidance(HEADS, weight=2.0), model))
    denoise(modular(HeadGuidance(HEADS, weight=2.0, strength=0.0), model))
    for make in PIPELINES.values():
        pipe, call, _ = make()
        zero_gates(pipe.transformer)
        with pytest.raises(RuntimeError, match="zero-initialised"), guide(pipe, HEADS, 2.0):
            call(pipe)
        with guide(pipe, HEADS, 2.0, strength=0.0):
            call(pipe)


# ---- guide(): classic pipelines ----


class NothingToCheck(nn.Module):
    """In the place of a safety checker, which only looks at prompts and videos."""

    device, dtype = torch.device("cpu"), torch.float32


def classic(name, model, scheduler=FlowMatchEulerDiscreteScheduler, height=64, width=80, frames=9, **inputs):
    """A pipeline without encoders and decoder, how to call it, and the inputs of its call."""
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__init__).parameters
    parts = {part: None for part in parameters if part.startswith(("text_encoder", "tokenizer", "vae"))}
    if "safety_checker" in parameters:
        parts["safety_checker"] = NothingToCheck()
    model = tiny_model(model) if isinstance(model, str) else model
    pipe = kind(**parts, scheduler=scheduler(), transformer=model)
    pipe.set_progress_bar_config(disable=True)
    asked = inspect.signature(pipe.__call__).parameters
    cfg = "true_cfg_scale" if "true_cfg_scale" in asked else "guidance_scale"
    inputs |= {"height": height, "width": width, "num_frames" if "num_frames" in asked else "video_length": frames}

    def call(pipe, scale=4.0, steps=1, **more):
        arguments = inputs | {cfg: scale, "num_inference_steps": steps} | more
        if "latents" in inputs:  # Kandinsky writes into them
            arguments["latents"] = inputs["latents"].clone()
        generator = torch.Generator().manual_seed(0)
        return pipe(**arguments, generator=generator, output_type="latent", return_dict=False)[0]

    return pipe, call, inputs


def first_step(pipe, call, scale, **more):
    """The latents after the first of two steps: several pipelines cannot do one alone."""
    seen = []

    def stop(pipe, i, t, values):
        seen.append(values["latents"].clone())
        pipe._interrupt = True
        return {}

    call(pipe, scale, steps=2, callback_on_step_end=stop, **more)
    return seen[0]


def text(width, **more):
    return dict(prompt_embeds=noise(2, 6, width, seed=1), negative_prompt_embeds=noise(2, 6, width, seed=2)) | more


MASKS = dict(prompt_attention_mask=MASK, negative_prompt_attention_mask=MASK)


def wan():
    return classic("WanPipeline", "wan", latents=LATENTS, **text(16))


def cogvideox(**more):
    return classic(
        "CogVideoXPipeline", "cogvideox", CogVideoXDDIMScheduler, latents=noise(2, 3, 4, 8, 10), **text(8), **more
    )


def ltx():
    latents = noise(2, 60, 4)
    return classic("LTXPipeline", "ltx", height=128, width=160, frames=17, latents=latents, **text(16), **MASKS)


def mochi():
    return classic("MochiPipeline", "mochi", frames=13, latents=LATENTS, **text(16), **MASKS)


def latte():
    return classic(
        "LattePipeline",
        changed("latte", out_channels=8),  # the second half is a variance
        lambda: diffusers.DDIMScheduler(clip_sample=False),
        frames=3,
        latents=LATENTS,
        negative_prompt=None,
        clean_caption=False,
        **text(8),
    )


def hunyuan():
    pooled = dict(pooled_prompt_embeds=noise(2, 8, seed=3), negative_pooled_prompt_embeds=noise(2, 8, seed=4))
    return classic("HunyuanVideoPipeline", "hunyuan", latents=LATENTS, **text(16), **MASKS, **pooled)


def kandinsky():
    names = dict(prompt_embeds_qwen=(6, 16), prompt_embeds_clip=(8,))
    texts = {
        side + name: noise(2, *shape, seed=seed)
        for seed, side in enumerate(("", "negative_"))
        for name, shape in names.items()
    }
    lengths = torch.tensor([0, 6, 12])
    texts |= dict(prompt_cu_seqlens=lengths, negative_prompt_cu_seqlens=lengths)
    return classic("Kandinsky5T2VPipeline", "kandinsky5", latents=noise(2, 3, 8, 10, 4), **texts)


def cosmos():
    return classic("CosmosTextToWorldPipeline", "cosmos", EDMEulerScheduler, frames=17, latents=LATENTS, **text(16))


def skyreels_forcing():
    def scheduler():
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)

    return classic("SkyReelsV2DiffusionForcingPipeline", "skyreels", scheduler, prompt=None, **text(16))


def by_hand(name, pipe, inputs, scale, perturbation, weight):
    """One step with a forward a prediction, added up by the formula."""
    model, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(1)
    t, latents = scheduler.timesteps[0], inputs["latents"]
    more = {}
    if name == "ltx":
        scale_tokens = (8 / 25, 32, 32)
        more = dict(num_frames=3, height=4, width=5, encoder_attention_mask=MASK, rope_interpolation_scale=scale_tokens)

    def predict(text):
        with torch.no_grad():
            return model(
                hidden_states=latents,
                timestep=t.expand(2),
                encoder_hidden_states=inputs[text],
                return_dict=False,
                **more,
            )[0]

    conditional, unconditional = predict("prompt_embeds"), predict("negative_prompt_embeds")
    with perturb_rows(model, perturbation):
        weak = predict("prompt_embeds")
    pred = conditional + (scale - 1) * (conditional - unconditional) + weight * (conditional - weak)
    return scheduler.step(pred, t, latents, return_dict=False)[0]


PIPELINES = dict(wan=wan, cogvideox=cogvideox, ltx=ltx)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    ("scale", "form"),
    [(1.0, {}), (4.0, {}), (4.0, dict(strength=0.5, kind="uniform", axis="time", scope="video_rows"))],
)
def test_a_guided_step_is_the_formula(name, scale, form):
    pipe, call, inputs = PIPELINES[name]()
    plain = call(pipe, scale)
    torch.testing.assert_close(
        plain, by_hand(name, pipe, inputs, scale, Perturbation(HEADS), 0.0), atol=1e-5, rtol=1e-5
    )
    expected = by_hand(name, pipe, inputs, scale, Perturbation(HEADS, **form), 3.0)
    with guide(pipe, HEADS, 3.0, **form):
        guided = call(pipe, scale)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
    assert (guided - plain).abs().max() > 1e-3


@contextmanager
def replaced_prediction(model, perturbation, weight):
    """The same guidance in the plainest way, for a pipeline that asks for C alone."""
    forward = model.forward

    def guided(*args, **kwargs):
        output = forward(*args, **kwargs)
        with perturb_rows(model, perturbation):
            weak = forward(*args, **kwargs)
        prediction, weak = (out[0] if isinstance(out, tuple) else out.sample for out in (output, weak))
        prediction += weight * (prediction - weak)  # in place: the output holds it
        return output

    model.forward = guided
    yield
    del model.forward


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi
@pytest.mark.parametrize("make", [mochi, latte, hunyuan, kandinsky, cosmos, skyreels_forcing, cogvideox])
def test_the_shift_is_the_same_at_any_scale_of_text_guidance(make):
    """Whatever a pipeline does with its predictions: the latents of a step are affine in the one it arrives at."""
    pipe, call, _ = make()
    plain = first_step(pipe, call, 1.0)
    with replaced_prediction(pipe.transformer, Perturbation(HEADS), 2.0):
        expected = first_step(pipe, call, 1.0) - plain
    close = dict(atol=2e-4 if make is cosmos else 2e-5, rtol=1e-4)  # Cosmos multiplies by 80 on the way
    assert expected.abs().max() > 100 * close["atol"]
    for scale, dynamic in ((1.0, {}), (4.0, dict(use_dynamic_cfg=True) if make is cogvideox else {})):
        with guide(pipe, HEADS, 2.0):
            guided = first_step(pipe, call, scale, **dynamic)
        torch.testing.assert_close(guided - first_step(pipe, call, scale, **dynamic), expected, **close)


@pytest.mark.parametrize("name", PIPELINES)
def test_off_is_off_and_the_interval_is_kept(name):
    pipe, call, _ = PIPELINES[name]()
    with counted(pipe.transformer) as passes:
        plain = call(pipe, steps=4)
    usual = len(passes)
    for off in (dict(weight=0.0), dict(weight=2.0, strength=0.0), dict(weight=2.0, start=0.5, stop=0.5)):
        with guide(pipe, HEADS, **off), counted(pipe.transformer) as passes:
            assert torch.equal(call(pipe, steps=4), plain)
        assert len(passes) == usual
    with guide(pipe, HEADS, 2.0, start=0.25, stop=0.75), counted(pipe.transformer) as passes:
        first = call(pipe, steps=4)
        assert len(passes) == usual + 2
        assert torch.equal(call(pipe, steps=4), first)  # a new run counts from 0 again
    assert not torch.allclose(first, plain)


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi
@pytest.mark.parametrize("make", [cogvideox, ltx, mochi, latte])
def test_later_steps_break_the_heads_of_conditional_rows_alone(make):
    pipe, call, _ = make()
    sizes = []

    def look(model, args, kwargs):
        sizes.append(len(kwargs["hidden_states"]))

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    with guide(pipe, HEADS, 2.0):
        alone = call(pipe, steps=3)
    assert sizes == [4, 4, 4, 2, 4, 2]
    sizes.clear()
    with pytest.MonkeyPatch.context() as patch, guide(pipe, HEADS, 2.0):
        patch.setattr("physnb.guide.hides_rows", lambda values, rows: True)
        torch.testing.assert_close(alone, call(pipe, steps=3), atol=1e-4, rtol=1e-4)
    assert sizes == [4] * 6


def test_rows_in_lists_are_found():
    rows = torch.zeros(4, 2)
    assert hides_rows([{"a": [1, (rows, None)]}], 4)
    assert not hides_rows([rows, 4, None, (torch.zeros(3, 4), torch.tensor(4.0))], 4)


def test_both_experts_are_guided():
    pipe, call, _ = wan()
    pipe.register_modules(transformer_2=tiny_model("wan", seed=1))
    pipe.register_to_config(boundary_ratio=0.9)
    plain = call(pipe, steps=2)
    with guide(pipe, HEADS, 2.0), counted(pipe.transformer) as high, counted(pipe.transformer_2) as low:
        guided = call(pipe, steps=2, guidance_scale_2=1.5)
    assert len(high) == len(low) == 3
    assert not torch.allclose(guided, plain)


@pytest.mark.parametrize("raising", [None, 1, 2, 3])
def test_a_guided_pipeline_is_put_back(raising):
    pipe, call, _ = wan()
    model, scheduler = pipe.transformer, pipe.scheduler
    plain, before, kind, attributes = call(pipe), processors(model), type(scheduler), dict(vars(model))
    with failing(model, raising) if raising else nullcontext(), guide(pipe, HEADS, 2.0):
        call(pipe)
    assert all(now is then for now, then in zip(processors(model), before, strict=True))
    assert type(scheduler) is kind and not model._forward_hooks
    assert "forward" not in vars(model) and vars(model).keys() == attributes.keys()
    assert torch.equal(call(pipe), plain)


def test_a_run_after_one_that_raised_starts_afresh():
    pipe, call, _ = wan()
    with guide(pipe, HEADS, 2.0, stop=0.5):
        expected = call(pipe, steps=2)
        with failing(pipe.transformer, call=3):  # between C and U
            call(pipe, steps=2)
        assert torch.equal(call(pipe, steps=2), expected)


def test_pipelines_that_cannot_be_guided_are_named():
    pipe, call, _ = wan()
    with pytest.raises(ValueError, match="head L9H0 does not exist"), guide(pipe, "L9H0", 2.0):
        pass
    with pytest.raises(ValueError, match="no heads to break"), guide(pipe, "", 2.0):
        pass
    with pytest.raises(ValueError, match="fractions in order"), guide(pipe, HEADS, 2.0, start=0.5, stop=0.4):
        pass
    with pytest.raises(TypeError, match="nonsense"), guide(pipe, HEADS, 2.0, nonsense=1):
        pass
    with guide(pipe, HEADS, 2.0), pytest.raises(ValueError, match="already guided"), guide(pipe, HEADS, 2.0):
        pass
    with guide(pipe, HEADS, 2.0), pytest.raises(RuntimeError, match="called outside a run"):
        wan_predictions(pipe.transformer, Perturbation(HEADS))
    with guide(pipe, HEADS, 2.0):
        call(pipe)
        with pytest.raises(RuntimeError, match="called outside a run"):
            wan_predictions(pipe.transformer, Perturbation(HEADS))

    class Unknown(diffusers.DiffusionPipeline):
        def __init__(self, transformer=None, guider=None):
            super().__init__()
            self.register_modules(transformer=transformer)
            self.guider = guider

    HeliosPyramidPipeline = type("HeliosPyramidPipeline", (Unknown,), {})
    for unknown, message in [
        (Unknown(tiny_model("wan")), "Unknown is not known: .* WanPipeline"),
        (Unknown(), "Unknown has no transformer"),
        (Unknown(tiny_model("wan"), HeadGuidance()), "takes a guider"),
        (Unknown(tiny_model("sana-video")), "self-attention is linear"),
        (HeliosPyramidPipeline(tiny_model("helios")), "HeliosPyramidPipeline cannot be guided"),
    ]:
        with pytest.raises(ValueError, match=message), guide(unknown, "L0H0", 2.0):
            pass


@pytest.fixture(scope="module")
def pipeline_sources():
    """The text of every pipeline class of diffusers; some cannot be imported everywhere."""
    files = (Path(diffusers.__file__).parent / "pipelines").glob("*/pipeline_*.py")
    parts = [part for file in files for part in re.split(r"^class ", file.read_text(), flags=re.MULTILINE)[1:]]
    return {part[: part.index("(")]: part for part in parts if re.match(r"\w+\(", part)}


@pytest.mark.parametrize("name", [*BATCHED, *SEPARATE, *REFUSED])
def test_the_table_of_pipelines_agrees_with_their_source(name, pipeline_sources):
    source = pipeline_sources[name]
    assert "def num_timesteps" in source and "_num_timesteps = " in source
    if name in BATCHED:
        assert "torch.cat([latents] * 2)" in source
        assert re.search(
            r"noise_(pred_)?(video_)?uncond(_text)?, noise_pred(_text|_video)? = ", source
        )  # in this order
    elif name in SEPARATE:
        assert "torch.cat([latents] * 2)" not in source
        calls = r"(?:self\.transformer|current_model)\(\s.*?encoder_hidden_states=(\w*)"
        assert ["neg" in text for text in re.findall(calls, source, re.DOTALL)] == [False, True]
