"""One stack for all tests that do not break it."""
import pytest
from harness import Stack


@pytest.fixture(scope="session")
def stack():
    with Stack() as running:
        yield running
