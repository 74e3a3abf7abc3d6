"""What a tokenizer is to the rest of titan_hd, and what the JSON files of a HF directory say about one."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_hd.errors import UserError
from titan_hd.files import read_json_object

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encode and decode of one HF directory.

    Attributes:
        bos_id: stands in front of every sequence, or None where the family has no BOS. tokenizer.json says so by its
            post-processor, as transformers 5 reads it (add_bos_token is ignored beside it); SentencePiece and tiktoken
            models have one unless add_bos_token in tokenizer_config.json is false.
        eos_id: ends every response. That is what add_eos_token asks for, so this key changes nothing.
        pad_id: pad_token, else (also where the vocabulary lacks it) eos_id. Padding carries no label and stands to the
            right of everything that attends, so that its value cannot matter.
        stop_ids: generation ends at any of them: eos_id and what generation_config.json lists.
        control_ids: the tokens that `encode` gives only where `special` is set, and that `decode` leaves out.
        control_tokens: the texts of those that a text can spell -> their ids.
        vocab_size: ids are below this.
        special_tokens: bos_token, eos_token, ... -> their text, as far as the directory names them.
        directory: where it was loaded from.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]
    control_ids: frozenset[int] = frozenset()
    control_tokens: Mapping[str, int] = types.MappingProxyType({})
    vocab_size: int
    special_tokens: dict[str, str]
    directory: Path

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; nothing is put in front or behind.

        special: a control token that is spelled in the text ("</s>", "<|eot_id|>") becomes that token. Otherwise it is
            text like any other, so that no record can forge the end of a turn. (Added tokens that tokenizer.json does
            not mark as special are ordinary vocabulary and are found in any text.) Equal to transformers' with
            split_special_tokens = not special.

        Raises:
            UserError: the text holds half of a surrogate pair, which no tokenizer takes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start} is half of a surrogate pair, which no tokenizer takes") from None
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens and ids that the vocabulary does not have are left out.

        decode(encode(text)) == text, except where a tokenizer normalises (Qwen: NFC; SentencePiece: the character
        U+2581, which is its space). Bytes that are no UTF-8 become U+FFFD. No clean-up of spaces.
        """
        raise NotImplementedError

    def _set_ends(self, settings: Settings, bos_id: int | None, eos_id: int, pad_id: int | None) -> None:
        self.directory, self.special_tokens = settings.directory, settings.special_tokens
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = pad_id if pad_id is not None and 0 <= pad_id < self.vocab_size else eos_id
        self.stop_ids = frozenset((eos_id, *settings.stop_ids))
        for name, value in (("bos_token_id", bos_id), ("eos_token_id", eos_id)):
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(
                    f"{self.directory}: {name}: {value} is no id of the tokenizer, which has {self.vocab_size}"
                )


@dataclass(frozen=True)
class Settings:
    """What the JSON files of a directory say about its tokenizer."""

    directory: Path
    values: dict[str, Any]  # tokenizer_config.json over special_tokens_map.json over config.json
    special_tokens: dict[str, str]
    stop_ids: list[int]

    @classmethod
    def read(cls, directory: Path) -> Settings:
        """From the JSON files of a HF directory, the later ones over the earlier: config, special_tokens_map,
        tokenizer_config. Files that are not there are left out. UserError names a file or a key that is wrong."""
        values: dict[str, Any] = {}
        for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
            values.update(read_json(directory / name))
        special = {}
        for key in _SPECIAL_NAMES:
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, (str, type(None))):
                raise UserError(f"{directory / 'tokenizer_config.json'}: {key}: must be a string")
            if token:
                special[key] = token
        stops = read_json(directory / "generation_config.json").get("eos_token_id")
        return cls(directory, values, special, _ids(stops, directory / "generation_config.json"))

    @property
    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """added_tokens_decoder: id -> {"content": ..., "special": ...}."""
        try:
            added = {int(i): dict(t) for i, t in (self.values.get("added_tokens_decoder") or {}).items()}
            if all(isinstance(token["content"], str) for token in added.values()):
                return added
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise UserError(
            f'{self.directory / "tokenizer_config.json"}: added_tokens_decoder: must map ids to {{"content": text}}'
        )

    def first_id(self, key: str) -> int | None:
        """bos_token_id or eos_token_id of config.json, which may be a list."""
        return next(iter(_ids(self.values.get(key), self.directory / "config.json")), None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing, if the file is not there."""
    return read_json_object(path) if path.exists() else {}


def _ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{path}: token ids must be whole numbers")
    return ids
