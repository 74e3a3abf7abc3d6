"""The log, colours and progress: a terminal gets bars and colours, everything else plain lines."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from titan_hd import console
from titan_hd.console import Progress, clock


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def stream(monkeypatch):
    """The standard error, as a terminal or not; what the process silences is as before afterwards."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def open_stream(terminal: bool) -> Stream:
        monkeypatch.setattr(sys, "stderr", Stream(terminal))
        return sys.stderr

    with console.kept():
        yield open_stream


@pytest.mark.parametrize(
    ("terminal", "environment", "colours"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours(terminal: bool, environment: dict[str, str], colours: bool, stream, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = stream(terminal)
    console.init_logging(rank=0)
    logging.getLogger("titan_hd").warning("ice \x1b[2J\rand\x9b2J\n  snow")
    (first, second) = out.getvalue().splitlines()
    assert ("\x1b[33m" in first) == colours
    plain = first.replace("\x1b[33m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert plain[8:] == r" warning: ice \x1b[2J\x0dand\x9b2J", "what a message quotes moves no cursor"
    assert second.startswith("  snow")


def test_ranks(stream):
    out = stream(False)
    console.init_logging(rank=3)
    logging.getLogger("titan_hd").warning("repeated")
    logging.getLogger("titan_hd").error("lost")
    logging.getLogger("titan_hd.progress").info("half")
    assert [line[9:] for line in out.getvalue().splitlines()] == ["[rank 3] error: lost", "[rank 3] half"]


def test_a_closed_stream_is_no_terminal():
    closed = open(os.devnull)  # noqa: SIM115
    closed.close()
    assert not console.on_terminal(closed)


def test_a_process_may_have_no_stream_or_one_that_is_no_file(monkeypatch):
    for stream in (None, object()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not console.on_terminal()
        assert console.painted("ice", "red") == "ice"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_libraries_draw_no_bars_into_a_file(stream):
    out = stream(False)
    console.silence_libraries()
    list(tqdm(range(3), file=out))
    assert out.getvalue() == ""


class TestProgress:
    @pytest.fixture
    def lines(self, monkeypatch) -> list[str]:
        """Of phases whose first line comes at once, and whose seconds are counted by the looks at the clock."""
        monkeypatch.setattr(console, "FIRST_LINE", 0.01)
        ticks = itertools.count(100, 30)
        every_30 = SimpleNamespace(monotonic=lambda: next(ticks))  # the module's is every thread's
        monkeypatch.setattr(console, "time", every_30)
        return []

    def wait_for(self, shown: Callable[[], object]) -> None:
        for _ in range(1000):
            if shown():
                return
            time.sleep(0.005)

    @pytest.mark.parametrize(
        ("total", "unit", "before", "line", "last"),
        [
            (8, "layers", 0, "25% (2 of 8 layers) after 0:30, about 1:30 left", "25% (2 of 8 layers) in "),
            (8, "layers", 4, "75% (6 of 8 layers) after 0:30, about 0:30 left", "75% (6 of 8 layers) in "),
            (None, "records", 0, "2 records after 0:30", "2 records in "),
            (4000, "B", 0, "0% (2 bytes of 4.00 kB) after 0:30, about 16:39:30 left", "0% (2 bytes of 4.00 kB) in "),
            (None, "", 0, "after 0:30", "done in "),
        ],
    )
    def test_a_line_now_and_then_and_one_at_the_end(self, total, unit, before, line, last, lines, stream):
        out = stream(False)
        with Progress("loading", total, unit, said=lines.append, done=before) as progress:
            progress.update(2)
            self.wait_for(lambda: lines)
        assert lines[0] == f"loading: {line}"
        assert lines[-1].startswith(f"loading: {last}")
        assert all(" in " not in line for line in lines[:-1])
        assert out.getvalue() == ""

    def test_a_short_phase_says_nothing_unless_it_always_does(self, stream):
        out, lines = stream(False), []
        with Progress("loading", 3, "layers", said=lines.append) as progress:
            progress.update(3)
        assert lines == []
        with Progress("loading", 3, "layers", said=lines.append, always=True) as progress:
            progress.update(3)
            progress.note = "7 tokens/s"
        assert lines == ["loading: 100% (3 of 3 layers) in 0:00, 7 tokens/s"]
        assert out.getvalue() == ""

    def test_a_phase_that_fails_says_no_end(self, stream):
        lines: list[str] = []
        stream(False)
        with pytest.raises(OSError), Progress("loading", said=lines.append, always=True):
            raise OSError
        assert lines == []

    def test_a_bar_on_a_terminal(self, stream):
        out, lines = stream(True), []
        with Progress("loading", 1000, "B", said=lines.append, always=True, poll=lambda: 1000):
            pass
        assert "loading: 100%" in out.getvalue()
        assert "1.00k/1.00k" in out.getvalue()
        assert lines == []

    def test_a_bar_with_a_note_and_one_without_a_count(self, stream, monkeypatch):
        monkeypatch.setattr(console, "BAR_PAUSE", 0.01)
        out = stream(True)
        with Progress("loading", 3, "layers") as progress:
            progress.note = "7 tokens/s"
            progress.update(2)
            self.wait_for(lambda: "7 tokens/s" in out.getvalue())
        assert re.search(r"loading:  67%\|.*\| 2/3 layers \[00:0\d<00:0\d, 7 tokens/s\]", out.getvalue())
        with Progress("the first step"):
            pass
        assert "the first step: 00:00" in out.getvalue()

    def test_what_is_polled_never_goes_back(self, stream):
        stream(False)
        sizes = iter([3, 0])
        with Progress("saving", 4, "B", poll=lambda: next(sizes)) as progress:
            progress._ask()
        assert progress.done == 3

    def test_no_bar_where_none_is_wanted(self, stream):
        out = stream(True)
        console.use_bars(False)
        with Progress("loading", 3, "layers"):
            pass
        assert out.getvalue() == ""

    def test_by_default_the_first_rank_shows(self, stream, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        out = stream(True)
        with Progress("loading", 3, "layers"):
            pass
        assert out.getvalue() == ""
        with Progress("loading", 3, "layers", shown=True):
            pass
        assert "loading" in out.getvalue()
