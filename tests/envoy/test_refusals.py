"""What `baton epp` has Envoy answer in its place, each once: why, with which status, and in llm-d's word for the reason.

Beside these, test_epp has bodies that no server could read (400), the queue's own (429 `rejected-saturated` and
`rejected-ttl-expired`, 503 `rejected-no-endpoints`) and restrictions; test_guide unknown models (404); test_failures bodies
that are too long (413) and decisions that come too late (503). 401 and 403 are upstream's for plugins that there are not.
"""
import json
import signal

import envoy_config as ec
import pytest
from client import Http1, ask
from harness import eventually
from test_epp import QUEUE, Door, Streaming, mocks, prompt, send, waiting  # noqa: F401

BATCH = {"x-llm-d-inference-objective": "batch"}
EVICTING = QUEUE.replace("flowControl:\n", "flowControl:\n  enableEviction: true\n")
# A server with one request takes no other.
FULL = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {name: one, type: concurrency-detector, parameters: {maxConcurrency: 1}}
- type: max-score-picker
schedulingProfiles:
- {name: default, plugins: [{pluginRef: one}, {pluginRef: max-score-picker}]}
"""


def told(answer) -> tuple[int, str | None]:
    """The status and the reason; the rest is the same for all."""
    error = answer.json()["error"]
    assert error["code"] == answer.status and error["message"] and answer.headers["content-type"] == "application/json"
    assert ("retry-after" in answer.headers) == (answer.status in (429, 503))
    return answer.status, answer.headers.get("x-llm-d-request-dropped-reason")


def errors(door, code: str) -> float:
    return door.picker.metric("llm_d_epp_request_error_total", f'error_code="{code}"')


def test_what_is_wanted_only_if_it_is_cached_is_412_until_it_is(mocks):
    with Door(mocks) as door:
        door.picker.await_servers(3)
        body = {"model": "m", "prompt": prompt(1000)}
        speculative = {"prefer": "respond-async, If-Available;wait=1"}
        assert told(door.post(body, speculative)) == (412, None)
        assert errors(door, "PreconditionFailed") == 1
        first = door.post(body).json()["headers"]
        again = door.post(body, speculative)
        assert again.status == 200 and again.json()["headers"][ec.PICKED] == first[ec.PICKED]
        # It is about prompts: what has none goes on.
        assert ask(door.port, "GET", "/seen", speculative).status == 200


def test_a_get_without_a_server_is_503(mocks):
    with Door([]) as door:
        assert told(ask(door.port, "GET", "/v1/models")) == (503, "rejected-no-endpoints")


def test_servers_that_are_all_too_busy_for_a_filter_are_429(mocks):
    with Door(mocks[1:2], config=FULL) as door:
        door.picker.await_servers(1)
        streaming = Streaming(door)
        assert told(door.post({"model": "m", "prompt": "x"})) == (429, "rejected-saturated")
        streaming.close()
        eventually(lambda: door.post({"model": "m", "prompt": "x"}).status == 200, "it has room")


def test_without_a_queue_only_sheddable_requests_are_429(mocks):
    with Door(mocks[1:2], "--objectives=batch=-1", config=QUEUE.replace("featureGates: [flowControl]\n", "")) as door:
        door.picker.await_servers(1)
        assert door.post({"model": "m", "prompt": "x"}, BATCH).status == 200
        streaming = Streaming(door)
        assert told(door.post({"model": "m", "prompt": "x"}, BATCH)) == (429, "rejected-saturated")
        assert door.post({"model": "m", "prompt": "x"}).status == 200
        streaming.close()


def test_who_waits_when_the_picker_ends_is_503(mocks):
    with Door(mocks[1:2], config=QUEUE.replace("1500ms", "60s")) as door:
        door.picker.await_servers(1)
        streaming = Streaming(door)
        second = send(door)
        eventually(lambda: waiting(door) == 1, "the second waits")
        door.picker.process.send_signal(signal.SIGTERM)
        assert told(second.read()) == (503, "rejected-shutting-down")
        streaming.close()
        assert door.picker.process.wait(20) == 0


@pytest.fixture(scope="module")
def evicting(mocks):
    with Door(mocks[1:2], "--objectives=batch=-1,more=1", config=EVICTING) as running:
        running.picker.await_servers(1)
        yield running


def batch(door, path: str) -> Http1:
    connection = Http1(door.port)
    headers = {"content-type": "application/json", **BATCH}
    connection.send("POST", path, headers, json.dumps({"model": "m", "prompt": "x"}).encode())
    eventually(lambda: door.picker.metric("llm_d_epp_inflight_requests") == 1, "it is at its server")
    return connection


def test_a_request_that_runs_makes_room_for_one_of_higher_priority_and_is_429(evicting):
    before = errors(evicting, "ResourceExhausted")
    sheddable = batch(evicting, "/seen/v1/completions?wait_ms=60000")
    assert evicting.post({"model": "m", "prompt": "x"}).status == 200
    answer = sheddable.read()
    assert told(answer) == (429, "evicted")
    assert answer.json()["error"]["message"] == "request evicted by flow control"
    assert errors(evicting, "ResourceExhausted") == before + 1
    assert evicting.picker.metric("llm_d_epp_flow_control_revocations_issued_total", 'priority="0"') >= 1
    eventually(lambda: evicting.picker.metric("llm_d_epp_flow_control_revocations_total", "confirmed") >= 1, "it is over")
    eventually(lambda: evicting.picker.metric("llm_d_epp_inflight_requests") == 0, "nothing is in flight")


def test_a_stream_that_has_begun_is_cut_off(evicting):
    sheddable = batch(evicting, "/stream/v1/completions?n=100000&gap_ms=20")
    status, headers = sheddable.read_head()
    chunks = sheddable.chunks(headers)
    next(chunks)
    assert evicting.post({"model": "m", "prompt": "x"}).status == 200
    # The connection ends in the middle: there is no last chunk.
    with pytest.raises(ValueError):
        list(chunks)
    assert status == 200
    eventually(lambda: evicting.picker.metric("llm_d_epp_inflight_requests") == 0, "nothing is in flight")


def test_a_request_that_is_not_sheddable_stays_whoever_waits(evicting):
    streaming = Streaming(evicting)
    more = Http1(evicting.port)
    more.send("POST", "/seen/v1/completions", {"x-llm-d-inference-objective": "more", "content-type": "application/json"},
              json.dumps({"model": "m", "prompt": "x"}).encode())
    assert told(more.read()) == (429, "rejected-ttl-expired")
    streaming.close()
