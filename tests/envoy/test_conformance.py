"""Our pickers before the conformance suite that others may use too."""
import contextlib
import pathlib
import subprocess
import sys

import pytest
from harness import Picker, Upstream, minimal
from test_epp import APART, QUEUE, Epp

# As many at a time as the suite asks for.
QUEUEING = QUEUE.replace("maxConcurrency: 1", "maxConcurrency: 100")


def suite(picker: Picker, endpoints: list[str], *flags: str) -> str:
    """What the suite says of a picker; fails where it does."""
    said = subprocess.run(
        [sys.executable, pathlib.Path(__file__).parent / "conformance.py", f"127.0.0.1:{picker.port}",
         f"--health=127.0.0.1:{picker.health_port}", f"--endpoints={','.join(endpoints)}", *flags],
        capture_output=True, text=True)
    assert said.returncode == 0 and "FAILED" not in said.stdout, said.stdout + said.stderr
    return said.stdout


@pytest.mark.parametrize("tls", [True, False])
def test_the_minimal_picker_speaks_the_protocol(tls):
    endpoints = ["127.0.0.1:8001", "[::1]:8002"]
    picker = Picker(minimal(endpoints), tls)
    try:
        suite(picker, endpoints, "--ignores-bodies", *([] if tls else ["--plain"]))
    finally:
        picker.stop()


@pytest.mark.parametrize("config", [APART, QUEUEING], ids=["apart", "queueing"])
def test_the_endpoint_picker_speaks_the_protocol(config):
    with contextlib.ExitStack() as running:
        servers = [Upstream() for _ in range(2)]
        for server in servers:
            running.callback(server.stop)
        endpoints = [server.endpoint for server in servers]
        picker = Epp([(endpoint, "both") for endpoint in endpoints], config=config)
        running.callback(picker.stop)
        picker.await_servers(2)
        # Nothing is left out: it reads bodies, tells its health, and has two endpoints.
        assert "left out" not in suite(picker, endpoints)
