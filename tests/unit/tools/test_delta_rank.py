"""Effective ranks of a change whose singular values are known, and their means over a model's layers."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from compare.delta_rank import delta_rank, delta_ranks, rounding_floor, singular_values
from safetensors.torch import save_file

from tests.kit import runs
from titan_hd.models.registry import parse_hf_config

EXACT = 1e-6  # of each singular value


def change(values: list[float], out: int = 12, inner: int = 9) -> torch.Tensor:
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(out, len(values), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(inner, len(values), dtype=torch.float64))[0]
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


def test_ranks_of_known_singular_values():
    base = torch.randn(12, 9, dtype=torch.float64)
    equal = delta_rank(base, base + change([2.0] * 4), threshold=1e-3)
    assert equal.above == 4
    assert equal.entropy == pytest.approx(4)
    assert equal.relative_norm == pytest.approx(4 / base.norm().item())
    assert equal.stable == pytest.approx(4)
    tail = delta_rank(base, base + change([1.0, 0.5, 1e-4]), threshold=1e-3)
    assert tail.above == 2
    assert tail.stable == pytest.approx(1.25)
    assert delta_rank(base, base + change([1.0, 0.5, 1e-4]), threshold=1e-5).above == 3
    p = [2 / 3, 1 / 3]
    assert tail.entropy == pytest.approx(p[0] ** -p[0] * p[1] ** -p[1], rel=1e-2)
    assert delta_rank(base, base, threshold=1e-3) == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", [(5, 3), (520, 600), (700, 515)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-6])
def test_singular_values_are_those_of_numpy(shape: tuple[int, int], smallest: float):
    """By the Gram matrix and by a decomposition; a spectrum that falls far is where a Gram matrix alone fails."""
    matrix = change(torch.logspace(0, torch.tensor(smallest).log10().item(), min(shape)).tolist(), *shape)
    want = numpy.linalg.svd(matrix.numpy(), compute_uv=False)
    numpy.testing.assert_allclose(singular_values(matrix).numpy(), want, rtol=EXACT, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("outliers", "least"), [(False, 0.8), (True, 0.2)])
def test_the_floor_is_above_what_rounding_makes(dtype: torch.dtype, outliers: bool, least: float):
    """Close to it where the elements are of like size; a row and a column of large ones do not add up as the bound has
    it (12 seeds: 0.84 to 0.90 of it, 0.24 to 0.77)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, dtype=torch.float64, generator=generator) / 14
    if outliers:
        weight[:, 3] *= 30
        weight[7] *= 20
    rounded = weight.to(dtype).double()
    largest = torch.linalg.svdvals(rounded - weight)[0].item()
    assert least < largest / rounding_floor(rounded, dtype) <= 1


def test_means_over_the_layers_of_a_model(tmp_path):
    config, weights = runs.write_model(tmp_path / "base")
    trained = dict(weights)
    for i, rank in enumerate((1, 3)):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        trained[name] = weights[name] + change([1.0] * rank, *weights[name].shape).float()
    (tmp_path / "trained").mkdir()
    save_file(trained, tmp_path / "trained" / "model.safetensors")
    (tmp_path / "trained" / "config.json").write_text(json.dumps(config))
    ranks = delta_ranks(tmp_path / "base", tmp_path / "trained", parse_hf_config(config, "tests"), 1e-3)
    assert set(ranks) == {"all", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert ranks["q_proj"].above == 2
    assert ranks["q_proj"].entropy == pytest.approx(2, rel=1e-3)
    assert ranks["up_proj"] == (0, 0, 0, 0)
    assert ranks["all"].above == pytest.approx(4 / 14)
    adapted = delta_ranks(tmp_path / "base", tmp_path / "trained", parse_hf_config(config, "tests"), 1e-3, ["q_proj"])
    assert adapted == {"all": ranks["q_proj"], "q_proj": ranks["q_proj"]}
