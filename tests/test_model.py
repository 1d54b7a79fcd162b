from dataclasses import asdict

import pytest
import torch

from physnb.config import SCENARIOS, preset
from physnb.data import CAPTIONS, VOCABULARY, encode_captions, vocabulary_of
from physnb.model import VideoDiT, rotary_table, rotate


def test_unpatchify_undoes_patchify(model):
    clip = torch.randn(2, *model.clip_shape)
    assert torch.equal(model.unpatchify(model.patchify(clip)), clip)


def test_a_token_is_one_block_of_the_clip_in_grid_order(model):
    clip = torch.arange(torch.tensor(model.clip_shape).prod()).float().view(1, *model.clip_shape)
    tokens = model.patchify(clip)
    (_, h, w), (pt, ph, pw) = model.grid, model.patch
    time, row, column = 2, 1, 0
    block = clip[:, :, time * pt : (time + 1) * pt, row * ph : (row + 1) * ph, column * pw : (column + 1) * pw]
    assert torch.equal(tokens[:, (time * h + row) * w + column], block.flatten(1))


def test_rotated_products_depend_on_relative_positions_only():
    grid, width = (4, 3, 3), 24
    table = rotary_table(grid, width)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, width, generator=generator)
    tokens = len(table)
    q, k = (rotate(x.expand(1, tokens, width), table)[0] for x in (query, key))
    products = (q @ k.T).view(*grid, *grid)
    # the same step in time, row and column gives the same product wherever it starts
    for dt, dh, dw in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 1)):
        same = [
            products[t, h, w, t + dt, h + dh, w + dw]
            for t in range(grid[0] - dt)
            for h in range(grid[1] - dh)
            for w in range(grid[2] - dw)
        ]
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), atol=1e-5, rtol=1e-5)
    # and another step gives another product: every axis is seen
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert (products[0, 0, 0][other] - products[0, 0, 0, 0, 0, 0]).abs() > 1e-3


def test_rotation_keeps_length_and_treats_heads_alike():
    table = rotary_table((2, 2, 2), 8)
    x = torch.randn(1, 8, 8)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(torch.cat([x, x], -1), table), torch.cat([rotate(x, table)] * 2, -1))


def test_new_model_predicts_the_same_for_any_input(inputs):
    # gates and output weights start at zero, so training begins from empty ground, whatever the input
    fresh = VideoDiT(**asdict(preset("smoke").train.model), vocabulary=VOCABULARY).eval()
    with torch.no_grad():
        one = fresh(**inputs).sample
        other = fresh(**inputs | dict(sample=torch.zeros_like(inputs["sample"]))).sample
    assert torch.equal(one, other) and (one == one[0, 0, 0, 0, 0]).all()


def test_a_caption_is_the_set_of_its_words(model, inputs):
    captions = [CAPTIONS[scenario] for scenario in SCENARIOS] * 2
    ids = encode_captions(captions)
    reversed_words = encode_captions(" ".join(reversed(caption.split())) for caption in captions)
    with torch.no_grad():
        one, other = (model(**inputs | dict(caption=i)).sample for i in (ids, reversed_words))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert (one[0] - model(**inputs | dict(caption=ids.roll(1, 0))).sample[0]).abs().max() > 1e-3


def test_no_caption_is_a_condition_of_its_own(model):
    sigma = torch.full((2,), 0.5)
    none, some = model.embed_condition(sigma, encode_captions(["", "a red disc moves at constant speed"]))
    assert none.isfinite().all() and (none - some).abs().max() > 1e-3
    expected = model.embed_condition(sigma, torch.zeros(2, 3, dtype=torch.long))[0]  # shorter padding, same caption
    torch.testing.assert_close(none, expected)


def test_captions_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"caption word 'cube' is not in the model's vocabulary: .*disc"):
        encode_captions(["a red cube"])


def reading_model(**text) -> VideoDiT:
    """A model of the smoke preset that reads captions another way, with open gates so that they matter."""
    words = vocabulary_of(("orbit",), "law") if not text.get("encoder") else ()
    model = VideoDiT(**asdict(preset("smoke").train.model), vocabulary=words, text=text).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_text_layers_read_words_in_their_order_whatever_the_padding():
    model, words = reading_model(level="law", layers=1), vocabulary_of(("orbit",), "law")
    one, other, none = encode_captions(
        ["its radius is 0.7, the pull is 31", "its pull is 0.7, the radius is 31", ""], words
    )
    with torch.no_grad():
        read = model.embed_caption(torch.stack([one, other, none]))
        longer = model.embed_caption(torch.nn.functional.pad(one[None], (0, 20)))
    assert (read[0] - read[1]).abs().max() > 1e-3 and read.isfinite().all()
    torch.testing.assert_close(read[:1], longer, atol=1e-5, rtol=1e-5)


def test_embeddings_of_a_pretrained_encoder_are_projected(inputs):
    model = reading_model(encoder="anywhere", width=24)
    caption = torch.randn(6, 24)
    with torch.no_grad():
        one, other = (model(**inputs | dict(caption=c)).sample for c in (caption, caption.roll(1, 0)))
    assert one.isfinite().all() and (one - other).abs().max() > 1e-4


def test_start_frames_are_read_only_where_given(model, inputs):
    given = inputs["given"]
    hidden = torch.where(given[:, None, :, None, None] > 0, inputs["start"], 7.0)
    changed = inputs["start"] + given[:, None, :, None, None]
    with torch.no_grad():
        plain, with_hidden, with_changed = (
            model(**inputs | dict(start=s)).sample for s in (inputs["start"], hidden, changed)
        )
    assert torch.equal(plain, with_hidden)
    has_start = given.any(1)
    differs = (plain != with_changed).flatten(1).any(1)
    assert torch.equal(differs, has_start) and has_start.any() and not has_start.all()


def test_black_start_frames_differ_from_none(model, inputs):
    # the mask channel says that zeros are given rather than absent
    zeros = torch.zeros_like(inputs["start"])
    with torch.no_grad():
        given = model(**inputs | dict(start=zeros)).sample
        absent = model(**inputs | dict(start=zeros, given=torch.zeros_like(inputs["given"]))).sample
    assert (given - absent)[:4].abs().max() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(model, inputs):
    with torch.no_grad():
        together = model(**inputs).sample
        for row in (0, 3, 5):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).sample
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"patch \(2, 8, 8\) must divide frames 9"):
        VideoDiT(frames=9)


def test_model_runs_in_bfloat16(make_model, inputs):
    model = make_model()
    with torch.no_grad():
        exact = model(**inputs).sample
        half = {k: v if k == "caption" else v.bfloat16() for k, v in inputs.items()}
        rough = model.bfloat16()(**half).sample
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
