"""Run a program that nobody has read, with tests, without harm to this machine and without trust in what it says.

`Sandbox().run(...)` gives a `Verdict`. docs/evaluation.md tells users what the program is kept from and what remains;
`supervisor.py` tells how a run goes, `confinement.py` holds the system calls, `wire.py` the calls into the program.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from titan_hd.errors import UserError

logger = logging.getLogger(__name__)

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
_START = (
    f"import sys; sys.path.insert(0, {_PACKAGE_PARENT!r}); from titan_hd.evaluation.supervisor import main; "
    "sys.path.pop(0); main()"
)
_GRACE = 10.0  # seconds beyond the wall clock, after which the supervisor itself is at fault


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: of processor time, whole, for each process; it does not depend on how busy the machine is.
    wall_seconds: from the start to the verdict, for all together.
    memory: bytes of address space of each process.
    processes: processes and threads at the same time. Before Linux 5.14, and unsandboxed, the user's other processes
        count, too; where the evaluation is root in a container that has no other user, there is no such limit.
    disk_bytes, file_bytes: all files together, and the largest. Files lie in memory.
    open_files: file descriptors of each process.
    """

    seconds: float = 10.0
    wall_seconds: float = 60.0
    memory: int = 2**29
    processes: int = 8
    disk_bytes: int = 16 * 2**20
    file_bytes: int = 8 * 2**20
    open_files: int = 64


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    result: "passed"; "failed" (an assertion), "error" (an exception), "timeout", "died" (its process ended or fell out
        with the tests).
    detail: one line, for people.
    """

    result: str
    detail: str

    @property
    def passed(self) -> bool:
        return self.result == "passed"


class Sandbox:
    """Where programs run.

    allow_unsandboxed: where the kernel refuses to shut a program in, run it all the same, with limits alone: it can
        then read and write what this user can, and use the network. That is said with a warning.

    Raises:
        UserError: the kernel refuses, and `allow_unsandboxed` is False.
    """

    def __init__(self, limits: Limits | None = None, allow_unsandboxed: bool = False):
        self.limits = limits or Limits()
        self.confined = True
        if refusal := self._start({"program": "", "tests": "", "prelude": "", "names": []}).get("refused"):
            if not allow_unsandboxed:
                raise UserError(
                    f"generated programs cannot be shut in here: {refusal}; they could read your files and use the "
                    "network. Run on a machine that allows user namespaces, or give --allow-unsandboxed"
                )
            logger.warning(
                "GENERATED PROGRAMS RUN UNSANDBOXED, as this user, with its files and the network: %s", refusal
            )
            self.confined = False

    def run(self, program: str, tests: str, names: Sequence[str], prelude: str = "") -> Verdict:
        """Run `program`, then `tests` against it.

        names: the functions and classes of the program that the tests use. They take and return plain values (numbers,
            texts, containers); an object of another class the tests can call, iterate and ask for attributes.
        prelude: trusted source that runs in the tests' namespace before them (imports, helpers).
        """
        answer = self._start({"program": program, "tests": tests, "prelude": prelude, "names": list(names)})
        if "refused" in answer:
            raise UserError(f"a program could not be started: {answer['refused']}")
        return Verdict(answer["result"], answer["detail"])

    def _start(self, job: dict) -> dict[str, str]:
        if sys.platform != "linux":
            return {"refused": "this is not Linux"}
        config = json.dumps({**asdict(self.limits), "confined": self.confined})
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # Python's own
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", _START, config],
            input=json.dumps(job).encode(),
            capture_output=True,
            env=environment,
            cwd="/",
            start_new_session=True,
            timeout=self.limits.wall_seconds + _GRACE,
        )
        try:
            return json.loads(process.stdout)
        except ValueError:
            error = process.stderr.decode(errors="replace").strip()[-500:]
            raise RuntimeError(f"the supervisor of a program ended with status {process.returncode}: {error}") from None
