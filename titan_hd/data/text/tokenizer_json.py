"""tokenizer.json, through the tokenizers library."""

from __future__ import annotations

from pathlib import Path

from titan_hd.data.text.tokenizer_base import Settings, Tokenizer
from titan_hd.errors import UserError


class JsonTokenizer(Tokenizer):
    """Every pipeline that the tokenizers library knows; tokenizer_config.json and config.json name BOS and EOS."""

    def __init__(self, path: Path, settings: Settings):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path}: cannot be read as a tokenizer: {error}") from None
        # Both may be left over in the file from whoever trained it, and would cut or fill up every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Vocabularies may have gaps: what must fit into the embedding is the largest id.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_tokens = {token.content: i for i, token in added.items() if token.special}
        self.control_ids = frozenset(self.control_tokens.values())
        eos_id = self._id(settings, "eos_token")
        if eos_id is None:
            raise UserError(f"{path}: no end-of-sequence token; name eos_token in tokenizer_config.json beside it")
        # What the post-processor puts in front of an empty text is what the family was trained with.
        bos_id = self._id(settings, "bos_token")
        if bos_id not in self._tokenizer.encode("", add_special_tokens=True).ids:
            bos_id = None
        self._set_ends(settings, bos_id, eos_id, self._id(settings, "pad_token"))

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
