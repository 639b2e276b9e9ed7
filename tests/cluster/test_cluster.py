"""The cluster itself: it comes up, runs `baton serve` in a pod behind a service, survives its parts, and leaves nothing."""
import json
import os
import pathlib
import subprocess

import pytest
from running import CONTROL_GROUPS, Cluster, stat_of
from scene import IMAGE, ROOT, eventually, load_baton


@pytest.fixture(scope="module")
def node():
    cluster = Cluster("smoke")
    cluster.up("node")
    yield cluster
    cluster.down()


@pytest.fixture
def control_plane():
    cluster = Cluster("plane")
    cluster.up("control-plane")
    yield cluster
    cluster.down()


def pod(name: str, model: str) -> str:
    return json.dumps({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "serve"}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "serve", "image": IMAGE, "imagePullPolicy": "Never",
                "args": ["serve", "/model.gguf", "--role", "both", "--device", "sim", "--host", "0.0.0.0", "--port", "8000"],
                "ports": [{"containerPort": 8000}],
                "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1},
                "volumeMounts": [{"name": "model", "mountPath": "/model.gguf", "readOnly": True}],
            }],
            "volumes": [{"name": "model", "hostPath": {"path": model, "type": "File"}}],
        }})


def test_a_server_in_a_pod_answers_through_a_service(node):
    load_baton(node)
    node.kubectl("apply", "-f", "-", stdin=pod("serve", os.environ["BATON_SMOLLM2"]))
    node.kubectl("expose", "pod", "serve", "--port", "80", "--target-port", "8000")
    try:
        node.kubectl("wait", "--for=condition=Ready", "pod/serve", "--timeout=90s")
    except Exception as error:
        raise AssertionError(node.kubectl("describe", "pod", "serve") + node.kubectl("logs", "serve", check=False)) from error
    address = node.kubectl("get", "service", "serve", "-o", "jsonpath={.spec.clusterIP}")
    ask = ["curl", "-sS", "--max-time", "20", "-H", "content-type: application/json"]
    # The node's rules for a service follow a moment after its pod is ready.
    models = eventually(lambda: node.run(*ask, f"http://{address}/v1/models", check=False), "the service leads to the pod")
    model = json.loads(models)["data"][0]["id"]
    question = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 3})
    answer = json.loads(node.run(*ask, f"http://{address}/v1/completions", "-d", question))
    assert answer["usage"]["completion_tokens"] == 3, answer


def test_the_api_server_may_be_stopped_and_started(control_plane):
    control_plane.kubectl("create", "configmap", "kept")
    control_plane.stop("kube-apiserver")
    assert control_plane.ended() == ["kube-apiserver"]
    control_plane.start("kube-apiserver")
    eventually(lambda: "kept" in control_plane.kubectl("get", "configmaps", "-o", "name", check=False), "it is back")
    assert control_plane.ended() == []


def test_up_twice_is_up_once(control_plane):
    before = control_plane.state["parts"]
    control_plane.up("control-plane")
    assert control_plane.state["parts"] == before


def test_nothing_stays_after_down():
    for kind in ("control-plane", "node"):
        cluster = Cluster("gone")
        cluster.up(kind)
        if kind == "node":
            cluster.kubectl("create", "deployment", "d", "--image=baton.local/pause:1", "--replicas=2", "--", "/pause")
        pids = [part["pid"] for part in cluster.state["parts"].values()]
        folder = cluster.folder
        cluster.down()
        assert left(folder, pids) == []
        cluster.down()


def test_nothing_stays_after_half_an_up(monkeypatch):
    cluster = Cluster("half")
    monkeypatch.setattr(Cluster, "_node", lambda self: 1 / 0)
    folder = cluster.folder
    with pytest.raises(ZeroDivisionError):
        cluster.up("node")
    assert left(folder, []) == []
    # As little as if `up` itself had been killed: what it started is not noted anywhere.
    cluster.up("control-plane")
    pids = [part["pid"] for part in cluster.state["parts"].values()]
    (folder / "state.json").unlink()
    Cluster("half").down()
    assert left(folder, pids) == []


def left(folder: pathlib.Path, pids: list[int]) -> list[str]:
    """Traces of a cluster: processes, files, mounts, control groups."""
    found = [str(folder)] if folder.exists() else []
    found += [f"process {pid}" for pid in pids if stat_of(pid)[:1] not in ([], ["Z"])]
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            pass
    found += [line for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    found += [str(path) for path in CONTROL_GROUPS.glob(f"**/baton-{folder.name}")]
    return found


def test_two_clusters_stand_side_by_side():
    one, two = Cluster("one"), Cluster("two")
    try:
        one.up("control-plane")
        two.up("control-plane")
        one.kubectl("create", "configmap", "mine")
        assert "mine" not in two.kubectl("get", "configmaps", "-o", "name")
    finally:
        one.down()
        two.down()


def test_the_tool_says_what_is_missing(tmp_path):
    environment = os.environ | {"BATON_CLUSTER_CACHE": str(tmp_path)}
    done = subprocess.run([str(ROOT / "tests/cluster/cluster.py"), "up"], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1 and "not built: etcd" in done.stderr, done.stderr
