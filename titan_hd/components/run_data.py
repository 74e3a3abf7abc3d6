"""What a run reads: its records in their order, its validation sets, and how many steps that makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from titan_hd.components.validation import ValidationSet, validation_sets
from titan_hd.config.job_config import JobConfig
from titan_hd.data.build import Answering, DatasetBuilder
from titan_hd.data.dataset import Dataset
from titan_hd.data.order.sample_order import Order, OrderSettings
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.data.tokens.statistics import Statistics


class RunData(NamedTuple):
    """summary: a text that is the same where the samples of a run are. tokenizer: called only where one is needed.
    total_steps: of the whole run."""

    dataset: Dataset
    sets: list[ValidationSet]
    answering: Answering
    order: Order
    summary: str
    total_steps: int
    tokenizer: Callable[[], Tokenizer]

    @property
    def rows(self) -> list[Statistics]:
        """What became of the records of every source."""
        return self.dataset.rows + [row for one in self.sets for row in one.dataset.rows]


def read_data(config: JobConfig, vocab_size: int, batch: int) -> RunData:
    """Tokenizes what is not in the cache. batch: records of a step.

    Raises:
        UserError: names the key, or the file and its line.
    """
    c, pack_to = config, config.training.seq_len if config.data.pack else None
    tokenizer = functools.cache(lambda: load_tokenizer(c.model.hf_assets_path))
    builder = DatasetBuilder(c.data, vocab_size, c.training.seq_len, tokenizer)
    dataset = builder.training()
    answering = builder.answering()
    sets = validation_sets(builder.validation(), c) if c.validation.enable else []
    order = dataset.order(OrderSettings(c.data.shuffle, c.training.seed, pack_to))
    steps = c.training.steps
    if steps is None:
        assert c.training.epochs is not None  # one of the two is given
        steps = max(1, order.positions(c.training.epochs) // batch)
    return RunData(dataset, sets, answering, order, dataset.summary(pack_to), steps, tokenizer)
