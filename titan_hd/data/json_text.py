"""JSON as records have it: by the letter, and arrays of gigabytes piece by piece."""

from __future__ import annotations

import codecs
import io
import json
import re
from pathlib import Path
from typing import Any

from titan_hd.errors import UserError

MAX_RECORD = 8 * 2**20  # bytes of a record; longer ones are binary data or a file without line ends
TOO_LONG = f"is longer than {MAX_RECORD} bytes, the most that a record may have"
PIECE = 2**20  # bytes of an array that are read at once
_SPACE = re.compile(r"[ \t\r\n]*")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _object_of_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that stands there twice, Python would keep the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands in one object twice")
    return found


# For json.loads and json.JSONDecoder.
STRICT: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": _object_of_different_keys}


class ArrayText:
    """The text of a JSON array, of which little more than a record is held at a time.

    Attributes:
        line: that of the sign which is next.
    """

    def __init__(self, stream: io.BufferedReader, path: Path):
        self._stream, self._path = stream, path
        self._unicode = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(**STRICT)
        self._text, self._place, self.line = "", 0, 1

    def _read_on(self) -> bool:
        """Hold at least twice as much as is unread; False at the end of the file."""
        data = self._stream.read(max(PIECE, len(self._text) - self._place))
        try:
            more = self._unicode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._place) + error.object.count(10, 0, error.start)
            raise UserError(f"{self._path}:{line}: not valid UTF-8") from None
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(data)

    def advance(self, count: int) -> str:
        """Go on by so many signs and then to one that is no space, which is returned; "" at the end of the file."""
        start, self._place = self._place, self._place + count
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space, "it matches nothing too"
            self._place = space.end()
            self.line += self._text.count("\n", start, self._place)
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place : self._place + 1]
            start = self._place

    def value(self, number: int) -> tuple[Any, int]:
        """The value that begins here, and its size in signs. number: of the record, for messages."""
        while True:
            value, size, fault = None, 0, None
            try:
                value, end = self._json.raw_decode(self._text, self._place)
                size = end - self._place
            except json.JSONDecodeError as error:  # perhaps only because its end is not held yet
                is_cut = error.msg.startswith("Unterminated string") or error.pos + 16 > len(self._text)
                end = len(self._text) if is_cut else error.pos
                fault = self.error(number, self.line + self._text.count("\n", self._place, error.pos), error.msg)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise self.error(number, self.line, reason) from None
            if fault and end == len(self._text) and end - self._place > MAX_RECORD:
                raise UserError(f"{self._path}:{self.line}: record {number}: {TOO_LONG}")
            if end == len(self._text) and self._read_on():
                continue
            if fault:
                raise fault
            return value, size

    def error(self, number: int, line: int, reason: str) -> UserError:
        return UserError(f"{self._path}:{line}: record {number}: not valid JSON: {reason}")
