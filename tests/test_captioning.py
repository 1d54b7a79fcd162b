"""Captions as a model takes them: written at its level, as ids of its words or as vectors of a pretrained encoder."""

import pytest
import torch
import transformers

from physnb.captioning import Captioner, captioner_of
from physnb.checkpoint import load_model, save_model
from physnb.config import Guidance, TextConfig, TrainConfig, preset
from physnb.data import VOCABULARY, encode_captions, simulate, vocabulary_of, write_captions
from physnb.generate import conditions, generate
from physnb.text import load_text_encoder
from physnb.tiny import random_module
from physnb.train import make_batch, train, training_captioner

SMOKE = preset("smoke").train
WIDTH = 16


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Folder of a BERT of random weights that knows the words of pendulums."""
    folder = tmp_path_factory.mktemp("text") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *"0123456789", *vocabulary_of(("pendulum",), "label")]
    words += [word for word in vocabulary_of(("pendulum",), "law") if word.isalpha()]
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=96, **sizes)
    random_module(transformers.BertModel, config, seed=0).save_pretrained(folder)
    transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pendulums():
    return simulate("pendulum", "id", range(3), frames=8, size=16)


@pytest.fixture(scope="module")
def reader(make_model, encoder):
    """A model with random weights that reads laws through the encoder."""
    return make_model(text=dict(level="law", encoder=encoder, width=WIDTH))


# --- encoding


def test_words_become_their_numbers():
    captioner = Captioner(TextConfig(), ("a", "blue", "disc"))
    assert captioner.encode(["a disc", "", "blue, a"])[:, :3].tolist() == [[1, 3, 0], [0, 0, 0], [2, 1, 0]]
    with pytest.raises(ValueError, match="word 'red' is not in the model's vocabulary: a, blue, disc"):
        captioner.encode(["a red disc"])


def test_a_pretrained_encoder_reads_whole_captions(encoder):
    captioner, captions = Captioner(TextConfig("law", encoder, WIDTH)), ["a red disc swings", "", "the rod", ""]
    found = captioner.encode(iter(captions))
    assert found.shape == (4, WIDTH) and found.dtype == torch.float32
    assert torch.equal(found, load_text_encoder(encoder).embed(captions))
    assert (found[[1, 3]] == 0).all() and (found[[0, 2]].norm(dim=1) - 1).abs().max() < 1e-5
    assert torch.equal(captioner.encode(captions[:1]), found[:1])


@pytest.mark.parametrize("read", ["words", "encoder"])
def test_no_caption_is_all_zeros(read, encoder):
    text = TextConfig("law", encoder, WIDTH) if read == "encoder" else TextConfig("law", layers=1)
    found = Captioner(text, () if read == "encoder" else VOCABULARY).encode(["", ""])
    assert len(found) == 2 and (found == 0).all()


def test_captions_are_written_at_the_level_of_the_model(pendulums):
    for level in ("none", "label", "law"):
        assert Captioner(TextConfig(level)).write(pendulums) == write_captions(pendulums, level)
    varied = Captioner(TextConfig("augmented"))
    assert varied.write(pendulums) == write_captions(pendulums, "law")  # asked without a seed
    assert varied.write(pendulums, 1) == write_captions(pendulums, "augmented", 1)


# --- of models


def test_a_model_without_a_word_on_text_has_descriptions_and_learned_words(model, cases):
    captioner = captioner_of(model)
    assert model.config.text is None and captioner == Captioner(TextConfig(), VOCABULARY)
    assert captioner.write(cases) == cases.captions
    caption = conditions(model, cases, 3)[2]
    assert torch.equal(caption, encode_captions(cases.captions)) and not caption.is_floating_point()
    assert (conditions(model, cases, 3, use_captions=False)[2] == 0).all()


def test_a_model_that_reads_through_an_encoder_generates(reader, pendulums, encoder):
    assert captioner_of(reader).text == TextConfig("law", encoder, WIDTH)
    caption = conditions(reader, pendulums, 3)[2]
    assert torch.equal(caption, load_text_encoder(encoder).embed(write_captions(pendulums, "law")))
    made = generate(reader, pendulums, steps=2)
    assert made.frames.shape == pendulums.frames.shape and torch.equal(made.frames[:, :3], pendulums.frames[:, :3])
    bare = generate(reader, pendulums, steps=2, use_captions=False)
    assert (made.frames[:, 3:] != bare.frames[:, 3:]).flatten(1).any(1).all()
    alone = generate(reader, pendulums[1:2], steps=2)
    assert (alone.frames[0].int() - made.frames[1].int()).abs().max() <= 1


def test_text_guidance_moves_away_from_the_clip_without_a_caption(reader, pendulums):
    settings = dict(steps=1, frames_given=3)  # one step: what is made is the prediction itself
    conditional = generate(reader, pendulums, **settings).frames.double()
    bare = generate(reader, pendulums, use_captions=False, **settings).frames.double()
    guided = generate(reader, pendulums, guidance=Guidance(text_weight=2.0), **settings).frames.double()
    assert (guided != conditional).flatten(1).any(1).all()
    expected = conditional + 2 * (conditional - bare)
    shown = (expected > 0) & (expected < 255) & (conditional % 255 > 0) & (bare % 255 > 0)  # nothing was cut off
    shown[:, :3] = False
    assert shown.sum() > 100 and (guided - expected)[shown].abs().max() <= 3.01  # three roundings, weighted
    off = generate(reader, pendulums, guidance=Guidance(text_weight=0.0), **settings).frames
    assert torch.equal(off.double(), conditional)


def test_a_model_trained_on_an_encoder_s_vectors_reads_them_from_its_folder(encoder, pendulums, tmp_path):
    text = TextConfig("augmented", encoder, WIDTH)
    chosen = dict(sources=("pendulum",), source_weights=(1.0,), text=text, steps=2, caption_drop=0.5)
    config = TrainConfig(**vars(SMOKE) | chosen)
    assert training_captioner(config) == Captioner(text)  # no words besides the encoder's
    caption = make_batch(config, torch.arange(32).numpy()).caption
    assert caption.shape == (32, WIDTH) and 4 < (caption == 0).all(1).sum() < 28
    assert len(caption.unique(dim=0)) > 8  # paraphrases
    model = train(config, tmp_path / "run", progress=False)
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert captioner_of(loaded) == captioner_of(model) == Captioner(text)
    assert torch.equal(generate(loaded, pendulums, steps=1).frames, generate(model, pendulums, steps=1).frames)


def test_a_model_whose_encoder_is_gone_says_so(make_model, pendulums, tmp_path):
    model = make_model(text=dict(level="law", encoder=str(tmp_path / "gone"), width=WIDTH))
    with pytest.raises(ValueError, match="gone"):
        generate(model, pendulums, steps=1)
