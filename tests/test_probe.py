"""The probe finds by running a model what the table of families knows of it, and refuses what it cannot see."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from physnb.config import Perturbation
from physnb.families import FAMILIES as KNOWN
from physnb.families import attention_layers, family_of, heads_of, token_grid, token_layout
from physnb.hooks import perturb_rows
from physnb.probe import learn_family, probe_family, self_test
from physnb.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
PROBED = (
    "wan wan-per-token-time wan-i2v wan-vace skyreels skyreels-causal chronoedit anyflow cogvideox cogvideox-1.5 "
    "consisid easyanimate hunyuan hunyuan-i2v framepack hunyuan-1.5 motif allegro cosmos kandinsky5 helios wan-animate"
).split()


@pytest.fixture(params=PROBED)
def slug(request):
    return request.param


def test_probe_agrees_with_the_table(slug):
    model, inputs = tiny_model(slug), FAMILIES[slug].inputs()
    known, found = family_of(model), probe_family(model, inputs)
    assert (found.latent, found.interleaved, found.rows) == (known.latent, known.interleaved, known.rows)
    present = tuple((name, path) for name, path in known.blocks if len(getattr(model, name, ())) > 0)
    assert found.blocks == present
    grid, layer = token_grid(model, inputs), attention_layers(model)[0]
    tokens = self_test(model, inputs)[0].tokens
    layout = token_layout(model, layer, inputs, tokens)
    KNOWN[type(model).__name__], before = found, KNOWN[type(model).__name__]
    try:
        assert token_grid(model, inputs) == grid
        assert token_layout(model, layer, inputs, tokens) == layout
    finally:
        KNOWN[type(model).__name__] = before


class Processor:
    """Attention as diffusers' models have it: a module hands its work to one of these."""

    def __call__(self, attn, x):
        query, key, value = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in attn.to_qkv(x).chunk(3, -1))
        return attn.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.processor = heads, Processor()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.processor(self, x)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.mixing = nn.ModuleDict({"attention": Attention(width, heads)})

    def forward(self, x):
        return x + self.mixing["attention"](x)


class StrangeTransformer(nn.Module):
    """A model in no table: two text tokens, the video (time x height x width patches of 1 x 2 x 2), one more token."""

    def __init__(self, order="thw", silent=False):
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.embed, self.out = nn.Linear(3 * 4, 16), nn.Linear(16, 3 * 4)
        self.stages = nn.ModuleList(Block(16, 4) for _ in range(3))
        if silent:
            nn.init.zeros_(self.stages[1].mixing["attention"].to_out.weight)

    def forward(self, hidden_states, text):
        patches = hidden_states.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # b t c h 2 w 2
        axes = dict(t=1, h=3, w=5)
        tokens = patches.permute(0, *(axes[a] for a in self.order), 2, 4, 6).flatten(4).flatten(1, 3)
        x = torch.cat([text[:, :2], self.embed(tokens), text[:, 2:]], 1)
        for block in self.stages:
            x = block(x)
        return (self.out(x[:, 2:-1]),)


@pytest.fixture
def stranger_inputs():
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(2, 3, 3, 8, 10, generator=generator), text=torch.randn(2, 3, 16, generator=generator)
    )


@pytest.fixture
def forget():
    yield
    KNOWN.pop("StrangeTransformer", None)


def test_a_learnt_model_is_like_any_other(stranger_inputs, forget):
    model = StrangeTransformer()
    with pytest.raises(ValueError, match=r"StrangeTransformer is not a known video transformer; call physnb\.probe"):
        heads_of(model)
    family = learn_family(model, stranger_inputs)
    assert family.blocks == (("stages", "mixing.attention"),) and family.latent == "BTCHW"
    assert [str(head) for head in heads_of(model)][-1] == "L2H3" and len(heads_of(model)) == 12
    layout = token_layout(model, attention_layers(model)[0], stranger_inputs, 3 + 60)
    assert layout.grid == (3, 4, 5) and layout.before == 2
    plain = model(**stranger_inputs)[0]
    with perturb_rows(model, Perturbation("L1H2", kind="blur", scope="video_rows")):
        assert (model(**stranger_inputs)[0] - plain).abs().max() > 1e-4
    assert torch.equal(model(**stranger_inputs)[0], plain)
    with pytest.raises(ValueError, match="StrangeTransformer is known already"):
        learn_family(model, stranger_inputs)


def test_a_layer_without_effect_is_refused_and_nothing_is_learnt(stranger_inputs):
    with pytest.raises(ValueError, match=r"all heads of stages\.1\.mixing\.attention changes nothing"):
        learn_family(StrangeTransformer(silent=True), stranger_inputs)
    assert "StrangeTransformer" not in KNOWN


def test_another_token_order_is_refused(stranger_inputs):
    with pytest.raises(ValueError, match="its 60 video tokens are not in the order time, height, width"):
        probe_family(StrangeTransformer("hwt"), stranger_inputs)


@pytest.mark.parametrize(
    "slug, reason",
    [
        ("ltx", "its hidden_states are no latent clip of five dimensions"),
        ("latte", "no scaled dot product self-attention over whole clips"),  # frames and places are rows of their own
        ("sana-video", "no scaled dot product self-attention over whole clips"),
    ],
)
def test_what_the_probe_cannot_see_is_refused(slug, reason):
    with pytest.raises(ValueError, match=reason):
        probe_family(tiny_model(slug), FAMILIES[slug].inputs())


def test_self_test_reports_every_layer():
    rows = self_test(tiny_model("mochi"), FAMILIES["mochi"].inputs(2))
    assert [(row.path, row.calls) for row in rows] == [
        ("transformer_blocks.0.attn1", 2),  # one a clip
        ("transformer_blocks.1.attn1", 2),
    ]
    assert all(row.effect > 0 for row in rows)


def test_self_test_finds_a_head_count_that_is_not_true():
    model, inputs = tiny_model("wan"), FAMILIES["wan"].inputs()
    attention = attention_layers(model)[1].module
    attention.heads = 4  # the processor splits by this, so the norm's weights still fit
    with perturb_rows(model, Perturbation("L1H0")), torch.no_grad():
        attention.heads = 2
        with pytest.raises(ValueError, match=r"blocks\.1\.attn1 runs 2 heads in place of its 4"):
            model(**inputs)
