"""metrics.jsonl over a resumption: a step is written once. Neither the log nor a report ends a run."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from titan_hd.components import metrics as metrics_module
from titan_hd.components.metrics import MetricsLogger, write_svd_report
from titan_hd.components.records import keep_records_until
from titan_hd.config.job_config import JobConfig
from titan_hd.console import TqdmHandler


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in steps)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class TestKeepRecordsUntil:
    def test_later_records_are_dropped(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(lines(1, 2, 3, 4, 5))
        keep_records_until(path, 3)
        assert path.read_text() == lines(1, 2, 3)

    def test_a_new_run_starts_anew(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(lines(1, 2))
        keep_records_until(path, 0)
        assert path.read_text() == ""

    def test_the_validation_before_the_first_step_stays(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(lines(0, 1, 2))
        keep_records_until(path, 1)
        assert steps_of(path) == [0, 1]

    def test_a_torn_last_line_is_dropped(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(lines(1, 2) + '{"step": 3, "lo')
        keep_records_until(path, 5)
        assert path.read_text() == lines(1, 2)

    def test_a_last_line_without_its_newline_is_ended(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(lines(1, 2)[:-1])
        keep_records_until(path, 5)
        assert path.read_text() == lines(1, 2)

    def test_what_is_no_record_is_dropped(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(lines(1) + '\n3\n[]\n{"loss": 1}\n{"step": "two"}\nnull\n' + lines(2))
        keep_records_until(path, 5)
        assert steps_of(path) == [1, 2]

    def test_bytes_that_are_no_text_cost_their_line_alone(self, tmp_path: Path):
        """What a crash of the machine may leave."""
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(lines(1).encode() + b'{"step": \xff\x00\n' + lines(2).encode())
        keep_records_until(path, 5)
        assert steps_of(path) == [1, 2]

    def test_no_file(self, tmp_path: Path):
        keep_records_until(tmp_path / "metrics.jsonl", 3)
        assert not (tmp_path / "metrics.jsonl").exists()


class TestMetricsLogger:
    def config(self, folder: Path) -> JobConfig:
        config = JobConfig()
        config.job.dump_folder = str(folder / "run")
        return config

    def log(self, config: JobConfig, first: int, last: int) -> None:
        metrics = MetricsLogger(config, total_steps=10, first_step=first)
        for step in range(first + 1, last + 1):
            metrics.log(step, {"loss": step / 10})
            metrics.advance(step, 0.5)
        metrics.close()

    def test_a_resumed_run_writes_every_step_once(self, tmp_path: Path):
        config = self.config(tmp_path)
        self.log(config, 0, 7)
        self.log(config, 5, 9)  # the checkpoint was of step 5
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines(*range(1, 10))

    def test_records_of_an_earlier_run_are_set_aside(self, tmp_path: Path, caplog):
        """Of a run without checkpoints they are all that is left."""
        config = self.config(tmp_path)
        for last in (3, 2, 1):
            self.log(config, 0, last)
        for name, last in (("metrics.jsonl", 1), ("metrics.1.jsonl", 3), ("metrics.2.jsonl", 2)):
            assert (tmp_path / "run" / name).read_text() == lines(*range(1, last + 1))
        assert "metrics.jsonl is of an earlier run; kept as metrics.2.jsonl" in caplog.text
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        self.log(config, 0, 1)
        assert not (tmp_path / "run" / "metrics.3.jsonl").exists(), "there was nothing to keep"

    def test_the_bar_shows_the_steps_of_the_run(self, tmp_path: Path, monkeypatch, capsys):
        """Those of an earlier part, and those that were made by hand, too."""
        monkeypatch.setattr(metrics_module, "on_terminal", lambda: True)
        metrics = MetricsLogger(self.config(tmp_path), total_steps=10, first_step=2)
        for step in (6, 7):
            metrics.advance(step, 0.5)
        metrics.close()
        assert "7/10" in capsys.readouterr().err.splitlines()[-1].split("\r")[-1]

    def test_records_are_there_at_once(self, tmp_path: Path):
        metrics = MetricsLogger(self.config(tmp_path), 10, 0)
        metrics.log(1, {"loss": 0.1})
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines(1)
        metrics.close()

    def test_a_full_disk_delays_records_and_loses_none(self, tmp_path: Path):
        metrics = MetricsLogger(self.config(tmp_path), 10, 0)
        real, metrics.records._file = metrics.records._file, FullDisk()
        metrics.log(1, {"loss": 0.1})
        metrics.log(2, {"loss": 0.2})
        metrics.sync()
        metrics.records._file = real
        metrics.log(3, {"loss": 0.3})
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines(1, 2, 3)[5:], (
            "five bytes went to the full disk"
        )
        metrics.close()

    def test_records_that_no_disk_has_taken_are_named_at_the_end(self, tmp_path: Path, caplog):
        metrics = MetricsLogger(self.config(tmp_path), 10, 0)
        metrics.records._file.close()
        metrics.records._file = FullDisk()
        metrics.log(1, {"loss": 0.1})
        metrics.log(2, {"loss": 0.2})
        metrics.close()
        assert "metrics.jsonl: its last 2 record(s) are lost" in caplog.text


class TestLog:
    @pytest.mark.parametrize("path", ["/dev/full", "closed"])
    def test_a_line_that_cannot_be_written_is_dropped(self, path: str, tmp_path: Path, monkeypatch):
        stream = open("/dev/full" if path == "/dev/full" else tmp_path / path, "w", buffering=1)  # noqa: SIM115
        if path == "closed":
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logging, "raiseExceptions", path != "closed")
        log = logging.Logger("a log of its own")
        log.addHandler(TqdmHandler())
        log.warning("lost")

    def test_the_reports_of_an_svd_are_none_of_the_runs_needs(self, tmp_path: Path, caplog):
        (tmp_path / "file").write_text("")
        numbers = {"captured_energy": 0.5, "seconds": 1.0, "orthogonality_error": 0.0, "zero_directions": 0}
        report = {"cached": False, **numbers}
        with caplog.at_level("INFO", "titan_hd"):
            write_svd_report(tmp_path / "file" / "svd.jsonl", [report])
        assert "svd.jsonl: cannot be written (Not a directory)" in caplog.text or "File exists" in caplog.text
        assert "SVD of 1 weights" in caplog.text, "the summary is there"
        write_svd_report(tmp_path / "run" / "svd.jsonl", [report])
        assert json.loads((tmp_path / "run" / "svd.jsonl").read_text()) == report


class FullDisk:
    """Takes five bytes, then none."""

    room = 5

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        self.room = 0
        return 5

    def close(self) -> None:
        raise OSError(5, "Input/output error")


def test_weights_that_can_never_move_are_named(tmp_path: Path, caplog):
    common = {"cached": False, "seconds": 1.0, "captured_energy": 1.0, "orthogonality_error": 0.0, "directions": 8}
    reports = [{"layer": f"layers.{n}.o_proj", "zero_directions": n % 3, **common} for n in range(3)]
    write_svd_report(tmp_path / "svd.jsonl", reports)
    assert [json.loads(line) for line in (tmp_path / "svd.jsonl").read_text().splitlines()] == reports
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.endswith("can never move: layers.1.o_proj (1 of 8), layers.2.o_proj (2 of 8)")
    write_svd_report(tmp_path / "svd.jsonl", reports[:1])
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
