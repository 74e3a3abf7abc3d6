"""multinode_trainer.slurm with stand-ins for Slurm's programs: the head's address, and what becomes of a status.

`tests/integration/test_slurm.py` runs it on a real Slurm.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.kit.commands import REPOSITORY

# Drops srun's own options, then does what the command would do.
SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do echo "$1" >>"$CALLS/options"; shift; done
case "$1" in
getent) [ -z "$FOUND" ] || echo "$FOUND STREAM node1" ;;
bash)
  if [ "${*: -1}" = "train" ]; then
    echo "$PET_NNODES $PET_RDZV_ENDPOINT $PYTHON" >"$CALLS/run"
    exit "$STATUS"
  fi
  echo /a/python ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$2" = hostnames ]; then printf 'node1\\nnode2\\n'; else echo "$*" >"$CALLS/$1"; fi
"""
HOSTNAME = """#!/usr/bin/env bash
echo "$ADDRESSES"
"""


@pytest.fixture
def script(tmp_path):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**variables: str) -> tuple[int, str, Path]:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(tmp_path),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NAME": "titan_hd",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "64",
            "SLURMD_NODENAME": "node1",
            "FOUND": "10.0.0.5",
            "ADDRESSES": "10.0.0.9 fe80::1",
            "STATUS": "0",
        } | variables
        command = ["bash", str(REPOSITORY / "multinode_trainer.slurm"), "train"]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result.returncode, result.stderr, tmp_path

    return run


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, "10.0.0.5:15012"),
        ({"FOUND": "127.0.1.1"}, "10.0.0.9:15012"),
        ({"FOUND": ""}, "10.0.0.9:15012"),
        ({"FOUND": "", "ADDRESSES": ""}, "127.0.0.1:15012"),
        ({"HEAD_ADDRESS": "ib-node1", "HEAD_PORT": "4000"}, "ib-node1:4000"),
    ],
)
def test_the_head_is_where_the_other_nodes_find_it(variables, endpoint, script):
    status, _, calls = script(**variables)
    assert status == 0
    assert (calls / "run").read_text().split() == ["2", endpoint, "/a/python"]
    assert "--cpus-per-task=64" in (calls / "options").read_text().split()


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_a_job_that_saved_goes_back_into_the_queue(status, requeued, script):
    found, _, calls = script(STATUS=str(status))
    assert found == status
    assert (calls / "requeue").exists() == requeued


def test_the_repository_must_be_known(script, tmp_path):
    status, said, _ = script(SLURM_SUBMIT_DIR=str(tmp_path))
    assert status == 2
    assert said.startswith("titan_hd: error: TITAN_HD_ROOT: no run_train.sh in")
