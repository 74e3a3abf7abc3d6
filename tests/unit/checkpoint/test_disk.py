"""Calls of a disk: what they give or raise is the caller's; one that does not return is given up."""

import threading
import time

import pytest

from titan_hd.checkpoint.disk import Disk, DiskIsLate


def test_what_a_call_gives_or_raises():
    disk = Disk(60)
    assert disk.call(lambda: 3) == 3
    for error in (TimeoutError(110, "Connection timed out"), ValueError("a bug")):  # what a file server may say
        with pytest.raises(type(error)) as caught:
            disk.call(lambda error=error: (_ for _ in ()).throw(error))
        assert caught.value is error


def test_all_calls_of_a_save_share_its_time():
    answers, disk, start = threading.Event(), Disk(0.5), time.monotonic()
    disk.call(lambda: time.sleep(0.2))
    for _ in range(2):
        with pytest.raises(
            DiskIsLate, match=r"^has waited for 0 s of 0.5 s \(comm.save_timeout_seconds\) for its disk, "
        ):
            disk.call(answers.wait)
    answers.set()
    assert 0.4 < time.monotonic() - start < 5
