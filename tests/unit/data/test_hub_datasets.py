"""Data sets of the Hub by name, with a stand-in for the package `datasets`: there is no network here."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from tests.kit.datasets import build_dataset
from tests.kit.errors import message
from tests.kit.tokenizers import Letters
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.build import check_data
from titan_hd.data.sources import is_hub_name

ROWS = [{"query": "a", "response": "b"}, {"query": "c", "response": "dd"}]


class Rows(list):
    """What load_dataset returns, as far as it is used."""

    def __init__(self, rows: list[dict], fingerprint: str):
        super().__init__(rows)
        self._fingerprint = fingerprint


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """The package `datasets`; knows org/name. Returns what it was asked for."""
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        if name != "org/name":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        return Rows(ROWS, f"{config}-{split}")

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("path", "yes"),
    [
        ("org/name", True),
        ("meta-math/MetaMathQA:train", True),
        ("org/na.me_2:config-a:test", True),
        ("name", False),
        ("org/name/more", False),
        ("data/train.jsonl", False),
        ("data/train.json.gz", False),
        ("data/*.parquet", False),
        ("data/*", False),
        ("./data", False),
        ("../data", False),
        ("/data", False),
        ("org/name:a:b:c", False),
    ],
)
def test_names(path: str, yes: bool):
    assert is_hub_name(path) == yes


def test_a_folder_comes_first(tmp_path: Path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("org/name")


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:main:test", ("org/name", "main", "test")),
    ],
)
def test_rows(asked: list[tuple], tmp_path: Path, path: str, call: tuple):
    data = Data(train=path, template="none", cache_dir="", num_proc=1)
    records = build_dataset(data, "train", 30, 16, Letters)
    assert [e.input_ids for e in records] == [[1, 3, 4, 2], [1, 5, 6, 6, 2]]
    assert set(asked) == {call}
    stream = build_dataset(Data(train=path, template="none", streaming=True, shuffle=False), "train", 30, 16, Letters)
    assert [stream[i].input_ids[1] for i in range(4)] == [3, 5, 3, 5]


def test_bad_rows_are_named(asked: list[tuple]):
    data = Data(train=[DataSource("org/name", response_field="no")], template="none", cache_dir="", num_proc=1)
    assert message(build_dataset, data, "train", 30, 16, Letters) == "org/name: row 1: no: must be a string"


def test_a_row_that_cannot_be_read(asked: list[tuple], monkeypatch):
    def rows(self):
        yield ROWS[0]
        raise ValueError("Nanosecond resolution\ntemporal type")

    monkeypatch.setattr(Rows, "__iter__", rows)
    data = Data(train="org/name", template="none", cache_dir="", num_proc=1)
    says = "data.train: org/name: row 2: cannot be read: Nanosecond resolution temporal type"
    assert message(build_dataset, data, "train", 30, 16, Letters) == says


def test_an_unknown_name(asked: list[tuple]):
    text = message(build_dataset, Data(train="org/other"), "train", 30, 16, Letters)
    assert text == "data.train: cannot read org/other: Dataset 'org/other' doesn't exist on the Hub"


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    says = (
        "data.train[1]: cannot read org/name: No such file or directory; as a data set of the Hub it needs the package "
        "datasets: pip install datasets, or titan_hd[hub]"
    )
    data = Data(train=[DataSource("org/name"), DataSource("org/name")])
    with pytest.raises(ValueError) as caught:
        check_data(data)
    assert str(caught.value).splitlines()[1] == says
