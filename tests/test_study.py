"""docs/study.md and the script of its runs: parts and arms exist, and the tables say what the CSV files say."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import compare_methods
import pytest
import rank_analysis
from compare.arms import parse_arms, parse_grid
from compare.outcome import Arm, read_outcome

from tests.kit.commands import REPOSITORY, call_tool
from titan_hd.adapters.methods import METHODS
from titan_hd.config import manager

STUDY = REPOSITORY / "docs" / "study"
SCRIPT = (STUDY / "run.sh").read_text(encoding="utf-8")
PARTS = re.findall(r"^(\w+)\)", SCRIPT, re.MULTILINE)
TEXT = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def test_every_part_that_a_text_names_exists():
    texts = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs").glob("*.md")}
    named = {(path.name, part) for path, text in texts.items() for part in re.findall(r"study/run\.sh\s+(\w+)", text)}
    assert len(named) > 5
    assert {(page, part) for page, part in named if part not in (*PARTS, "PART")} == set()
    head = SCRIPT[: SCRIPT.index("set -euo")].replace("\n#", "")
    (told,) = re.findall(r"Parts: (.*?)\. ", head)
    assert re.sub(r" \(.*?\)", "", told).split(", ") == PARTS, "what the head of the script says"


def commands_of(part: str, folder: Path) -> list[list[str]]:
    """What the script would start: it runs with a Python that only writes its arguments down."""
    python, said = folder / "python", folder / "said"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ printf "%s\\n" "$@"; echo; }} >>"{said}"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    subprocess.run([STUDY / "run.sh", part], env=environment, check=True, timeout=60)
    return [command.splitlines() for command in said.read_text().removesuffix("\n\n").split("\n\n")]


@pytest.mark.parametrize("part", PARTS)
def test_the_arms_of_every_part_are_arms(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    for tool, *words in commands_of(part, tmp_path):
        if tool == "tools/rank_analysis.py":
            monkeypatch.setattr(rank_analysis, "analyse", lambda args: print(*args.trained))
            arms = {path.split("/")[-3] for path in call_tool(rank_analysis.main, *words).stdout.split()}
            assert arms
            assert arms <= {row.name for row in read_outcome(STUDY / "quickstart").arms.values()}
            continue
        assert tool == "tools/compare_methods.py"
        monkeypatch.setattr("sys.argv", [tool, *words])
        args, argv = compare_methods.parse_arguments()
        grid = parse_grid(args.grid)
        arms = parse_arms(args.methods, grid)
        assert args.baseline in {arm.name for arm in arms}
        for arm in arms:
            values = arm.changes | {key: axis.values[0] for key, axis in arm.axes.items()}
            manager.load([*argv, *(f"--{key}={value}" for key, value in values.items()), "--job.print_plan=true"])


# ---------------------------------------------------------------------------------------------------------------------
# The tables


class Table(NamedTuple):
    """One that states best rates: the folder that its section names last before it, and column -> text of each row."""

    folder: Path
    rows: list[dict[str, str]]


_NAMED = {"arm": "arm", "best rate": "rate", "validation loss": "loss", "exact match": "match"}  # how a heading begins


def tables(text: str) -> Iterator[Table]:
    for found in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heading, _, *lines = ([cell.strip(" *") for cell in line[1:-1].split("|")] for line in found[0].splitlines())
        columns = [next((name for start, name in _NAMED.items() if cell.startswith(start)), "") for cell in heading]
        section = re.split(r"^#", text[: found.start()], flags=re.MULTILINE)[-1]
        folders = [STUDY / name for name in re.findall(r"docs/study/(\w+)", section) if (STUDY / name).is_dir()]
        if folders and {"arm", "rate", "loss"} <= set(columns):
            yield Table(folders[-1], [dict(zip(columns, line)) for line in lines])


def fits(cell: str, arm: Arm) -> bool:
    """Whether the first cell of a row may mean this arm: by the method (hdpissa if none is named) and all settings."""
    method = re.split(r"\W", cell.lstrip("`*").lower())[0]
    settings = re.findall(r"(\w+) ?= ?([\w.+-]+)", cell)
    of = [re.sub(r"^\w+\.", "", setting) for setting in arm.name.split("+")]  # without the section
    numbers = arm.complete(arm.best)[0].numbers
    short = {"K": "num_adapters", "r": "rank"}
    return of[0] == (method if method in METHODS else "hdpissa") and all(
        f"{key}={value}" in of if key not in short else numbers[short[key]] == float(value) for key, value in settings
    )


def agrees(cell: str, value: float) -> bool:
    """To the last digit that is written."""
    written = Decimal(re.match(r"[\d.]+(?:e[+-]?\d+)?", cell)[0])
    return abs(written - Decimal(value)) <= Decimal(5).scaleb(written.as_tuple().exponent - 1) * Decimal("1.001")


def told(row: dict[str, str], arm: Arm) -> bool:
    """Whether a row says what this arm came to at its best rate."""

    def mean(column: str) -> float:
        return statistics.fmean(arm.by_seed(arm.best, column).values())

    return (
        agrees(row["rate"], float(arm.best[0]))
        and agrees(row["loss"], mean("validation_loss"))
        and ("match" not in row or agrees(row["match"], 100 * mean("validation_exact_match")))
    )


def wrong_rows(text: str) -> list[str]:
    """Rows with a rate that say what no arm of the folder came to."""
    wrong = []
    for folder, rows in tables(text):
        arms = [arm for arm in read_outcome(folder).arms.values() if arm.best]
        for row in (row for row in rows if row["rate"][:1].isdigit()):
            if not any(fits(row["arm"], arm) and told(row, arm) for arm in arms):
                wrong.append(f"{folder.name}: {' | '.join(row.values())}")
    return wrong


def test_the_tables_say_what_the_files_say():
    assert [*tables(TEXT)]
    assert wrong_rows(TEXT) == []


def test_a_wrong_row_is_found():
    heading = "| arm | best rate of five | validation loss | exact match |\n|---|--:|--:|--:|\n"
    row = f"docs/study/quickstart\n\n{heading}| {{}} |\n"
    for good in (
        "lora r = 64 (rsLoRA) | 1.6e-3 | 0.0177 | 89.8%",
        "**hdpissa K = 8 r = 8** | 6e-3 | 0.1146 | 40%",
        "`slices = random` | 2.4e-2, the largest tried | 0.048 (0.003) | 68.7%",
        "pissa | not run | |",
    ):
        assert wrong_rows(row.format(good)) == [], good
    for bad in (
        "lora r = 64 (rsLoRA) | 1.5e-3 | 0.0177 | 89.8%",
        "lora r = 64 (rsLoRA) | 1.6e-3 | 0.0178 | 89.8%",
        "lora r = 64 (rsLoRA) | 1.6e-3 | 0.0177 | 89.0%",
        "lora r = 8 (rsLoRA) | 1.6e-3 | 0.0177 | 89.8%",
        "hdpissa K = 1 r = 8 | 6e-3 | 0.1146 | 40.2%",
        "`slices = top` | 2.4e-2 | 0.0478 | 68.7%",
    ):
        assert len(wrong_rows(row.format(bad))) == 1, bad
