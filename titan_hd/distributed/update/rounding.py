"""Stochastic rounding of fp32 to bf16, with random bits that belong to the element and not to who rounds it.

An update of relative size 1e-5 vanishes in a bf16 add (half a unit in the last place is 2e-3 of the value). Rounded up
with a probability equal to the dropped fraction, the expected value is the fp32 one.
"""

from __future__ import annotations

import functools
import hashlib

import torch


def rounding_key(seed: int, step: int, name: str) -> int:
    """32-bit key of one weight's rounding in one step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()[:4], "little")


def random_bits(key: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """16 random bits (int32, 0..65535) for each logical element (rows[i], columns[j]), shape [rows, columns].

    A 32-bit integer hash (the finalizer of MurmurHash3, twice) of the key, the row and the column: the same on any
    device, any number of workers and any order.
    """
    return _bits(row_hashes(key, rows), columns.int())


def row_hashes(key: int, rows: torch.Tensor) -> torch.Tensor:
    """The first half of `random_bits`: int32 of the rows' shape, from int64."""
    return _mix((rows ^ key).int())


def _bits(hashes: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return (_mix(hashes[:, None] ^ columns[None, :]) >> 8).bitwise_and_(0xFFFF)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit values, in place. int32 wraps round as unsigned values do; its shift to the right brings in
    copies of the sign, hence the masks."""
    x = x.add_(0x9E3779B9 - 2**32)
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x85EBCA6B - 2**32)
    x = x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(0xC2B2AE35 - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def stochastic_round(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 `value` rounded to bf16: down or up in magnitude with the right probability, from 16 random bits each.

    bf16 is the upper half of fp32, so adding 16 random bits and dropping the lower half does it, for either sign.
    """
    raw = value.contiguous().view(torch.int32)
    return ((raw + bits) & -65536).view(torch.float32).bfloat16()


def add_rounded(
    w: torch.Tensor, update: torch.Tensor, keep: torch.Tensor, hashes: torch.Tensor, columns: torch.Tensor
) -> None:
    """w <- keep * w + update in place, computed in fp32 and rounded stochastically.

    w: bf16 [n, m]; update: fp32; keep: 0-dim fp32; hashes: `row_hashes` of the n rows; columns: int32, the logical
    numbers of the m columns. On a GPU it is one compiled kernel.
    """
    (_compiled() if w.is_cuda else _add_rounded)(w, update, keep, hashes, columns)


def _add_rounded(
    w: torch.Tensor, update: torch.Tensor, keep: torch.Tensor, hashes: torch.Tensor, columns: torch.Tensor
) -> None:
    w.copy_(stochastic_round(w.float().mul_(keep).add_(update), _bits(hashes, columns)))


@functools.cache
def _compiled():
    return torch.compile(_add_rounded, dynamic=True)  # one graph for all shapes
