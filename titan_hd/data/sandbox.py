"""Jinja for templates that nobody has vetted: nothing outside the data is reached, and time and memory are bounded.

A chat template comes with a downloaded model, so it is a program by a stranger. jinja2's sandbox keeps it away from
Python's internals, but not from looping for ever or from allocating without end. Here every pass of a loop, every call
and every character of output is charged to one budget per rendering; a value that would grow beyond MAX_SIZE is
refused before it is made; and only filters and text methods whose cost is known are there.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SIZE = 10_000_000  # characters of output, and characters plus elements of one value
MAX_SECONDS = 10.0  # of one rendering; a template takes well under a millisecond
_STEP = 50  # what a call or a pass of a loop costs, in characters

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
_MULTIPLIERS = ("indent", "join", "replace", "tojson")  # filters and methods whose result may outgrow their arguments


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates: transformers' settings, `tojson` and `{% generation %}`, within bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

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
        del self.globals["lipsum"]
        self.start()

    def start(self) -> None:
        """A new rendering begins: the budget is full."""
        self._left, self._deadline = MAX_SIZE, time.monotonic() + MAX_SECONDS

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
        return "".join(map(str, parts))

    def call(__self, __context, __obj, *args, **kwargs):  # named as in jinja2, because a template may pass self=
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # one of the meter's own
            return __obj(*args)
        __self.charge(_STEP)
        if isinstance(owner, str) and __obj.__name__ in _MULTIPLIERS:
            _refuse_product(owner, [*args, *kwargs.values()])
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and not (numbers and abs(left) < 1 << 64 and abs(right) <= 64):
            raise SecurityError("a power that is too large")
        if operator == "*":
            _refuse_above(_digits(left) + _digits(right) if numbers else _weight(left) * _weight(right))
        if operator == "+" and not numbers:
            _refuse_above(_size(left) + _size(right))
        if operator == "%" and isinstance(left, str):
            if re.search(r"\d{4}|\*", left):
                raise SecurityError("a format with a width that is too large")
            _refuse_product(left, [right])
        return super().call_binop(context, operator, left, right)

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

    visit_For = visit_Macro = visit_CallBlock = _metered_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call(node, "concat_text", *node.nodes)

    def _bounded_literal(self, node: nodes.Expr) -> nodes.Node:
        # [x, x] in a loop doubles with every pass.
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call(node, "bounded", node)

    visit_List = visit_Tuple = visit_Dict = _bounded_literal


@pass_context
def _charge_output(context, value: Any) -> Any:
    return context.environment.bounded(value)


def _bounded_filter(sandbox: Sandbox, name: str, function: Callable) -> Callable:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # keeps jinja2's mark that says what comes first
    def run(*args, **kwargs):
        sandbox.charge(_STEP)
        args = list(args)
        if name in _MULTIPLIERS:
            if not isinstance(args[skip], (str, int, float, list, tuple, dict, type(None))):
                args[skip] = list(args[skip])  # a generator: to be measured it must be there
            _refuse_product(args[skip], [*args[skip + 1 :], *kwargs.values()])
        return sandbox.bounded(function(*args, **kwargs))

    return run


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _size(value: Any) -> int:
    """Characters and elements of a value, all the way down.

    Raises:
        SecurityError: there are more than MAX_SIZE; it stops counting there.
    """
    if isinstance(value, str):
        total, waiting = len(value), []
    else:
        total, waiting = 1, [value]
    while waiting and total <= MAX_SIZE:
        value = waiting.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            total += len(value)
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            total += len(value)
            waiting += value
    _refuse_above(total)
    return total


def _digits(number: int | float) -> int:
    return number.bit_length() * 10_000 if isinstance(number, int) else 1  # at most 1000 bits in a product


def _weight(value: Any) -> int:
    """By how much a factor multiplies: a number by itself, all else by its size."""
    return max(1, abs(int(value)) if isinstance(value, (int, float)) else _size(value))


def _refuse_product(value: Any, arguments: list[Any]) -> None:
    _refuse_above(_weight(value) * max(map(_weight, arguments), default=1))


def _refuse_above(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a value of more than {MAX_SIZE} characters")
