"""What tests put on a cluster, and how they look at it."""
import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import re
import ssl
import threading
import time
import urllib.parse

import images
from running import Cluster

ROOT = pathlib.Path(__file__).parents[2]
BATON = pathlib.Path(os.environ.get("BATON_BIN", ROOT / "target/release/baton"))
IMAGE = "baton.local/baton:1"
CLONE_NEWNET = 0x40000000


def eventually(condition, what, within_s: float = 60):
    """The first true value of condition(); fails with `what`, a text or what makes one, when none came in time."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within_s} s: {what() if callable(what) else what}"
        time.sleep(0.1)
    return value


@contextlib.contextmanager
def network(cluster: Cluster):
    """Connections that this thread makes meanwhile are made on the cluster's network."""
    holder = cluster.state.get("holder")
    if not holder:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{holder['pid']}/ns/net") as inner:
        assert libc.setns(inner.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(own.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def http_ask(address: str, path: str, body: dict | None = None, headers: dict | None = None, within_s: float = 60):
    """Status, headers and body of one request."""
    connection = http.client.HTTPConnection(address, timeout=within_s)
    try:
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def metric(page: str, name: str, *labels: str) -> float:
    """The sum of the series of this name that have all of these labels, each `key="value"`."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines()
               if re.match(re.escape(name) + r"[{ ]", line) and all(label in line for label in labels))


class Api:
    """The API server, asked as the administrator; kubectl would need a process for each of many small changes."""

    def __init__(self, cluster: Cluster):
        config = json.loads(cluster.kubeconfig.read_text())
        server = config["clusters"][0]["cluster"]
        self.cluster, self.address = cluster, urllib.parse.urlsplit(server["server"]).netloc
        self.tls = ssl.create_default_context(cafile=server["certificate-authority"])
        self.head = {"authorization": f"Bearer {cluster.state['token']}"}

    def ask(self, method: str, path: str, body: dict | None = None, kind: str = "application/json") -> dict:
        with network(self.cluster):
            connection = http.client.HTTPSConnection(self.address, timeout=30, context=self.tls)
            try:
                connection.request(method, path, json.dumps(body) if body else None, self.head | {"content-type": kind})
                answer = connection.getresponse()
                said = answer.read()
            finally:
                connection.close()
        assert answer.status < 300, f"{method} {path}: {answer.status} {said.decode()}"
        return json.loads(said)


class Pods:
    """Pods of a namespace without a node: what a kubelet would say of them is said here."""

    def __init__(self, api: Api, namespace: str):
        self.api, self.path = api, f"/api/v1/namespaces/{namespace}/pods"

    def make(self, name: str, app: str, address: str, ready: bool = True):
        self.api.ask("POST", self.path, {
            "metadata": {"name": name, "labels": {"app": app}},
            "spec": {"schedulerName": "nobody", "containers": [{"name": "c", "image": "i"}]}})
        self.tell(name, address, ready)

    def tell(self, name: str, address: str, ready: bool):
        status = {"podIP": address, "podIPs": [{"ip": address}],
                  "conditions": [{"type": "Ready", "status": str(ready)}]}
        self.api.ask("PATCH", f"{self.path}/{name}/status", {"status": status}, "application/merge-patch+json")

    def remove(self, name: str):
        self.api.ask("DELETE", f"{self.path}/{name}")


def pool(namespace: str, app: str, port: int) -> str:
    return json.dumps({
        "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
        "metadata": {"name": "pool", "namespace": namespace},
        "spec": {"selector": {"matchLabels": {"app": app}}, "targetPorts": [{"number": port}],
                 "endpointPickerRef": {"name": "picker", "port": {"number": 9002}}}})


def objective(namespace: str, name: str, priority: int) -> str:
    return json.dumps({
        "apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceObjective", "metadata": {"name": name, "namespace": namespace},
        "spec": {"priority": priority, "poolRef": {"name": "pool"}}})


def account(cluster: Cluster, namespace: str, *roles: str) -> dict:
    """A kubeconfig of the service account `picker`, to whom these roles of the namespace are bound."""
    cluster.kubectl("-n", namespace, "create", "serviceaccount", "picker")
    for role in roles:
        cluster.kubectl("-n", namespace, "create", "rolebinding", role, "--role", role,
                        "--serviceaccount", f"{namespace}:picker")
    config = json.loads(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": cluster.kubectl("-n", namespace, "create", "token", "picker").strip()}
    return config


def asked(cluster: Cluster, namespace: str, who: str) -> dict[str, set[int]]:
    """What a service account asked for, as "VERB GROUP/RESOURCE" or "VERB PATH", and how that was answered."""
    found: dict[str, set[int]] = {}
    for line in (cluster.folder / "audit.log").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["user"]["username"] == f"system:serviceaccount:{namespace}:{who}":
                about = entry.get("objectRef", {})
                thing = f"{about.get('apiGroup', '')}/{about['resource']}" if "resource" in about else entry["requestURI"]
                found.setdefault(f"{entry['verb']} {thing}", set()).add(entry["responseStatus"]["code"])
    return found


def allowed(*manifests: dict) -> set[str]:
    """What roles allow, in the words of `asked`."""
    return {f"{verb} {group}/{resource}" for role in manifests for rule in role["rules"] for verb in rule["verbs"]
            for group in rule.get("apiGroups", []) for resource in rule.get("resources", [])}


class Repeated:
    """Something done again and again by a thread until `stop`, which fails if it ever failed."""

    def __init__(self, *what):
        self._stopped, self._error = threading.Event(), None
        self._threads = [threading.Thread(target=self._run, args=(each,), daemon=True) for each in what]
        for thread in self._threads:
            thread.start()

    def _run(self, what):
        try:
            while not self._stopped.is_set():
                what()
        except BaseException as error:  # noqa: BLE001
            self._error = error

    def stop(self):
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "it hangs"
        if self._error:
            raise self._error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._stopped.set()
        if kind is None:
            self.stop()


def load_baton(cluster: Cluster, name: str = IMAGE, *arguments: str):
    """Gives the node an image whose entry point is our binary, with these first arguments."""
    file = cluster.folder / "image.tar"
    images.make(file, name, BATON, arguments=arguments)
    cluster.load(file)
    file.unlink()
