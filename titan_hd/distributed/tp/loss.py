"""The loss of logits whose vocabulary is split over tp: no rank ever holds a whole row of logits.

Cross entropy of a row is log(sum exp(l)) - l[label]. Ranks agree on the row's largest logit (an all-reduce of one
number per row), then add up their parts of the sum of exponentials and the label's logit, which one of them has (an
all-reduce of two numbers per row). The gradient of a rank's logits is its own part of softmax - onehot.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def split_cross_entropy_sum_(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A `models.head.CrossEntropySum` of this rank's part of the logits, [n, V / tp]; the same sum on all ranks."""
    part = logits.shape[1]
    local = labels - dist.get_rank(group) * part
    mine = (local >= 0) & (local < part)
    index = local.clamp(0, part - 1)[:, None]
    largest = logits.amax(1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(largest[:, None])
    at_label = torch.where(mine, logits.gather(1, index)[:, 0], 0.0)
    logits.exp_()
    sums = torch.stack((logits.sum(1), at_label))
    dist.all_reduce(sums, group=group)
    logits.div_(sums[0, :, None]).scatter_add_(1, index, -mine[:, None].to(logits.dtype))
    return (sums[0].log() - sums[1]).sum()
