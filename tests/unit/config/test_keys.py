"""The keys of the configuration are frozen: a new one, or another default, is a decision and no accident."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from titan_hd.config.job_config import DataSource, JobConfig


def test_keys_and_defaults_are_those_of_the_list():
    """Whoever adds a key adds its line to keys.txt, and tells users of it in CHANGELOG.md."""
    tables = {**dataclasses.asdict(JobConfig()), "data.train[]": dataclasses.asdict(DataSource())}
    found = [f"{table}.{key} = {default!r}" for table, keys in tables.items() for key, default in keys.items()]
    assert found == Path(__file__).with_name("keys.txt").read_text(encoding="utf-8").splitlines()
