"""The copies on the host. Saving and loading need workers: tests/distributed."""

from __future__ import annotations

import torch

from titan_hd.checkpoint.checkpointer import HostCopies
from titan_hd.checkpoint.pieces import Piece, owned_pieces, stored_tensors


def pieces(**tensors: torch.Tensor) -> list[Piece]:
    return owned_pieces(stored_tensors(tensors), rank=0)


class TestHostCopies:
    def test_what_training_does_later_does_not_show(self):
        """Also on a CPU, where a copy to the host could be no copy at all."""
        host, weight = HostCopies(), torch.ones(3)
        (taken,) = host.take(pieces(weight=weight))
        weight += 1
        assert taken.values.tolist() == [1, 1, 1]
        assert host.take(pieces(weight=weight))[0].values.data_ptr() == taken.values.data_ptr(), "memory is kept"
        assert taken.values.tolist() == [2, 2, 2]

    def test_another_shape(self):
        host = HostCopies()
        host.take(pieces(weight=torch.ones(3)))
        assert host.take(pieces(weight=torch.zeros(2, 2)))[0].values.tolist() == [[0, 0], [0, 0]]
