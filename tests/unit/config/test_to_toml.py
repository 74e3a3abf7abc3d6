"""The way of a configuration back to TOML."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

import pytest

from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.config.manager import load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NEEDED = [
    "--data.train",
    "train.jsonl",
    "--model.name",
    "llama3",
    "--model.flavor",
    "debugmodel",
    "--training.steps",
    "3",
]


@pytest.fixture
def round_trip(tmp_path: Path):
    """A configuration -> what its TOML comes to."""

    def read(config: JobConfig) -> JobConfig:
        path = tmp_path / "resolved.toml"
        path.write_text(manager.to_toml(config), encoding="utf-8")
        return load(["--config", str(path)])

    return read


def test_defaults(round_trip):
    config = load(NEEDED)
    assert round_trip(config) == config


def test_every_kind_of_value(round_trip):
    config = load(
        [
            *NEEDED,
            *("--job.description", 'quotes " and \\, a tab\t, ümlaut, "日本"\nand a second line'),
            *("--hdpissa.mute_scalar", "1e-16"),
            *("--optimizer.lr", "5e-06"),
            *("--optimizer.weight_decay", "1e20"),
            *("--adapter.target_modules", "q_proj,v_proj"),
            *("--adapter.alpha", "8"),
            *("--lr_scheduler.warmup_ratio", "0.03"),
            "--compile.enable",
            *("--data.shuffle", "false"),
        ]
    )
    assert round_trip(config) == config


def test_what_is_not_set_is_left_out():
    table = tomllib.loads(manager.to_toml(load(NEEDED)))
    assert "epochs" not in table["training"]
    assert "alpha" not in table["adapter"]
    assert set(table) == set(typing.get_type_hints(JobConfig))


def test_characters_beyond_the_basic_plane(round_trip):
    config = load([*NEEDED, "--job.description", "run 🚀"])
    assert round_trip(config) == config


def test_main_prints_the_resolved_configuration(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "run.toml"
    path.write_text(manager.to_toml(load(NEEDED)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["manager", str(path), "--training.seed", "11"])
    manager.main()
    assert tomllib.loads(capsys.readouterr().out)["training"]["seed"] == 11
