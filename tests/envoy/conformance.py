"""Does an endpoint picker speak the endpoint picker protocol? Asks any picker, as a gateway would, and prints a table.

    python3 tests/envoy/conformance.py 127.0.0.1:9002 [--plain] [--health 127.0.0.1:9003] [--endpoints A,B] [--only WORD]

The protocol is version 1.0 of the Gateway API Inference Extension's endpoint picker protocol, on Envoy's ext_proc with
full-duplex bodies. The picker needs an endpoint to choose, and a model called `m` if it looks at models; with two or more
`--endpoints` (ip:port, those it knows) restrictions of the choice are asked for too. A case that is a MUST of the protocol
decides about the exit status; a SHOULD is what a picker has to do to be safe and quick behind Envoy.
"""
import argparse
import json
import re
import sys
import time

import wire
from wire import REQUEST, RESPONSE, Connection, Ended

PICKED = "x-gateway-destination-endpoint"
SUBSET = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
SERVED = ("envoy.lb", "x-gateway-destination-endpoint-served")
ENDPOINT = re.compile(r"(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:]+\]):\d{1,5}")
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
MAX_PIECE = 1 << 16
CASES = []


def case(level: str, says: str, needs: str = ""):
    def add(function):
        CASES.append((level, says, needs, function))
        return function
    return add


class Gateway:
    """What the cases ask through."""

    def __init__(self, args):
        self.args, self.endpoints = args, args.endpoints.split(",") if args.endpoints else []
        self.connection = None

    def connect(self, address: str, tls: bool) -> Connection:
        host, _, port = address.rpartition(":")
        return Connection(host.strip("[]"), int(port), tls, self.args.timeout)

    def stream(self) -> wire.Stream:
        self.connection = self.connect(self.args.address, not self.args.plain)
        return self.connection.stream()

    def close(self):
        if self.connection:
            self.connection.close()


def prompt(size: int = 100) -> bytes:
    words = "".join(f"word{i} " for i in range(size // 5))[:size]
    return json.dumps({"model": "m", "max_tokens": 4, "prompt": words}).encode()


def head(extra: dict | None = None, method: str = "POST", path: str = "/v1/completions") -> dict:
    return {":method": method, ":path": path, ":authority": "model", "content-type": "application/json",
            "x-request-id": "conformance", **(extra or {})}


def routed(stream: wire.Stream) -> wire.Answer:
    """The answer to the headers, which must come first and name an endpoint."""
    answer = stream.answer()
    assert answer.name == "request headers", f"the first answer is {answer.name} {answer.status or ''} {answer.body[:200]!r}"
    chosen = answer.set.get(PICKED)
    assert chosen, f"{PICKED} is not set"
    for endpoint in chosen.split(","):
        assert ENDPOINT.fullmatch(endpoint), f"{endpoint!r} is not ip:port"
    return answer


def sent_back(stream: wire.Stream, half: int = REQUEST, end: bool = True) -> tuple[bytes, int]:
    """A body, to its last piece, and the size of the largest; without `end`, to the trailers."""
    data, largest, name = b"", 0, "response" if half else "request"
    while True:
        answer = stream.answer()
        if not end and answer.name == f"{name} trailers":
            return data, largest
        assert answer.name == f"{name} body", f"{answer.name} in the middle of the {name} body"
        data, largest = data + answer.body, max(largest, len(answer.body))
        if answer.end:
            assert end, "the body's end is said twice, by a piece and by trailers"
            return data, largest


def through_request(gateway: Gateway, data: bytes | None = None, extra: dict | None = None, more: bytes = b"") -> tuple:
    """A stream up to the response; and the answer to the request's headers."""
    stream, data = gateway.stream(), data or prompt()
    stream.send(wire.headers(REQUEST, head(extra)) + more, wire.body(REQUEST, data), wire.body(REQUEST, b"", True))
    answer = routed(stream)
    assert sent_back(stream)[0] == data, "the body is not the client's"
    return stream, answer


def refused(stream: wire.Stream) -> wire.Answer:
    answer = stream.answer()
    assert answer.name == "immediate", f"not refused, but {answer.name}: {answer.set}"
    return answer


@case("MUST", "a request with a body gets an endpoint, and its body back")
def _(gateway):
    through_request(gateway)


@case("MUST", "header and dynamic metadata envoy.lb name the same endpoint")
def _(gateway):
    _, answer = through_request(gateway)
    assert answer.metadata_text("envoy.lb", PICKED) == answer.set[PICKED], "they differ, or there are no metadata"


@case("MUST", "a body of a megabyte comes back in pieces that Envoy takes, the last one marked")
def _(gateway):
    stream, data = gateway.stream(), prompt(1 << 20)
    stream.send(wire.headers(REQUEST, head()), *(wire.body(REQUEST, data[i:i + 32768]) for i in range(0, len(data), 32768)),
                wire.body(REQUEST, b"", True))
    routed(stream)
    back, largest = sent_back(stream)
    assert back == data, "not the same body"
    assert largest <= MAX_PIECE, f"a piece of {largest} bytes"


@case("MUST", "the last piece of a body may hold data")
def _(gateway):
    stream, data = gateway.stream(), prompt()
    stream.send(wire.headers(REQUEST, head()), wire.body(REQUEST, data[:7]), wire.body(REQUEST, data[7:], True))
    routed(stream)
    assert sent_back(stream)[0] == data


@case("MUST", "a request without a body is answered at once")
def _(gateway):
    stream = gateway.stream()
    stream.send(wire.headers(REQUEST, head(method="GET", path="/v1/models"), end=True))
    routed(stream)


@case("MUST", "headers may come in `value` instead of `raw_value`")
def _(gateway):
    stream = gateway.stream()
    stream.send(wire.headers(REQUEST, head(), raw=False), wire.body(REQUEST, prompt(), True))
    routed(stream)


@case("MUST", "fields that a picker does not know are skipped")
def _(gateway):
    through_request(gateway, more=wire.field(9, wire.field(1, "k") + wire.field(2, b"")) + wire.field(500, "new"))


@case("MUST", "a restriction of the choice is kept", needs="two endpoints")
def _(gateway):
    for endpoint in gateway.endpoints[:2] * 3:
        hint = wire.metadata(*SUBSET, wire.text_list([endpoint]))
        _, answer = through_request(gateway, more=hint)
        assert answer.set[PICKED] == endpoint, f"{answer.set[PICKED]} instead of {endpoint}"
        gateway.close()


@case("MUST", "a restriction that leaves nothing is refused with 503")
def _(gateway):
    for endpoints in [[], ["203.0.113.1:1"]]:
        stream = gateway.stream()
        stream.send(wire.headers(REQUEST, head()) + wire.metadata(*SUBSET, wire.text_list(endpoints)),
                    wire.body(REQUEST, prompt(), True))
        assert (status := refused(stream).status) == 503, f"{status} for {endpoints}"
        gateway.close()


@case("MUST", "response headers, body and end go through")
def _(gateway):
    stream, answer = through_request(gateway)
    served = wire.metadata(*SERVED, wire.field(3, answer.set[PICKED].split(",")[0]))
    stream.send(wire.headers(RESPONSE, {":status": "200", "content-type": "application/json"}) + served)
    assert stream.answer().name == "response headers"
    data = json.dumps({"usage": {"prompt_tokens": 1}, "text": "x" * 70_000}).encode()
    stream.send(wire.body(RESPONSE, data[:50_000]), wire.body(RESPONSE, data[50_000:]), wire.body(RESPONSE, b"", True))
    assert sent_back(stream, RESPONSE)[0] == data


@case("MUST", "an event of a stream goes on before the next one comes")
def _(gateway):
    stream, _ = through_request(gateway)
    stream.send(wire.headers(RESPONSE, {":status": "200", "content-type": "text/event-stream"}))
    assert stream.answer().name == "response headers"
    for i in range(3):
        event = f'data: {{"n":{i}}}\n\n'.encode()
        stream.send(wire.body(RESPONSE, event))
        answer = stream.answer()
        assert (answer.name, answer.body, answer.end) == ("response body", event, False)
    stream.send(wire.body(RESPONSE, b"data: [DONE]\n\n", True))
    assert sent_back(stream, RESPONSE)[0] == b"data: [DONE]\n\n"


@case("MUST", "response trailers are answered, after the body")
def _(gateway):
    stream, _ = through_request(gateway)
    stream.send(wire.headers(RESPONSE, {":status": "200"}), wire.body(RESPONSE, b"abc"), wire.trailers(RESPONSE))
    assert stream.answer().name == "response headers"
    assert sent_back(stream, RESPONSE, end=False)[0] == b"abc"


@case("SHOULD", "request trailers end a body and are answered")
def _(gateway):
    stream = gateway.stream()
    stream.send(wire.headers(REQUEST, head()), wire.body(REQUEST, prompt()), wire.trailers(REQUEST))
    routed(stream)
    assert sent_back(stream, end=False)[0] == prompt()


@case("SHOULD", "the route is chosen anew once the endpoint is known")
def _(gateway):
    assert through_request(gateway)[1].clears_route


@case("SHOULD", "content-length is that of the body")
def _(gateway):
    length = through_request(gateway)[1].set.get("content-length")
    assert length == str(len(prompt())), f"content-length {length}"


@case("SHOULD", "a client's own routing headers do not reach a server")
def _(gateway):
    internal = ["x-prefiller-host-port", "x-encoder-hosts-ports", "x-data-parallel-host-port", "x-kv-cache-source-host-port"]
    _, answer = through_request(gateway, extra=dict.fromkeys(internal, "203.0.113.1:1"))
    for name in internal:
        assert name in answer.remove or answer.set.get(name, "203.0.113.1:1") != "203.0.113.1:1", f"{name} goes on"


@case("SHOULD", "a body that is not JSON is refused with 400 and OpenAI's error in JSON", needs="a picker that reads bodies")
def _(gateway):
    stream = gateway.stream()
    stream.send(wire.headers(REQUEST, head()), wire.body(REQUEST, b"{", True))
    answer = refused(stream)
    assert answer.status == 400 and "json" in answer.set.get("content-type", ""), (answer.status, answer.set)
    assert json.loads(answer.body)["error"]["message"]


@case("SHOULD", "the proxy's own answer, before the body's end, goes through")
def _(gateway):
    stream = gateway.stream()
    stream.send(wire.headers(REQUEST, head()), wire.body(REQUEST, b"{"), wire.headers(RESPONSE, {":status": "408"}, end=True))
    assert stream.answer().name == "response headers"


@case("SHOULD", "a message out of place ends its stream and no other")
def _(gateway):
    stream = gateway.stream()
    stream.send(wire.body(RESPONSE, b"x", True))
    try:
        answer = stream.answer()
        raise AssertionError(f"it was answered with {answer.name}")
    except Ended:
        pass
    gateway.close()
    through_request(gateway)


@case("MUST", "streams that a client's leaving cuts off do no harm")
def _(gateway):
    for messages in [[], [wire.body(REQUEST, b"{")], [wire.body(REQUEST, prompt(), True)]]:
        stream = gateway.stream()
        stream.send(wire.headers(REQUEST, head()), *messages)
        stream.reset()
        gateway.close()
    through_request(gateway)


@case("MUST", "health is told under the names of the protocol", needs="--health")
def _(gateway):
    for name in [SERVICE, "liveness", "readiness", ""]:
        gateway.connection = gateway.connect(gateway.args.health, tls=False)
        stream = gateway.connection.stream("/grpc.health.v1.Health/Check")
        stream.send(wire.field(1, name))
        stream.finish()
        assert wire.fields(stream.message()).get(1) == [1], f"{name!r} is not SERVING"
        gateway.close()


def run(gateway: Gateway, needs: str, function) -> tuple[str, str]:
    """What came of a case, and why."""
    have = {"two endpoints": len(gateway.endpoints) > 1, "--health": bool(gateway.args.health),
            "a picker that reads bodies": not gateway.args.ignores_bodies}
    if needs and not have[needs]:
        return "left out", f"needs {needs}"
    try:
        function(gateway)
        return "ok", ""
    except (AssertionError, Ended, OSError, ValueError) as error:
        return "FAILED", f"{type(error).__name__}: {error}"
    finally:
        gateway.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--plain", action="store_true", help="no TLS")
    parser.add_argument("--health")
    parser.add_argument("--endpoints")
    parser.add_argument("--only", default="")
    parser.add_argument("--ignores-bodies", action="store_true", help="the picker does not read JSON")
    parser.add_argument("--timeout", type=float, default=10, help="seconds without an answer that count as a failure")
    args = parser.parse_args()
    failed = 0
    for level, says, needs, function in CASES:
        if args.only in says:
            start = time.monotonic()
            result, why = run(Gateway(args), needs, function)
            failed += result == "FAILED" and level == "MUST"
            print(f"{level:7}{result:9}{(time.monotonic() - start) * 1000:6.0f} ms  {says}{'  -- ' + why if why else ''}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
