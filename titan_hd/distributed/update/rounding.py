"""Stochastic rounding of fp32 to bf16, with random bits that belong to the element and not to who rounds it.

An update of relative size 1e-5 vanishes in a bf16 add (half a unit in the last place is 2e-3 of the value). Rounded up
with a probability equal to the dropped fraction, the expected value is the fp32 one.
"""

from __future__ import annotations

import hashlib

import torch

_MASK32 = 0xFFFFFFFF


def rounding_key(seed: int, step: int, name: str) -> int:
    """32-bit key of one weight's rounding in one step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()[:4], "little")


def random_bits(key: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """16 random bits (int32, 0..65535) for each logical element (rows[i], columns[j]), shape [rows, columns].

    A 32-bit integer hash (the finalizer of MurmurHash3, twice) of the key, the row and the column: the same on any
    device, any number of workers and any order.
    """
    per_row = _mix(rows.long() ^ key)
    return (_mix(per_row[:, None] ^ columns.long()[None, :]) >> 8 & 0xFFFF).int()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit values kept in int64, so that no sign bit gets in the way."""
    x = (x + 0x9E3779B9) & _MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def stochastic_round(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 `value` rounded to bf16: down or up in magnitude with the right probability, from 16 random bits each.

    bf16 is the upper half of fp32, so adding 16 random bits and dropping the lower half does it, for either sign.
    """
    raw = value.contiguous().view(torch.int32)
    return ((raw + bits) & -65536).view(torch.float32).bfloat16()
