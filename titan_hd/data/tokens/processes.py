"""Processes that encode chunks of records.

They are helpers (`titan_hd.data.helper_process`, which says why not `multiprocessing`), so that none of them imports
torch. A process is sent an Encoder once and then chunk after chunk, each answered before the next comes, so that
neither side ever waits for the other to read.

    python -m titan_hd.data.tokens.processes FD      what a process runs
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

from titan_hd.data.helper_process import HelperProcess
from titan_hd.data.sources import RawRecord
from titan_hd.data.tokens.encoding import Chunk, Encoder
from titan_hd.errors import UserError

AHEAD = 8  # chunks for each process that may wait for an earlier one
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class TokenProcesses:
    """Some processes that share the chunks of one source; close them when done."""

    def __init__(self, encoder: Encoder, count: int):
        self._helpers: dict[Connection, HelperProcess] = {}
        try:
            for _ in range(count):
                helper = HelperProcess("titan_hd.data.tokens.processes", environment=_ONE_THREAD)
                self._helpers[helper.connection] = helper
                helper.connection.send(encoder)
        except OSError as error:  # no more processes, memory or open files; or it ended at once
            started = len(self._helpers)
            self.close()
            raise UserError(
                f"data.num_proc: cannot start {count} tokenizing processes ({started} are running): "
                f"{error.strerror or error}; set a smaller number"
            ) from None

    def encode(self, chunks: Iterator[list[RawRecord]]) -> Iterator[Chunk]:
        """The chunks encoded, in their order, whoever is quicker.

        Raises:
            UserError: reading a chunk raised it, after all before it are given; or a process has ended.
        """
        idle = list(self._helpers)
        busy: dict[Connection, int] = {}  # the number of the chunk that each encodes
        done: dict[int, Chunk] = {}  # encoded, but not given yet
        sent = given = 0
        more, error = True, None
        while True:
            while idle and more and sent - given < AHEAD * len(self._helpers):
                try:
                    chunk = next(chunks, None)
                except UserError as caught:
                    chunk, error = None, caught
                if chunk is None:
                    more = False
                    break
                connection = idle.pop()
                self._send(connection, chunk)
                busy[connection], sent = sent, sent + 1
            if given == sent and not more:
                break
            ready = wait(list(busy))
            for connection in [connection for connection in busy if connection in ready]:
                done[busy.pop(connection)] = self._receive(connection)
                idle.append(connection)
            while given in done:
                yield done.pop(given)
                given += 1
        if error:
            raise error

    def _send(self, connection: Connection, chunk: list[RawRecord]) -> None:
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
        status = self._helpers[connection].status()
        reason = f"signal {-status} (was memory short?)" if status < 0 else f"status {status}"
        return UserError(f"data.num_proc: a tokenizing process ended with {reason}; fewer of them need less memory")

    def close(self) -> None:
        for helper in self._helpers.values():
            helper.close()

    def __enter__(self) -> TokenProcesses:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        encoder: Encoder = connection.recv()
        while True:
            connection.send(encoder.chunk(connection.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except BaseException:
        connection.send(traceback.format_exc())


if __name__ == "__main__":
    main()
