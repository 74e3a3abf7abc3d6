"""PiSSA on one layer, against torch's SVD."""

from __future__ import annotations

import pytest
import torch

from tests.kit import layers
from titan_hd.adapters.pissa import PiSSALinear
from titan_hd.adapters.svd import SvdSettings


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_it_starts_from_the_principal_part(shape: tuple[int, int], scale: float):
    layer, weight = layers.started(PiSSALinear, rank=4, scale=scale, shape=shape)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    principal = (u[:, :4] * s[:4] @ vh[:4]).float()
    torch.testing.assert_close(scale * layer.lora_B @ layer.lora_A, principal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.detach(), weight - principal, rtol=1e-5, atol=1e-6)
    # Both sides have the root of a singular value, as in the authors' code: their rows have equal lengths.
    torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0))
    torch.testing.assert_close(layers.merged(layer), weight, rtol=1e-6, atol=1e-6)


def test_rounding_comes_before_the_remainder():
    layer, weight = layers.started(PiSSALinear, rank=4, scale=1.0, dtype=torch.bfloat16)
    for tensor in (layer.lora_A, layer.lora_B):
        assert torch.equal(tensor, tensor.bfloat16().float()), "nothing is lost when they are gathered"
    torch.testing.assert_close(layers.merged(layer), weight, rtol=1e-6, atol=1e-6)


def test_the_trained_weight_differs_by_twice_the_rank():
    layer, weight = layers.started(PiSSALinear, rank=4, scale=1.0)
    layers.trained(layer)
    s = torch.linalg.svdvals((layers.merged(layer) - weight).double())
    assert s[7] > 1e-3 * s[0]
    assert s[8] < 1e-5 * s[0]


def test_the_report_and_the_cache(tmp_path):
    settings = {"rank": 4, "scale": 1.0, "svd": SvdSettings("exact"), "svd_cache": str(tmp_path)}
    first, _ = layers.started(PiSSALinear, **settings)
    again, _ = layers.started(PiSSALinear, **settings)
    assert (first.report["layer"], first.report["cached"]) == ("model.layers.0.mlp.up_proj", False)
    assert again.report["cached"]
    assert torch.equal(first.lora_A, again.lora_A)
    assert torch.equal(first.weight, again.weight)
