"""Builds any torch.optim optimizer from the [optimizer] section, and clips gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from titan_hd.config.job_config import Optimizer

# Optimizers of torch.optim that cannot train an adapter's [K, r, in] parameter with the settings of [optimizer].
_UNFIT = {
    "Adafactor": "wants a pair of eps",
    "Muon": "trains matrices only",
    "SparseAdam": "wants sparse gradients",
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of torch.optim by name. ValueError if there is none, or if it cannot train by plain steps."""
    cls = getattr(torch.optim, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or name in ("Optimizer", "LBFGS"):
        raise ValueError(f"optimizer.name: {name!r} is no optimizer of torch.optim; use for example AdamW, Adam or SGD")
    if name in _UNFIT:
        raise ValueError(f"optimizer.name: {name} {_UNFIT[name]}; use for example AdamW, Adam or SGD")
    return cls


def build_optimizer(
    config: Optimizer, parameters: Iterable[nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer over `parameters`.

    Always the foreach implementation: fused AdamW on DTensors leaks host memory at every step.
    """
    cls = optimizer_class(config.name)
    offered = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": weight_decay,
        "foreach": True,
    }
    accepted = inspect.signature(cls).parameters
    return cls(list(parameters), **{key: value for key, value in offered.items() if key in accepted})


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Global L2 norm over all parameters, shards and logical adapters; clips to max_norm if that is above 0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm.item()
