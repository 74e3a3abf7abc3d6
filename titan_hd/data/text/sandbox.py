"""Runs chat templates in a helper process, whose memory and processor time the kernel bounds.

A chat template comes with a downloaded model, so it is a program by a stranger. jinja2's sandbox keeps it away from
Python's internals, but neither from looping for ever nor from allocating without end, and no check of single operations
is complete: `{{ 'a' * 10**10 }}` is one, and every filter another. The kernel's limits hold for all of them. A helper
that runs into one is gone, and the next rendering starts another. A rendering costs about 0.1 ms more this way.

The environment is the one that transformers' apply_chat_template makes, with all of jinja2's filters and tests.

    python -m titan_hd.data.text.sandbox FD BYTES SECONDS CHARACTERS      what the helper runs
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from titan_hd.data.helper_process import HelperProcess

if TYPE_CHECKING:
    import jinja2

MAX_BYTES = 2**30  # of the helper's memory; a chat of 128k tokens takes a few MiB, and the largest template half of it
MAX_SECONDS = 10  # of processor time for one rendering; a template takes about a millisecond
MAX_CHARACTERS = 20_000_000  # of what it writes
# What strftime_now gives, on every day: a run can be repeated. It is the date that stands in Llama 3.1's template.
TODAY = datetime.datetime(2024, 7, 26)


# What stands around that which a template marks as the assistant's, if it is rendered with marks: noncharacters.
MARKS = ("\ufdd0", "\ufdd1")


class TemplateFault(Exception):
    """What is wrong with a template, or what it raised, in one line."""


class SandboxedTemplate:
    """A Jinja template that is rendered within bounds. Pickled, it is its source.

    Raises (all methods):
        TemplateFault: it is no Jinja, it fails, or it takes too much.
    """

    def __init__(self, source: str):
        self._source = source
        self._helper: HelperProcess | None = None

    def __reduce__(self):
        return SandboxedTemplate, (self._source,)

    def compile(self) -> None:
        """Start a helper that knows the template. Rendering does it when there is none."""
        bounds = MAX_BYTES, MAX_SECONDS, MAX_CHARACTERS
        try:
            self._helper = HelperProcess("titan_hd.data.text.sandbox", *bounds)
        except OSError as error:
            raise TemplateFault(f"no process can be started to render it: {error.strerror}") from None
        self._ask(self._helper, self._source)

    def render(self, variables: dict[str, Any], marked: bool = False) -> str:
        """What the template writes. marked: with MARKS around each {% generation %} ... {% endgeneration %}."""
        if self._helper is None:
            self.compile()
        assert self._helper is not None
        return self._ask(self._helper, (variables, marked))

    def _ask(self, helper: HelperProcess, request: object) -> str:
        try:
            helper.connection.send(request)
            # Plain bytes: unpickling runs code, and who knows what a template has made of the helper.
            answer = helper.connection.recv_bytes().decode("utf-8", "surrogatepass")
        except (EOFError, OSError):
            self._helper, status = None, helper.status()
            if status == -signal.SIGXCPU:
                raise TemplateFault(f"it runs for more than {MAX_SECONDS} seconds") from None
            raise TemplateFault(f"the process that renders it ended with status {status}") from None
        except BaseException:  # an interrupt, say: the answer that comes would be taken for that to the next request
            self._helper = None
            raise
        if answer[0] != _DONE:
            raise TemplateFault(answer[1:])
        return answer[1:]


_DONE, _FAULT = "+", "-"  # how an answer begins


def main() -> None:
    """Render what the socket of the first argument asks for, within the limits of the others, until it is closed."""
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C, and the terminal's end, reach the whole process group;
        signal.signal(number, signal.SIG_IGN)  # the trainer answers them
    connection = Connection(int(sys.argv[1]))
    max_bytes, max_seconds, max_characters = map(int, sys.argv[2:])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, max_bytes)
    source = ""
    templates: dict[bool, jinja2.Template] = {}  # with marks, and without
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = connection.recv()
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + max_seconds)
            try:
                text = ""
                if not templates:
                    source, variables, marked = request, None, False
                else:
                    variables, marked = request
                if marked not in templates:
                    templates[marked] = _environment(marked).from_string(source)
                if variables is not None:
                    text = templates[marked].render(**variables)
                if len(text) > max_characters:
                    raise ValueError(f"it writes more than {max_characters} characters")
                answer = _DONE + text
            except MemoryError:
                answer = f"{_FAULT}it needs more than {max_bytes >> 20} MiB of memory"
            except Exception as error:  # a template is a program: it can fail in any way
                answer = _FAULT + (" ".join(str(error).split()) or type(error).__name__)[:1000]
            connection.send_bytes(answer.encode("utf-8", "surrogatepass"))


def _limit(what: int, most: int) -> None:
    """Lower the soft limit, at which the kernel ends the process or refuses memory."""
    hard = resource.getrlimit(what)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _environment(marked: bool) -> jinja2.Environment:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what an assistant says; not `marked`, it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marked:
                first, last = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=lineno) for mark in MARKS)
                body = [first, *body, last]
            return jinja2.nodes.Scope(body, lineno=lineno)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
    environment.globals.update(functions)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    main()
