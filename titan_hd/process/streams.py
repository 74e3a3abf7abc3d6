"""Standard output and standard error that end no run: a full disk, a gone reader or a lost terminal behind them costs
lines of the log, and nothing else. What was measured is in metrics.jsonl."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO, cast


class SteadyStream:
    """A text stream that drops what cannot be written; everything else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_streams() -> None:
    """From now on nothing that this process, or a library in it, writes to its standard streams raises an OSError.

    Not even at the interpreter's end, which turns one into exit status 120. Streams that were closed (`2>&-`) lead to
    /dev/null: otherwise the next file that is opened gets their number, and what libraries write in C ends up in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, cast(TextIO, SteadyStream(stream)))
