"""Starts baton's processes, waits until they are ready, ends them by their process ids."""
import http.client
import json
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import urllib.request

import psutil

ROOT = pathlib.Path(__file__).parents[2]
BATON = os.environ.get("BATON_BIN", str(ROOT / "target/release/baton"))
FIXTURES = ROOT / "tests/fixtures"
START_DEADLINE_S = 400


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def eventually(condition, within_s: float, what: str, every_s: float = 0.05):
    """The first true value of condition(); fails with `what` when none came in time."""
    end = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(every_s)


def post(url: str, path: str, body: dict, headers: dict | None = None, timeout: float = 300):
    """POSTs JSON; returns (status, parsed body). Errors of the server are returned, not raised."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(),
                                     {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def get(url: str, path: str, timeout: float = 10) -> str:
    with urllib.request.urlopen(url + path, timeout=timeout) as response:
        return response.read().decode()


def stream_lines(url: str, path: str, body: dict, timeout: float = 300):
    """The `data:` payloads of a streamed answer, as text."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        line = line.decode().rstrip("\r\n")
        if line.startswith("data: "):
            yield line[6:]
    connection.close()


def metric(url: str, name: str, label: str = "") -> float:
    """The sum of a metric's series that have the label, written name="value"."""
    values = [float(line.rsplit(" ", 1)[1]) for line in get(url, "/metrics").splitlines()
              if re.match(re.escape(name) + r"[{ ]", line) and label in line]
    assert values, f"{url} has no metric {name}"
    return sum(values)


class Process:
    """One `baton` command that prints a ready line holding its address."""

    def __init__(self, *args: str, env: dict | None = None):
        self.log = tempfile.NamedTemporaryFile(prefix=f"baton-{args[0]}-", suffix=".log", delete=False)
        self.said = tempfile.NamedTemporaryFile(prefix=f"baton-{args[0]}-", suffix=".out")
        self.child = subprocess.Popen([BATON, *args], stdin=subprocess.PIPE, stdout=self.said, stderr=self.log,
                                      env={**os.environ, **(env or {})})
        self.url = self._ready_address()

    def _ready_address(self) -> str:
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end:
            seen = pathlib.Path(self.said.name).read_text()
            found = re.search(r"http://127\.0\.0\.1:\d+", seen)
            if found:
                return found.group(0)
            if self.child.poll() is not None:
                raise RuntimeError(f"exit {self.child.returncode} before ready:\n{seen}\n{self.tail()}")
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"not ready in {START_DEADLINE_S} s:\n{self.tail()}")

    def tail(self) -> str:
        return pathlib.Path(self.log.name).read_text()[-4000:]

    def stop(self):
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(30)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


def server_of(process: psutil.Process) -> tuple[str, str] | None:
    """(role, url) of a `baton serve` process, from its command line and its listening sockets."""
    try:
        args = process.cmdline()
        if "serve" not in args:
            return None
        role = args[args.index("--role") + 1]
        for connection in process.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            url = f"http://127.0.0.1:{connection.laddr.port}"
            try:
                get(url, "/health", timeout=1)
                return role, url
            except OSError:
                continue
            except http.client.HTTPException:
                continue
    except (psutil.NoSuchProcess, ValueError):
        pass
    return None


class Stack(Process):
    """`baton up`: a gateway and its prefill and decode servers."""

    def __init__(self, *args: str):
        super().__init__("up", "--port", str(free_port()), *args)

    def servers(self, role: str) -> list[tuple[psutil.Process, str]]:
        """(process, url) of the running servers of a role."""
        children = psutil.Process(self.child.pid).children(recursive=True)
        found = [(child, server_of(child)) for child in children]
        return [(child, server[1]) for child, server in found if server and server[0] == role]

    def blocks_in_use(self) -> float:
        return sum(metric(url, "vllm:kv_cache_usage_perc") for role in ("prefill", "decode")
                   for _, url in self.servers(role))
