"""tokenizer.json, through the tokenizers library."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from titan_hd.data.text.tokenizer_base import Settings, Tokenizer
from titan_hd.errors import UserError
from titan_hd.files import read_small_text


class JsonTokenizer(Tokenizer):
    """Every pipeline that the tokenizers library knows; tokenizer_config.json and config.json name BOS and EOS.

    path: for messages, and of the pipeline, if that is not given as `text`.
    """

    def __init__(self, path: Path, settings: Settings, text: str | None = None):
        import tokenizers

        try:
            text = read_small_text(path) if text is None else text
            prefix = settings.values.get("add_prefix_space")
            if isinstance(prefix, bool):
                text = _with_prefix_space(text, prefix)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from None
        # Both may be left over in the file from whoever trained it, and would cut or fill up every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_tokens(path, settings)
        # Vocabularies may have gaps: what must fit into the embedding is the largest id.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        learned = self._tokenizer.get_vocab(with_added_tokens=False).values()
        self.learned_size = max((i for i in learned if i not in added), default=-1) + 1
        self.control_tokens = {token.content: i for i, token in added.items() if token.special}
        self.added_tokens = {token.content: i for i, token in added.items()}
        self.control_ids = frozenset(self.control_tokens.values())
        eos_id = self._id(settings, "eos_token")
        if eos_id is None:
            raise UserError(f"{path}: no end-of-sequence token; name eos_token in tokenizer_config.json beside it")
        # What the post-processor puts in front of an empty text is what the family was trained with.
        bos_id = self._id(settings, "bos_token")
        if bos_id not in self._tokenizer.encode("", add_special_tokens=True).ids:
            bos_id = None
        self._set_ends(settings, bos_id, eos_id, self._id(settings, "pad_token"))

    def _add_tokens(self, path: Path, settings: Settings) -> None:
        """What the other files say of tokens: those that tokenizer.json lacks, and which of its own are special.

        Raises:
            UserError: a token has another id there.
        """
        import tokenizers

        own = self._tokenizer.get_added_tokens_decoder()
        for i, token in sorted(settings.added_tokens.items()):
            wanted = tokenizers.AddedToken(**dataclasses.asdict(token))
            if own.get(i) != wanted:
                self._tokenizer.add_tokens([wanted])
            if self._tokenizer.token_to_id(token.content) != i:
                found = self._tokenizer.token_to_id(token.content)
                raise UserError(f"{path}: the id of {token.content!r} is {found}, in the files beside it {i}")
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        for text in settings.named:
            if text not in special and self._may_be_added(text, settings):
                self._tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])

    def _may_be_added(self, text: str, settings: Settings) -> bool:
        """BOS and EOS stand in every record: the model has no embedding for one that the vocabulary lacks."""
        ends = [settings.special_tokens.get(name) for name in ("bos_token", "eos_token")]
        return text not in ends or self._tokenizer.token_to_id(text) is not None

    def _id(self, settings: Settings, name: str) -> int | None:
        """The token that the settings name by its text, else by its id."""
        token = settings.special_tokens.get(name)
        if not token:
            return settings.first_id(name + "_id")
        found = self._tokenizer.token_to_id(token)
        if found is None and name != "pad_token":  # what is padded with cannot matter
            raise UserError(f"{settings.directory}: {name}: {token!r} is no token of tokenizer.json")
        return found

    def _encode(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _with_prefix_space(text: str, wanted: bool) -> str:
    """tokenizer.json with add_prefix_space of tokenizer_config.json obeyed, as transformers 4 does: a byte-level
    pipeline puts a space in front of a text as it says, one of SentencePiece's kind puts none there if it is false."""
    pipeline = json.loads(text)
    pre = pipeline.get("pre_tokenizer") or {}
    if pre.get("type") == "ByteLevel":
        pre["add_prefix_space"] = wanted
    elif wanted:
        return text
    else:
        for key, drop in (("normalizer", "Prepend"), ("pre_tokenizer", ""), ("decoder", "Strip")):
            pipeline[key] = _without_prefix(pipeline.get(key), drop)
    return json.dumps(pipeline)


def _without_prefix(part: dict[str, Any] | None, drop: str) -> dict[str, Any] | None:
    """A part of a pipeline without the steps of type `drop`, and with no space put in front of a text."""
    if part is None or part.get("type") == drop:
        return None
    if part.get("type") == "Metaspace":
        return {**{key: value for key, value in part.items() if key != "add_prefix_space"}, "prepend_scheme": "never"}
    if part.get("type") == "Sequence":
        name = next(key for key in ("normalizers", "pretokenizers", "decoders") if key in part)
        return {**part, name: [kept for step in part[name] if (kept := _without_prefix(step, drop))]}
    return part
