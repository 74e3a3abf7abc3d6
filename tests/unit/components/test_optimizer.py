"""Optimizers by name, the settings that reach them, and clipping."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from titan_hd.components.optimizer import (
    build_optimizer,
    clip_factor,
    clip_flat,
    clip_gradients,
    optimizer_class,
    step_if_finite,
    tell_fused,
)
from titan_hd.config.job_config import Optimizer

EVERY = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
)


def parameters() -> dict[nn.Parameter, str]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.lora_A": (2, 3, 4), "layer.lora_B": (2, 4, 3)}
    return {nn.Parameter(torch.randn(shape, generator=generator)): name for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["Adamw", "adam", "", "Optimizer", "LBFGS", "lr_scheduler", "no_such", "__doc__"])
def test_no_optimizer_of_that_name(name: str):
    with pytest.raises(ValueError, match=rf"optimizer.name: '{name}' is no optimizer of torch.optim"):
        optimizer_class(name)


def test_adamw():
    config = Optimizer(name="AdamW", lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(config, parameters(), weight_decay=0.25)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    assert group["weight_decay"] == 0.25  # what is asked for: for direct updates that is not the section's
    assert len(group["params"]) == 2


def test_sgd_takes_what_it_knows():
    optimizer = build_optimizer(Optimizer(name="SGD", lr=0.5), parameters(), weight_decay=0.0)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.0, 0)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_never_the_fused_form(name: str):
    """Fused AdamW on DTensors leaks host memory at every step."""
    (group,) = build_optimizer(Optimizer(name=name), parameters(), 0.0).param_groups
    assert group["foreach"] is True
    assert not group.get("fused")


@pytest.mark.parametrize("name", EVERY)
def test_every_accepted_name_can_train(name: str):
    """Either refused by name before the run, or able to take a step on an adapter's parameter."""
    try:
        optimizer_class(name)
    except ValueError:
        return
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = build_optimizer(Optimizer(name=name, lr=0.1), params, weight_decay=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < old).all() for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_many_tensors_may_train_as_a_flat_one(name: str):
    """What the fold's update builds on: an accepted optimizer computes element by element."""
    try:
        optimizer_class(name)
    except ValueError:
        return
    config, params = Optimizer(name=name, lr=0.1), list(parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    by_tensor = build_optimizer(config, dict.fromkeys(params, "deltas"), 0.0)
    as_one = build_optimizer(config, {flat: "deltas"}, 0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        flat.grad = torch.randn(flat.shape, generator=generator)
        for p, grad in zip(params, flat.grad.split([p.numel() for p in params])):
            p.grad = grad.view_as(p).clone()
        by_tensor.step()
        as_one.step()
        # A loop's last elements may be computed by other instructions.
        torch.testing.assert_close(flat, torch.cat([p.flatten() for p in params]), rtol=1e-6, atol=1e-7)


class TestClipping:
    def with_gradients(self) -> list[nn.Parameter]:
        """A global norm of 5: one gradient of norm 3, one of norm 4, one parameter without."""
        first, second = parameters()
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        first.grad[0, 0, 0], second.grad[1, 1, 1] = 3.0, -4.0
        return [first, second, nn.Parameter(torch.ones(2))]

    @pytest.mark.parametrize("max_norm", [0.0, 5.1, 100.0])
    def test_left_alone(self, max_norm: float):
        params = self.with_gradients()
        assert clip_gradients(params, max_norm) == pytest.approx(5.0)
        assert (params[0].grad[0, 0, 0].item(), params[1].grad[1, 1, 1].item()) == (3.0, -4.0)

    def test_scaled_together(self):
        params = self.with_gradients()
        assert clip_gradients(params, 1.0) == pytest.approx(5.0)  # the norm before clipping is what is logged
        assert params[0].grad[0, 0, 0].item() == pytest.approx(0.6, rel=1e-5)
        assert params[1].grad[1, 1, 1].item() == pytest.approx(-0.8, rel=1e-5)
        assert params[2].grad is None

    @pytest.mark.parametrize(
        ("norm", "max_norm", "factor"), [(5.0, 1.0, 0.2), (5.0, 5.1, 1.0), (5.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
    )
    def test_the_factor(self, norm: float, max_norm: float, factor: float):
        """By which the gradients of a step are found again as they were before, too."""
        found = clip_factor(torch.tensor(norm, dtype=torch.float64), max_norm)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(factor, rel=1e-6)

    def test_flat_parts(self):
        """The second part is held by two ranks alike, and counts half."""
        parts = [(torch.tensor([3.0, 0.0]), 1), (torch.tensor([4.0, 4.0]), 2)]
        assert clip_flat(parts, 1.0).item() == 5.0
        assert parts[0][0].tolist() == pytest.approx([0.6, 0.0], rel=1e-6)
        assert parts[1][0].tolist() == pytest.approx([0.8, 0.8], rel=1e-6)

    @pytest.mark.parametrize(("value", "finite"), [(1e38, True), (float("inf"), False), (float("nan"), False)])
    def test_a_flat_norm_is_finite_where_all_elements_are(self, value: float, finite: bool):
        part = torch.zeros(3 * 2**20)
        part[2**20 + 1 :: 2**20] = value
        assert clip_flat([(part, 1), (part[:0], 2)], 0.0).isfinite() == finite


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_whose_norm_is_not_finite_changes_nothing(name: str, norm: float, fused: bool):
    """As the host decides on a CPU, and as a fused optimizer is told on a GPU."""
    (parameter,) = params = [nn.Parameter(torch.ones(5))]
    optimizer = getattr(torch.optim, name)(params, lr=0.1, fused=fused)

    def state() -> list[torch.Tensor]:
        held = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
        return [value.clone() for value in (parameter.detach(), *held)]

    def step(norm: float) -> None:
        parameter.grad = torch.full_like(parameter, norm)
        if fused:
            tell_fused(optimizer, torch.tensor(norm))
            optimizer.step()
        else:
            step_if_finite(optimizer, torch.tensor(norm))

    step(1.0)
    before = state()
    step(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)) == (norm != 1.0)
