"""Asks a model the questions of benchmarks on local files, scores its answers, and says how sure the score is.

    python tools/evaluate.py MODEL --tasks gsm8k,boolq --data DIR --output DIR
    python tools/evaluate.py --predictions FILE --data DIR --output DIR [--against SAMPLES]
    NGPU=4 python tools/evaluate.py MODEL ...        on four GPUs, each with the whole model (or --shard-weights)

MODEL is a HF directory or a checkpoint of a run, .../step-N. The output directory gets samples.jsonl as the answers
come (prompt, output, what was extracted, reference, right) and summary.json; the same command goes on where one was
killed. --predictions scores the outputs of any system in place of a model: one JSON object a line, {"task": "gsm8k",
"id": "0", "output": "..."}. docs/evaluation.md has the tasks, their files and their protocols, and MT-Bench's judge.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluation_backends as backends
import evaluation_judge
import evaluation_tracking as tracking
import evaluation_workers as workers

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.console import Progress
from titan_hd.data.sources import Record
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError
from titan_hd.evaluation import answering, mt_bench, report, samples, scoring
from titan_hd.evaluation.backends import Backend
from titan_hd.evaluation.code import open_sandbox
from titan_hd.evaluation.math_answers import has_math_verify
from titan_hd.evaluation.prompts import batches, fingerprint, several, write_prompts
from titan_hd.evaluation.task import Problem, Task, find_source, load_problems
from titan_hd.evaluation.tasks import TASKS, own_task
from titan_hd.files import disk_faults, expand_home, replace_file, user_path

MT_BENCH_IS_ASKED = "mt_bench is asked once, greedily, through the chat template, and its answers end by themselves"


def main() -> None:
    args = parse_arguments()
    rank = workers.rank()
    logging.basicConfig(format="titan_hd: warning: %(message)s", level=logging.ERROR if rank else logging.WARNING)
    if workers.is_worker():
        workers.run_worker(lambda: run(args))
    try:
        run(args)
    except (UserError, FloatingPointError) as error:
        manager.exit_with(str(error).splitlines())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("model", type=user_path, nargs="?", help="a HF directory, or a checkpoint's folder, .../step-N")
    add("--predictions", type=user_path, help="in place of a model, outputs to score: JSONL of task, id and output")
    add(
        "--tasks",
        help=f"of {', '.join((*TASKS, mt_bench.NAME))}, with commas between them; default: those of --predictions",
    )
    add("--data", type=user_path, help="the directory with the files of the tasks")
    add("--source", action="append", default=[], metavar="TASK=PATH", help="a task's file, where it is not in --data")
    add("--records", type=expand_home, metavar="PATH", help='a file of your own: the task "own"; needs --marker')
    add("--marker", help='what stands in front of the final answer in your own file, for example "The answer is: "')
    add("--prompt-field", default="prompt", help="its column with the question; default: prompt")
    add("--response-field", default="response", help="its column with the answer; default: response")
    add("--limit", type=int, help="only the first so many problems of each task")
    add("--against", type=user_path, metavar="SAMPLES", help="samples.jsonl of another evaluation, or its directory")
    add("--output", type=user_path, required=True, help="the directory for samples.jsonl and summary.json")
    add(
        "--allow-unsandboxed",
        action="store_true",
        help="humaneval, mbpp: run programs even where the kernel cannot shut them in: as you, with your files",
    )
    backends.add_arguments(parser)
    evaluation_judge.add_arguments(parser)
    tracking.add_arguments(parser)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Check what is cheap to check, ask or read, score, report."""
    for name in ("limit", "max_new_tokens", "batch_size", "samples", "judge_requests"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be a whole number above 0, not {value}")
    if [args.model, args.predictions, args.judge_answers].count(None) != 2:
        raise UserError(
            "a model or --predictions, one of them, is needed: who answers? (for mt_bench: --judge-answers)"
        )
    tracking.check(args)
    backends.check(args)
    if args.judge_answers:
        judge_answers(args)
        return
    others = samples.read_outputs(args.against, "--against") if args.against else {}
    outputs = samples.read_outputs(args.predictions, "--predictions") if args.predictions else {}
    tasks, with_mt_bench = chosen_tasks(args, tuple(dict.fromkeys(task for task, *_ in outputs)))
    useless = backends.no_use_to_mt_bench(args) if with_mt_bench else []
    if useless and not tasks:
        raise UserError(f"{useless[0]}: is for other tasks; {MT_BENCH_IS_ASKED}")
    sources = find_sources(args, tasks, with_mt_bench)
    problems = {name: load_problems(task, sources[name], args.limit) for name, task in tasks.items()}
    if args.against and not tasks:
        raise UserError("--against: compares scores of tasks; mt_bench has none")
    for name, own in problems.items() if args.against else ():
        report.check_others(name, own, others, "--against")
    questions = mt_bench.read_questions(sources[mt_bench.NAME], args.limit) if with_mt_bench else []
    judge = evaluation_judge.prepare(args, questions)
    if any(task.runs_programs for task in tasks.values()):
        open_sandbox(args.allow_unsandboxed)
    judged = None
    if args.predictions:
        if (args.output / answering.SETTINGS_FILE).exists():
            raise UserError(f"--output: {args.output} has answers of a model; name another directory for these scores")
        every = {name: known_ids(task, problems[name], sources[name], args.limit) for name, task in tasks.items()}
        rows = score_predictions(args, tasks, problems, outputs, every)
    elif not workers.is_worker() and backends.processes(args) > 1:
        workers.start(backends.processes(args), args.device, args.output, sys.argv[1:])  # which come here again
        return
    else:
        with backends.named_by_options(args):
            rows, judged = ask(args, tasks, problems, questions, judge)
    if workers.rank() == 0:
        finish(args, tasks, rows, others, judged)


def judge_answers(args: argparse.Namespace) -> None:
    """Have another system's answers to MT-Bench judged."""
    if args.tasks not in (None, mt_bench.NAME) or args.against:
        raise UserError("--judge-answers: has answers to mt_bench alone")
    source = find_sources(args, {}, True)[mt_bench.NAME]
    questions = mt_bench.read_questions(source, args.limit)
    judge = evaluation_judge.prepare(args, questions)
    assert judge, "prepare refuses answers without a service"
    finish(args, {}, {}, {}, judge.judge(args.output, questions, args.judge_answers, show_progress))


def chosen_tasks(args: argparse.Namespace, default: tuple[str, ...]) -> tuple[dict[str, Task], bool]:
    """The tasks by their names, in the order in which they are asked for; and whether MT-Bench, which has no score, is.

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
    everything = ", ".join((*TASKS, mt_bench.NAME))
    with_mt_bench = mt_bench.NAME in names
    if with_mt_bench and args.predictions:
        raise UserError("--tasks: mt_bench has no score of its own: a judge reads the answers of a model")
    names = [name for name in names if name != mt_bench.NAME]
    for name in names:
        if name not in known:
            hint = "; name its file with --records" if name == "own" else f"; known are {everything}"
            raise UserError(f"--tasks: there is no task {name!r}{hint}")
    if not names and not with_mt_bench:
        raise UserError(f"--tasks: missing: some of {everything}, or a file of your own with --records")
    return {name: known[name] for name in names}, with_mt_bench


def find_sources(args: argparse.Namespace, tasks: Mapping[str, Task], with_mt_bench: bool) -> dict[str, str]:
    """Where the problems of each task are: as --source and --records say, else in --data."""
    places = {name: task.files for name, task in tasks.items()} | (
        {mt_bench.NAME: mt_bench.FILES} if with_mt_bench else {}
    )
    sources = {"own": args.records} if args.records is not None else {}
    for entry in args.source:
        name, equals, path = entry.partition("=")
        if not equals or name not in places:
            raise UserError(f"--source: must be TASK=PATH, with one of {', '.join(places)}, not {entry!r}")
        sources[name] = expand_home(path)
    missing = [name for name in places if name not in sources]
    if args.data is None and missing:
        raise UserError(f"--data: missing: the directory with the file of {missing[0]}")
    return sources | {name: find_source(name, places[name], args.data) for name in missing}


def ask(
    args: argparse.Namespace,
    tasks: Mapping[str, Task],
    problems: Mapping[str, list[Problem]],
    questions: list[mt_bench.Question],
    judge: evaluation_judge.Judging | None,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any] | None]:
    """Samples of each task, by the model; a file with its answers to MT-Bench, and what the judge gives them."""
    tasks = backends.in_words_of_run(args, tasks)
    useless = backends.no_use_to_mt_bench(args) if questions else []
    if useless:
        tell(f"warning: {', '.join(useless)}: not for mt_bench, only for the other tasks; {MT_BENCH_IS_ASKED}")
    for name in {args.prompts or task.template for task in tasks.values()}:
        load_template(name)
    backend, tokenizer, crew = backends.load(args)
    if questions:
        load_chat_template(tokenizer)  # refused before anything is asked
    prompts = {
        name: write_prompts(task, problems[name], load_template(args.prompts or task.template, tokenizer), tokenizer)
        for name, task in tasks.items()
    }
    plan = [batch for name in tasks for batch in batches(several(prompts[name], args.samples), args.batch_size)]
    fingerprints = {name: fingerprint(own) for name, own in prompts.items()}
    settings = backends.settings(args, fingerprints, questions)
    with disk_faults(args.output):
        crew.agree(lambda: answering.agree_on_settings(args.output, settings))
        if plan:
            limit, sampling = args.max_new_tokens, backends.sampling_of(args)
            show_progress(answering.answer(args.output, plan, backend, tokenizer, limit, args.stop, sampling, crew))
        judged = None
        with crew.led(backend) as leading:
            if questions and leading:
                judged = ask_mt_bench(args, questions, leading, tokenizer, judge)
    if not plan or not crew.writes:
        return {}, judged
    return read_samples(args.output, tasks), judged


def ask_mt_bench(
    args: argparse.Namespace,
    questions: list[mt_bench.Question],
    backend: Backend,
    tokenizer: Tokenizer,
    judge: evaluation_judge.Judging | None,
) -> dict[str, Any] | None:
    """Its answers in a file, and what the judge gives them; without one, what to run."""
    name = args.model.resolve().name
    path = args.output / "mt_bench" / "model_answer" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    limit = args.max_new_tokens or mt_bench.MAX_NEW_TOKENS
    show_progress(mt_bench.answer(path, questions, name, backend, tokenizer, args.batch_size, limit))
    tell(f"mt_bench: {len(questions)} questions are answered in {path}")
    if judge:
        return judge.judge(args.output, questions, path, show_progress)
    tell(
        "mt_bench: to judge them give the same command with --judge-url URL --judge-model NAME; or copy the file into "
        "FastChat's fastchat/llm_judge/data/mt_bench/model_answer and run there: "
        f"python gen_judgment.py --model-list {name}"
    )
    return None


def show_progress(progress: Iterator[answering.Progress]) -> None:
    """A bar for each task, with problems per second and the time that is left, and tokens per second behind it."""
    last = None
    with contextlib.ExitStack() as shown:
        bar = None
        for last in progress:
            if bar is None or bar.what != last.task:
                shown.close()
                bar = Progress(last.task, last.total, "problems", said=tell, done=last.done, always=True)
                shown.enter_context(bar)
            if last.tokens:
                bar.note = f"{last.tokens / last.seconds:.1f} tokens/s"
            bar.update(last.done - bar.done)
    if last is not None and last.tokens:
        rate = last.tokens / last.seconds
        tell(f"{last.tokens} tokens in {last.seconds:.1f} s, {rate:.1f} tokens/s")


def score_predictions(
    args: argparse.Namespace,
    tasks: Mapping[str, Task],
    problems: Mapping[str, list[Problem]],
    outputs: Mapping[samples.Key, Record],
    every: Mapping[str, Collection[str]],
) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task; a problem without an output is not counted, and that is said.

    every: the ids of all problems of each task, of which `problems` may be the first.

    Raises:
        UserError: an output is of a problem that there is not, or a task has no output.
    """
    plan, warnings = [], []
    for name, task in tasks.items():
        answers, missing = samples.find_answers(task, problems[name], outputs, every[name])
        if not answers:
            raise UserError(f"--predictions: has no output of {name} to any of the {missing} problems")
        plan.append((task, answers))
        if missing:
            warnings.append(f"{name}: {missing} of {len(problems[name])} problems have no output, and are not counted")
    for warning in warnings:
        tell(f"warning: {warning}")
    with disk_faults(args.output):
        show_progress(scoring.score(args.output, plan, (args.marker, args.allow_unsandboxed, has_math_verify())))
    return read_samples(args.output, tasks)


def known_ids(task: Task, problems: list[Problem], source: str, limit: int | None) -> set[str]:
    """The ids of all problems of a task, of which `problems` are the first `limit`."""
    return {problem.id for problem in (problems if limit is None else load_problems(task, source))}


def read_samples(output: Path, tasks: Mapping[str, Task]) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task that are written there."""
    found = samples.read_outputs(output, "--output")
    return {name: [dict(row) for (task, *_), row in found.items() if task == name] for name in tasks}


def finish(
    args: argparse.Namespace,
    tasks: Mapping[str, Task],
    rows: Mapping[str, list[dict[str, Any]]],
    others: Mapping[samples.Key, Record],
    judged: dict[str, Any] | None,
) -> None:
    """summary.json, the table, and wandb if it is asked for."""
    summary = {name: report.summarise(tasks[name], own) for name, own in rows.items()}
    if args.against:
        for name, own in rows.items():
            summary[name]["against"] = report.compare_samples(own, others, f"--against: {name}")
    if "math" in summary and not has_math_verify():
        tell("math: scored by Hendrycks' normalisation alone; math-verify is not installed (pip install math-verify)")
    if not summary and judged is None:
        return
    content = {"tasks": summary} | ({mt_bench.NAME: judged} if judged else {})
    with disk_faults(args.output):
        write(args.output / "summary.json", json.dumps(content, indent=2) + "\n")
    print("\n".join([*(report.table(summary) if summary else []), *(report.judged_table(judged) if judged else [])]))
    tracking.log(args, summary | ({mt_bench.NAME: judged} if judged else {}), rows)


def write(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def tell(line: str) -> None:
    workers.say_on_rank_zero(line)


if __name__ == "__main__":
    main()
