"""HD-PiSSA's linear layer (EMNLP 2025, arXiv 2505.18777): the forward pass of the frozen layer, gradients for dA, dB.

The paper computes Y = X(W + g A B) with a mute scalar g of 1e-16 and divides the adapters' gradients by g. In the limit
g -> 0 the forward pass is the frozen layer's, dx = gy W, and

    grad(dB) = s * gy^T (x A^T)        [out, r]
    grad(dA) = s * (gy B)^T x          [r, in]          s = alpha / r

which `exact_mute` computes: no added forward work, no [out, in] temporary, nothing that can underflow. Layers that read
one input (query, key and value; gate and up) share their products with it and sum their dx in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.frozen_linear import FoldingLinear, Operands
from titan_hd.adapters.inject import replace_linears
from titan_hd.adapters.local_model import local_model
from titan_hd.adapters.method import FoldingMethod
from titan_hd.adapters.shared_products import by_layer, fp32_product, joined, let_share, outputs_in_order
from titan_hd.config import job_config
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError


class _ExactMute(torch.autograd.Function):
    """apply(x, x_adapter, scale, *operands of the first layer, *operands of the second, ...)"""

    @staticmethod
    def forward(ctx, x, x_adapter, scale, *flat):
        layers = by_layer(flat, Operands, len(Operands._fields))
        ctx.save_for_backward(x_adapter, *(t for layer in layers for t in (layer.weight, layer.a, layer.b)))
        ctx.scale = scale
        return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)

    @staticmethod
    def backward(ctx, *gys):
        """gys: dLoss/dy [..., out] of each layer. dx is one sum over the layers; da and db come in fp32."""
        x, *saved = ctx.saved_tensors
        weights, a, b = saved[0::3], saved[1::3], saved[2::3]
        shape, x, gys = x.shape, x.flatten(0, -2), [gy.flatten(0, -2) for gy in gys]
        dx = None
        if ctx.needs_input_grad[0]:  # the first block's input needs no gradient: the embedding is frozen
            dx = gys[0] @ weights[0]
            for gy, weight in zip(gys[1:], weights[1:]):
                dx.addmm_(gy, weight)
            dx = dx.view(shape)
        gb = [gy @ factor.to(gy.dtype) for gy, factor in zip(gys, b)]  # [tokens, r] each
        grad_da = fp32_product(joined(gb, 1).T, x, ctx.scale)
        xa = (x @ joined(a, 0).to(x.dtype).T).split([factor.shape[0] for factor in a], 1)
        grads = []
        for gy, part, da in zip(gys, xa, grad_da.split([factor.shape[0] for factor in a])):
            grads += [None, None, None, None, da, fp32_product(part.T, gy, ctx.scale).T]
        return dx, None, None, *grads


def exact_mute(
    x: torch.Tensor, layers: list[Operands], scale: float, x_adapter: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """y = x W^T + bias [..., out] of each layer, with gradients to x [..., in] and (fp32) to da and db as said above.

    x_adapter is what the adapters see: x itself, or x after dropout. The values of da and db are not read.
    """
    seen = x if x_adapter is None else x_adapter
    return _ExactMute.apply(x, seen.detach(), scale, *(tensor for layer in layers for tensor in layer))


class HDPissaLinear(FoldingLinear):
    """A frozen linear layer with the slice of one logical adapter bound to it, or with those of all.

    scale: alpha / r. mute_scalar: the paper's g, or 0 for the exact mute. together: adapters that are bound side by
    side, as one of rank K r: 1, or all of them. compute: the layers' outputs, as `exact_mute` has it. skinny: products
    of width r that it takes beside the frozen layer's.
    """

    compute: ClassVar[Callable[..., tuple[torch.Tensor, ...]]] = staticmethod(exact_mute)
    skinny: ClassVar[int] = 4

    def __init__(self, linear: nn.Linear, scale: float, dropout: float, mute_scalar: float, together: int = 1):
        super().__init__(linear, dropout)
        self.scale, self.mute_scalar, self.together = scale, mute_scalar, together

    @property
    def shares_products(self) -> bool:
        """Whether `compute` runs on the layer's own input: dropout draws another mask for every layer."""
        return self.mute_scalar == 0.0 and not self.drops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():  # nothing to learn: the frozen layer
            return F.linear(x, *self.parameters_for_compute())
        layer = self.operands()
        x_adapter = self.dropped(x)
        if self.mute_scalar == 0.0:
            return self.compute(x, [layer], self.scale, x_adapter)[0]
        low_rank = F.linear(x_adapter, (layer.a + layer.da).to(x.dtype))
        low_rank = F.linear(low_rank, (layer.b + layer.db).to(x.dtype))
        return F.linear(x, layer.weight, layer.bias) + self.mute_scalar * self.scale * low_rank

    def flops(self, tokens: float) -> float:
        """The skinny products; with a mute scalar LoRA's six."""
        rank = self.together * self.delta_A.shape[1]
        return (6 if self.mute_scalar else self.skinny) * rank * (self.in_features + self.out_features)


class LocalHDPissaLinear(HDPissaLinear):
    """Computes with W + (B + dB)(A + dA) - B A: what `hdpissa.local_steps` has not folded yet is in the forward pass.
    (Without gradients, as in validation, it is the frozen layer: W as the last fold left it.)"""

    compute = staticmethod(local_model)
    skinny = 10


def project_together(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Outputs of several linear layers of one input [..., in]; those that are adapted share their products with it."""
    learning = torch.is_grad_enabled()
    sharing = [layer for layer in layers if isinstance(layer, HDPissaLinear) and layer.shares_products and learning]
    return outputs_in_order(
        x, layers, sharing, lambda shared: shared[0].compute(x, [layer.operands() for layer in shared], shared[0].scale)
    )


_IDEAS = {
    "orthogonal": "each of K adapters trains another slice of a weight's leading singular directions",
    "minor": "each of K adapters trains another slice of a weight's last singular directions",
    "top": "all of K adapters train a weight's r leading singular directions",
    "random": "each of K adapters trains random directions of a weight",
}


class HDPissa(FoldingMethod):
    """HD-PiSSA: K logical adapters of rank r on every targeted layer; nothing else is trained."""

    name, title, paper = "hdpissa", "HD-PiSSA", "arXiv 2505.18777"
    how = "logical adapters train different SVD slices of each weight; their updates are folded into the weight itself"
    trains, size = "dA [K, r, in], dB [K, out, r], zero after every fold", "K r (in + out)"
    base = "changed by every fold"
    resume_keys = (
        "adapter.rank",
        "adapter.alpha",
        "adapter.dropout",
        "hdpissa.slices",
        "hdpissa.factor_scale",
        "hdpissa.samples",
        "hdpissa.refresh_steps",
        "hdpissa.local_steps",
        "hdpissa.aggregate",
        "hdpissa.mute_scalar",
    )
    keys = (
        *("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.svd", "adapter.svd_niter", "adapter.svd_cache"),
        *(f"hdpissa.{field.name}" for field in dataclasses.fields(job_config.HDPissa)),
    )
    no_peft = "it changes W itself, by a matrix that is not of low rank"

    def __init__(
        self,
        num_adapters: int,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        mute_scalar: float = 0.0,
        slices: str = "orthogonal",
        samples: str = "own",
        local_steps: int = 1,
    ):
        super().__init__()
        self.num_adapters, self.rank = num_adapters, rank
        self.idea = f"{_IDEAS[slices]}; what they learn is folded into the one sharded W"
        self.dropout, self.mute_scalar, self.slices, self.samples = dropout, mute_scalar, slices, samples
        self.layer = LocalHDPissaLinear if local_steps > 1 else HDPissaLinear
        self.shares = 1 if samples == "all" else num_adapters
        self.scale = (rank if alpha is None else alpha) / rank
        # "top" and "random" give every adapter directions of its own choice, of which the weight needs r.
        self._needed = rank if slices in ("top", "random") else num_adapters * rank
        self.smallest = slices == "minor"
        self.directions = 0 if slices == "random" else self._needed

    @classmethod
    def from_config(cls, config: JobConfig, num_adapters: int = 1) -> HDPissa:
        a, h = config.adapter, config.hdpissa
        return cls(num_adapters, a.rank, a.alpha, a.dropout, h.mute_scalar, h.slices, h.samples, h.local_steps)

    @classmethod
    def config_errors(cls, config: JobConfig) -> list[str]:
        """Keys of [hdpissa] and [adapter] that make no sense together, a line each."""
        h, validation = config.hdpissa, config.validation
        within = h.local_steps > 1 and validation.freq % h.local_steps != 0
        faults = {
            'adapter.svd: randomized finds the leading directions, slices = "minor" wants the last; use exact': (
                h.slices == "minor" and config.adapter.svd == "randomized"
            ),
            "hdpissa.factor_scale: unit is for singular directions, and random slices have none; use root": (
                h.slices == "random" and h.factor_scale == "unit"
            ),
            "hdpissa.samples: all is for the exact mute; set hdpissa.mute_scalar to 0": (
                h.samples == "all" and h.mute_scalar != 0.0
            ),
            "hdpissa.slices: top slices that learn from all samples would all learn the same; use orthogonal": (
                h.samples == "all" and h.slices == "top"
            ),
            "hdpissa.local_steps: dA and dB of several steps stay in the forward pass, which a mute scalar would mute; "
            "set hdpissa.mute_scalar to 0": h.local_steps > 1 and h.mute_scalar != 0.0,
            "hdpissa.local_steps: with samples = all every worker would need everybody's dA and dB in every step; "
            "set it to 1, or hdpissa.samples to own": h.local_steps > 1 and h.samples == "all",
            f"hdpissa.refresh_steps: slices are taken from a W that is folded; use a multiple of hdpissa.local_steps = "
            f"{h.local_steps}": h.refresh_steps % max(1, h.local_steps) != 0,
            "hdpissa.local_steps: dA and dB stay for several steps, in which ASGD would shrink them; use another "
            "optimizer.name, or set it to 1": h.local_steps > 1 and config.optimizer.name == "ASGD",
            "validation.patience: between two folds the validated W stays, which would count as no gain; use a "
            f"validation.freq that is a multiple of hdpissa.local_steps = {h.local_steps}, or set it to 0": (
                within and validation.enable and validation.patience > 0
            ),
            "hdpissa.exchange: dense sends sums of updates, which int8 cannot hold; use auto or factors": (
                h.exchange_dtype == "int8" and h.exchange == "dense"
            ),
            "hdpissa.exchange_dtype: int8 leaves residuals in dA and dB, which a mute scalar mixes into the gradients; "
            "set hdpissa.mute_scalar to 0": h.exchange_dtype == "int8" and h.mute_scalar != 0.0,
            "hdpissa.exchange_dtype: int8 leaves residuals in dA and dB, which ASGD would shrink; "
            "use another optimizer.name": h.exchange_dtype == "int8" and config.optimizer.name == "ASGD",
            "hdpissa.refresh_steps: new slices after every fold would drop all that int8 leaves for the next one; use "
            "a larger one, or another hdpissa.exchange_dtype": (
                h.exchange_dtype == "int8" and h.refresh_steps == h.local_steps
            ),
        }
        return [line for line, fault in faults.items() if fault]

    @classmethod
    def adapters_for(cls, config: JobConfig, workers: int) -> int:
        return config.hdpissa.num_adapters or workers

    @classmethod
    def tensor_parallel(cls) -> bool:
        return True

    def trained_parameters(self, model: nn.Module) -> int:
        layers = [layer for layer in model.modules() if isinstance(layer, HDPissaLinear)]
        slices = self.num_adapters * self.rank * sum(layer.in_features + layer.out_features for layer in layers)
        head = getattr(model, "trained_head", lambda: None)()
        return slices + sum(p.numel() for p in head.parameters()) if head is not None else slices

    def change(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """Replace the targeted layers (default: all linear layers but the head) and freeze everything.

        Raises:
            UserError: a target that matches no layer, or a layer too small for K slices of rank r.
        """
        model.requires_grad_(False)
        settings = self.scale, self.dropout, self.mute_scalar, self.together
        layers = replace_linears(model, target_modules, lambda linear: self.layer(linear, *settings))
        for name, layer in layers.items():
            error = self.shape_error(name, (layer.out_features, layer.in_features))
            if error:
                raise UserError(error)
        let_share(model, project_together)
        return list(layers)

    def shape_error(self, name: str, shape: tuple[int, int]) -> str | None:
        """One line if a weight [out, in] has fewer singular directions than the adapters' slices need."""
        k, r = self._needed // self.rank, self.rank
        if self._needed <= min(shape):
            return None
        return (
            f"adapter.rank: the slices need K * r = {k} * {r} = {self._needed} singular directions, "
            f"{name} of shape {list(shape)} has {min(shape)}; lower adapter.rank or hdpissa.num_adapters"
        )
