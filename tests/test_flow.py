from itertools import pairwise

import pytest
import torch

from physnb.config import SOLVERS
from physnb.flow import add_noise, shift_levels, solve, velocity_from_clean, velocity_loss

# With a perfect denoiser every solver is exact, so only float32 rounding remains: clips are within [-4, 4] here.
SOLVER_TOLERANCE = 1e-5


@pytest.fixture
def clean_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 3, 4, 4, 4, generator=generator).unbind(0)


def test_path_begins_at_the_clip_and_ends_at_noise(clean_and_noise):
    clean, noise = clean_and_noise
    assert torch.equal(add_noise(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(3)), noise)
    torch.testing.assert_close(add_noise(clean, noise, torch.full((3,), 0.25)), 0.75 * clean + 0.25 * noise)


def test_path_takes_each_clips_own_level(clean_and_noise):
    clean, noise = clean_and_noise
    mixed = add_noise(clean, noise, torch.tensor([0.0, 0.3, 1.0]))
    assert torch.equal(mixed[0], clean[0]) and torch.equal(mixed[2], noise[2])


def test_velocity_from_the_clean_clip_is_noise_minus_clip(clean_and_noise):
    clean, noise = clean_and_noise
    sigma = torch.tensor([0.1, 0.5, 1.0])
    velocity = velocity_from_clean(add_noise(clean, noise, sigma), clean, sigma)
    torch.testing.assert_close(velocity, noise - clean, atol=1e-5, rtol=0)


def test_velocity_loss_is_the_squared_velocity_error(clean_and_noise):
    clean, noise = clean_and_noise
    sigma = torch.tensor([0.2, 0.5, 1.0])
    predicted = clean + 0.1 * noise
    noised = add_noise(clean, noise, sigma)
    error = velocity_from_clean(noised, predicted, sigma) - velocity_from_clean(noised, clean, sigma)
    loss = velocity_loss(predicted, clean, sigma, torch.ones(3, 4), floor=0.1)
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3, 4)), atol=1e-6, rtol=1e-4)


def test_velocity_loss_by_hand():
    clean = torch.zeros(2, 1, 2, 1, 1)
    predicted = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).view(2, 1, 2, 1, 1)
    # clip 0: frame 0 is given, so only 1^2 counts, over 0.5^2; clip 1: (9 + 1) / 2 over the floor 0.1^2, not 0.01^2
    loss = velocity_loss(predicted, clean, torch.tensor([0.5, 0.01]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]), floor=0.1)
    assert loss.tolist() == pytest.approx([4.0, 500.0])


def test_shifted_levels_keep_their_ends_and_rise():
    levels = torch.linspace(0, 1, 11)
    shifted = shift_levels(levels, 6.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
    assert float(shifted[5]) == pytest.approx(6 * 0.5 / 3.5)
    assert torch.equal(shift_levels(levels, 1.0), levels)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 300])
def test_solver_recovers_the_clip_from_a_perfect_denoiser(clean_and_noise, solver, steps):
    clean, noise = clean_and_noise

    def perfect(noised, sigma, share):
        return velocity_from_clean(noised, clean, sigma)

    found = solve(perfect, noise, steps=steps, solver=solver)
    torch.testing.assert_close(found, clean, atol=SOLVER_TOLERANCE, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_starts_at_pure_noise_and_goes_down(clean_and_noise, solver):
    clean, noise = clean_and_noise
    seen = []
    solve(lambda z, s, share: z - clean, noise, steps=4, solver=solver, callback=lambda *call: seen.append(call))
    steps, levels, samples = zip(*seen, strict=True)
    assert steps == tuple(range(len(seen)))
    assert levels[0] == pytest.approx(1, abs=2e-3) and torch.equal(samples[0], noise)
    assert all(a >= b for a, b in pairwise(levels)) and levels[-1] > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_come_closer_to_the_true_flow(clean_and_noise, solver):
    # dz/dsigma = z has the solution z(0) = z(1) / e
    _, noise = clean_and_noise
    errors = [
        float(
            (solve(lambda z, s, share: z, noise, steps=n, solver=solver, shift=1.0) - noise * torch.e**-1).abs().max()
        )
        for n in (4, 16)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_unknown_solver_and_bad_step_count_are_named(clean_and_noise):
    with pytest.raises(ValueError, match=r"unknown solver 'ddim'; choose one of euler, heun, unipc, dpmsolver\+\+"):
        solve(lambda z, s, share: z, clean_and_noise[1], steps=2, solver="ddim")
    with pytest.raises(ValueError, match="sampling steps must be positive, got 0"):
        solve(lambda z, s, share: z, clean_and_noise[1], steps=0)
