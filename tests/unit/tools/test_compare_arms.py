"""What a list of methods and a grid mean, and matched sizes against formulas."""

from __future__ import annotations

import pytest
from compare.arms import parse_arms, parse_axis, parse_grid, parse_methods
from compare.sizes import match_rank, trained_parameters

from titan_hd.adapters.methods import METHODS
from titan_hd.config.job_config import Adapter, JobConfig
from titan_hd.errors import UserError
from titan_hd.models.registry import flavor_config

DECODER = flavor_config("llama3", "debugmodel")
SHAPES = DECODER.linear_shapes().values()


def config(**adapter) -> JobConfig:
    return JobConfig(adapter=Adapter(**adapter))


def test_names_of_runs():
    assert set(parse_methods("all")) == set(METHODS)
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


def test_ranges_are_spaced_in_the_logarithm():
    rates = parse_grid(["optimizer.lr=1e-4:3.2e-3:6"])["optimizer.lr"]
    assert rates.values == ("0.0001", "0.0002", "0.0004", "0.0008", "0.0016", "0.0032")
    assert (rates.beyond("0.0032", True), rates.beyond("0.0001", False)) == ("0.0064", "5e-05")
    assert rates.between("0.0001", "0.0004") == "0.0002"


def test_whole_numbers_stay_whole():
    ranks = parse_grid(["adapter.rank=1:16:5"])["adapter.rank"]
    assert ranks.values == ("1", "2", "4", "8", "16")
    assert (ranks.beyond("16", True), ranks.beyond("1", False)) == ("32", None)
    assert (ranks.between("4", "16"), ranks.between("1", "2")) == ("8", None)


def test_lists_stay_as_they_are():
    axis = parse_grid(["hdpissa.slices=top,orthogonal"])["hdpissa.slices"]
    assert axis.values == ("top", "orthogonal")
    assert axis.beyond("top", True) is None
    assert axis.between("top", "orthogonal") is None


def test_an_arm_may_have_a_range_of_its_own():
    grid = parse_grid(["optimizer.lr=1e-3:4e-3:3"])
    lora, hira = parse_arms("lora+rank=4,hira+optimizer.lr=1e-2:4e-2:3", grid)
    assert lora.axes == grid
    assert (hira.name, hira.axes["optimizer.lr"].values) == ("hira", ("0.01", "0.02", "0.04"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lr=1:2:3", "must be section.key="),
        ("optimizer.lr", "must be section.key="),
        ("optimizer.lr=1e-3:x:3", "must be low:high:number"),
        ("optimizer.lr=1e-3:1e-4:3", "needs 0 < low < high"),
        ("optimizer.lr=1e-3:1e-2:1", "two values or more"),
        ("optimizer.lr=1,1", "has a value twice"),
    ],
)
def test_faulty_grids(text: str, line: str):
    with pytest.raises(UserError, match=line):
        parse_grid([text])


def test_faulty_arms_of_a_grid():
    grid = parse_grid(["optimizer.lr=1e-3:4e-3:3"])
    with pytest.raises(UserError, match=r"optimizer\.lr is tuned by --grid; give the arm a range"):
        parse_arms("lora+optimizer.lr=1e-3", grid)
    with pytest.raises(UserError, match="lora is there twice"):
        parse_arms("lora,lora", grid)
    with pytest.raises(UserError, match="given twice"):
        parse_grid(["optimizer.lr=1,2", "optimizer.lr=3,4"])
    assert parse_axis("optimizer.lr", "1e-3:4e-3:3", "--grid").ratio == pytest.approx(2)


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
