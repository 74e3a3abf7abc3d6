"""Who answers in tools/evaluate.py: its options, and the backend that they name."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluation_workers as workers
import torch
from generate import pick_device

from titan_hd.checkpoint.folder import STATE_FILE, read_train_state
from titan_hd.checkpoint.pretrained import load_pretrained, load_sharded
from titan_hd.components.generation import Sampling
from titan_hd.config.job_config import Data
from titan_hd.data.text.templates import template_file
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.text.tokenizer_base import Tokenizer, read_json
from titan_hd.errors import UserError
from titan_hd.evaluation import mt_bench
from titan_hd.evaluation.adapter_folder import base_model, is_adapter, load_adapter_tokenizer
from titan_hd.evaluation.answering import Alone, Crew
from titan_hd.evaluation.backends import Backend, NativeBackend, TransformersBackend
from titan_hd.evaluation.task import Task
from titan_hd.evaluation.vllm_backend import VllmBackend
from titan_hd.files import expand_home

BATCH_SIZE = {"native": 8, "transformers": 8, "vllm": 512}  # vllm makes its own batches of what it is given

# Options that are for asking a model, with what they are if they are not given.
_DEFAULTS = {
    **dict.fromkeys(("prompts", "max_new_tokens", "batch_size", "temperature", "top_p", "seed", "dtype", "device")),
    **{"backend": "native", "stop": [], "samples": 1, "assets": "", "shard_weights": False},
}

# How mt_bench is asked, whatever is said for the other tasks.
_MT_BENCH = {"prompts": "chat", "stop": [], "sampling": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("with a model").add_argument
    add("--backend", choices=[*BATCH_SIZE], default="native", help="who generates; default: native")
    add(
        "--prompts",
        type=expand_home,
        metavar="TEMPLATE",
        help="alpaca, pissa, chat, none or a file with {prompt}; default: the task's",
    )
    add("--max-new-tokens", type=int, metavar="N", help="default: the task's")
    add("--batch-size", type=int, metavar="N", help="default: 8; 512 with vllm, which makes its own batches of them")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer, and is no part of it; repeatable")
    add("--samples", type=int, default=1, metavar="N", help="so many answers to each problem; needs --temperature")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="draw tokens; default: the most probable ones, or the task's beams",
    )
    add("--top-p", type=float, metavar="P", help="draw of the fewest tokens that have this probability together")
    add("--seed", type=int, help="of what is drawn; default: 0")
    add(
        "--assets",
        type=expand_home,
        default="",
        help="the HF directory with config and tokenizer of a checkpoint, if not the run's; the model of an adapter",
    )
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="default: the GPU if there is one")
    add(
        "--shard-weights",
        action="store_true",
        help="with NGPU=n, for a model that one GPU does not hold: every process has a part of each weight",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and fill in what depends on others.

    Raises:
        UserError: names the option.
    """
    if args.model is None:
        has_answers = "--predictions" if args.predictions else "--judge-answers"
        for name, default in _DEFAULTS.items():
            if getattr(args, name) != default:
                raise UserError(f"{_option(name)}: is for asking a model; {has_answers} has its answers")
    elif args.backend != "transformers":
        _refuse_adapter(args.model)
    if not all(args.stop):
        raise UserError("--stop: must be a text: an empty one would end every answer at once")
    if args.temperature is None or args.temperature == 0:
        if args.samples > 1:
            raise UserError(f"--samples: {args.samples} answers without --temperature would all be the same")
        for name in ("top_p", "seed"):
            if getattr(args, name) is not None:
                raise UserError(f"{_option(name)}: is for tokens that are drawn: give --temperature")
    try:
        sampling_of(args)
    except UserError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    if args.shard_weights and args.backend != "native":
        raise UserError(f"--shard-weights: is for the native backend; {args.backend} shards by itself, or not at all")
    if args.shard_weights and processes(args) == 1:
        raise UserError("--shard-weights: there is one process alone; say with NGPU=n how many share the weights")
    if args.model is None and processes(args) > 1:
        workers.say_on_rank_zero("warning: NGPU: is for asking a model; outputs are scored by one process")
    args.batch_size = args.batch_size or BATCH_SIZE[args.backend]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_adapter(model: Path) -> None:
    """Raises:
    UserError: the directory has an adapter alone.
    """
    if is_adapter(model):
        raise UserError(
            f"{model}: is an adapter for the peft library, without its model: give the run's checkpoint, .../step-N, "
            "or what tools/convert_checkpoint.py makes of that; or export with export.format hf, merge it with peft, "
            "or take --backend transformers"
        )


def no_use_to_mt_bench(args: argparse.Namespace) -> list[str]:
    """The options given that change answers to tasks, but none to MT-Bench."""
    drawn = ("temperature", "top_p", "seed", "samples") if args.temperature else ()
    given = [name for name in (*drawn, "stop") if getattr(args, name) != _DEFAULTS[name]]
    return [_option(name) for name in given + (["prompts"] if args.prompts not in (None, "chat") else [])]


def in_words_of_run(args: argparse.Namespace, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
    """The tasks; a file of one's own with data.template of the checkpoint's run, without --prompts.

    Raises:
        UserError: the run's state, or the file of its template, cannot be read.
    """
    if "own" not in tasks or args.prompts is not None or not (args.model / STATE_FILE).is_file():
        return tasks
    template = _template_of_run(args.model)
    if template is None:
        why = "data of the run has no template, or several"
        workers.say_on_rank_zero(f"own: prompts are written by {tasks['own'].template}: {why}; --prompts names one")
        return tasks
    file = template_file(template)
    if file is not None and not file.is_file():
        raise UserError(f"--prompts: missing, and data.template of the run is not there: {template}")
    workers.say_on_rank_zero(
        f"own: prompts are written by data.template of the run, {template}; --prompts names another"
    )
    return {**tasks, "own": dataclasses.replace(tasks["own"], template=template)}


def _template_of_run(checkpoint: Path) -> str | None:
    """None: its records had none, or several."""
    data = read_train_state(checkpoint)["settings"].get("data", {})
    default, kind, sources = data.get("template", Data.template), data.get("format", Data.format), data.get("train")
    records = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else [{}]
    kinds = {source.get("format") or kind for source in records}
    if kinds == {"chat"}:
        return "chat"
    templates = {source.get("template") or default for source in records}
    return templates.pop() if len(templates) == 1 and kinds <= {"auto", "instruction"} else None


@contextlib.contextmanager
def named_by_options(args: argparse.Namespace) -> Iterator[None]:
    """Faults of the model or of the template name what was given here, not the keys of a run's configuration."""
    try:
        yield
    except UserError as error:
        key, colon, rest = str(error).partition(": ")
        options = {"model.hf_assets_path": "", "data.template": "--prompts: " if args.prompts else ""}
        raise UserError(f"{options[key]}{rest}" if colon and key in options else str(error)) from None


def processes(args: argparse.Namespace) -> int:
    """How many share the evaluation; vllm starts its own."""
    return 1 if args.backend == "vllm" else workers.wanted_processes()


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature or 0.0, 0, 1.0 if args.top_p is None else args.top_p, args.seed or 0)


def load(args: argparse.Namespace) -> tuple[Backend, Tokenizer, Crew]:
    """Who answers, the tokenizer, and with whom the batches are shared out.

    Raises:
        UserError: the model or its tokenizer cannot be used.
    """
    if args.backend == "vllm":
        return _load_vllm(args)
    device = pick_device(workers.own_device(args.device))
    crew: Crew = workers.join(device, args.shard_weights) if workers.is_worker() else Alone()
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    if args.backend == "transformers":
        return *_load_transformers(args, dtype, device), crew
    group = None
    if args.shard_weights:
        model, assets, group = load_sharded(args.model, args.assets, dtype, device)
    else:
        model, assets = load_pretrained(args.model, args.assets, dtype, device)
    tokenizer = _fitting(load_tokenizer(assets), model.config.vocab_size)
    return NativeBackend(model, device, group), tokenizer, crew


def _fitting(tokenizer: Tokenizer, rows: int | None) -> Tokenizer:
    """rows: of the model's embedding; None: not known. The message names the tokenizer's directory."""
    try:
        return tokenizer if rows is None else tokenizer.fitting(rows)
    except UserError as error:
        raise UserError(f"{tokenizer.directory}: {str(error).partition(': ')[2]}") from None


def _rows(directory: Path) -> int | None:
    """Of a HF model's embedding, if config.json says so where it usually does."""
    size = read_json(directory / "config.json").get("vocab_size")
    return size if isinstance(size, int) else None


def _load_transformers(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[TransformersBackend, Tokenizer]:
    adapter, directory = (args.model if is_adapter(args.model) else None), args.model
    if adapter:
        directory = base_model(adapter, args.assets)
        tokenizer = load_adapter_tokenizer(adapter, directory)
    else:
        _refuse_assets(args)
        tokenizer = load_tokenizer(directory)
    rows = _rows(directory)
    _fitting(tokenizer, rows)
    # The library looks its padding up too.
    pad_id = tokenizer.eos_id if rows is not None and tokenizer.pad_id >= rows else tokenizer.pad_id
    return TransformersBackend(directory, dtype, device, pad_id, adapter), tokenizer


def _load_vllm(args: argparse.Namespace) -> tuple[Backend, Tokenizer, Crew]:
    _refuse_assets(args)
    if args.device is not None:
        raise UserError("--device: vllm takes the GPUs that CUDA_VISIBLE_DEVICES shows; NGPU=n says how many of them")
    gpus = workers.wanted_processes() if os.environ.get("NGPU") else max(1, torch.cuda.device_count())
    dtype = getattr(torch, args.dtype) if args.dtype else None
    tokenizer = _fitting(load_tokenizer(args.model), _rows(args.model))
    return VllmBackend(args.model, dtype, gpus, args.stop), tokenizer, Alone()


def _refuse_assets(args: argparse.Namespace) -> None:
    if args.assets:
        raise UserError(f"--assets: is for a checkpoint, which {args.backend} cannot read")


def settings(
    args: argparse.Namespace, fingerprints: Mapping[str, str], questions: Sequence[mt_bench.Question]
) -> dict[str, Any]:
    """All that an answer depends on, for evaluation.json: an evaluation goes on only with the same. How many processes
    share it is none of that. Folders in the model's are not looked into: --output may be one of them."""
    model = args.model.resolve()
    files = sorted(((path, path.stat()) for path in model.iterdir() if path.is_file()), key=lambda file: file[0])
    stamps = repr([(str(path), status.st_size, status.st_mtime_ns) for path, status in files])
    drawn = {key: getattr(args, key) for key in ("samples", "temperature", "top_p", "seed")}
    own_template = args.prompts is not None and template_file(args.prompts) is not None
    return {
        "model": str(model),
        "model_files": _number(stamps),
        "assets": args.assets and str(Path(args.assets).resolve()),
        **{key: getattr(args, key) for key in ("backend", "dtype", "device")},
        "prompts": str(Path(args.prompts).resolve()) if own_template else args.prompts,
        "stop": args.stop,
        **{key: getattr(args, key) for key in ("limit", "max_new_tokens", "batch_size")},
        "sampling": drawn if args.temperature else None,
        "tasks": fingerprints,
        "mt_bench": {"questions": _number(repr(questions)), **_MT_BENCH} if questions else None,
    }


def _number(text: str) -> str:
    """A number that another text does not have."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
