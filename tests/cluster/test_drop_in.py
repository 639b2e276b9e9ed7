"""The TPU guide's stack on Istio, by upstream's own chart, with the picker's image exchanged and nothing else."""
import difflib
import json
import os
import pathlib
import re
import secrets
import time
import uuid

import images
import pytest
from parts import BIN, CHARTS
from scene import Repeated, asked, eventually, http_ask, load_baton, metric, network

HERE = pathlib.Path(__file__).parent / "drop_in"
NAMESPACE, RELEASE = "llm-d-pd", "gaie-pd"
PICKER, GATEWAY = f"{RELEASE}-epp", "infra-pd-inference-gateway"
SERVERS = "ms-pd-llm-d-modelservice"
UPSTREAM = "registry=registry.k8s.io,repository=gateway-api-inference-extension/epp,tag=v1.5.0,pullPolicy=Always"


class Stack:
    def __init__(self, cluster):
        self.cluster = cluster
        load_baton(cluster)
        load_baton(cluster, "baton.local/epp:1", "epp")
        file = cluster.folder / "envoy.tar"
        images.make(file, "baton.local/envoy:1", BIN / "envoy")
        cluster.load(file)
        file.unlink()
        cluster.kubectl("create", "namespace", NAMESPACE)
        servers = (HERE / "servers.yaml").read_text()
        self.kubectl("apply", "-f", "-", stdin=servers.replace("secret: SECRET", f"secret: {secrets.token_hex(32)}")
                     .replace("path: MODEL", f"path: {os.environ['BATON_SMOLLM2']}"))
        self.helm("install", RELEASE, str(CHARTS / "inferencepool"), "-f", str(HERE / "values.yaml"))
        self.kubectl("apply", "-f", str(HERE / "gateway.yaml"))
        self.rolled_out()
        self.address = self.kubectl("get", "service", GATEWAY, "-o", "jsonpath={.spec.clusterIP}")

    def kubectl(self, *argv: str, **more) -> str:
        return self.cluster.kubectl("-n", NAMESPACE, *argv, **more)

    def helm(self, *argv: str) -> str:
        return self.cluster.run(str(BIN / "helm"), "-n", NAMESPACE, *argv)

    def rolled_out(self):
        for name in (f"{SERVERS}-prefill", f"{SERVERS}-decode", PICKER, GATEWAY):
            try:
                self.kubectl("rollout", "status", f"deployment/{name}", "--timeout=120s")
            except Exception as error:
                raise AssertionError(f"{error}\n" + self.kubectl("get", "pods", "-o", "wide") + self.kubectl(
                    "describe", "pods", "-l", self.selector(name)) + self.kubectl("logs", f"deployment/{name}", check=False)
                ) from error

    def selector(self, deployment: str) -> str:
        labels = self.kubectl("get", "deployment", deployment, "-o", "jsonpath={.spec.selector.matchLabels}")
        return ",".join(f"{key}={value}" for key, value in json.loads(labels).items())

    def pods(self, deployment: str) -> dict[str, str]:
        """Names and addresses of a deployment's pods."""
        listed = json.loads(self.kubectl("get", "pods", "-l", self.selector(deployment), "-o", "json"))["items"]
        return {pod["metadata"]["name"]: pod["status"].get("podIP", "") for pod in listed}

    def page(self, address: str) -> str:
        with network(self.cluster):
            return http_ask(address, "/metrics")[2]

    def ask(self, path: str, body: dict | None = None, **more):
        with network(self.cluster):
            return http_ask(self.address, path, body, **more)

    def complete(self, prompt: str, **more) -> dict:
        status, _, body = self.ask("/v1/completions", {"model": "smollm2", "prompt": prompt, "max_tokens": 4,
                                                       "temperature": 0, **more})
        assert status == 200, f"{status} {body}"
        return json.loads(body)

    def conditions(self, kind: str, name: str, path: str) -> dict[str, str]:
        found = json.loads(self.kubectl("get", kind, name, "-o", f"jsonpath={path}") or "[]")
        return {condition["type"]: condition["status"] for condition in found}


@pytest.fixture(scope="module")
def stack(mesh):
    return Stack(mesh)


def a_story() -> str:
    return f"{uuid.uuid4().hex} tells a story. " + "The baton goes from hand to hand. " * 20


def test_the_picker_is_upstreams_but_for_its_image(stack):
    def rendered(*flags: str) -> list[str]:
        return stack.helm("template", RELEASE, str(CHARTS / "inferencepool"), "-f", str(HERE / "values.yaml"), *flags).splitlines()
    upstream = rendered("--set", ",".join(f"inferenceExtension.image.{pair}" for pair in UPSTREAM.split(",")))
    changed = [line for line in difflib.ndiff(upstream, rendered()) if line[0] in "+-"]
    assert {re.sub(r"\s+", " ", line).strip() for line in changed} == {
        "- image: registry.k8s.io/gateway-api-inference-extension/epp:v1.5.0", "- imagePullPolicy: Always",
        "+ image: baton.local/epp:1", "+ imagePullPolicy: Never"}


def test_every_condition_is_true(stack):
    for kind, name, path, wanted in [
            ("gateway", GATEWAY, "{.status.conditions}", {"Accepted", "Programmed"}),
            ("gateway", GATEWAY, "{.status.listeners[0].conditions}", {"Accepted", "Programmed", "ResolvedRefs"}),
            ("httproute", "llm-d-pd-disaggregation", "{.status.parents[0].conditions}", {"Accepted", "ResolvedRefs"}),
            ("inferencepool", RELEASE, "{.status.parents[0].conditions}", {"Accepted", "ResolvedRefs"})]:
        eventually(lambda: all(stack.conditions(kind, name, path).get(each) == "True" for each in wanted),
                   lambda: f"{kind} {name}: {stack.conditions(kind, name, path)}", 30)


def test_the_guides_requests_are_answered(stack):
    status, _, body = eventually(lambda: (said := stack.ask("/v1/models"))[0] == 200 and said, "the models")
    assert [model["id"] for model in json.loads(body)["data"]] == ["smollm2"]
    answer = stack.complete("How are you today?", max_tokens=8)
    # A small model may find that nothing is to be said.
    assert answer["choices"][0]["finish_reason"] in ("length", "stop") and answer["usage"]["prompt_tokens"] > 3, answer


def test_prefill_and_decode_are_apart(stack):
    (decode,), prefills = stack.pods(f"{SERVERS}-decode").values(), set(stack.pods(f"{SERVERS}-prefill").values())
    (picker,) = stack.pods(PICKER).values()
    read = lambda address, *what: metric(stack.page(address), *what)
    computed = lambda: sum(read(f"{address}:8000", "vllm:prompt_tokens_total") for address in prefills)
    pulled = lambda: read(f"{decode}:8000", "vllm:external_prefix_cache_hits_total")
    decided = lambda: read(f"{picker}:9090", "llm_d_epp_pd_decision_total", 'decision_type="prefill-decode"')
    before, prompt = (computed(), pulled(), decided()), a_story()
    answer = stack.complete(prompt)
    assert answer["kv_transfer_params"]["remote_host"] in prefills, answer
    assert answer["usage"]["prompt_tokens"] > 100 and answer["choices"][0]["text"]
    after = (computed(), pulled(), decided())
    assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)
    # Streamed, through Envoy and the picker, it is the same.
    status, _, body = stack.ask("/v1/completions", {"model": "smollm2", "prompt": prompt, "max_tokens": 4, "temperature": 0,
                                                    "stream": True})
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert status == 200 and "".join(e["choices"][0]["text"] for e in events) == answer["choices"][0]["text"], body


def test_a_clients_choice_of_server_counts_for_nothing(stack):
    answer = stack.ask("/v1/completions", {"model": "smollm2", "prompt": a_story(), "max_tokens": 2}, headers={
        "x-gateway-destination-endpoint": "198.18.0.1:6443", "x-prefiller-host-port": "198.18.0.1:6443"})
    assert answer[0] == 200, answer
    assert json.loads(answer[2])["kv_transfer_params"]["remote_host"] in stack.pods(f"{SERVERS}-prefill").values()


def test_a_decode_pod_that_is_deleted_under_load_costs_no_request(stack):
    stack.kubectl("scale", f"deployment/{SERVERS}-decode", "--replicas=2")
    stack.rolled_out()
    served, hosts = [], lambda: stack.pods(f"{SERVERS}-decode")

    def ask():
        served.append(stack.complete(a_story(), max_tokens=8))

    with Repeated(ask, ask):
        time.sleep(3)
        victim = sorted(hosts())[0]
        stack.kubectl("delete", "pod", victim)
        assert victim not in hosts()
        stack.rolled_out()
        time.sleep(2)
        stack.kubectl("scale", f"deployment/{SERVERS}-decode", "--replicas=1")
        eventually(lambda: len(hosts()) == 1, "one decode server is left", 60)
        time.sleep(1)
    print(f"{len(served)} requests while two decode servers ended")
    assert len(served) > 10 and all(answer["kv_transfer_params"] for answer in served)


def test_of_two_pickers_the_standby_takes_over_when_the_leader_is_killed(stack):
    stack.helm("upgrade", RELEASE, str(CHARTS / "inferencepool"), "-f", str(HERE / "values.yaml"),
               "--set", "inferenceExtension.replicas=2")
    holder = lambda: stack.kubectl("get", "lease", f"epp-{NAMESPACE}-{RELEASE}.llm-d.ai", "-o",
                                   "jsonpath={.spec.holderIdentity}", check=False)

    def ready() -> list[str]:
        slices = json.loads(stack.kubectl("get", "endpointslices", "-l", f"kubernetes.io/service-name={PICKER}", "-o", "json"))
        return [each["targetRef"]["name"] for some in slices["items"] for each in some["endpoints"] or []
                if each["conditions"]["ready"]]

    eventually(lambda: len(stack.pods(PICKER)) == 2 and all(stack.pods(PICKER).values()), "two pickers run", 150)
    (leader,) = eventually(lambda: len(ready()) == 1 and ready(), "one of them is ready", 60)
    assert holder().startswith(leader), (holder(), leader)
    eventually(lambda: stack.ask("/v1/models")[0] == 200, "it is asked")
    stack.kubectl("delete", "pod", leader, "--grace-period=0", "--force")
    killed = time.monotonic()
    (heir,) = eventually(lambda: len(now := ready()) == 1 and now[0] != leader and now, "the other is ready", 60)
    eventually(lambda: stack.ask("/v1/models")[0] == 200, "it is asked instead", 30)
    print(f"{time.monotonic() - killed:.1f} s from the leader's end to the first answer through {heir}")
    assert holder().startswith(heir), (holder(), heir)
    assert stack.complete(a_story())["kv_transfer_params"]


def test_nothing_was_asked_that_upstreams_chart_does_not_allow(stack):
    refused = {what: codes for what, codes in asked(stack.cluster, NAMESPACE, PICKER).items() if codes & {401, 403}}
    assert refused == {}


def test_without_a_picker_requests_fail_closed_and_come_back(stack):
    stack.kubectl("scale", f"deployment/{PICKER}", "--replicas=0")
    eventually(lambda: not stack.pods(PICKER), "no picker", 150)
    assert stack.ask("/v1/models")[0] >= 500
    stack.kubectl("scale", f"deployment/{PICKER}", "--replicas=1")
    stack.rolled_out()
    eventually(lambda: stack.ask("/v1/models")[0] == 200, "answers are back")
