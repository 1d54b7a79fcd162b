import pytest
import torch

from physnb.optimizer import ITERATIONS, MATCHED_RMS, NEWTON_SCHULZ, Muon, orthogonal_factor


def test_iteration_acts_on_singular_values_alone():
    # X -> aX + bXX'X + cXX'XX'X turns each singular value s into as + bs^3 + cs^5 and leaves the vectors alone
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 20, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    values = values / torch.linalg.matrix_norm(matrices)[:, None]
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(
        orthogonal_factor(matrices), left @ torch.diag_embed(values) @ right, rtol=1e-5, atol=1e-5
    )
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("shape", [(4, 4), (4, 12), (12, 4)])
def test_first_step_is_the_orthogonal_gradient_scaled_by_the_longer_side(shape):
    torch.manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(shape))
    before, parameter.grad = parameter.detach().clone(), torch.randn(shape)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    update = (before * (1 - 0.1 * 0.5) - parameter.detach()) / (0.1 * MATCHED_RMS * max(shape) ** 0.5)
    assert torch.linalg.svdvals(update).sub(1).abs().max() < 0.4  # square random matrices have tiny values too
    assert (update * parameter.grad).sum() > 0  # downhill


def test_matrices_of_one_shape_do_not_touch_each_other():
    torch.manual_seed(2)
    start, gradients = torch.randn(3, 6, 10), torch.randn(3, 6, 10)

    def after_two_steps(which):
        parameters = [torch.nn.Parameter(start[i].clone()) for i in which]
        optimizer = Muon(parameters, lr=0.1)
        for sign in (1, -0.3):
            for i, parameter in zip(which, parameters, strict=True):
                parameter.grad = sign * gradients[i]
            optimizer.step()
        return {i: p.detach() for i, p in zip(which, parameters, strict=True)}

    together = after_two_steps([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(after_two_steps([i])[i], together[i])


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(parameter.detach(), torch.ones(3, 3))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"matrices, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=0.1)
