"""The copies on the host. Saving and loading need workers: tests/distributed."""

from __future__ import annotations

import torch

from titan_hd.checkpoint.checkpointer import HostCopies


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
