"""Datasets for tests, built as a run builds them."""

from __future__ import annotations

from collections.abc import Callable

from tests.kit.tokenizers import Letters
from titan_hd.config.job_config import Data
from titan_hd.data.build import DatasetBuilder
from titan_hd.data.dataset import Dataset
from titan_hd.data.text.tokenizer import Tokenizer


def build_dataset(
    data: Data, key: str, vocab_size: int, seq_len: int, tokenizer: Callable[[], Tokenizer] = Letters
) -> Dataset:
    """The dataset of data.train or data.validation (`key` is "train" or "validation")."""
    builder = DatasetBuilder(data, vocab_size, seq_len, tokenizer)
    return builder.training() if key == "train" else builder.validation()[""]
