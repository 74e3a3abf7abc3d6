"""The head and the loss in chunks, against the whole logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from titan_hd.models import head
from titan_hd.models.head import IGNORE_INDEX, Head, Targets, logits_or_loss

# fp32 sums of some tens of terms against float64, relative to the largest element.
TOLERANCE = 2e-6


def case(labelled: float, trained: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [3, 11, 16], a head [50, 16], targets [3, 11] of which about a share has labels."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 11, 16, generator=generator).requires_grad_(True)
    weight = torch.randn(50, 16, generator=generator).requires_grad_(trained)
    targets = torch.randint(0, 50, (3, 11), generator=generator)
    targets[torch.rand(3, 11, generator=generator) >= labelled] = IGNORE_INDEX
    return h, weight, targets


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.double() - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("labelled", [0.0, 0.3, 1.0])
def test_loss_and_gradients(labelled: float, trained: bool, chunk: int, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", chunk)
    h, weight, targets = case(labelled, trained)
    loss = logits_or_loss(h, weight, Targets.of(targets))
    (loss / 5).backward()
    h64, weight64 = h.detach().double().requires_grad_(True), weight.detach().double().requires_grad_(True)
    wanted = F.cross_entropy(F.linear(h64, weight64).flatten(0, 1), targets.flatten(), reduction="sum")
    (wanted / 5).backward()
    close(loss.detach(), wanted.detach())
    close(h.grad, h64.grad)
    if trained:
        close(weight.grad, weight64.grad)
    else:
        assert weight.grad is None


def test_large_logits_do_not_overflow():
    h, weight, targets = case(1.0, False)
    loss = logits_or_loss(1e4 * h, weight, Targets.of(targets))
    wanted = F.cross_entropy(
        F.linear(1e4 * h.double(), weight.double()).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    close(loss.detach(), wanted.detach())


def test_bf16_is_summed_in_fp32():
    """The logits of a bf16 head are bf16; their exponentials, the loss and a trained head's gradient are fp32 sums."""
    h, weight, targets = case(1.0, True)
    h16, weight16 = h.detach().bfloat16().requires_grad_(True), weight.detach().bfloat16().requires_grad_(True)
    loss = logits_or_loss(h16, weight16, Targets.of(targets))
    loss.backward()
    logits = F.linear(h16, weight16).flatten(0, 1).double()
    close(loss.detach(), F.cross_entropy(logits, targets.flatten(), reduction="sum").detach())
    assert (loss.dtype, h16.grad.dtype, weight16.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


def test_without_gradient_nothing_is_kept():
    h, weight, targets = case(1.0, True)
    with torch.no_grad():
        loss = logits_or_loss(h, weight, Targets.of(targets))
    assert not loss.requires_grad


def test_logits_exist_for_a_chunk_alone(monkeypatch):
    """Below 1.5 bytes x vocabulary per token where there are sixteen chunks (12 with whole logits)."""
    monkeypatch.setattr(head, "CHUNK", 64)
    tokens, vocabulary = 16 * 64, 4096
    sizes = []
    linear = F.linear

    def recorded(*arguments):
        out = linear(*arguments)
        sizes.append(out.nbytes)
        return out

    monkeypatch.setattr(F, "linear", recorded)
    layer = Head(32, vocabulary).requires_grad_(False)
    h = torch.randn(1, tokens, 32, requires_grad=True)
    layer(h, Targets.of(torch.zeros(1, tokens, dtype=torch.long))).backward()
    assert len(sizes) == 16
    assert 4 * max(sizes) < 1.5 * vocabulary * tokens
