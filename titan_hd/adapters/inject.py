"""Finds the linear layers that a config targets and puts a method's layer in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.errors import UserError

Layer = TypeVar("Layer", bound=FrozenLinear)


def find_linears(model: nn.Module, target_modules: list[str] | None) -> list[str]:
    """Full names of the nn.Linear layers whose last name part is targeted, in the model's order; without targets of all
    but the head.

    Raises:
        UserError: a target that matches no linear layer.
    """
    head = getattr(model, "lm_head", None)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if target_modules is None:
        return [name for name in linears if model.get_submodule(name) is not head]
    last_parts = {name.rpartition(".")[2] for name in linears}
    for target in target_modules:
        if target not in last_parts:
            known = ", ".join(sorted(last_parts))
            raise UserError(f"adapter.target_modules: {target!r} is no linear layer of the model; there are {known}")
    return [name for name in linears if name.rpartition(".")[2] in set(target_modules)]


def replace_linears(
    model: nn.Module, target_modules: list[str] | None, make: Callable[[nn.Linear], Layer]
) -> dict[str, Layer]:
    """Replace every targeted layer in place by `make(layer)` and tell it its name; returns the new layers by name."""
    replaced = {}
    for name in find_linears(model, target_modules):
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        replaced[name] = layer = make(getattr(parent, last))
        layer.name = name
        setattr(parent, last, layer)
    return replaced
