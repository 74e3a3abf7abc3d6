"""The token loss is a sum: what it is divided by is counted over the whole optimizer step."""

from __future__ import annotations

import torch

from titan_hd.components.loss import IGNORE_INDEX, token_loss_sum
from titan_hd.data.example import IGNORE

# fp32 logarithms of sums of 11 exponentials, against float64.
LOSS_TOLERANCE = 1e-5


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=generator)
    targets = torch.randint(11, (2, 6), generator=generator)
    targets[0, :4] = IGNORE_INDEX
    return logits, targets


def test_by_hand():
    logits, targets = logits_and_targets()
    expected = 0.0
    for b in range(2):
        for t in range(6):
            if targets[b, t] != IGNORE_INDEX:
                row = logits[b, t].double()
                expected += torch.logsumexp(row, 0) - row[targets[b, t]]
    torch.testing.assert_close(token_loss_sum(logits, targets).double(), expected, rtol=LOSS_TOLERANCE, atol=0)


def test_a_sum_over_parts_is_the_sum():
    logits, targets = logits_and_targets()
    parts = sum(token_loss_sum(logits[i : i + 1], targets[i : i + 1]) for i in range(2))
    torch.testing.assert_close(parts, token_loss_sum(logits, targets), rtol=LOSS_TOLERANCE, atol=0)


def test_nothing_to_learn_gives_zero_and_no_nan():
    """The last validation batches and fully masked records."""
    logits, targets = logits_and_targets()
    logits.requires_grad_(True)
    loss = token_loss_sum(logits, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_computed_in_fp32():
    logits, targets = logits_and_targets()
    loss = token_loss_sum(logits.bfloat16(), targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, token_loss_sum(logits.bfloat16().float(), targets))


def test_the_data_and_the_loss_mean_the_same_by_ignored():
    assert IGNORE == IGNORE_INDEX
