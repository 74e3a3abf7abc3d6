"""Trains tiny runs with the code of two revisions and compares every loss bit for bit: a change is one of form alone.

    python tools/same_losses.py OLD NEW [--methods lora,pissa] [--steps 10] [--section.key value ...]
    python tools/same_losses.py main . --methods hdpissa,lora --training.mixed_precision_param bfloat16

OLD and NEW are revisions of git; "." is the working tree as it stands. Each method trains for ten steps on two CPU
workers in fp32, from random weights of odd shapes. Losses, norms of the gradients and the exported weights must be
equal. A method is written as for tools/compare_methods.py ("hdpissa+num_adapters=4"); further keys go to every run. The
revisions are driven by the command line and by the files that a run leaves, so that all else may differ between them.

Exit status: 0 everything is equal, 1 something differs, 2 a run failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare.arms import parse_methods
from safetensors.numpy import load_file

from tests.kit import runs
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.errors import UserError

_REPOSITORY = Path(__file__).resolve().parent.parent
_WORKERS = 2
# HD-PiSSA with fewer logical adapters than workers, as many (by both routes of the exchange), and more.
_METHODS = (
    "hdpissa+num_adapters=1,hdpissa+num_adapters=2,hdpissa+num_adapters=2+exchange=dense,hdpissa+num_adapters=4,"
    "lora,pissa,full"
)


class Trained(NamedTuple):
    """What a run left: (loss, norm of the gradients) of every step, and a hash of the exported weights."""

    steps: list[tuple[float, float]]
    weights: str


def first_difference(old: Trained, new: Trained) -> str:
    """Where two runs part: "step 3", "weights" (exported, after equal steps), or "" if nowhere. NaN equals NaN."""
    for step, (a, b) in enumerate(zip(old.steps, new.steps), 1):
        if repr(a) != repr(b):
            return f"step {step}"
    if len(old.steps) != len(new.steps):
        return f"step {min(len(old.steps), len(new.steps)) + 1}"
    return "" if old.weights == new.weights else "weights"


def read_run(folder: Path) -> Trained:
    """The steps of a finished run with [export] enable, from its dump folder; other records, as of a validation, say
    nothing of them."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    digest = hashlib.sha256()
    for path in sorted((folder / "hf").glob("*.safetensors")):
        for name, weight in sorted(load_file(path).items()):
            digest.update(f"{name} {weight.dtype} {weight.shape}".encode() + weight.tobytes())
    return Trained([(r["loss"], r["grad_norm"]) for r in records if "loss" in r], digest.hexdigest())


def checked_out(revision: str, folder: Path) -> Path:
    """The tree of a revision: the working tree for ".", else a copy in `folder`."""
    if revision == ".":
        return _REPOSITORY
    archive = subprocess.run(["git", "archive", revision], cwd=_REPOSITORY, capture_output=True, check=False)
    if archive.returncode:
        raise UserError(f"{revision}: {archive.stderr.decode().strip()}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def train(tree: Path, options: list[str], dump: Path) -> Trained:
    """One run with the code of `tree`; UserError with the end of what it said if it fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(dump.parent),
    }
    launch = ["-m", "titan_hd.launch", "--nproc_per_node", str(_WORKERS), "--rdzv_backend=c10d"]
    result = subprocess.run(
        [sys.executable, *launch, "--rdzv_endpoint=localhost:0", "--", *options, f"--job.dump_folder={dump}"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(f"{dump.name}: status {result.returncode}\n{result.stderr[-3000:]}")
    return read_run(dump)


def import_path(tree: Path) -> Path:
    """The folder whose titan_hd the runs of `tree` import: an installed one must not come before it."""
    command = [sys.executable, "-c", "import titan_hd; print(titan_hd.__path__[0])"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return Path(subprocess.run(command, cwd=tree, env=environment, stdout=-1, text=True, check=True).stdout.strip())


def compare(revisions: tuple[str, str], methods: str, steps: int, extra: list[str]) -> bool:
    """Train, print one line for each method; True if all are equal."""
    equal = True
    with tempfile.TemporaryDirectory(prefix="same_losses_") as name:
        folder = Path(name)
        trees = [checked_out(revision, folder / f"tree{i}") for i, revision in enumerate(revisions)]
        for tree in trees:
            assert import_path(tree) == tree / "titan_hd", f"runs of {tree} would import {import_path(tree)}"
        runs.write_model(folder / "model")
        runs.write_records(folder / "records.jsonl", count=64)
        common = runs.options(
            folder / "model",
            folder / "records.jsonl",
            folder,
            training__steps=steps,
            training__global_batch_size=8,
            training__max_norm=1.0,
            optimizer__weight_decay=0.01,
            lr_scheduler__decay_type="cosine",
        )
        print(f"{'method':44} {'steps':>5}  equal  first difference")
        for method, changes in parse_methods(methods).items():
            options = [*common, *(f"--{key}={value}" for key, value in changes.items()), *extra]
            old, new = (train(tree, options, folder / f"{method}-{i}") for i, tree in enumerate(trees))
            difference = first_difference(old, new)
            equal = equal and not difference
            print(f"{method:44} {len(new.steps):5}  {'no ' if difference else 'yes'}    {difference}", flush=True)
    return equal


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("old", help="a revision of git")
    parser.add_argument("new", help='another one, or "." for the working tree')
    parser.add_argument("--methods", default=_METHODS, help="with commas between them; default: HD-PiSSA's and others")
    parser.add_argument("--steps", type=int, default=10, help="of each run; default: 10")
    arguments, extra = parser.parse_with_run_options()
    try:
        equal = compare((arguments.old, arguments.new), arguments.methods, arguments.steps, extra)
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    raise SystemExit(not equal)


if __name__ == "__main__":
    main()
