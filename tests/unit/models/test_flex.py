"""Attention to packed documents by flex_attention gives what the mask gives.

On a CPU torch refuses flex_attention's backward pass (`_validate_device`), although the uncompiled code runs there; the
refusal is put aside to compare the gradients. tests/gpu does the same with the kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from tests.kit.decoders import VARIANTS, random_decoder
from titan_hd.distributed.parallelize import apply_activation_checkpointing
from titan_hd.models import flex
from titan_hd.models.decoder import attention_mask, restarting_positions

# Logits and gradients of order 1, of fp32 sums in another order.
TOLERANCE = 1e-5
VARIANT_NAMES = ["grouped-query", "mistral-window", "qwen3-layer-types"]


def packed(length: int, rows: int = 2, seed: int = 0, longest: int = 150) -> torch.Tensor:
    """[rows, length] int32: documents of random lengths side by side."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest, (rows, length), generator=generator)
    numbers = torch.arange(length, dtype=torch.int32)
    return torch.stack([torch.repeat_interleave(numbers, row)[:length] for row in sizes])


def blocks(count: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[B, queries, keys] from the lists of a BlockMask, [B, 1, queries] and [B, 1, queries, keys]."""
    listed = torch.arange(indices.shape[-1]) < count[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed)[:, 0]


@pytest.mark.parametrize("window", [None, 1, 2, 128, 129, 130, 255, 256])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 384, 600])
def test_no_block_is_missing_none_is_idle_and_whole_ones_are_whole(length: int, window: int | None):
    for seed, longest in enumerate((2, 40, 150, 700)):
        documents = packed(length, seed=seed, longest=longest)
        documents = documents if seed % 2 else documents.max() - documents  # numbers may fall, too
        mask = flex.document_mask(documents, window)
        size = -(-length // 128) * 128
        wanted = attention_mask(length, window, restarting_positions(documents), documents, None)[:, 0]
        filled = torch.zeros(2, size, size, dtype=torch.bool)
        filled[:, :length, :length] = wanted
        tiles = filled.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3).flatten(3)
        partial = blocks(mask.kv_num_blocks, mask.kv_indices)
        whole = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (partial & whole).any()
        assert torch.equal(partial | whole, tiles.any(3))
        real = torch.arange(size).view(-1, 128) < length  # queries behind the end see nothing and do not count
        unseen = ~filled.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3) & real[:, None, :, None]
        assert not (whole & unseen.flatten(3).any(3)).any()
        index = torch.arange(length)
        assert torch.equal(mask.mask_mod(torch.tensor(1), torch.tensor(0), index[:, None], index[None]), wanted[1])


@pytest.fixture
def eager_on_cpu(monkeypatch):
    monkeypatch.setattr(flex, "DEVICES", {"cpu"})
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_WARNINGS_SHOWN", {"flex_attention_performance"}, raising=False)


def outcome(model: torch.nn.Module, documents: torch.Tensor) -> list[torch.Tensor]:
    """Logits and gradients, the latter as large as weights."""
    ids = torch.arange(documents.numel()).view_as(documents) * 7 % model.config.vocab_size
    model.zero_grad()
    logits = model(ids, documents=documents)
    logits.pow(2).mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE * b.abs().max().item())


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_logits_and_gradients_are_those_of_the_mask(variant: str, eager_on_cpu):
    documents = packed(200, longest=60)
    model = random_decoder(VARIANTS[variant][0])
    found = outcome(model, documents)
    flex.DEVICES.clear()
    assert_same(found, outcome(model, documents))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("compiled", ["attention", "blocks"])
def test_under_checkpointing_and_compilation(mode: str, compiled: str, eager_on_cpu, monkeypatch):
    """As `parallelize` wraps blocks. Compiled up to the kernels, which CPUs do not have: attention alone, as in blocks
    that are not compiled, or every block as one graph."""
    model = random_decoder(VARIANTS["mistral-window"][0])
    batches = [packed(200, seed=seed, longest=60) for seed in range(3)]
    flex.DEVICES.clear()
    wanted = [outcome(model, documents) for documents in batches]
    flex.DEVICES.add("cpu")
    apply_activation_checkpointing(model, mode)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    if compiled == "attention":
        attention = torch.compile(torch_flex.flex_attention, backend=count)
        monkeypatch.setattr(flex, "_compiled", lambda: attention)
    else:
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=count)
    for documents, result in zip(batches, wanted):
        assert_same(outcome(model, documents), result)
    assert 1 <= len(graphs) <= 2, "another batch of the same shape is no reason to compile again"


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_forward_kernel_of_cpus(monkeypatch):
    """It goes by the lists of blocks, which the uncompiled code does not."""
    documents = packed(600, longest=200)
    model = random_decoder({**VARIANTS["mistral-window"][0], "head_dim": 16, "sliding_window": 150})
    ids = torch.arange(1200).view(2, 600) * 7 % model.config.vocab_size
    wanted = model(ids, documents=documents)
    monkeypatch.setattr(flex, "DEVICES", {"cpu"})
    torch.testing.assert_close(model(ids, documents=documents), wanted, rtol=0, atol=TOLERANCE)
