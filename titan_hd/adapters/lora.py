"""LoRA (arXiv 2106.09685): y = x W^T + s (x A^T) B^T with A [r, in], B [out, r] trained and W frozen.

s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). LoRA+ (arXiv 2402.12354) gives B a learning rate of its
own. A is drawn from kaiming_uniform(a = sqrt 5), B is zero, so that the first forward pass is the base model's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.adapter_linear import AdapterLinear, AdapterMethod
from titan_hd.adapters.shared_products import by_layer, joined, let_share, outputs_in_order
from titan_hd.config.job_config import Adapter, JobConfig


class Operands(NamedTuple):
    """What one layer computes with: weight [out, in] and bias [out] or None, frozen; a [r, in] and b [out, r]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor


class _LowRank(torch.autograd.Function):
    """apply(x, scale, *operands of the first layer, *operands of the second, ...)

    The layers share one product x [A; A'; ...]^T, one of the gradients with x, and one dx, summed in place. Autograd
    would make a tensor like x for every product that x goes through, and add them up.
    """

    @staticmethod
    def forward(ctx, x, scale, *flat):
        layers, rows = by_layer(flat, Operands, len(Operands._fields)), x.flatten(0, -2)
        low = rows @ joined([layer.a for layer in layers], 0).T
        ctx.save_for_backward(x, low, *(t for layer in layers for t in (layer.weight, layer.a, layer.b)))
        ctx.scale = scale
        ys = []
        for layer, part in zip(layers, low.split([layer.a.shape[0] for layer in layers], 1)):
            y = F.linear(rows, layer.weight, layer.bias).addmm_(part, layer.b.T, alpha=scale)
            ys.append(y.view(*x.shape[:-1], -1))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gys):
        """gys: dLoss/dy [..., out] of each layer. Everything comes in the dtype of the computation."""
        x, low, *saved = ctx.saved_tensors
        weights, a, b = saved[0::3], saved[1::3], saved[2::3]
        ranks, rows, gys = [factor.shape[0] for factor in a], x.flatten(0, -2), [gy.flatten(0, -2) for gy in gys]
        g_low = joined([gy @ factor for gy, factor in zip(gys, b)], 1).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:  # the first block's input needs no gradient: the embedding is frozen
            dx = gys[0] @ weights[0]
            for gy, weight in zip(gys[1:], weights[1:]):
                dx.addmm_(gy, weight)
            dx = dx.addmm_(g_low, joined(a, 0)).view(x.shape)
        grads = []
        for da, part, gy in zip((g_low.T @ rows).split(ranks), low.split(ranks, 1), gys):
            grads += [None, None, da, (part.T @ gy).T * ctx.scale]
        return dx, None, *grads


def low_rank(x: torch.Tensor, layers: list[Operands], scale: float) -> tuple[torch.Tensor, ...]:
    """y = x W^T + bias + scale (x A^T) B^T [..., out] of each layer, with gradients to x [..., in], A and B."""
    return _LowRank.apply(x, scale, *(tensor for layer in layers for tensor in layer))


class LoRALinear(AdapterLinear):
    """The tensors have PEFT's names and orientation."""

    tp_splits: ClassVar = {0: {"lora_B": 0}, 1: {"lora_A": 1}}

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        more: dict[str, tuple[int, ...]] | None = None,
    ):
        """more: name -> shape of what a method trains beside A and B."""
        shapes = {"lora_A": (rank, linear.in_features), "lora_B": (linear.out_features, rank)}
        super().__init__(linear, {**shapes, **(more or {})}, dropout)
        self.rank, self.scale = rank, scale

    @classmethod
    def shape_error(cls, shape: tuple[int, int], rank: int, **settings: Any) -> str | None:
        if rank > min(shape):
            return f"adapter.rank: {rank} is more than the smaller side of a weight, {min(shape)}"
        return None

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        a = kaiming_uniform(self.rank, self.in_features, generator)
        return {"lora_A": a, "lora_B": torch.zeros(self.out_features, self.rank)}

    def operands(self) -> Operands:
        """What `low_rank` needs of this layer."""
        return Operands(*self.parameters_for_compute(), self.tensor("lora_A"), self.tensor("lora_B"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.operands()
        if not self.drops:
            return low_rank(x, [layer], self.scale)[0]
        seen = F.linear(self.dropped(x), layer.a)
        return add_low_rank(F.linear(x, layer.weight, layer.bias), seen, layer.b, self.scale)

    def merged(self, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight, lora_B, lora_A, alpha=self.scale)

    def flops(self, tokens: float) -> float:
        """Two skinny products forward, four backward (for x, A, B and the low-rank activation)."""
        return 6 * self.rank * (self.in_features + self.out_features)


def project_together(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Outputs of several linear layers of one input [..., in]; those that are adapted share their products with it,
    unless dropout draws another mask for each."""
    sharing = [layer for layer in layers if isinstance(layer, LoRALinear) and not layer.drops]
    return outputs_in_order(
        x, layers, sharing, lambda shared: low_rank(x, [layer.operands() for layer in shared], shared[0].scale)
    )


class OLoRALinear(LoRALinear):
    """OLoRA (arXiv 2406.01775): LoRA that starts from W = Q R with B = Q[:, :r], A = R[:r], over W - s B A.

    dtype: that in which A and B are gathered; see `over_remainder`.
    """

    reads_weight = changes_weight = True

    def __init__(
        self, linear: nn.Linear, rank: int, scale: float, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ):
        super().__init__(linear, rank, scale, dropout)
        self.dtype = dtype

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        assert weight is not None  # reads_weight
        # The leading columns of Q depend on those of W alone, and R = Q^T W: no whole decomposition is needed.
        q = torch.linalg.qr(weight[:, : self.rank].double())[0].float()
        return over_remainder(weight, q.T @ weight, q, self.scale, self.dtype)


class LoRA(AdapterMethod):
    """LoRA with its variants rsLoRA, LoRA+ and OLoRA."""

    name, title, paper = "lora", "LoRA", "arXiv 2106.09685"
    idea = "a product B A of rank r is trained beside each frozen weight"
    trains, size = "A [r, in], B [out, r]", "r (in + out)"
    resume_keys = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.rslora", "adapter.init")
    keys = (*resume_keys, "adapter.loraplus_lr_ratio")
    layer = LoRALinear

    @classmethod
    def from_config(cls, config: JobConfig, num_adapters: int = 1) -> LoRA:
        """As `Method.from_config`: OLoRA's layers where `adapter.init` asks for them, and LoRA+'s ratio of rates."""
        layer = OLoRALinear if config.adapter.init == "olora" else cls.layer
        settings = cls.layer_settings(config)
        if layer.changes_weight:
            # "auto" until a run's device is known (`components.dtypes`); then only the layer's shapes are asked for.
            param = config.training.mixed_precision_param
            settings["dtype"] = torch.float32 if param == "auto" else getattr(torch, param)
        method = cls(layer, **settings)
        if layer is OLoRALinear:
            method.idea = (
                "a product B A of rank r that begins as a part of W, by its QR decomposition, beside the frozen rest"
            )
        ratio = config.adapter.loraplus_lr_ratio
        method.lr_ratios = {} if ratio == 1.0 else {"lora_B": ratio}
        return method

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        a = config.adapter
        scale = a.effective_alpha / (math.sqrt(a.rank) if a.rslora else a.rank)
        return {"rank": a.rank, "scale": scale, "dropout": a.dropout}

    def change(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        names = super().change(model, target_modules)
        if self.layer.forward is LoRALinear.forward:  # DoRA's has more to do
            let_share(model, project_together)
        return names

    @classmethod
    def peft_config(cls, adapter: Adapter) -> dict[str, Any]:
        common = {"peft_type": "LORA", "lora_dropout": adapter.dropout, "bias": "none", "use_dora": False}
        if cls.layer.changes_weight or adapter.init == "olora":
            # The export makes an adapter of rank 2r, [A | A0] and [s B | -s B0], of the model directory's weights.
            return {**common, "r": 2 * adapter.rank, "lora_alpha": 2 * adapter.rank, "use_rslora": False}
        return {**common, "r": adapter.rank, "lora_alpha": adapter.effective_alpha, "use_rslora": adapter.rslora}


def kaiming_uniform(rank: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """LoRA's first A [rank, in], on the host: kaiming_uniform with a = sqrt 5, which comes to +- 1 / sqrt(in)."""
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def over_remainder(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """First values, as `initial` returns them, of adapters that start as a part of W: A and B, and the base weight
    without them, W - s B A.

    dtype: that in which A and B are gathered. They are rounded to it first, so that the remainder takes up what they
    lose and the sum stays W.
    """
    a, b = a.to(dtype).float(), b.to(dtype).float()
    return {"lora_A": a, "lora_B": b, "weight": torch.addmm(weight, b, a, alpha=-scale)}


def add_low_rank(y: torch.Tensor, low_rank: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """y [..., out] + scale * low_rank [..., r] b^T without a product [..., out] of its own."""
    return torch.addmm(y.flatten(0, -2), low_rank.flatten(0, -2), b.T, alpha=scale).view_as(y)
