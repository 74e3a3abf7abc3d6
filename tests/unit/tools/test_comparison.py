"""What a list of methods means, matched sizes against formulas, and the tables."""

from __future__ import annotations

import csv

import pytest
from compare import comparison
from compare.comparison import Result, match_rank, parse_methods, trained_parameters, write_tables
from compare.delta_rank import DeltaRank

from titan_hd.config.job_config import Adapter, JobConfig
from titan_hd.errors import UserError
from titan_hd.models.registry import flavor_config

DECODER = flavor_config("llama3", "debugmodel")
SHAPES = DECODER.linear_shapes().values()


def config(**adapter) -> JobConfig:
    return JobConfig(adapter=Adapter(**adapter))


def test_names_of_runs():
    assert set(parse_methods("all")) == set(comparison.METHODS)
    runs = parse_methods("lora+optimizer.lr=1e-3,hdpissa+slices=top+rank=4,full")
    assert runs["lora+optimizer.lr=1e-3"] == {"adapter.method": "lora", "optimizer.lr": "1e-3"}
    assert runs["hdpissa+slices=top+rank=4"] == {
        "adapter.method": "hdpissa",
        "hdpissa.slices": "top",
        "adapter.rank": "4",
    }
    assert runs["full"]["adapter.dropout"] == "0"
    assert all(changes["adapter.method"] == "hdpissa" for changes in parse_methods("ablations").values())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("adalora", "'adalora' is none; there are hdpissa, full, lora"),
        ("lora+slice=top", "'slice=top' must be key=value with a key of"),
        ("lora+rank", "'rank' must be key=value"),
        (",", "names no method"),
    ],
)
def test_faulty_names(text: str, line: str):
    with pytest.raises(UserError, match=line):
        parse_methods(text)


def test_trained_parameters_are_those_of_the_formulas():
    layers, both = DECODER.num_hidden_layers, sum(map(sum, SHAPES))
    assert trained_parameters(config(method="lora", rank=3), DECODER, 1) == layers * 3 * both
    assert trained_parameters(config(method="hdpissa", rank=3), DECODER, 4) == layers * 12 * both
    assert trained_parameters(config(method="bone", rank=3), DECODER, 1) == layers * 3 * sum(out for out, _ in SHAPES)


def test_matched_parameters():
    """The nearest size there is; bat's blocks must divide every side."""
    budget = trained_parameters(config(method="lora", rank=4), DECODER, 1)
    for method in ("pissa", "hira"):
        assert match_rank(config(method=method, rank=4), DECODER) == 4
    for method in ("mora", "bone", "bat"):
        rank = match_rank(config(method=method, rank=4), DECODER)
        size = trained_parameters(config(method=method, rank=rank), DECODER, 1)
        assert abs(size - budget) < 0.35 * budget, (method, rank, size, budget)
        if method == "bat":
            assert all(out % rank == 0 and inner % rank == 0 for out, inner in SHAPES)
    assert match_rank(config(method="hdpissa", rank=4), DECODER) == 4
    assert match_rank(config(method="full", rank=4), DECODER) == 4


def result(name: str, seconds: float) -> Result:
    ranks = {"q_proj": DeltaRank(8, 6.0, 0.1), "all": DeltaRank(8, 6.0, 0.1)}
    return Result(name, 4, 1000, {1: 3.0, 2: 2.0}, 2.0, seconds, 100 / seconds, 0.5, {"validation_loss": 2.5}, ranks)


def test_tables_relate_speeds_to_lora(tmp_path):
    text = write_tables(tmp_path, [result("full", 3.0), result("lora+rank=4", 2.0)], 1e-3)
    assert (tmp_path / "table.md").read_text() == text
    full, lora = csv.DictReader((tmp_path / "table.csv").open())
    assert (full["step time / lora+rank=4"], lora["step time / lora+rank=4"]) == ("1.50", "1.00")
    assert (full["rank"], lora["rank"]) == ("-", "4")
    assert (lora["loss"], lora["validation loss"]) == ("2.0000", "2.5"), "two columns"
    assert [row["full"] for row in csv.DictReader((tmp_path / "losses.csv").open())] == ["3.0", "2.0"]


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    comparison.plot(tmp_path, [result("full", 3.0), result("lora", 2.0)])
    assert {p.name for p in tmp_path.iterdir()} == {"losses.png", "bars.png"}
