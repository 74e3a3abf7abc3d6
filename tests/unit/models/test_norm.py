"""The norm's own derivative, and its dtypes."""

from __future__ import annotations

import pytest
import torch

from titan_hd.models.norm import RMSNorm


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's, by autograd; x in fp32 or float64."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def norm_of(width: int, trained: bool = True) -> RMSNorm:
    norm = RMSNorm(width, 1e-3).requires_grad_(trained)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return norm


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7)])
def test_value_and_gradients(shape: tuple[int, ...], trained: bool):
    torch.manual_seed(0)
    norm, x = norm_of(7, trained).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, again = norm.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    gy, wanted = torch.randn(shape, dtype=torch.float64), formula(again, weight, 1e-3)
    y = norm(x)
    y.backward(gy)
    wanted.backward(gy)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(x.grad, again.grad)
    if trained:
        torch.testing.assert_close(norm.weight.grad, weight.grad)
    else:
        assert norm.weight.grad is None


def test_heads_that_are_not_contiguous():
    """As q and k are, behind their transpose."""
    torch.manual_seed(0)
    norm, x = norm_of(6), torch.randn(2, 5, 3, 6).transpose(1, 2).requires_grad_()
    again = x.detach().clone().requires_grad_()
    norm(x).square().sum().backward()
    formula(again, norm.weight.detach(), 1e-3).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_16_bit_inputs_are_normed_in_fp32():
    """Large values, whose squares bf16 would round, and a gradient that is rounded once."""
    torch.manual_seed(0)
    norm = norm_of(64, trained=False)
    x = (100 + torch.randn(50, 64)).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    norm.bfloat16()
    gy = torch.randn(50, 64).bfloat16()
    y, wanted = norm(x), formula(exact, norm.weight.double(), 1e-3)
    y.backward(gy)
    wanted.backward(gy.double())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert (y.double() - wanted).abs().max() <= 2**-8 * 2 * wanted.abs().max()  # rounded before and behind the weight
    assert (x.grad.double() - exact.grad).abs().max() <= 2**-8 * 2 * exact.grad.abs().max()


def test_what_it_keeps():
    """Its input, which the residual stream keeps anyway, and one number a row."""
    norm, x, shapes = norm_of(8, trained=False), torch.randn(3, 5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        norm(x)
    assert shapes == [(3, 5, 8), (8,), (3, 5, 1)]
