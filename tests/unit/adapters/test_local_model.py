"""The forward pass between two folds, against float64 autograd through W + (B + dB)(A + dA) - B A."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kit.layers import inputs, loss_of, pass_with_dropout
from titan_hd.adapters.hdpissa import HDPissa, HDPissaLinear, LocalHDPissaLinear, project_together
from titan_hd.models.decoder import Decoder, project_each
from titan_hd.models.registry import flavor_config

# fp32 sums of some tens of terms against float64, relative to the largest element.
TOLERANCE = 1e-6
# bf16 has 8 bits: rounded operands, results, and a low-rank activation in between.
BF16_TOLERANCE = 3e-2

OUT, IN, RANK, SCALE = 12, 10, 3, 1.5


def layer(out: int = OUT, bias: bool = True, dropout: float = 0.0, seed: int = 0) -> LocalHDPissaLinear:
    """A frozen layer whose adapter has moved; dA and dB of about a third of A and B."""
    torch.manual_seed(seed)
    wrapped = LocalHDPissaLinear(nn.Linear(IN, out, bias=bias).requires_grad_(False), SCALE, dropout, 0.0)
    a, b, da, db = (torch.randn(shape) for shape in ((RANK, IN), (out, RANK)) * 2)
    wrapped.bind(a, b, (da / 3).requires_grad_(), (db / 3).requires_grad_())
    return wrapped


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2g}"


def reference(module: HDPissaLinear, x: torch.Tensor, seen: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """y and the gradients, of dA and dB times alpha / r. seen: x after dropout."""
    x64 = x.detach().double().requires_grad_(True)
    a, b, da, db = (t.detach().double().requires_grad_(True) for t in module.bound)
    bias = None if module.bias is None else module.bias.double()
    dropped = x64 if seen is None else x64 * (seen.detach().double() / x64.detach())
    y = F.linear(x64, module.weight.double(), bias) + F.linear(dropped, (b + db) @ (a + da) - b @ a)
    loss_of(y).backward()
    return {"y": y.detach(), "dx": x64.grad, "da": SCALE * da.grad, "db": SCALE * db.grad}


def results(module: HDPissaLinear, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"y": y.detach(), "dx": x.grad, "da": module.bound[2].grad, "db": module.bound[3].grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, IN), (2, 4, IN)])
def test_equal_to_the_whole_weight(shape: tuple[int, ...], bias: bool):
    module, x = layer(bias=bias), inputs(shape)
    y = module(x)
    loss_of(y).backward()
    expected = reference(module, x)
    for name, found in results(module, x, y).items():
        assert_close(found, expected[name])


def test_where_nothing_is_learned_yet_it_is_the_exact_mute():
    """Bit for bit, forward and dx; the gradients are its own."""
    module = layer()
    a, b, *deltas = module.bound
    exact = HDPissaLinear(nn.Linear(IN, OUT), SCALE, 0.0, 0.0)
    exact.weight, exact.bias = module.weight, module.bias
    found = []
    for one in (module, exact):
        one.bind(a, b, *(torch.zeros_like(t).requires_grad_() for t in deltas))
        x = inputs((2, 4, IN))
        y = one(x)
        loss_of(y).backward()
        found.append(results(one, x, y))
    local, mute = found
    assert torch.equal(local["y"], mute["y"])
    assert torch.equal(local["dx"], mute["dx"])
    assert_close(local["da"], mute["da"].double())
    assert_close(local["db"], mute["db"].double())


def test_layers_of_one_input_share_products():
    modules = [layer(out, seed=out) for out in (OUT, OUT - 4, OUT + 2)]
    apart = [layer(out, seed=out) for out in (OUT, OUT - 4, OUT + 2)]
    x, plain_x = inputs((2, 4, IN)), inputs((2, 4, IN))
    ys, plain = project_together(x, *modules), project_each(plain_x, *apart)
    for each in (ys, plain):
        sum(loss_of(y) * (i + 1) for i, y in enumerate(each)).backward()
    assert_close(x.grad, plain_x.grad.double())
    for y, plain_y, one, other in zip(ys, plain, modules, apart):
        assert_close(y.detach(), plain_y.detach().double())
        for t, plain_t in zip(one.bound[2:], other.bound[2:]):
            assert_close(t.grad, plain_t.grad.double())


def test_dropout_is_of_the_adapters_input_alone():
    """Its gradient passes to x where it was not dropped."""
    module, x = layer(dropout=0.5), inputs((6, IN))
    y, dropped = pass_with_dropout(module, x)
    expected = reference(module, x, dropped)
    for name, found in results(module, x, y).items():
        assert_close(found, expected[name])


def test_bf16_inputs_give_fp32_gradients():
    """At what bf16 has made of the operands; dA and dB themselves stay in fp32."""
    module = layer()
    for tensor in (module.weight, module.bias):
        tensor.data = tensor.bfloat16()
    module.bind(*(t.bfloat16() for t in module.bound[:2]), *module.bound[2:])
    x = inputs((2, 4, IN)).detach().bfloat16().requires_grad_(True)
    y = module(x)
    loss_of(y).backward()
    found, expected = results(module, x, y), reference(module, x)
    dtypes = {name: value.dtype for name, value in found.items()}
    assert dtypes == {"y": torch.bfloat16, "dx": torch.bfloat16, "da": torch.float32, "db": torch.float32}
    for name in ("y", "dx", "da", "db"):
        assert_close(found[name], expected[name], BF16_TOLERANCE)


def test_what_is_kept_for_the_backward_pass():
    """x, what it becomes in 2 r columns, and the operands themselves, which exist anyway."""
    module, x = layer(), inputs((5, IN))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    new = [t for t in kept if all(t.data_ptr() != have.data_ptr() for have in (x, *module.operands()))]
    assert [t.shape for t in new] == [(5, 2, RANK)]


def test_one_graph_for_the_compiler():
    eager, compiled, x, plain_x = layer(), layer(), inputs((2, 4, IN)), inputs((2, 4, IN))
    loss_of(torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)).backward()
    loss_of(eager(plain_x)).backward()
    assert_close(x.grad, plain_x.grad.double())
    for found, expected in zip(compiled.bound[2:], eager.bound[2:]):
        assert_close(found.grad, expected.grad.double())


def test_without_gradients_it_is_the_frozen_layer():
    module, x = layer(dropout=0.5), inputs((2, 4, IN))
    with torch.no_grad():
        assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


def test_the_method_takes_it_for_several_local_steps():
    for local_steps, kind in ((1, HDPissaLinear), (2, LocalHDPissaLinear)):
        with torch.device("meta"):
            model = Decoder(flavor_config("llama3", "debugmodel"))
        HDPissa(2, 4, local_steps=local_steps).apply(model, ["q_proj"])
        assert type(model.model.layers[0].self_attn.q_proj) is kind
