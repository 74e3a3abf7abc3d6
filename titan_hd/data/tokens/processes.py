"""Processes that encode chunks of records.

They are started as programs and not forked: a training worker has threads and perhaps a GPU open, and a fresh process
imports no torch. A process is sent a `Task` once and then chunk after chunk, each answered before the next comes, so
that neither side ever waits for the other to read. It ends when its connection does, also if its starter was killed.

    python -m titan_hd.data.tokens.processes FD      what a process runs, with the number of its connection
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from titan_hd.config.job_config import Data
from titan_hd.data.formats import build_format
from titan_hd.data.sources import Raw, Record
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.tokens.encoding import Chunk, Encoder
from titan_hd.errors import UserError

AHEAD = 8  # chunks for each process that may wait for an earlier one


@dataclass(frozen=True)
class Task:
    """What tells a process how records are encoded."""

    name: str
    config: Data
    format: str
    first: Record
    vocab_size: int
    seq_len: int
    keep_questions: bool
    tokenizer: str  # its directory

    def encoder(self) -> Encoder:
        format = build_format(
            self.config, self.format, self.first, self.vocab_size, lambda: load_tokenizer(self.tokenizer)
        )
        stop = self.config.on_error == "raise"
        return Encoder(self.name, self.format, format, self.seq_len, self.keep_questions, stop)


class TokenProcesses:
    """Some processes that share the chunks of one task; close them when done."""

    def __init__(self, task: Task, count: int):
        self._programs: dict[Connection, subprocess.Popen] = {}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        try:
            for _ in range(count):
                self._start(task, environment)
        except OSError as error:  # no more processes, memory or open files; or it ended at once
            started = len(self._programs)
            self.close()
            raise UserError(
                f"data.num_proc: cannot start {count} tokenizing processes ({started} are running): "
                f"{error.strerror or error}; set a smaller number"
            ) from None

    def _start(self, task: Task, environment: dict[str, str]) -> None:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "titan_hd.data.tokens.processes", str(theirs.fileno())]
            program = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        self._programs[ours] = program
        ours.send(task)

    def encode(self, chunks: Iterator[list[Raw]]) -> Iterator[Chunk]:
        """The chunks encoded, in their order, whoever is quicker.

        Raises:
            UserError: reading a chunk raised it, after all before it are given; or a process has ended.
        """
        idle, busy, done = list(self._programs), {}, {}
        sent = given = 0
        error: UserError | None = None
        while True:
            while idle and chunks is not None and sent - given < AHEAD * len(self._programs):
                try:
                    chunk = next(chunks, None)
                except UserError as caught:
                    chunk, error = None, caught
                if chunk is None:
                    chunks = None
                    break
                connection = idle.pop()
                self._send(connection, chunk)
                busy[connection], sent = sent, sent + 1
            if given == sent and chunks is None:
                break
            for connection in wait(list(busy)):
                done[busy.pop(connection)] = self._receive(connection)
                idle.append(connection)
            while given in done:
                yield done.pop(given)
                given += 1
        if error:
            raise error

    def _send(self, connection: Connection, chunk: list[Raw]) -> None:
        try:
            connection.send(chunk)
        except OSError:
            raise self._ended(connection) from None

    def _receive(self, connection: Connection) -> Chunk:
        try:
            answer = connection.recv()
        except (EOFError, OSError):
            raise self._ended(connection) from None
        if isinstance(answer, str):
            raise RuntimeError(f"a tokenizing process failed:\n{answer}")
        return answer

    def _ended(self, connection: Connection) -> UserError:
        status = self._programs[connection].wait()
        reason = f"signal {-status} (was memory short?)" if status < 0 else f"status {status}"
        return UserError(f"data.num_proc: a tokenizing process ended with {reason}; fewer of them need less memory")

    def close(self) -> None:
        for connection, program in self._programs.items():
            connection.close()
            program.wait()

    def __enter__(self) -> TokenProcesses:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        encoder = connection.recv().encoder()
        while True:
            connection.send(encoder.chunk(connection.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except BaseException:
        connection.send(traceback.format_exc())


if __name__ == "__main__":
    main()
