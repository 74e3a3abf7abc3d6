"""Runs whose checkpoints are in an object store: S3's protocol from a server of this machine, where there is one (pip
install s3fs "moto[server]"), and fsspec's file://, which has the same code of ours and another one of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.kit import runs
from tests.kit.recovery import tiny_run
from titan_hd.checkpoint.object_store import open_url
from titan_hd.errors import UserError

pytest.importorskip("fsspec")


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """Variables by which a process finds a server that speaks S3."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    variables = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", **keys}
    with mock.patch.dict(os.environ, variables):
        yield variables
    server.stop()


def train_with(variables: dict[str, str], argv: list[str], stop_after: int | None = None) -> list[float] | str:
    with mock.patch.dict(os.environ, variables):
        try:
            return runs.train(argv, stop_after)
        except UserError as error:
            return str(error)


@pytest.mark.parametrize("protocol", ["file", "s3"])
def test_a_run_goes_on_from_a_store(workers, tmp_path: Path, request, protocol: str):
    """Bit for bit, on the same mesh; the damage of an object is noticed; nothing of it is in the run's own folder."""
    variables = request.getfixturevalue("s3") if protocol == "s3" else {}
    url = f"s3://bucket/{tmp_path.name}" if protocol == "s3" else f"file://{tmp_path}/store"
    want = workers.run(2, runs.train, tiny_run(tmp_path, "want", training__steps=8, checkpoint__enable="false"))[0]
    argv = tiny_run(tmp_path, "dump", training__steps=8, checkpoint__folder=url)
    if protocol == "s3":
        for said in workers.run(2, train_with, variables, argv):
            assert said == f"{url}: cannot be written: The specified bucket does not exist"
        open_url(url).store.mkdir("bucket")
    losses = workers.run(2, train_with, variables, argv, 4)[0]
    assert losses == want[:4]
    assert workers.run(2, train_with, variables, argv)[0] == want[4:]
    got, reference = runs.exported(tmp_path / "dump"), runs.exported(tmp_path / "want")
    assert all((got[name] == reference[name]).all() for name in reference)
    root = open_url(url)
    assert {name.partition("/")[0] for name in root.sizes()} == {"step-6", "step-8"}, "the two latest"
    assert not (tmp_path / "dump" / "checkpoint").exists()
    assert not list((tmp_path / "dump").glob("s3*"))
    for step in (6, 8):
        with (root / f"step-{step}" / "__0_0.distcp").open("wb") as file:
            file.write(b"x")
    for said in workers.run(2, train_with, variables, argv):
        assert f"{url}/step-6/__0_0.distcp: has 1 bytes, must have " in said
