"""A picker behind a real Envoy: what goes well, or is refused in good order."""
import json
import time
import uuid

import envoy_config as ec
import pytest
from client import Http1, ask, ask_http2, checksum
from harness import Stack, eventually


def fresh_id() -> str:
    return uuid.uuid4().hex


def body_of(size: int) -> bytes:
    return json.dumps({"model": "m", "prompt": "".join(f"{i:07} " for i in range(size // 8))}).encode()


@pytest.mark.parametrize("size", [40, 4_000, 61_990, 62_010, 300_000, 1_000_000])
def test_a_body_arrives_as_it_was_sent(stack, size):
    body, name = body_of(size), fresh_id()
    answer = ask(stack.port, "POST", "/seen", {"x-request-id": name, "content-type": "application/json"}, body)
    seen = answer.json()
    assert (answer.status, seen["bytes"], seen["sum"]) == (200, len(body), checksum(body))
    # Envoy 1.40 sends full-duplex bodies in chunks, whatever length the picker says.
    assert seen["headers"].get("content-length", str(len(body))) == str(len(body))
    assert seen["headers"][ec.PICKED] in [upstream.endpoint for upstream in stack.upstreams]
    assert stack.ended(name).startswith(f"Naturally body={len(body)}")


def test_a_body_in_pieces_is_one_body(stack):
    pieces = [b'{"prompt":"', b"a" * 10, b"b" * 50_000, b"c", b'"}']
    answer = ask(stack.port, "POST", "/seen", {}, *pieces, pause_s=0.02)
    assert answer.json()["sum"] == checksum(b"".join(pieces))


def test_requests_without_a_body_and_with_an_empty_one(stack):
    for method, pieces in [("GET", []), ("POST", [b""]), ("DELETE", [])]:
        name = fresh_id()
        answer = ask(stack.port, method, "/seen", {"x-request-id": name}, *pieces)
        assert (answer.status, answer.json()["bytes"]) == (200, 0)
        assert stack.ended(name).startswith("Naturally")
    name = fresh_id()
    connection = Http1(stack.port)
    connection.send("HEAD", "/seen", {"x-request-id": name})
    assert connection.read_head()[0] == 200
    assert stack.ended(name).startswith("Naturally")


def test_requests_go_round(stack):
    picked = [ask(stack.port, "GET").json()["headers"][ec.PICKED] for _ in range(4)]
    assert picked[0] != picked[1] and picked[:2] == picked[2:]


def test_a_stream_is_passed_on_as_it_comes(stack):
    name = fresh_id()
    connection = Http1(stack.port)
    connection.send("POST", "/stream?n=5&gap_ms=300", {"x-request-id": name}, body_of(100))
    status, headers = connection.read_head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    chunks = list(connection.chunks(headers))
    # Pieces may be joined on the way, but not all of them when they come this slowly.
    assert len(chunks) >= 3 and b"".join(chunks).count(b"data: ") == 5
    assert stack.ended(name).startswith("Naturally")


@pytest.mark.parametrize("use", ["watch", "rewrite"])
def test_a_response_may_be_read_and_changed_on_its_way(stack, use):
    answer = ask(stack.port, "POST", "/stream?n=50", {"test-response": use}, body_of(100))
    assert answer.body.count(b"DATA: " if use == "rewrite" else b"data: ") == 50
    answer = ask(stack.port, "POST", "/other", {"test-response": use}, body_of(100))
    assert (b"CHOICES" in answer.body) == (use == "rewrite")


def test_trailers_go_through_an_http2_client(stack):
    name = fresh_id()
    pieces = [b"some ", b"text"]
    answer = ask_http2(stack.port, "/seen", {"x-request-id": name}, pieces, {"x-trailer": "yes"})
    assert (answer.status, json.loads(answer.body)["sum"]) == (200, checksum(b"some text"))
    assert stack.ended(name).startswith("Naturally body=9")
    answer = ask_http2(stack.port, "/stream?n=3", {}, pieces)
    assert answer.body.count(b"data: ") == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412, 413, 429, 500, 503])
def test_a_refusal_is_an_openai_error(stack, status):
    name = fresh_id()
    headers = {"x-request-id": name, "test-refuse": str(status)}
    for pieces in [[], [body_of(200_000)]]:
        answer = ask(stack.port, "POST" if pieces else "GET", "/seen", headers, *pieces)
        error = answer.json()["error"]
        assert (answer.status, error["code"], answer.headers["content-type"]) == (status, status, "application/json")
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert ("retry-after" in answer.headers) == (status in (429, 503))
    ended = eventually(lambda: stack.picker.ended(name)[1:] and stack.picker.ended(name), "both ended")
    assert len(ended) == 2 and all(why.startswith("Refused") for why in ended)


def test_a_request_at_its_endpoint_may_be_given_up(stack):
    name = fresh_id()
    answer = ask(stack.port, "POST", "/seen?wait_ms=60000", {"x-request-id": name, "test-evict-ms": "100"}, b"{}")
    assert (answer.status, answer.headers["x-llm-d-request-dropped-reason"]) == (429, "evicted")
    assert stack.ended(name).startswith("Evicted")
    # What has begun can only be cut off.
    name = fresh_id()
    connection = Http1(stack.port)
    connection.send("POST", "/stream?n=100000&gap_ms=20", {"x-request-id": name, "test-evict-ms": "300"}, b"{}")
    status, headers = connection.read_head()
    with pytest.raises(ValueError):
        list(connection.chunks(headers))
    assert status == 200 and stack.ended(name).startswith("Evicted")


def test_internal_headers_come_from_the_picker_or_not_at_all(stack):
    internal = {"x-prefiller-host-port": "evil:1", "x-encoder-hosts-ports": "evil:1", "x-data-parallel-host-port": "evil:1",
                "x-kv-cache-source-host-port": "evil:1", ec.PICKED: "127.0.0.1:1",
                "x-gateway-destination-endpoint-subset": "evil:1"}
    for pieces in [[], [b"{}"]]:
        method = "POST" if pieces else "GET"
        seen = ask(stack.port, method, "/seen", internal | {"x-other": "kept"}, *pieces).json()["headers"]
        assert "evil" not in str(seen) and seen["x-other"] == "kept" and seen[ec.PICKED] != "127.0.0.1:1"
        seen = ask(stack.port, method, "/seen", internal | {"test-prefill": "10.0.0.9:8000"}, *pieces).json()["headers"]
        assert seen["x-prefiller-host-port"] == "10.0.0.9:8000" and "evil" not in str(seen)


def test_header_and_metadata_name_the_same_endpoint(stack):
    ask(stack.port, "POST", "/seen", {}, b"{}")
    def lines():
        return [json.loads(line) for line in open(stack.log.name) if '"status":200' in line.replace(" ", "")]
    line = eventually(lambda: [line for line in lines() if line["picked"] not in (None, "-")], "access log")[-1]
    assert line["picked"] == line["metadata"]


def test_a_client_that_leaves_ends_its_exchange_once(stack):
    waiting, streaming = fresh_id(), fresh_id()
    connection = Http1(stack.port)
    connection.send("POST", "/seen", {"x-request-id": waiting, "test-wait-ms": "60000"}, b"{}")
    # Envoy asks nobody about a client that is gone before it was heard.
    time.sleep(0.5)
    connection.close()
    assert stack.ended(waiting).startswith("Disconnected")
    connection = Http1(stack.port)
    connection.send("POST", "/stream?n=100000&gap_ms=20", {"x-request-id": streaming}, b"{}")
    status, headers = connection.read_head()
    next(connection.chunks(headers))
    connection.close()
    assert stack.ended(streaming).startswith("Disconnected")


def test_the_endpoint_that_the_gateway_allows_is_taken():
    with Stack(allowed=[1]) as stack:
        picked = {ask(stack.port, "POST", "/seen", {}, b"{}").json()["headers"][ec.PICKED] for _ in range(4)}
        assert picked == {stack.upstreams[1].endpoint}
    with Stack(allowed=[]) as stack:
        answer = ask(stack.port, "POST", "/seen", {}, b"{}")
        assert (answer.status, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")


def test_a_gateway_may_keep_response_bodies_to_itself():
    with Stack(mode=ec.NO_RESPONSE_BODIES) as stack:
        name = fresh_id()
        answer = ask(stack.port, "POST", "/stream?n=20", {"x-request-id": name}, body_of(100_000))
        assert answer.body.count(b"data: ") == 20
        assert stack.ended(name).startswith("Naturally")


def test_a_mode_that_is_not_spoken_is_named():
    with Stack(mode=ec.FULL_DUPLEX | {"request_body_mode": "BUFFERED"}) as stack:
        assert ask(stack.port, "POST", "/seen", {}, b"{}").status == 500


@pytest.mark.parametrize("tls, version", [(False, "TLS_AUTO"), (True, "TLSv1_2"), (True, "TLSv1_3")])
def test_a_picker_may_be_called_by_its_clusters_name(tls, version):
    """As Istio's gateway calls it, which sets no authority."""
    with Stack(tls=tls, called="outbound|9002||picker.llm.svc.cluster.local", tls_version=version) as stack:
        for _ in range(3):
            body, name = body_of(100_000), fresh_id()
            answer = ask(stack.port, "POST", "/seen", {"x-request-id": name}, body)
            assert (answer.status, answer.json()["sum"]) == (200, checksum(body))
            assert stack.ended(name).startswith(f"Naturally body={len(body)}")
