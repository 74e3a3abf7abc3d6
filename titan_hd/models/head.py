"""The head and the loss in one: cross entropy of hidden states, without logits for more than a chunk of positions.

For V = 128,256 words the logits of one token are 0.5 MB in fp32, and autograd would keep them, their softmax and their
gradient. Here a chunk's logits become its loss and, at once, the gradient of its hidden states (and of a trained head),
before the next chunk's are computed. The backward pass only scales. Positions without a label are not computed at all.

torch.nn.functional.linear_cross_entropy (torch 2.13) does the same for a head that is whole. It is not used because
torch 2.11 and 2.12 have not got it, and because tensor parallelism splits the vocabulary: its cross entropy is an
argument here (`distributed.tp.loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100
# Positions whose logits exist at a time: enough for the products of any GPU; 1,024 x 128,256 in fp32 are 0.5 GB.
CHUNK = 1024


class Targets(NamedTuple):
    """What is learned in a batch of B x T tokens.

    positions: [N] of those of the flat B*T that have a label, ascending; labels: [N], the token that follows each.
    """

    positions: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, targets: torch.Tensor) -> Targets:
        """Of targets [B, T], -100 where nothing is learned; best on the host, for the number of positions is needed."""
        flat = targets.flatten()
        positions = (flat != IGNORE_INDEX).nonzero()[:, 0]
        return cls(positions, flat[positions])


# (logits [n, V] in fp32, labels [n]) -> the sum of their cross entropies [], in fp32; the logits become its gradient
CrossEntropySum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_sum_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A `CrossEntropySum` of whole rows of logits; every pass over them is in place."""
    index = labels[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    at_label = logits.gather(1, index)[:, 0]
    sums = logits.exp_().sum(1)
    logits.div_(sums[:, None]).scatter_add_(1, index, logits.new_full((1, 1), -1.0).expand_as(index))
    return (sums.log() - at_label).sum()


class _LossOfHead(torch.autograd.Function):
    """apply(h [N, D], weight [V, D], labels [N], cross entropy, whether gradients are wanted) -> sum of losses []"""

    @staticmethod
    def forward(ctx, h, weight, labels, cross_entropy_sum, differentiate):
        """Chunk by chunk; dh and dW are made here, so that no logits are kept."""
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if differentiate else None
        # Summed over chunks in fp32, whatever the head is computed in.
        dw = torch.zeros_like(weight, dtype=torch.float32) if differentiate and weight.requires_grad else None
        for start in range(0, len(h), CHUNK):
            part = slice(start, start + CHUNK)
            logits = F.linear(h[part], weight).float()
            total += cross_entropy_sum(logits, labels[part])
            if dh is not None:
                gradient = logits.to(weight.dtype)
                dh[part] = gradient @ weight
                if dw is not None and gradient.dtype == dw.dtype:
                    dw.addmm_(gradient.T, h[part])
                elif dw is not None:
                    dw += gradient.T @ h[part]
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *gys):
        """Scales what is there in place: the gradient of a head is as large as the head."""
        (gy,), (dh, dw) = gys, ctx.saved_tensors
        return dh.mul_(gy.to(dh.dtype)), None if dw is None else dw.mul_(gy).to(ctx.dtype), None, None, None


class Head(nn.Linear):
    """Logits of hidden states, or, where targets are given, the sum of their cross entropies."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, input: torch.Tensor, targets: Targets | None = None) -> torch.Tensor:
        return logits_or_loss(input, self.weight, targets)


def logits_or_loss(
    h: torch.Tensor,
    weight: torch.Tensor,
    targets: Targets | None,
    cross_entropy_sum: CrossEntropySum = cross_entropy_sum_,
) -> torch.Tensor:
    """Logits [B, T, V] of hidden states [B, T, D] and a head [V, D]; with targets the sum of the cross entropies, [] in
    fp32, over the positions that have a label."""
    if targets is None:
        return F.linear(h, weight)
    differentiate = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    rows = h.flatten(0, 1).index_select(0, targets.positions)
    return _LossOfHead.apply(rows, weight, targets.labels, cross_entropy_sum, differentiate)
