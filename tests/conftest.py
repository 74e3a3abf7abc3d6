import gc
import os
import signal
import tempfile
from pathlib import Path

import pytest

gc.disable()  # while modules are imported: see pytest_collection_finish

from tests.kit.commands import REPOSITORY  # noqa: E402
from tests.kit.workers import WorkerPool  # noqa: E402

# Runs of tests leave their tokenized records in no user's cache, and find none there.
_CACHE = tempfile.TemporaryDirectory(prefix="titan_hd_tests_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and what tests start would inherit that


def pytest_collection_finish() -> None:
    """Modules stay: Python's collector, which would go through all of them again and again, never looks at them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def workers():
    """New processes for each file: process groups that some tests leave have threads that never sleep for long."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and tokenizers beside the repository; tests that need them skip where they are absent."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    return path
