"""Reads the configuration: command line over TOML (with `base` inheritance) over defaults. Strict; reports all faults.

    python -m titan_hd.config.manager FILE [--section.key value ...]     prints the resolved configuration as TOML

Needs neither torch nor a process group, so that a fault costs a fraction of a second.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from titan_hd.config import job_config
from titan_hd.config.errors import UserError
from titan_hd.config.job_config import DataSource, JobConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(UserError):
    """One or more faults of the configuration; `errors` has one line for each."""

    def __init__(self, errors: list[str]):
        self.errors = errors
        super().__init__("\n".join(errors))


def load(argv: list[str]) -> JobConfig:
    """Resolve `[--config FILE] [--section.key value ...]` to a JobConfig.

    Raises:
        ConfigError: with one line per fault, each naming the key (and the file it stands in).
    """
    errors: list[str] = []
    path, overrides = _parse_argv(argv, errors)
    values: dict[str, tuple[Any, str]] = {}  # "section.key" -> (value, where it came from)
    if path:
        for name, section in _read_toml(Path(path), errors).items():
            where, table = section
            _flatten(name, table, where, values, errors)
    for key, text in overrides:
        values[key] = (text, "command line")
    config = _build(_renamed(values), errors)
    faulty = {line.partition(":")[0] for line in errors}  # these keys hold their defaults now
    if not errors and not config.job.print_plan:  # what a faulty source would have given is not missing
        errors += check_presence(config)
    errors += [line for line in check_combinations(config) if line.partition(":")[0] not in faulty]
    if errors:
        raise ConfigError(errors)
    return config


def from_toml(text: str, where: str) -> JobConfig:
    """A resolved configuration that was written by `to_toml`; where: what it came from. ConfigError as for `load`."""
    errors: list[str] = []
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{where}: its configuration is not valid TOML: {error}"]) from None
    values: dict[str, tuple[Any, str]] = {}
    for name, table in sections.items():
        _flatten(name, {key: (value, where) for key, value in table.items()}, where, values, errors)
    config = _build(_renamed(values), errors)
    if errors:
        raise ConfigError(errors)
    return config


def load_or_exit(argv: list[str]) -> JobConfig:
    """`load`; on `--help` prints it and exits 0, on faults prints one line each and exits 2."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    try:
        return load(argv)
    except ConfigError as error:
        exit_with(error.errors)


def exit_with(errors: list[str]) -> typing.NoReturn:
    """Print one line per user error and leave with status 2."""
    for line in errors:
        print(f"titan_hd: error: {line}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: command line and TOML


def _parse_argv(argv: list[str], errors: list[str]) -> tuple[str | None, list[tuple[str, str]]]:
    path, overrides, i = None, [], 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--"):
            errors.append(f"{word}: unexpected argument; options are written --section.key value")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if i < len(argv) and not argv[i].startswith("--"):
                value, i = argv[i], i + 1
            elif key == "config" or not _is_bool(key):
                errors.append(f"--{key}: needs a value")
                continue
            else:
                value = "true"  # a switch: --compile.enable
        if key == "config" and not value:
            errors.append("--config: needs a value")
        elif key == "config":
            path = value
        else:
            overrides.append((key, value))
    return path, overrides


def _read_toml(path: Path, errors: list[str], seen: tuple[Path, ...] = ()) -> dict[str, tuple[str, dict]]:
    """Sections of a TOML file over those of its `base`, each key with the file that set it."""
    if path.resolve() in seen:
        errors.append(f"{path}: base: inherits from itself")
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        where = f"{seen[-1]}: base" if seen else "--config"
        errors.append(f"{where}: cannot read {path}: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        errors.append(f"{path}: not valid TOML: {error}")
        return {}
    merged: dict[str, tuple[str, dict]] = {}
    base = table.pop("base", None)
    if isinstance(base, str):
        merged = _read_toml(path.parent / base, errors, (*seen, path.resolve()))
    elif base is not None:
        errors.append(f"{path}: base: must be the path of a TOML file")
    for name, section in table.items():
        if isinstance(section, dict):
            inherited = merged.get(name, (str(path), {}))[1]
            merged[name] = (str(path), {**inherited, **{k: (v, str(path)) for k, v in section.items()}})
        else:
            errors.append(f"{path}: {name}: must be a section, [{name}]")
    return merged


# Keys that were moved; their old names still work.
_RENAMED = {f"hdpissa.{key}": f"adapter.{key}" for key in ("svd", "svd_niter", "svd_cache")}


def _renamed(values: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Old names of keys replaced by the new ones, which win where both are given."""
    return {_RENAMED.get(key, key): value for key, value in values.items()} | {
        key: value for key, value in values.items() if key not in _RENAMED
    }


def _flatten(name: str, table: dict, where: str, values: dict, errors: list[str]) -> None:
    if name not in _fields(JobConfig):
        errors.append(f"{where}: [{name}]: unknown section{_hint(name, _fields(JobConfig))}")
        return
    for key, (value, source) in table.items():
        values[f"{name}.{key}"] = (value, source)


# ---------------------------------------------------------------------------------------------------------------------
# Typed values


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _is_bool(key: str) -> bool:
    section, _, name = key.partition(".")
    cls = _fields(JobConfig).get(section)
    return cls is not None and _fields(cls).get(name) is bool


def _hint(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _build(values: dict[str, tuple[Any, str]], errors: list[str]) -> JobConfig:
    config = JobConfig()
    sections = _fields(JobConfig)
    every_key = [f"{section}.{name}" for section, cls in sections.items() for name in _fields(cls)]
    for key, (value, where) in values.items():
        section, _, name = key.partition(".")
        if section not in sections or name not in _fields(sections[section]):
            errors.append(f"{key}: unknown key ({where}){_hint(key, every_key)}")
            continue
        annotation, from_text = _fields(sections[section])[name], where == "command line"
        if annotation == str | list[DataSource] and (not isinstance(value, str) or (from_text and _is_json(value))):
            setattr(getattr(config, section), name, _sources(key, value, where, errors))
            continue
        try:
            setattr(getattr(config, section), name, _coerce(value, annotation, from_text))
        except ValueError as error:
            errors.append(f"{key}: {error}, not {value!r} ({where})")
    return config


def _is_json(text: str) -> bool:
    """Whether a path on the command line is meant as a list: globs, too, may begin with a bracket."""
    return re.match(r"\s*\[\s*[\[{\"\]]", text) is not None


def _sources(key: str, value: Any, where: str, errors: list[str]) -> list[DataSource]:
    """data.train as a list of paths or tables; one line for every fault."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            errors.append(f"{key}: not valid JSON: {error} ({where})")
            return []
    if not isinstance(value, list) or not value:
        errors.append(f"{key}: must be a path, or a list of paths or tables that is not empty, not {value!r} ({where})")
        return []
    sources = []
    for place, entry in enumerate(value):
        name, source = f"{key}[{place}]", DataSource()
        sources.append(source)
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict):
            errors.append(f"{name}: must be a path or a table, not {entry!r} ({where})")
            continue
        if not entry.get("path"):
            errors.append(f"{name}.path: is missing ({where})")
        for field, given in entry.items():
            if field not in _fields(DataSource):
                errors.append(f"{name}.{field}: unknown key ({where}){_hint(field, _fields(DataSource))}")
                continue
            try:
                setattr(source, field, _coerce(given, _fields(DataSource)[field], False))
            except ValueError as error:
                errors.append(f"{name}.{field}: {error}, not {given!r} ({where})")
    return sources


def _coerce(value: Any, annotation: Any, from_text: bool) -> Any:
    """Check `value` against a field's type; text from the command line is parsed to it. ValueError says what fits."""
    if annotation == str | list[DataSource]:
        annotation = str  # the lists are read by `_sources`
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if from_text and value.lower() in ("none", ""):
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _coerce(value, inner, from_text)
    if origin is typing.Literal:
        if from_text and isinstance(args[0], int):
            value = _coerce(value, int, True)
        if not any(type(value) is type(a) and value == a for a in args):
            raise ValueError("must be " + " or ".join(json.dumps(a) for a in args))
        return value
    if origin is list:
        if from_text:
            value = _parse_list(value)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError("must be a list of strings")
        return value
    if annotation is bool:
        if from_text and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if annotation is str:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        return value
    return _number(value, annotation, from_text)


def _parse_list(text: str) -> Any:
    if not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError("must be a list of strings, as a,b or as JSON") from None


def _number(value: Any, annotation: type, from_text: bool) -> int | float:
    kind = "a whole number" if annotation is int else "a number"
    if from_text:
        try:
            value = annotation(value)
        except ValueError:
            raise ValueError(f"must be {kind}") from None
    if isinstance(value, bool) or not isinstance(value, (int,) if annotation is int else (int, float)):
        raise ValueError(f"must be {kind}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must fit into 64 bits")
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return annotation(value)


# ---------------------------------------------------------------------------------------------------------------------
# Ranges and combinations that need nothing but the configuration

_AT_LEAST = {
    "data.max_skipped": 0,
    "data.num_workers": 0,
    "data.num_proc": 0,
    "data.shuffle_window": 1,
    "training.steps": 1,
    "training.seq_len": 2,
    "training.local_batch_size": 1,
    "training.max_norm": 0,
    "training.gc_freq": 1,
    "training.seed": 0,
    "optimizer.lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "lr_scheduler.warmup_steps": 0,
    "adapter.rank": 1,
    "adapter.svd_niter": 0,
    "hdpissa.num_adapters": 0,
    "hdpissa.mute_scalar": 0,
    "hdpissa.factor_cache_gb": 0,
    "hdpissa.exchange_in_flight": 1,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.tensor_parallel_degree": 1,
    "profiling.profile_freq": 1,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "metrics.log_freq": 1,
    "validation.freq": 1,
    "validation.exact_match_samples": 0,
    "validation.batch_size": 0,
    "validation.max_new_tokens": 1,
}


_LORAS = ("lora", "pissa", "dora")
# Keys that ask for a variant of a method -> the methods that have it.
_VARIANTS = {
    "adapter.rslora": _LORAS,
    "adapter.loraplus_lr_ratio": _LORAS,
    "adapter.init": ("lora",),
    "adapter.mora_type": ("mora",),
    "adapter.bat_form": ("bat",),
}
# Keys that another method may inherit and does not use -> the methods that do.
_USED_BY = {
    "adapter.alpha": ("hdpissa", *_LORAS),
    "adapter.svd": ("hdpissa", "pissa"),
    "adapter.svd_niter": ("hdpissa", "pissa"),
    "adapter.svd_cache": ("hdpissa", "pissa"),
    **{f"hdpissa.{f.name}": ("hdpissa",) for f in dataclasses.fields(job_config.HDPissa)},
}


def ignored_keys(config: JobConfig) -> list[str]:
    """Keys that are set and that the method does not use, one line for all of them."""
    default, method = JobConfig(), config.adapter.method
    unused = [
        key for key, methods in _USED_BY.items() if method not in methods and _get(config, key) != _get(default, key)
    ]
    return [f"{', '.join(unused)}: not used by adapter.method {method}"] if unused else []


def _get(config: JobConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


# Methods that export.format = "peft" refuses, and why.
_NO_PEFT = {
    "hdpissa": "it changes W itself, by a matrix that is not of low rank",
    "full": "it has no adapters",
    "mora": "the library does not have it",
}


def check_presence(config: JobConfig) -> list[str]:
    """Keys that must be given and are not, one line each."""
    c = config
    no_model = not c.model.hf_assets_path and not (c.model.name and c.model.flavor)
    faults = {
        "training.steps: give either training.steps or training.epochs": (c.training.steps is None)
        == (c.training.epochs is None),
        "data.train: is missing; give the training records": not c.data.train,
        "model.hf_assets_path: is missing; give a HF directory, or model.name and model.flavor": no_model,
        "data.validation: is missing; validation.enable needs it": c.validation.enable and not c.data.validation,
    }
    return [line for line, fault in faults.items() if fault]


def check_combinations(config: JobConfig) -> list[str]:
    """Faults of single values and of combinations of keys, one line each."""
    errors = []

    def require(condition: bool, line: str) -> None:
        if not condition:
            errors.append(line)

    for key, least in _AT_LEAST.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        require(value is None or value >= least, f"{key}: must be at least {least}, not {value}")
    c = config
    require(c.training.epochs is None or c.training.epochs > 0, "training.epochs: must be above 0")
    gbs = c.training.global_batch_size
    require(gbs == -1 or gbs >= 1, f"training.global_batch_size: must be -1 or at least 1, not {gbs}")
    shard = c.parallelism.data_parallel_shard_degree
    require(shard == -1 or shard >= 1, f"parallelism.data_parallel_shard_degree: must be -1 or at least 1, not {shard}")
    context = c.parallelism.context_parallel_degree
    require(
        context == 1,
        f"parallelism.context_parallel_degree: must be 1, not {context}; for long sequences use "
        'parallelism.tensor_parallel_degree and activation_checkpoint.mode = "full"',
    )
    steps = c.validation.steps
    require(steps == -1 or steps >= 1, f"validation.steps: must be -1 or at least 1, not {steps}")
    require(
        c.lr_scheduler.warmup_steps is None or c.lr_scheduler.warmup_ratio is None,
        "lr_scheduler.warmup_ratio: give either warmup_steps or warmup_ratio",
    )
    for key in ("lr_scheduler.warmup_ratio", "lr_scheduler.min_lr_factor"):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        require(value is None or 0 <= value <= 1, f"{key}: must be between 0 and 1, not {value}")
    for key in ("optimizer.beta1", "optimizer.beta2", "adapter.dropout"):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        require(0 <= value < 1, f"{key}: must be at least 0 and below 1, not {value}")
    for key, methods in _VARIANTS.items():
        name = key.partition(".")[2]
        require(
            getattr(c.adapter, name) == getattr(job_config.Adapter(), name) or c.adapter.method in methods,
            f"{key}: is for {', '.join(methods)}, not for adapter.method {c.adapter.method}; leave it out",
        )
    require(c.adapter.loraplus_lr_ratio > 0, "adapter.loraplus_lr_ratio: must be above 0")
    require(c.adapter.alpha is None or c.adapter.alpha > 0, f"adapter.alpha: must be above 0, not {c.adapter.alpha}")
    if c.export.enable and c.export.format == "peft":
        reason = _NO_PEFT.get(c.adapter.method)
        require(reason is None, f"export.format: peft cannot hold method {c.adapter.method}: {reason}; use hf")
        require(
            c.adapter.method != "bat" or c.adapter.bat_form == "column",
            "export.format: peft has bat's column form alone, not adapter.bat_form row; use hf",
        )
        require(not c.model.flavor, "export.format: peft's adapter needs a base model; model.flavor has random weights")
    size = c.export.max_shard_size_gb
    require(size > 0, f"export.max_shard_size_gb: must be above 0, not {size}")
    require(c.adapter.target_modules != [], "adapter.target_modules: names no layer; leave it out for all")
    require(
        c.adapter.dropout == 0 or c.adapter.method != "full",
        f"adapter.dropout: method {c.adapter.method} has no adapters; set it to 0",
    )
    for key, folder in (("checkpoint.folder", c.checkpoint.folder), ("export.folder", c.export.folder)):
        require(
            os.path.normpath(folder) not in ("", ".", "..") and not os.path.normpath(folder).endswith("/.."),
            f"{key}: must name a folder of its own, not {folder!r}",
        )
    trains_all = c.adapter.method == "full" and c.adapter.target_modules is None
    require(
        c.checkpoint.base == "full" or (c.model.hf_assets_path and not c.model.flavor and not trains_all),
        "checkpoint.base: delta needs a base model in model.hf_assets_path (and no model.flavor), and a method that "
        "leaves some of its weights alone",
    )
    require(
        c.training.master_dtype == "float32" or c.adapter.method != "full",
        "training.master_dtype: bfloat16 is for methods that keep W frozen or fold into it, not for full (small "
        "updates would vanish)",
    )
    return errors + _check_sources(config)


def _check_sources(config: JobConfig) -> list[str]:
    """Faults of the tables in data.train and data.validation, and of keys that streaming excludes."""
    errors, streaming = [], config.data.streaming
    for key in ("train", "validation"):
        value = getattr(config.data, key)
        for place, source in enumerate(value if isinstance(value, list) else []):
            name, weight, samples = f"data.{key}[{place}]", source.weight, source.samples
            reason = (
                "validation reads every record once" if key == "validation" else "data.streaming reads all in order"
            )
            if key == "validation" or streaming:
                errors += [f"{name}.weight: {reason}; leave it out"] * (weight is not None)
                errors += [f"{name}.samples: {reason}; leave it out"] * (samples is not None)
            elif weight is not None and samples is not None:
                errors.append(f"{name}.samples: give either weight or samples")
            if weight is not None and weight <= 0:
                errors.append(f"{name}.weight: must be above 0, not {weight}")
            if samples is not None and samples < 1:
                errors.append(f"{name}.samples: must be at least 1, not {samples}")
    if streaming and config.data.pack:
        errors.append("data.pack: needs the lengths of all records, which data.streaming does not know; unset one")
    if streaming and config.training.epochs is not None:
        errors.append("training.epochs: data.streaming knows no length of an epoch; give training.steps")
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Documentation and printing


@functools.cache
def _field_docs() -> dict[str, dict[str, str]]:
    """Class name -> field -> the string literal under the field."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(job_config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = docs.setdefault(node.name, {})
        for statement, following in zip(node.body, node.body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                fields[statement.target.id] = " ".join(following.value.value.split())
    return docs


def help_text() -> str:
    """Every key with its type, default and documentation."""
    lines = ["usage: ./run_train.sh --config FILE [--section.key value ...]", ""]
    for section, cls in _fields(JobConfig).items():
        lines.append(f"[{section}]")
        for f in dataclasses.fields(cls):
            default = json.dumps(getattr(cls(), f.name))
            lines.append(f"  --{section}.{f.name}  ({f.type}; default {default})")
            lines.append(f"      {_field_docs()[cls.__name__][f.name]}")
        lines.append("")
    return "\n".join(lines)


def to_toml(config: JobConfig) -> str:
    """The resolved configuration as TOML; keys that are not set are left out."""
    lines = []
    for section, table in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in table.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists of strings are TOML, but for escapes beyond 16 bits and DEL. The
    tables of a list are written inline."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        tables = ({k: v for k, v in table.items() if v is not None} for table in value)
        pairs = (", ".join(f"{k} = {_toml_value(v)}" for k, v in table.items()) for table in tables)
        return "[" + ", ".join(f"{{ {table} }}" for table in pairs) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    print(to_toml(load_or_exit(argv)))


if __name__ == "__main__":
    main()
