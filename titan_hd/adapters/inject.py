"""Finds the linear layers that a config targets and puts a method's layer in their place."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from titan_hd.errors import UserError


def find_linears(model: nn.Module, target_modules: list[str]) -> list[str]:
    """Full names of the nn.Linear layers whose last name part is targeted, in the model's order.

    Raises:
        ValueError: a target that matches no linear layer.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last_parts = {name.rpartition(".")[2] for name in linears}
    for target in target_modules:
        if target not in last_parts:
            known = ", ".join(sorted(last_parts))
            raise UserError(f"adapter.target_modules: {target!r} is no linear layer of the model; there are {known}")
    return [name for name in linears if name.rpartition(".")[2] in set(target_modules)]


def replace_linears(
    model: nn.Module, target_modules: list[str], make: Callable[[nn.Linear], nn.Linear]
) -> dict[str, nn.Linear]:
    """Replace every targeted layer in place by `make(layer)`; returns the new layers by name."""
    replaced = {}
    for name in find_linears(model, target_modules):
        parent_name, _, last = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        replaced[name] = make(getattr(parent, last))
        setattr(parent, last, replaced[name])
    return replaced
