"""Scores answers to benchmarks on local files, and says how sure the score is.

    python tools/evaluate.py --predictions FILE --data DIR --output DIR [--tasks gsm8k,boolq] [--against SAMPLES]

FILE has one JSON object a line, {"task": "gsm8k", "id": "0", "output": "..."}, from any system. The output directory
gets samples.jsonl (prompt, output, what was extracted, reference, right) and summary.json. docs/evaluation.md has the
tasks, their files and their protocols.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_hd.config import manager
from titan_hd.data.sources import Record
from titan_hd.errors import UserError
from titan_hd.evaluation import report, samples
from titan_hd.evaluation.code import open_sandbox
from titan_hd.evaluation.math_answers import has_math_verify
from titan_hd.evaluation.task import Problem, Task, find_source, load_problems
from titan_hd.evaluation.tasks import TASKS, own_task
from titan_hd.files import disk_faults, replace_file


def main() -> None:
    args = parse_arguments()
    try:
        run(args)
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: manager.exit_with([message])
    add = parser.add_argument
    add("--predictions", type=Path, help="outputs to score: JSONL of task, id and output")
    add("--tasks", help=f"of {', '.join(TASKS)}, with commas between them; default: those of --predictions")
    add("--data", type=Path, help="the directory with the files of the tasks")
    add("--source", action="append", default=[], metavar="TASK=PATH", help="a task's file, where it is not in --data")
    add("--records", metavar="PATH", help='a file of your own: the task "own"; needs --marker')
    add("--marker", help='what stands in front of the final answer in your own file, for example "The answer is: "')
    add("--prompt-field", default="prompt", help="its column with the question; default: prompt")
    add("--response-field", default="response", help="its column with the answer; default: response")
    add("--limit", type=int, help="only the first so many problems of each task")
    add("--against", type=Path, metavar="SAMPLES", help="samples.jsonl of another evaluation, or its directory")
    add("--output", type=Path, required=True, help="the directory for samples.jsonl and summary.json")
    add(
        "--allow-unsandboxed",
        action="store_true",
        help="humaneval, mbpp: run programs even where the kernel cannot shut them in: as you, with your files",
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Check what is cheap to check, score, report."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit: must be a whole number above 0, not {args.limit}")
    if args.predictions is None:
        raise UserError("--predictions: missing: a JSONL file of task, id and output")
    others = samples.read_outputs(args.against, "--against") if args.against else {}
    outputs = samples.read_outputs(args.predictions, "--predictions")
    tasks = chosen_tasks(args, tuple(dict.fromkeys(task for task, _ in outputs)))
    problems = read_problems(args, tasks)
    if any(task.runs_programs for task in tasks.values()):
        open_sandbox(args.allow_unsandboxed)
    rows = score_predictions(tasks, problems, outputs, args.limit)
    with disk_faults(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        write(args.output / samples.SAMPLES_FILE, "".join(map(samples.line, (row for t in tasks for row in rows[t]))))
    finish(args, rows, others)


def chosen_tasks(args: argparse.Namespace, default: tuple[str, ...]) -> dict[str, Task]:
    """The tasks by their names, in the order in which they are asked for.

    Raises:
        UserError: there is no such task; what the task "own" needs is missing.
    """
    known = dict(TASKS)
    if args.records is not None:
        if not args.marker:
            raise UserError('--marker: missing: what stands in front of the final answer, such as "The answer is: "')
        own = own_task(args.prompt_field, args.response_field, args.marker)
        known[own.name] = own
    elif args.marker:
        raise UserError("--marker: is for a file of your own; name it with --records")
    names = [name.strip() for name in args.tasks.split(",")] if args.tasks else [*default]
    if args.records is not None and "own" not in names:
        names.append("own")
    for name in names:
        if name not in known:
            hint = "; name its file with --records" if name == "own" else f"; known are {', '.join(TASKS)}"
            raise UserError(f"--tasks: there is no task {name!r}{hint}")
    if not names:
        raise UserError(f"--tasks: missing: some of {', '.join(TASKS)}, or a file of your own with --records")
    return {name: known[name] for name in names}


def read_problems(args: argparse.Namespace, tasks: Mapping[str, Task]) -> dict[str, list[Problem]]:
    """The problems of each task, the first --limit of them."""
    sources = {"own": args.records}
    for entry in args.source:
        name, equals, path = entry.partition("=")
        if not equals or name not in tasks:
            raise UserError(f"--source: must be TASK=PATH, with one of {', '.join(tasks)}, not {entry!r}")
        sources[name] = path
    if args.data is None and (missing := [name for name in tasks if name not in sources]):
        raise UserError(f"--data: missing: the directory with the file of {missing[0]}")
    return {
        name: load_problems(task, sources.get(name) or find_source(task, args.data), args.limit)
        for name, task in tasks.items()
    }


def score_predictions(
    tasks: Mapping[str, Task],
    problems: Mapping[str, list[Problem]],
    outputs: Mapping[samples.Key, Record],
    limit: int | None,
) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task; a problem without an output is not counted, and that is said."""
    rows = {}
    for name, task in tasks.items():
        rows[name], missing = samples.score_outputs(task, problems[name], outputs, partial=limit is not None)
        if missing:
            tell(f"warning: {name}: {missing} of {len(problems[name])} problems have no output, and are not counted")
    return rows


def finish(
    args: argparse.Namespace, rows: Mapping[str, list[dict[str, Any]]], others: Mapping[samples.Key, Record]
) -> None:
    """summary.json, and the table."""
    summary = {name: report.summarise(own) for name, own in rows.items()}
    if args.against:
        for name, own in rows.items():
            summary[name]["against"] = report.compare_samples(own, others, f"--against: {name}")
    if "math" in summary and not has_math_verify():
        tell("math: scored by Hendrycks' normalisation alone; math-verify is not installed (pip install math-verify)")
    with disk_faults(args.output):
        write(args.output / "summary.json", json.dumps({"tasks": summary}, indent=2) + "\n")
    print("\n".join(report.table(summary)))


def write(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def tell(line: str) -> None:
    print(f"titan_hd: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
