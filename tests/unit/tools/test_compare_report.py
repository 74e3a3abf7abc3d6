"""Which point of an arm is its best, and what tables, figures and the page say of made-up runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from charts.drawing import running_mean, style_of
from compare import figures, report, tables
from compare.figures import mean_curve
from compare.outcome import Curve, Outcome, read_outcome

from tests.kit.comparison_files import RATES, write_comparison, write_csv
from tests.kit.html_page import Page, assert_alone
from titan_hd.errors import UserError


def outcome_of(folder: Path, runs: list[dict], **said) -> Outcome:
    """Of runs {arm, lr, seed, loss or how it failed, ...}."""
    folder.mkdir(exist_ok=True)
    rows = []
    for run in runs:
        row = {"arm": run["arm"], "optimizer.lr": run["lr"], "seed": run["seed"], "status": "complete"}
        if isinstance(run["loss"], str):
            row["status"] = run["loss"]
        else:
            row["validation_loss"] = run["loss"]
        rows.append(row | {key: value for key, value in run.items() if key not in ("lr", "arm", "seed", "loss")})
    write_csv(folder / "grid.csv", rows)
    said = {"grid": ["optimizer.lr"], "rank_by": "validation_loss", "baseline": "", **said}
    (folder / "comparison.json").write_text(json.dumps(said))
    return read_outcome(folder)


def runs(arm: str, values: dict[float, list]) -> list[dict]:
    """values: rate -> the loss of seed 1, 2, ..."""
    return [
        {"arm": arm, "lr": rate, "seed": seed, "loss": loss}
        for rate, losses in values.items()
        for seed, loss in enumerate(losses, 1)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The best point


def test_a_lucky_single_run_is_not_the_best_point(tmp_path):
    arm = outcome_of(tmp_path, runs("lora", {1e-3: [0.5, 0.6, 0.7], 2e-3: [0.4, 0.6, 0.5], 4e-3: [0.1]})).arms["lora"]
    assert arm.best == (2e-3,)
    assert arm.repeated == [(1e-3,), (2e-3,)]
    assert arm.at_best("validation_loss").mean == pytest.approx(0.5)


def test_a_point_where_a_seed_diverged_has_one_seed_less(tmp_path):
    """Its other seeds would be the survivors' mean. A loss that is no number is a divergence, too."""
    for way in ("diverged", float("nan")):
        arm = outcome_of(tmp_path, runs("lora", {1e-3: [0.5, 0.5], 2e-3: [0.1, way]})).arms["lora"]
        assert (arm.best, arm.failures(), arm.failures((1e-3,))) == ((1e-3,), {"diverged": 1}, {})


def test_the_greatest_is_best_where_it_is_said(tmp_path):
    values = {1e-3: [0.5, 0.5], 2e-3: [0.6, 0.6], 4e-3: [0.6, 0.6]}
    outcome = outcome_of(tmp_path, runs("bat", {1e-3: [0.9, 0.9]}) + runs("lora", values), better="max")
    assert outcome.arms["lora"].best == (2e-3,), "of equal ones the first"
    assert [arm.name for arm in outcome.ranked] == ["bat", "lora"]


def test_an_arm_without_a_complete_run_comes_last(tmp_path):
    outcome = outcome_of(tmp_path, runs("bat", {1e-3: ["out_of_memory"]}) + runs("lora", {1e-3: [0.3]}), baseline="bat")
    assert [(arm.name, arm.best) for arm in outcome.ranked] == [("lora", (1e-3,)), ("bat", None)]
    assert outcome.difference(outcome.arms["lora"]) is None
    assert "* bat: no run completed (1 out of memory).\n" in tables.table_md(outcome)


def test_the_value_at_the_point_that_the_other_seeds_choose(tmp_path):
    """Seed 3 of the rate 2e-3 was lucky. Without it the others choose 1e-3, where seed 3 has 0.6; without seed 1 or 2,
    2e-3 is chosen, with 0.7 and 0.8: mean 0.7."""
    outcome = outcome_of(tmp_path, runs("lora", {1e-3: [0.6, 0.6, 0.6], 2e-3: [0.7, 0.8, 0.1]}))
    arm = outcome.arms["lora"]
    assert arm.best == (2e-3,)
    assert arm.at_best("validation_loss").mean == pytest.approx(1.6 / 3)
    assert arm.chosen_by_others() == pytest.approx((0.7 + 0.8 + 0.6) / 3)
    assert outcome_of(tmp_path, runs("lora", {1e-3: [0.6]})).arms["lora"].chosen_by_others() is None


# ---------------------------------------------------------------------------------------------------------------------
# Reading

ROW = {"arm": "lora", "optimizer.lr": 1e-3, "seed": 1, "status": "complete", "validation_loss": 0.5}


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [ROW | {"status": "done"}],
            r"grid.csv:2: status: must be complete, diverged, out_of_memory, failed, not 'done'",
        ),
        ([ROW | {"validation_loss": ""}], r"grid.csv:2: a complete run without a number for validation_loss"),
        ([ROW | {"seed": "x"}], r"grid.csv:2: seed: must be a whole number, not 'x'"),
        ([ROW, ROW | {"optimizer.lr": "0.0010"}], r"grid.csv:3: this arm, point and seed have a line already"),
        ([{key: ROW[key] for key in ROW if key != "status"}], r"grid.csv: has no column status"),
    ],
)
def test_faulty_lines(tmp_path, rows: list[dict], line: str):
    outcome_of(tmp_path, runs("lora", {1e-3: [1.0]}))
    write_csv(tmp_path / "grid.csv", rows)
    with pytest.raises(UserError, match=line):
        read_outcome(tmp_path)


def test_faulty_files(tmp_path):
    with pytest.raises(UserError, match=r"comparison\.json: cannot be read"):
        read_outcome(tmp_path)
    with pytest.raises(UserError, match=r"baseline: no arm is named pissa; there are lora"):
        outcome_of(tmp_path, runs("lora", {1e-3: [1.0]}), baseline="pissa")
    with pytest.raises(UserError, match=r"comparison\.json: must have grid, a list of keys, and rank_by, a metric"):
        outcome_of(tmp_path, runs("lora", {1e-3: [1.0]}), rank_by="")
    with pytest.raises(UserError, match=r"better: must be min or max, not least"):
        outcome_of(tmp_path, runs("lora", {1e-3: [1.0]}), better="least")
    outcome_of(tmp_path, runs("lora", {1e-3: [1.0]}))
    (tmp_path / "grid.csv").write_text("arm,optimizer.lr,seed,status,validation_loss\nlora,1e-3\n")
    with pytest.raises(UserError, match=r"grid\.csv:2: must have 5 columns"):
        read_outcome(tmp_path)
    (tmp_path / "grid.csv").unlink()
    with pytest.raises(UserError, match=r"grid\.csv: there is no such file"):
        read_outcome(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_the_numbers_of_table_csv(tmp_path):
    lora = [
        {"arm": "lora", "lr": 1e-3, "seed": seed, "loss": loss, "step_seconds": 2.0, "peak_memory_gib": 4}
        for seed, loss in ((1, 0.5), (2, 0.7))
    ]
    sets = "validation_loss/plain", "before:validation_loss/plain"
    hdpissa = [
        {"arm": "hdpissa", "lr": 2e-3, "seed": seed, "loss": loss, "step_seconds": time, sets[0]: after, sets[1]: 1.0}
        for seed, loss, time, after in ((1, 0.4, 3.0, 1.5), (2, 0.5, 5.0, 1.7), (3, 0.9, 3.0, 1.9))
    ]
    outcome = outcome_of(tmp_path, lora + hdpissa, baseline="lora")
    first, second = csv.DictReader(tables.table_csv(outcome).splitlines())
    assert (first["arm"], second["arm"], second["optimizer.lr"]) == ("lora", "hdpissa", "0.002")
    assert (second["runs"], second["complete"], second["diverged"]) == ("3", "3", "0")
    assert float(second["validation_loss"]) == pytest.approx(0.6)
    assert (second["difference_to:lora:n"], first["difference_to:lora:n"]) == ("2", "0"), "seed 3 has no pair"
    assert float(second["difference_to:lora"]) == pytest.approx(-0.15)
    assert float(second["step_seconds:to_lora"]) == 1.5, "medians, 3 s and 2 s"
    assert float(second["validation_loss/plain"]) == pytest.approx(1.7)
    assert float(second["forgetting:validation_loss/plain"]) == pytest.approx(0.7)
    assert float(second["forgetting:validation_loss/plain:sd"]) == pytest.approx(0.2)
    assert (first["forgetting:validation_loss/plain"], second["peak_memory_gib:to_lora"]) == ("", "")
    text = tables.table_md(outcome)
    assert re.search(r"^\| hdpissa \| 0\.002 +\| 3 / 0 +\| 3 +\| 0\.6 +\| 0\.26 ", text, re.MULTILINE), text
    assert re.search(r"^\| hdpissa .*\| -0\.15 ", text, re.MULTILINE)
    assert "| +0.7 (sd 0.2)" in text
    assert "The best points do not have the same number of seeds (2: lora; 3: hdpissa)." in text
    assert "dW" not in text, "a column without any value is left out"


def test_speeds_are_absolute_without_lora(tmp_path):
    bat = [{"arm": "bat", "lr": 1e-3, "seed": 1, "loss": 0.5, "step_seconds": 2.0}]
    assert "| step time, s |" in tables.table_md(outcome_of(tmp_path, bat))
    lora = [{"arm": "lora+rank=4", "lr": 1e-3, "seed": 1, "loss": 0.5, "step_seconds": 4.0}]
    assert "| step time / lora+rank=4 |" in tables.table_md(outcome_of(tmp_path, bat + lora))


def test_what_is_said_of_the_numbers(tmp_path, monkeypatch: pytest.MonkeyPatch):
    single = runs("bone", {1e-3: [0.5], 2e-3: [0.4]})
    failing = runs("bat", {1e-3: [0.5, 0.6, "diverged"]})
    outcome = outcome_of(tmp_path, single + failing, edges={"bone": "its best value lies on the edge"})
    monkeypatch.setattr(tables, "scipy_is_there", lambda: False)
    text = tables.table_md(outcome)
    for line in (
        "One seed, hence no standard deviation and no interval, and a best value that owes something to luck: bone.",
        "The arms did not have the same number of runs (2: bone; 3: bat).",
        "bat: 1 of the runs at its best point failed.",
        "bone: its best value lies on the edge",
        "No 95% intervals: scipy, which has Student's quantiles, is missing (the extra `plots`).",
    ):
        assert f"* {line}\n" in text


# ---------------------------------------------------------------------------------------------------------------------
# Curves, figures, the page


def test_mean_curves():
    nan = float("nan")
    curves = [
        Curve([1, 2, 3], [0.0, 1.0, 2.0], {"loss": [4.0, 3.0, 2.0], "validation_loss": [nan, 1.0, nan]}),
        Curve([1, 2], [0.0, 3.0], {"loss": [2.0, 1.0], "validation_loss": [nan, 3.0]}),
    ]
    found = mean_curve(curves, "loss")
    assert (found.steps, found.seconds, found.losses) == ([1, 2, 3], [0.0, 2.0, 2.0], [3.0, 2.0, 2.0])
    found = mean_curve(curves, "validation_loss")
    assert (found.steps, found.seconds, found.losses) == ([2], [2.0], [2.0])
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([1.0, 3.0], 0) == [1.0, 3.0]


def test_sixteen_arms_can_be_told_apart():
    styles = [style_of(index) for index in range(16)]
    assert len({style.marker for style in styles}) == 16
    assert len({(style.colour, style.line) for style in styles}) == 16


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(folder, arms=5, seeds=2, steps=12)
    text = report.write(folder)
    assert text == (folder / "table.md").read_text()
    return folder


def test_figures(reported: Path):
    names = {path.stem for path in reported.glob("*.png")}
    assert names == {"grid-optimizer.lr", "differences", "losses", "time", "moments", "forgetting"}


def test_the_page_is_whole_and_alone(reported: Path):
    text = (reported / "comparison.html").read_text()
    page = Page(text)
    assert_alone(text)
    assert (page.tags.count("svg"), page.tags.count("table")) == (6, 4)
    assert {f"arm{index}" for index in range(5)} <= page.classes
    assert "its best value" not in text, "hira is not among these arms"


def test_what_is_under_the_pointer(reported: Path):
    points = Page((reported / "comparison.html").read_text()).data
    outcome = read_outcome(reported)
    for name, series in points.items():
        assert {one["arm"] for one in series} == set(range(5)) - ({0} if name == "differences" else set()), name
        assert all(len(one["x"]) == len(one["y"]) == len(one["texts"]) for one in series)
    lora = outcome.arms["lora"]
    said = [text for one in points["grid-optimizer.lr"] if one["arm"] == 0 for text in one["texts"]]
    best = f"lora: its best point\noptimizer.lr {lora.best[0]:g}\nmean of 2: validation_loss "
    assert best + f"{lora.at_best('validation_loss').mean:.4g}" in said
    failed = [text for one in points["grid-optimizer.lr"] if one["arm"] == 4 for text in one["texts"]]
    assert f"hdpissa\noptimizer.lr {RATES[-1]:g}\n1 diverged" in failed


def test_points_lie_where_they_are_drawn(reported: Path):
    text = (reported / "comparison.html").read_text()
    drawn = text[text.index('<figure id="moments">') :].partition("</svg>")[0]
    markers = [tuple(map(float, place)) for place in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawn)]
    for one in Page(text).data["moments"]:
        x, y = one["x"][0], one["y"][0]
        assert any(abs(x - left) < 0.1 and abs(y - top) < 0.1 for left, top in markers), one


def test_the_same_files_give_the_same_bytes(reported: Path, tmp_path):
    report.write(reported, tmp_path / "again")
    written = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert {"table.csv", "points.csv", "table.md", "comparison.html", "losses.png"} <= set(written)
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (reported / name).read_bytes(), name


def test_grids_of_several_keys_and_of_words(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"arm": arm, "optimizer.lr": rate, "hdpissa.slices": slices, "seed": 1, "status": "complete"}
        | {"validation_loss": 0.1 * place + rate}
        for arm in ("hdpissa", "lora")
        for rate in (1e-3, 1e-2)
        for place, slices in enumerate(("top", "random"), 1)
    ]
    write_csv(tmp_path / "grid.csv", rows)
    said = {"grid": ["optimizer.lr", "hdpissa.slices"], "rank_by": "validation_loss"}
    (tmp_path / "comparison.json").write_text(json.dumps(said))
    text = report.write(tmp_path)
    assert re.search(r"^\| arm +\| best lr \| best slices \|", text, re.MULTILINE)
    assert re.search(r"^\| hdpissa \| 0\.001 +\| top +\|", text, re.MULTILINE)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"grid-optimizer.lr", "grid-hdpissa.slices"}
    outcome = read_outcome(tmp_path)
    picture = figures.pictures_of(outcome)[1]
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["top", "random"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.101, 0.201]), "the best value of the other key"


def test_a_key_of_some_arms_and_no_key_at_all(tmp_path):
    """lora has no value of K: it is not drawn against K, and numbers stay numbers."""
    pytest.importorskip("matplotlib")
    common = {"seed": 1, "status": "complete"}
    rows = [
        {"arm": "hdpissa", "hdpissa.num_adapters": 1, **common, "validation_loss": 0.5},
        {"arm": "hdpissa", "hdpissa.num_adapters": 8, **common, "validation_loss": 0.4},
        {"arm": "lora", "hdpissa.num_adapters": "", **common, "validation_loss": 0.6},
    ]
    write_csv(tmp_path / "grid.csv", rows)
    said = {"grid": ["hdpissa.num_adapters"], "rank_by": "validation_loss", "baseline": "lora"}
    (tmp_path / "comparison.json").write_text(json.dumps(said))
    outcome = read_outcome(tmp_path)
    (axes,) = figures.pictures_of(outcome)[0].figure.axes
    assert (axes.get_xscale(), list(axes.get_xticks())) == ("log", [1, 8])
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["hdpissa"]
    assert re.search(r"^\| lora +\| - +\|", tables.table_md(outcome), re.MULTILINE)
    (tmp_path / "comparison.json").write_text(json.dumps(said | {"grid": []}))
    write_csv(tmp_path / "grid.csv", [row for row in rows if row["hdpissa.num_adapters"] != 1])
    text = report.write(tmp_path)
    assert re.search(r"^\| arm +\| runs complete", text, re.MULTILINE)
    assert not list(tmp_path.glob("grid-*.png"))


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch: pytest.MonkeyPatch, caplog):
    write_comparison(tmp_path, arms=2, seeds=1, steps=6)
    (tmp_path / "losses.csv").unlink()
    monkeypatch.setattr(report, "matplotlib_is_there", lambda: False)
    report.write(tmp_path)
    assert "no figures: matplotlib is missing" in caplog.text
    assert not list(tmp_path.glob("*.png"))
    page = Page((tmp_path / "comparison.html").read_text())
    assert (page.open, page.tags.count("table"), page.tags.count("script")) == ([], 4, 0)
