"""Finds the linear layers that a config targets and puts a method's layer in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.errors import UserError

Layer = TypeVar("Layer", bound=FrozenLinear)


def find_linears(model: nn.Module, target_modules: list[str] | None) -> list[str]:
    """Full names of the targeted nn.Linear layers, in the model's order; without targets of all but the head's. A head
    that is trained beside any method is no target.

    Raises:
        UserError: a target that matches no linear layer.
    """
    trained_head = getattr(model, "trained_head", lambda: None)()
    trained = set() if trained_head is None else set(trained_head.modules())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in trained}
    if target_modules is None:
        head = getattr(model, "output_head", lambda: None)()
        beside = set() if head is None else set(head.modules())
        return [name for name, module in linears.items() if module not in beside]
    for target in target_modules:
        if not any(is_target(name, target) for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UserError(f"adapter.target_modules: {target!r} is no linear layer of the model; there are {known}")
    return targeted(linears, target_modules)


def is_target(name: str, target: str) -> bool:
    """Whether a target means a linear layer: it is its name, or the end of it behind a dot ("key", "attention.key").
    A target is of all blocks: a name with a block's number is none."""
    of_one_block = any(part.isdigit() for part in target.split("."))
    return not of_one_block and (name == target or name.endswith(f".{target}"))


def targeted(names: Iterable[str], target_modules: list[str] | None) -> list[str]:
    """Those of some linear layers, or of the kinds of them, that are targeted; without targets all of them."""
    return [n for n in names if target_modules is None or any(is_target(n, target) for target in target_modules)]


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
