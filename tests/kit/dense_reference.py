"""Methods whose change of W is a function of small tensors: training of the dense W + dW in float64, in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.kit import oracle


def bat_row_change(weight: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """dW of Bat's row form: W_c D_c + D_c under one another, for each column block c of d [in/b, b, b]."""
    b = d.shape[-1]
    columns = [weight[:, c * b : (c + 1) * b] @ d[c] + d[c].repeat(len(weight) // b, 1) for c in range(len(d))]
    return torch.cat(columns, 1)


def train(
    weights: dict[str, torch.Tensor],
    config: dict,
    batches: list[list[dict]],
    lr: float,
    tensors: dict[str, torch.Tensor],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights after them.

    tensors: name of a weight -> what is trained of it, as it starts. change: dW of a weight and its tensor.
    """
    weights = {n: w.double() for n, w in weights.items()}
    adams = {n: oracle.Adam(0.9, 0.999, 1e-8) for n in tensors}
    losses = []
    for batch in batches:
        leaves = {n: t.double().requires_grad_(True) for n, t in tensors.items()}
        current = weights | {n: weights[n] + change(weights[n], t) for n, t in leaves.items()}
        total, count = torch.zeros((), dtype=torch.float64), 0
        for record in batch:
            logits = oracle.forward(current, config, torch.tensor(record["input_ids"]))
            labels = torch.tensor(record["labels"][1:])
            total = total + F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        gradients = torch.autograd.grad(total / count, list(leaves.values()))
        losses.append((total / count).item())
        tensors = {n: leaves[n].detach() + adams[n].update(g, lr) for n, g in zip(leaves, gradients)}
    return losses, weights | {n: weights[n] + change(weights[n], t) for n, t in tensors.items()}
