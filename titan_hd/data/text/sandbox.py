"""Jinja for templates that nobody has vetted: nothing outside the data is reached, and time and memory are bounded.

A chat template comes with a downloaded model, so it is a program by a stranger. jinja2's sandbox keeps it away from
Python's internals, but not from looping for ever or from allocating without end. Here every pass of a loop, every
operation and every value that is made is charged to one budget per rendering, and each charge looks at the clock; a
value that would grow beyond MAX_SIZE is refused before it is made; and only filters and text methods whose cost grows
as their arguments do are there, so that no single operation takes long: the arguments of the others are kept small.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SIZE = 4_000_000  # of one value, in characters; a chat of 128k tokens is well below a million
MAX_TOTAL = 20_000_000  # of all values that one rendering makes, in characters
MAX_SECONDS = 10.0  # of one rendering; a template takes well under a millisecond
_STEP = 50  # what a call or a pass of a loop costs, in characters
_ELEMENT = 16  # what an element of a list or a mapping costs, in characters: it takes more memory
_BITS = 64  # of an integer: no arithmetic takes long, and beyond 61 bits integers can be made to collide in a dict
_SHORT = 100  # characters of an argument that multiplies the time an operation takes

_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float groupby indent int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim "
    "unique upper wordcount"
)
_TEXT_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper"
)
_LONG_ARGUMENTS = ("d", "default", "join", "replace")  # filters; those of all others are names, separators, numbers
_SCANS = ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip")  # text times argument, at worst


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates: transformers' settings, `tojson` and `{% generation %}`, within bounds."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    intercepted_unops = frozenset(("+", "-"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,  # nothing may be computed while compiling, where the budget does not run
            finalize=_charge_output,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(self, name, self.filters[name]) for name in _FILTERS.split()}
        self.tests = {name: _charged_test(self, test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.start()

    def start(self) -> None:
        """A new rendering begins: the budget is full."""
        self._left, self._deadline = MAX_TOTAL, time.monotonic() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Meter().visit(super()._parse(source, name, filename))

    def charge(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0 or time.monotonic() > self._deadline:
            raise SecurityError("it runs too long or writes too much")

    def bounded(self, value: Any) -> Any:
        """The value itself, charged by its size."""
        self.charge(_size(value))
        return value

    def concat_text(self, *parts: Any) -> str:
        """The ~ operator."""
        _refuse_above(sum(map(_size, parts)))
        return self.bounded("".join(map(str, parts)))

    def call(__self, __context, __obj, *args, **kwargs):  # named as in jinja2, because a template may pass self=
        """jinja2's hook for every call in a template: charged by what it may make, SecurityError over the limit."""
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # one of the meter's own
            return __obj(*args)
        __self.charge(_STEP)
        if isinstance(owner, str):
            arguments = [*args, *kwargs.values()]
            if __obj.__name__ in _SCANS:
                _refuse_long(arguments)
            elif __obj.__name__ == "replace":
                _refuse_replaced(owner, *arguments[:2])
            elif __obj.__name__ == "join":
                args = [_measurable(items) for items in args]
                _refuse_joined(*args, owner)
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """jinja2's hook for the intercepted operators: charged by the size of the result, before it is made."""
        numbers = _is_number(left) and _is_number(right)
        if numbers:
            _size(left), _size(right)
            if operator == "**" and abs(right) > _BITS:
                raise SecurityError("a power that is too large")
        elif operator == "**":
            raise SecurityError("a power of what is no number")
        elif operator == "*":
            _refuse_above(_weight(left) * _weight(right))
        elif operator == "+":
            _refuse_above(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            if re.search(r"%[-#0 +.\d]*(\d{3}|\*|\()", left):
                raise SecurityError("a format with a key, or a width that is too large")
            _refuse_above(len(left) * _SHORT + _size(right))
        return self.bounded(super().call_binop(context, operator, left, right))

    def call_unop(self, context, operator: str, arg: Any) -> Any:
        return self.bounded(super().call_unop(context, operator, arg))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS.split()
        return not isinstance(obj, (int, float)) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: a width in it allocates at will. is_safe_attribute then refuses it."""

    def unsafe_undefined(self, obj: Any, attribute: str):
        # jinja2 gives something undefined that would silently print as nothing.
        raise SecurityError(f"{attribute!r} of {type(obj).__name__} is out of bounds")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant says; it changes nothing in the text."""

    tags = frozenset(("generation",))

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Meter(NodeTransformer):
    """Puts the charges into a template: at every pass of a loop and of a macro, and where values are put together."""

    def _call(self, node: nodes.Node, method: str, *arguments: nodes.Expr) -> nodes.Call:
        function = nodes.EnvironmentAttribute(method)
        call = nodes.Call(function, list(arguments), [], None, None)
        return call.set_lineno(node.lineno).set_environment(node.environment)

    def _metered_body(self, node: nodes.Node) -> nodes.Node:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        charge = nodes.ExprStmt(self._call(node, "charge", nodes.Const(_STEP + literal)), lineno=node.lineno)
        node.body.insert(0, charge)
        return node

    visit_Macro = visit_CallBlock = _metered_body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._metered_body(node)
        if node.test is not None:  # runs also where the body does not
            node.test = self._call(node, "bounded", node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call(node, "concat_text", *node.nodes)

    def _bounded(self, node: nodes.Expr) -> nodes.Node:
        # [x, x] in a loop doubles with every pass; a slice copies; == and `in` take as long as their texts.
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call(node, "bounded", node)

    visit_List = visit_Tuple = visit_Dict = visit_Compare = _bounded

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._bounded(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)


@pass_context
def _charge_output(context, value: Any) -> Any:
    return context.environment.bounded(value)


def _bounded_filter(sandbox: Sandbox, name: str, function: Callable) -> Callable:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    refuse = {"int": _refuse_digits, "float": _refuse_digits, "round": _refuse_precision, "indent": _refuse_indented}
    refuse |= {"replace": _refuse_replaced, "join": _refuse_joined}

    @functools.wraps(function)  # keeps jinja2's mark that says what comes first
    def run(*args, **kwargs):
        sandbox.charge(_STEP)
        if name not in _LONG_ARGUMENTS:
            _refuse_long([*args[skip + 1 :], *kwargs.values()])
        if name == "join":
            args = (*args[:skip], _measurable(args[skip]), *args[skip + 1 :])
        if name in refuse:
            refuse[name](*args[skip:], **kwargs)
        value = function(*args, **kwargs)
        return _charged_items(sandbox, value) if isinstance(value, Iterator) else sandbox.bounded(value)

    return run


def _charged_items(sandbox: Sandbox, items: Iterator) -> Iterator:
    for item in items:
        sandbox.charge(_ELEMENT)
        yield item


def _charged_test(sandbox: Sandbox, function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args):
        sandbox.charge(1)
        return function(*args)

    return run


@pass_environment
def _to_json(sandbox, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: jinja2's own filter escapes for HTML."""
    if isinstance(indent, int) and indent > _SHORT:
        raise SecurityError("an indent that is too large")
    _size(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(map(sandbox.bounded, encoder.iterencode(value)))  # what indents add depends on the depth


def _size(value: Any) -> int:
    """Characters of a value and _ELEMENT for each of its elements, all the way down.

    Raises:
        SecurityError: there are more than MAX_SIZE (it stops counting there), or an integer of more than _BITS.
    """
    if isinstance(value, str):
        total, waiting = len(value), []
    else:
        total, waiting = 1, [value]
    while waiting and total <= MAX_SIZE:
        value = waiting.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, int):
            if value.bit_length() > _BITS:
                raise SecurityError(f"an integer of more than {_BITS} bits")
        elif isinstance(value, dict):
            total += len(value) * _ELEMENT
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            total += len(value) * _ELEMENT
            waiting += value
        elif isinstance(value, range):
            waiting += [value.start, value.stop]
    _refuse_above(total)
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _weight(value: Any) -> int:
    """By how much a factor multiplies: a number by itself, all else by its size."""
    return max(1, abs(int(value)) if _is_number(value) else _size(value))


def _measurable(items: Any) -> Any:
    """The items themselves; to be measured, those of a generator must be there."""
    return items if isinstance(items, (str, list, tuple, dict)) else list(items)


def _refuse_above(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a value of more than {MAX_SIZE} characters")


def _refuse_long(arguments: Iterable[Any]) -> None:
    if any(isinstance(argument, str) and len(argument) > _SHORT for argument in arguments):
        raise SecurityError(f"an argument of more than {_SHORT} characters")


def _refuse_digits(value: Any, *_, **__) -> None:
    if not _is_number(value):
        _refuse_long([str(value)])


def _refuse_precision(value: Any, precision: int = 0, *_, **__) -> None:
    if abs(precision) > 20:
        raise SecurityError("round: more than 20 digits")


def _refuse_indented(text: str, width: int | str = 4, *_, **__) -> None:
    _refuse_above(len(text) + (len(text.splitlines()) + 1) * _weight(width))


def _refuse_replaced(text: Any, old: str, new: str, *_, **__) -> None:
    text = str(text)
    _refuse_above(len(text) + text.count(str(old)) * _weight(new))


def _refuse_joined(items: Any, d: str = "", *_, **__) -> None:
    _refuse_above(_size(items) + len(items) * _weight(d))
