"""From the [data] section to records: read, understood, tokenized and counted."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable

from tqdm import tqdm

from titan_hd.config.errors import UserError
from titan_hd.config.job_config import Data
from titan_hd.data.formats import ChatFormat, Format, InstructionFormat, TextFormat, TokensFormat, detect_format
from titan_hd.data.records import InstructionRecords, Statistics, TokenizedRecords
from titan_hd.data.sources import Faults, Record, read_records
from titan_hd.data.templates import load_template
from titan_hd.data.tokenizer_base import Tokenizer

logger = logging.getLogger("titan_hd")


def build_records(
    config: Data,
    key: str,
    vocab_size: int,
    seq_len: int,
    tokenizer: Callable[[], Tokenizer],
    progress: bool = False,
) -> TokenizedRecords:
    """The records of data.train or data.validation (`key` is "train" or "validation"), tokenized and cut at seq_len.

    The same on every worker: in the order of the files and their lines, without the records that data.on_error skips
    and those that the cut leaves nothing to train on.

    tokenizer: called only where the format needs one.
    progress: show a bar, if the standard error is a terminal.

    Returns:
        InstructionRecords for validation records with a prompt and a response.

    Raises:
        UserError: names the key, or the file and its line; or no record is left.
    """
    name, faults = f"data.{key}", Faults(config.on_error == "skip", config.max_skipped)
    source = read_records(getattr(config, key), name, faults)
    first = next(source, None)
    if first is None:
        raise UserError(f"{name}: no record is left; {faults.count} are bad, the first: {faults.first}")
    chosen, found = (config.format, "") if config.format != "auto" else detect_format(config, first)
    if found:
        logger.info("%s: format %s, because the first record has %s", name, chosen, found)
    statistics, format = Statistics(name, chosen), _build_format(config, chosen, first, vocab_size, tokenizer)
    if key == "validation" and isinstance(format, InstructionFormat):
        records = InstructionRecords(statistics, seq_len, format.tokenizer, format.template, format.parts)
    else:
        records = TokenizedRecords(statistics, seq_len)
    hidden = not (progress and sys.stderr.isatty())
    for record in tqdm(itertools.chain([first], source), f"tokenizing {name}", unit=" records", disable=hidden):
        try:
            example = format.encode(record)
        except UserError as error:
            faults.report(f"{record.where}: {error}")
            continue
        records.add(example, record)
    statistics.bad = faults.count
    _check_what_is_left(statistics, faults, seq_len)
    return records


def _build_format(
    config: Data, name: str, first: Record, vocab_size: int, tokenizer: Callable[[], Tokenizer]
) -> Format:
    if name == "tokens":
        return TokensFormat(vocab_size)
    tokens = tokenizer()
    if tokens.vocab_size > vocab_size:
        raise UserError(
            f"model.hf_assets_path: the tokenizer has {tokens.vocab_size} ids, the model's vocabulary {vocab_size}"
        )
    if name == "instruction":
        return InstructionFormat(config, tokens, load_template(config.template, tokens), first)
    return (ChatFormat if name == "chat" else TextFormat)(config, tokens)


def _check_what_is_left(statistics: Statistics, faults: Faults, seq_len: int) -> None:
    s = statistics
    if s.bad:
        logger.info("%s: %d bad records are skipped; the first: %s", s.name, s.bad, faults.first)
    if s.unlabelled:
        line = "%s: %d records hold no label within training.seq_len = %d and are skipped; the first: %s"
        logger.info(line, s.name, s.unlabelled, seq_len, s.first_unlabelled)
    if not s.records:
        bad = f", {s.bad} are bad, the first: {faults.first}" if s.bad else ""
        raise UserError(
            f"{s.name}: no record is left; {s.unlabelled} hold no label within training.seq_len = {seq_len} (the "
            f"longest has {s.longest} tokens){bad}"
        )
