"""Records of a classification: GLUE's tables as they are published, fields, labels, pairs and their cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.tokenizers import Letters
from titan_hd.config.job_config import Data
from titan_hd.data.build import DatasetBuilder
from titan_hd.data.example import IGNORE
from titan_hd.data.formats import shares
from titan_hd.data.labels import label_id
from titan_hd.data.loader import collate_packs
from titan_hd.data.sources import read_records
from titan_hd.errors import UserError
from titan_hd.models.classification import label_of_score

# The first lines of each task's train.tsv.
COLA = "gj04\t1\t\tour friends won\ngj04\t0\t*\tfriends our won\n"
SST2 = "sentence\tlabel\nhide \t0\ncontains \t1\n"
MRPC = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\the said "a\t" he said\r\n'
RTE = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n"
STSB = "index\tgenre\tsource1\tsource2\tsentence1\tsentence2\tscore\n0\tm\tn\tn\ta plane\tair\t3.800\n"
QNLI = "index\tquestion\tsentence\tlabel\n0\twhat\tas\tentailment\n"
MNLI = "index\tlabel1\tsentence1\tsentence2\tgold_label\n0\tx\ta\tb\tneutral\n"
ENTAILMENT = ["entailment", "not_entailment"]


def build(path: Path, labels: list[str], seq_len: int = 64, **settings):
    config = Data(train=str(path), format="classification", labels=labels, cache_dir="", **settings)
    return DatasetBuilder(config, 30, seq_len, lambda: Letters(bos=1)).training()


def letters(text: str) -> list[int]:
    return Letters().encode(text)


@pytest.mark.parametrize(
    ("text", "labels", "texts", "label"),
    [
        (COLA, ["0", "1"], ["our friends won"], 1),
        (SST2, ["0", "1"], ["hide "], 0),
        (MRPC, ["0", "1"], ['he said "a', '" he said'], 1),
        (RTE, ENTAILMENT, ["a", "b"], 1),
        (STSB, ["score"], ["a plane", "air"], label_of_score(3.8)),
        (QNLI, ENTAILMENT, ["what", "as"], 0),
        (MNLI, ["entailment", "neutral", "contradiction"], ["a", "b"], 1),
    ],
    ids=["cola", "sst2", "mrpc", "rte", "stsb", "qnli", "mnli"],
)
def test_tables_as_published(tmp_path: Path, text: str, labels: list[str], texts: list[str], label: int):
    path = tmp_path / "train.tsv"
    path.write_text(text, encoding="utf-8", newline="")
    example = build(path, labels)[0]
    ids = [1, *letters(texts[0]), 2]
    if texts[1:]:
        ids += [2, *letters(texts[1]), 2]
    assert example.input_ids == ids
    assert example.labels == [IGNORE, label] + [IGNORE] * (len(ids) - 2)
    assert example.trained_tokens == 1


def test_faults_of_a_table(tmp_path: Path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na\t1\nb\t1\tc\n")
    with pytest.raises(ValueError, match=r"train.tsv:3: has 3 cells, the first line 2"):
        list(read_records(str(path), "data.train"))
    path.write_text("sentence\tsentence\na\t1\n")
    with pytest.raises(ValueError, match=r"train.tsv:1: two columns of the heading have one name"):
        list(read_records(str(path), "data.train"))
    path.write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(ValueError, match=r"train.tsv:2: not valid UTF-8"):
        list(read_records(str(path), "data.train"))


def test_columns_without_a_heading(tmp_path: Path):
    path = tmp_path / "own.tsv"
    path.write_text("7\tgood\nx\tbad\n")
    assert list(read_records(str(path), "data.train")) == [
        {"column1": "7", "column2": "good"},
        {"column1": "x", "column2": "bad"},
    ]


def test_fields_of_ones_own(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"title": "a", "body": "bc", "topic": "news", "label": 9}) + "\n")
    fields = {"prompt_field": "body", "input_field": "title", "response_field": "topic"}
    example = build(path, ["sport", "news"], **fields)[0]
    assert example.input_ids == [1, *letters("bc"), 2, 2, *letters("a"), 2]
    assert example.labels[1] == 1
    with pytest.raises(ValueError, match=r"records.jsonl:1: no field of a classification .* set data.prompt_field"):
        build(path, ["sport", "news"])


@pytest.mark.parametrize(
    ("value", "labels", "expected"),
    [
        ("b", ["a", "b"], 1),
        (1, ["a", "b"], 1),
        ("1", ["a", "b"], 1),
        ("1", ["1", "0"], 0),
        (0, ["1", "0"], 1),
        (4, ["score"], label_of_score(4.0)),
        ("-1.5", ["score"], label_of_score(-1.5)),
    ],
)
def test_labels(value, labels: list[str], expected: int):
    assert label_id(value, "label", labels) == expected


@pytest.mark.parametrize(
    ("value", "labels", "reason"),
    [
        (None, ["a", "b"], "label: is missing"),
        ("", ["a", "b"], "label: is missing"),
        (-1, ["a", "b"], "label: must be one of a, b \\(data.labels\\), not '-1'"),
        (2, ["a", "b"], "label: must be one of a, b"),
        (True, ["a", "b"], "label: must be one of a, b"),
        ("c", ["a", "b"], "label: must be one of a, b"),
        (0, ["1", "2", "3"], "label: must be one of 1, 2, 3 \\(data.labels\\), not '0'"),
        ("2", ["-1", "0", "1"], "label: must be one of -1, 0, 1"),
        ("high", ["score"], "label: must be a number, the score, not 'high'"),
        (True, ["score"], "label: must be a number"),
        pytest.param(10**400, ["score"], "label: must be a number, the score, not '1000", id="large"),
        pytest.param("1" * 5000, ["a", "b"], "label: must be one of a, b \\(data.labels\\), not '1111", id="long"),
        ([[1]], ["a", "b"], "label: must be a text or a number, not a list"),
        ({"a": 1}, ["score"], "label: must be a text or a number, not a dict"),
        ("nan", ["score"], "label: must be a number"),
    ],
)
def test_no_labels(value, labels: list[str], reason: str):
    with pytest.raises(ValueError, match=f"^{reason}"):
        label_id(value, "label", labels)


@pytest.mark.parametrize(("label", "labels"), [("1" + "0" * 400, ["score"]), (json.dumps("1" * 5000), ["0", "1"])])
def test_a_label_that_is_no_number_of_the_machine(tmp_path: Path, label: str, labels: list[str]):
    """It is a bad record like others, with its line."""
    path = tmp_path / "records.jsonl"
    path.write_text(f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {label}}}\n')
    with pytest.raises(UserError, match=r"records.jsonl:2: label: must be"):
        build(path, labels)
    assert build(path, labels, on_error="skip").statistics.bad == 1


@pytest.mark.parametrize(("heading", "least"), [("sentence1\tsentence2", 6), ("sentence", 3)])
def test_rows_that_are_too_short_for_the_texts(tmp_path: Path, heading: str, least: int):
    path, texts = tmp_path / "train.tsv", "\t".join("abcdefgh" for _ in heading.split("\t"))
    path.write_text(f"{heading}\tlabel\n{texts}\t1\n")
    with pytest.raises(UserError, match=f"training.seq_len: must be at least {least} for the records of data.train"):
        build(path, ["0", "1"], seq_len=least - 1)
    assert len(build(path, ["0", "1"], seq_len=least)[0].input_ids) == least


def test_a_pair_is_cut_from_its_longer_text(tmp_path: Path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence1\tsentence2\tlabel\nabcdefgh\txy\t1\n")
    for length, first, second in ((14, "abcdefgh", "xy"), (10, "abcd", "xy"), (7, "ab", "x"), (6, "a", "x")):
        example = build(path, ["0", "1"], seq_len=length)[0]
        assert example.input_ids == [1, *letters(first), 2, 2, *letters(second), 2]
        assert example.labels[1] == 1


def test_cuts_are_those_of_transformers():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for room in range(1, 12):
        tokenizer.enable_truncation(room, strategy="longest_first")
        for first in range(1, 9):
            for second in range(1, 9):
                if first + second > room:
                    ids = tokenizer.encode("a " * first, "b " * second).ids
                    assert shares(room, first, second) == [ids.count(0), ids.count(1)], (room, first, second)


def test_packed_records_have_their_labels_where_they_begin(tmp_path: Path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nabc\t1\nx\t0\n")
    dataset = build(path, ["0", "1"])
    batch = collate_packs([[dataset[0], dataset[1]]])
    assert batch.labelled.positions.tolist() == [0, 5]
    assert batch.labelled.labels.tolist() == [1, 0]
    assert batch.documents.tolist() == [[0] * 5 + [1] * 3]
