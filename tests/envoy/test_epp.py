"""`baton epp` behind a real Envoy, in front of servers that do not think: what it decides, and what it refuses."""
import json
import os
import pathlib
import re
import tempfile
import time
import urllib.request
import uuid

import envoy_config as ec
import pytest
from client import Http1, ask
from harness import ROOT, Child, Envoy, Picker, Upstream, eventually, free_port

BATON = os.environ.get("BATON_BIN", str(ROOT / "target/release/baton"))
# Prefill and decode apart, the configuration of upstream's chart; a token is taken for four bytes.
APART = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: approx-prefix-cache-producer, parameters: {autoTune: false, blockSizeTokens: 64}}
- type: prefill-filter
- type: decode-filter
- type: prefix-cache-scorer
- type: queue-scorer
- type: active-request-scorer
- type: max-score-picker
- {name: pd, type: prefix-based-pd-decider, parameters: {nonCachedTokens: 128}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: pd}}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: queue-scorer, weight: 2}, {pluginRef: max-score-picker}]}
- name: decode
  plugins:
  - {pluginRef: decode-filter}
  - {pluginRef: prefix-cache-scorer, weight: 2}
  - {pluginRef: active-request-scorer, weight: 2}
  - {pluginRef: max-score-picker}
"""


def endpoints_file(servers: list[tuple[str, str]]) -> str:
    """llm-d's list of endpoints: (address, role) each."""
    listed = [{"name": f"pod-{i}", "address": address.rsplit(":", 1)[0], "port": address.rsplit(":", 1)[1],
               "labels": {"llm-d.ai/role": role}} for i, (address, role) in enumerate(servers)]
    return json.dumps({"endpoints": listed})


class Epp(Picker):
    def __init__(self, servers: list[tuple[str, str]], *flags: str, config: str = APART):
        self.folder = tempfile.TemporaryDirectory(prefix="baton-epp-")
        self.endpoints = pathlib.Path(self.folder.name) / "endpoints.json"
        self.endpoints.write_text(endpoints_file(servers))
        self.metrics_port = free_port()
        if not any(flag.startswith("--drain-timeout") for flag in flags):
            # Tests stop it to have it stopped.
            flags = (*flags, "--drain-timeout=0s")
        super().__init__([BATON, "epp", f"--endpoints-file={self.endpoints}", f"--config-text={config}",
                          f"--metrics-port={self.metrics_port}", "--debug-decisions=100", *flags], True)

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name: str, label: str = "") -> float:
        return sum(float(line.rsplit(" ", 1)[1]) for line in self.page("/metrics").splitlines()
                   if re.match(re.escape(name) + r"[{ ]", line) and label in line)

    def decision(self, request_id: str) -> dict:
        (found,) = [d for d in json.loads(self.page("/debug/decisions")) if d["request_id"] == request_id]
        return found

    def await_servers(self, n: int):
        eventually(lambda: self.metric("llm_d_epp_ready_endpoints") == n, f"{n} servers are ready")


class Door:
    """Envoy with `baton epp` beside it, in front of `servers`."""

    def __init__(self, servers: list[tuple[str, str]], *flags: str, config: str = APART, fail_open: bool = False,
                 allowed: list[str] | None = None):
        self.picker = Epp(servers, *flags, config=config)
        try:
            self.port = free_port()
            self.log = tempfile.NamedTemporaryFile(prefix="baton-envoy-", suffix=".log")
            filters = [ec.drop_clients_choice()]
            filters += [] if allowed is None else [ec.subset(allowed)]
            filters.append(ec.picker_filter(ec.FULL_DUPLEX, fail_open))
            clusters = [ec.picked_cluster(), ec.picker_cluster(self.picker.port, True)]
            self.envoy = Envoy(ec.config(self.port, filters, clusters, 32768, self.log.name), self.port)
        except BaseException:
            self.picker.stop()
            raise

    def stop(self):
        self.envoy.stop()
        self.picker.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def post(self, body: dict | bytes, headers: dict | None = None, path: str = "/seen/v1/completions"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return ask(self.port, "POST", path, {"content-type": "application/json", **(headers or {})}, body)


def prompt(tokens: int) -> str:
    """A text of about so many tokens, which no cache has seen."""
    return (uuid.uuid4().hex + " ") * (tokens * 4 // 33 + 1)


@pytest.fixture(scope="module")
def mocks():
    servers = [Upstream() for _ in range(3)]
    yield [(server.endpoint, role) for server, role in zip(servers, ["prefill", "decode", "decode"])]
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def door(mocks):
    with Door(mocks) as running:
        running.picker.await_servers(3)
        yield running


def test_a_long_prompt_goes_through_a_prefill_server_and_a_short_one_does_not(door, mocks):
    prefill, *decode = [address for address, _ in mocks]
    for tokens, through in [(20, False), (1000, True)]:
        seen = door.post({"model": "m", "prompt": prompt(tokens)}).json()["headers"]
        assert seen[ec.PICKED] in decode
        assert seen.get("x-prefiller-host-port") == (prefill if through else None)


def test_a_prompt_that_was_answered_goes_where_it_was_and_alone(door):
    body = {"model": "m", "messages": [{"role": "user", "content": prompt(1000)}]}
    first = door.post(body, path="/seen/v1/chat/completions").json()["headers"]
    again = door.post(body, path="/seen/v1/chat/completions").json()["headers"]
    assert first["x-prefiller-host-port"] and "x-prefiller-host-port" not in again
    assert again[ec.PICKED] == first[ec.PICKED]


def test_a_decision_says_why(door):
    name = uuid.uuid4().hex
    door.post({"model": "m", "prompt": prompt(1000)}, {"x-request-id": name})
    decision = door.picker.decision(name)
    assert decision["kind"] == "prefill-decode" and decision["prefill"].endswith("pod-0")
    (stage,) = [stage for stage in decision["stages"] if stage["profile"] == "decode"]
    scores = {c["endpoint"]: c["scores"] for c in stage["candidates"] if c["dropped_by"] is None}
    assert len(scores) == 2 and all(set(s) == {"prefix-cache-scorer", "active-request-scorer"} for s in scores.values())


def test_what_only_the_picker_may_say_does_not_come_from_clients(door):
    spoofed = {"x-prefiller-host-port": "evil:1", "x-data-parallel-host-port": "evil:1", ec.PICKED: "127.0.0.1:1",
               "x-llm-d-inference-objective": "mine", "x-gateway-inference-fairness-id": "me"}
    seen = door.post({"model": "m", "prompt": "short"}, spoofed).json()["headers"]
    assert "evil" not in str(seen) and seen[ec.PICKED] != "127.0.0.1:1"
    assert not any("objective" in name or "fairness" in name for name in seen)


def test_a_request_without_a_body_goes_to_a_server_that_generates(door, mocks):
    picked = {ask(door.port, "GET", "/seen").json()["headers"][ec.PICKED] for _ in range(12)}
    assert picked <= {address for address, role in mocks if role == "decode"}


def test_the_model_gets_another_name_and_nothing_else_changes(door):
    body = b'{ "prompt":"a\\u0041 <&>", "seed":9007199254740993, "model" :"alias"}'
    answer = door.post(body, {"x-llm-d-model-name-rewrite": "base"}).json()
    assert answer["bytes"] == len(body) - len("alias") + len("base")


@pytest.mark.parametrize("body, path, status, param", [
    (b"{", "/v1/completions", 400, "body"),
    (b"[1]", "/v1/completions", 400, "body"),
    (b"", "/v1/completions", 400, "body"),
    (b'{"prompt":"x"}', "/v1/completions", 400, "model"),
    (b'{"model":7,"prompt":"x"}', "/v1/completions", 400, "model"),
    (b'{"model":"m"}', "/v1/completions", 400, "prompt"),
    (b'{"model":"m","messages":[]}', "/v1/chat/completions", 400, "messages"),
    (b'{"model":"m","input":null}', "/v1/embeddings", 400, "input"),
])
def test_a_body_that_no_server_could_read_is_refused(door, body, path, status, param):
    answer = door.post(body, path=path)
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (status, status, param)
    assert answer.headers["content-type"] == "application/json"


def test_bodies_that_are_no_prompts_pass(door):
    answer = door.post(b"--b\r\n\x00\xff", {"content-type": "multipart/form-data"}, path="/seen/v1/audio/transcriptions")
    assert (answer.status, answer.json()["bytes"]) == (200, 7)


def test_the_gateway_may_restrict_the_choice(mocks):
    decode = mocks[2][0]
    with Door(mocks, allowed=[decode, mocks[0][0]]) as door:
        door.picker.await_servers(3)
        picked = {door.post({"model": "m", "prompt": "x"}).json()["headers"][ec.PICKED] for _ in range(6)}
        assert picked == {decode}
    with Door(mocks, allowed=["10.0.0.1:1"]) as door:
        door.picker.await_servers(3)
        answer = door.post({"model": "m", "prompt": "x"})
        assert answer.status == 503
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert answer.headers["retry-after"]
    with Door(mocks, "--disable-endpoint-subset-filter", allowed=["10.0.0.1:1"]) as door:
        door.picker.await_servers(3)
        assert door.post({"model": "m", "prompt": "x"}).status == 200


def test_nobody_there_is_503_and_servers_come_and_go_by_the_file(mocks):
    with Door([]) as door:
        answer = door.post({"model": "m", "prompt": "x"})
        assert answer.status == 503 and answer.json()["error"]["type"] == "ServiceUnavailableError"
        door.picker.endpoints.write_text(endpoints_file(mocks))
        door.picker.await_servers(3)
        assert door.post({"model": "m", "prompt": "x"}).status == 200
        door.picker.endpoints.write_text(endpoints_file(mocks[:1]))
        door.picker.await_servers(1)
        # A prefill server alone answers nobody.
        assert door.post({"model": "m", "prompt": "x"}).status == 503


def test_what_is_in_flight_is_given_back_however_it_ends(door):
    in_flight = lambda: door.picker.metric("llm_d_epp_inflight_requests")
    eventually(lambda: in_flight() == 0, "nothing is in flight")
    connection = Http1(door.port)
    connection.send("POST", "/stream/v1/completions?n=100000&gap_ms=20", {"content-type": "application/json"},
                    json.dumps({"model": "m", "prompt": prompt(1000)}).encode())
    status, headers = connection.read_head()
    next(connection.chunks(headers))
    # The prefill server's part is over as soon as the answer begins.
    assert status == 200 and in_flight() == 1
    connection.close()
    eventually(lambda: in_flight() == 0, "the client's leaving ends it")
    door.post(b"{")
    assert in_flight() == 0


def test_metrics_have_upstreams_names(door):
    door.post({"model": "m", "prompt": "x"})
    text = door.picker.page("/metrics")
    for name in ["request_total", "request_duration_seconds_count", "request_size_bytes_count", "ready_endpoints",
                 "scheduler_e2e_duration_seconds_count", "scheduler_attempts_total", "pd_decision_total", "info",
                 "average_queue_size", "per_endpoint_queue_size", "extproc_streams_total",
                 'plugin_duration_seconds_count{extension_point="Scorer"']:
        assert f"llm_d_epp_{name}" in text, name
    assert door.picker.metric("llm_d_epp_request_error_total", "BadRequest") >= 0


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_picker_restarted_under_load_costs_only_what_was_being_decided(mocks, fail_open):
    with Door(mocks, fail_open=fail_open) as door:
        door.picker.await_servers(3)
        statuses = []
        for i in range(60):
            if i == 20:
                door.picker.stop()
            if i == 30:
                door.picker.start()
                door.picker.await_servers(3)
            statuses.append(door.post({"model": "m", "prompt": "x"}).status)
        assert statuses[:20] == [200] * 20 and set(statuses[20:30]) <= {500, 503}
        eventually(lambda: door.post({"model": "m", "prompt": "x"}).status == 200, "works again")


def test_sigterm_says_not_ready_takes_requests_for_a_while_and_ends_with_0(mocks):
    with Door(mocks, "--drain-timeout=2s") as door:
        door.picker.await_servers(3)
        door.picker.process.terminate()
        time.sleep(0.3)
        assert door.post({"model": "m", "prompt": "x"}).status == 200
        assert door.picker.process.wait(20) == 0


# One request at a time and server; one more may wait, for a second and a half.
QUEUE = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
featureGates: [flowControl]
plugins:
- type: queue-scorer
- {name: one, type: concurrency-detector, parameters: {maxConcurrency: 1}}
- type: max-score-picker
schedulingProfiles:
- {name: default, plugins: [{pluginRef: queue-scorer}, {pluginRef: max-score-picker}]}
flowControl:
  saturationDetector: {pluginRef: one}
  defaultRequestTTL: 1500ms
  noEndpointRequestTTL: 500ms
  maxRequests: "1"
"""


class Streaming:
    """A request that is being answered until it is closed."""

    def __init__(self, door):
        self.connection = Http1(door.port)
        self.connection.send("POST", "/stream/v1/completions?n=100000&gap_ms=20", {"content-type": "application/json"},
                             json.dumps({"model": "m", "prompt": "x"}).encode())
        status, headers = self.connection.read_head()
        next(self.connection.chunks(headers))
        assert status == 200

    def close(self):
        self.connection.close()


@pytest.fixture(scope="module")
def queueing(mocks):
    with Door(mocks[1:2], config=QUEUE) as running:
        running.picker.await_servers(1)
        yield running


def send(door) -> Http1:
    connection = Http1(door.port)
    connection.send("POST", "/seen/v1/completions", {"content-type": "application/json"},
                    json.dumps({"model": "m", "prompt": "x"}).encode())
    return connection


def waiting(door) -> float:
    return door.picker.metric("llm_d_epp_flow_control_queue_size", 'model_name="m",priority="0",target_model_name="m"')


def test_a_request_waits_for_a_server_with_room(queueing):
    streaming = Streaming(queueing)
    second = send(queueing)
    eventually(lambda: waiting(queueing) == 1, "the second waits")
    streaming.close()
    assert second.read().status == 200


def test_a_queue_that_is_full_and_a_wait_that_is_too_long_are_429(queueing):
    streaming = Streaming(queueing)
    second = send(queueing)
    eventually(lambda: waiting(queueing) == 1, "the second waits")
    for connection, reason in [(send(queueing), "rejected-saturated"), (second, "rejected-ttl-expired")]:
        answer = connection.read()
        assert (answer.status, answer.headers["x-llm-d-request-dropped-reason"]) == (429, reason)
        assert answer.headers["retry-after"] and answer.json()["error"]["code"] == 429
    streaming.close()


def test_a_client_that_leaves_while_it_waits_frees_its_place(queueing):
    streaming = Streaming(queueing)
    second = send(queueing)
    eventually(lambda: waiting(queueing) == 1, "the second waits")
    second.close()
    eventually(lambda: waiting(queueing) == 0, "nobody waits")
    streaming.close()
    eventually(lambda: queueing.picker.metric("llm_d_epp_inflight_requests") == 0, "nothing is in flight")


def test_what_only_asks_need_not_wait(queueing):
    streaming = Streaming(queueing)
    assert ask(queueing.port, "GET", "/seen").status == 200
    streaming.close()


def test_without_any_server_requests_wait_for_the_first_one():
    with Door([], config=QUEUE) as door:
        answer = door.post({"model": "m", "prompt": "x"})
        assert (answer.status, answer.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")
