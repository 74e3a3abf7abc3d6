"""What a person sees while a command runs: the log, colours, and how far a long phase has come.

On a terminal a phase is a bar. Anywhere else, in a log file say, it is a line now and then, and nothing is written that
only a terminal understands: no carriage return and no escape code.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

from titan_hd.files import shown_size

# A logger of its own: a phase may be told by a rank whose other lines are not wanted.
logger = logging.getLogger("titan_hd.progress")

FIRST_LINE, LONGEST_PAUSE = 15.0, 300.0  # seconds; the pauses between a phase's lines double from the first on
BAR_PAUSE = 1.0  # seconds, after which a bar is drawn anew at the latest
_STYLES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33"}
# All but tab and newline, and those of eight bits: 0x9b alone is ESC [ to some terminals.
_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(9), *range(11, 32), *range(127, 160))}


# ---------------------------------------------------------------------------------------------------------------------
# Terminals and colours


def on_terminal(stream: TextIO | None = None) -> bool:
    """Whether a stream (by default the standard error) is a terminal whose cursor can be moved."""
    try:
        return (stream or sys.stderr).isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # there is no such stream, it is no file of Python's own, or it is closed
        return False


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether to colour what goes there: on a terminal, unless NO_COLOR is set; anywhere if FORCE_COLOR is."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or on_terminal(stream)


def painted(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in a style ("bold", "dim", "red", "yellow") where the stream has colours."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if text and has_colours(stream) else text


def printable(text: str) -> str:
    """What a message quotes of files and records, without characters that would move a terminal's cursor."""
    return text.translate(_CONTROLS)


def clock(seconds: float) -> str:
    """A duration as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---------------------------------------------------------------------------------------------------------------------
# The log


class TqdmHandler(logging.StreamHandler):
    """Writes log lines above a progress bar instead of through it. What cannot be written stops nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _Lines(logging.Formatter):
    """The time, the rank if it is not the first, and the message; warnings and errors are marked as such."""

    def __init__(self, rank: int):
        super().__init__(datefmt="%H:%M:%S")
        self._prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)  # "%(message)s", and a traceback if there is one
        text = said if getattr(record, "painted", False) else printable(said)
        if record.levelno >= logging.WARNING:
            text = painted(f"{record.levelname.lower()}: {text}", "yellow" if record.levelno < logging.ERROR else "red")
        return f"{painted(self.formatTime(record, self.datefmt), 'dim')} {self._prefix}{text}"


def init_logging(rank: int) -> None:
    """Rank 0 logs from INFO on. Other ranks log errors only; their warnings would repeat rank 0's."""
    log, handler = logging.getLogger("titan_hd"), TqdmHandler()
    handler.setFormatter(_Lines(rank))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
    logger.setLevel(logging.INFO)


def silence_libraries() -> None:
    """Where there is no terminal, bars that libraries draw by tqdm stay away from now on: they would fill a log with
    carriage returns. Ours are lines there."""
    if not on_terminal():
        setattr(tqdm, "__init__", functools.partialmethod(_TQDM_INIT, disable=True))  # noqa: B010 (pyrefly)


_TQDM_INIT = tqdm.__init__


# ---------------------------------------------------------------------------------------------------------------------
# Progress


_bars = True


def use_bars(wanted: bool) -> None:
    """Whether phases are bars on a terminal; else they are lines there, too."""
    global _bars
    _bars = wanted


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """At the end of the block the log, the bars, and what is silenced are in this process what they were before."""
    log = logging.getLogger("titan_hd")
    before = log.handlers[:], log.propagate, log.level, logger.level
    bars, init = _bars, vars(tqdm)["__init__"]  # as it stands there: it may be a partialmethod
    try:
        yield
    finally:
        log.handlers[:], log.propagate, level, progress_level = before
        log.setLevel(level)
        logger.setLevel(progress_level)
        use_bars(bars)
        setattr(tqdm, "__init__", init)  # noqa: B010 (pyrefly)


def is_first_rank() -> bool:
    """Whether this process is the one of a run that speaks; a process alone is."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """A line of a tool, which has no log, above its bars."""
    tqdm.write(f"titan_hd: {printable(line)}", file=sys.stderr)


def _log(line: str) -> None:
    """A line in the log, where there is one; tools have none that shows it."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", line)
    else:
        tell(line)


class Progress:
    """How far a phase is, from entering it to leaving it: a bar on a terminal, elsewhere lines now and then.

        with Progress("reading the weights", total=size, unit="B") as progress:
            progress.update(read)

    A thread shows it: it goes on while the phase waits, or computes for long without an update.

    what: names the phase. total: of what is counted, None where it is not known. unit: its name in the plural; "B" for
    bytes. shown: whether this rank shows it; by default rank 0 does. said: gets the lines; by default the log. done:
    counted before. poll: tells how much is done, in place of `update`. always: a line at the end of a short phase, too.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        shown: bool | None = None,
        said: Callable[[str], object] | None = None,
        done: int = 0,
        poll: Callable[[], int] | None = None,
        always: bool = False,
    ):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.note = ""  # behind the figures
        self._shown, self._poll, self._always = is_first_rank() if shown is None else shown, poll, always
        self._say = said or _log
        self._before, self._spoke = done, False
        self._bar: tqdm | None = None
        self._over = threading.Event()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._shown:
            if _bars and on_terminal():
                self._bar = self._new_bar()
            self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._shown:
            return
        self._over.set()
        self._thread.join()
        self._ask()
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        if kind is None and (self._spoke or (self._always and self._bar is None)):
            self._say(self._line(over=True))

    def _new_bar(self) -> tqdm:
        in_bytes = self.unit == "B"
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}{postfix}]" if self.total else None
        return tqdm(
            desc=self.what,
            total=self.total,
            initial=self.done,
            unit=self.unit if in_bytes else f" {self.unit}",
            unit_scale=in_bytes,
            bar_format=None if in_bytes else form if self.total or self.unit else "{desc}: {elapsed}",
            dynamic_ncols=True,
            leave=False,
            disable=False,
        )

    def _show(self) -> None:
        pause = FIRST_LINE if self._bar is None else BAR_PAUSE
        while not self._over.wait(pause):
            self._ask()
            if self._bar is not None:
                self._bar.set_postfix_str(self.note, refresh=True)
            else:
                self._spoke = True
                self._say(self._line())
                pause = min(2 * pause, LONGEST_PAUSE)

    def _ask(self) -> None:
        if self._poll is not None:
            self.done = max(self.done, self._poll())  # what is looked at may be gone when it is done
            if self._bar is not None:
                self._bar.n = self.done

    def _line(self, over: bool = False) -> str:
        seconds, made = time.monotonic() - self._started, self.done - self._before
        spent = f"{'in' if over else 'after'} {clock(seconds)}"
        if self.total:
            count = f"{self._amount(self.done)} of {self._amount(self.total)} {self.unit if self.unit != 'B' else ''}"
            text = f"{self.what}: {self.done / self.total:.0%} ({count.rstrip()}) {spent}"
            if made > 0 and not over:
                text += f", about {clock(seconds * (self.total - self.done) / made)} left"
        elif self.unit:
            text = f"{self.what}: {self._amount(self.done)} {self.unit if self.unit != 'B' else ''}".rstrip()
            text += f" {spent}"
        else:
            text = f"{self.what}: {'done ' if over else ''}{spent}"
        return f"{text}, {self.note}" if self.note else text

    def _amount(self, count: int) -> str:
        return shown_size(count) if self.unit == "B" else f"{count:,}"
