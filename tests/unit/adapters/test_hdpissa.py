"""HD-PiSSA's layer: the exact mute against dense float64 autograd, the paper's mute scalar, and how it is applied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kit.layers import inputs, loss_of, pass_with_dropout
from tests.kit.runs import LINEAR_LAYERS
from titan_hd.adapters.hdpissa import HDPissa, HDPissaLinear, Operands, exact_mute, project_together
from titan_hd.adapters.svd import cut_slices, principal_factors
from titan_hd.models.decoder import Decoder, project_each
from titan_hd.models.registry import flavor_config

# Gradients are compared relative to their largest element: fp32 sums of some tens of terms against float64.
GRADIENT_TOLERANCE = 1e-6
# The paper's form adds a term of 1e-16 and divides it out again: a few more fp32 roundings.
MUTE_TOLERANCE = 1e-5
# bf16 has 8 bits: two roundings of intermediate products.
BF16_TOLERANCE = 2e-2

OUT, IN, RANK, SCALE = 12, 10, 3, 1.5
INPUTS = [(5, IN), (2, 4, IN), (2, 3, 4, IN)]


def assert_gradient(found: torch.Tensor, expected: torch.Tensor, tolerance: float = GRADIENT_TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"relative error {error:.2g}"


def layer(bias: bool = True, dropout: float = 0.0, mute_scalar: float = 0.0, seed: int = 0) -> HDPissaLinear:
    """A frozen layer with a slice of its own bound to it."""
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    wrapped = HDPissaLinear(linear, SCALE, dropout, mute_scalar)
    a, b = cut_slices(*principal_factors(linear.weight, 2 * RANK), 2, RANK, "orthogonal")
    zeros = torch.zeros(RANK, IN, requires_grad=True), torch.zeros(OUT, RANK, requires_grad=True)
    wrapped.bind(a[1].contiguous(), b[1].contiguous(), *zeros)
    return wrapped


def dense_reference(module: HDPissaLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64 autograd through y = x W^T with a trained W: G, and what the definitions make of it."""
    w = module.weight.detach().double().requires_grad_(True)
    bias = None if module.bias is None else module.bias.double()
    x = x.detach().double().requires_grad_(True)
    y = F.linear(x, w, bias)
    loss_of(y).backward()
    a, b = (t.double() for t in module.bound[:2])
    return {"y": y, "dx": x.grad, "db": SCALE * w.grad @ a.T, "da": SCALE * b.T @ w.grad}


class TestExactMute:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", INPUTS)
    def test_gradients_are_those_of_the_dense_weight(self, shape: tuple[int, ...], bias: bool):
        """grad dB = s G A^T, grad dA = s B^T G, with G the gradient of the whole W that is never formed."""
        module, x = layer(bias), inputs(shape)
        loss_of(module(x)).backward()
        reference = dense_reference(module, x)
        _, _, da, db = module.bound
        assert_gradient(db.grad, reference["db"])
        assert_gradient(da.grad, reference["da"])
        assert_gradient(x.grad, reference["dx"])

    def test_gradients_are_the_derivative_of_the_update(self):
        """Float64 autograd through W + s [(B + dB)(A + dA) - B A], the equation of the paper, at dA = dB = 0."""
        module, x = layer(), inputs((2, 4, IN))
        loss_of(module(x)).backward()
        a, b, da, db = module.bound
        a64, b64 = a.double(), b.double()
        da64, db64 = (torch.zeros_like(t, dtype=torch.float64, requires_grad=True) for t in (da, db))
        w = module.weight.double() + SCALE * ((b64 + db64) @ (a64 + da64) - b64 @ a64)
        loss_of(F.linear(x.detach().double(), w, module.bias.double())).backward()
        assert_gradient(da.grad, da64.grad)
        assert_gradient(db.grad, db64.grad)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", INPUTS)
    def test_forward_and_dx_are_the_frozen_layers_bit_for_bit(self, shape: tuple[int, ...], bias: bool):
        module, x = layer(bias), inputs(shape)
        y = module(x)
        loss_of(y).backward()
        plain_x = inputs(shape)
        plain_y = F.linear(plain_x, module.weight, module.bias)
        loss_of(plain_y).backward()
        assert torch.equal(y, plain_y)
        assert torch.equal(x.grad, plain_x.grad)

    def test_weight_and_bias_and_fixed_factors_get_no_gradient(self):
        module, x = layer(), inputs((5, IN))
        tensors = [module.weight, module.bias, *module.bound[:2]]
        for tensor in tensors:
            tensor.requires_grad_(True)
        loss_of(module(x)).backward()
        assert all(tensor.grad is None for tensor in tensors)

    def test_an_input_without_gradient(self):
        """The first block's input: the embedding below it is frozen."""
        module, x = layer(), inputs((5, IN))
        loss_of(module(x.detach())).backward()
        assert x.grad is None
        assert_gradient(module.bound[2].grad, dense_reference(module, x)["da"])

    def test_gradients_accumulate_over_micro_batches(self):
        module = layer()
        x = inputs((4, IN))
        for part in x.detach().split(1):
            module(part).sum().backward()
        total = [t.grad.clone() for t in module.bound[2:]]
        for t in module.bound[2:]:
            t.grad = None
        module(x).sum().backward()
        for found, t in zip(total, module.bound[2:], strict=True):
            assert_gradient(found, t.grad)

    def test_the_values_of_da_and_db_are_not_read(self):
        module, x = layer(), inputs((5, IN))
        y = module(x)
        a, b, da, db = module.bound
        module.bind(a, b, torch.ones_like(da).requires_grad_(), torch.ones_like(db).requires_grad_())
        assert torch.equal(module(x), y)

    def test_bf16_inputs_give_fp32_gradients(self):
        module, x = layer(), inputs((2, 4, IN))
        a, b, da, db = module.bound
        x16, w16, bias16 = (t.detach().bfloat16() for t in (x, module.weight, module.bias))
        (y,) = exact_mute(x16.requires_grad_(True), [Operands(w16, bias16, a, b, da, db)], SCALE)
        y.backward(gy := torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16())
        assert (y.dtype, x16.grad.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (da.grad.dtype, db.grad.dtype) == (torch.float32, torch.float32)
        g = gy.double().flatten(0, -2).T @ x16.detach().double().flatten(0, -2)
        assert_gradient(da.grad, SCALE * b.double().T @ g, BF16_TOLERANCE)
        assert_gradient(db.grad, SCALE * g @ a.double().T, BF16_TOLERANCE)

    def test_no_dense_temporary_is_kept_for_backward(self):
        """What the graph saves is x, W and the two thin factors: no product of the factors."""
        module, x = layer(), inputs((5, IN))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            module(x)
        assert sorted(sizes) == sorted([(OUT, IN), (5, IN), (RANK, IN), (OUT, RANK)])


class TestTogether:
    """Layers of one input: the same gradients as each by itself, with fewer products."""

    def layers(self, **changes) -> list[HDPissaLinear]:
        """Three layers of one input and unequal outputs."""
        made = []
        for seed, out in enumerate((OUT, OUT - 4, OUT + 2)):
            wrapped = layer(seed=seed, **changes)
            torch.manual_seed(seed)
            linear = nn.Linear(IN, out).requires_grad_(False)
            a, b = cut_slices(*principal_factors(linear.weight, 2 * RANK), 2, RANK, "orthogonal")
            wrapped.weight, wrapped.bias, wrapped.out_features = linear.weight, linear.bias, out
            zeros = torch.zeros(RANK, IN, requires_grad=True), torch.zeros(out, RANK, requires_grad=True)
            wrapped.bind(a[1].contiguous(), b[1].contiguous(), *zeros)
            made.append(wrapped)
        return made

    def run(self, project, x: torch.Tensor, modules: list[nn.Module]) -> tuple[list[torch.Tensor], torch.Tensor]:
        ys = project(x, *modules)
        sum(loss_of(y) * (i + 1) for i, y in enumerate(ys)).backward()
        return list(ys), x.grad

    @pytest.mark.parametrize("shape", INPUTS)
    def test_equal_to_each_by_itself(self, shape: tuple[int, ...]):
        together, apart = self.layers(), self.layers()
        ys, dx = self.run(project_together, inputs(shape), together)
        plain_ys, plain_dx = self.run(project_each, inputs(shape), apart)
        assert_gradient(dx, plain_dx)
        for y, plain_y, one, other in zip(ys, plain_ys, together, apart):
            assert torch.equal(y, plain_y)
            assert_gradient(one.bound[2].grad, other.bound[2].grad)
            assert_gradient(one.bound[3].grad, other.bound[3].grad)

    def test_layers_that_are_not_adapted_may_stand_between(self):
        one, _, three = self.layers()
        plain = nn.Linear(IN, OUT - 4).requires_grad_(False)
        x = inputs((2, 4, IN))
        ys, dx = self.run(project_together, x, [one, plain, three])
        assert [y.shape[-1] for y in ys] == [OUT, OUT - 4, OUT + 2]
        assert torch.equal(ys[1], plain(x))
        apart, again = self.layers(), inputs((2, 4, IN))
        _, plain_dx = self.run(project_each, again, [apart[0], plain, apart[2]])
        assert_gradient(dx, plain_dx)

    def test_one_product_with_the_input_for_all(self):
        """Of the twelve skinny products of three layers, two with x (for all) and six with gy are left."""
        counted = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                    counted.append(func)
                return func(*args, **(kwargs or {}))

        x, modules = inputs((5, IN)), self.layers()
        ys = project_together(x, *modules)
        gradients = [torch.ones_like(y) for y in ys]
        with Count():
            torch.autograd.backward(ys, gradients)
        assert len(counted) == 3 + 2 + 6  # dx, with x, with gy

    @pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"mute_scalar": 1e-16}])
    def test_dropout_and_the_mute_scalar_keep_the_layers_apart(self, changes: dict):
        modules = self.layers(**changes)
        torch.manual_seed(3)
        ys, _ = self.run(project_together, inputs((5, IN)), modules)
        torch.manual_seed(3)
        apart = self.layers(**changes)
        torch.manual_seed(3)
        plain, _ = self.run(project_each, inputs((5, IN)), apart)
        for y, other, one, two in zip(ys, plain, modules, apart):
            assert torch.equal(y, other)
            assert torch.equal(one.bound[2].grad, two.bound[2].grad)

    def test_the_method_gives_it_to_attention_and_mlp(self):
        with torch.device("meta"):
            model = Decoder(flavor_config("llama3", "debugmodel"))
        HDPissa(2, 4).apply(model, ["q_proj", "k_proj", "up_proj"])
        assert all(part.project is project_together for b in model.model.layers for part in (b.self_attn, b.mlp))


class TestDropout:
    def test_the_adapter_sees_dropped_inputs_and_nothing_else_does(self):
        module, x = layer(dropout=0.5), inputs((6, IN))
        y, dropped = pass_with_dropout(module, x)
        plain_x = inputs((6, IN))
        plain_y = F.linear(plain_x, module.weight, module.bias)
        loss_of(plain_y).backward()
        assert torch.equal(y, plain_y)
        assert torch.equal(x.grad, plain_x.grad)
        y64 = F.linear(x.detach().double(), module.weight.double(), module.bias.double()).requires_grad_(True)
        (gy,) = torch.autograd.grad(loss_of(y64), y64)
        g = gy.T @ dropped.double()
        a, b, da, db = module.bound
        assert_gradient(db.grad, SCALE * g @ a.double().T)
        assert_gradient(da.grad, SCALE * b.double().T @ g)

    def test_none_in_evaluation(self):
        module, x = layer(dropout=0.5).eval(), inputs((6, IN))
        loss_of(module(x)).backward()
        assert_gradient(module.bound[2].grad, dense_reference(module, x)["da"])


class TestMuteScalar:
    @pytest.mark.parametrize("shape", INPUTS)
    def test_gradients_divided_by_it_are_the_exact_ones(self, shape: tuple[int, ...]):
        g = 1e-16
        paper, exact = layer(mute_scalar=g), layer()
        for module in (paper, exact):
            loss_of(module(inputs(shape))).backward()
        for muted, expected in zip(paper.bound[2:], exact.bound[2:], strict=True):
            assert_gradient(muted.grad / g, expected.grad, MUTE_TOLERANCE)

    def test_forward_and_dx_do_not_feel_it(self):
        """1e-16 is below half a unit in the last place of anything near 1."""
        paper, exact, x, plain_x = layer(mute_scalar=1e-16), layer(), inputs((5, IN)), inputs((5, IN))
        y, plain_y = paper(x), exact(plain_x)
        loss_of(y).backward()
        loss_of(plain_y).backward()
        assert torch.equal(y, plain_y)
        torch.testing.assert_close(x.grad, plain_x.grad, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)

    def test_a_large_one_is_felt(self):
        paper, exact = layer(mute_scalar=1e-2), layer()
        x = inputs((5, IN))
        a, b, _, _ = paper.bound
        expected = exact(x) + 1e-2 * SCALE * x @ a.T @ b.T
        torch.testing.assert_close(paper(x), expected, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)


class TestLayer:
    def test_without_gradients_it_is_the_frozen_layer(self):
        """Validation needs no adapter: none is bound, with either form of the mute."""
        torch.manual_seed(0)
        linear = nn.Linear(IN, OUT)
        x = inputs((5, IN))
        for mute_scalar in (0.0, 1e-2):
            wrapped = HDPissaLinear(linear, SCALE, 0.5, mute_scalar)
            with torch.no_grad():
                assert torch.equal(wrapped(x), linear(x))

    def test_training_without_an_adapter_is_refused(self):
        with pytest.raises(AssertionError, match="no adapter is bound"):
            HDPissaLinear(nn.Linear(IN, OUT), SCALE, 0.0, 0.0)(inputs((5, IN)))

    def test_it_keeps_the_layers_own_tensors(self):
        linear = nn.Linear(IN, OUT)
        wrapped = HDPissaLinear(linear, SCALE, 0.0, 0.0)
        assert wrapped.weight is linear.weight
        assert wrapped.bias is linear.bias
        assert set(wrapped.state_dict()) == {"weight", "bias"}
        assert (wrapped.in_features, wrapped.out_features) == (IN, OUT)

    def test_the_bound_adapter_is_the_one_that_learns(self):
        module = layer()
        first = module.bound
        a, b = cut_slices(*principal_factors(module.weight, 2 * RANK), 2, RANK, "orthogonal")
        second = (a[0], b[0], torch.zeros_like(first[2]).requires_grad_(), torch.zeros_like(first[3]).requires_grad_())
        module.bind(*second)
        loss_of(module(inputs((5, IN)))).backward()
        assert first[2].grad is None
        assert first[3].grad is None
        assert_gradient(second[2].grad, dense_reference(module, inputs((5, IN)))["da"])


class TestApply:
    @pytest.fixture
    def model(self) -> Decoder:
        with torch.device("meta"):
            return Decoder(flavor_config("llama3", "debugmodel"))

    def test_all_linear_layers_of_the_blocks(self, model: Decoder):
        names = list(model.state_dict())
        trained = HDPissa(num_adapters=2, rank=4).apply(model, None)
        assert len(trained) == 2 * 7
        assert {name.rpartition(".")[2] for name in trained} == set(LINEAR_LAYERS)
        for name, module in model.named_modules():
            assert isinstance(module, HDPissaLinear) == (name in trained)
        assert not any(p.requires_grad for p in model.parameters())
        assert list(model.state_dict()) == names  # checkpoint names never change

    def test_only_the_targets(self, model: Decoder):
        trained = HDPissa(2, 4).apply(model, ["v_proj", "q_proj"])
        assert trained == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q", "v")]
        assert not isinstance(model.model.layers[0].mlp.up_proj, HDPissaLinear)
        assert not any(p.requires_grad for p in model.parameters())

    def test_settings_reach_the_layers(self, model: Decoder):
        HDPissa(2, 4, alpha=6.0, dropout=0.25, mute_scalar=1e-4).apply(model, ["q_proj"])
        module = model.model.layers[1].self_attn.q_proj
        assert (module.scale, module.dropout, module.mute_scalar) == (1.5, 0.25, 1e-4)

    @pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (16.0, 1.0), (8.0, 0.5), (3.0, 3 / 16)])
    def test_alpha_over_rank_is_a_real_number(self, alpha: float | None, scale: float):
        """A floor of it would train nothing where alpha < rank."""
        assert HDPissa(1, 16, alpha).scale == scale

    @pytest.mark.parametrize("targets", [["qproj"], ["q_proj", "proj"], ["self_attn"], ["model.layers.0.mlp.up_proj"]])
    def test_a_target_that_matches_nothing_is_named(self, model: Decoder, targets: list[str]):
        with pytest.raises(ValueError, match=rf"adapter.target_modules: '{targets[-1]}' is no linear layer") as caught:
            HDPissa(2, 4).apply(model, targets)
        assert "down_proj" in str(caught.value)

    def test_too_many_directions(self, model: Decoder):
        """k_proj has 32 rows: 8 slices of rank 4 fit, 9 do not."""
        HDPissa(8, 4).apply(model, None)
        with torch.device("meta"):
            model = Decoder(flavor_config("llama3", "debugmodel"))
        with pytest.raises(ValueError, match=r"adapter.rank: .* 9 \* 4 = 36 .*k_proj of shape \[32, 64\] has 32"):
            HDPissa(9, 4).apply(model, None)

    @pytest.mark.parametrize("slices", ["top", "random"])
    def test_other_slices_need_the_rank_alone(self, model: Decoder, slices: str):
        HDPissa(9, 32, slices=slices).apply(model, None)
        with pytest.raises(ValueError, match="33 singular directions"):
            HDPissa(1, 33, slices=slices).apply(model, None)

    def test_shape_error(self):
        method = HDPissa(2, 3)
        assert method.shape_error("w", (8, 6)) is None
        assert method.shape_error("w", (6, 8)) is None
        for shape in ((5, 8), (8, 5)):
            assert "K * r = 2 * 3 = 6 singular directions, w of shape" in method.shape_error("w", shape)
