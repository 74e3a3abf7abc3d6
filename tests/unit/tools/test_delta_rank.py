"""Effective ranks of a change whose singular values are known, and their means over a model's layers."""

from __future__ import annotations

import json

import pytest
import torch
from compare.delta_rank import delta_rank, delta_ranks
from safetensors.torch import save_file

from tests.kit import runs
from titan_hd.models.registry import parse_hf_config


def change(values: list[float], out: int = 12, inner: int = 9) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(out, len(values), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(inner, len(values), dtype=torch.float64))[0]
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


def test_ranks_of_known_singular_values():
    base = torch.randn(12, 9, dtype=torch.float64)
    equal = delta_rank(base, base + change([2.0] * 4), threshold=1e-3)
    assert equal.above == 4
    assert equal.entropy == pytest.approx(4)
    assert equal.relative_norm == pytest.approx(4 / base.norm().item())
    tail = delta_rank(base, base + change([1.0, 0.5, 1e-4]), threshold=1e-3)
    assert tail.above == 2
    assert delta_rank(base, base + change([1.0, 0.5, 1e-4]), threshold=1e-5).above == 3
    p = [2 / 3, 1 / 3]
    assert tail.entropy == pytest.approx(p[0] ** -p[0] * p[1] ** -p[1], rel=1e-2)
    assert delta_rank(base, base, threshold=1e-3) == (0, 0, 0)


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
    assert ranks["up_proj"] == (0, 0, 0)
    assert ranks["all"].above == pytest.approx(4 / 14)
