import pytest
import torch

from physnb.config import SOLVERS, Guidance
from physnb.data import Clip, simulate
from physnb.generate import generate, initial_noise

GREY_LEVEL = 1  # of 255: float rounding differs between batch sizes and is then rounded to uint8


@pytest.fixture(scope="module")
def many() -> Clip:
    clips = [simulate(name, "ood", range(32), frames=8, size=16) for name in ("uniform", "collision")]
    return Clip.concatenate(clips)


def apart(one: Clip, other: Clip) -> int:
    return int((one.frames.int() - other.frames.int()).abs().max())


@pytest.mark.parametrize("guidance", [Guidance(), Guidance.from_heads("L0H1,L1H2", 0.5)], ids=["plain", "guided"])
def test_case_alone_is_the_case_in_a_batch_of_64(model, many, guidance):
    batch = generate(model, many, steps=4, guidance=guidance, seed=2)
    assert len(set(map(tuple, batch.frames[:, -1].flatten(1)[:, :64].tolist()))) == 64  # cases do differ
    for i in (0, 17, 63):
        alone = generate(model, many[i : i + 1], steps=4, guidance=guidance, seed=2)
        assert apart(alone, batch[i : i + 1]) <= GREY_LEVEL


def test_batch_size_and_order_do_not_matter(model, many):
    batch = generate(model, many[:10], steps=3)
    assert apart(generate(model, many[:10], steps=3, batch_size=3), batch) <= GREY_LEVEL
    back = list(range(9, -1, -1))
    assert apart(generate(model, many[:10][back], steps=3)[back], batch) <= GREY_LEVEL


def test_each_row_keeps_its_own_guidance_across_batches(model, many):
    rows = [Guidance(), Guidance.from_heads("L0H1", 1.0), Guidance(text_weight=1.0)] * 2
    together = generate(model, many[:6], steps=3, guidance=rows, batch_size=4)
    for i, guidance in enumerate(rows):
        assert apart(generate(model, many[i : i + 1], steps=3, guidance=guidance), together[i : i + 1]) <= GREY_LEVEL


@pytest.mark.parametrize("frames_given", [1, 3, 7])
def test_start_frames_are_kept_exactly(model, cases, frames_given):
    made = generate(model, cases, frames_given=frames_given, steps=2)
    assert torch.equal(made.frames[:, :frames_given], cases.frames[:, :frames_given])
    assert (made.frames[:, frames_given:] != cases.frames[:, frames_given:]).any()


def test_generated_clip_keeps_the_case_and_claims_no_truth(model, cases):
    made = generate(model, cases, steps=2)
    assert made.state is None and made.frames.dtype == torch.uint8
    assert (made.captions, made.scenarios, made.buckets) == (cases.captions, cases.scenarios, cases.buckets)
    assert torch.equal(made.indices, cases.indices)


def test_future_frames_of_the_case_are_not_looked_at(model, cases):
    from dataclasses import replace

    blank = replace(cases, frames=torch.where(torch.arange(8)[None, :, None, None, None] < 3, cases.frames, 128).byte())
    assert torch.equal(generate(model, cases, steps=2).frames, generate(model, blank, steps=2).frames)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_and_is_reproducible(model, cases, solver):
    one, other = (generate(model, cases, steps=3, solver=solver) for _ in range(2))
    assert torch.equal(one.frames, other.frames)


def test_seeds_give_other_clips(model, cases):
    assert (generate(model, cases, steps=2, seed=0).frames != generate(model, cases, steps=2, seed=1).frames).any()


def test_unconditional_generation_depends_on_the_noise_alone(model, cases):
    from dataclasses import replace

    def unconditional(clip):
        return generate(model, clip, frames_given=0, use_captions=False, steps=2)

    other = replace(cases, frames=255 - cases.frames, captions=tuple(reversed(cases.captions)))
    assert torch.equal(unconditional(cases).frames, unconditional(other).frames)
    with_caption = generate(model, cases, frames_given=0, steps=2)
    assert (with_caption.frames != unconditional(cases).frames).any()


def test_noise_is_standard_normal_and_a_case_has_its_own(model, many):
    noise = initial_noise(model, many, 0)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert torch.equal(initial_noise(model, many[5:6], 0)[0], noise[5])
    assert len(noise.flatten(1)[:, 0].unique()) == 64


def test_callback_sees_every_call(model, cases):
    seen = []
    generate(model, cases, steps=3, batch_size=4, callback=lambda step, sigma, z: seen.append((step, len(z))))
    assert seen == [(0, 4), (1, 4), (2, 4), (0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(guidance=[Guidance()] * 3), "3 guidances for 6 cases; give one, or one a case"),
        (dict(frames_given=8), r"frames given must be in \[0, 7\], got 8"),
        (dict(frames_given=-1), r"frames given must be in \[0, 7\], got -1"),
        (dict(batch_size=0), "batch size must be positive, got 0"),
        (dict(steps=0), "sampling steps must be positive, got 0"),
        (dict(solver="ddim"), "unknown solver 'ddim'; choose one of euler"),
        (dict(guidance=Guidance.from_heads("L99H0", 1.0)), "head L99H0 does not exist"),
    ],
)
def test_bad_request_is_named(model, cases, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, cases, **change)


def test_cases_of_another_size_are_refused(model):
    cases = simulate("uniform", "id", [0], frames=8, size=32)
    with pytest.raises(ValueError, match=r"the model makes clips of \(8, 16, 16\), the cases are \(8, 32, 32\)"):
        generate(model, cases)
