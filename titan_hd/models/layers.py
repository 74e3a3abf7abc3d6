"""Pieces that models of several architectures are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Embedding(nn.Embedding):
    """Draws nothing on the meta device: torch would import its compiler for that, which takes a launcher a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def project_each(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Several linear layers of one input."""
    return tuple(layer(x) for layer in layers)


def restarting_positions(documents: torch.Tensor) -> torch.Tensor:
    """Each token's distance from the first of its document, [B, T]; a document's tokens stand side by side."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(1).values
