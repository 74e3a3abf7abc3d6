"""tools/rank_analysis.py: its tables hold numpy's singular values, and what it refuses has one line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy
import pytest
import rank_analysis
import torch
from safetensors.torch import save_file

from tests.kit import runs
from tests.kit.commands import call_tool, error_lines
from titan_hd.errors import UserError

EXACT = 1e-6  # of the largest singular value
SIZES = {"num_key_value_heads": 2, "hidden_size": 24}


def write_trained(folder: Path, base: Path, dtype: torch.dtype = torch.float32, files: int = 1) -> dict:
    """What a run might have come to: rank 2 in the attention, everything in the MLP; returns the weights as stored."""
    config, weights = runs.write_model(base, **SIZES)
    torch.manual_seed(1)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            out, width = weight.shape
            rank = 2 if "self_attn" in name else min(out, width)
            weights[name] = weight + 0.01 * torch.randn(out, rank) @ torch.randn(rank, width)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, places = sorted(weights), {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        save_file({name: weights[name] for name in names[i::files]}, folder / file)
        places |= dict.fromkeys(names[i::files], file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return weights


def analyse(base: Path, *arguments: object):
    return call_tool(rank_analysis.main, base, *arguments)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_numpys_singular_values(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    trained = write_trained(tmp_path / "one", base, files=3)
    start = runs.write_model(base, **SIZES)[1]
    result = analyse(base, tmp_path / "one", f"same={base}", "--output", out)
    assert result.returncode == 0, result.stderr

    found: dict[tuple[str, int, str], list[float]] = {}
    for row in rows(out / "spectrum.csv"):
        values = found.setdefault((row["run"], int(row["layer"]), row["kind"]), [])
        values.append(float(row["value"]))
        assert int(row["index"]) == len(values)
    assert len(found) == 2 * 2 * len(runs.LINEAR_LAYERS)
    ranks = {(row["run"], int(row["layer"]), row["kind"]): row for row in rows(out / "ranks.csv")}
    assert ranks.keys() == found.keys()
    for (run, layer, kind), values in found.items():
        name = f"model.layers.{layer}.{'mlp' if kind[0] in 'gud' else 'self_attn'}.{kind}.weight"
        row = ranks[run, layer, kind]
        if run == "same":
            assert not any(values)
            assert float(row["entropy"]) == float(row["stable"]) == float(row["above_floor"]) == 0
            continue
        delta = trained[name].double().numpy() - start[name].double().numpy()
        want = numpy.linalg.svd(delta, compute_uv=False)
        numpy.testing.assert_allclose(values, want, rtol=0, atol=EXACT * want[0])
        share = want / want.sum()
        assert float(row["largest"]) == pytest.approx(want[0])
        assert float(row["entropy"]) == pytest.approx(numpy.exp(-(share * numpy.log(share)).sum()))
        assert float(row["stable"]) == pytest.approx((want**2).sum() / want[0] ** 2)
        assert float(row["above"]) == (want > 1e-3 * want[0]).sum()
        assert float(row["relative_norm"]) == pytest.approx(numpy.linalg.norm(want) / start[name].norm().item())
        assert int(row["above_floor"]) == (2 if "self_attn" in name else len(want))
    lines = [line.split() for line in result.stdout.splitlines()]
    (query,) = (line for line in lines if line[:2] == ["one", "q_proj"])
    assert query[2:5] == ["24.0", "2.0", "2.0"]


def test_what_the_rounding_of_a_file_hides_is_said(tmp_path, caplog):
    """The same change from a file in bf16: rank 2 is lost among values that rounding makes."""
    write_trained(tmp_path / "one", tmp_path / "base", torch.bfloat16)
    with caplog.at_level(logging.WARNING, "titan_hd"):
        result = analyse(
            tmp_path / "base", tmp_path / "one", "--output", tmp_path, "--kinds", "q_proj", "--layers", "1"
        )
    assert result.returncode == 0, result.stderr
    (row,) = rows(tmp_path / "ranks.csv")
    assert (row["layer"], row["kind"], row["above_floor"]) == ("1", "q_proj", "2")
    assert float(row["above"]) > 10
    (line,) = (r.getMessage() for r in caplog.records if "rounding" in r.getMessage())
    assert "is in bfloat16" in line
    assert "export float32" in line


def test_pictures_or_one_warning(tmp_path, caplog):
    write_trained(tmp_path / "one", tmp_path / "base")
    with caplog.at_level(logging.WARNING, "titan_hd"):
        result = analyse(tmp_path / "base", tmp_path / "one", f"same={tmp_path / 'base'}", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    drawn = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    said = [r.getMessage() for r in caplog.records if "matplotlib" in r.getMessage()]
    assert (drawn, len(said)) in ((["layers.png", "ranks.png", "spectrum.png"], 0), ([], 1))
    assert any("no weight differs" in r.getMessage() for r in caplog.records)


def test_a_report_from_the_tables_alone(tmp_path, monkeypatch: pytest.MonkeyPatch):
    write_trained(tmp_path / "one", tmp_path / "base")
    out, again = tmp_path / "out", tmp_path / "again"
    first = analyse(tmp_path / "base", tmp_path / "one", f"same={tmp_path / 'base'}", "--output", out)
    second = call_tool(rank_analysis.main, "--report", out, "--output", again)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    for picture in out.glob("*.png"):
        assert (again / picture.name).read_bytes() == picture.read_bytes()

    def stop(spectrum: Path, *rest: object) -> None:
        assert spectrum.exists()
        raise UserError("stopped")

    monkeypatch.setattr(rank_analysis, "compute", stop)
    assert analyse(tmp_path / "base", tmp_path / "one", "--output", out).returncode == 2
    assert not (out / "ranks.csv").exists(), "the ranks of other spectra"


SPECTRUM = "run,layer,kind,index,value\na,0,q_proj,1,2.0\na,0,q_proj,2,1.0\na,0,q_proj,3,0.02\n"
RANKS = (
    "run,layer,kind,values,above,entropy,stable,largest,relative_norm,floor,above_floor\n"
    "a,0,q_proj,3,3,1.9,1.25,2.0,0.1,0.001,3\n"
)


def report_of(folder: Path, *options: object, spectrum: str = SPECTRUM, ranks: str = RANKS):
    for name, text in (("spectrum.csv", spectrum), ("ranks.csv", ranks)):
        (folder / name).write_text(text, encoding="latin-1")
    return call_tool(rank_analysis.main, "--report", folder, "--output", folder / "out", *options)


def test_a_report_counts_by_its_own_threshold(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The files were written with another one."""
    drawn = []
    monkeypatch.setattr(rank_analysis.rank_plots, "plot", lambda folder, deltas, *others: drawn.append(deltas))
    heading, row, _ = report_of(tmp_path, "--threshold", 0.1).stdout.splitlines()
    assert "> 0.1 max" in heading
    assert row.split()[:4] == ["a", "q_proj", "3.0", "2.0"]
    (delta,) = drawn[0]["a"]
    assert (delta.rank.above, delta.rank.entropy, delta.rank.stable) == (2, 1.9, 1.25)


def test_tables_that_are_none(tmp_path):
    def refused(*options: object, **files: str) -> str:
        (line,) = error_lines(report_of(tmp_path, *options, **files))
        return line.removeprefix("titan_hd: error: ").replace(f"{tmp_path}/", "")

    heading = RANKS.partition("\n")[0]
    cut = "has 2 of the 3 values of layer 0 q_proj of a; make both files again"
    assert refused(spectrum=SPECTRUM.rpartition("a,")[0]) == f"spectrum.csv: {cut}"
    assert refused(spectrum=SPECTRUM.partition("\n")[0]).startswith("spectrum.csv: has 0 of the 3 values of layer 0")
    assert refused(ranks=heading) == "ranks.csv: lacks layer 0 q_proj of a; make both files again"
    assert refused(ranks=heading, spectrum=SPECTRUM.partition("\n")[0]) == "ranks.csv: has no weight"
    assert refused(ranks="") == "ranks.csv: has no column run; it must be one that this tool wrote"
    numbers = "line 2: its columns layer, index, value must be numbers"
    assert refused(spectrum=SPECTRUM.replace("a,0", "a,x")) == f"spectrum.csv, {numbers}"
    assert refused(spectrum=SPECTRUM.replace("2.0", "much")) == f"spectrum.csv, {numbers}"
    assert refused(spectrum=SPECTRUM[:-7]).startswith("spectrum.csv, line 4: its columns layer,")
    assert refused(ranks=RANKS.replace("a,0", "\xe9,0")).startswith(
        "ranks.csv: cannot be read as a table: 'utf-8' codec"
    )
    for option in ("--kinds", "--layers", "--device"):
        assert refused(option, "0").startswith(f"{option}: says what is decomposed; --report draws all")
    assert refused("base").startswith("BASE: says what is decomposed")
    assert refused("base", "trained").startswith("give either BASE and TRAINED, or --report DIR")
    (tmp_path / "empty").mkdir()
    (line,) = error_lines(call_tool(rank_analysis.main, "--report", tmp_path / "empty", "--output", tmp_path / "out"))
    assert "spectrum.csv: is not there" in line
    (line,) = error_lines(call_tool(rank_analysis.main, "base", "--output", tmp_path / "out"))
    assert "give either BASE and TRAINED, or --report DIR" in line
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path):
    base, one = tmp_path / "base", tmp_path / "one"
    write_trained(one, base)
    runs.write_model(tmp_path / "deep", **SIZES, num_hidden_layers=3)
    runs.write_model(tmp_path / "wide", **(SIZES | {"intermediate_size": 40}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    weights = runs.write_model(tmp_path / "torn", **SIZES)[1]
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "torn" / "model.safetensors")

    def refused(*arguments: object) -> list[str]:
        return error_lines(analyse(base, *arguments, "--output", tmp_path / "out"))

    lines = refused(*(tmp_path / name for name in ("deep", "wide", "torn", "adapter", "nowhere")))
    wanted = (
        f"{tmp_path / 'deep'}: is another model than BASE: 3 blocks against 2",
        f"{tmp_path / 'wide'}: is another model than BASE: gate_proj is [40, 24] against [37, 24]",
        f"{tmp_path / 'torn'}: model.layers.1.mlp.up_proj.weight: is missing",
        f"{tmp_path / 'adapter'}: holds neither config.json (a HF directory) nor train_state.json (a checkpoint); it",
        f"{tmp_path / 'nowhere'}: holds neither config.json",
    )
    assert len(lines) == len(wanted)
    for line, start in zip(lines, wanted):
        assert line.startswith(f"titan_hd: error: {start}")
    assert refused(one, f"one={one}")[0].endswith(f"two of TRAINED are called 'one'; name them: NAME={one}")
    odd = tmp_path / "lr=0.1,seed=42"
    odd.mkdir()
    assert refused(odd)[0].startswith(f"titan_hd: error: {odd}: holds neither")
    assert refused(f"a name={odd}")[0].startswith(f"titan_hd: error: {odd}: holds neither")
    assert "--kinds: 'head' is none" in refused(one, "--kinds", "head")[0]
    assert "there is no 2" in refused(one, "--layers", "0,2")[0]
    assert "--mark: must be whole numbers" in refused(one, "--mark", "-1")[0]
    assert "--threshold: must be between 0 and 1" in refused(one, "--threshold", "1")[0]
    assert not (tmp_path / "out").exists()
