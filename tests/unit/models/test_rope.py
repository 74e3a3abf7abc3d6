"""The rotation's own derivative."""

from __future__ import annotations

import torch

from titan_hd.models.rope import rotate


def formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers has it, by autograd."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def test_value_and_gradient():
    torch.manual_seed(0)
    angles = torch.rand(2, 1, 5, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    behind_projection = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2)
    for x in (torch.randn(2, 3, 5, 8, dtype=torch.float64), behind_projection):
        one, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        gy = torch.randn_like(x)
        y, wanted = rotate(one, angles.cos(), angles.sin()), formula(other, angles.cos(), angles.sin())
        y.backward(gy)
        wanted.backward(gy)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(one.grad, other.grad)


def test_a_turn_keeps_lengths():
    """With equal angles of both halves, as RoPE has them, the gradient turns back."""
    torch.manual_seed(0)
    half = torch.rand(1, 1, 5, 4, dtype=torch.float64)
    angles, x = torch.cat((half, half), -1), torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    y = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    y.backward(y.detach())
    torch.testing.assert_close(x.grad, x.detach())
