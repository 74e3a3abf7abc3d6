"""Text to ids and back, behind one small interface; the file that is there decides which library reads it."""

from __future__ import annotations

import json
from pathlib import Path

from titan_hd.config.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


class Tokenizer:
    """Encode and decode of one HF directory.

    Attributes:
        bos_id: put in front of every sequence, or None where the family has no BOS.
        eos_id: ends every response.
        vocab_size: ids are below this.
    """

    bos_id: int | None
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text without any special token."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens are left out."""
        raise NotImplementedError


class _HFTokenizer(Tokenizer):
    """tokenizer.json through the tokenizers library; tokenizer_config.json and config.json name BOS and EOS."""

    def __init__(self, path: Path, settings: dict):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from None
        # Vocabularies may have gaps: what must fit into the embedding is the largest id.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # What the post-processor puts in front of an empty text is what the family was trained with.
        prefix = self._tokenizer.encode("", add_special_tokens=True).ids
        eos = _special(settings, "eos_token")
        eos_id = self._tokenizer.token_to_id(eos) if eos else None
        if eos_id is None:
            eos_id = _first(settings.get("eos_token_id"))
        if eos_id is None:
            raise UserError(f"{path}: no end-of-sequence token; name eos_token in tokenizer_config.json beside it")
        self.eos_id = eos_id
        bos = _special(settings, "bos_token")
        bos_id = self._tokenizer.token_to_id(bos) if bos else None
        self.bos_id = bos_id if bos_id is not None and (bos_id in prefix or settings.get("add_bos_token")) else None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class _SentencePiece(Tokenizer):
    """tokenizer.model of Llama 2, Mistral and the like."""

    def __init__(self, path: Path, settings: dict):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: is no SentencePiece model") from None
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path}: has no end-of-sequence token")
        self.bos_id = self._processor.bos_id() if settings.get("add_bos_token", True) else None
        if self.bos_id == -1:
            self.bos_id = None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def _special(settings: dict, key: str) -> str | None:
    value = settings.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a HF directory: tokenizer.json if it is there, else tokenizer.model.

    Raises:
        ValueError: neither file is there, or it cannot be read.
    """
    directory, settings = Path(directory), {}
    for name in ("config.json", "tokenizer_config.json"):
        if (directory / name).exists():
            try:
                settings.update(json.loads((directory / name).read_text(encoding="utf-8")))
            except ValueError as error:
                raise UserError(f"{directory / name}: not valid JSON: {error}") from None
    if (directory / "tokenizer.json").exists():
        return _HFTokenizer(directory / "tokenizer.json", settings)
    if (directory / "tokenizer.model").exists():
        return _SentencePiece(directory / "tokenizer.model", settings)
    raise UserError(f"model.hf_assets_path: {directory} holds no tokenizer.json and no tokenizer.model")
