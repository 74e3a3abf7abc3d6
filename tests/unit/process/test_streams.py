"""What stands behind the standard streams may break: nothing ends by that."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from tests.kit.commands import REPOSITORY
from titan_hd.process.streams import SteadyStream, keep_streams


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_dropped():
    stream = SteadyStream(Full())
    print("lost", file=stream, flush=True)
    stream.flush()


def test_the_rest_is_the_streams_own():
    stream = SteadyStream(whole := io.StringIO())
    print("said", file=stream)
    assert whole.getvalue() == "said\n"
    assert stream.isatty() is False
    assert stream.getvalue() == "said\n"


def test_streams_are_wrapped_once(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    keep_streams()
    first = sys.stderr
    keep_streams()
    assert sys.stderr is first
    assert isinstance(first, SteadyStream)


def run(shell: str, code: str) -> subprocess.CompletedProcess:
    code = f"from titan_hd.process.streams import keep_streams\nkeep_streams()\nimport os, sys, subprocess\n{code}"
    words = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(words, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": ""}, check=False, timeout=60)


@pytest.mark.parametrize("shell", [">/dev/full 2>/dev/full", "| true"])
def test_the_exit_status_tells_of_the_run_and_not_of_its_log(shell: str):
    """At its end the interpreter flushes, and would make it 120."""
    code = "print('x' * 100000)\nprint('y', file=sys.stderr)\nraise SystemExit(75)"
    assert run(f'{shell}; exit "${{PIPESTATUS[0]}}"', code).returncode == 75


def test_the_number_of_a_closed_stream_is_given_to_no_file(tmp_path):
    """Otherwise what a library writes on standard error ends up in a checkpoint."""
    path = tmp_path / "record"
    code = f"""
file = open({str(path)!r}, "w")
assert file.fileno() > 2
print("for nobody", file=sys.stderr)
os.write(2, b"of a library")
raise SystemExit(subprocess.call("echo of a child >&2", shell=True))
"""
    assert run("<&- >&- 2>&-", code).returncode == 0
    assert path.read_text() == ""
