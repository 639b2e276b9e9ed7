"""What an endpoint picker costs beside Envoy: CPU of each process for a thousand requests.

Envoy and the picker share one core, the load and the servers have the other. Rounds alternate between Envoy alone and Envoy
with the picker, so that a machine that speeds up or slows down does so for both. CPU is what the scheduler says each process
had; it stays of use on a machine that has other work, which rates and times do not.

    python3 tests/bench/picker.py [--endpoints 10,100,1000] [--picker 'COMMAND with {file}'] [--rounds 3] [--quick]

`--picker minimal` is the round robin of crates/ext-proc/examples, `--picker epp` (the default) `baton epp` with picker.yaml
beside this file. Any other is a command, in which `{file}` becomes a list of endpoints in llm-d's form: all of them are one
server, every fourth called a prefill server. Requests count once all endpoints are known.
"""
import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "envoy"))
import envoy_config as ec  # noqa: E402
from harness import EXAMPLES, ROOT, Envoy, Picker, Upstream, eventually, free_port, minimal  # noqa: E402

BATON = os.environ.get("BATON_BIN", str(ROOT / "target/release/baton"))
SHARED, OTHERS = "0", "1"
# name, bytes of the prompt, connections, requests in a round, path
LOADS = [("0.5 KB", 512, 64, 6000, "/v1/completions"), ("32 KB", 32 << 10, 16, 3000, "/v1/completions"),
         ("220 KB", 220_000, 16, 1000, "/v1/completions"), ("256 events", 512, 32, 600, "/stream?n=256")]


def cpu_ms(pid: int) -> float:
    """Time on a core of all threads, user and kernel."""
    threads = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e6


def rss_mib(pid: int) -> float:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4 / 1024


class Way:
    """Envoy to the servers, with a picker or without."""

    def __init__(self, name: str, picker: Picker | None, upstream: Upstream):
        self.name, self.picker, port = name, picker, free_port()
        if picker:
            filters = [ec.drop_clients_choice(), ec.picker_filter(ec.FULL_DUPLEX, False)]
            clusters = [ec.picked_cluster(), ec.picker_cluster(picker.port, False)]
        else:
            filters, clusters = [], [ec.fixed_cluster("server", upstream.port)]
        # As much as Envoy takes by default before it pushes back.
        self.envoy = Envoy(ec.config(port, filters, clusters, buffer=1 << 20), port, SHARED)
        self.rows: dict[str, list] = {}

    def run(self, load: tuple, part: float = 1):
        name, prompt, conns, count, path = load
        processes = [self.envoy, *([self.picker] if self.picker else [])]
        before = [cpu_ms(process.pid) for process in processes]
        count = int(count * part)
        result = json.loads(subprocess.run(
            ["taskset", "-c", OTHERS, EXAMPLES / "load", f"--to=127.0.0.1:{self.envoy.port}", f"--path={path}",
             f"--conns={conns}", f"--count={count}", f"--prompt={prompt}"], check=True, capture_output=True, timeout=600).stdout)
        assert result["errors"] == 0, result
        spent = [(cpu_ms(process.pid) - was) / count * 1000 for process, was in zip(processes, before)]
        self.rows.setdefault(name, []).append((result["req_s"], *spent))

    def stop(self):
        self.envoy.stop()


def picker_of(command: str, endpoint: str, count: int, folder: str) -> Picker:
    if command == "minimal":
        return Picker(minimal([endpoint] * count), False, SHARED)
    address, port = endpoint.rsplit(":", 1)
    listed = [{"name": f"pod-{i}", "address": address, "port": port,
               "labels": {"llm-d.ai/role": "decode" if i % 4 else "prefill"}} for i in range(count)]
    file = pathlib.Path(folder) / f"endpoints-{count}.json"
    file.write_text(json.dumps({"endpoints": listed}))
    if command != "epp":
        return Picker([word.replace("{file}", str(file)) for word in shlex.split(command)], False, SHARED)
    metrics = free_port()
    config = pathlib.Path(__file__).with_name("picker.yaml")
    picker = Picker([BATON, "epp", f"--config-file={config}", f"--endpoints-file={file}", f"--metrics-port={metrics}"],
                    False, SHARED)
    eventually(lambda: ready(metrics) == count, f"{count} endpoints are known", 120)
    return picker


def ready(port: int) -> float:
    """Endpoints that a picker takes for ready."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("llm_d_epp_ready_endpoints"))


def idle_cores(picker: Picker, seconds: float = 10) -> float:
    """What the picker takes while nobody asks it anything: it watches its endpoints."""
    before = cpu_ms(picker.pid)
    time.sleep(seconds)
    return (cpu_ms(picker.pid) - before) / 1000 / seconds


def table(ways: list[Way], rounds: int):
    names = [load[0] for load in LOADS if load[0] in ways[0].rows]
    print(f"\nms of CPU for 1,000 requests, picker + Envoy, and req/s; medians of {rounds} rounds")
    print(f"{'':24}" + "".join(f"{name:>30}" for name in names) + f"{'picker RSS MiB':>16}")
    for way in ways:
        cells = []
        for name in names:
            columns = [statistics.median(column) for column in zip(*way.rows[name])]
            picker = f"{columns[2]:.0f}" if way.picker else "-"
            cells.append(f"{picker} + {columns[1]:.0f}  ({columns[0]:.0f}/s)")
        rss = f"{rss_mib(way.picker.pid):.0f}" if way.picker else "-"
        print(f"{way.name:24}" + "".join(f"{cell:>30}" for cell in cells) + f"{rss:>16}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picker", default="epp")
    parser.add_argument("--endpoints", default="10,100,1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    args = parser.parse_args()
    part = 0.1 if args.quick else 1
    upstream, ways, pickers = Upstream(OTHERS), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ways.append(Way("Envoy alone", None, upstream))
            for count in map(int, args.endpoints.split(",")):
                pickers.append(picker_of(args.picker, upstream.endpoint, count, folder))
                ways.append(Way(f"with picker, {count} endpoints", pickers[-1], upstream))
            for way in ways:
                if way.picker:
                    print(f"{way.name}: {idle_cores(way.picker):.3f} cores while nobody asks", flush=True)
            for way in ways:
                way.run((*LOADS[0][:3], 500, LOADS[0][4]))
                way.rows.clear()
            for _ in range(args.rounds):
                for load in LOADS:
                    for way in ways:
                        way.run(load, part)
            table(ways, args.rounds)
        finally:
            for process in [*ways, *pickers, upstream]:
                process.stop()


if __name__ == "__main__":
    main()
