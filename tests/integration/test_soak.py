"""Faults of every kind, four times each; test_recovery.py has three of the kinds once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.kit.faults import KINDS
from tests.kit.soak import drawn, soak


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_with_faults_of_all_kinds_is_the_undisturbed_one(tmp_path: Path, seed: int):
    outcomes = soak(tmp_path, drawn(len(KINDS), random.Random(seed)), seed, workers=4)
    assert {kind for kind, _ in outcomes} == KINDS.keys()
