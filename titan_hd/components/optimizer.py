"""Builds any torch.optim optimizer from the [optimizer] section, and clips gradients."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from titan_hd.config.job_config import Optimizer
from titan_hd.distributed.flat import square_sum
from titan_hd.errors import UserError

# Optimizers of torch.optim that cannot train an adapter's [K, r, in] parameter with the settings of [optimizer]. All
# others compute element by element, so that they may train many tensors as one flat one.
_UNFIT = {
    "Adafactor": "wants a pair of eps",
    "Muon": "trains matrices only",
    "SparseAdam": "wants sparse gradients",
}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of torch.optim by name. ValueError if there is none, or if it cannot train by plain steps."""
    cls = getattr(torch.optim, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or name in ("Optimizer", "LBFGS"):
        raise UserError(f"optimizer.name: {name!r} is no optimizer of torch.optim; use for example AdamW, Adam or SGD")
    if name in _UNFIT:
        raise UserError(f"optimizer.name: {name} {_UNFIT[name]}; use for example AdamW, Adam or SGD")
    return cls


def build_optimizer(
    config: Optimizer,
    parameters: Mapping[nn.Parameter, str],
    weight_decay: float,
    lr_ratios: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over `parameters` (with their names).

    lr_ratios: last part of a name -> factor on the learning rate, 1 unless given. Every group has its own as
    "lr_ratio", for whoever sets the rates later.

    The fused implementation where there is one, on GPUs, for plain tensors: one kernel, and no temporary tensors. Else
    the foreach one: fused AdamW on DTensors leaks host memory at every step, and on a CPU it computes the elements at
    the end of a tensor, which are others on other meshes, with another rounding.
    """
    cls = optimizer_class(config.name)
    fused = not any(isinstance(p, DTensor) or p.device.type != "cuda" for p in parameters)
    offered: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": weight_decay,
    }
    accepted = inspect.signature(cls).parameters
    offered["fused" if fused and "fused" in accepted else "foreach"] = True
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, name in parameters.items():
        groups.setdefault((lr_ratios or {}).get(name.rpartition(".")[2], 1.0), []).append(parameter)
    grouped = [{"params": members, "lr": config.lr * ratio, "lr_ratio": ratio} for ratio, members in groups.items()]
    return cls(grouped, **{key: value for key, value in offered.items() if key in accepted})


def step_if_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Take an optimizer's step, unless the gradients' norm, 0-dim, is not finite: then parameters and state stay.

    On a GPU the host does not know the norm; the fused implementations read it there. (An optimizer without one takes
    the step, and its state is lost.)
    """
    if norm.device.type == "cpu":
        if norm.isfinite():
            optimizer.step()
        return
    tell_fused(optimizer, norm)
    optimizer.step()


def tell_fused(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """If it is a fused one: whether its next step is to do nothing."""
    if any(group.get("fused") for group in optimizer.param_groups):
        # pyrefly: ignore[missing-attribute]: what torch.amp's GradScaler sets, too
        optimizer.found_inf = (~norm.isfinite()).float()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Global L2 norm over all parameters, shards and logical adapters; clips to max_norm if that is above 0.

    Every rank adds the squares of what it holds, divided by how many ranks hold the same: one all-reduce of a number.

    Returns:
        the norm before clipping, 0-dim on the device: the host does not wait for it.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    squares = torch.stack(torch._foreach_norm(local)).square()
    copies = _constant(tuple(map(_copies, gradients)), squares.device)
    return _clip(local, (squares / copies).sum(), max_norm)


@torch.no_grad()
def clip_flat(parts: list[tuple[torch.Tensor, int]], max_norm: float) -> torch.Tensor:
    """`clip_gradients` in float64, of flat parts of a gradient, each with the number of ranks that hold the same."""
    total = sum(square_sum(part) / copies for part, copies in parts)
    assert isinstance(total, torch.Tensor)
    return _clip([part for part, _ in parts], total, max_norm)


def held_parts(gradients: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    """What this rank holds of gradients, each with the number of ranks that hold the same."""
    return [(g.to_local() if isinstance(g, DTensor) else g, _copies(g)) for g in gradients]


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm, 0-dim, are multiplied with, of its dtype and on its device; 1 where max_norm is 0,
    which clips nothing."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)


def _clip(local: list[torch.Tensor], total: torch.Tensor, max_norm: float) -> torch.Tensor:
    """total: the sum of this rank's squares."""
    if dist.is_initialized():
        dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(local, clip_factor(norm, max_norm).to(local[0].dtype))
    return norm


@functools.lru_cache(maxsize=8)
def _constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Made once: the host would wait for the device in every step to copy them there."""
    return torch.tensor(values, device=device)


def _copies(gradient: torch.Tensor) -> int:
    """Replicas of a gradient shard: world size / product of the sharded mesh dimensions."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(gradient, DTensor):
        return world
    mesh = gradient.device_mesh
    # FSDP2 over TP uses `_StridedShard`, whose is_shard() is False: hence not `is_replicate()`.
    return world // math.prod(mesh.size(i) for i, p in enumerate(gradient.placements) if not p.is_replicate())
