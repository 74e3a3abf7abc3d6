"""HD-PiSSA's linear layer (EMNLP 2025, arXiv 2505.18777): the forward pass of the frozen layer, gradients for dA, dB.

The paper computes Y = X(W + g A B) with a mute scalar g of 1e-16 and divides the adapters' gradients by g. In the limit
g -> 0 the forward pass is the frozen layer's, dx = gy W, and

    grad(dB) = s * gy^T (x A^T)        [out, r]
    grad(dA) = s * (gy B)^T x          [r, in]          s = alpha / r

which `exact_mute` computes: no added forward work, no [out, in] temporary, nothing that can underflow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.inject import replace_linears
from titan_hd.config.errors import UserError
from titan_hd.config.job_config import LINEAR_LAYERS


class _ExactMute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, x_adapter, a, b, da, db, scale):
        ctx.save_for_backward(weight, x_adapter, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):
        weight, x, a, b = ctx.saved_tensors
        # The first block's input needs no gradient: the embedding is frozen.
        dx = gy @ weight if ctx.needs_input_grad[0] else None
        gy, x = gy.flatten(0, -2), x.flatten(0, -2)
        a, b = a.to(x.dtype), b.to(gy.dtype)
        grad_da = ((gy @ b).T @ x).float() * ctx.scale
        grad_db = ((x @ a.T).T @ gy).T.float() * ctx.scale
        return dx, None, None, None, None, None, grad_da, grad_db, None


def exact_mute(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_adapter: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    da: torch.Tensor,
    db: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y = x W^T + bias [..., out], with gradients to x [..., in], da [r, in] and db [out, r] (fp32) as said above.

    x_adapter is what the adapter sees: x itself, or x after dropout. The values of da and db are not read.
    """
    return _ExactMute.apply(x, weight, bias, x_adapter.detach(), a, b, da, db, scale)


class HDPissaLinear(nn.Linear):
    """A frozen linear layer with the slice of one logical adapter bound to it.

    `delta_A` [K, r, in] and `delta_B` [K, out, r] are the layer's trainable parameters, held for all K adapters as
    one tensor each; the adapter registry makes them, and binds the slice of the adapter whose micro-batch comes next
    (`bind`). They are zero whenever a forward pass runs.
    """

    def __init__(self, linear: nn.Linear, scale: float, dropout: float, mute_scalar: float):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_parameter("delta_A", None)
        self.register_parameter("delta_B", None)
        self.scale, self.dropout, self.mute_scalar = scale, dropout, mute_scalar
        self.bound: tuple[torch.Tensor, ...] | None = None

    def bind(self, a: torch.Tensor, b: torch.Tensor, da: torch.Tensor, db: torch.Tensor) -> None:
        """Make one adapter the active one: a, da [r, in]; b, db [out, r]; da and db are leaves that take gradients."""
        self.bound = (a, b, da, db)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self.weight, self.bias)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output for a given weight: its own, or its tensor-parallel part with the bound slices' parts."""
        if not torch.is_grad_enabled():  # nothing to learn: the frozen layer
            return F.linear(x, weight, bias)
        assert self.bound is not None, "no adapter is bound; AdapterRegistry.activate comes first"
        a, b, da, db = self.bound
        x_adapter = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if self.mute_scalar == 0.0:
            return exact_mute(x, weight, bias, x_adapter, a, b, da, db, self.scale)
        low_rank = F.linear(F.linear(x_adapter, (a + da).to(x.dtype)), (b + db).to(x.dtype))
        return F.linear(x, weight, bias) + self.mute_scalar * self.scale * low_rank


class HDPissa:
    """HD-PiSSA: K logical adapters of rank r on every targeted layer; nothing else is trained."""

    direct_update = True

    def __init__(
        self,
        num_adapters: int,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        mute_scalar: float = 0.0,
        slices: str = "orthogonal",
    ):
        self.num_adapters, self.rank = num_adapters, rank
        self.dropout, self.mute_scalar = dropout, mute_scalar
        self.scale = (rank if alpha is None else alpha) / rank
        self.directions = num_adapters * rank if slices == "orthogonal" else rank

    def apply(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """Replace the targeted layers (default: all linear layers of the blocks) and freeze everything.

        Raises:
            ValueError: a target that matches no layer, or a layer too small for K slices of rank r.
        """
        model.requires_grad_(False)
        layers = replace_linears(
            model,
            target_modules or LINEAR_LAYERS,
            lambda linear: HDPissaLinear(linear, self.scale, self.dropout, self.mute_scalar),
        )
        for name, layer in layers.items():
            check_rank(name, (layer.out_features, layer.in_features), self.directions, self.rank)
        return list(layers)


def check_rank(name: str, shape: tuple[int, int], directions: int, rank: int) -> None:
    """ValueError if a weight [out, in] has fewer singular directions than the adapters' slices need."""
    if directions > min(shape):
        raise UserError(
            f"adapter.rank: the slices need K * r = {directions // rank} * {rank} = {directions} singular directions, "
            f"{name} of shape {list(shape)} has {min(shape)}; lower adapter.rank or hdpissa.num_adapters"
        )
