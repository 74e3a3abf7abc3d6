"""On a CUDA device: `./run_tests.sh -m gpu`. The same run on the GPU (nccl, one worker) and on the CPU (gloo)."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from tests.kit import runs
from tests.kit.commands import REPOSITORY
from titan_hd.models import flex, hf_files
from titan_hd.models.decoder import Decoder, attention_mask, restarting_positions
from titan_hd.models.registry import parse_hf_config, read_hf_config

pytestmark = pytest.mark.gpu
# fp32 on both, in another order of sums; Adam amplifies it over the steps.
LOSS_TOLERANCE = 1e-4
# fp32 logits and gradients of order 1 by two kernels, of which one may multiply in TF32's steps; bf16 by its rounding.
KERNEL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
PACKED = {"data__pack": "true", "training__seq_len": 160, "hdpissa__num_adapters": 2, "training__global_batch_size": 2}


def losses(arguments: list[str], dump, **environment) -> list[float]:
    subprocess.run(
        [REPOSITORY / "run_train.sh", "--config", "/dev/null", *arguments],
        env={**os.environ, "NGPU": "1", **environment},
        check=True,
    )
    return [json.loads(line)["loss"] for line in (dump / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile__enable": "true", "activation_checkpoint__mode": "selective"},
        {"training__enable_cpu_offload": "true", "hdpissa__offload_moments": "true"},
        {"training__enable_cpu_offload": "true", "adapter__method": "pissa", "hdpissa__num_adapters": 0},
        PACKED,
        PACKED | {"activation_checkpoint__mode": "selective"},
        PACKED | {"compile__enable": "true", "activation_checkpoint__mode": "full"},
        PACKED | {"compile__enable": "true", "activation_checkpoint__mode": "selective"},
    ],
)
def test_gpu_equals_cpu_and_resumes(changes, tmp_path):
    runs.write_model(tmp_path / "model", hidden_size=64, head_dim=16, num_key_value_heads=2, intermediate_size=96)
    runs.write_records(tmp_path / "records.jsonl", count=60)

    def arguments(dump: str, **more) -> list[str]:
        values = {"hdpissa__num_adapters": 8, "training__global_batch_size": 8, "training__steps": 6} | changes | more
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    cpu = losses(arguments("cpu"), tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    gpu = losses(arguments("gpu", checkpoint__enable="true", checkpoint__interval=3), tmp_path / "gpu")
    assert gpu == pytest.approx(cpu, rel=LOSS_TOLERANCE)
    again = arguments("gpu", checkpoint__enable="true", checkpoint__load_step=3)
    assert losses(again, tmp_path / "gpu") == pytest.approx(gpu, rel=1e-6)


def packed(rows: int, length: int, longest: int) -> torch.Tensor:
    """[rows, length] int32 on the GPU: documents of random lengths side by side."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, longest, (rows, length), generator=generator)
    numbers = torch.arange(length, dtype=torch.int32)
    return torch.stack([torch.repeat_interleave(numbers, row)[:length] for row in sizes]).cuda()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_weights_onto_the_gpu_are_those_on_the_host(stored, master, monkeypatch, tmp_path):
    """In many pieces, so that both buffers are used again while copies are under way; a block of columns too."""
    monkeypatch.setattr(hf_files, "PIECE_BYTES", 2**16)
    _, weights = runs.write_model(tmp_path, hidden_size=512, head_dim=64, intermediate_size=1024, vocab_size=3000)
    save_file({name: value.to(stored) for name, value in weights.items()}, tmp_path / "model.safetensors")
    files = hf_files.open_model_weights(tmp_path, read_hf_config(tmp_path))
    for name, value in weights.items():
        found = torch.full(value.shape, float("nan"), dtype=master, device="cuda")
        files.read_into(name, found)
        assert torch.equal(found.cpu(), value.to(stored).to(master)), name
    part = torch.full((700, 100), float("nan"), dtype=master, device="cuda")
    files.read_into("model.embed_tokens.weight", part, 1, 3)
    want = weights["model.embed_tokens.weight"][1:701, 3:103].to(stored).to(master)
    assert torch.equal(part.cpu(), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE)
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("length", [600, 1024])
def test_flex_attention_equals_the_mask(length, window, dtype, monkeypatch):
    """Logits and gradients of a small model, grouped queries; the kernel goes by the lists of blocks."""
    raw = {**runs.ODD, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"intermediate_size": 96}
    if window:
        raw |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    torch.manual_seed(0)
    model = Decoder(parse_hf_config(raw, "tests")).to("cuda", dtype)
    model.reset_buffers(torch.device("cuda"))
    documents = packed(2, length, 200)
    ids = torch.arange(documents.numel(), device="cuda").view_as(documents) * 7 % 50

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(ids, documents=documents)
        logits.float().pow(2).mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    found = outcome()
    monkeypatch.setattr(flex, "DEVICES", set())
    for a, b in zip(found, outcome(), strict=True):
        tolerance = KERNEL_TOLERANCE[dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_long_packs_need_no_square_of_memory():
    """A mask of this row would take 1 GiB, its scores 2 GiB for each head."""
    documents = packed(1, 32768, 4000)
    shapes = (1, 4, 32768, 64), (1, 2, 32768, 64), (1, 2, 32768, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flex.attend(q, k, v, flex.document_mask(documents, None), True)
    out.float().pow(2).mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**29
    part = slice(0, 2048)
    mask = attention_mask(2048, None, restarting_positions(documents[:, part]), documents[:, part], None)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, part], k[:, :, part], v[:, :, part], attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, part], wanted, rtol=0, atol=KERNEL_TOLERANCE[torch.bfloat16])
