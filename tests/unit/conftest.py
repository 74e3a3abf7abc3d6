"""What several unit tests share: the folder of real data, and one thread for tensors this small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

torch.set_num_threads(1)  # tensors of a few hundred numbers; threads only wait for each other


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers and small real weights; they are no part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data folder beside the repository: real tokenizers and weights are not there")
    return SHARED_DATA
