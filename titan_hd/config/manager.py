"""Reads the configuration: command line over TOML (with `base` inheritance) over defaults. Strict; reports all faults.

    python -m titan_hd.config.manager FILE [--section.key value ...]     prints the resolved configuration as TOML

Needs neither torch nor a process group, so that a fault costs a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_hd.bundle import RECIPES, ROOT
from titan_hd.config.checks import check_combinations, check_presence
from titan_hd.config.job_config import DataSource, JobConfig
from titan_hd.config.keys import every_key, fields, help_text, hint, kind_of
from titan_hd.console import painted, printable
from titan_hd.errors import UserError
from titan_hd.files import expand_home

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
    return _resolve(path, [(key, text, "command line") for key, text in overrides], errors)


def load_file(path: str | os.PathLike | None, overrides: Mapping[str, Any]) -> JobConfig:
    """Resolve a file (None: the defaults alone) and values of Python by "section.key": a path may be a Path, and None
    unsets a key that can be unset. ConfigError as for `load`."""
    values = [(key, _plain(value), "argument") for key, value in overrides.items()]
    return _resolve(None if path is None else os.fspath(path), values, [])


def _plain(value: Any) -> Any:
    """Paths as strings, tuples as lists, also inside of lists and tables."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _resolve(path: str | None, overrides: list[tuple[str, Any, str]], errors: list[str]) -> JobConfig:
    """overrides: (key, value, where it came from). errors: those so far."""
    values: dict[str, tuple[Any, str]] = {}  # "section.key" -> (value, where it came from)
    if path:
        for name, section in _read_toml(Path(_expanded("--config", path, errors)), errors).items():
            where, table = section
            _flatten(name, table, where, values, errors)
    for key, value, where in overrides:
        values[key] = (value, where)
    config = _build(_renamed(values), errors)
    faulty = {line.partition(":")[0] for line in errors}  # these keys hold their defaults now
    if not errors and (
        config.job.dry_run or not config.job.print_plan
    ):  # what a faulty source would have given is not missing
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
    """`load`; on `--help [SECTION ...]` prints it and exits 0, on faults prints one line each and exits 2."""
    try:
        topics = _help_topics(argv)
        if topics is not None:
            print(help_text(topics))
            raise SystemExit(0)
        return load(argv)
    except UserError as error:
        exit_with(str(error).splitlines())


def _help_topics(argv: list[str]) -> list[str] | None:
    """What help is asked for: names of sections or keys, none for all of it; None if it is not asked for."""
    for place, word in enumerate(argv):
        option, _, topic = word.partition("=")
        if option in ("--help", "-h"):
            following = itertools.takewhile(lambda word: not word.startswith("-"), argv[place + 1 :])
            return [name for name in (topic, *following) if name not in ("", "all")]
    return None


def exit_with(errors: list[str]) -> typing.NoReturn:
    """Print one line per user error and leave with status 2."""
    print_errors(errors)
    raise SystemExit(2)


def print_errors(errors: typing.Iterable[str]) -> None:
    """One line for each on the standard error."""
    for line in errors:
        print(f"{painted('titan_hd: error:', 'red')} {printable(line)}", file=sys.stderr)


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
            elif key == "config" or not _is_bool(key.replace("-", "_")):
                errors.append(f"--{key}: needs a value")
                continue
            else:
                value = "true"  # a switch: --compile.enable
        if key == "config" and not value:
            errors.append("--config: needs a value")
        elif key == "config":
            path = value
        else:
            overrides.append((key.replace("-", "_") if "." in key else key, value))
    return path, overrides


def _read_toml(path: Path, errors: list[str], seen: tuple[Path, ...] = ()) -> dict[str, tuple[str, dict]]:
    """Sections of a TOML file over those of its `base`, each key with the file that set it."""
    if path.resolve() in seen:
        errors.append(f"{path}: base: inherits from itself")
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin it with a byte order mark
    except OSError as error:
        where = f"{seen[-1]}: base" if seen else "--config"
        errors.append(f"{where}: cannot read {path}: {error.strerror}")
        return {}
    except UnicodeDecodeError:
        errors.append(f"{path}: not valid TOML: it is not UTF-8; save it as that")
        return {}
    except tomllib.TOMLDecodeError as error:
        errors.append(f"{path}: not valid TOML: {error}")
        return {}
    merged: dict[str, tuple[str, dict]] = {}
    base = table.pop("base", None)
    if isinstance(base, str):
        base = _expanded(f"{path}: base", base, errors)
        beside = path.parent / base
        if not beside.exists() and path.is_symlink():  # the file was linked to here, and not what it inherits from
            beside = path.resolve().parent / base
        merged = _read_toml(beside, errors, (*seen, path.resolve()))
    elif base is not None:
        errors.append(f"{path}: base: must be the path of a TOML file")
    for name, section in table.items():
        if isinstance(section, dict):
            inherited = merged.get(name, (str(path), {}))[1]
            merged[name] = (str(path), {**inherited, **{k: (v, str(path)) for k, v in section.items()}})
        else:
            errors.append(f"{path}: {name}: must be a section, [{name}]")
    return merged


def _expanded(key: str, path: str, errors: list[str]) -> str:
    try:
        return expand_home(path)
    except ValueError as error:
        errors.append(f"{key}: {error}, not {path!r}")
        return path


# Keys that were moved; their old names still work.
_RENAMED = {f"hdpissa.{key}": f"adapter.{key}" for key in ("svd", "svd_niter", "svd_cache")}


def _renamed(values: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Old names of keys replaced by the new ones, which win where both are given."""
    return {_RENAMED.get(key, key): value for key, value in values.items()} | {
        key: value for key, value in values.items() if key not in _RENAMED
    }


def _flatten(name: str, table: dict, where: str, values: dict, errors: list[str]) -> None:
    if name not in fields(JobConfig):
        errors.append(f"{where}: [{name}]: unknown section{hint(name, fields(JobConfig))}")
        return
    for key, (value, source) in table.items():
        values[f"{name}.{key}"] = (value, source)


# ---------------------------------------------------------------------------------------------------------------------
# Typed values

# Keys that name a file or a folder (or may): all are relative to the folder that the command is called in, and may
# begin with ~, which no shell replaces in --key=~/path, in a file, or in quotes.
PATHS = {
    "job.dump_folder",
    "model.hf_assets_path",
    "data.train",
    "data.validation",
    "data.template",
    "data.cache_dir",
    "adapter.svd_cache",
    "checkpoint.folder",
    "export.folder",
    "profiling.save_memory_snapshot_folder",
    "profiling.save_traces_folder",
    "data.train[].path",
    "data.train[].template",
}


# Those of them that are read, and nothing is written to.
_READ = {"model.hf_assets_path", "data.train", "data.validation", "data.template"}
_READ |= {"data.train[].path", "data.train[].template"}


def _path(key: str, value: Any, where: str) -> Any:
    """A value of PATHS with ~ expanded. What a bundled recipe reads, and what is bundled with it, is found from any
    folder; one of that name in the current folder comes first."""
    path = expand_home(value) if isinstance(value, str) else value
    if path and key in _READ and not os.path.lexists(path) and os.path.isfile(where):
        bundled = ROOT / path
        if Path(where).resolve().is_relative_to(RECIPES) and bundled.exists():
            return str(bundled)
    return path


def _is_bool(key: str) -> bool:
    section, _, name = key.partition(".")
    cls = fields(JobConfig).get(section)
    return cls is not None and fields(cls).get(name) is bool


def _build(values: dict[str, tuple[Any, str]], errors: list[str]) -> JobConfig:
    config = JobConfig()
    sections = fields(JobConfig)
    for key, (value, where) in values.items():
        section, _, name = key.partition(".")
        if section not in sections or name not in fields(sections[section]):
            errors.append(f"{key}: unknown key ({where}){hint(key, [*every_key(), 'config', 'help'])}")
            continue
        annotation, from_text = fields(sections[section])[name], where == "command line"
        if annotation == str | list[DataSource] and (not isinstance(value, str) or (from_text and _is_json(value))):
            setattr(getattr(config, section), name, _sources(key, value, where, errors))
            continue
        try:
            value = _coerce(value, annotation, from_text)
            setattr(getattr(config, section), name, _path(key, value, where) if key in PATHS else value)
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
            if field not in fields(DataSource):
                errors.append(f"{name}.{field}: unknown key ({where}){hint(field, fields(DataSource))}")
                continue
            try:
                given = _coerce(given, fields(DataSource)[field], False)
                path = f"data.train[].{field}"
                setattr(source, field, _path(path, given, where) if path in PATHS else given)
            except ValueError as error:
                errors.append(f"{name}.{field}: {error}, not {given!r} ({where})")
    return sources


def _coerce(value: Any, annotation: Any, from_text: bool) -> Any:
    """Check `value` against a field's type; text from the command line is parsed to it. ValueError says what fits."""
    if annotation == str | list[DataSource]:
        annotation = str  # the lists are read by `_sources`
    origin, args, kind = typing.get_origin(annotation), typing.get_args(annotation), f"must be {kind_of(annotation)}"
    if origin in (typing.Union, types.UnionType):
        if value is None or (from_text and value.lower() in ("none", "")):
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _coerce(value, inner, from_text)
    if origin is typing.Literal:
        if from_text and isinstance(args[0], int):
            value = _coerce(value, int, True)
        if not any(type(value) is type(a) and value == a for a in args):
            raise ValueError(kind)
        return value
    if origin is list:
        if from_text:
            value = _parse_list(value, kind)
        if not isinstance(value, list):
            raise ValueError(kind)
        try:
            return [_coerce(item, args[0], from_text and isinstance(item, str)) for item in value]
        except ValueError:
            raise ValueError(kind) from None
    if annotation is bool:
        if from_text and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError(kind)
        return value
    if annotation is str:
        if not isinstance(value, str):
            raise ValueError(kind)
        return value
    return _number(value, annotation, from_text)


def _parse_list(text: str, kind: str) -> Any:
    if not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{kind}, as a,b or as JSON") from None


def _number(value: Any, annotation: type, from_text: bool) -> int | float:
    kind = f"must be {kind_of(annotation)}"
    if from_text:
        try:
            value = annotation(value)
        except ValueError:
            raise ValueError(kind) from None
    if isinstance(value, bool) or not isinstance(value, (int,) if annotation is int else (int, float)):
        raise ValueError(kind)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must fit into 64 bits")
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return annotation(value)


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
