"""The one exception that means: the user can mend this; and how several of them are told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in configuration, data, checkpoint or mesh. The message is one line for each fault, which names the key
    or the file; it is shown without a traceback, and the exit status is 2. Any other exception is a bug of ours."""


class Faults(list[str]):
    """Lines of what is at fault, collected before they are told together."""

    def attempt(self, function: Callable[..., T], *args: object) -> T | None:
        """What the function returns; None, and one more line for each of its faults, where it raises `UserError`."""
        try:
            return function(*args)
        except UserError as error:
            self.extend(str(error).splitlines())
            return None
