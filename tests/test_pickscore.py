import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from physnb.data import Clip, simulate
from physnb.metrics import Scores
from physnb.metrics.pickscore import TEXT_TOKENS, PickScore, metric_pickscore, prefer_within_prompt

SIDE = 16  # pixels of the tiny model's images


def write_tokenizer(folder) -> int:
    """vocab.json and merges.txt as CLIP's: bytes, bytes that end a word, merges, start and end; returns the count."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges = [("d", "i"), ("di", "s"), ("dis", "c</w>"), ("r", "e"), ("re", "d</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=TEXT_TOKENS, pad_token="<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model folder with its processor: the true files, tiny and random."""
    folder = tmp_path_factory.mktemp("clip")
    tokens = write_tokenizer(folder)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    # end token id 2 is what published CLIP configs say, and stands for the largest id
    text = CLIPTextConfig(**size, vocab_size=tokens, max_position_embeddings=TEXT_TOKENS, eos_token_id=2)
    vision = CLIPVisionConfig(**size, image_size=SIDE, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.logit_scale.fill_(math.log(100.0))
    model.save_pretrained(folder)
    pixels = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPImageProcessorPil(**pixels).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return PickScore(folder, folder)


def clip_of(count: int = 3, frames: int = 6) -> Clip:
    return simulate("collision", "id", range(count), frames=frames, size=24)


def test_score_is_the_scaled_cosine_computed_by_hand(scorer):
    clip = clip_of(2)
    found = metric_pickscore(clip, scorer, frames=3)
    model, scale = scorer.model, 100.0
    tokens = scorer.tokenizer(list(clip.captions), padding="max_length", max_length=77, return_tensors="pt")
    assert tokens["input_ids"].shape == (2, 77)
    with torch.no_grad():
        text = model.text_projection(model.text_model(**tokens).pooler_output).double()
        for row in range(2):
            images = list(clip.frames[row, [0, 2, 5]].numpy())  # 0, 2.5 and 5, rounded to even
            pixels = scorer.image_processor(images, return_tensors="pt")["pixel_values"]
            vision = model.visual_projection(model.vision_model(pixels).pooler_output).double()
            cosines = [float(v @ text[row] / (v.norm() * text[row].norm())) for v in vision]
            assert float(found.values[row]) == pytest.approx(scale * sum(cosines) / 3, abs=1e-3)
            assert max(map(abs, cosines)) < 1
    assert not found.lower_is_better and "mean of 3 frames" in found.unit and found.reasons == (None, None)


def test_preprocessing_is_clips_own(scorer):
    white = torch.full((1, 24, 24, 3), 255, dtype=torch.uint8)
    pixels = scorer.image_processor(list(white.numpy()), return_tensors="pt")["pixel_values"]
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(pixels, expected[None, :, None, None].expand(1, 3, SIDE, SIDE))


def test_text_is_lower_cased_padded_and_truncated_to_77_tokens(scorer):
    long = "red disc " * 100
    assert torch.equal(scorer.embed_texts([long]), scorer.embed_texts([long + "and more"]))
    assert torch.equal(scorer.embed_texts(["Red  Disc"]), scorer.embed_texts(["red disc"]))
    assert not torch.allclose(scorer.embed_texts(["red"]), scorer.embed_texts(["disc"]), atol=1e-3)
    assert scorer.tokenizer.tokenize("red disc") == ["red</w>", "disc</w>"]


def test_prompts_replace_captions_and_change_the_score(scorer):
    clip = clip_of(2)
    other = metric_pickscore(clip, scorer, ["a blue ball", clip.captions[1]], frames=2)
    own = metric_pickscore(clip, scorer, frames=2)
    assert abs(float(other.values[0] - own.values[0])) > 1e-2
    assert float(other.values[1]) == float(own.values[1])


@pytest.mark.parametrize("size", [(24, 24), (17, 31), (40, 9), (1, 1)])
def test_any_frame_size_is_scored(scorer, size):
    frames = torch.randint(0, 256, (1, 2, *size, 3), generator=torch.Generator().manual_seed(0)).byte()
    clip = Clip(frames, ("a red disc",), ("uniform",), ("id",), torch.tensor([0]))
    assert metric_pickscore(clip, scorer, frames=2).values.isfinite().all()


def test_clip_without_caption_is_not_judged(scorer):
    clip = replace(clip_of(3), captions=("a disc", "", "  "))
    found = metric_pickscore(clip, scorer, frames=1)
    assert found.values.isnan().tolist() == [False, True, True]
    assert found.reasons == (None, "the clip has no caption", "the clip has no caption")


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)))
def test_order_of_the_batch_does_not_count_and_inputs_stay(scorer, order):
    clip = replace(clip_of(3), captions=("a red disc", "", "a blue disc"))
    before = clip.frames.clone()
    there, back = (metric_pickscore(c, scorer, frames=2) for c in (clip[order], clip))
    torch.testing.assert_close(there.values, back.values[order], equal_nan=True, rtol=0, atol=0)
    assert torch.equal(clip.frames, before)


def scores_of(values) -> Scores:
    reasons = tuple("no caption" if v != v else None for v in values)
    return Scores("pickscore", "scaled cosine", torch.tensor(values), reasons, lower_is_better=False)


def test_preference_is_the_softmax_among_clips_of_a_prompt():
    found = prefer_within_prompt(
        scores_of([20.0, 20.0 + math.log(3), 7.0, math.nan, math.nan]), ["a", "a", "b", "a", ""]
    )
    assert found.values[:2].tolist() == pytest.approx([0.25, 0.75])
    assert found.values[2:].isnan().all()
    assert found.reasons[2:] == ("no other clip of its prompt has a score", "no caption", "no caption")


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-50, 50), min_size=2, max_size=6), shift=st.floats(-5, 5))
def test_preference_sums_to_one_and_ignores_a_common_shift(values, shift):
    prompts = ["a"] * len(values)
    found = prefer_within_prompt(scores_of(values), prompts).values
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    shifted = prefer_within_prompt(scores_of([v + shift for v in values]), prompts).values
    torch.testing.assert_close(found, shifted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: (c[[]], {}), r"nothing to score in frames \[0, 6, 24, 24, 3\]"),
        (lambda c: (replace(c, frames=c.frames[:, :0]), {}), r"frames to score must be in \[1, 0\]"),
        (lambda c: (replace(c, frames=c.frames[:, :, :0]), {}), "nothing to score"),
        (lambda c: (c, dict(frames=7)), r"frames to score must be in \[1, 6\], the frames of a clip, got 7"),
        (lambda c: (c, dict(frames=0)), r"frames to score must be in \[1, 6\]"),
        (lambda c: (c, dict(prompts=["a"])), "3 clips need as many prompts, got 1"),
    ],
)
def test_bad_input_is_named(scorer, make, message):
    clip, arguments = make(clip_of(3))
    with pytest.raises(ValueError, match=message):
        metric_pickscore(clip, scorer, **arguments)


def test_wrong_number_of_prompts_is_named():
    with pytest.raises(ValueError, match="2 scores need as many prompts, got 1"):
        prefer_within_prompt(scores_of([1.0, 2.0]), ["a"])


def test_missing_model_or_processor_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*nowhere"):
        PickScore(folder, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no CLIP model could be loaded from .*nowhere"):
        PickScore(tmp_path / "nowhere", folder)


def copy_of(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_damaged_weights_are_named(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"no CLIP model could be loaded from "):
        PickScore(copy, folder)


def test_weights_that_lack_a_tensor_are_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks visual_projection.weight"):
        PickScore(copy, folder)


def test_pickled_weights_are_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no CLIP model could be loaded from "):
        PickScore(copy, folder)


def test_processor_of_another_model_is_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(copy)
    with pytest.raises(ValueError, match=r"32 x 32 pixels\) does not fit model .* 16 pixels\)"):
        PickScore(folder, copy)
