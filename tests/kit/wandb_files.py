"""Reads what wandb wrote offline, by its own messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEAD = 32768, 7  # of the log format of LevelDB, in which wandb writes


def records(path: Path) -> Iterator:
    """The messages of a run-ID.wandb, in order. Each is in one piece or several, none of which crosses a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), _HEAD, b""
    assert data[:4] == b":W&B"
    while place + _HEAD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + _HEAD + length > len(data):  # it is being written
            return
        parts += data[place + _HEAD : place + _HEAD + length]
        place += _HEAD + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(path: Path) -> dict[int, dict]:
    """Values by step, without wandb's own. Fails where a step comes twice, or in the wrong order."""
    rows: dict[int, dict] = {}
    for record in records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        step = items.get("_step", record.history.step.num)
        assert not rows or step > max(rows), (step, list(rows))
        rows[step] = {key: value for key, value in items.items() if not key.startswith("_")}
    return rows


def start(path: Path):
    """The message that says what the run is."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
