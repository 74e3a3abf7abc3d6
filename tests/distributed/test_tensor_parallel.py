"""The split model against the whole one: loss and gradients of every parameter, in one forward and backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.kit import runs
from titan_hd.distributed.tp.loss import split_cross_entropy_sum_
from titan_hd.distributed.tp.tensor_parallel import apply_tensor_parallel
from titan_hd.models.decoder import Decoder
from titan_hd.models.head import Targets
from titan_hd.models.registry import read_hf_config

# fp32; sums in another order.
TOLERANCE = 2e-5
# 5 positions divide by neither 2 nor 4 ranks; of 2 positions the last ranks of 4 have none.
LENGTHS = (8, 5, 2)


def batch(length: int, vocabulary: int, documents: bool) -> dict[str, torch.Tensor]:
    """Three sequences; targets of some tokens only, and of one row none."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, vocabulary, (3, length), generator=generator)
    targets = torch.randint(0, vocabulary, (3, length), generator=generator)
    targets[torch.rand(3, length, generator=generator) < 0.3] = -100
    targets[2] = -100
    numbers = torch.arange(length) // 3
    positions = torch.arange(length) % 3
    packed = {"documents": numbers.expand(3, -1), "positions": positions.expand(3, -1)} if documents else {}
    return {"input_ids": ids, "targets": targets, **packed}


def backward(model: Decoder, inputs: dict[str, torch.Tensor]) -> float:
    model.zero_grad()
    loss = model(**{**inputs, "targets": Targets.of(inputs["targets"])})
    (loss / 7).backward()
    return loss.item()


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def split_model(folder: Path, sequence: bool, loss: bool) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and whole gradients of this rank, of every batch; the widths of what the head returns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = Decoder(read_hf_config(folder))
    model.load_state_dict(runs.load_file(folder / "model.safetensors"))
    vocabulary = model.config.vocab_size
    apply_tensor_parallel(model, mesh, sequence, loss)
    part = vocabulary // mesh.size() if loss else vocabulary
    streams = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: streams.append(args[0].shape[1]))
    results = []
    for length in LENGTHS:
        for documents in (False, True):
            inputs = batch(length, vocabulary, documents)
            value = backward(model, inputs)
            results.append((value, {name: whole(p.grad).clone() for name, p in model.named_parameters()}))
            assert streams.pop() == (-(-length // mesh.size()) if sequence else length)
    inputs.pop("targets")
    assert model(**inputs).shape[-1] == part
    return results


@pytest.mark.parametrize("variant", ["plain", "tied", "biases", "qwen3"])
@pytest.mark.parametrize(
    ("world_size", "sequence", "loss"),
    [(2, True, True), (2, True, False), (2, False, True), (2, False, False), (4, True, True)],
)
def test_loss_and_gradients_are_those_of_the_whole_model(world_size, sequence, loss, variant, workers, tmp_path: Path):
    changes = {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    }[variant]
    runs.write_model(tmp_path, num_key_value_heads=4, intermediate_size=36, vocab_size=52, **changes)
    model = Decoder(read_hf_config(tmp_path))
    model.load_state_dict(runs.load_file(tmp_path / "model.safetensors"))
    want = []
    for length in LENGTHS:
        for documents in (False, True):
            value = backward(model, batch(length, 52, documents))
            want.append((value, {name: p.grad.clone() for name, p in model.named_parameters()}))
    for got in workers.run(world_size, split_model, tmp_path, sequence, loss):
        for (value, gradients), (expected, reference) in zip(got, want, strict=True):
            assert value == pytest.approx(expected, rel=TOLERANCE)
            assert gradients.keys() == reference.keys()
            for name, gradient in gradients.items():
                error = (gradient - reference[name]).norm() / reference[name].norm()
                assert error < TOLERANCE, (name, error)


def loss_of_parts(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = logits.chunk(dist.get_world_size(), -1)[dist.get_rank()].clone()
    return split_cross_entropy_sum_(mine, labels, dist.group.WORLD), mine


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_of_a_split_vocabulary(scale, workers):
    """Also of logits whose exponentials overflow, and whose largest lies on another rank than the label."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(11, 12, generator=generator)
    labels = torch.randint(0, 12, (11,), generator=generator)
    whole_logits = logits.double().requires_grad_(True)
    want = torch.nn.functional.cross_entropy(whole_logits, labels, reduction="sum")
    want.backward()
    results = workers.run(4, loss_of_parts, logits, labels)
    for rank, (loss, gradient) in enumerate(results):
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        reference = whole_logits.grad.chunk(4, -1)[rank]
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-7)
