"""The mesh of a run as text, for the log and for `job.print_plan`."""

from __future__ import annotations

_ROWS, _COLUMNS = 16, 8  # the most that are drawn; the rest is abbreviated


def mesh_picture(dp_replicate: int, dp_shard: int, tp: int, num_adapters: int | None) -> str:
    """Which ranks hold what, as text: a line per data-parallel worker, a column per tp rank.

    num_adapters: K, or None for methods without logical adapters.
    """
    workers = dp_replicate * dp_shard
    lines = [f"mesh {dp_replicate} x {dp_shard} x {tp} (replicate x shard x tensor); ranks:"]
    columns = _abbreviated(tp, _COLUMNS)
    if tp > 1:
        lines.append(f"{'':<24}" + "".join("   ..." if c is None else f"{f'tp {c}':>6}" for c in columns))
    for worker in _abbreviated(workers, _ROWS):
        if worker is None:
            lines.append("  ...")
            continue
        replica, shard = divmod(worker, dp_shard)
        ranks = "".join("   ..." if c is None else f"{worker * tp + c:>6}" for c in columns)
        lines.append(f"  replica {replica:<4} shard {shard:<5}{ranks}{_hosted(worker, workers, num_adapters)}")
    return "\n".join(lines)


def _abbreviated(count: int, most: int) -> list[int | None]:
    """0 to count - 1, with None for those left out where they are more than `most`."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]


def _hosted(worker: int, workers: int, num_adapters: int | None) -> str:
    """The adapters of a data-parallel worker, for its line."""
    if num_adapters is None:
        return ""
    first, hosted = worker * num_adapters // workers, num_adapters // workers
    if hosted > 1:
        return f"   adapters {first} to {first + hosted - 1}"
    shared = workers // num_adapters
    return f"   adapter {first}" + (f", shared by {shared} workers" if shared > 1 else "")
