"""Batches shared out between processes: the file of one process, whatever their number; here they are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import evaluation_workers
import pytest
import torch.distributed as dist
from evaluation_workers import ShardedWorkers, Workers

from titan_hd.errors import UserError
from titan_hd.evaluation.answering import answer
from titan_hd.evaluation.backends import Request
from titan_hd.evaluation.prompts import Prompt, batches, several
from titan_hd.evaluation.task import Problem
from titan_hd.evaluation.tasks import TASKS


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Echo:
    """Answers with the prompt, slowly for the longest; keeps what it is asked."""

    def __init__(self, fails_at: int = -1):
        self.asked: list[int] = []
        self.settings: list[tuple[int, int]] = []
        self._fails_at = fails_at

    def generate(self, prompts, request):
        if len(self.asked) == self._fails_at:
            raise KeyboardInterrupt
        self.asked.append(len(prompts))
        self.settings.append((request.max_new_tokens, request.beams))
        time.sleep(0.01 if any(len(prompt) > 20 for prompt in prompts) else 0)
        return prompts


def prompts(task: str, count: int) -> list[Prompt]:
    texts = [f"{'x' * (i % 7)}The answer is: {i}" for i in range(count)]
    return [Prompt(TASKS[task], Problem(str(i), "", "3"), text, list(map(ord, text))) for i, text in enumerate(texts)]


PLAN = [
    batch
    for task, count in (("gsm8k", 11), ("boolq", 3), ("piqa", 5))
    for batch in batches(several(prompts(task, count), 2), 4)
]
SIZES = [len(batch) for batch in PLAN]


def together(size: int, work: Callable[[int, dist.Store], object]) -> list:
    """What `work` returns, or raises, in each of so many threads."""
    store, found = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, store)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    return found


def evaluate(folder: Path, kind: type[Workers], size: int) -> tuple[list[Echo], list[list]]:
    folder.mkdir(exist_ok=True)
    backends = [Echo() for _ in range(size)]
    progress = together(
        size,
        lambda rank, store: list(answer(folder, PLAN, backends[rank], Letters(), crew=kind(store, rank, size))),
    )
    return backends, progress


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("alone")
    list(answer(folder, PLAN, Echo(), Letters()))
    return (folder / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [Workers, ShardedWorkers])
def test_any_number_of_processes_writes_the_same_file(kind: type[Workers], size: int, alone: bytes, tmp_path: Path):
    backends, progress = evaluate(tmp_path, kind, size)
    assert (tmp_path / "samples.jsonl").read_bytes() == alone
    assert sorted(count for backend in backends for count in backend.asked if count) == sorted(SIZES)
    assert progress[1:] == [[]] * (size - 1)
    last = progress[0][-1]
    assert (last.task, last.done, last.total, last.tokens) == ("piqa", 10, 10, sum(len(p.ids) for b in PLAN for p in b))


@pytest.mark.parametrize("kind", [Workers, ShardedWorkers])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_was_killed_goes_on_with_another_number(kind: type[Workers], size: int, alone: bytes, tmp_path: Path):
    lines = alone.splitlines(keepends=True)
    kept = sum(SIZES[:2])
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[: kept + 1]) + b'{"task"')
    backends, _ = evaluate(tmp_path, kind, size)
    assert (tmp_path / "samples.jsonl").read_bytes() == alone
    assert sum(sum(backend.asked) for backend in backends) == sum(SIZES[2:])
    evaluate(tmp_path, kind, size)  # with nothing left to ask
    assert (tmp_path / "samples.jsonl").read_bytes() == alone


@pytest.mark.parametrize("size", [2, 4])
def test_who_holds_shards_generates_as_often_and_as_long_as_the_others(size: int, tmp_path: Path):
    """Else the others would wait in the middle of a forward pass."""
    backends, _ = evaluate(tmp_path, ShardedWorkers, size)
    assert all(backend.settings == backends[0].settings for backend in backends)
    assert {count for backend in backends for count in backend.asked} >= {0, 4}


def test_the_whole_models_processes_take_what_is_next(tmp_path: Path):
    """None has to wait for a slow one."""
    backends, _ = evaluate(tmp_path, Workers, 3)
    assert all(0 not in backend.asked for backend in backends)


@pytest.mark.parametrize("kind", [Workers, ShardedWorkers])
def test_rank_zero_leads_where_answers_depend_on_answers(kind: type[Workers]):
    """MT-Bench: with shards the others take part in every pass; without, they have nothing to do."""
    backends = [Echo(), Echo(), Echo()]

    def work(rank: int, store: dist.Store) -> list | None:
        with kind(store, rank, 3).led(backends[rank]) as leading:
            if leading is None:
                return None
            return [leading.generate([[n]], Request((), 7)) for n in range(3)]

    assert together(3, work) == [[[[0]], [[1]], [[2]]], None, None]
    others = [0, 0, 0] if kind is ShardedWorkers else []
    assert [backend.asked for backend in backends] == [[1, 1, 1], others, others]
    assert {setting for backend in backends for setting in backend.settings} == {(7, 1)}


def test_what_rank_zero_finds_is_known_to_all():
    found = together(3, lambda rank, store: Workers(store, rank, 3).agree(lambda: {"rank": rank}))
    assert found == [{"rank": 0}] * 3


def test_one_gpu_cannot_be_named_for_all(monkeypatch):
    assert evaluation_workers.own_device("cuda:1") == "cuda:1"  # of one process
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert evaluation_workers.own_device("cpu") == "cpu"
    with pytest.raises(
        UserError, match="--device: with NGPU every process takes a GPU of its own; give cuda, not cuda:1"
    ):
        evaluation_workers.own_device("cuda:1")


def test_more_processes_than_gpus(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(evaluation_workers.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"NGPU: 3 processes are more than the 2 GPU\(s\) here"):
        evaluation_workers.start(3, None, tmp_path, [])
