"""`baton epp` follows a pool whose pods, objectives and API server come and go, with the rights of the manifests."""
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import h2.exceptions
import pytest
import wire
from relay import Relay
from running import Cluster
from scene import BATON, ROOT, Api, Pods, Repeated, account, eventually, http_ask, metric, objective, pool

HERE = pathlib.Path(__file__).parent
RBAC = ROOT / "crates/k8s/rbac"
SERVING, NOT_SERVING = 1, 2
# So long an endpoint may be chosen after it is gone, and missed after it came.
LAG_S = 3
STAY = [f"127.1.0.{n}" for n in range(1, 4)]
COME_AND_GO = [f"127.1.1.{n}" for n in range(1, 13)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Picker:
    """A picker of the pool `pool`, as a process on loopback."""

    def __init__(self, folder: pathlib.Path, name: str, kubeconfig: dict, namespace: str, *flags: str):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(kubeconfig))
        self.port, self.health, self.metrics = free_port(), free_port(), free_port()
        with (folder / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [BATON, "epp", "--pool-name", "pool", "--pool-namespace", namespace, "--kubeconfig", file,
                 "--host", "127.0.0.1", "--secure-serving=false", "--metrics-endpoint-auth=false",
                 "--grpc-port", str(self.port), "--grpc-health-port", str(self.health), "--metrics-port", str(self.metrics),
                 "--drain-timeout=0s", *flags], stdout=log, stderr=log)
        try:
            eventually(lambda: self.status("liveness") == SERVING or self.process.poll() is not None, "the picker lives", 30)
        except AssertionError:
            self.stop()
            raise
        assert self.process.poll() is None, (folder / f"{name}.log").read_text()

    def status(self, service: str = "readiness") -> int:
        try:
            connection = wire.Connection("127.0.0.1", self.health, tls=False)
        except OSError:
            return 0
        try:
            stream = connection.stream("/grpc.health.v1.Health/Check")
            stream.send(wire.field(1, service))
            stream.finish()
            return wire.one(stream.message(), 1, default=0)
        except (wire.Ended, OSError):
            return 0
        finally:
            connection.close()

    def page(self) -> str:
        return http_ask(f"127.0.0.1:{self.metrics}", "/metrics")[2]

    def pods(self) -> set[str]:
        """The names of the endpoints' pods."""
        return set(re.findall(r'llm_d_epp_inflight_requests\{endpoint_name="(.*)-rank-0"', self.page()))

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, how: int = signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)


class Asker:
    """Asks a picker where requests go, and remembers what it said and when."""

    def __init__(self, picker: Picker):
        self.picker, self.seen = picker, []
        self.connection = wire.Connection("127.0.0.1", picker.port, tls=False)

    def ask(self, headers: dict | None = None) -> str:
        stream = self.connection.stream()
        body = json.dumps({"model": "m", "prompt": f"{random.random()} and more"}).encode()
        stream.send(wire.headers(wire.REQUEST, {":method": "POST", ":path": "/v1/completions", **(headers or {})}),
                    wire.body(wire.REQUEST, body, end=True))
        began = time.monotonic()
        answer = stream.answer()
        said = str(answer.status or answer.set["x-gateway-destination-endpoint"].rsplit(":", 1)[0])
        self.seen.append((began, time.monotonic(), said))
        # One that was refused is over already.
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            stream.reset()
        return said

    def __call__(self):
        self.ask()
        time.sleep(0.005)


class Truth:
    """When which address was ready, as the API server confirmed it."""

    def __init__(self):
        self.spans: dict[str, list[list[float]]] = {}

    def begins(self, address: str):
        self.spans.setdefault(address, []).append([time.monotonic(), float("inf")])

    def ends(self, address: str):
        self.spans[address][-1][1] = time.monotonic()

    def could_be(self, address: str, began: float, ended: float) -> bool:
        return any(since <= ended and began <= until + LAG_S for since, until in self.spans.get(address, []))


class Scene:
    def __init__(self, cluster, folder: pathlib.Path, namespace: str):
        self.cluster, self.folder, self.namespace, self.api = cluster, folder, namespace, Api(cluster)
        cluster.kubectl("create", "namespace", namespace)
        # Without it no pod may be made.
        cluster.kubectl("-n", namespace, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        for role in ("picker", "leader"):
            cluster.kubectl("-n", namespace, "apply", "-f", str(RBAC / f"{role}.yaml"))
        self.config = account(cluster, namespace, "baton-picker", "baton-picker-leader")
        server = self.config["clusters"][0]["cluster"]
        self.relay = Relay(int(server["server"].rsplit(":", 1)[1]))
        server["server"] = f"https://127.0.0.1:{self.relay.port}"
        self.pods, self.truth, self.port = Pods(self.api, namespace), Truth(), free_port()
        self.servers = subprocess.Popen([sys.executable, HERE / "stand_in.py", str(self.port), *STAY, *COME_AND_GO],
                                        stdout=subprocess.PIPE)
        assert self.servers.stdout.readline() == b"ready\n"
        self.pickers = []

    def picker(self, name: str = "picker", *flags: str) -> Picker:
        self.pickers.append(Picker(self.folder, name, self.config, self.namespace, *flags))
        return self.pickers[-1]

    def apply(self, text: str):
        self.cluster.kubectl("apply", "-f", "-", stdin=text)

    def come(self, address: str):
        # Before it is told, since the picker may know before we are answered.
        self.truth.begins(address)
        self.pods.make(named(address), "m", address)

    def churn(self, there: dict[str, str]):
        """One change of one pod that comes and goes; `there` says how each is."""
        address = random.choice(COME_AND_GO)
        name, now = named(address), there.get(address, "gone")
        if now == "gone":
            self.come(address)
            there[address] = "ready"
        elif now == "ready" and random.random() < 0.5:
            self.pods.tell(name, address, False)
            self.truth.ends(address)
            there[address] = "unready"
        elif now == "unready" and random.random() < 0.5:
            self.truth.begins(address)
            self.pods.tell(name, address, True)
            there[address] = "ready"
        else:
            self.pods.remove(name)
            if now == "ready":
                self.truth.ends(address)
            there[address] = "gone"

    def stop(self):
        for picker in self.pickers:
            picker.process.send_signal(signal.SIGCONT)
            picker.stop(signal.SIGKILL)
        self.relay.stop()
        self.servers.kill()
        self.servers.wait()


def named(address: str) -> str:
    return "p-" + address.replace(".", "-")


@pytest.fixture(scope="module")
def plane():
    cluster = Cluster("follow")
    cluster.up("control-plane")
    try:
        cluster.define("inference")
        cluster.define("llm-d")
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def scene(plane, tmp_path, request):
    made = Scene(plane, tmp_path, request.node.name.replace("_", "-")[-50:].strip("-"))
    try:
        yield made
    finally:
        made.stop()


def all_of(there: dict[str, str]) -> set[str]:
    return {named(a) for a in STAY} | {named(a) for a, how in there.items() if how == "ready"}


def wrong(scene: Scene, askers: list[Asker]) -> list:
    """Answers that name an endpoint that was long gone, or none although some always stay."""
    return [entry for asker in askers for entry in asker.seen if not scene.truth.could_be(entry[2], entry[0], entry[1])]


def test_what_changes_under_load_is_followed_through_cuts_and_a_killed_api_server(scene):
    scene.apply(pool(scene.namespace, "m", scene.port))
    for address in STAY:
        scene.come(address)
    picker = scene.picker()
    eventually(lambda: picker.status() == SERVING and picker.pods() == all_of({}), "the first pods")
    time.sleep(1)
    files, there, askers = picker.files(), {}, [Asker(picker) for _ in range(2)]
    with Repeated(*askers):
        for round in range(3):
            # Nothing is cut in the first round, then every connection every half second.
            end, cut = time.monotonic() + 8, time.monotonic()
            while time.monotonic() < end:
                scene.churn(there)
                if round and time.monotonic() > cut + 0.5:
                    scene.relay.cut()
                    cut = time.monotonic()
            eventually(lambda: picker.pods() == all_of(there), lambda: f"{all_of(there)}, not {picker.pods()}", 20)
        asked = sum(len(asker.seen) for asker in askers)
        scene.cluster.kill("kube-apiserver")
        time.sleep(5)
        assert picker.pods() == all_of(there) and picker.status() == SERVING, "what was known stays"
        assert sum(len(asker.seen) for asker in askers) > asked + 50, "and requests are answered from it"
        scene.cluster.start("kube-apiserver")
        eventually(lambda: scene.cluster.kubectl("get", "--raw", "/readyz", check=False) == "ok", "the API server is back")
        for _ in range(10):
            scene.churn(there)
        eventually(lambda: picker.pods() == all_of(there), "it is followed again", 30)
    assert scene.relay.cuts > 20, scene.relay.cuts
    total = sum(len(asker.seen) for asker in askers)
    print(f"{total} requests, {scene.relay.cuts} connections cut")
    assert total > 1000 and wrong(scene, askers) == []
    assert picker.files() < files + 60, "connections that were cut are closed"


def test_a_pool_is_changed_deleted_and_made_again_under_load(scene):
    scene.apply(pool(scene.namespace, "m", scene.port))
    for address in STAY:
        scene.come(address)
    for address in COME_AND_GO[:3]:
        scene.pods.make(named(address), "other", address)
    picker = scene.picker()
    eventually(lambda: picker.status() == SERVING and picker.pods() == all_of({}), "the first pods")
    asker = Asker(picker)
    others = {named(a) for a in COME_AND_GO[:3]}
    with Repeated(asker):
        time.sleep(1)
        scene.apply(pool(scene.namespace, "other", scene.port))
        eventually(lambda: picker.pods() == others, "the pods of the new selector")
        settled = time.monotonic()
        time.sleep(1)
        after = {said for began, _, said in asker.seen if began > settled}
        assert after and after <= set(COME_AND_GO[:3]), after
        scene.cluster.kubectl("-n", scene.namespace, "delete", "inferencepool", "pool")
        eventually(lambda: picker.status() == NOT_SERVING and picker.pods() == set(), "no pool, no endpoints")
        gone = time.monotonic()
        time.sleep(0.5)
        assert {said for began, _, said in asker.seen if began > gone} == {"503"}
        assert picker.status("liveness") == SERVING
        scene.apply(pool(scene.namespace, "m", scene.port))
        eventually(lambda: picker.status() == SERVING and picker.pods() == all_of({}), "the pool is back")
        back = time.monotonic()
        time.sleep(1)
        after = {said for began, _, said in asker.seen if began > back}
        assert after and after <= set(STAY), after


def test_objectives_are_made_changed_and_deleted_under_load(scene):
    scene.apply(pool(scene.namespace, "m", scene.port))
    scene.come(STAY[0])
    picker = scene.picker()
    eventually(lambda: picker.status() == SERVING and picker.pods() == {named(STAY[0])}, "the first pod")
    background, one = Asker(picker), Asker(picker)

    def counts_as(priority: int) -> bool:
        label, name = f'priority="{priority}"', "llm_d_epp_request_total"
        before = metric(picker.page(), name, label)
        one.ask({"x-llm-d-inference-objective": "o"})
        return metric(picker.page(), name, label) > before

    with Repeated(background):
        for priority in (7, -3, 12):
            scene.apply(objective(scene.namespace, "o", priority))
            eventually(lambda: counts_as(priority), f"priority {priority}", 20)
            scene.relay.cut()
        # Objectives of other pools count for nothing.
        scene.apply(objective(scene.namespace, "o", 5).replace('"poolRef": {"name": "pool"}', '"poolRef": {"name": "x"}'))
        time.sleep(1)
        assert not counts_as(12) and not counts_as(5)
        scene.apply(objective(scene.namespace, "o", 5))
        eventually(lambda: counts_as(5), "priority 5", 20)
        scene.cluster.kubectl("-n", scene.namespace, "delete", "inferenceobjective.llm-d.ai", "o")
        eventually(lambda: not counts_as(5), "no objective, no priority", 20)
    assert {said for _, _, said in background.seen} == {STAY[0]}


def test_of_two_pickers_one_leads_and_the_other_when_it_is_killed_or_hangs(scene):
    scene.apply(pool(scene.namespace, "m", scene.port))
    scene.come(STAY[0])
    ready = lambda picker: picker.status() == SERVING
    one = scene.picker("one", "--ha-enable-leader-election")
    eventually(lambda: ready(one), "the first leads")
    two = scene.picker("two", "--ha-enable-leader-election")
    eventually(lambda: two.pods() == {named(STAY[0])}, "the second follows the pool too")
    assert Asker(two).ask() == STAY[0]
    time.sleep(5)
    assert ready(one) and not ready(two) and two.status("liveness") == SERVING
    one.stop(signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: ready(two), "the second leads", 30)
    took = time.monotonic() - killed
    print(f"{took:.1f} s from the leader's death to the next leader")
    # Nobody gave the lease back, so that it had to run out.
    assert 10 < took < 22, took
    three = scene.picker("three", "--ha-enable-leader-election")
    two.process.send_signal(signal.SIGSTOP)
    eventually(lambda: ready(three), "the third leads while the second hangs", 30)
    two.process.send_signal(signal.SIGCONT)
    eventually(lambda: two.status() == NOT_SERVING, "who comes to itself does not lead", 3)
    time.sleep(4)
    assert ready(three) and not ready(two)
    three.stop()
    given_back = time.monotonic()
    eventually(lambda: ready(two), "a lease that is given back is taken", 10)
    print(f"{time.monotonic() - given_back:.1f} s from a polite end to the next leader")
