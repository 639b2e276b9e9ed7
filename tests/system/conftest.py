"""One stack and one plain server for all tests that do not break them."""
import json

import pytest
from stack import FIXTURES, Process, Stack, free_port


@pytest.fixture(scope="session")
def stack():
    running = Stack()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def both():
    """One server that prefills and decodes, for comparison."""
    running = Process("serve", "smollm2", "--role", "both", "--port", str(free_port()))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def exact_stack():
    """A stack that computes in f32 throughout, as the reference did."""
    running = Stack("--", "--dtype", "float32")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def exact_both():
    """The same as one server."""
    running = Process("serve", "smollm2", "--role", "both", "--dtype", "float32", "--port", str(free_port()))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def xla_both():
    """One server on XLA's CPU plugin."""
    running = Process("serve", "smollm2", "--role", "both", "--device", "xla-cpu", "--port", str(free_port()))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def reference():
    """What transformers generates; see tests/reference/generate_smollm2.py."""
    return json.loads((FIXTURES / "smollm2-greedy.json").read_text())
