"""How much later the first token comes when another machine computes the prompt, over links of a given speed.

A prefill and a decode server run in network namespaces of their own, joined by a veth pair whose two ends are shaped. The
same number of fresh prompts goes through both of them and to one `--role both` server; the ways alternate within one run, so
that a machine that speeds up or slows down does so for both. What counts is the ratio.

    make bench-overlap    (or: python3 tests/bench/overlap.py [--rounds N] [--tokens N,N] [--links 10,25,0])

Needs root, `ip` and `tc`. Nothing here asserts a time.
"""
import argparse
import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parents[2]
BATON = os.environ.get("BATON_BIN", str(ROOT / "target/release/baton"))
CLONE_NEWNET = 0x40000000
NAMESPACES = {side: f"baton-{side}-{os.getpid()}" for side in ("prefill", "decode")}
ADDRESSES = {"prefill": "10.213.77.1", "decode": "10.213.77.2"}
PORTS = {"prefill": 8100, "decode": 8200, "both": 8300}
READY_WITHIN_S = 120
# Bytes that a plain copy over the link moves, to see what it really carries.
PROBE_BYTES = 256 << 20
# Of the model, in bf16; only to make pools that a few prompts fill.
KV_BYTES_PER_TOKEN = 23_040
# Each is one token after a blank.
WORDS = """time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour game
line end member law car city community name president team minute idea body information back parent face others level office
door health person art war history party result change morning reason research girl guy moment air teacher force education
""".split()
rng = random.Random(time.time_ns())


def run(*command: str):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


def check_machine():
    if os.geteuid() != 0:
        raise SystemExit("only root may make network namespaces: run this as root")
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} missing: install iproute2")
    if not pathlib.Path(BATON).exists():
        raise SystemExit(f"{BATON} is not there: cargo build --release -p baton")


@contextlib.contextmanager
def two_machines():
    """The namespaces and the link between them; gone at the end, whatever happens."""
    try:
        for name in NAMESPACES.values():
            run("ip", "netns", "add", name)
        prefill, decode = NAMESPACES.values()
        run("ip", "link", "add", "kv0", "netns", prefill, "type", "veth", "peer", "name", "kv0", "netns", decode)
        for side, name in NAMESPACES.items():
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "address", "add", f"{ADDRESSES[side]}/24", "dev", "kv0")
            run("ip", "-n", name, "link", "set", "kv0", "up")
        yield
    finally:
        for name in NAMESPACES.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def shape(gbit: float):
    """Both ends send at most so much; 0: as fast as the machine can."""
    for name in NAMESPACES.values():
        tc = ["ip", "netns", "exec", name, "tc", "qdisc"]
        subprocess.run([*tc, "delete", "dev", "kv0", "root"], capture_output=True)
        if gbit:
            # A burst of 256 KB is some packets of the largest size, and nothing beside the KV of a prompt.
            run(*tc, "add", "dev", "kv0", "root", "tbf", "rate", f"{gbit}gbit", "burst", "256kb", "latency", "50ms")


def enter(side: str):
    """This thread, and what it starts, sees the network of that namespace from now on."""
    with open(f"/var/run/netns/{NAMESPACES[side]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def link_gbit() -> float:
    """What one plain connection carries from prefill to decode."""
    listening, ended = threading.Event(), threading.Event()

    def serve():
        enter("prefill")
        with socket.create_server((ADDRESSES["prefill"], 8400)) as listener:
            listening.set()
            connection, _ = listener.accept()
            piece = bytes(1 << 20)
            for _ in range(PROBE_BYTES >> 20):
                connection.sendall(piece)
            connection.close()
        ended.set()

    threading.Thread(target=serve, daemon=True).start()
    assert listening.wait(10)
    with socket.create_connection((ADDRESSES["prefill"], 8400)) as connection:
        start, got, into = time.perf_counter(), 0, bytearray(1 << 20)
        while n := connection.recv_into(into):
            got += n
        took = time.perf_counter() - start
    ended.wait(10)
    return got * 8 / took / 1e9


class Server:
    """One `baton serve`."""

    def __init__(self, role: str, secret: str | None, *args: str):
        side = "prefill" if role == "prefill" else "decode"
        self.host, self.port = ADDRESSES[side], PORTS[role]
        self.log = tempfile.NamedTemporaryFile(prefix=f"baton-{role}-", suffix=".log", delete=False)
        environment = {**os.environ, **({"BATON_KV_SECRET": secret} if secret else {})}
        command = [BATON, "serve", "smollm2", "--role", role, "--host", self.host, "--port", str(self.port), *args]
        self.child = subprocess.Popen(["ip", "netns", "exec", NAMESPACES[side], *command], stdout=subprocess.PIPE,
                                      stderr=self.log, text=True, env=environment)
        timer = threading.Timer(READY_WITHIN_S, self.child.kill)
        timer.start()
        if "http://" not in self.child.stdout.readline():
            raise SystemExit(f"{role} server did not start:\n{pathlib.Path(self.log.name).read_text()[-2000:]}")
        timer.cancel()

    def stop(self):
        self.child.terminate()
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()
        os.unlink(self.log.name)

    def ask(self, path: str, body: dict | None = None, headers: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None,
                           {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        assert response.status == 200, (response.status, response.read())
        return response

    def cpu_s(self) -> float:
        """Time that all its threads have computed."""
        # As clock_getcpuclockid(3) makes it of a process id.
        return time.clock_gettime(~self.child.pid << 3 | 2)

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's series that have the label."""
        lines = self.ask("/metrics").read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines
                   if re.match(re.escape(name) + r"[{ ]", line) and label in line)

    def first_token(self, prompt: str, headers: dict | None = None) -> float:
        """Seconds until the first event of a streamed answer."""
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True,
                "stream": True}
        start = time.perf_counter()
        response = self.ask("/v1/completions", body, headers)
        line = response.readline()
        took = time.perf_counter() - start
        assert line.startswith(b"data: {"), line
        response.read()
        return took


def fresh(n_tokens: int) -> str:
    """A prompt that no cache has seen."""
    return " " + " ".join(rng.choice(WORDS) for _ in range(n_tokens))


class Counters:
    """What a request added to the counters of both servers."""

    SERIES = {
        "bytes": ("decode", "kvx_transfer_bytes_total", 'dir="in"'),
        "handed over": ("decode", "kvx_transfer_seconds_count", 'phase="total"'),
        "hand-over": ("decode", "kvx_transfer_seconds_sum", 'phase="total"'),
        "placing": ("decode", "kvx_transfer_seconds_sum", 'phase="h2d"'),
        "prefill": ("prefill", "vllm:request_prefill_time_seconds_sum", ""),
        "export": ("prefill", "vllm:tpu_d2h_transfer_time_ms_sum", ""),
    }

    def __init__(self, servers: dict[str, Server]):
        self.servers = servers
        self.before = self.read()

    def read(self) -> dict[str, float]:
        return {what: self.servers[role].metric(name, label) for what, (role, name, label) in self.SERIES.items()}

    def added(self) -> dict[str, float]:
        return {what: value - self.before[what] for what, value in self.read().items()}


class Cell:
    """All measurements of one link and one length."""

    def __init__(self, gbit: float, n_tokens: int):
        self.gbit, self.n_tokens = gbit, n_tokens
        self.alone, self.apart, self.added = [], [], []
        self.cpu_alone, self.cpu_apart = [], []

    def measure(self, servers: dict[str, Server], apart_first: bool):
        named = {"x-prefiller-host-port": f"{ADDRESSES['prefill']}:{PORTS['prefill']}"}
        for apart in (apart_first, not apart_first):
            prompt = fresh(self.n_tokens)
            if apart:
                counters, before = Counters(servers), servers["prefill"].cpu_s() + servers["decode"].cpu_s()
                self.apart.append(servers["decode"].first_token(prompt, named))
                self.cpu_apart.append(servers["prefill"].cpu_s() + servers["decode"].cpu_s() - before)
                self.added.append(counters.added())
                assert self.added[-1]["handed over"] == 1, "the KV did not come over"
            else:
                before = servers["both"].cpu_s()
                self.alone.append(servers["both"].first_token(prompt))
                self.cpu_alone.append(servers["both"].cpu_s() - before)

    def mean(self, what: str) -> float:
        return statistics.median(added[what] for added in self.added)

    def row(self) -> str:
        ratios = sorted(apart / alone for apart, alone in zip(self.apart, self.alone))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        wire = f"{self.mean('bytes') * 8 / self.gbit / 1e6:7.1f}" if self.gbit else f"{'-':>7}"
        return (f"{speed(self.gbit):>9} {self.n_tokens:>7} {statistics.median(self.alone) * 1e3:>9.1f} "
                f"{statistics.median(self.apart) * 1e3:>9.1f} {statistics.median(ratios):>7.3f} "
                f"{quartiles[0]:>7.3f}–{quartiles[2]:.3f} {self.mean('bytes') / 1e6:>7.1f} {wire} "
                f"{self.mean('prefill') * 1e3:>9.1f} {self.mean('export'):>7.1f} "
                f"{(self.mean('hand-over') - self.mean('placing')) * 1e3:>7.1f} {self.mean('placing') * 1e3:>7.1f} {statistics.median(self.cpu_alone) * 1e3:>9.0f} "
                f"{statistics.median(self.cpu_apart) * 1e3:>9.0f}")


def speed(gbit: float) -> str:
    return f"{gbit:g} Gb/s" if gbit else "unshaped"


HEAD = (f"{'link':>9} {'tokens':>7} {'alone':>9} {'apart':>9} {'ratio':>7} {'quartiles':>13} {'MB':>7} {'wire':>7} "
        f"{'prefill':>9} {'export':>7} {'pull':>7} {'place':>7} {'cpu alone':>9} {'cpu apart':>9}")
LEGEND = """
Medians, in ms: to the first token from one server (alone) and through both (apart); the ratio is the median of each pair's.
wire: the KV's bytes at the link's speed, were they sent at the end. prefill: from the engine to the first token there.
export, pull, place: all parts of one prompt's KV out of the blocks, over the link and into blocks; all but the last run beside
the computation. cpu: what the servers computed in all; both of a pair compute on the same cores here."""


def warm_up(servers: dict[str, Server], n_tokens: int):
    """Fills every pool: memory that is written for the first time costs more than the KV that comes there."""
    named = {"x-prefiller-host-port": f"{ADDRESSES['prefill']}:{PORTS['prefill']}"}
    for _ in range(2):
        servers["both"].first_token(fresh(n_tokens))
        servers["decode"].first_token(fresh(n_tokens), named)


def measure(cells: list[Cell], servers: dict[str, Server], rounds: int):
    for i in range(rounds):
        for cell in cells:
            shape(cell.gbit)
            cell.measure(servers, apart_first=i % 2 == 1)
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=numbers, default=[1000, 2000, 4000])
    parser.add_argument("--links", type=numbers, default=[10, 25, 0], help="Gb/s; 0 is as fast as the machine can")
    parser.add_argument("--serve-args", default="", help="further arguments for every server")
    args = parser.parse_args()
    check_machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cells = [Cell(gbit, int(n)) for gbit in args.links for n in args.tokens]
    with two_machines(), contextlib.ExitStack() as running:
        enter("decode")
        longest = int(max(args.tokens)) + 200
        pool = ("--max-model-len", str(longest), "--kv-cache-memory-bytes", str(longest * KV_BYTES_PER_TOKEN * 5 // 4))
        secret, more = secrets.token_hex(32), [*pool, *args.serve_args.split()]
        servers = {}
        for role, extra in (("prefill", ()), ("decode", ("--kv-allow-host", ADDRESSES["prefill"])), ("both", ())):
            servers[role] = Server(role, secret if role != "both" else None, *extra, *more)
            running.callback(servers[role].stop)
        for gbit in args.links:
            shape(gbit)
            print(f"{speed(gbit)}: one plain connection carries {link_gbit():.1f} Gb/s", flush=True)
        shape(0)
        warm_up(servers, int(max(args.tokens)))
        measure(cells, servers, args.rounds)
        print(HEAD, *(cell.row() for cell in cells), LEGEND, sep="\n")


if __name__ == "__main__":
    main()
