"""Small collectives that several rooms need."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block on every rank; if it raised a user error (ValueError) anywhere, raise that error everywhere.

    For work that may fail on one rank alone (reading files): without this the others would wait in a collective until
    its time-out. The block itself must not communicate. Other exceptions are bugs and pass through at once.
    """
    message = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = {rank: text for rank, text in enumerate(messages) if text is not None}
    if not failed:
        return
    rank, text = next(iter(failed.items()))
    everywhere = len(failed) == len(messages) and set(failed.values()) == {text}
    raise ValueError(text if everywhere else f"{text} (on rank {rank}, {what})")


# torch 2.13 deprecates the older name, 2.11 knows no other.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def exchange_lists(
    send: list[torch.Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """All-to-all of tensors of any, also unequal and empty, shapes: send[i] goes to member i of the group.

    `shapes[i]` is the shape of what member i sends here. All tensors have one dtype and device. They travel in one flat
    buffer: gloo's all-to-all of lists refuses tensors of different shapes.
    """
    flat = torch.cat([t.reshape(-1) for t in send])
    sizes = [math.prod(shape) for shape in shapes]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [t.numel() for t in send], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]
