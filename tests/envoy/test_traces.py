"""`baton epp --tracing` before a collector that decodes OTLP with OpenTelemetry's own messages."""
import concurrent.futures
import http.server
import threading
import uuid

import grpc
import pytest
from harness import Upstream, eventually
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from test_epp import Door, prompt


class Collector:
    """Keeps every span it is sent."""

    def __init__(self):
        self.spans, self.services, self.headers = [], set(), []

    def take(self, request, headers: dict):
        self.headers.append(headers)
        for resource in request.resource_spans:
            self.services.update(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def of(self, trace: str) -> list:
        return [span for span in list(self.spans) if span.trace_id.hex() == trace]


class OverHttp(Collector):
    def __init__(self):
        super().__init__()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(service.ExportTraceServiceRequest.FromString(body), {name.lower(): value for name, value in self.headers.items()})
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.protocol, self.port = "http/protobuf", self.server.server_port

    def stop(self):
        self.server.shutdown()


class OverGrpc(Collector):
    def __init__(self):
        super().__init__()
        collector = self

        class Servicer(service_grpc.TraceServiceServicer):
            def Export(self, request, context):
                collector.take(request, dict(context.invocation_metadata()))
                return service.ExportTraceServiceResponse()

        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        service_grpc.add_TraceServiceServicer_to_server(Servicer(), self.server)
        self.protocol, self.port = "grpc", self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def stop(self):
        self.server.stop(0)


def said(attributes) -> dict:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


@pytest.fixture(params=[OverHttp, OverGrpc])
def traced(request, monkeypatch):
    """A collector, and what stands before servers and traces to it."""
    collector, servers = request.param(), [Upstream() for _ in range(3)]
    for name, value in {"ENDPOINT": f"http://127.0.0.1:{collector.port}", "PROTOCOL": collector.protocol,
                        "HEADERS": "x-key=a%20secret"}.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    listed = [(server.endpoint, role) for server, role in zip(servers, ["prefill", "decode", "decode"])]
    with Door(listed, "--tracing") as door:
        door.picker.await_servers(3)
        yield collector, door
        assert "a secret" not in door.picker.text()
    for server in servers:
        server.stop()
    collector.stop()


def test_spans_say_why_each_candidate_scored_what_it_did(traced):
    collector, door = traced
    trace, above, name = uuid.uuid4().hex, uuid.uuid4().hex[:16], uuid.uuid4().hex
    headers = {"traceparent": f"00-{trace}-{above}-01", "tracestate": "a=b", "x-request-id": name}
    seen = door.post({"model": "m", "prompt": prompt(1000)}, headers)
    assert seen.status == 200
    spans = eventually(lambda: (found := collector.of(trace)) and len(found) == 4 and found, "four spans")
    (root,) = [s for s in spans if s.name == "gateway.request"]
    (decision,) = [s for s in spans if s.name == "gateway.request_orchestration"]
    profiles = {said(s.attributes)["baton.profile"]: s for s in spans if s.name == "run_scheduler_profile"}
    assert root.parent_span_id.hex() == above and root.kind == root.SPAN_KIND_SERVER
    assert decision.parent_span_id == root.span_id
    assert all(s.parent_span_id == decision.span_id for s in profiles.values())
    assert root.start_time_unix_nano <= decision.start_time_unix_nano <= decision.end_time_unix_nano <= root.end_time_unix_nano
    # The server hears of the same trace, below the picker's span.
    passed = seen.json()["headers"]
    assert passed["traceparent"] == f"00-{trace}-{root.span_id.hex()}-01" and passed["tracestate"] == "a=b"
    told, kept = said(decision.attributes), door.picker.decision(name)
    assert (told["baton.endpoint"], told["baton.prefill_endpoint"]) == (kept["decode"], kept["prefill"])
    assert told["target_model"] == "m" and told["llm_d.epp.pd.disaggregation_used"] is True
    assert said(root.attributes)["gen_ai.request.id"] == name
    assert said(root.attributes)["http.response.status_code"] == 200
    assert set(profiles) == {stage["profile"] for stage in kept["stages"]} == {"prefill", "decode"}
    for stage in kept["stages"]:
        events = [said(event.attributes) for event in profiles[stage["profile"]].events]
        weights = said(profiles[stage["profile"]].attributes)
        scored = {e["baton.endpoint"]: e for e in events if "baton.total" in e}
        candidates = {c["endpoint"]: c for c in stage["candidates"] if not c["dropped_by"]}
        assert scored.keys() == candidates.keys() and len(events) == stage["of"]
        for endpoint, candidate in candidates.items():
            total = 0
            for scorer, score in candidate["scores"].items():
                assert scored[endpoint][f"baton.score.{scorer}"] == score
                total += score * weights[f"baton.weight.{scorer}"]
            assert scored[endpoint]["baton.total"] == pytest.approx(total)
    assert collector.services == {"llm-d-router/epp"}
    assert collector.headers[0]["x-key"] == "a secret"


def test_what_is_not_sampled_keeps_its_parent_and_a_refusal_is_told(traced):
    collector, door = traced
    trace, above = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    untold = f"00-{trace}-{above}-00"
    assert door.post({"model": "m", "prompt": "a"}, {"traceparent": untold}).json()["headers"]["traceparent"] == untold
    assert "traceparent" not in door.post({"model": "m", "prompt": "a"}).json()["headers"]
    refused = uuid.uuid4().hex
    assert door.post({"prompt": "a"}, {"traceparent": f"00-{refused}-{above}-01"}).status == 400
    (span,) = eventually(lambda: collector.of(refused), "the refusal's span")
    assert span.status.code == span.status.STATUS_CODE_ERROR and said(span.attributes)["error.type"] == "BadRequest"
    assert collector.of(trace) == []
