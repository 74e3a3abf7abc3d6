"""Loads the tokenizer of a HF directory; the files that are there decide which library reads them."""

from __future__ import annotations

import re
from pathlib import Path

from titan_hd.data.text.chat import TOOL_TEMPLATE
from titan_hd.data.text.tokenizer_base import Settings, Tokenizer
from titan_hd.data.text.tokenizer_bpe import MERGES, VOCABULARY, read_byte_level
from titan_hd.data.text.tokenizer_json import JsonTokenizer
from titan_hd.data.text.tokenizer_model import SentencePieceTokenizer, TiktokenTokenizer
from titan_hd.data.text.tokenizer_world import VOCABULARY as WORLD_VOCABULARY
from titan_hd.data.text.tokenizer_world import WorldTokenizer
from titan_hd.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    VOCABULARY,
    MERGES,
    WORLD_VOCABULARY,
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    TOOL_TEMPLATE,
)
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a HF directory.

    tokenizer.json if it is there, else tokenizer.model, also in `original` (Meta's layout): a SentencePiece model
    (Llama 2, Mistral) or tiktoken's base64 ranks (Llama 3), told apart by what is in it; else vocab.json and merges.txt
    (GPT-2, RoBERTa); else RWKV's World vocabulary.

    Raises:
        UserError: none of them is there, or it cannot be read.
    """
    directory = Path(directory)
    settings = Settings.read(directory)
    if (directory / "tokenizer.json").exists():
        return JsonTokenizer(directory / "tokenizer.json", settings)
    for path in (directory / "tokenizer.model", directory / "original" / "tokenizer.model"):
        if path.exists():
            is_tiktoken = _TIKTOKEN_LINE.match(_read_bytes(path)) is not None
            return (TiktokenTokenizer if is_tiktoken else SentencePieceTokenizer)(path, settings)
    if (directory / VOCABULARY).exists() and (directory / MERGES).exists():
        return JsonTokenizer(directory / VOCABULARY, *read_byte_level(directory, settings))
    if (directory / WORLD_VOCABULARY).exists():
        return WorldTokenizer(directory / WORLD_VOCABULARY, settings)
    raise UserError(
        f"model.hf_assets_path: {directory} holds no tokenizer.json and no tokenizer.model, nor {VOCABULARY} with "
        f"{MERGES}, nor {WORLD_VOCABULARY}"
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
