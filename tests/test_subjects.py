import copy
import json

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from physnb import subjects
from physnb.checkpoint import fingerprint, load_model
from physnb.config import Guidance, HuntConfig, LayerSkip, OtherModel, Perturbation, head_set
from physnb.data import Clip, simulate
from physnb.families import heads_of
from physnb.guide import guide
from physnb.objectives import OBJECTIVES, Objective, clip_judge
from physnb.pretrained import generate_clips, load_pipeline
from physnb.ranking import rank_heads
from physnb.store import TrialStore
from physnb.subjects import ModelSubject, PipelineSubject, simulated_subject
from physnb.tiny_pipelines import PIPELINES, tiny_pipeline
from physnb.trials import Trials

OFF = Guidance()
HEADS = Guidance.from_heads("L0H1,L1H2", 2.0)
HUNT = HuntConfig(split="id", selection_cases=2, confirmation_cases=3, top_k=2, steps=2)
TRACKING = OBJECTIVES["tracking_error"]


class Camera:
    """An objective that keeps the clips it is shown: the mean of their pixels."""

    def __init__(self):
        self.clips: list[Clip] = []

    def objective(self):
        def brightness(generated, true):
            self.clips.append(generated)
            return generated.frames.float().mean((1, 2, 3, 4))

        return Objective("brightness", clip_judge(brightness))

    def frames(self):
        """What was shown since the last call."""
        clips, self.clips = Clip.concatenate(self.clips), []
        return clips.frames.int()


# --- fingerprints


def test_fingerprint_changes_with_every_weight(make_model):
    model = make_model()
    found = {fingerprint(model)}
    for value in model.state_dict().values():
        before = value.flatten()[0].item()
        value.view(-1)[0] += 1e-3
        found.add(fingerprint(model))
        value.view(-1)[0] = before
    assert len(found) == 1 + len(model.state_dict()) > 30
    assert fingerprint(model) == fingerprint(make_model())


def test_fingerprint_changes_with_every_entry_of_the_config(make_model):
    model = make_model()
    entries = {name: value for name, value in model.config.items() if not name.startswith("_")}
    found = {fingerprint(model)}
    for name, value in entries.items():
        other, changed = copy.deepcopy(model), "set" if value is None else value
        if value is not None:
            changed = (*value, 1) if isinstance(value, (tuple, list)) else value + 1
        other.register_to_config(**{name: changed})
        found.add(fingerprint(other))
    assert len(found) == 1 + len(entries) > 10


def test_fingerprint_is_of_contents_alone(make_model, model_folder):
    model = make_model()
    expected = fingerprint(model)
    assert len(expected) == 12 and int(expected, 16) > 0
    assert fingerprint(load_model(model_folder)) == expected
    assert fingerprint(copy.deepcopy(model).train().requires_grad_(True)) == expected
    turned = copy.deepcopy(model)
    turned.head.weight.data = turned.head.weight.data.t().contiguous().t()  # the same numbers elsewhere in memory
    assert not turned.head.weight.is_contiguous() and fingerprint(turned) == expected
    assert fingerprint(copy.deepcopy(model).double()) != expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fingerprint_is_the_same_on_a_gpu(make_model):
    model = make_model()
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).to("cuda"))


def test_fingerprint_of_any_module():
    def module(weight, **buffers):
        made = nn.Module()
        made.weight = nn.Parameter(weight)
        for name, value in buffers.items():
            made.register_buffer(name, value)
        return made

    scalar = torch.tensor(2.0, dtype=torch.bfloat16)
    found = [
        module(torch.arange(6.0)),
        module(torch.arange(6.0).view(2, 3)),
        module(torch.arange(6.0).view(3, 2)),
        module(torch.arange(6.0).bfloat16()),
        module(torch.arange(6.0), steps=scalar),
        module(torch.arange(6.0), steps=scalar.float()),
        module(torch.arange(6.0), steps=torch.tensor(3)),
        module(torch.zeros(0)),
    ]
    assert len({fingerprint(one) for one in found}) == len(found)


# --- identity and case names


def test_identity_holds_all_that_decides_a_score(model, make_model, cases):
    def identity(of=model, objective=TRACKING, **settings):
        return ModelSubject(of, cases, objective, **settings).identity

    plain = identity()
    json.dumps(plain, allow_nan=False)
    changed = [
        identity(make_model(1)),
        identity(objective=OBJECTIVES["reward"]),
        identity(objective=OBJECTIVES["preference_error"]),
        identity(frames_given=2),
        identity(steps=6),
        identity(solver="heun"),
        identity(seed=1),
        identity(others=dict(early=make_model(1))),
        identity(others=dict(early=make_model(2))),
        identity(others=dict(late=make_model(1))),
    ]
    assert len({json.dumps(found, sort_keys=True) for found in [plain, *changed]}) == 1 + len(changed)
    # scores of one judge are stored together, whichever of them decides; nothing is sampled for losses
    assert (
        plain
        == identity(make_model(), OBJECTIVES["position_error"])
        == ModelSubject(model, cases[:1], TRACKING).identity
    )
    of_losses = [
        identity(objective=OBJECTIVES["preference_margin"], **s) for s in ({}, dict(steps=9), dict(solver="heun"))
    ]
    assert of_losses[0] == of_losses[1] == of_losses[2]


def test_case_names_tell_all_cases_apart(make_model):
    found = []
    for size in (16, 24):
        model = make_model(size=size)
        for split in ("train", "id", "ood"):
            for seed in (0, 1):
                for name in ("uniform", "parabola", "collision"):
                    clips = simulate(name, split, range(2), frames=8, size=size, seed=seed)
                    found += ModelSubject(model, clips, TRACKING).case_names
    assert len(set(found)) == len(found) == 2 * 3 * 2 * 3 * 2
    assert all(name.split("/")[0] in ("uniform", "parabola", "collision") for name in found)


def test_case_names_are_of_the_true_clip_alone(model, make_model, cases):
    names = ModelSubject(model, cases, TRACKING).case_names
    assert names == ModelSubject(make_model(1), cases, OBJECTIVES["reward"], steps=1, seed=9).case_names
    assert ModelSubject(model, cases[[4, 0]], TRACKING).case_names == (names[4], names[0])
    assert names[0].startswith("uniform/id/0/") and names[5].startswith("collision/id/1/")


def test_case_that_is_there_twice_is_named(model, cases):
    with pytest.raises(ValueError, match=r"case collision/id/1/\w{6} is there twice"):
        _ = ModelSubject(model, cases[[5, 0, 5]], TRACKING).case_names


def test_parts_of_a_hunt_share_no_case(model):
    selection, confirmation, inside = (
        simulated_subject(model, HUNT, "selection"),
        simulated_subject(model, HUNT, "confirmation", others=dict(early=model)),
        simulated_subject(model, HUNT, "confirmation", split="ood"),
    )
    assert [len(part.case_names) for part in (selection, confirmation, inside)] == [6, 9, 9]
    assert len({*selection.case_names, *confirmation.case_names, *inside.case_names}) == 24
    assert set(inside.cases.buckets) <= {"r", "v", "rv"} and set(confirmation.cases.buckets) == {"id"}
    assert selection.seed == HUNT.seed + 1  # noise is not drawn by the seed of the clips
    assert selection.objective is TRACKING and list(confirmation.others) == ["early"]
    with pytest.raises(ValueError, match="unknown part of a hunt 'test'; choose one of selection, confirmation"):
        simulated_subject(model, HUNT, "test")


def test_cases_that_the_model_cannot_continue_are_refused(model, cases):
    with pytest.raises(ValueError, match=r"the model makes clips of \(8, 16, 16\), the cases are \(8, 24, 24\)"):
        ModelSubject(model, simulate("uniform", "id", [0], frames=8, size=24), TRACKING)
    with pytest.raises(ValueError, match=r"frames given must be in \[0, 7\], got 8"):
        ModelSubject(model, cases, TRACKING, frames_given=8)


# --- rows


def test_rows_that_fit_are_as_many_as_memory_holds(model, make_model, cases, monkeypatch):
    subject = ModelSubject(model, cases, TRACKING)
    assert subject.rows_that_fit() == subjects.MOST_ROWS[False] == 64  # a row takes less than a megabyte

    def with_free(megabytes):
        monkeypatch.setattr(subjects, "free_bytes", lambda device: int(megabytes * 1e6))
        return subject.rows_that_fit()

    assert with_free(0) == 1
    few, more = with_free(2), with_free(4)
    assert 1 < few < more < 64 and more == pytest.approx(2 * few, abs=2)
    assert 1 <= ModelSubject(make_model(heads=1, depth=1), cases, TRACKING).rows_that_fit() < 64


def test_batches_of_large_clips_stay_in_the_caches(make_model):
    large = simulate("uniform", "id", [0], frames=8, size=128)
    subject = ModelSubject(make_model(size=128, patch=(2, 32, 32)), large, TRACKING)
    assert subject.rows_that_fit() == subjects.CACHED_BYTES // (4 * 3 * 8 * 128 * 128) == 8


def test_a_score_does_not_depend_on_its_chunk(model, make_model, cases):
    camera = Camera()
    subject = ModelSubject(model, cases, camera.objective(), steps=3, others=dict(early=make_model(3)))
    trials = [
        OFF,
        HEADS,
        Guidance.from_heads("L1H0", 1.5, 0.5, kind="uniform"),
        Guidance(text_weight=1.0),
        Guidance(weak=((1.0, OtherModel("early")), (0.5, LayerSkip((1,))))),
    ]
    rows = [(trial, case) for case in (0, 3, 5) for trial in trials]
    together = subject.score(rows)["brightness"]
    frames = camera.frames()
    assert len(frames.unique(dim=0)) == len(rows)  # no two rows are the same clip
    for chunk in (range(14, -1, -1), [7], [2, 9], [4, 3, 11, 0]):
        again = subject.score([rows[number] for number in chunk])["brightness"]
        torch.testing.assert_close(again, together[list(chunk)], atol=0.01, rtol=0)
        assert (camera.frames() - frames[list(chunk)]).abs().max() <= 1
    subject.score([rows[7], rows[7]])  # the same row twice is the same clip twice
    twice = camera.frames()
    assert torch.equal(twice[0], twice[1])


def test_frames_given_are_those_of_the_case(model, cases):
    camera = Camera()
    ModelSubject(model, cases, camera.objective(), frames_given=2, steps=1).score([(HEADS, 4), (OFF, 1)])
    frames, true = camera.frames(), cases.frames[[4, 1]].int()
    assert torch.equal(frames[:, :2], true[:, :2]) and not torch.equal(frames[:, 2], true[:, 2])


# --- pipelines


CALL = dict(PIPELINES["wan"].clip, guidance_scale=4.0)
CASES = [("a red ball falls", 0), ("a red ball falls", 1)]
PIPELINE_HEADS = head_set("L0H1,L2H3")


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline("wan")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def camera():
    return Camera()


def pipeline_subject(pipe, camera, prompts=CASES, **settings):
    return PipelineSubject(pipe, prompts, camera.objective(), steps=2, settings=CALL, **settings)


def test_rows_of_a_pipeline_are_its_own_clips(pipe, camera):
    subject = pipeline_subject(pipe, camera)
    trial = Guidance.from_heads(PIPELINE_HEADS, 3.0, 0.8, kind="uniform")
    scores = subject.score([(OFF, 1), (trial, 1), (OFF, 0)])["brightness"]
    plain, guided, other = camera.frames()

    def clip(seed):
        return generate_clips(pipe, ["a red ball falls"], seed=seed, steps=2, fps=8.0, **CALL).frames[0].int()

    assert torch.equal(plain, clip(1)) and torch.equal(other, clip(0))
    with guide(pipe, PIPELINE_HEADS, 3.0, strength=0.8, kind="uniform"):
        assert torch.equal(guided, clip(1))
    assert len({float(score) for score in scores}) == 3
    late = Guidance(weak=trial.weak, start=0.5)
    subject.score([(late, 1)])
    with guide(pipe, PIPELINE_HEADS, 3.0, strength=0.8, kind="uniform", start=0.5):
        assert torch.equal(camera.frames()[0], clip(1))
    assert torch.equal(plain, clip(1))  # the pipeline is as it was
    subject.score([(Guidance(text_weight=2.5), 1)])  # text guidance is the pipeline's own, at a larger scale
    more = generate_clips(pipe, ["a red ball falls"], seed=1, steps=2, fps=8.0, **CALL | dict(guidance_scale=6.5))
    assert torch.equal(camera.frames()[0], more.frames[0].int()) and not torch.equal(more.frames[0].int(), plain)
    with pytest.raises(ValueError, match="text guidance needs the pipeline's own guidance_scale in settings"):
        PipelineSubject(pipe, CASES, camera.objective(), steps=2).score([(Guidance(text_weight=1.0), 0)])
    assert subject.rows_that_fit() == 1 and subject.heads == heads_of(pipe.transformer)


@pytest.mark.parametrize(
    "trial",
    [
        Guidance(text_weight=1.0, weak=HEADS.weak),
        Guidance(weak=((1.0, LayerSkip((0,))),)),
        Guidance(weak=((1.0, OtherModel("early")),)),
        Guidance(weak=((1.0, Perturbation("L0H1")), (1.0, Perturbation("L1H1")))),
        Guidance(weak=HEADS.weak, rescale=0.5),
        Guidance(start=0.5),
    ],
)
def test_pipelines_refuse_what_they_cannot_be_guided_by(pipe, camera, trial):
    with pytest.raises(ValueError, match=r"pipelines can be guided by one set of broken heads, or by text alone"):
        pipeline_subject(pipe, camera).score([(trial, 0)])
    assert camera.clips == []


@pytest.mark.parametrize("name", ["tracking_error", "physics_iq_verified", "answer_agreement"])
def test_pipelines_refuse_objectives_that_need_the_truth(pipe, name):
    with pytest.raises(ValueError, match="compares with the true motion, which these cases lack"):
        PipelineSubject(pipe, CASES, OBJECTIVES[name])


def test_pipelines_refuse_objectives_of_our_own_model(pipe):
    with pytest.raises(ValueError, match="preference_margin judges a VideoDiT by its losses; choose one that judges"):
        PipelineSubject(pipe, CASES, OBJECTIVES["preference_margin"])


def test_cases_of_a_pipeline_have_names(pipe, camera):
    names = pipeline_subject(pipe, camera, [("a/1", 2), ("a", 1), ("b", 1)]).case_names
    assert names == ("a/1/2", "a/1", "b/1")
    with pytest.raises(ValueError, match="case a/1 is there twice"):
        _ = pipeline_subject(pipe, camera, [("a", 1), ("b", 1), ("a", 1)]).case_names
    with pytest.raises(ValueError, match="there is no case"):
        _ = pipeline_subject(pipe, camera, []).case_names


def test_identity_of_a_pipeline_holds_every_part_of_it(camera, tmp_path):
    def identity(seed=0, **changes):
        pipe = tiny_pipeline("wan", seed)
        for change in changes.values():
            change(pipe)
        return json.dumps(pipeline_subject(pipe, camera).identity, sort_keys=True)

    def nudge(part):
        return lambda pipe: next(getattr(pipe, part).parameters()).data.view(-1)[0].add_(1e-3)

    def other_schedule(pipe):
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=9.0)

    plain = identity()
    changed = [identity(change=nudge(part)) for part in ("transformer", "vae", "text_encoder")]
    changed += [identity(seed=1), identity(change=other_schedule)]
    changed.append(identity(change=lambda pipe: pipe.register_to_config(boundary_ratio=0.5)))
    assert len({plain, *changed}) == 1 + len(changed)
    pipe = tiny_pipeline("wan")
    pipe.save_pretrained(tmp_path / "wan")
    assert identity() == plain
    loaded = pipeline_subject(load_pipeline(tmp_path / "wan"), camera)
    assert json.dumps(loaded.identity, sort_keys=True) == plain
    subject = PipelineSubject(pipe, CASES, camera.objective(), steps=2, settings=CALL | dict(guidance_scale=5.0))
    for other in (
        subject,
        pipeline_subject(pipe, camera, fps=16.0),
        PipelineSubject(pipe, CASES, OBJECTIVES["reward"]),
    ):
        assert json.dumps(other.identity, sort_keys=True) != plain


def test_heads_of_a_pipeline_are_hunted_by_a_function_of_ones_own(pipe, camera, tmp_path):
    with TrialStore(tmp_path / "trials.sqlite") as store:
        trials = Trials(pipeline_subject(pipe, camera), store, progress=False)
        ranking = rank_heads(trials, lambda heads: Guidance.from_heads(heads, 3.0), PIPELINE_HEADS)
        assert trials.rows_run == 6  # two prompts and seeds, unguided and with either head
        assert ranking.effects.shape == (2, 2) and (ranking.effects != 0).all()
        shown = camera.frames()
        assert len(shown.unique(dim=0)) == 6
        again = Trials(pipeline_subject(tiny_pipeline("wan"), camera), store, progress=False)
        found = rank_heads(again, lambda heads: Guidance.from_heads(heads, 3.0), PIPELINE_HEADS)
        assert again.rows_run == 0 and torch.equal(found.effects, ranking.effects)
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    plain = generate_clips(pipe, [CASES[0][0]], seed=0, steps=2, fps=8.0, **CALL).frames[0].int()
    assert any(torch.equal(plain, frames) for frames in shown)
