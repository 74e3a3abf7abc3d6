"""The loss of logits whose vocabulary is split over tp: no rank ever holds a whole row of logits.

Cross entropy of a row is log(sum exp(l)) - l[target]. Ranks agree on the row's largest logit (an all-reduce of one
number per token), then add up their parts of the sum of exponentials and the target's logit, which one of them has (an
all-reduce of two numbers per token). Backward, each rank has its own part of softmax - onehot; nothing travels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, group):
        part = logits.shape[1]
        local = targets - dist.get_rank(group) * part
        mine = (local >= 0) & (local < part)  # an ignored target, -100, is nobody's
        index = local.clamp(0, part - 1)[:, None]
        largest = logits.amax(1).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits.float() - largest[:, None]
        target = torch.where(mine, shifted.gather(1, index)[:, 0], 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack((exponentials.sum(1), target))
        dist.all_reduce(sums, group=group)
        trained = targets >= 0
        ctx.save_for_backward(exponentials.div_(sums[0, :, None]), index, mine, trained)
        ctx.dtype = logits.dtype
        return torch.where(trained, sums[0].log() - sums[1], 0.0).sum()

    @staticmethod
    def backward(ctx, *gys):
        (gy,) = gys
        softmax, index, mine, trained = ctx.saved_tensors
        gradient = softmax.scatter_add_(1, index, -mine[:, None].to(softmax.dtype))
        return gradient.mul_((gy * trained)[:, None]).to(ctx.dtype), None, None


def vocabulary_parallel_loss_sum(logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`components.loss.token_loss_sum` of logits [B, T, vocabulary / tp], this rank's part; the same sum on all ranks.

    targets [B, T], the same on all ranks, shifted, -100 where nothing is learned. One backward pass: it reuses memory.
    """
    return _CrossEntropySum.apply(logits.flatten(0, 1), targets.flatten(), group)
