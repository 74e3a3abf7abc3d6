"""Activation checkpointing by the name of a layer: what is kept, and that nothing else changes."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.kit.decoders import VARIANTS, random_decoder
from titan_hd.adapters.lora import LoRA
from titan_hd.distributed.parallelize import apply_activation_checkpointing
from titan_hd.models.decoder import Decoder
from titan_hd.models.recompute import recompute_first

CHOICES = {
    "full": ("full", ()),
    "selective": ("selective", ("qkv", "gate_up")),
    "without-qkv": ("selective", ("gate_up",)),
    "without-gate-up": ("selective", ("qkv",)),
    "least": ("selective", ()),
}


def model_of(variant: str, trained: str, dropout: float = 0.0) -> Decoder:
    model = random_decoder(VARIANTS[variant][0])
    if trained == "lora":
        torch.manual_seed(0)
        LoRA(rank=4, scale=0.5, dropout=dropout).apply(model, None)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.1)
    elif trained == "all-but-embedding" and model.lm_head is not None:
        model.model.embed_tokens.requires_grad_(False)
    return model


def outcome(model: Decoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(46).view(2, 23) * 7 % model.config.vocab_size
    torch.manual_seed(1)
    logits = model(ids)
    torch.manual_seed(2)  # what the backward pass draws again must not depend on it
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("trained", ["everything", "lora", "all-but-embedding"])
@pytest.mark.parametrize("variant", ["grouped-query", "qwen3", "biases", "mistral-window", "tied"])
def test_numbers_are_those_of_none_bit_for_bit(variant: str, trained: str, choice: str):
    dropout = 0.3 if trained == "lora" else 0.0
    wanted, gradients = outcome(model_of(variant, trained, dropout))
    model = model_of(variant, trained, dropout)
    mode, keep = CHOICES[choice]
    apply_activation_checkpointing(model, mode, keep, draws=dropout > 0)
    found, others = outcome(model)
    assert torch.equal(found, wanted)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name
    with torch.no_grad():
        ids = torch.arange(12)[None]
        assert torch.equal(model.eval()(ids), model_of(variant, trained, dropout).eval()(ids))


@pytest.mark.parametrize(
    ("choice", "trained"),
    [
        ("selective", "lora"),
        ("least", "everything"),
        pytest.param("selective", "everything", marks=pytest.mark.slow),
        pytest.param("least", "lora", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks(choice: str, trained: str):
    """In float64: what the compiler fuses is rounded in another order, which is not what is looked for."""
    wanted, gradients = outcome(model_of("grouped-query", trained).double())
    model = model_of("grouped-query", trained).double()
    apply_activation_checkpointing(model, *CHOICES[choice])
    torch._dynamo.reset()
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    found, others = outcome(model)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-10, atol=1e-11)


class Counted:
    """`first` of a pair, with the number of its calls and its last result."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x.exp().clone()
        return self.last


def test_freed_until_the_gradient_comes():
    first, x, seen = Counted(), torch.randn(100, requires_grad=True), []
    saved = []

    def second(t):
        saved.append(t.detach())
        return t.sin().cos()

    y = recompute_first(first, second, (x,))
    assert (first.calls, saved[0].untyped_storage().nbytes()) == (1, 0)
    x.register_hook(lambda _: seen.append(saved[0].untyped_storage().nbytes()))
    y.sum().backward()
    assert (first.calls, seen) == (2, [400])
    again = x.detach().requires_grad_()
    again.exp().sin().cos().sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_nothing_is_freed_without_a_gradient_to_wait_for():
    first, x = Counted(), torch.randn(4)
    with torch.no_grad():
        recompute_first(first, lambda t: t + 1, (x,))
    assert first.last.untyped_storage().nbytes() == 16


def test_no_reference_circle_keeps_a_graph_alive():
    """The trainer collects garbage rarely; a graph must go when its loss goes."""
    gc.collect()
    gc.disable()
    try:
        first, x = functools.partial(torch.mul, 2.0), torch.randn(8, requires_grad=True)
        watched = weakref.ref(first)
        y = recompute_first(first, torch.sin, (x.exp(),))
        del first
        assert watched() is not None
        del y
        assert watched() is None
    finally:
        gc.enable()
