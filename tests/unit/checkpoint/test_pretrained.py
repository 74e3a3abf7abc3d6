"""A tool that loads a model says how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kit import runs
from titan_hd.checkpoint import pretrained
from titan_hd.console import Progress


def test_loading_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Progress] = []

    def kept(*arguments, **options) -> Progress:
        made.append(Progress(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(pretrained, "Progress", kept)
    runs.write_model(tmp_path)
    model, _ = pretrained.load_pretrained(tmp_path, "", torch.bfloat16, torch.device("cpu"))
    (progress,) = made
    assert progress.done == progress.total == 2 * sum(parameter.numel() for parameter in model.parameters())
