"""Which directions a training has changed: singular values and effective ranks of dW, weight by weight.

    python tools/rank_analysis.py BASE TRAINED [TRAINED ...] --output DIR
    python tools/rank_analysis.py assets/hf/Llama-3.1-8B lora=outputs/lora/checkpoint/step-800 outputs/hdpissa/hf \\
        --output outputs/ranks --kinds q_proj,down_proj --mark 256

BASE and TRAINED are Hugging Face directories or checkpoints of a run, .../step-N (W with its adapter merged in; what a
"delta" checkpoint leaves out is BASE's). TRAINED may be NAME=PATH. One weight is in memory at a time, in float64.

    python tools/rank_analysis.py --report DIR --output PICTURES

makes the table and the pictures again from the CSV files in DIR alone, by the --threshold and --mark of this call.

The output directory gets spectrum.csv (run, layer, kind, index, value: every singular value of dW), ranks.csv (a row
for each weight) and, with matplotlib (the extra `plots`), spectrum.png (mean spectra by kind of layer), layers.png
(effective rank of every layer) and ranks.png (means side by side). docs/ranks.md explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from compare import rank_plots
from compare.delta_rank import (
    DeltaRank,
    WeightDelta,
    Weights,
    count_above,
    linear_weights,
    mean_ranks,
    weight_deltas,
)
from generate import pick_device

from titan_hd.checkpoint.pretrained import open_pretrained
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.console import Progress, tell
from titan_hd.errors import UserError
from titan_hd.files import disk_faults, user_path
from titan_hd.models.model_config import ModelConfig
from titan_hd.process.streams import keep_streams

logger = logging.getLogger("titan_hd")

# Parts of a path that say where in a run's folder the weights lie, not which run it is.
_PLACES = ("hf", "checkpoint")
_RANK_COLUMNS = ("values", "above", "entropy", "stable", "largest", "relative_norm", "floor", "above_floor")


class Run(NamedTuple):
    """One TRAINED: its name in the tables, and its weights."""

    name: str
    path: Path
    weights: Weights


def main() -> None:
    keep_streams()  # what counts is in the files, and decomposing takes long
    args = parse_arguments()
    logging.basicConfig(format="titan_hd: warning: %(message)s", level=logging.WARNING)
    try:
        report(args) if args.report else analyse(args)
    except UserError as error:
        manager.exit_with(str(error).splitlines())


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("base", type=user_path, nargs="?", metavar="BASE", help="what the training started from")
    add("trained", nargs="*", metavar="TRAINED", help="what it came to: a directory, a checkpoint, or NAME=PATH of one")
    add("--report", type=user_path, metavar="DIR", help="a directory of an earlier --output: draw its tables again")
    add("--output", type=user_path, required=True, metavar="DIR", help="the directory for tables and pictures")
    add(
        "--threshold",
        type=float,
        default=1e-3,
        metavar="SHARE",
        help="share of the largest value that counts; default: 1e-3",
    )
    add("--kinds", default="", help="only these layers, for example q_proj,down_proj; default: all seven")
    add("--layers", default="", help="only these blocks, for example 0,15,31; default: all")
    add("--mark", default="", help="ranks that the spectra show as a line, for example 16,256 (r, and 2 * K * r)")
    add("--device", help="default: the GPU if there is one")
    args = parser.parse_args()
    if bool(args.report) == bool(args.trained):
        parser.error("give either BASE and TRAINED, or --report DIR")
    of_an_analysis = {"BASE": args.base, "--kinds": args.kinds, "--layers": args.layers, "--device": args.device}
    if args.report and (given := [name for name, value in of_an_analysis.items() if value]):
        parser.error(f"{given[0]}: says what is decomposed; --report draws all that is in its directory")
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold: must be between 0 and 1, not {args.threshold:g}")
    return args


def report(args: argparse.Namespace) -> None:
    """Table and pictures from the CSV files of an earlier run."""
    marks = _numbers(args.mark, "--mark")
    deltas = read_deltas(args.report, args.threshold)
    print(table(deltas, args.threshold))
    with disk_faults(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        rank_plots.plot(args.output, deltas, args.threshold, marks)


def analyse(args: argparse.Namespace) -> None:
    """Open everything, so that what is wrong is said at once; then compute, write and print."""
    marks, layers = (_numbers(getattr(args, option), f"--{option}") for option in ("mark", "layers"))
    config, weights, directory = open_pretrained(args.base, "")
    kinds = [kind for kind in args.kinds.split(",") if kind]
    if strangers := [kind for kind in kinds if kind not in config.linear_shapes()]:
        raise UserError(f"--kinds: {strangers[0]!r} is none; there are {', '.join(config.linear_shapes())}")
    if layers and max(layers) >= config.num_hidden_layers:
        raise UserError(f"--layers: the blocks are 0 to {config.num_hidden_layers - 1}, there is no {max(layers)}")
    names = linear_weights(config, kinds, layers)
    base = Run("BASE", args.base, weights)
    runs, device = open_runs(args.trained, config, directory), pick_device(args.device)
    with disk_faults(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        measure = functools.partial(
            weight_deltas, base.weights, config=config, names=names, threshold=args.threshold, device=device
        )
        (args.output / "ranks.csv").unlink(missing_ok=True)  # of an earlier analysis: it would not go with the spectra
        deltas = compute(args.output / "spectrum.csv", runs, measure, len(names))
        write_ranks(args.output / "ranks.csv", deltas)
        print(table(deltas, args.threshold))
        for run in runs:
            say_what_limits(base, run, deltas[run.name])
        rank_plots.plot(args.output, deltas, args.threshold, marks)


def _numbers(text: str, option: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option}: must be whole numbers with commas between them, not {text!r}")
    return list(map(int, parts))


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def open_runs(texts: list[str], config: ModelConfig, base: Path) -> list[Run]:
    """Every TRAINED, named, and found to be a model of BASE's sizes.

    base: the HF directory of the base model; it has what "delta" checkpoints leave out.

    Raises:
        UserError: one line for every fault of any of them.
    """
    errors, runs = [], []
    for text in texts:
        name, path = _named(text)
        try:
            is_checkpoint = not (path / "config.json").is_file()
            theirs, weights, _ = open_pretrained(path, str(base) if is_checkpoint else "")
            errors += [f"{path}: is another model than BASE: {line}" for line in _differences(config, theirs)]
            runs.append(Run(name, path, weights))
        except UserError as error:
            errors += [line.replace("--assets: ", "BASE: ") for line in str(error).splitlines()]
        if [run.name for run in runs].count(name) > 1:
            errors.append(f"{path}: two of TRAINED are called {name!r}; name them: NAME={path}")
    if errors:
        raise UserError("\n".join(errors))
    return runs


def _named(text: str) -> tuple[str, Path]:
    """Name and path of PATH or NAME=PATH. A path may have a "=" itself, as those of compare_methods.py have."""
    name, equals, rest = text.partition("=")
    whole = user_path(text)
    if not equals or "/" in name or whole.exists():
        return _default_name(whole), whole
    return name, user_path(rest)


def _default_name(path: Path) -> str:
    """The last part of a path that says which run it is: lora of outputs/lora/checkpoint/step-800."""
    parts = [p for p in path.resolve().parts if p not in _PLACES and not p.removeprefix("step-").isdecimal()]
    return parts[-1]


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Sizes of the linear layers that differ."""
    if ours.num_hidden_layers != theirs.num_hidden_layers:
        return [f"{theirs.num_hidden_layers} blocks against {ours.num_hidden_layers}"]
    pairs = ((kind, theirs.linear_shapes()[kind], shape) for kind, shape in ours.linear_shapes().items())
    return [f"{kind} is {list(its)} against {list(shape)}" for kind, its, shape in pairs if its != shape][:1]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def compute(
    path: Path, runs: list[Run], measure: Callable[..., Iterator[WeightDelta]], weights: int
) -> dict[str, list[WeightDelta]]:
    """Every weight of every run; each spectrum goes into spectrum.csv when it is known. index counts from 1."""
    deltas: dict[str, list[WeightDelta]] = {run.name: [] for run in runs}
    bar = Progress("decomposing", len(runs) * weights, "weights", said=tell, always=True)
    with open(path, "w", newline="", encoding="utf-8") as file, bar:
        writer = csv.writer(file)
        writer.writerow(("run", "layer", "kind", "index", "value"))
        for run in runs:
            bar.note = run.name
            for delta in measure(run.weights):
                values = enumerate(delta.values.tolist(), start=1)
                writer.writerows((run.name, delta.layer, delta.kind, index, f"{v:.10e}") for index, v in values)
                file.flush()
                deltas[run.name].append(delta)
                bar.update()
    return deltas


def write_ranks(path: Path, deltas: dict[str, list[WeightDelta]]) -> None:
    """A row for each weight of each run."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "layer", "kind", *_RANK_COLUMNS))
        for name, found in deltas.items():
            for d in found:
                row = (d.rank.above, d.rank.entropy, d.rank.stable, d.values[0].item(), d.rank.relative_norm, d.floor)
                numbers = (len(d.values), *(f"{value:.8g}" for value in row), d.above_floor)
                writer.writerow((name, d.layer, d.kind, *numbers))


def read_deltas(folder: Path, threshold: float) -> dict[str, list[WeightDelta]]:
    """What `compute` and `write_ranks` wrote, as far as the CSV files have it.

    threshold: share of the largest value that counts now, whatever it was when the files were written.

    Raises:
        UserError: one of the two is not there, is not such a file, or lacks what the other has.
    """
    spectrum, ranks = folder / "spectrum.csv", folder / "ranks.csv"
    found: dict[tuple[str, int, str], list[float]] = {}
    deltas: dict[str, list[WeightDelta]] = {}
    for run, layer, kind, (_, value) in _rows(spectrum, ("index", "value")):
        found.setdefault((run, layer, kind), []).append(value)
    for run, layer, kind, numbers in _rows(ranks, _RANK_COLUMNS):
        of = dict(zip(_RANK_COLUMNS, numbers))
        values = torch.tensor(found.pop((run, layer, kind), []), dtype=torch.float64)
        if not 0 < len(values) == of["values"]:
            lacks = f"has {len(values)} of the {of['values']:.0f} values of layer {layer} {kind} of {run}"
            raise UserError(f"{spectrum}: {lacks}; make both files again")
        rank = DeltaRank(count_above(values, threshold), of["entropy"], of["relative_norm"], of["stable"])
        deltas.setdefault(run, []).append(WeightDelta("", layer, kind, values, rank, of["floor"]))
    for run, layer, kind in found:
        raise UserError(f"{ranks}: lacks layer {layer} {kind} of {run}; make both files again")
    if not deltas:
        raise UserError(f"{ranks}: has no weight")
    return deltas


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, int, str, list[float]]]:
    """run, layer, kind, and the numbers of these columns of every row."""
    if not path.is_file():
        raise UserError(f"{path}: is not there; --report takes a directory that this tool wrote")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for column in ("run", "layer", "kind", *columns):
                if column not in (reader.fieldnames or ()):
                    raise UserError(f"{path}: has no column {column}; it must be one that this tool wrote")
            for row in reader:
                try:
                    layer, numbers = int(row["layer"]), [float(row[column]) for column in columns]
                except (TypeError, ValueError):
                    named = ", ".join(("layer", *columns))
                    raise UserError(f"{path}, line {reader.line_num}: its columns {named} must be numbers") from None
                yield row["run"], layer, row["kind"], numbers
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table: {error}") from None


def table(deltas: dict[str, list[WeightDelta]], threshold: float) -> str:
    """Means over the blocks by kind of layer, and over all."""
    width = max(map(len, deltas)) + 2
    heads = ("values", f"> {threshold:g} max", "> floor", "entropy", "stable", "dW / W", "floor / max")
    lines = [f"{'run':<{width}}{'kind':<10}" + "".join(f"{head:>13}" for head in heads)]
    for name, found in deltas.items():
        for kind, rank in mean_ranks(found).items():
            of = [d for d in found if kind in (d.kind, "all")]
            values = sum(len(d.values) for d in of) / len(of)
            sure = sum(d.above_floor for d in of) / len(of)
            floors = [d.floor / d.values[0].item() for d in of if d.values[0] > 0]
            floor = f"{sum(floors) / len(floors):>13.1e}" if floors else f"{'-':>13}"
            numbers = (values, rank.above, sure, rank.entropy, rank.stable)
            numbers = "".join(f"{number:>13.1f}" for number in numbers)
            lines.append(f"{name:<{width}}{kind:<10}{numbers}{rank.relative_norm:>13.2e}{floor}")
    return "\n".join(lines)


def say_what_limits(base: Run, run: Run, deltas: list[WeightDelta]) -> None:
    """Warn, once for each run, of what would make its small singular values mean nothing."""
    changed = [d for d in deltas if d.values[0] > 0]
    if not changed:
        logger.warning("%s: no weight differs from %s", run.path, base.path)
        return
    ours, theirs = (str(side.weights.dtype(changed[0].name)).removeprefix("torch.") for side in (base, run))
    if theirs != "float32":
        floor = sum(d.floor / d.values[0].item() for d in changed) / len(changed)
        logger.warning(
            "%s: is in %s, whose rounding alone can make a dW of full rank with singular values up to %.1e of the "
            "largest: smaller ones, and ranks that count them, mean nothing; export float32",
            *(run.path, theirs, floor),
        )
    elif ours != "float32":
        logger.warning(
            "%s: is in %s, %s in float32: dW is exact if that run started from these very files; had it started from "
            "finer ones, their rounding would be in dW",
            *(base.path, ours, run.path),
        )


if __name__ == "__main__":
    main()
