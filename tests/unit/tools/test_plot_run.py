"""tools/plot_run.py: what is read of runs' folders, what is drawn, and what a browser shows of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from plot_run import main, plot
from run_plots.figures import pictures_of, thinned
from run_plots.records import Curve, Run, differences, names_of, read_run
from run_plots.report import labels_of

from tests.kit.browser import look_at
from tests.kit.commands import call_tool, error_lines
from tests.kit.html_page import Page, assert_alone
from titan_hd.errors import UserError

NAN = float("nan")


def write_run(folder: Path, records: Iterable[dict] = (), **config) -> Path:
    """A run's folder; config: section__key=value."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sections: dict[str, dict] = {"job": {"dump_folder": str(folder)}}
    for key, value in config.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    starts = [{"config": {"optimizer": {"lr": 7.0}}}, {"config": sections}]
    (folder / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return folder


def records_of(steps: int, adapters: int = 2, shift: float = 0.0) -> list[dict]:
    """A run of all kinds of metrics: losses of two sets, families of three layers and of adapters."""
    found: list[dict] = []
    for step in range(steps + 1):
        if step % 4 == 0:
            loss = 2 + shift - step / steps
            found.append({"step": step, "validation_loss": loss, "validation_loss/plain": loss + 1})
        if step:
            norms = {f"slice_grad_norm/{i}": (1 + i) / step for i in range(adapters)}
            sizes = {f"update_size/{kind}": 1e-3 / step for kind in ("q_proj", "up_proj", "down_proj")}
            speed = {"tokens_per_second": 1e4 + step, "step_seconds": 0.5, "data_share": 0.1, "exchange_share": 0.9}
            basics = {"loss": 3 / step + shift, "lr": 1e-3, "peak_memory_gib": 4.0, "gather_gb": 0.1, "mine": step}
            found.append({"step": step, **basics, **speed, **norms, **sizes})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_a_run_that_went_back_has_every_step_once(tmp_path):
    """Steps 3 and 4 are drawn as they were made the second time, that of step 5 is gone. The run before it in the
    folder is another one."""
    steps = [(1, 1.0), (2, 0.9), (3, 0.8), (4, 0.7), (5, 0.6), (3, 0.75), (4, 0.65)]
    records = [{"step": step, "loss": loss} for step, loss in steps]
    records.insert(2, {"step": 2, "validation_loss": 0.5})
    folder = write_run(tmp_path / "run", [*records, {"step": 4, "validation_loss": 0.4}])
    (folder / "metrics.1.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    run = read_run(folder, "run")
    assert run.curves == {
        "loss": Curve([1, 2, 3, 4], [1.0, 0.9, 0.75, 0.65]),
        "validation_loss": Curve([2, 4], [0.5, 0.4]),
    }
    assert run.notes == ["metrics.1.jsonl: of earlier runs in the same folder, not drawn; name such a file to see it"]
    earlier = read_run(folder / "metrics.1.jsonl", "earlier")
    assert (earlier.curves, earlier.config, earlier.notes) == ({"loss": Curve([1], [9.0])}, {}, [])


def test_lines_that_are_no_records(tmp_path):
    """The last one, without an end, may be of a run that is under way."""
    folder = write_run(tmp_path)
    lines = ['{"step": 1, "loss": 1.0}', "{torn", '{"loss": 1}', "[]", "\x00", '{"step": 2, "loss": 0.5, "note": "x"}']
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    run = read_run(folder, "run")
    assert run.curves == {"loss": Curve([1, 2], [1.0, 0.5])}
    assert run.notes == [
        f"{folder}/metrics.jsonl:2 and 3 more: no record of a step; left out",
        f"{folder}/metrics.jsonl: no numbers, hence left out: note",
    ]


def test_numbers_that_are_not_finite(tmp_path):
    values = [1.0, NAN, None, 10**400, 0.5]
    folder = write_run(tmp_path, [{"step": i, "loss": value} for i, value in enumerate(values, 1)])
    run = read_run(folder, "run")
    assert run.curves["loss"].finite == [(1, 1.0), (5, 0.5)]
    assert run.notes == ["loss is no finite number 3 times from step 2 to 4"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "holds no metrics.jsonl; name the folder of a run (its job.dump_folder), or such a file"),
        ("", "metrics.jsonl: holds no record of a step yet"),
        ('{"step": 1}\n', "metrics.jsonl: holds no record of a step yet"),
        ('{"step": 1, "loss": NaN}\n', "its metrics have no finite number that could be drawn"),
    ],
)
def test_folders_without_metrics(tmp_path, content: str | None, line: str):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    (said,) = error_lines(call_tool(main, tmp_path))
    assert said.startswith(f"titan_hd: error: {tmp_path}")
    assert line in said
    assert not (tmp_path / "plots").exists()


def test_names_tell_runs_apart():
    paths = [Path("/a/lora/lr=1"), Path("/a/bone/lr=1"), Path("/a/bone/lr=1/metrics.1.jsonl")]
    assert names_of(paths) == ["lora/lr=1", "bone/lr=1", "bone/lr=1/metrics.1.jsonl"]
    assert names_of(paths[:1]) == ["lr=1"]


def test_what_differs(tmp_path):
    """Of the last start of each run; not where it writes. A run of which nothing is known does not differ."""
    common = {"training__steps": 3, "adapter__target_modules": None}
    runs = [
        read_run(write_run(tmp_path / name, records_of(4), optimizer__lr=lr, adapter__method=method, **common), name)
        for name, lr, method in (("a", 1e-3, "lora"), ("b", 3e-3, "lora"), ("c", 3e-3, "hdpissa"))
    ]
    differ = differences(runs)
    assert differ == {"optimizer.lr": ["0.001", "0.003", "0.003"], "adapter.method": ["lora", "lora", "hdpissa"]}
    labels = ["a: method lora, lr 0.001", "b: method lora, lr 0.003", "c: method hdpissa, lr 0.003"]
    assert labels_of(runs, differ) == labels
    others = {"data.train": ["x", "y", "z" * 60], **differ, "training.seed": ["1", "2", "3"]}
    assert labels_of(runs, others)[0] == "a: method lora, lr 0.001, seed 1", "a key has room in all legends, or in none"
    unknown = Run("d", tmp_path, {}, {}, [])
    assert differences([*runs[1:], unknown]) == {"adapter.method": ["lora", "hdpissa", "?"]}


def test_a_configuration_that_cannot_be_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Is no reason to draw nothing: as that of another user, say."""
    folder = write_run(tmp_path / "run", records_of(2))

    def refuse(path: Path, **how: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    run = read_run(folder, "run")
    assert run.curves["loss"].steps == [1, 2]
    assert (run.config, run.notes) == ({}, [f"{folder}/environment.jsonl: cannot be read: Permission denied"])


# ---------------------------------------------------------------------------------------------------------------------
# Figures and the page


def test_long_curves_are_drawn_as_means():
    curve = Curve([1, 2, 3, 4, 5], [1.0, 3.0, NAN, 5.0, 7.0])
    assert thinned(curve, 5) is curve
    assert thinned(curve, 3) == Curve([2, 4, 5], [2.0, 5.0, 7.0])
    gap = thinned(Curve([1, 2], [NAN, NAN]), 1)
    assert gap.steps == [2]
    assert math.isnan(gap.values[0])


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[Path, Path]:
    """The page of two runs, of 2 and of 20 adapters, and their folder."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    for name, adapters in (("small", 2), ("large", 20)):
        records = records_of(12, adapters, shift=0.1 * (name == "large"))
        write_run(folder / name, records, hdpissa__num_adapters=adapters)
    return plot([folder / "small", folder / "large"]), folder


def test_figures_of_several_runs(several):
    """Runs lie on each other: a panel for every member of a family, or its range where there are many."""
    page, folder = several
    assert page == folder / "plots" / "run.html"
    figures = {"loss", "validation", "rate", "slice_grad_norm", "update_size", "speed", "phases", "memory", "others"}
    assert {path.stem for path in page.parent.glob("*.png")} == figures
    runs = [read_run(folder / name, name) for name in ("small", "large")]
    drawn = {picture.name: picture.figure for picture in pictures_of(runs, ["small", "large"])}
    panels = {name: [axes.get_title() for axes in figure.axes] for name, figure in drawn.items()}
    assert panels["validation"] == ["validation_loss", "plain"]
    assert panels["update_size"] == ["down_proj", "q_proj", "up_proj"]
    assert [axes.get_ylabel() for axes in drawn["others"].axes] == ["mine"]
    (norms,) = drawn["slice_grad_norm"].axes
    assert [list(line.get_ydata()[:2]) for line in norms.lines] == [[1.5, 0.75], [10.5, 5.25]], "medians"
    top = norms.collections[1].get_paths()[0].get_extents()
    assert (top.ymin, top.ymax) == pytest.approx((1 / 12, 20)), "from the least to the greatest"
    (loss,) = drawn["loss"].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [run.curves["loss"].values for run in runs]
    assert (loss.get_yscale(), drawn["memory"].axes[0].get_ylim()[0]) == ("log", 0)
    assert len({axes.get_xlim() for figure in drawn.values() for axes in figure.axes}) == 1, "all lie below each other"
    legend = [text.get_text() for text in drawn["loss"].legends[0].get_texts()]
    assert legend == ["small", "large"]


def test_figures_of_one_run(several):
    """Members of a family share a panel, in the order of their numbers."""
    _, folder = several
    run = read_run(folder / "large", "large")
    run.config["data.validation"] = [{"name": "maths"}, {"name": "plain"}]
    drawn = {picture.name: picture for picture in pictures_of([run], ["large"])}
    assert len(drawn["update_size"].figure.axes) == len(drawn["phases"].figure.axes) == 1
    norms = drawn["slice_grad_norm"]
    assert [one.texts[0].splitlines()[0] for one in norms.series] == [str(i) for i in range(20)]
    legends = {name: [t.get_text() for one in p.figure.legends for t in one.get_texts()] for name, p in drawn.items()}
    assert legends["slice_grad_norm"] == ["0", "10", "19"]
    assert legends["validation"] == ["maths", "plain"]
    assert legends["loss"] == []


def test_every_figure_has_a_file_of_its_own():
    """Whatever a user's metrics are called."""
    pytest.importorskip("matplotlib")
    names = [
        "loss",
        "peak_memory_gib",
        "loss/aux",
        "Memory/x",
        "a b/x",
        "a-b/x",
        "a-b-2/x",
        "others/x",
        "/x",
        "é" * 300 + "/x",
    ]
    run = Run("run", Path(), {name: Curve([1, 2], [1.0, 2.0]) for name in names}, {}, [])
    drawn = [picture.name for picture in pictures_of([run], ["run"])]
    families = ["loss-2", "Memory-2", "a-b", "a-b-2", "a-b-2-2", "others-2", "family", "é" * 60]
    assert drawn == ["loss", *families, "memory"]


def test_the_page_is_whole_and_alone(several):
    text = several[0].read_text()
    assert_alone(text)
    page = Page(text)
    assert (page.tags.count("svg"), page.tags.count("table")) == (9, 2)
    said = [text for one in page.data["loss"] for text in one["texts"]]
    assert "large: num_adapters 20\nstep 3\nloss, nats per token 1.1" in said
    assert "<td>hdpissa" not in text
    assert "<th>hdpissa.num_adapters</th>" in text
    assert "<td>2.1 (step 12)</td>" in text


LOOK = """
const figures = [...document.querySelectorAll("figure")];
const hidden = figures.filter((figure) => figure.querySelector("svg").getBoundingClientRect().height < 100);
const boxes = figures.map((figure) => figure.getBoundingClientRect());
const overlapping = boxes.some((box, i) => i && box.top < boxes[i - 1].bottom);
const svg = document.querySelector("#loss svg");
const series = JSON.parse(document.querySelector("#loss script").textContent)[1];
const at = new DOMPoint(series.x[2], series.y[2]).matrixTransform(svg.getScreenCTM());
const point = (x, y) => svg.dispatchEvent(
  new PointerEvent("pointermove", {clientX: x, clientY: y, bubbles: true}));
point(at.x + 3, at.y - 3);
const said = document.getElementById("said"), box = said.getBoundingClientRect();
const before = getComputedStyle(said).display, text = said.textContent;
const inside = box.left >= 0 && box.right <= innerWidth && box.width > 40;
const shown = [...document.querySelectorAll("#memory .pointed.arm1")].length;
const faint = getComputedStyle(document.querySelector("#memory .arm0")).opacity;
svg.dispatchEvent(new PointerEvent("pointerleave"));
const style = getComputedStyle(document.body);
return {hidden: hidden.length, overlapping, before, text, inside, shown, faint: Number(faint) < 1,
  after: said.style.display, left: document.querySelectorAll(".pointed").length,
  wide: document.documentElement.scrollWidth > innerWidth, back: style.backgroundColor, ink: style.color,
  filter: getComputedStyle(svg).filter};
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(several, tmp_path, dark: bool):
    """What the pointer meets is named and shown in all figures; every figure has its place, in light and in dark."""
    found = look_at(several[0], LOOK, tmp_path, dark)
    assert (found["hidden"], found["overlapping"], found["wide"]) == (0, False, False)
    assert (found["before"], found["after"]) == ("block", "none")
    assert found["text"] == "large: num_adapters 20\nstep 3\nloss, nats per token 1.1"
    assert found["inside"]
    assert found["shown"] > 0, "the same run in another figure"
    assert found["left"] == 0
    assert (found["back"], found["ink"]) == (
        ("rgb(25, 25, 25)", "rgb(230, 230, 230)") if dark else ("rgb(255, 255, 255)", "rgb(26, 26, 26)")
    )
    assert ("invert" in found["filter"]) == dark


def test_without_matplotlib(several, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("run_plots.report.matplotlib_is_there", lambda: False)
    with pytest.raises(UserError, match=r"^matplotlib is missing, which draws: install titan_hd's extra `plots`"):
        plot([several[1] / "small"])
