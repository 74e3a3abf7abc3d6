"""The command lines of the tools: one parser for all of them, so that they take options alike and fail alike.

An option's words may be joined by dashes or by underscores; a mistyped one is answered with the nearest; every fault is
one line, with exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from titan_hd.config import manager
from titan_hd.config.keys import every_key, hint
from titan_hd.console import silence_libraries


class ToolParser(argparse.ArgumentParser):
    """argparse's parser with the rules above; options are added with dashes.

    description: the tool's docstring, with examples, shown by --help as it stands. Settings are argparse's.
    """

    def __init__(self, description: str | None = None, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **settings)

    # pyrefly: ignore[bad-override]: an overload for each kind of namespace would say no more
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(_with_dashes(words)), namespace)

    # pyrefly: ignore[bad-override]
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's. Where there is no terminal the libraries draw no bars from now on: a tool has begun."""
        silence_libraries()
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0], self._options())
        return found

    def parse_with_run_options(self, args: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """As `parse_args`: the tool's options, and those of a run (--config, --section.key), which the configuration
        checks."""
        silence_libraries()
        found, rest = self.parse_known_args(args)
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name != "--config":
                self._refuse(name, [*self._options(), "--config", *(f"--{key}" for key in every_key())])
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Leave with one line and status 2, where argparse prints the usage, too."""
        manager.exit_with([f"{message}; --help shows how"])

    def _refuse(self, word: str, known: Iterable[str]) -> NoReturn:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{word}: unexpected argument")
        self.error(f"{name}: unknown option{hint(name, known)}")

    def _options(self) -> Iterator[str]:
        """Names of all options, those of commands within the tool too."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._options()


def _with_dashes(words: Iterable[str]) -> Iterator[str]:
    """Names of options as they are added; a run's keys (--section.key), values and what follows "--" as they are."""
    options = True
    for word in words:
        options = options and word != "--"
        name, equals, value = word.partition("=")
        renamed = options and name.startswith("--") and "." not in name
        yield name.replace("_", "-") + equals + value if renamed else word
