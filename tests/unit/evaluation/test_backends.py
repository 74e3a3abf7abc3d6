"""Both libraries end a row at a text, and as early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titan_hd.checkpoint.pretrained import load_pretrained
from titan_hd.evaluation.backends import NativeBackend, Request, TransformersBackend

CPU = torch.device("cpu")


def test_a_text_ends_a_row_in_both_libraries(shared_data: Path):
    pytest.importorskip("transformers")
    folder = shared_data / "stories260k-hf"
    ours = NativeBackend(load_pretrained(folder, "", torch.float32, CPU)[0], CPU)
    theirs = TransformersBackend(folder, torch.float32, CPU, 0)
    prompts = [[1], [1, 403, 407], [1, 261]]
    free = ours.generate(prompts, Request([2], 24))
    ends = {row[index] for row, index in zip(free, (3, 5, 9))}
    expected = [row[: next(place for place, token in enumerate(row) if token in ends) + 1] for row in free]
    passes: list[int] = []
    theirs._model.register_forward_hook(lambda *_: passes.append(1))
    for backend in (ours, theirs):
        rows = backend.generate(prompts, Request([2], 24, ended=lambda row: row[-1] in ends))
        assert [row[: len(short)] for row, short in zip(rows, expected)] == expected
    assert len(passes) == max(map(len, expected)) < 24
