"""The forward pass of one adapter's local model: what it has learned since the last fold is in it, exactly.

    y = x W^T + bias + x dW^T        dW = (B + dB)(A + dA) - B A = dB A + (B + dB) dA

The second form of dW does not cancel, and is what the fold adds to W. As left = [dB | B + dB] [out, 2r] times right =
[A ; dA] [2r, in] it costs two skinny products of width 2r, and no [out, in] temporary. With G = dLoss/dW of this model

    grad(dB) = s G (A + dA)^T,    grad(dA) = s (B + dB)^T G,    dx = gy (W + dW)        s = alpha / r

At dA = dB = 0 these are the exact mute's. alpha scales the gradients alone, as there: a fold adds dW, not s dW, so the
model that learns is the one that the adapter's fold would make.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from titan_hd.adapters.frozen_linear import Operands
from titan_hd.adapters.shared_products import by_layer, fp32_product, joined


class _LocalModel(torch.autograd.Function):
    """apply(x, x_adapter, scale, *operands of the first layer, *operands of the second, ...); x_adapter None: x.

    The layers share one product with x, one of the gradients with x, and one dx. Low-rank activations are [tokens, 2,
    n r] for n layers: what comes by the A's, then what comes by the dA's.
    """

    @staticmethod
    def forward(ctx, x, x_adapter, scale, *flat):
        """y [..., out] of each layer; x, x_adapter [..., in]."""
        layers = by_layer(flat, Operands, len(Operands._fields))
        rows, rank = x.flatten(0, -2), layers[0].a.shape[0]
        seen = rows if x_adapter is None else x_adapter.flatten(0, -2)
        low = (seen @ _right(layers, x.dtype).T).unflatten(1, (2, -1))
        ys = []
        for layer, part in zip(layers, low.split(rank, 2)):
            y = F.linear(rows, layer.weight, layer.bias).addmm_(part.flatten(1), _left(layer, x.dtype).T)
            ys.append(y.view(*x.shape[:-1], -1))
        # left and right are made again in the backward pass: kept, they would take more than dA and dB do.
        ctx.save_for_backward(seen, low, *flat)
        ctx.scale, ctx.rank, ctx.shape, ctx.dropped = scale, rank, x.shape, x_adapter is not None
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gys):
        """gys: dLoss/dy [..., out] of each layer. dx is one sum over the layers; da and db come in fp32."""
        x, low, *flat = ctx.saved_tensors
        layers, gys = by_layer(tuple(flat), Operands, len(Operands._fields)), [gy.flatten(0, -2) for gy in gys]
        g_low = joined([(gy @ _left(layer, gy.dtype)).unflatten(1, (2, -1)) for gy, layer in zip(gys, layers)], 2)
        dx = dx_adapter = None
        if ctx.needs_input_grad[0]:  # the first block's input needs no gradient: the embedding is frozen
            dx = gys[0] @ layers[0].weight
            for gy, layer in zip(gys[1:], layers[1:]):
                dx.addmm_(gy, layer.weight)
            if not ctx.dropped:
                dx.addmm_(g_low.flatten(1), _right(layers, x.dtype))
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dx_adapter = (g_low.flatten(1) @ _right(layers, x.dtype)).view(ctx.shape)
        grad_da = fp32_product(g_low[:, 1].T, x, ctx.scale).split(ctx.rank)
        grads = []
        for gy, part, da in zip(gys, low.sum(1).split(ctx.rank, 1), grad_da):
            grads += [None, None, None, None, da, fp32_product(part.T, gy, ctx.scale).T]
        return dx, dx_adapter, None, *grads


def _right(layers: list[Operands], dtype: torch.dtype) -> torch.Tensor:
    """[A ; A' ; ... ; dA ; dA' ; ...] [2 n r, in]"""
    return torch.cat([layer.a for layer in layers] + [layer.da for layer in layers]).to(dtype)


def _left(layer: Operands, dtype: torch.dtype) -> torch.Tensor:
    """[dB | B + dB] [out, 2 r]; the sum is in fp32, of a B that may be rounded to the computation's dtype already."""
    return torch.cat((layer.db, layer.b + layer.db), 1).to(dtype)


def local_model(
    x: torch.Tensor, layers: list[Operands], scale: float, x_adapter: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """y [..., out] of each layer, with gradients to x [..., in] and (fp32) to da and db as said above.

    x_adapter is what the adapters see: x itself, or x after dropout, which passes its gradient on to x.
    """
    return _LocalModel.apply(x, None if x_adapter is x else x_adapter, scale, *(t for layer in layers for t in layer))
