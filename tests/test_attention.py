"""Broken attention against maps that are built explicitly, token by token, in float64."""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from physnb.attention import AttentionCall, TokenLayout, blur_matrix, broken_output, broken_query
from physnb.config import AXES, PERTURBATION_KINDS, SCOPES, Perturbation

INF = math.inf
SIGMAS = ((1.0, 1.0, 1.0), (0.5, 2.0, 0.0), (INF, 0.7, 0.0), (0.0, 0.0, 0.0), (INF, INF, INF), (1e4, 0.3, 100.0))


@dataclass(frozen=True)
class Sequence:
    """Where the video lies: tokens before and after it, and keys that precede the queries' own."""

    grid: tuple[int, int, int]
    before: int = 0
    after: int = 0
    extra_keys: int = 0

    @property
    def query_places(self) -> list:
        """(time, row, column) of every query's token, None for one that is not video."""
        return [None] * self.before + list(product(*map(range, self.grid))) + [None] * self.after

    @property
    def key_places(self) -> list:
        return [None] * self.extra_keys + self.query_places


VIDEO = Sequence((3, 4, 5))
BOTH_SIDES = Sequence((3, 2, 4), before=4, after=3)
TEXT_KEYS = Sequence((3, 2, 4), extra_keys=5)
MASKED = {"video": Sequence((3, 2, 4)), "text on both sides": BOTH_SIDES, "text keys": TEXT_KEYS}
SMALL = {
    "one frame": Sequence((1, 4, 4)),
    "one place": Sequence((5, 1, 1)),
    "text first": Sequence((2, 3, 4), before=6),
    "video first": Sequence((4, 3, 2), after=6),
    "one place among text": Sequence((5, 1, 1), before=2, after=3),
    "text keys": TEXT_KEYS,
    "text keys and text": Sequence((2, 3, 4), before=2, after=1, extra_keys=3),
}
FORMS = [
    *(Perturbation((), kind=kind, axis=axis) for kind in ("identity", "uniform", "mean_query") for axis in AXES),
    *(Perturbation((), kind="blur", axis=axis, sigma=sigma) for axis in AXES for sigma in SIGMAS),
    *(Perturbation((), kind="temperature", temperature=temperature) for temperature in (0.5, 4.0)),
    Perturbation((), kind="zero"),
]
ONE_OF_EACH = [form for form in FORMS if form.kind not in ("blur", "temperature")] + [
    *(Perturbation((), kind="blur", axis=axis, sigma=(0.5, 2.0, 1.0)) for axis in AXES),
    Perturbation((), kind="temperature", temperature=3.0),
]


def scoped(form: Perturbation, sequence: Sequence) -> list[Perturbation]:
    """`form` in every scope that it allows in `sequence`."""
    scopes = ["video_rows"]
    if form.axis == "all" or sequence.key_places == list(product(*map(range, sequence.grid))):
        scopes.append("all")
    if form.kind == "identity":
        scopes.append("video_block")
    return [replace(form, scope=scope) for scope in scopes]


def refuses_causal(sequence: Sequence, form: Perturbation) -> bool:
    restricted = form.axis != "all" and form.kind in ("identity", "uniform")
    return restricted or (form.scope == "video_block" and None in sequence.key_places)


def name(form: Perturbation) -> str:
    numbers = dict(blur=form.sigma, temperature=(form.temperature,)).get(form.kind, ())
    return "-".join([form.kind, form.axis, form.scope, *map(str, numbers)])


def every(sequences: dict[str, Sequence], forms: list[Perturbation] = ONE_OF_EACH) -> list:
    """pytest parameters (sequence, form): every form in every scope in every sequence."""
    return [
        pytest.param(sequence, form, id=f"{where}-{name(form)}")
        for where, sequence in sequences.items()
        for one in forms
        for form in scoped(one, sequence)
    ]


def make_mask(kind: str, rows: int, heads: int, queries: int, keys: int, generator: torch.Generator):
    """A mask as attention takes it, and the numbers that it adds to every [row, head, query, key]."""
    closed_keys = torch.rand(rows, keys, generator=generator) < 0.3
    closed_pairs = torch.rand(queries, keys, generator=generator) < 0.3
    added = torch.zeros(rows, heads, queries, keys, dtype=torch.float64)
    if kind in ("keys", "flat keys"):
        added[closed_keys[:, None, None].expand_as(added)] = -INF
        return ~closed_keys if kind == "flat keys" else ~closed_keys[:, None, None], added
    if kind in ("flat pairs", "closed rows"):
        if kind == "closed rows":
            closed_pairs[torch.rand(queries, generator=generator) < 0.3] = True
        added[closed_pairs.expand_as(added)] = -INF
        return ~closed_pairs if kind == "flat pairs" else ~closed_pairs[None, None], added
    if kind == "head pairs":  # without rows
        closed = torch.rand(heads, queries, keys, generator=generator) < 0.3
        added[closed.expand_as(added)] = -INF
        return ~closed, added
    if kind == "queries":  # the same for every key
        closed = torch.rand(rows, 1, queries, 1, generator=generator) < 0.3
        added[closed.expand_as(added)] = -INF
        return ~closed, added
    if kind in ("bias", "pair bias"):  # never on all keys along an axis: a sum of -10000 and a logit is too coarse
        closed = torch.arange(keys) % 7 == 2
        added[..., closed] = -10_000
        return (added if kind == "pair bias" else added[:, :, :1]).float(), added
    assert kind == "causal"
    added[torch.ones(queries, keys).tril().logical_not().expand_as(added)] = -INF
    return None, added


class Problem:
    """Random inputs of attention, with the oracle's own account of masks and shared heads."""

    def __init__(self, sequence, mask=None, rows=2, heads=3, key_heads=None, channels=6, scale=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        queries, keys = len(sequence.query_places), len(sequence.key_places)

        def draw(heads: int, tokens: int, width: int) -> torch.Tensor:
            return torch.randn(rows, heads, tokens, width, generator=generator)

        key_heads = key_heads or heads
        query = 1.5 * draw(heads, queries, channels)
        key, value = draw(key_heads, keys, channels), draw(key_heads, keys, channels - 1)
        self.sequence, self.causal = sequence, mask == "causal"
        self.added, given = torch.zeros(rows, heads, queries, keys, dtype=torch.float64), None
        if mask is not None:
            given, self.added = make_mask(mask, rows, heads, queries, keys, generator)
        layout = TokenLayout(sequence.grid, sequence.before)
        self.call = AttentionCall(query, key, value, given, self.causal, scale, layout)
        self.query = query.double()
        self.key = torch.stack([key[:, head * key_heads // heads] for head in range(heads)], 1).double()
        self.value = torch.stack([value[:, head * key_heads // heads] for head in range(heads)], 1).double()
        self.scale = 1 / math.sqrt(channels) if scale is None else scale

    def products(self, query: torch.Tensor) -> torch.Tensor:
        """What the softmax sees without a mask, [row, head, query, key]."""
        return torch.einsum("nhqc,nhkc->nhqk", query, self.key) * self.scale

    def logits(self, query: torch.Tensor) -> torch.Tensor:
        """What the softmax sees."""
        return self.products(query) + self.added


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over keys; a query that may read none has weights 0."""
    return torch.where((logits == -INF).all(-1, keepdim=True), 0.0, logits.softmax(-1))


def unbroken(axis: str, place: tuple) -> tuple:
    """The coordinates along which a token keeps to itself when attention is broken along `axis`."""
    return dict(all=place, space=place[1:], time=place[:1])[axis]


def together(axis: str, place: tuple) -> tuple:
    """The coordinates that tokens averaged over `axis` have in common."""
    return dict(all=(), space=place[:1], time=place[1:])[axis]


@cache
def reflected_blur(side: int, sigma: float) -> list[list[float]]:
    """Gaussian blur of every unit vector along one axis, [blurred place][original place]."""
    if sigma > 9999:
        return [[1 / side] * side for _ in range(side)]
    if sigma == 0 or side == 1:
        return torch.eye(side).tolist()
    wanted = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    taps = min(wanted, side if side % 2 == 1 else side + 1)
    kernel = torch.tensor([math.exp(-((tap - taps // 2) ** 2) / (2 * sigma**2)) for tap in range(taps)]).double()
    units = F.pad(torch.eye(side, dtype=torch.float64)[:, None], (taps // 2, taps // 2), mode="reflect")
    return F.conv1d(units, (kernel / kernel.sum())[None, None])[:, 0].T.tolist()


@cache
def query_mix(sequence: Sequence, form: Perturbation) -> torch.Tensor:
    """[query, query]: how much of every query (every row of the map for uniform) is in every broken one."""
    places = sequence.query_places
    mix = torch.eye(len(places), dtype=torch.float64)  # also of tokens that are not video
    if form.kind == "mean_query" and form.axis == "all" and form.scope == "all":
        return torch.full_like(mix, 1 / len(places))
    blurred = dict(all=(0, 1, 2), space=(1, 2), time=(0,))[form.axis]
    widths = [form.sigma[axis] if axis in blurred else 0.0 for axis in range(3)]
    blurs = [reflected_blur(side, width) for side, width in zip(sequence.grid, widths, strict=True)]
    video = [index for index, place in enumerate(places) if place is not None]
    for one, other in product(video, video):
        if form.kind == "blur":
            mix[one, other] = math.prod(
                blur[a][b] for blur, a, b in zip(blurs, places[one], places[other], strict=True)
            )
        else:
            mix[one, other] = together(form.axis, places[one]) == together(form.axis, places[other])
    return mix / mix.sum(1, keepdim=True)


def reads_text(sequence: Sequence, form: Perturbation) -> bool:
    return form.scope == "video_block" and None in sequence.key_places


@cache
def readable(sequence: Sequence, form: Perturbation) -> torch.Tensor:
    """[query, key]: what attention broken to the identity leaves to read."""
    queries, keys = sequence.query_places, sequence.key_places
    table = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for query, key in product(range(len(queries)), range(len(keys))):
        if queries[query] is None:
            table[query, key] = key == query + sequence.extra_keys
        elif keys[key] is None:
            table[query, key] = reads_text(sequence, form)
        else:
            table[query, key] = unbroken(form.axis, queries[query]) == unbroken(form.axis, keys[key])
    return table


def broken_map(problem: Problem, form: Perturbation) -> torch.Tensor:
    """The map in the place of attention's, [row, head, query, key]."""
    sequence, normal = problem.sequence, softmax(problem.logits(problem.query))
    if form.kind == "zero":
        broken = torch.zeros_like(normal)
    elif form.kind == "temperature":
        broken = softmax(problem.products(problem.query) / form.temperature + problem.added)
    elif form.kind in ("mean_query", "blur"):
        broken = softmax(problem.logits(torch.einsum("qp,nhpc->nhqc", query_mix(sequence, form), problem.query)))
    elif form.kind == "uniform" and form.axis == "all":
        allowed = (problem.added > -1000).double()
        broken = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
    elif form.kind == "identity" and form.axis == "all" and not reads_text(sequence, form):
        broken = readable(sequence, form).double().expand_as(normal)  # whatever a mask says
    else:
        broken = softmax(problem.logits(problem.query).masked_fill(~readable(sequence, form), -INF))
        if form.kind == "uniform":
            broken = torch.einsum("qp,nhpk->nhqk", query_mix(sequence, form), broken)
    if form.scope != "all":
        text = [query for query, place in enumerate(sequence.query_places) if place is None]
        broken = broken.clone()
        broken[:, :, text] = normal[:, :, text]
    return broken


def check(problem: Problem, form: Perturbation) -> None:
    """The module's output is that of the explicit maps, whether broken or not."""
    output = problem.call.attend()
    normal = softmax(problem.logits(problem.query)) @ problem.value
    torch.testing.assert_close(output, normal.float(), atol=1e-5, rtol=0)
    broken = broken_output(problem.call, form, output)
    torch.testing.assert_close(broken, (broken_map(problem, form) @ problem.value).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sequence", "form"), every({"video": VIDEO, "text on both sides": BOTH_SIDES}, FORMS) + every(SMALL)
)
def test_every_form_equals_its_explicit_map(sequence, form):
    check(Problem(sequence), form)


@pytest.mark.parametrize("mask", ["keys", "closed rows", "bias"])
@pytest.mark.parametrize(("sequence", "form"), every(MASKED))
def test_every_form_respects_a_mask(sequence, form, mask):
    check(Problem(sequence, mask), form)


@pytest.mark.parametrize("mask", ["flat keys", "flat pairs", "head pairs", "queries", "pair bias"])
@pytest.mark.parametrize(("sequence", "form"), every({"text on both sides": BOTH_SIDES}))
def test_a_mask_may_have_any_shape_that_broadcasts(sequence, form, mask):
    check(Problem(sequence, mask), form)


@pytest.mark.parametrize(
    ("sequence", "form"),
    [one for one in every({"video": VIDEO, "text on both sides": BOTH_SIDES}) if not refuses_causal(*one.values)],
)
def test_attention_may_be_causal(sequence, form):
    check(Problem(sequence, "causal"), form)


@pytest.mark.parametrize("mask", [None, "keys"])
@pytest.mark.parametrize(("sequence", "form"), every({"text keys": TEXT_KEYS, "text on both sides": BOTH_SIDES}))
def test_query_heads_may_share_keys_and_values(sequence, form, mask):
    check(Problem(sequence, mask, heads=4, key_heads=2), form)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize(("sequence", "form"), every({"text on both sides": BOTH_SIDES}))
def test_every_form_keeps_the_scale(sequence, form, scale):
    check(Problem(sequence, scale=scale), form)


@pytest.mark.parametrize("mask", [None, "keys", "closed rows", "head pairs", "bias"])
@pytest.mark.parametrize(("sequence", "form"), every({"text on both sides": BOTH_SIDES}, ONE_OF_EACH[::2]))
def test_selected_rows_and_heads_are_those_of_the_whole(sequence, form, mask):
    call = Problem(sequence, mask, rows=3, heads=4, key_heads=2).call
    rows, heads = torch.tensor([2, 0]), torch.tensor([3, 0, 1])
    output = call.attend()
    part = call.select(rows, heads)
    torch.testing.assert_close(part.attend(), output[rows][:, heads])
    whole = broken_output(call, form, output)
    torch.testing.assert_close(broken_output(part, form, output[rows][:, heads]), whole[rows][:, heads])


@pytest.mark.parametrize("mask", [None, "closed rows", "bias"])
@pytest.mark.parametrize(("sequence", "form"), every({"text on both sides": BOTH_SIDES}))
def test_half_precision_keeps_its_type_and_costs_little(sequence, form, mask):
    call = Problem(sequence, mask, scale=2.0).call  # a bias stays in float32
    names = ("query", "key", "value")
    half = replace(call, **{name: getattr(call, name).bfloat16() for name in names})
    exact = replace(call, **{name: getattr(half, name).float() for name in names})
    broken = broken_output(half, form, half.attend())
    assert broken.dtype == torch.bfloat16
    assert broken.isfinite().all()
    tolerance = 0.2 if form.kind in ("mean_query", "blur") else 0.03  # those round the broken query too
    torch.testing.assert_close(broken.float(), broken_output(exact, form, exact.attend()), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("sequence", "form"), every({"text on both sides": BOTH_SIDES}))
def test_inputs_are_not_written_to(sequence, form):
    call = Problem(sequence, "bias").call
    tensors = (call.query, call.key, call.value, call.mask, call.attend())
    before = [tensor.clone() for tensor in tensors]
    broken_output(call, form, tensors[-1])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def official_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """The filter of SEG on a square image, [row, channel, side, side]: github.com/SusungHong/SEG-SDXL."""
    if sigma > 9999:
        return image.mean((2, 3), keepdim=True).expand_as(image)
    channels, side = image.shape[1], image.shape[-1]
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    size = min(size, side - (side % 2 - 1))
    reach = (size - 1) / 2
    weights = torch.exp(-0.5 * (torch.linspace(-reach, reach, size) / sigma) ** 2)
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights).expand(channels, 1, size, size)
    return F.conv2d(F.pad(image, (size // 2,) * 4, mode="reflect"), kernel, groups=channels)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.5, 100.0, 1e4, INF])
@pytest.mark.parametrize("side", [2, 3, 4, 7, 8])
def test_blur_of_a_square_frame_is_that_of_seg(side, sigma):
    call = Problem(Sequence((1, side, side))).call
    image = call.query.transpose(2, 3).flatten(1, 2).unflatten(2, (side, side))  # [row, head channel, side, side]
    expected = official_blur(image, sigma).flatten(2).unflatten(1, (3, -1)).transpose(2, 3)
    for axis in ("all", "space"):
        form = Perturbation((), kind="blur", axis=axis, sigma=(1.0, sigma, sigma))
        torch.testing.assert_close(broken_query(call, form), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.4, 1.0, 3.0, 9999.0, 1e7, INF])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 13])
def test_blur_keeps_a_constant(side, sigma):
    matrix = blur_matrix(side, sigma)
    assert matrix.shape == (side, side)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(side))


def test_blur_of_a_known_width():
    near, far = math.exp(-1 / 2), math.exp(-4 / 2)  # one and two tokens away at sigma 1
    rows = [
        [1, 2 * near, 2 * far, 0, 0],  # reflected at the border
        [near, 1 + far, near, far, 0],
        [far, near, 1, near, far],
    ]
    expected = torch.tensor(rows) / (1 + 2 * near + 2 * far)  # seven taps, of which a side of 5 leaves five
    torch.testing.assert_close(blur_matrix(5, 1.0), torch.cat([expected, expected[:2].flip(0, 1)]))


LIMIT_SEQUENCES = [VIDEO, SMALL["one frame"], SMALL["one place"]]


def broken_and_normal(sequence: Sequence, mask: str | None = None, **settings):
    """The broken output, the normal one and the values."""
    call = Problem(sequence, mask).call
    output = call.attend()
    return broken_output(call, Perturbation((), **settings), output), output, call.value


@pytest.mark.parametrize("mask", [None, "keys", "bias"])
@pytest.mark.parametrize("sequence", [VIDEO, BOTH_SIDES, TEXT_KEYS])
def test_temperature_goes_from_normal_to_uniform(sequence, mask):
    broken, normal, _ = broken_and_normal(sequence, mask, kind="temperature", temperature=1.0)
    torch.testing.assert_close(broken, normal)
    broken, _, _ = broken_and_normal(sequence, mask, kind="temperature", temperature=1e6)
    uniform, _, _ = broken_and_normal(sequence, mask, kind="uniform")
    torch.testing.assert_close(broken, uniform, atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sequence", LIMIT_SEQUENCES)
def test_blur_goes_from_normal_to_the_mean_query(sequence, axis):
    broken, normal, _ = broken_and_normal(sequence, kind="blur", axis=axis, sigma=(0.0, 0.0, 0.0))
    torch.testing.assert_close(broken, normal)
    broken, _, _ = broken_and_normal(sequence, kind="blur", axis=axis, sigma=(INF, INF, INF))
    mean_query, _, _ = broken_and_normal(sequence, kind="mean_query", axis=axis)
    torch.testing.assert_close(broken, mean_query)


@pytest.mark.parametrize("sequence", LIMIT_SEQUENCES)
def test_uniform_is_the_mean_of_values(sequence):
    broken, _, value = broken_and_normal(sequence, kind="uniform")
    torch.testing.assert_close(broken, value.mean(2, keepdim=True).expand_as(value))


@pytest.mark.parametrize("scope", SCOPES)
def test_identity_is_the_value_itself(scope):
    broken, _, value = broken_and_normal(VIDEO, kind="identity", scope=scope)
    assert torch.equal(broken, value)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("sequence", "one_frame"), [(SMALL["one frame"], True), (SMALL["one place"], False)], ids=["frame", "place"]
)
def test_identity_on_a_single_frame_or_place(sequence, one_frame, scope):
    through, kept = ("space", "time") if one_frame else ("time", "space")  # broken along the axis that has a length
    broken, _, value = broken_and_normal(sequence, kind="identity", axis=through, scope=scope)
    torch.testing.assert_close(broken, value)
    broken, normal, _ = broken_and_normal(sequence, kind="identity", axis=kept, scope=scope)
    torch.testing.assert_close(broken, normal)


@pytest.mark.parametrize("kind", [kind for kind in PERTURBATION_KINDS if kind not in ("temperature", "zero")])
@pytest.mark.parametrize("axis", ["space", "time"])
def test_an_axis_needs_a_token_grid(kind, axis):
    call = replace(Problem(VIDEO).call, layout=None)
    with pytest.raises(ValueError, match="needs the token grid"):
        broken_output(call, Perturbation((), kind=kind, axis=axis), call.attend())


@pytest.mark.parametrize(
    "settings",
    [
        dict(kind="blur"),
        dict(scope="video_block"),
        *(dict(kind=kind, scope="video_rows") for kind in PERTURBATION_KINDS),
    ],
    ids=str,
)
def test_blur_and_scopes_need_a_token_grid(settings):
    call = replace(Problem(VIDEO).call, layout=None)
    with pytest.raises(ValueError, match="needs the token grid"):
        broken_output(call, Perturbation((), **settings), call.attend())


@pytest.mark.parametrize("kind", [kind for kind in PERTURBATION_KINDS if kind != "blur"])
def test_other_forms_need_no_token_grid(kind):
    call = Problem(BOTH_SIDES).call
    output, form = call.attend(), Perturbation((), kind=kind)
    expected = broken_output(call, form, output)
    assert torch.equal(broken_output(replace(call, layout=None), form, output), expected)


@pytest.mark.parametrize("kind", ["identity", "uniform", "mean_query", "blur"])
@pytest.mark.parametrize("axis", ["space", "time"])
@pytest.mark.parametrize("where", ["text first", "video first", "text keys"])
def test_an_axis_among_other_tokens_needs_a_scope(where, axis, kind):
    call = Problem(SMALL[where]).call
    with pytest.raises(ValueError, match=f"axis '{axis}' among other tokens needs scope 'video_rows'"):
        broken_output(call, Perturbation((), kind=kind, axis=axis), call.attend())


@pytest.mark.parametrize("kind", ["identity", "uniform"])
@pytest.mark.parametrize("axis", ["space", "time"])
def test_causal_attention_is_not_restricted_to_an_axis(axis, kind):
    call = Problem(VIDEO, "causal").call
    with pytest.raises(ValueError, match="a causal attention cannot be restricted to one axis; use axis 'all'"):
        broken_output(call, Perturbation((), kind=kind, axis=axis), call.attend())


def test_causal_attention_has_no_video_block():
    call = Problem(BOTH_SIDES, "causal").call
    with pytest.raises(ValueError, match="a causal attention cannot be broken with scope 'video_block'"):
        broken_output(call, Perturbation((), scope="video_block"), call.attend())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="mean"), r"unknown perturbation kind 'mean'; choose one of identity, uniform, mean_query"),
        (dict(axis="width"), r"unknown perturbation axis 'width'; choose one of all, space, time"),
        (dict(scope="text"), r"unknown perturbation scope 'text'; choose one of all, video_rows, video_block"),
        (dict(kind="temperature", axis="space"), r"kind 'temperature' has no axis; use axis 'all'"),
        (dict(kind="zero", axis="time"), r"kind 'zero' has no axis; use axis 'all'"),
        *(
            (dict(kind=kind, scope="video_block"), rf"scope 'video_block' is .* 'identity' only, not '{kind}'")
            for kind in PERTURBATION_KINDS
            if kind != "identity"
        ),
        (dict(kind="blur", sigma=(1.0, -0.5, 1.0)), r"sigma must be three widths >= 0, got \(1.0, -0.5, 1.0\)"),
        (dict(kind="blur", sigma=(1.0, 1.0)), r"sigma must be three widths >= 0"),
        (dict(kind="temperature", temperature=0.0), r"temperature must be positive, got 0.0"),
        (dict(kind="temperature", temperature=-1.0), r"temperature must be positive, got -1.0"),
        (dict(kind="temperature", temperature=math.nan), r"temperature must be positive, got nan"),
    ],
)
def test_a_form_that_is_not_defined_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Perturbation((), **settings)
