"""What the rest of the package asks of a model, whichever family it is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from titan_hd.models.head import Targets
from titan_hd.models.model_config import ModelConfig


class Cache(Protocol):
    """What a generation keeps of earlier passes."""

    def look_at(self, positions: int) -> None:
        """The next passes are below these positions."""
        ...

    def take(self, rows: torch.Tensor) -> None:
        """Keep these rows [B'] of the batch, in this order; one may be taken several times."""
        ...


class ModelBlock(nn.Module):
    """One of the equal blocks on the residual stream; forward(x [B, T, D], ...) -> [B, T, D]."""

    def recompute(self, keep: Sequence[str], draws: bool) -> None:
        """Selective activation checkpointing: recompute what is cheap in the backward pass, and what `keep`
        (`activation_checkpoint.keep`) does not name. draws: adapters have dropout, whose masks must be drawn again."""
        raise NotImplementedError


class Model(nn.Module):
    """Plain modules in the layout and under the names of Hugging Face checkpoints."""

    config: ModelConfig

    def blocks(self) -> Iterator[ModelBlock]:
        """The blocks, in their order."""
        raise NotImplementedError

    def embedding(self) -> nn.Module:
        """What is in front of the blocks."""
        raise NotImplementedError

    def final_norm(self) -> nn.Module | None:
        """What is behind the blocks, if anything."""
        raise NotImplementedError

    def output_head(self) -> nn.Module | None:
        """What makes outputs of the last hidden states; None: the embedding does."""
        raise NotImplementedError

    def trained_head(self) -> nn.Module | None:
        """A head that is trained beside any method, in fp32."""
        return None

    def looked_up(self) -> set[nn.Parameter]:
        """Parameters that are only looked up: no product has them."""
        return set() if self.output_head() is None else {*self.embedding().parameters()}

    def reset_buffers(self, device: torch.device) -> None:
        """Recompute what is not loaded from a checkpoint; call it after the parameters are materialised."""

    def block_inputs(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
        """What every block takes beside the stream [B, T, D] of `dtype`, for rows of one document. positions: [B, T]"""
        raise NotImplementedError

    def new_cache(self, slots: int) -> Cache:
        """An empty cache for a generation of so many positions; causal models have one."""
        raise NotImplementedError

    def initial(self, name: str) -> float | torch.Tensor | None:
        """Values of a parameter before any training, or the one that all its elements have; None: they are drawn."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: Any = None,
        select: torch.Tensor | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """Outputs for token ids [B, T] (of a causal model logits [B, T, vocabulary]), or the loss of targets.

        positions: [B, T]; by default 0..T-1, and with documents from 0 on in each of them.
        documents: [B, T], the number of each token's document; a token sees its own document alone.
        cache: of `new_cache`; earlier passes' tokens are seen too. Not with documents.
        select: [B], the one index into T whose logits are wanted; they come as [B, 1, vocabulary]. What follows it is
            padding.
        targets: return the sum of their losses, [] in fp32. Not with select.
        """
        raise NotImplementedError
