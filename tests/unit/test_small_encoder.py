"""benchmarks/small_encoder.py: what the small encoder learns from is what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import small_encoder
from benchmarks.small_encoder import END, PADDING, START, Example, Texts, collate
from titan_hd.models.registry import build_model, read_hf_config

FOUND = [["The cat sat on the mat", "A cat, asleep."], ["Rain fell on the roofs of the town"]]
IDS = {"one": [11], "two": [12, 13], "Three": [14], "three,": [15]}


def test_a_token_is_matched_where_the_other_text_has_its_word():
    batch = collate([Example([["one", "two"], ["Three", "two"]], [0.5] * 4), Example([["three,"]], None)], IDS.get)
    assert batch.ids.tolist() == [
        [START, 11, 12, 13, END, END, 14, 12, 13, END],
        [START, 15, END] + 7 * [PADDING],
    ]
    assert batch.matched.tolist() == [[-1, 0, 1, 1, -1, -1, 0, 1, 1, -1], [-1, 0] + 8 * [-1]]
    assert batch.shares[:, 0].isnan().tolist() == [False, True]
    same = collate([Example([["Three"], ["three,"]], [1.0] * 4)], IDS.get)
    assert same.matched[0].tolist() == [-1, 1, -1, -1, 1, -1], "capitals and punctuation do not count"


def test_shares_are_by_number_and_by_rarity():
    texts = Texts([["a a a b", "a c"]], seed=0)  # of six words a is four, b and c one each
    by_number, by_rarity = texts.shares(["a", "b"], ["a", "c"])
    assert by_number == pytest.approx(1 / 2)
    assert by_rarity == pytest.approx(math.log(6 / 4) / (math.log(6 / 4) + math.log(6)))


def test_examples_are_as_long_as_they_may_be():
    texts = Texts([[text.lower() for text in texts] for texts in FOUND], seed=0)
    drawn = [texts.example(longest=6) for _ in range(200)]
    assert {len(example.texts) for example in drawn} == {1, 2}
    assert max(len(words) for example in drawn for words in example.texts) == 6
    assert all((example.shares is None) == (len(example.texts) == 1) for example in drawn)
    again = Texts([[text.lower() for text in texts] for texts in FOUND], seed=0)
    assert [again.example(longest=6) for _ in range(200)] == drawn


def test_an_encoder_is_written_that_a_run_can_read(tmp_path: Path):
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    lines = [f"{i}\t{FOUND[0][0]}\t{FOUND[1][0]}\tentailment" for i in range(4)]
    (folder / "train.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    written = {}
    for steps in (0, 2):
        small_encoder.write_encoder(tmp_path / f"{steps}", tmp_path / "glue", steps, seed=0)
        written[steps] = load_file(tmp_path / f"{steps}" / "model.safetensors")
    model = build_model(read_hf_config(tmp_path / "2"))
    assert set(model.state_dict()) - set(written[2]) == {n for n in model.state_dict() if n.startswith("classifier.")}
    moved = {name for name, weight in written[0].items() if not torch.equal(weight, written[2][name])}
    assert len(moved) > 0.9 * len(written[0])
