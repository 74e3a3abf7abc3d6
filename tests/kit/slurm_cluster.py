"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
MinJobAge=300
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=debug Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""


def missing() -> str:
    """Why this machine cannot have such a cluster, or ""."""
    absent = [name for name in PROGRAMS if not find(name)]
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


class SlurmCluster:
    """Starts with the constructor; `close` ends what it started, by its pid files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir()
        controller, first, second = _free_ports(3)
        text = _CONF.format(host=socket.gethostname(), folder=folder, controller=controller, first=first, second=second)
        (folder / "slurm.conf").write_text(text)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
        self._run("munged", "--force", *paths)
        self._run("slurmctld")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_until_idle()

    def __call__(self, program: str, *arguments: str, **environment: str) -> str:
        """Run a command of Slurm's; its output."""
        return self._run(program, *arguments, **environment).strip()

    def _run(self, program: str, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [find(program) or program, *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"
        return done.stdout

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-N", node)

    def wait_until_idle(self) -> None:
        self.wait(lambda: self("sinfo", "-h", "-o", "%D %t") == "2 idle", 30, "the nodes to be idle")

    def lose_node(self, node: str) -> None:
        """Its power: slurmd, what steps of a job it has, and their processes end at once, and can tell nobody."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        tasks = [pid for pid in _processes() if f"SLURMD_NODENAME={node}" in _words(pid, "environ")]
        steps = {_parent(pid) for pid in tasks}
        os.kill(daemon, signal.SIGKILL)
        for pid in [*(pid for pid in steps if _words(pid, "cmdline")[0].startswith("slurmstepd")), *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        return dict(word.partition("=")[::2] for word in self("scontrol", "show", "job", number, "-o").split())

    def wait(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
            time.sleep(0.2)

    def close(self) -> None:
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                with contextlib.suppress(ProcessLookupError):  # a node that is lost
                    os.kill(int(path.read_text()), signal.SIGTERM)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _words(pid: int, what: str) -> list[str]:
    """Of a process' command line or environment; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
