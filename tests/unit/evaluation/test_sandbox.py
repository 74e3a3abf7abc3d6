"""Generated programs that attack: none passes by a trick, none reaches what is outside, none outlives its run."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.commands import REPOSITORY
from titan_hd.errors import UserError
from titan_hd.evaluation.sandbox import Limits, Sandbox, Verdict

MARK = 7 + os.getpid() / 2**24  # seconds; it is in the command line of every process of these runs, and of no other
LIMITS = Limits(
    seconds=2, wall_seconds=MARK, memory=2**28, processes=6, disk_bytes=2**20, file_bytes=2**19, open_files=16
)
SHORT = Limits(**{**LIMITS.__dict__, "wall_seconds": MARK - 6.625})


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS)
    except UserError as error:
        pytest.skip(str(error))


def processes_of_runs() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if any(f'"wall_seconds": {limits.wall_seconds}'.encode() in line for limits in (LIMITS, SHORT)):
            found.append(str(path))
    return found


@pytest.fixture(autouse=True)
def nothing_outlives_its_run():
    yield
    assert not processes_of_runs()


# ---- no trick passes -------------------------------------------------------------------------------------------------

DOUBLE = "assert double(2) == 4\nassert double(3) == 6"
WRONG = "\ndef double(x):\n    return 0\n"

TRICKS = {
    "exit before the tests": "exit(0)",
    "os._exit before the tests": "import os\nos._exit(0)",
    "exit in a test": "def double(x):\n    raise SystemExit(0)",
    "os._exit in a test": "import os\ndef double(x):\n    os._exit(0)",
    "exit after a right answer": "import os\ndef double(x):\n    return 4 if x == 2 else os._exit(0)",
    "an object equal to everything": (
        "class Same:\n    __eq__ = lambda self, other: True\n    __hash__ = None\n    __bool__ = lambda self: True\n"
        "def double(x):\n    return Same()"
    ),
    "a number equal to everything": (
        "class Same(int):\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
        "def double(x):\n    return Same(0)"
    ),
    "its class pretends": (
        "class Same:\n    __class__ = int\n    __eq__ = lambda self, other: True\n    __index__ = lambda self: 4\n"
        "def double(x):\n    return Same()"
    ),
    "an assertion that never fails": (
        "import builtins\nclass Quiet(Exception):\n    def __new__(cls, *a): raise SystemExit(0)\n"
        "builtins.AssertionError = Quiet" + WRONG
    ),
    "patched builtins": (
        "import builtins\nfor name in ('isinstance', 'len', 'sorted', 'exec', 'compile', 'getattr'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)" + WRONG
    ),
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"result": "passed"}\'' + WRONG,
    "a verdict into every file descriptor": (
        'import os\nverdict = b\'{"result": "passed", "detail": ""}\'\nfor fd in range(64):\n    try:\n'
        "        os.write(fd, verdict)\n    except OSError:\n        pass" + WRONG
    ),
    "a verdict printed": 'print(\'{"result": "passed", "detail": ""}\', flush=True)' + WRONG,
    "the harness patched through sys.modules": (
        "import sys\nharness = sys.modules['titan_hd.evaluation.supervisor']\n"
        "passed = lambda *a, **k: {'result': 'passed', 'detail': ''}\n"
        "harness._run_tests = harness._verdict = harness._read_verdict = passed" + WRONG
    ),
    "the harness's frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for value in list(frame.f_locals.values()):\n"
        "        if isinstance(value, dict):\n            value.update(result='passed', tests='', confined=False)\n"
        "    frame = frame.f_back" + WRONG
    ),
    "the verdict's pipe from an older frame": (
        "import os, sys\nframe = sys._getframe()\nwhile frame:\n    fd = frame.f_locals.get('verdict_writer')\n"
        '    if fd is not None:\n        try:\n            os.write(fd, b\'{"result": "passed"}\')\n'
        "        except OSError:\n            pass\n    frame = frame.f_back" + WRONG
    ),
    "a trace function": (
        "import sys\ndef trace(frame, event, argument):\n    frame.f_globals['AssertionError'] = SystemExit\n"
        "    return trace\nsys.settrace(trace)" + WRONG
    ),
    "the parent killed": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 15)\nos.kill(1, 19)" + WRONG,
    "everything killed": "import os\nos.kill(-1, 9)" + WRONG,
    "garbage on the connection": "import os\nos.write(3, b'\\0' * 7 + b'\\x05[[[[[')" + WRONG,
    "a length of a petabyte": "import os\nos.write(3, (2**50).to_bytes(8, 'big'))" + WRONG,
    "a message nested too deeply": ("import os\nm = b'[' * 100000\nos.write(3, len(m).to_bytes(8, 'big') + m)" + WRONG),
    "answers in advance": (
        "import os\nfor m in [b'[\"value\", null]'] * 9:\n    os.write(3, len(m).to_bytes(8, 'big') + m)" + WRONG
    ),
    "an answer that is a failure to answer": "def double(x):\n    raise EOFError",
    "an exception with a lying name": (
        "class StopIteration(Exception):\n    pass\ndef double(x):\n    raise StopIteration"
    ),
    "the connection closed": "import os\nos.close(3)" + WRONG,
    "a recursion without end": "def double(x):\n    return double(x) + 1",
    "a recursion beyond the stack": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef double(x):\n    return sorted([1, 2], key=double)"
    ),
    "a value that holds itself": "def double(x):\n    a = []\n    a.append(a)\n    return a",
    "a result too large": "def double(x):\n    return '1' * 2**25",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_passes(sandbox: Sandbox, trick: str):
    verdict = sandbox.run(TRICKS[trick], DOUBLE, ["double"])
    assert verdict.result in {"failed", "error", "died", "timeout"}, verdict


def test_the_right_answer_passes(sandbox: Sandbox):
    assert sandbox.run("def double(x):\n    return 2 * x", DOUBLE, ["double"]) == Verdict("passed", "")


def test_the_verdict_says_what_was_wrong(sandbox: Sandbox):
    assert sandbox.run(WRONG, DOUBLE, ["double"]) == Verdict("failed", "assert double(2) == 4")
    assert sandbox.run("def double(x): return x / 0", DOUBLE, ["double"]) == Verdict(
        "error", "ZeroDivisionError: division by zero"
    )
    assert sandbox.run("def twice(x): return 2 * x", DOUBLE, ["double"]) == Verdict(
        "error", "NameError: the program defines no double"
    )
    assert sandbox.run("exit(3)", DOUBLE, ["double"]) == Verdict("error", "ProgramError: SystemExit: 3")
    assert sandbox.run("import os\nos._exit(3)", DOUBLE, ["double"]) == Verdict(
        "died", "the program ended with status 3 before the tests had"
    )


# ---- nothing outside is reached --------------------------------------------------------------------------------------


def reach(sandbox: Sandbox, *sources: str) -> list[str]:
    """What expressions are in one program's process, or the names of the exceptions that they raise."""
    program = (
        "import ctypes, errno, gc, glob, os, resource, signal, socket, subprocess, sys, threading, time\n"
        f"{PROBES}\ndef probe(source):\n    try:\n        return repr(eval(source))\n"
        "    except Exception as error:\n        return type(error).__name__"
    )
    tests = f"answers = [probe(source) for source in {sources!r}]\nassert False, answers"
    verdict = sandbox.run(program, tests, ["probe"])
    assert verdict.result == "failed", verdict
    return ast.literal_eval(verdict.detail.removeprefix("assert False, answers "))


PROBES = """
libc = ctypes.CDLL(None, use_errno=True)

def system_call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result

def until_refused(step, most=200):
    kept = []
    try:
        for number in range(most):
            kept.append(step(number))
    except (OSError, RuntimeError, MemoryError):
        pass
    return len(kept)

def fork():
    if os.fork() == 0:
        time.sleep(60)

def write(path, size=1):
    with open(path, "wb") as file:
        return file.write(b"x" * size)

def linked(path):
    os.symlink(path, "link")
    return open("link").read()

def swapped(path):
    stop = []
    def swap():
        while not stop:
            for target in ("/tmp/own", path):
                try:
                    os.symlink(target, "new")
                    os.replace("new", "link")
                except OSError:
                    pass
    write("own")
    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    seen = set()
    for _ in range(300):
        try:
            seen.add(open("link").read())
        except OSError:
            pass
    stop.append(1)
    return sorted(seen - {"x", ""})

def connected(family, address):
    with socket.socket(family) as connection:
        connection.settimeout(0.2)
        connection.connect(address)

def open_descriptors():
    found = []
    for fd in range(256):
        try:
            os.fstat(fd)
            found.append(fd)
        except OSError:
            pass
    return found
"""


def test_files_of_the_user_are_not_there(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / ".ssh" / "id_ed25519"
    secret.parent.mkdir()
    secret.write_text("a private key")
    homes = f"glob.glob({str(Path.home() / '.*')!r}) + glob.glob('/home/*') + glob.glob('/etc/*')"
    assert reach(
        sandbox,
        "os.listdir('.'), os.getcwd()",
        f"open({str(secret)!r}).read()",
        f"linked({str(secret)!r})",
        f"swapped({str(secret)!r})",
        f"[path for path in {homes} if not os.__file__.startswith(path)]",
    ) == ["([], '/tmp')", "FileNotFoundError", "FileNotFoundError", "[]", "[]"]


def test_nothing_outside_is_written(sandbox: Sandbox, tmp_path: Path):
    paths = ["/new", "/usr/lib/new", "/dev/new", "/lib/new", os.__file__, str(tmp_path / "new")]
    answers = reach(sandbox, "write('/tmp/inside')", *[f"write({path!r})" for path in paths])
    assert answers[0] == "1"
    assert set(answers[1:]) <= {"OSError", "PermissionError", "FileNotFoundError"}
    assert not list(tmp_path.iterdir())


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    environment = "{name: value for name, value in os.environ.items() if name != 'LC_CTYPE'}"
    own = "open('/proc/self/environ').read()"
    assert reach(sandbox, environment, own, "libc.getenv(b'HF_TOKEN')") == ["{}", "FileNotFoundError", "0"]


def test_there_is_no_network(sandbox: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        named.bind("\0titan_hd_test")
        named.listen()
        assert reach(
            sandbox,
            f"connected(socket.AF_INET, {server.getsockname()})",
            "connected(socket.AF_UNIX, '\\0titan_hd_test')",
            "connected(socket.AF_INET, ('1.1.1.1', 53))",
            "socket.getaddrinfo('localhost.example', 80)",
        ) == ["OSError", "ConnectionRefusedError", "OSError", "gaierror"]


def test_other_processes_are_out_of_sight(sandbox: Sandbox):
    pieces = "(ctypes.c_size_t * 2)(id(1), 8)"
    assert reach(
        sandbox,
        f"os.kill({os.getpid()}, 0)",
        f"os.sched_getaffinity({os.getpid()})",
        "os.path.exists('/proc')",
        "system_call('ptrace', 16, 1, 0, 0), system_call('ptrace', 0x4206, 1, 0, 0)",  # attach, seize
        f"system_call('process_vm_readv', 1, {pieces}, 1, {pieces}, 1, 0)",
        "subprocess.run(['/bin/sh', '-c', 'true'])",
    ) == ["ProcessLookupError", "ProcessLookupError", "False", "('EPERM', 'EPERM')", "'EPERM'", "FileNotFoundError"]


def test_the_program_has_no_rights(sandbox: Sandbox):
    namespace, *answers = reach(
        sandbox,
        "system_call('unshare', 0x10000000)",
        "system_call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
        "os.chroot('/tmp')",
        "os.mknod('disk', 0o60600, os.makedev(8, 0))",
        "resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))",
        "system_call('shmget', 0, 2**20, 0o1600)",
    )
    assert namespace in {"'ENOSPC'", "'EPERM'"}
    assert answers == ["'EPERM'", "PermissionError", "PermissionError", "ValueError", "'ENOSPC'"]


def test_the_program_holds_neither_the_tests_nor_their_files(sandbox: Sandbox):
    assert reach(sandbox, "open_descriptors()") == ["[0, 1, 2, 3]"]
    program = (
        "import gc, sys\ndef probe():\n    texts = [str(o) for o in gc.get_objects() if isinstance(o, (dict, list))]\n"
        "    return any('a sec' + 'ret of the tests' in text for text in texts)"
    )
    assert sandbox.run(program, "'a secret of the tests'\nassert probe() is False", ["probe"]).passed


# ---- nothing is used up ----------------------------------------------------------------------------------------------


def test_processes_threads_and_files_are_few(sandbox: Sandbox):
    sleeper = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    files, threads = reach(
        sandbox, "until_refused(lambda number: open('/dev/null'))", f"until_refused(lambda number: {sleeper})"
    )
    [processes] = reach(sandbox, "until_refused(lambda number: fork())")
    assert 0 < int(processes) < LIMITS.processes
    assert 0 < int(threads) < LIMITS.processes
    assert 0 < int(files) < LIMITS.open_files


def test_memory_and_disk_are_small(sandbox: Sandbox):
    memory, large, in_memory, disk, files = reach(
        sandbox,
        "len(bytearray(2**28))",
        f"write('large', {LIMITS.file_bytes + 1})",
        f"os.ftruncate(os.memfd_create('m'), {LIMITS.file_bytes + 1})",
        "until_refused(lambda number: write(str(number), 2**17))",
        "until_refused(lambda number: write(str(number), 0), 2000)",
    )
    assert (memory, large, in_memory) == ("MemoryError", "OSError", "OSError")
    assert 0 < int(disk) <= LIMITS.disk_bytes // 2**17
    assert 0 < int(files) < 1000


@pytest.mark.parametrize(
    "program",
    [
        "import time\ntime.sleep(60)",
        "while True:\n    pass",
        "while True:\n    print('x' * 4096)",
        "import os\nwhile True:\n    os.write(2, b'x' * 4096)",
        "import signal, time\nfor number in range(1, 32):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError:\n        pass\ntime.sleep(60)",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",  # the fork bomb
    ],
    ids=["sleep", "spin", "output", "errors", "ignores signals", "fork bomb"],
)
def test_time_is_short(sandbox: Sandbox, program: str):
    short = Sandbox.__new__(Sandbox)
    short.limits, short.confined = SHORT, True
    begin = time.monotonic()
    assert short.run(program, "", []) == Verdict("timeout", "the wall clock")
    assert time.monotonic() - begin < 5


def test_processor_time_is_limited_on_its_own(sandbox: Sandbox):
    one = Sandbox.__new__(Sandbox)
    one.limits, one.confined = Limits(**{**LIMITS.__dict__, "seconds": 1}), True
    assert one.run("while True:\n    pass", "", []).detail == "killed: processor time, or the machine's memory"


def test_daemons_and_threads_die_with_the_run(sandbox: Sandbox):
    program = (
        "import os, threading, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef double(x):\n    return 2 * x"
    )
    begin = time.monotonic()
    assert sandbox.run(program, DOUBLE, ["double"]).passed
    assert time.monotonic() - begin < 5


# ---- the tests use more than numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "None, True, 0, -1, 2**70, 10**5000, 1.5, float('inf'), 1j, '', 'ä\\ud800', b'\\0', bytearray(b'a')",
        "[], [[1]], (), ((1,),), set(), {1, (2,)}, frozenset({1}), {}, {1: {'a': None}, (1,): []}",
        "range(0, 9, 2), Decimal('1.10'), Fraction(1, 3), deque([1]), int, str",
    ],
)
def test_plain_values_travel_both_ways(sandbox: Sandbox, value: str):
    imports = "from collections import deque\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    tests = (
        f"for value in ({value}):\n    back = same(value)\n    assert (back, type(back)) == (value, type(value)), value"
    )
    assert sandbox.run(f"{imports}def same(x): return x", tests, ["same"], prelude=imports) == Verdict("passed", "")


def test_objects_of_the_program_are_used_where_they_lie(sandbox: Sandbox):
    program = (
        "from collections import Counter, namedtuple\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Node:\n    value: int\n"
        "    left: object = None\ndef depth(node): return 0 if node is None else 1 + depth(node.left)\n"
        "def squares(n): return (i * i for i in range(n))\ndef adder(n): return lambda x: x + n\n"
        "def count(text): return Counter(text)\nPoint = namedtuple('Point', 'x y')\ndef fails(): raise KeyError('k')"
    )
    tests = (
        "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.value == 2\n"
        "assert list(squares(4)) == [0, 1, 4, 9]\nassert adder(2)(3) == 5\nassert count('aab') == {'a': 2, 'b': 1}\n"
        "assert Point(1, 2) == (1, 2)\ntry:\n    fails()\nexcept KeyError:\n    pass\nelse:\n    assert False\n"
        "assert Node(1) != Node(1)"  # an object is equal to nothing
    )
    names = ["Node", "depth", "squares", "adder", "count", "Point", "fails"]
    assert sandbox.run(program, tests, names) == Verdict("passed", "")


# ---- where the kernel refuses, and where the evaluation is killed ----------------------------------------------------


def test_refused_by_the_kernel():
    """In a user namespace that allows none inside. Unsandboxed, limits and the end of all descendants remain."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare command")
    script = f"""
import logging, os, sys, tempfile
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from titan_hd.errors import UserError
from titan_hd.evaluation.sandbox import Limits, Sandbox
limits = Limits(seconds=2, wall_seconds={MARK}, memory=2**28)
try:
    Sandbox(limits)
except UserError as error:
    print("refused:", error)
sandbox = Sandbox(limits, allow_unsandboxed=True)
daemon = "import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    if os.fork() == 0:\\n        time.sleep(60)\\n"
daemon += "    os._exit(0)"
print(sandbox.run(daemon + "\\ndef double(x): return 2 * x", {DOUBLE!r}, ["double"]).result)
print(sandbox.run("exit(0)", {DOUBLE!r}, ["double"]).result)
print([name for name in os.listdir(tempfile.gettempdir()) if name.startswith("titan_hd_program_")])
"""
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "-Ur", "sh", "-c", shell, "sh", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "refused:" not in result.stdout:
        pytest.skip(f"cannot forbid namespaces here: {result.stderr[-300:]}")
    refused, warning, *rest = result.stdout.splitlines()
    assert "the kernel refuses namespaces: unshare: No space left on device" in refused
    assert "--allow-unsandboxed" in refused
    assert warning.startswith("GENERATED PROGRAMS RUN UNSANDBOXED")
    assert rest == ["passed", "error", "[]"]


def test_a_killed_evaluation_leaves_nothing(sandbox: Sandbox):
    script = (
        "from titan_hd.evaluation.sandbox import *\n"
        f"Sandbox(Limits(wall_seconds={MARK})).run('import time; print(1); time.sleep(60)', '', [])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    evaluation = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while len(processes_of_runs()) < 3:  # supervisor, tests, program
        assert evaluation.poll() is None
        time.sleep(0.01)
    evaluation.send_signal(signal.SIGKILL)
    evaluation.wait()
    until = time.monotonic() + 5
    while processes_of_runs() and time.monotonic() < until:
        time.sleep(0.01)
    assert not processes_of_runs()
