"""Sequence classification: the head over a sequence's first token, its loss, and how a score is a label.

A sequence has one label, at its first position: a class, from 0 on, or, where the head has one output, a score. Labels
travel as whole numbers (`models.head.Targets`); a score travels as the 32 bits of its float, among which -100, which
stands for "no label", would be a NaN.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from torch import nn


class ClassificationHead(nn.Module):
    """dense, tanh and out_proj, as RoBERTa's; `dropout` in front of both."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, num_labels)
        self.dropout = dropout

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [N, labels] of the hidden states [N, D] of N first tokens."""
        h = torch.tanh(self.dense(F.dropout(h, self.dropout, self.training)))
        return self.out_proj(F.dropout(h, self.dropout, self.training))


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over N sequences, [] in fp32, of logits [N, C] and int64 labels [N]: of cross entropies, or, where C = 1, of
    squared differences from the scores."""
    logits = logits.float()
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], scores_of(labels), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def label_of_score(score: float) -> int:
    """The whole number, of 32 bits with a sign, that stands for a finite score."""
    return struct.unpack("<i", struct.pack("<f", score))[0]


def scores_of(labels: torch.Tensor) -> torch.Tensor:
    """fp32 scores of labels that `label_of_score` made, of the same shape."""
    return labels.to(torch.int32).view(torch.float32)
