"""Finds the linear layers that a config targets and puts a method's layer in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.errors import UserError

Layer = TypeVar("Layer", bound=FrozenLinear)


def find_linears(model: nn.Module, target_modules: list[str] | None) -> list[str]:
    """Full names of the nn.Linear layers whose last name part (or parts, as "output.dense") is targeted, in the model's
    order; without targets of all but the head. A head that is trained beside any method (`trained_head`) is no target.

    Raises:
        UserError: a target that matches no linear layer.
    """
    trained_head, head = getattr(model, "trained_head", None), getattr(model, "head", None)
    beside = set() if trained_head is None else {*trained_head.modules()}
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m not in beside}
    if target_modules is None:
        return [name for name, module in found.items() if module is not head]
    for target in target_modules:
        if not any(is_target(name, [target]) for name in found):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
            raise UserError(f"adapter.target_modules: {target!r} is no linear layer of the model; there are {known}")
    return [name for name in found if is_target(name, target_modules)]


def is_target(name: str, target_modules: Sequence[str]) -> bool:
    """Whether a layer's name, or path in a block, ends with all parts of a target, as in the peft library."""
    return any(f".{name}".endswith(f".{target}") for target in target_modules)


def targeted(shapes: Mapping[str, tuple[int, int]], target_modules: list[str] | None) -> dict[str, tuple[int, int]]:
    """Of the linear layers of a block, by name or path, those that are targeted; without targets all."""
    return {name: shape for name, shape in shapes.items() if not target_modules or is_target(name, target_modules)}


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
