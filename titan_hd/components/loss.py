"""Token losses. A loss is a sum over tokens; what it is divided by is a count over the whole optimizer step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def token_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies in fp32. logits [B, T, vocabulary]; targets [B, T], -100 where nothing is learned.

    targets are already shifted: targets[:, t] is the token that follows position t.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
