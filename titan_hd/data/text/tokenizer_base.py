"""What a tokenizer is to the rest of titan_hd, and what the JSON files of a HF directory say about one."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_hd.errors import UserError
from titan_hd.files import read_json_object

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ANCHORS = ("\n", "|", "a", "\x01")  # see `encode_behind_anchor`


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
        control_tokens: the texts of those that a text can spell -> their ids. They are those that the files mark as
            special, and whatever is named as BOS, EOS, padding and so on or as an additional special token.
        added_tokens: all tokens beside the vocabulary that was learned -> their ids: control_tokens, and those that
            `encode` finds in any text.
        vocab_size: ids are below this. learned_size: those that are no added tokens are below this.
        special_tokens: bos_token, eos_token, ... -> their text, as far as the directory names them.
        directory: where it was loaded from.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]
    control_ids: frozenset[int] = frozenset()
    control_tokens: Mapping[str, int] = types.MappingProxyType({})
    added_tokens: Mapping[str, int] = types.MappingProxyType({})
    vocab_size: int
    learned_size: int | None = None
    special_tokens: dict[str, str]
    directory: Path
    _rows: int | None = None  # of the model's embedding, if the tokenizer has ids beyond it

    def fitting(self, rows: int) -> Tokenizer:
        """This tokenizer, for a model whose embedding has so many rows.

        Added tokens may lie beyond it (<pad> of a fine-tune that never trained one); a text that spells one is refused.

        Raises:
            UserError: so do other tokens, BOS or EOS: it is the tokenizer of another model.
        """
        if self.vocab_size > rows:
            learned = self.vocab_size if self.learned_size is None else self.learned_size
            if max(learned, self.eos_id + 1, (self.bos_id or 0) + 1) > rows:
                raise UserError(
                    f"model.hf_assets_path: the tokenizer has {self.vocab_size} ids, the model's vocabulary {rows}"
                )
            self._rows = rows
        return self

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; nothing is put in front or behind.

        special: a control token that is spelled in the text ("</s>", "<|eot_id|>") becomes that token. Otherwise it is
            text like any other, so that no record can forge the end of a turn. (Added tokens that tokenizer.json does
            not mark as special are ordinary vocabulary and are found in any text.) Equal to transformers' with
            split_special_tokens = not special.

        Raises:
            UserError: the text holds half of a surrogate pair, which no tokenizer takes, or spells a token for which
                the model has no embedding (see `fitting`).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start} is half of a surrogate pair, which no tokenizer takes") from None
        ids = self._encode(text, special)
        if self._rows is not None and max(ids, default=0) >= self._rows:
            name = next(name for name, i in self.added_tokens.items() if i in ids and i >= self._rows)
            raise UserError(f"spells {name!r}, token {max(ids)}, but the model's embedding has {self._rows} rows")
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        raise NotImplementedError

    def continuation(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text that stands behind another: as `encode`, without the space that some tokenizers
        (SentencePiece's kind) put in front of a text."""
        if not self._puts_something_in_front:
            return self.encode(text, special)
        return encode_behind_anchor(lambda both: self.encode(both, special), text)

    @functools.cached_property
    def _puts_something_in_front(self) -> bool:
        one = self.encode("a")
        return self.decode([*one, *one]) != "aa"

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


def encode_behind_anchor(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text without what `encode` puts in front of every text: it is encoded behind a sign that does not merge
    with it, whose ids are then taken away."""
    for anchor in _ANCHORS:
        front, both = encode(anchor), encode(anchor + text)
        if both[: len(front)] == front:
            return both[len(front) :]
    return encode(text)


def splitter(tokens: Collection[str]) -> re.Pattern[str]:
    """Its `split` gives what is between the tokens in a text in turn with these; of several the longest is found."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before it is cut into pieces; the flags are those of the tokenizers library."""

    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Settings:
    """What the JSON files of a directory say about its tokenizer."""

    directory: Path
    values: dict[str, Any]  # config.json under special_tokens_map.json and tokenizer_config.json
    special_tokens: dict[str, str]  # bos_token, ... -> text
    additional: list[str]  # special tokens without a name
    added_tokens: dict[int, AddedToken]
    stop_ids: list[int]

    @classmethod
    def read(cls, directory: Path) -> Settings:
        """From the JSON files of a HF directory. Files that are not there are left out. UserError names a file or a key
        that is wrong.

        As in transformers, special_tokens_map.json and added_tokens.json are what directories had before
        tokenizer_config.json had added_tokens_decoder: without that the former has the last word on names, with it both
        are passed over (but for names that tokenizer_config.json does not have).
        """
        config, names, map = (
            read_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
        )
        is_old = "added_tokens_decoder" not in config
        values = {**map, **config, **names} if is_old else {**map, **names, **config}
        special, additional = _special_tokens(values, directory), _additional(values, directory)
        named = {*special.values(), *additional}
        added = _old_added_tokens(directory, named) if is_old else _added_tokens(values, directory, named)
        path = directory / "generation_config.json"
        return cls(directory, values, special, additional, added, _ids(read_json(path).get("eos_token_id"), path))

    @property
    def named(self) -> list[str]:
        """The special tokens, in the order in which transformers adds those that a tokenizer lacks."""
        return list(dict.fromkeys([*self.special_tokens.values(), *self.additional]))

    def first_id(self, key: str) -> int | None:
        """bos_token_id or eos_token_id of config.json, which may be a list."""
        return next(iter(_ids(self.values.get(key), self.directory / "config.json")), None)


def _special_tokens(values: dict[str, Any], directory: Path) -> dict[str, str]:
    special = {}
    for key in _SPECIAL_NAMES:
        token = _text(values.get(key))
        if not isinstance(token, (str, type(None))):
            raise UserError(f"{directory / 'tokenizer_config.json'}: {key}: must be a string")
        if token:
            special[key] = token
    return special


def _additional(values: dict[str, Any], directory: Path) -> list[str]:
    """Special tokens without a name; transformers 5 has another key for them."""
    found = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = values.get(key) or []
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        tokens = [_text(token) for token in tokens] if isinstance(tokens, list) else [tokens]
        if not all(isinstance(token, str) for token in tokens):
            raise UserError(f"{directory / 'tokenizer_config.json'}: {key}: must be a list of strings")
        found += filter(None, tokens)
    return list(dict.fromkeys(found))


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(values: dict[str, Any], directory: Path, named: set[str]) -> dict[int, AddedToken]:
    """added_tokens_decoder of tokenizer_config.json: id -> {"content": ..., "special": ..., ...}."""
    flags = [f.name for f in dataclasses.fields(AddedToken)]
    try:
        added = {}
        for i, token in (values.get("added_tokens_decoder") or {}).items():
            if not isinstance(token["content"], str):
                raise TypeError
            kept = {key: token[key] for key in flags if key in token}
            if not all(isinstance(value, bool) for key, value in kept.items() if key != "content"):
                raise TypeError
            kept["special"] = bool(token.get("special")) or token["content"] in named
            kept.setdefault("normalized", not kept["special"])
            added[int(i)] = AddedToken(**kept)
        return added
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: added_tokens_decoder: must map ids to "
            '{"content": text} and flags'
        ) from None


def _old_added_tokens(directory: Path, named: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json: text -> id."""
    found = read_json(directory / "added_tokens.json")
    if not all(type(i) is int and i >= 0 for i in found.values()) or len(set(found.values())) < len(found):
        raise UserError(f"{directory / 'added_tokens.json'}: must map each token to an id of its own")
    return {i: AddedToken(text, special=text in named, normalized=text not in named) for text, i in found.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing, if the file is not there."""
    return read_json_object(path) if path.exists() else {}


def _ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{path}: token ids must be whole numbers")
    return ids
