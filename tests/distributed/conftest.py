import pytest

from tests.kit.workers import WorkerPool


@pytest.fixture(scope="session")
def eight_workers():
    """For the slow tests; starting them takes a while."""
    pool = WorkerPool(8)
    yield pool
    pool.close()
