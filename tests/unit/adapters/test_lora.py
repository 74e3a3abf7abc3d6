"""LoRA, rsLoRA and OLoRA on one layer, against their equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kit import layers
from titan_hd.adapters.lora import LoRALinear, OLoRALinear, project_together
from titan_hd.adapters.methods import build_method
from titan_hd.adapters.pissa import PiSSALinear
from titan_hd.config.job_config import JobConfig
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config


def lora(x, weight, lora_A, lora_B, scale=1.5):
    """y [out] of one x [in]: W x + s B (A x), element by element."""
    low_rank = [sum(a[i] * x[i] for i in range(len(x))) for a in lora_A]
    return [w @ x + scale * sum(b[k] * low_rank[k] for k in range(len(b))) for w, b in zip(weight, lora_B)]


@pytest.mark.parametrize("method", [LoRALinear, OLoRALinear, PiSSALinear])
@pytest.mark.parametrize(("out", "inner", "rank"), [(12, 10, 3), (7, 5, 1), (5, 7, 5)])
def test_layer_is_the_formula(out: int, inner: int, rank: int, method: type[LoRALinear]):
    for bias, shape in ((True, (2, 3)), (False, (4,)), (True, (1, 2, 3))):
        layers.check_layer(layers.make(method, out, inner, bias=bias, rank=rank, scale=1.5), lora, shape)


@pytest.mark.parametrize("method", [LoRALinear, OLoRALinear, PiSSALinear])
def test_dropout_and_compile(method: type[LoRALinear]):
    layers.check_dropout(layers.make(method, 12, 10, rank=3, scale=1.5, dropout=0.4))
    layers.check_compiled(layers.make(method, 12, 10, rank=3, scale=1.5))


def test_first_values():
    """B is zero, A uniform within 1 / sqrt(in): kaiming_uniform(a = sqrt 5)."""
    layers.check_start(layers.make(LoRALinear, 12, 10, rank=3, scale=1.5), zero=["lora_B"])
    layer, _ = layers.started(LoRALinear, rank=8, scale=1.5, shape=(30, 400))
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_olora_starts_from_the_qr_decomposition():
    for shape in ((30, 20), (20, 30)):
        layer, weight = layers.started(OLoRALinear, rank=4, scale=1.5, shape=shape)
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close(layer.lora_B.detach(), q[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_A.detach(), r[:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers.merged(layer), weight)


def test_olora_rounds_before_it_forms_the_remainder():
    """In bf16 the sum is W to fp32's precision: what rounding takes from A and B is in the base weight."""
    layer, weight = layers.started(OLoRALinear, rank=4, scale=1.0, dtype=torch.bfloat16)
    assert torch.equal(layer.lora_A, layer.lora_A.bfloat16().float())
    torch.testing.assert_close(layers.merged(layer), weight, rtol=1e-6, atol=1e-6)


class TestTogether:
    """Layers of one input: the same outputs and gradients as each by itself, with fewer products."""

    OUTS = (12, 7, 9)

    def layers(self, dropout: float = 0.0) -> list[nn.Module]:
        return [layers.make(LoRALinear, out, 10, rank=3, scale=1.5, dropout=dropout).double() for out in self.OUTS]

    def run(self, project: Callable, modules: list[nn.Module], needs_dx: bool = True) -> list[torch.Tensor]:
        """Outputs, dx and the gradients of all adapters."""
        x = torch.randn(2, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(needs_dx)
        ys = project(x, *modules)
        sum((y * torch.linspace(-1, i + 1, y.numel()).view_as(y)).sum() for i, y in enumerate(ys)).backward()
        trained = [p.grad for module in modules for p in module.parameters() if p.requires_grad]
        assert all(gradient is not None for gradient in trained)
        return [*ys, *([x.grad] if needs_dx else []), *trained]

    def by_autograd(self, x: torch.Tensor, *modules: nn.Module) -> tuple[torch.Tensor, ...]:
        return tuple(
            F.linear(x, m.weight, m.bias) + 1.5 * F.linear(F.linear(x, m.lora_A), m.lora_B)
            if isinstance(m, LoRALinear)
            else m(x)
            for m in modules
        )

    @pytest.mark.parametrize("needs_dx", [True, False])
    def test_equal_to_autograd(self, needs_dx: bool):
        """Without dx too: the first block's input, above a frozen embedding."""
        found = self.run(project_together, self.layers(), needs_dx)
        wanted = self.run(self.by_autograd, self.layers(), needs_dx)
        assert len(found) == len(wanted) == 3 + needs_dx + 6
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other)

    def test_a_layer_that_is_not_adapted_may_stand_between(self):
        torch.manual_seed(0)
        plain = nn.Linear(10, 5, dtype=torch.float64).requires_grad_(False)
        one, _, three = self.layers()
        found = self.run(project_together, [one, plain, three])
        one, _, three = self.layers()
        for value, wanted in zip(found, self.run(self.by_autograd, [one, plain, three])):
            torch.testing.assert_close(value, wanted)

    def test_one_product_with_the_input_for_all(self):
        """Backward: of each layer gy W, gy B and gy^T (x A^T); of all one product with x, and one that joins dx."""
        counted = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                    counted.append(func)
                return func(*args, **(kwargs or {}))

        x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
        ys = project_together(x, *self.layers())
        with Count():
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        assert len(counted) == 3 * 3 + 2

    def test_dropout_keeps_them_apart_in_training_alone(self):
        modules = self.layers(dropout=0.5)
        x = torch.ones(5, 10, dtype=torch.float64)
        torch.manual_seed(3)
        found = project_together(x, *modules)
        torch.manual_seed(3)
        for y, module in zip(found, modules):
            assert torch.equal(y, module(x))
        modules = [module.eval() for module in modules]
        for y, wanted in zip(project_together(x, *modules), self.by_autograd(x, *modules)):
            torch.testing.assert_close(y, wanted)

    @pytest.mark.parametrize(("name", "shares"), [("lora", True), ("pissa", True), ("dora", False)])
    def test_who_shares(self, name: str, shares: bool):
        """DoRA's layer has more to do than two products."""
        with torch.device("meta"):
            model = Decoder(flavor_config("llama3", "debugmodel"))
        build_method(config(method=name)).apply(model, None)
        parts = [part for block in model.model.layers for part in (block.self_attn, block.mlp)]
        assert all((part.project is project_together) is shares for part in parts)


def config(**adapter) -> JobConfig:
    built = JobConfig()
    for key, value in {"method": "lora", "rank": 4, **adapter}.items():
        setattr(built.adapter, key, value)
    return built


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [(8, None, False, 1.0), (8, 12.0, False, 1.5), (8, 3, False, 0.375), (16, 8.0, True, 2.0), (16, None, True, 4.0)],
)
def test_scales(rank: int, alpha: float | None, rslora: bool, scale: float):
    """alpha / r is a real number: it is never floored."""
    assert build_method(config(rank=rank, alpha=alpha, rslora=rslora)).settings["scale"] == scale


def test_the_method_on_a_model():
    with torch.device("meta"):
        model = Decoder(flavor_config("llama3", "debugmodel"))
    before = {name for name, _ in model.named_parameters()}
    method = build_method(config(loraplus_lr_ratio=16.0))
    names = method.apply(model, ["q_proj", "down_proj"])
    assert names == [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name in names for side in "AB"}
    assert {name for name, _ in model.named_parameters()} == before | trained, "the base keeps its names"
    assert (method.num_adapters, method.folds) == (1, False)
    assert method.lr_ratios == {"lora_B": 16.0}


def test_what_the_configuration_chooses():
    assert build_method(config(init="olora")).layer is OLoRALinear
    assert build_method(config()).lr_ratios == {}


def test_a_rank_that_does_not_fit():
    method = build_method(config(rank=33))
    assert method.shape_error("k_proj", (32, 64)) == (
        "adapter.rank: 33 is more than the smaller side of a weight, 32; k_proj has shape [32, 64]"
    )
    assert method.shape_error("q_proj", (64, 64)) is None
