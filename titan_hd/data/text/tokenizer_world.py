"""RWKV's "World" tokenizer: again and again the longest token of its vocabulary that the rest of a text begins with.

The file has a line for each token: its id, the token as a Python literal (a text, or bytes where they are no text), and
its length in bytes. Id 0, which is not in it, ends a text.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from titan_hd.data.text.tokenizer_base import Settings, Tokenizer, splitter
from titan_hd.errors import UserError

VOCABULARY = "rwkv_vocab_v20230424.txt"
END = 0
_LINE = re.compile(r"(\d+) (.+) (\d+)")


class WorldTokenizer(Tokenizer):
    """Encodes bytes of UTF-8 by the longest match. A text spells the end token where the files beside the vocabulary
    give it a name, by its id or as a special token without one: the Hub's call it "<s>"."""

    def __init__(self, path: Path, settings: Settings):
        self._tokens = read_vocabulary(path)
        ids = {token: i for i, token in self._tokens.items()}
        # A trie in one table: every beginning of a token, with the token's id where it is a whole one.
        self._beginnings: dict[bytes, int | None] = {token[:end]: None for token in ids for end in range(1, len(token))}
        self._beginnings |= ids
        self.learned_size = max(ids.values()) + 1
        self.added_tokens = added = self._added(path, settings, ids)
        self.vocab_size = max((self.learned_size - 1, *added.values())) + 1
        words = {t.content for i, t in settings.added_tokens.items() if not t.special and i != END} & added.keys()
        self.control_tokens = {text: i for text, i in added.items() if text not in words}
        self.control_ids = frozenset({END, *self.control_tokens.values()})
        self._splitters = {False: splitter(words), True: splitter(added)}
        self._tokens |= {added[word]: word.encode() for word in words}
        eos_id = settings.first_id("eos_token_id")
        self._set_ends(settings, None, END if eos_id is None else eos_id, END)

    def _added(self, path: Path, settings: Settings, ids: dict[bytes, int]) -> dict[str, int]:
        """Texts of tokens that the vocabulary lacks -> their ids. ids: of its own.

        Raises:
            UserError: one has the id of another token, or none and is no BOS, EOS, padding and so on.
        """
        added = {}
        for i, token in settings.added_tokens.items():
            own = self._tokens.get(i)
            if own is None:
                added[token.content] = i
            elif own != token.content.encode():
                raise UserError(f"{path}: id {i} is {own!r}, in the files beside it {token.content!r}")
        unknown = [text for text in settings.named if text not in added and text.encode() not in ids]
        named = settings.special_tokens.values()
        if without := [text for text in unknown if text not in named]:
            raise UserError(
                f"{path}: {without[0]!r} is none of its tokens; name it with its id in added_tokens_decoder"
            )
        return added | dict.fromkeys(unknown, END)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids = []
        for place, part in enumerate(self._splitters[special].split(text)):
            ids += [self.added_tokens[part]] if place % 2 else self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""
        data, ids, at = text.encode(), [], 0
        table, length = self._beginnings, len(data)
        while at < length:
            end, longest, found = at + 1, at, -1
            while end <= length and (beginning := data[at:end]) in table:
                whole = table[beginning]
                if whole is not None:
                    longest, found = end, whole
                end += 1
            assert found >= 0, "every byte is a token"
            ids.append(found)
            at = longest
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._tokens.get(i, b"") for i in ids).decode(errors="replace")


def read_vocabulary(path: Path) -> dict[int, bytes]:
    """Id -> token of a vocabulary file. Nothing in it is run.

    Raises:
        UserError: a line is no token, an id or a token is there twice, or a byte is no token.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}") from None
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        i, token = _token(line, f"{path}:{number}")
        if i in tokens or i == END:
            raise UserError(f"{path}:{number}: id {i} is taken")
        tokens[i] = token
    if len(set(tokens.values())) < len(tokens):
        raise UserError(f"{path}: a token is there twice")
    if missing := {bytes([byte]) for byte in range(256)} - set(tokens.values()):
        raise UserError(f"{path}: byte {min(missing)[0]} is no token, so that not every text has one")
    return tokens


def _token(line: str, where: str) -> tuple[int, bytes]:
    try:
        i, literal, length = _LINE.fullmatch(line.rstrip("\r")).groups()  # pyrefly: ignore[missing-attribute]
        token = ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
        if isinstance(token, bytes) and token and len(token) == int(length):
            return int(i), token
    except (AttributeError, SyntaxError, ValueError):
        pass
    raise UserError(f"{where}: must be an id, a token as a Python literal, and its length in bytes")
