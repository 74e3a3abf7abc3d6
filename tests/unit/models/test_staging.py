"""Buffers on the way to a device that is not the host."""

import torch

from titan_hd.models.staging import Slot


def test_a_buffer_that_nothing_was_read_into_is_sent():
    """After a fault of the files: all ranks go on to the end, where they tell it."""
    slot = Slot(torch.device("meta"))
    for nbytes in (80, 100, 40):
        slot.begin(nbytes)
        assert slot.sent().shape == (nbytes,)
