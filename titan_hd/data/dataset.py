"""From the [data] section to records."""

from __future__ import annotations

from collections.abc import Callable

from titan_hd.config.errors import UserError
from titan_hd.config.job_config import Data
from titan_hd.data.records import InstructionRecords, TokenRecords, read_jsonl
from titan_hd.data.templates import load_template
from titan_hd.data.tokenizer_base import Tokenizer


def build_records(
    config: Data,
    key: str,
    vocab_size: int,
    seq_len: int,
    tokenizer: Callable[[], Tokenizer],
) -> TokenRecords | InstructionRecords:
    """The records of data.train or data.validation (`key` is "train" or "validation"), every one of them checked.

    tokenizer: called only where the format needs one. ValueError names the key, or the file and its line.
    """
    records = read_jsonl(getattr(config, key), f"data.{key}")
    is_tokens = config.format == "tokens" or (config.format == "auto" and "input_ids" in records[0])
    if is_tokens:
        return TokenRecords(records, vocab_size, seq_len)
    tokens = tokenizer()
    if tokens.vocab_size > vocab_size:
        raise UserError(
            f"model.hf_assets_path: the tokenizer has {tokens.vocab_size} ids, the model's vocabulary {vocab_size}"
        )
    return InstructionRecords(
        records, tokens, load_template(config.template, tokens), seq_len, config.prompt_field, config.response_field
    )
