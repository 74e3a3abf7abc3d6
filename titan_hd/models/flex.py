"""Attention within packed documents by flex_attention: no mask and no scores of size [T, T]. On GPUs; on CPUs
flex_attention has no backward pass, and the decoder makes a mask (`decoder.attention_mask`)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

DEVICES = {"cuda"}
_BLOCK = 128


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, grouped: bool) -> torch.Tensor:
    """[B, H, T, C] for queries [B, H, T, C], keys and values [B, G, T, C]. grouped: G is smaller than H.

    flex_attention avoids the [T, T] scores only when it is compiled. Inside a compiled block it is part of that graph.
    """
    attention = flex_attention if torch.compiler.is_compiling() else _compiled()
    return attention(q, k, v, block_mask=mask, enable_gqa=grouped)


def document_mask(documents: torch.Tensor, window: int | None) -> BlockMask:
    """`attention_mask` of documents [B, T] for flex_attention, without anything of size [T, T].

    A block of 128 x 128 is left out if no query of it can see a key of it, judged by the lowest and the highest number
    of a document in either; it is taken whole if every query sees every key; else the kernel asks for each element.
    """
    batch, length = documents.shape
    blocks = -(-length // _BLOCK)
    filled = torch.cat((documents, documents[:, -1:].expand(-1, blocks * _BLOCK - length)), 1)
    low, high = filled.view(batch, blocks, _BLOCK).aminmax(dim=2)
    index = torch.arange(blocks, device=documents.device)
    distance = index[:, None] - index  # in blocks, from a key's to a query's
    meet = (high[:, :, None] >= low[:, None]) & (low[:, :, None] <= high[:, None])
    one = low == high
    same = one[:, :, None] & one[:, None] & (low[:, :, None] == low[:, None])
    seen, whole = meet & (distance >= 0), same & (distance > 0)
    if window is not None:
        seen = seen & ((distance - 1) * _BLOCK + 1 < window)
        whole = whole & ((distance + 1) * _BLOCK - 1 < window)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        mask = (q >= kv) & (documents[b, q] == documents[b, kv])
        return mask if window is None else mask & (q - kv < window)

    return BlockMask.from_kv_blocks(
        *_block_lists(seen & ~whole),
        *_block_lists(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _block_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For chosen [B, queries, keys]: numbers [B, 1, queries] of chosen keys, and their indices first, ascending."""
    chosen = chosen[:, None]
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()
