"""The start of a run on one screen, and plan.txt with the tables behind it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from titan_hd.components.run_data import read_data
from titan_hd.config.manager import load
from titan_hd.overview import Overview, data_lines, screen
from titan_hd.preflight import plan_run


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = ['{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}', '{"input_ids": [1, 2], "labels": [1, -100]}']
    path.write_text("\n".join([*rows * 3, '{"input_ids": [1], "labels": [-100]}', "{torn", ""]))
    return path


@pytest.fixture
def plan(records: Path):
    """Of the debug model (two blocks, 64 wide, 32 rows in k_proj) on so many workers."""

    def build(workers: int, *argv: str):
        needed = ["--data.train", str(records), "--training.steps", "2", "--adapter.rank", "4"]
        model = ["--model.name", "llama3", "--model.flavor", "debugmodel", "--training.master_dtype", "float32"]
        return plan_run(load([*needed, *model, *argv]), workers, device_type="cuda")

    return build


def lines_of(plan, available: int | None = 80_000_000_000) -> dict[str, str]:
    return dict(Overview(plan, "cuda", "H100", available).lines)


def test_the_screen_of_hdpissa(plan):
    lines = lines_of(plan(2, "--hdpissa.num_adapters", "4", "--training.seq_len", "8", "--training.local_batch_size=3"))
    assert [*lines] == ["model", "method", "adapters", "mesh", "trained", "batch", "memory", "exchange"]
    assert lines["model"].startswith("llama3 of ")
    assert lines["model"].endswith(" parameters, 2 blocks of width 64, vocabulary 256: debugmodel, random weights")
    assert lines["method"].startswith("HD-PiSSA (arXiv 2505.18777): each of K adapters trains another slice")
    assert lines["adapters"] == "K = 4 of rank 4, 2 on each worker"
    assert lines["mesh"] == "1 x 2 x 1 (replicas x shards x tensor parallelism) on 2 x H100"
    assert lines["batch"] == "12 records per step: 2 micro-batch(es) of 3 on each worker, 8 tokens"
    assert lines["memory"].endswith(" of 80.00 GB on each worker")
    assert " GB received per worker and step, " in lines["exchange"]
    assert lines["exchange"].split(" of 14 weights")[0].endswith("factors for 14")


def test_what_is_trained_is_counted(plan):
    """K r (in + out) of seven layers in two blocks, and two moments in fp32 of those on a worker."""
    p = plan(2, "--hdpissa.num_adapters", "4")
    count = 2 * 4 * 4 * sum(map(sum, p.decoder.linear_shapes().values()))
    assert lines_of(p)["trained"].startswith(
        f"{count:,} parameters in 14 layers; {count * 8 / 2 / 1e3:.2f} kB of moments"
    )
    offloaded = plan(2, "--hdpissa.num_adapters", "4", "--hdpissa.offload_moments")
    assert lines_of(offloaded)["trained"].endswith("; moments on the host")
    assert lines_of(plan(2, "--optimizer.name", "SGD"))["trained"].endswith("; the optimizer keeps nothing")


def test_the_scale_of_the_factors_and_a_shared_adapter(plan):
    lines = lines_of(plan(8, "--hdpissa.num_adapters", "1", "--hdpissa.factor_scale", "unit"))
    assert lines["adapters"] == (
        "K = 1 of rank 4, each on 8 workers, which share it; A and B orthonormal, times one number "
        "(hdpissa.factor_scale = unit)"
    )
    assert " GB of it the adapters' gradients, factors for 14 of 14 weights" in lines["exchange"]


@pytest.mark.parametrize(
    ("workers", "k", "said"),
    [
        (2, 2, "K = 2 of rank 4, one on each worker"),
        (8, 2, "K = 2 of rank 4, each on 4 workers, which share it"),
        (1, 8, "K = 8 of rank 4, 8 on each worker"),
    ],
)
def test_how_adapters_are_dealt(workers: int, k: int, said: str, plan):
    assert lines_of(plan(workers, "--hdpissa.num_adapters", str(k)))["adapters"] == said


def test_the_screen_of_another_method(plan):
    lines = lines_of(plan(2, "--adapter.method", "lora"))
    assert "adapters" not in lines
    assert lines["method"] == "LoRA (arXiv 2106.09685): a product B A of rank r is trained beside each frozen weight"
    assert lines["exchange"] == "gradients are summed over 2 workers"
    for method in ("lora", "hdpissa"):
        alone = lines_of(plan(1, "--adapter.method", method), available=None)
        assert alone["exchange"] == "nothing travels: there is one worker"
        assert alone["memory"].endswith(" GB on each worker")
        assert " of " not in alone["memory"]


def test_the_data(plan, records: Path):
    p = plan(
        1,
        "--data.on_error",
        "skip",
        "--data.format",
        "tokens",
        "--training.seq_len",
        "2",
        "--training.local_batch_size=4",
    )
    data = read_data(p.config, p.decoder.vocab_size, p.global_batch_size)
    assert data_lines(data, p.config, 4) == [
        (
            "data",
            "data.train: 7 records of format tokens, 13 tokens, 3 of them trained, 3 cut, 1 bad (left out)",
        ),
        ("steps", "2 of 4 records, 1.14 epochs of 7; how long they will take is told after the first ones"),
    ]


def test_a_mixture_and_a_stream(plan, records: Path):
    both = f'[{{"path": "{records}", "format": "tokens"}}, {{"path": "{records}", "format": "tokens"}}]'
    skip = ("--data.on_error", "skip", "--data.train", both)
    for more, said in (((), "14 records from 2 sources"), (("--data.streaming",), "data.train: a stream of 1 file(s)")):
        p = plan(1, *skip, *more)
        (_, text), (_, steps) = data_lines(read_data(p.config, 256, 1), p.config, 1)
        assert said in text
    assert steps.startswith("2 of 1 records of a stream; ")


def test_plan_txt_has_the_screen_and_the_tables(plan, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("FORCE_COLOR", "1")
    p = plan(2, "--data.on_error", "skip", "--data.format", "tokens", "--hdpissa.refresh_steps", "1")
    overview, data = Overview(p, "cuda", "H100", 80_000_000_000), read_data(p.config, 256, 2)
    overview.write(tmp_path, data_lines(data, p.config, 2), data.rows)
    text = (tmp_path / "plan.txt").read_text(encoding="utf-8")
    for part in (
        "  method    HD-PiSSA",
        "mesh 1 x 2 x 1",
        "update of 14 weights",
        "slices of the current weights every 1 steps",
        "memory of each worker, estimated",
        "  data.train ",
    ):
        assert part in text
    assert "\x1b" not in text
    (tmp_path / "file").write_text("")
    overview.write(tmp_path / "file")
    assert "plan.txt: cannot be written" in caplog.text


def test_what_is_shown_twice_is_made_once(plan, tmp_path: Path, monkeypatch):
    """On the log's screen, in plan.txt, and there again with the data: an 8B model's shapes take their time."""
    made = []
    monkeypatch.setattr("titan_hd.overview.mesh_picture", lambda *_: made.append("tables") or "")
    monkeypatch.setattr(Overview, "_trained", lambda self: made.append("lines") or "")
    overview = Overview(plan(2), "cuda", "H100", None)
    assert dict(overview.lines)["method"].startswith("HD-PiSSA")
    for _ in range(2):
        overview.write(tmp_path)
    assert sorted(made) == ["lines", "tables"]


def test_a_screen_is_wrapped_and_moves_no_cursor():
    lines = screen([("model", "of \x1b[2J" + "words " * 40), ("data", "")], None).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(r"  model     of \x1b[2Jwords")
    assert all(len(line) <= 110 for line in lines)
    assert lines[1].startswith(" " * 12 + "words")


def test_a_screen_is_coloured_for_where_it_goes(monkeypatch):
    """Not for the other stream: the one may be a terminal, the other a file."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal, file = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert screen([("model", "x")], terminal) == "  \x1b[2mmodel     \x1b[0mx"
    assert screen([("model", "x")], file) == "  model     x"
