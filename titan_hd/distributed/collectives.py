"""Collectives: those by which ranks agree (errors, small results, equal values), and those that move tensors.

The latter are asynchronous where they return what to wait for, and count the bytes that this process receives.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from titan_hd.distributed.watch import enter_phase, waiting
from titan_hd.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def raise_on_all(what: str) -> Iterator[None]:
    """Run a block on every rank; if it raised a UserError on any, raise that error on all.

    For work that may fail on one rank alone (reading files): without this the others would wait in a collective until
    its time-out. The block itself must not communicate. Other exceptions are bugs and pass through at once.

    what: the phase of the run, for messages.

    Where no rank fails, one number is all-reduced: gathering 4,096 empty messages would take 16 MB on each rank.
    """
    enter_phase(what)
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    failures = torch.tensor(message is not None, dtype=torch.int64)
    dist.all_reduce(failures)
    if not failures:
        return
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = {rank: text for rank, text in enumerate(messages) if text is not None}
    rank, text = next(iter(failed.items()))
    everywhere = len(failed) == len(messages) and set(failed.values()) == {text}
    raise UserError(text if everywhere else f"{text} (on rank {rank}, {what})")


def on_rank_zero(what: str, function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank; its UserError is raised on every rank.

    For small files that all ranks need: thousands of ranks must not open them at once, and on a shared file system some
    ranks may see an older state of a folder. The function must not communicate; its result must be picklable.

    what: the phase of the run, for messages.
    """
    enter_phase(what)
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def check_equal_on_all_ranks(key: str, value: str) -> None:
    """Make sure that a value is the same on every rank. Where it is, two numbers are all-reduced.

    Raises:
        UserError: on every rank; the line begins with `key` and shows two of the values.
    """
    number = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=7).digest(), "big")
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes[0] == -extremes[1]:
        return
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    rank = next(rank for rank, other in enumerate(values) if other != values[0])
    raise UserError(
        f"{key}: must be the same on every node, but rank 0 has {values[0]}, and rank {rank} {values[rank]}"
    )


def gather_on_rank_zero(value: T | None, group: dist.ProcessGroup | None = None) -> list[T]:
    """What the ranks have to tell, on the first rank of a group, in the order of the ranks; nothing on the others.
    Collective.

    value: picklable; None where a rank has nothing to tell. group: None: all ranks.

    The way back of gloo's broadcast, on its connections: rank 5 of 8 tells rank 1, which adds what 3 has told it, and
    tells 0. So none hears from more than log2(N) others, where torch's `gather_object` has the first rank connected to
    all, with room for as many messages of the largest one's size.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    told = {} if value is None else {rank: value}
    first = 1 << rank.bit_length()  # the least power of two above the rank
    for step in (1 << i for i in reversed(range(size.bit_length()))):
        if step >= first and rank + step < size:
            told |= _receive(rank + step, group)
    if rank:
        _send(told, rank - first // 2, group)
        return []
    return [told[rank] for rank in sorted(told)]


def _send(told: dict[int, Any], to: int, group: dist.ProcessGroup | None) -> None:
    message = torch.frombuffer(bytearray(pickle.dumps(told)), dtype=torch.uint8) if told else torch.empty(0)
    dist.send(torch.tensor(message.numel()), group=group, group_dst=to)
    if told:
        dist.send(message, group=group, group_dst=to)


def _receive(sender: int, group: dist.ProcessGroup | None) -> dict[int, Any]:
    size = torch.tensor(0)
    dist.recv(size, group=group, group_src=sender)
    if not size:
        return {}
    message = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(message, group=group, group_src=sender)
    return pickle.loads(message.numpy().data)  # of a rank of this run


# torch 2.13 deprecates the older names, 2.11 knows no others.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Traffic:
    """Bytes that this process received through the functions below, without its own parts: the least that any algorithm
    for the collective moves. Tests compare them with the plan, benchmarks print them."""

    def __init__(self) -> None:
        self.received = 0


TRAFFIC = Traffic()


def all_gather(local: torch.Tensor, size: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Start gathering a flat tensor from `size` members; returns [size, numel] and what to wait for."""
    out = local.new_empty(size, local.numel())
    work = _all_gather_single(out.view(-1), local, group=group, async_op=True)
    TRAFFIC.received += (size - 1) * local.nbytes
    return out, work


def all_to_all(lines: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Start sending line m of [size, n] to member m; returns [size, n], line m from member m, and what to wait for."""
    out = torch.empty_like(lines)
    work = dist.all_to_all_single(out, lines, group=group, async_op=True)
    assert work is not None  # it is asynchronous
    TRAFFIC.received += lines.nbytes // len(lines) * (len(lines) - 1)
    return out, work


class _SumOfLines:
    """The work of a reduce-scatter by all-to-all: waits for the members' lines, then adds them up in their order."""

    def __init__(self, lines: torch.Tensor, work: dist.Work, out: torch.Tensor):
        self._lines, self._work, self._out = lines, work, out

    def wait(self) -> None:
        self._work.wait()
        torch.sum(self._lines, 0, out=self._out)
        del self._lines


def reduce_scatter(
    full: torch.Tensor, size: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work | _SumOfLines]:
    """Start summing [size * n, ...] over the members; returns this member's [n, ...] and what to wait for.

    gloo's own reduce-scatter copies its whole input first, in the caller's thread. So over gloo the parts travel by
    all-to-all and are summed on arrival, which takes memory for a second [size * n, ...].
    """
    out = full.new_empty(full.shape[0] // size, *full.shape[1:])
    if dist.get_backend(group) == "gloo":
        lines, work = all_to_all(full.view(size, -1), group)
        return out, _SumOfLines(lines.view(size, *out.shape), work, out)
    work = _reduce_scatter_single(out, full, group=group, async_op=True)
    TRAFFIC.received += (size - 1) * out.nbytes
    return out, work


def all_reduce(tensor: torch.Tensor, size: int, group: dist.ProcessGroup) -> dist.Work:
    """Start summing a tensor in place over `size` members."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    TRAFFIC.received += 2 * (size - 1) * tensor.nbytes // size
    return work


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, root: int = 0) -> dist.Work:
    """Start sending a member's tensor to the others, into theirs; root: its number in the group."""
    work = dist.broadcast(tensor, group=group, group_src=root, async_op=True)
    assert work is not None  # this rank is a member
    TRAFFIC.received += tensor.nbytes if dist.get_rank(group) != root else 0
    return work


def sum_in_place(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Over the members of a group."""
    with waiting():
        all_reduce(tensor, dist.get_world_size(group), group).wait()


def exchange_lists(
    send: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """All-to-all of tensors of any, also unequal and empty, shapes: send[i] goes to member i of a group.

    `shapes[i]` is the shape of what member i sends here. All tensors have one dtype and device. They travel in one flat
    buffer: gloo's all-to-all of lists refuses tensors of different shapes.
    """
    flat = torch.cat([t.reshape(-1) for t in send])
    sizes = [math.prod(shape) for shape in shapes]
    received = flat.new_zeros(sum(sizes))  # fake process groups deliver nothing
    with waiting():
        dist.all_to_all_single(received, flat, sizes, [t.numel() for t in send], group=group)
        if received.is_cuda:  # who is late is seen here, and not in the work that follows
            torch.cuda.current_stream(received.device).synchronize()
    TRAFFIC.received += sum(size for i, size in enumerate(sizes) if i != dist.get_rank(group)) * flat.element_size()
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes)]
