"""How the tests call a program that lies in another process: values, and calls.

The tests run in one process (`Caller`), the program in another (`serve`). Between them pass plain values only: numbers,
texts, and the containers of Python. So the program cannot answer with an object that says it is equal to everything,
and nothing that it does to its own interpreter (builtins, frames, memory) is seen by the tests. An object of any
other class stays where it is; the tests hold a `Remote`, which can be called, iterated, and asked for attributes, and
which is equal to nothing but itself.

A message is its length (8 bytes) and JSON.
"""

from __future__ import annotations

import builtins
import collections
import decimal
import fractions
import json
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

LARGEST_MESSAGE = 16 * 2**20  # bytes
_LONGEST_ITERATION = 1_000_000  # values that a test takes from an iterator of the program

# (tag, class, to JSON, from JSON); the first class that a value is an instance of. A subclass (a Counter, a named
# tuple) travels as the plain class, to which Python finds it equal.
_SEQUENCES: list[tuple[str, type]] = [
    ("list", list),
    ("tuple", tuple),
    ("set", set),
    ("frozenset", frozenset),
    ("deque", collections.deque),
]
_ATOMS: list[tuple[str, type, Callable[[Any], Any], Callable[[Any], Any]]] = [
    ("complex", complex, lambda value: [value.real, value.imag], lambda data: complex(*data)),
    ("bytes", bytes, bytes.hex, bytes.fromhex),
    ("bytearray", bytearray, bytearray.hex, bytearray.fromhex),
    ("range", range, lambda value: [value.start, value.stop, value.step], lambda data: range(*data)),
    ("decimal", decimal.Decimal, str, decimal.Decimal),
    ("fraction", fractions.Fraction, str, fractions.Fraction),
]
_CLASSES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, dict)}


class ProgramError(Exception):
    """The program raised something that is no exception of Python's own, or broke the connection."""


def encode(value: Any, reference: Callable[[Any], int]) -> Any:
    """A value as JSON can hold it.

    reference: a number for an object of another class.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # JSON's decimals are limited to 4300 digits
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    for tag, kind in _SEQUENCES:
        if isinstance(value, kind):
            return [tag, [encode(item, reference) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, reference), encode(item, reference)] for key, item in value.items()]]
    for tag, kind, to_json, _ in _ATOMS:
        if isinstance(value, kind):
            return [tag, to_json(value)]
    if isinstance(value, type) and _CLASSES.get(value.__name__) is value:
        return ["class", value.__name__]
    return ["object", reference(value)]


def decode(data: Any, dereference: Callable[[int], Any]) -> Any:
    """The value that `encode` made `data` of; whatever else it is raises some exception."""
    if data is None or isinstance(data, (bool, float, str)):
        return data
    tag, content = data
    if tag == "int":
        return int(content, 16)
    if tag == "object":
        return dereference(content)
    if tag == "class":
        return _CLASSES[content]
    if tag == "dict":
        return {decode(key, dereference): decode(value, dereference) for key, value in content}
    for name, kind in _SEQUENCES:
        if name == tag:
            return kind(decode(item, dereference) for item in content)
    for name, _, _, from_json in _ATOMS:
        if name == tag:
            return from_json(content)
    raise ValueError(f"no such kind of value: {tag!r}")


def send(connection: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    if len(data) > LARGEST_MESSAGE:
        raise ValueError(f"a value of more than {LARGEST_MESSAGE} bytes")
    connection.sendall(len(data).to_bytes(8, "big") + data)


def receive(connection: socket.socket) -> Any:
    """The next message.

    Raises:
        EOFError: the other side has gone.
        ValueError: it is too large, or no JSON.
    """
    size = int.from_bytes(_receive_bytes(connection, 8), "big")
    if size > LARGEST_MESSAGE:
        raise ValueError(f"a value of more than {LARGEST_MESSAGE} bytes")
    return json.loads(_receive_bytes(connection, size))


def _receive_bytes(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 2**20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


# ---- the tests' side -------------------------------------------------------------------------------------------------


class Caller:
    """The tests' end of the connection."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def ask(self, action: str, *values: Any) -> Any:
        """Have the program's side do something, and return what came of it.

        Raises:
            Exception: what the program raised: an exception of Python's own as that, any other as a ProgramError.
            EOFError: the program's process has gone.
        """
        send(self._connection, [action, [encode(value, _number_of) for value in values]])
        kind, answer = receive(self._connection)
        if kind == "value":
            return decode(answer, lambda number: Remote(self, number))
        name, text = (str(part)[:300] for part in answer)
        raised = getattr(builtins, name, None)
        if isinstance(raised, type) and issubclass(raised, Exception) and raised is not StopIteration:
            try:
                error = raised(text)
            except TypeError:  # UnicodeDecodeError and its like want more than a text
                error = ProgramError(f"{name}: {text}")
            raise error
        raise ProgramError(f"{name}: {text}")

    def named(self, name: str) -> Callable[..., Any]:
        """A function or class of the program; looked up when it is called, so that a missing one fails its test."""
        return lambda *arguments, **options: self.ask("call_name", name, arguments, options)


def _number_of(value: Any) -> int:
    if type(value) is Remote:
        return object.__getattribute__(value, "_number")
    raise TypeError(f"a test gives the program a {type(value).__name__}, which cannot travel")


class Remote:
    """An object that lies in the program's process, as the tests hold it."""

    def __init__(self, caller: Caller, number: int):
        object.__setattr__(self, "_caller", caller)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._caller.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._caller.ask("set", self, name, value)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._caller.ask("call", self, arguments, options)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._caller.ask("items", self))

    def __len__(self) -> int:
        return self._caller.ask("length", self)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._caller.ask("call", self.__getattr__("__getitem__"), (key,), {})


# ---- the program's side ----------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Run the program that comes first, then what the tests ask for, until the connection ends."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their module up
    module.__dict__.update(exit=sys.exit, quit=sys.exit)  # `python -S` lacks them
    objects: list[Any] = []

    def reference(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def run(source: str) -> None:
        exec(compile(source, "<program>", "exec"), module.__dict__)

    def call_name(name: str, arguments: tuple, options: dict[str, Any]) -> Any:
        if name not in module.__dict__:
            raise NameError(f"the program defines no {name}")
        return module.__dict__[name](*arguments, **options)

    def items(value: Any) -> list[Any]:
        taken = []
        for item in value:
            taken.append(item)
            if len(taken) > _LONGEST_ITERATION:
                raise ValueError(f"an iterator of more than {_LONGEST_ITERATION} values")
        return taken

    actions: dict[str, Callable[..., Any]] = {
        "run": run,
        "call_name": call_name,
        "call": lambda target, arguments, options: target(*arguments, **options),
        "get": getattr,
        "set": setattr,
        "length": len,
        "items": items,
    }
    while True:
        try:
            action, values = receive(connection)
        except EOFError:
            return
        try:
            result = actions[action](*[decode(value, objects.__getitem__) for value in values])
            answer = ["value", encode(result, reference)]
        except BaseException as error:  # `exit()` of the program, too, is an answer: the test fails
            answer = ["error", [type(error).__name__, str(error)[:300]]]
        try:
            send(connection, answer)
        except (ValueError, MemoryError) as error:
            send(connection, ["error", [type(error).__name__, str(error)[:300]]])
