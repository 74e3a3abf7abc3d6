"""The optimizer's state by name, and the copies on the host. Saving and loading need workers: tests/distributed."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import TensorProperties as Properties

from titan_hd.checkpoint.checkpointer import HostCopies, allocate_optimizer_state, optimizer_state


class TestHostCopies:
    def test_what_training_does_later_does_not_show(self):
        """Also on a CPU, where a copy to the host could be no copy at all."""
        host, weight = HostCopies(), torch.ones(3)
        taken = host.take({"weight": weight, "step": 1})
        weight += 1
        assert taken["weight"].tolist() == [1, 1, 1]
        assert taken["step"] == 1
        assert host.take({"weight": weight})["weight"].data_ptr() == taken["weight"].data_ptr(), "memory is kept"
        assert taken["weight"].tolist() == [2, 2, 2]

    def test_another_shape(self):
        host = HostCopies()
        host.take({"weight": torch.ones(3)})
        assert host.take({"weight": torch.zeros(2, 2)})["weight"].tolist() == [[0, 0], [0, 0]]


class TestOptimizerState:
    def trained(self) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]:
        params = {nn.Parameter(torch.ones(2, 3)): "layer.delta_A", nn.Parameter(torch.ones(3)): "b"}
        optimizer = torch.optim.AdamW(list(params), lr=0.1, foreach=True)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer, params

    def test_keyed_by_the_parameters_name(self):
        state = optimizer_state(*self.trained())
        assert set(state) == {
            f"optimizer.{n}.{k}" for n in ("layer.delta_A", "b") for k in ("step", "exp_avg", "exp_avg_sq")
        }
        assert state["optimizer.layer.delta_A.exp_avg"].shape == (2, 3)

    def test_allocated_as_the_checkpoint_has_it(self):
        """A fresh optimizer gets tensors of the same keys, shapes and dtypes; other entries are passed over."""
        saved = optimizer_state(*self.trained())
        entries = {
            key: TensorStorageMetadata(Properties(dtype=value.dtype), value.shape, []) for key, value in saved.items()
        }
        other = TensorStorageMetadata(Properties(dtype=torch.float32), torch.Size((2, 3)), [])
        entries |= {"model.b": other, "optimizer.unknown.exp_avg": other, "optimizer.b.text": BytesStorageMetadata()}
        params = {nn.Parameter(torch.ones(2, 3)): "layer.delta_A", nn.Parameter(torch.ones(3)): "b"}
        optimizer = torch.optim.AdamW(list(params), lr=0.1, foreach=True)
        allocate_optimizer_state(optimizer, params, Metadata(entries))
        made = optimizer_state(optimizer, params)
        assert made.keys() == saved.keys()
        for key, value in saved.items():
            assert (made[key].shape, made[key].dtype) == (value.shape, value.dtype), key
