"""Layers of one input (query, key and value; gate and up) that compute as one, so that they read it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Operands = TypeVar("Operands")


def let_share(model: nn.Module, project: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Have `project` (x, *layers) compute the layers of one input, in the modules that let a method say so
    (`models.decoder.Attention` and `MLP`)."""
    for module in model.modules():
        if hasattr(module, "project"):
            # pyrefly: ignore[bad-argument-type]: a module takes any attribute; torch's __setattr__ says tensor or module
            module.project = project


def outputs_in_order(
    x: torch.Tensor, layers: tuple[nn.Module, ...], sharing: list, compute: Callable[[list], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """Outputs of all layers, in their order: of those in `sharing` what `compute` returns for them together, of the
    others (or if there are not two that share) each layer's own."""
    if len(sharing) < 2:
        return tuple(layer(x) for layer in layers)
    outputs = iter(compute(sharing))
    return tuple(next(outputs) if layer in sharing else layer(x) for layer in layers)


def by_layer(flat: tuple, operands: Callable[..., Operands], width: int) -> list[Operands]:
    """The operands of each layer, `width` of them, out of the flat arguments of an autograd.Function."""
    return [operands(*flat[i : i + width]) for i in range(0, len(flat), width)]


def joined(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """torch.cat; a single tensor is not copied."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def fp32_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right in fp32; on a GPU no 16-bit value is rounded on the way."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        product = (left @ right).float()
    return product if scale == 1.0 else product * scale
