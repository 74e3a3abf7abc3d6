"""`raise_on_all` and `on_rank_zero`: what every rank gets when all is well, and when one rank fails."""

from __future__ import annotations

import torch.distributed as dist

from titan_hd.distributed.collectives import check_equal_on_all_ranks, on_rank_zero, raise_on_all
from titan_hd.errors import UserError


def value_of_rank_0() -> tuple:
    calls = []

    def read():
        calls.append(dist.get_rank())
        return {"rank": dist.get_rank()}

    return on_rank_zero("a test", read), calls


def test_once_runs_on_rank_0_and_gives_its_value_to_all(workers):
    assert workers.run(2, value_of_rank_0) == [({"rank": 0}, [0]), ({"rank": 0}, [])]


def fails_on_rank_0() -> str:
    def read():
        raise UserError("the file is broken\nin two ways")

    try:
        on_rank_zero("a test", read)
    except UserError as error:
        return str(error)
    return ""


def test_an_error_of_rank_0_is_everybodys(workers):
    assert workers.run(2, fails_on_rank_0) == ["the file is broken\nin two ways"] * 2


def objects_sent_when_all_is_well() -> int:
    sent = []
    original = dist.all_gather_object
    dist.all_gather_object = lambda *arguments, **options: sent.append(arguments)
    try:
        for _ in range(3):
            with raise_on_all("a test"):
                pass
    finally:
        dist.all_gather_object = original
    return len(sent)


def test_together_sends_no_objects_while_all_is_well(workers):
    """At thousands of ranks each would get as many."""
    assert workers.run(2, objects_sent_when_all_is_well) == [0, 0]


def compare(values: list[str]) -> str:
    try:
        check_equal_on_all_ranks("data.train", values[dist.get_rank()])
    except UserError as error:
        return str(error)
    return ""


def test_what_must_be_equal(workers):
    assert workers.run(2, compare, ["9 records", "9 records"]) == ["", ""]
    line = "data.train: must be the same on every node, but rank 0 has 9 records, and rank 1 8 records"
    assert workers.run(2, compare, ["9 records", "8 records"]) == [line] * 2
