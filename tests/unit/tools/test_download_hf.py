"""tools/download_hf.py against a hub of one page: the same requests, redirects left out, on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.kit.commands import REPOSITORY

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOOLS = "additional_chat_templates/tool_use.jinja"
MODEL = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    TOOLS: b"with tools",
    "additional_chat_templates/rag.jinja": b"with documents",
    "README.md": b"# no",
    "modeling_custom.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.safetensors": b"another form",
}
REPOSITORIES = {
    "models/org/model": MODEL,
    "models/org/gated": MODEL,
    "models/org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "datasets/org/data": {
        "train.jsonl": b'{"text": "a"}\n',
        "x/a.parquet": b"P",
        "dev.tsv": b"text\tlabel\n",
        "more.ndjson.zst": b"Z",
        "dataset_infos.json": b"{}",
        "load.py": b"raise SystemExit",
    },
}
ERRORS = {"models/org/gated": (403, "GatedRepo"), "models/org/private": (401, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """The four requests that a download makes; the transfer of the files in `broken` stops half-way."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.seen.append((path, self.headers.get("Authorization"), body))
        if not path.startswith("api/"):
            self.answer_file(path, body)
            return
        repo = "/".join(path.split("/")[1:4])
        if repo in ERRORS and self.headers.get("Authorization") != "Bearer accepted":
            status, code = ERRORS[repo]
            self.send(status, b'{"error": "no"}', {"X-Error-Code": code})
        elif repo not in REPOSITORIES:
            self.send(404, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", COMMIT):
            self.send(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            files = REPOSITORIES[repo]
            if "/tree/" in path:
                listing = [{"type": "file", "path": n, "size": len(b), "oid": oid(b)} for n, b in files.items()]
            else:
                siblings = [{"rfilename": n, "size": len(b), "blobId": oid(b)} for n, b in files.items()]
                listing = {"id": "/".join(repo.split("/")[1:]), "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(listing).encode(), {})

    def answer_file(self, path: str, body: bool) -> None:
        repo, _, name = path.partition(f"/resolve/{COMMIT}/")
        data = REPOSITORIES[repo if repo.startswith("datasets/") else f"models/{repo}"][name]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(data)}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        status = 206 if start else 200
        if body and name in self.server.broken:
            self.send(status, data[start:], headers, keep=len(data) // 2)
        else:
            self.send(status, data[start:], headers, keep=None if body else 0)

    def send(self, status: int, data: bytes, headers: dict[str, str], keep: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[:keep])
        self.close_connection = True

    def log_message(self, *args) -> None:
        pass


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.broken = [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, folder: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    """The tool in a folder of its own, with nothing of this machine's login."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "download_hf.py"), *argv],
        cwd=folder,
        env={**kept, "HF_ENDPOINT": address, **home, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".cache")}


def test_model(hub, tmp_path: Path):
    """Everything that is read and nothing else; the second time no file is fetched."""
    done = run(hub, tmp_path, "--repo", "org/model")
    assert done.returncode == 0, done.stderr
    assert "assets/hf/model: set model.hf_assets_path to it" in done.stdout
    wanted = {n: b for n, b in MODEL.items() if n.endswith((".json", ".safetensors")) and "consol" not in n}
    wanted.pop("onnx/model.safetensors")
    wanted[TOOLS] = MODEL[TOOLS]
    assert files(tmp_path / "assets/hf/model") == wanted
    hub.seen.clear()
    assert run(hub, tmp_path, "--repo", "org/model").returncode == 0
    assert not [path for path, _, body in hub.seen if body and "/resolve/" in path]


def test_assets_and_folder(hub, tmp_path: Path):
    done = run(hub, tmp_path, "--repo", "org/model", "--assets", "tokenizer", "--folder", "here")
    assert done.returncode == 0, done.stderr
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", TOOLS}
    assert files(tmp_path / "here").keys() == names


def test_dataset(hub, tmp_path: Path):
    done = run(hub, tmp_path, "--repo", "org/data", "--repo-type", "dataset", "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "assets/data/data").keys() == {"train.jsonl", "x/a.parquet", "dev.tsv", "more.ndjson.zst"}
    assert "assets/data/data/train.jsonl: set data.train to it" in done.stdout


@pytest.mark.parametrize("variables", [{"HF_TOKEN": "accepted"}, {}])
def test_token(hub, tmp_path: Path, variables: dict):
    argv = [] if variables else ["--token", "accepted"]
    done = run(hub, tmp_path, "--repo", "org/gated", *argv, **variables)
    assert done.returncode == 0, done.stderr
    assert {(p, token) for p, token, _ in hub.seen if "org/gated" in p and token != "Bearer accepted"} == set()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--repo", "org/gated"], "org/gated is gated: accept its licence on http"),
        (["--repo", "org/private"], "has no model org/private that you may read; check the name, and pass a token"),
        (["--repo", "org/nothing"], "has no model org/nothing that you may read; check the name"),
        (["--repo", "a/b/c"], "--repo: must be owner/name, not 'a/b/c'"),
        (["--repo", "org/model", "--revision", "v9"], "--revision: org/model has no v9"),
        (["--repo", "org/pickled"], "org/pickled has no weights as safetensors"),
        (["--repo", "org/pickled", "--assets", "tokenizer"], "org/pickled has no tokenizer of a kind that is read"),
    ],
)
def test_refused_in_one_line(hub, tmp_path: Path, argv: list[str], line: str):
    done = run(hub, tmp_path, *argv)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "assets").exists()


@pytest.mark.parametrize("there", [False, True])
def test_no_connection(hub, tmp_path: Path, there: bool):
    """Also where the folder holds something already: the hub's library would take that for the download."""
    if there:
        (tmp_path / "assets/hf/model").mkdir(parents=True)
        (tmp_path / "assets/hf/model/config.json").write_text("{}")
    for variables in ({"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}):
        done = run(hub, tmp_path, "--repo", "org/model", **variables)
        assert done.returncode == 2
        assert "org/model: no connection" in done.stderr
        assert done.stderr.count("\n") == 1


def test_goes_on_after_an_interruption(hub, tmp_path: Path):
    """A transfer that breaks off is told; the next one takes up what is missing, and no file that was complete."""
    hub.broken.add("model-00002-of-00002.safetensors")
    done = run(hub, tmp_path, "--repo", "org/model")
    assert done.returncode == 2, done.stderr
    assert "the same command goes on" in done.stderr.splitlines()[-1]
    hub.broken.clear()
    hub.seen.clear()
    assert run(hub, tmp_path, "--repo", "org/model").returncode == 0
    assert files(tmp_path / "assets/hf/model")["model-00002-of-00002.safetensors"] == b"second" * 1000
    fetched = {path.rsplit("/", 1)[1] for path, _, body in hub.seen if body and "/resolve/" in path}
    assert "model-00002-of-00002.safetensors" in fetched
    assert "config.json" not in fetched


def test_progress_counts_whole_files_and_parts(tmp_path: Path):
    """Of the files that are wanted; the hub's library writes parts below .cache."""
    import hub

    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (tmp_path / "a.json").write_bytes(bytes(5))
    (tmp_path / "other").write_bytes(bytes(100))
    (tmp_path / ".cache/huggingface/download/x.etag.incomplete").write_bytes(bytes(7))
    (tmp_path / ".cache/huggingface/download/x.lock").write_bytes(bytes(9))
    assert hub._fetched(tmp_path, ["a.json", "b.json"]) == 12
