"""Linear layers whose effective weight W + dW is dense, formed when it is needed and never kept.

y = x (W + dW)^T, dx = gy (W + dW), and the gradient of dW, gy^T x, is turned into those of the small tensors that dW is
made of. Autograd would keep the dense dW of every layer from forward to backward; so does `torch.compile` with a plain
autograd.Function (it sees that both passes form the same matrix). An operator of its own is opaque to both: it keeps x,
W and the small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# (W [out, in], small tensors) -> W + dW, or dW alone if the flag is not set; [out, in], in W's dtype
EffectiveWeight = Callable[[Tensor, Sequence[Tensor], bool], Tensor]
# (gradient of dW [out, in], W, small tensors) -> gradients of the small tensors
SmallGradients = Callable[[Tensor, Tensor, Sequence[Tensor]], list[Tensor]]


def recomputed_linear(name: str, effective: EffectiveWeight, gradients: SmallGradients) -> Callable[..., Tensor]:
    """Define the operator titan_hd::`name`.

    Returns:
        apply(x [..., in], x_adapter, weight [out, in], bias [out] or None, small tensors) -> y [..., out]:
        x W^T + x_adapter dW^T + bias, where x_adapter is x itself or x after dropout. Gradients go to x, x_adapter and
        the small tensors; weight and bias are frozen. All tensors have one dtype.
    """

    @torch.library.custom_op(f"titan_hd::{name}", mutates_args=())
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, small: Sequence[Tensor], with_weight: bool) -> Tensor:
        return F.linear(x, effective(weight, small, with_weight), bias)

    @forward.register_fake
    def _(x, weight, bias, small, with_weight):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.custom_op(f"titan_hd::{name}_backward", mutates_args=())
    def backward(
        gy: Tensor, x: Tensor, weight: Tensor, small: Sequence[Tensor], with_weight: bool, needs_dx: bool
    ) -> list[Tensor]:
        dx = gy @ effective(weight, small, with_weight) if needs_dx else gy.new_empty(0)
        return [dx, *gradients(gy.flatten(0, -2).T @ x.flatten(0, -2), weight, small)]

    @backward.register_fake
    def _(gy, x, weight, small, with_weight, needs_dx):
        return [torch.empty_like(x) if needs_dx else gy.new_empty(0), *map(torch.empty_like, small)]

    def setup_context(ctx, inputs, output):
        x, weight, _, small, ctx.with_weight = inputs
        ctx.save_for_backward(x, weight, *small)

    def differentiate(ctx, gy):
        x, weight, *small = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]  # the first block's input needs no gradient: the embedding is frozen
        dx, *grads = backward(gy, x, weight, small, ctx.with_weight, needs_dx)
        return dx if needs_dx else None, None, None, grads, None

    forward.register_autograd(differentiate, setup_context=setup_context)

    def apply(x: Tensor, x_adapter: Tensor, weight: Tensor, bias: Tensor | None, small: Sequence[Tensor]) -> Tensor:
        if x_adapter is x:
            return forward(x, weight, bias, small, True)
        return F.linear(x, weight, bias) + forward(x_adapter, weight, None, small, False)

    return apply
