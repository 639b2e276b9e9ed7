"""What a router costs: CPU of its process for a thousand requests, ours beside others', with Envoy as a plain proxy.

Every router has a core to itself while it is measured; the load and two servers that answer at once have the other. Rounds
go from router to router, so that a machine that speeds up or slows down does so for all. Each chooses its servers by what
their caches hold, as it does by default: baton by least work, the others by `cache_aware`.

    make bench-routers    (or: PYTHON tests/bench/routers.py [--rounds 3] [--quick])

PYTHON is one that has requirements-routers.txt.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "envoy"))
import envoy_config as ec  # noqa: E402
from client import ask  # noqa: E402
from harness import EXAMPLES, Child, Envoy, Upstream, eventually, free_port  # noqa: E402
from picker import BATON, LOADS, OTHERS, SHARED, cpu_ms, rss_mib  # noqa: E402

# Module, and how it is told to be quiet.
PEERS = {"sglang-router 0.3.2": ("sglang_router", "warn"), "smg 1.13.0": ("smg", "warn"),
         "vllm-router 0.1.17": ("vllm_router", "warning")}
# Of streams nothing here is asked: not all routers pass on what they do not know.
LOADS = [load for load in LOADS if load[4] == "/v1/completions"]
QUESTION = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 1}).encode()


def envoy(servers: list[Upstream], port: int, folder: str) -> Child:
    cluster = ec.fixed_cluster("servers", servers[0].port)
    ends = [{"endpoint": {"address": ec.address(server.port)}} for server in servers]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": ends}]
    return Envoy(ec.config(port, [], [cluster], buffer=1 << 20), port, SHARED)


def baton(servers: list[Upstream], port: int, folder: str) -> Child:
    file = pathlib.Path(folder) / "gateway.json"
    listed = [{"address": server.endpoint, "role": "both"} for server in servers]
    file.write_text(json.dumps({"port": port, "endpoints": listed}))
    return Child([BATON, "gateway", "--config", file], port, SHARED)


def peer(module: str, quiet: str):
    def start(servers: list[Upstream], port: int, folder: str) -> Child:
        urls = [f"http://{server.endpoint}" for server in servers]
        return Child([sys.executable, "-m", f"{module}.launch_router", "--worker-urls", *urls, "--policy", "cache_aware",
                      "--host", "127.0.0.1", "--port", port, "--log-level", quiet, "--prometheus-port", free_port()],
                     port, SHARED)
    return start


class Router:
    def __init__(self, name: str, start, servers: list[Upstream], folder: str):
        self.name, self.port, self.rows = name, free_port(), {}
        self.process = start(servers, self.port, folder)
        head = {"content-type": "application/json"}
        answers = lambda: ask(self.port, "POST", "/v1/completions", head, QUESTION).status == 200
        eventually(answers, f"{name} knows its servers", 60)

    def run(self, load: tuple, part: float = 1):
        name, prompt, conns, count, path = load
        count, before = int(count * part), cpu_ms(self.process.pid)
        result = json.loads(subprocess.run(
            ["taskset", "-c", OTHERS, EXAMPLES / "load", f"--to=127.0.0.1:{self.port}", f"--path={path}",
             f"--conns={conns}", f"--count={count}", f"--prompt={prompt}"], check=True, capture_output=True, timeout=600).stdout)
        assert result["errors"] == 0, (self.name, result)
        self.rows.setdefault(name, []).append(((cpu_ms(self.process.pid) - before) / count * 1000, result["req_s"]))


def table(routers: list[Router], rounds: int):
    print(f"\nms of CPU for 1,000 requests, how many times baton's, and req/s; medians of {rounds} rounds")
    print(f"{'':22}" + "".join(f"{load[0]:>28}" for load in LOADS) + f"{'RSS MiB':>10}")
    middle = {r.name: [[statistics.median(c) for c in zip(*r.rows[load[0]])] for load in LOADS] for r in routers}
    for router in routers:
        cells = [f"{cpu:.0f}  ({cpu / ours:.2f})  {rate:.0f}/s"
                 for (cpu, rate), (ours, _) in zip(middle[router.name], middle["baton gateway"])]
        print(f"{router.name:22}" + "".join(f"{cell:>28}" for cell in cells) + f"{rss_mib(router.process.pid):>10.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    args = parser.parse_args()
    servers, routers = [Upstream(OTHERS) for _ in range(2)], []
    starts = {"Envoy": envoy, "baton gateway": baton, **{name: peer(*how) for name, how in PEERS.items()}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, start in starts.items():
                routers.append(Router(name, start, servers, folder))
            for router in routers:
                router.run((*LOADS[0][:3], 500, LOADS[0][4]))
                router.rows.clear()
            for _ in range(args.rounds):
                for load in LOADS:
                    for router in routers:
                        router.run(load, 0.1 if args.quick else 1)
            table(routers, args.rounds)
        finally:
            for process in [*(router.process for router in routers), *servers]:
                process.stop()


if __name__ == "__main__":
    main()
