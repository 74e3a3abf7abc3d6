"""The processes of one confined run. `python -c "... supervisor.main()" CONFIG < JOB` writes a verdict to stdout.

    evaluation ── supervisor ── tests (number 1 of its pid namespace) ── program ── whatever it starts

1. The supervisor starts a process that makes new namespaces and forks the tests' process inside them. The supervisor
   says which users there are, and holds the clock.
2. The tests' process builds the empty root, and forks the program's process before it has read the job. The program's
   process thus never held the tests, and has no file descriptor but the connection.
3. The tests' process reads the job, sends the program over the connection, and runs the tests in a new namespace; they
   call the program through `wire.py`.
4. It writes its verdict to a pipe that the program's process does not have, and ends. With number 1 the kernel kills
   everything in the pid namespace. The supervisor waits until all are gone.

What the program can do to the tests' process: nothing. It has neither the right to trace it nor a name for its files,
and the kernel ignores signals that number 1 gets from inside. It can end itself or fall silent; then the tests fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from typing import Any

from titan_hd.evaluation import confinement, wire

_LONGEST_VERDICT = 65536  # bytes


def main() -> None:
    """Read the configuration from the command line, hand the job through, print the verdict as JSON."""
    config = json.loads(sys.argv[1])
    os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, these processes go first
    deadline = time.monotonic() + config["wall_seconds"]
    folder = None
    try:
        confinement.die_with_parent()
        confinement.adopt_orphans()
        verdict_reader, verdict_writer = os.pipe()
        if config["confined"]:
            first = _start_confined(verdict_writer, config, deadline)
        else:
            folder = tempfile.mkdtemp(prefix="titan_hd_program_")
            first = _start_bare(verdict_writer, config, folder)
        os.close(verdict_writer)
        verdict = _read_verdict(verdict_reader, deadline)
        _end_all(first)
    except (OSError, AttributeError) as error:
        verdict = {"refused": _text(error)}
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(verdict))


def _start_confined(verdict_writer: int, config: dict[str, Any], deadline: float) -> int:
    """Start the tests' process in new namespaces, and return its number out here.

    Raises:
        OSError: the kernel refuses namespaces.
    """
    ours, theirs = socket.socketpair()
    maker = os.fork()
    if maker == 0:
        _make_namespaces(ours, theirs, verdict_writer, config)
    theirs.close()
    ours.settimeout(max(0.1, deadline - time.monotonic()))
    answer = wire.receive(ours)
    if answer is not None:
        os.waitpid(maker, 0)
        raise OSError(0, f"the kernel refuses namespaces: {answer}")
    become_nobody = confinement.map_users(maker)
    wire.send(ours, None)
    first = wire.receive(ours)
    os.waitpid(maker, 0)  # from here on this process is the parent of the tests' process
    wire.send(ours, become_nobody)
    ours.close()
    return first


def _make_namespaces(ours: socket.socket, theirs: socket.socket, verdict_writer: int, config: dict[str, Any]) -> None:
    """A short-lived process: new namespaces, then a child, for only a child is in the new pid namespace."""
    ours.close()
    try:
        confinement.unshare_everything()
    except OSError as error:
        wire.send(theirs, _text(error))
        os._exit(1)
    wire.send(theirs, None)
    wire.receive(theirs)  # the users are there
    child = os.fork()
    if child:
        wire.send(theirs, child)
        os._exit(0)
    become_nobody = wire.receive(theirs)
    theirs.close()
    _judge(verdict_writer, config, become_nobody, None)


def _start_bare(verdict_writer: int, config: dict[str, Any], folder: str) -> int:
    first = os.fork()
    if first == 0:
        _judge(verdict_writer, config, False, folder)
    return first


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _read_verdict(reader: int, deadline: float) -> dict[str, Any]:
    """What the tests' process says, until it ends or time is up."""
    data = b""
    while len(data) < _LONGEST_VERDICT:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return {"result": "timeout", "detail": "the wall clock"}
        piece = os.read(reader, 4096)
        if not piece:
            break
        data += piece
    try:
        return json.loads(data)
    except ValueError:
        return {"result": "died", "detail": "the process of the tests ended: too much memory or time"}


def _end_all(first: int) -> None:
    """Kill the tests' process and whatever descends from it; return when none is left.

    With a pid namespace the kernel has killed all others before number 1 is gone. Without one, orphans have become
    children of this process, until there are none.
    """
    targets = {first}
    while True:
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG if targets else 0)[0]:
                pass
        except ChildProcessError:
            return
        targets = _children()
        time.sleep(0.002)


def _children() -> set[int]:
    """The children of this process."""
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                if parent == os.getpid():
                    found.add(int(name))
    return found


# ---- the tests' process ----------------------------------------------------------------------------------------------


def _judge(verdict_writer: int, config: dict[str, Any], become_nobody: bool, folder: str | None) -> None:
    """The tests' process from its first line to its last."""
    try:
        verdict = _verdict(verdict_writer, config, become_nobody, folder)
    except OSError as error:
        verdict = {"refused": _text(error)}
    except BaseException as error:
        verdict = {"result": "died", "detail": f"the process of the tests: {type(error).__name__}: {error}"[:300]}
    with contextlib.suppress(BaseException):
        os.write(verdict_writer, json.dumps(verdict).encode())
    os._exit(0)


def _verdict(verdict_writer: int, config: dict[str, Any], become_nobody: bool, folder: str | None) -> dict[str, Any]:
    confinement.die_with_parent()
    if folder is None:
        socket.sethostname("sandbox")
        confinement.enter_empty_root(config["disk_bytes"])
    else:
        os.chdir(folder)
    confinement.set_limits(config["seconds"], config["memory"], config["file_bytes"], config["open_files"])
    connection, far_end = socket.socketpair()
    program = os.fork()
    if program == 0:
        _be_the_program(far_end, config, become_nobody)
    far_end.close()
    confinement.hide_memory()
    with open(0, "rb") as file:
        job = json.loads(file.read())
    return _run_tests(wire.Caller(connection), program, job)


def _be_the_program(connection: socket.socket, config: dict[str, Any], become_nobody: bool) -> None:
    """The program's process: nothing open but the connection, no rights, then whatever the program does."""
    try:
        os.setsid()
        for standard in (0, 1, 2):
            os.dup2(os.open("/dev/null", os.O_RDWR), standard)
        kept = os.dup2(connection.fileno(), 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        confinement.limit_processes(config["processes"])
        if config["confined"]:
            confinement.drop_privileges(become_nobody)
        wire.serve(socket.socket(fileno=kept))
    finally:
        os._exit(0)


def _run_tests(caller: wire.Caller, program: int, job: dict[str, Any]) -> dict[str, Any]:
    """Send the program, run the tests. All that they take from the program are plain values."""
    try:
        caller.ask("run", job["program"])
        names = {"__name__": "tests", **{name: caller.named(name) for name in job["names"]}}
        exec(compile(job["prelude"], "<prelude>", "exec"), prelude := {"__name__": "tests"})
        exec(compile(job["tests"], "<tests>", "exec"), {**prelude, **names})
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return _how_it_ended(program)
    except AssertionError as error:
        return {"result": "failed", "detail": _failing_line(error, job["tests"])}
    except Exception as error:
        return {"result": "error", "detail": f"{type(error).__name__}: {error}"[:300]}
    return {"result": "passed", "detail": ""}


def _how_it_ended(program: int) -> dict[str, Any]:
    """The program's process closed its connection."""
    pid, status, until = 0, 0, time.monotonic() + 0.1
    while pid == 0 and time.monotonic() < until:  # a process that is ending closes its files first
        time.sleep(0.002)
        pid, status = os.waitpid(program, os.WNOHANG)
    if pid == 0:
        return {"result": "died", "detail": "the program closed its connection"}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return {"result": "timeout", "detail": "killed: processor time, or the machine's memory"}
        return {"result": "died", "detail": f"the program ended by {signal.Signals(number).name}"}
    return {"result": "died", "detail": f"the program ended with status {os.WEXITSTATUS(status)} before the tests had"}


def _failing_line(error: BaseException, source: str) -> str:
    """The line of the tests that failed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    text = source.splitlines()[(lines[-1] or 1) - 1].strip() if lines else ""
    return f"{text} {error}".strip()[:300]
