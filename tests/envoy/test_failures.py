"""A picker behind a real Envoy: what goes wrong, and how much of it a client notices."""
import signal
import subprocess
import uuid

import pytest
from client import Http1, ask
from harness import Stack, eventually


def test_a_picker_that_does_not_decide_in_time_still_answers():
    with Stack(flags=("--decision-ms=300",)) as stack:
        for pieces in [[], [b"{}"]]:
            answer = ask(stack.port, "POST" if pieces else "GET", "/seen", {"test-wait-ms": "60000"}, *pieces)
            assert (answer.status, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
            assert answer.headers["retry-after"] == "1"
        assert ask(stack.port, "POST", "/seen", {"test-wait-ms": "30"}, b"{}").status == 200


def test_a_body_beyond_the_limit_is_refused():
    with Stack(flags=("--max-body=100000",)) as stack:
        assert ask(stack.port, "POST", "/seen", {}, b"x" * 100_000).status == 200
        answer = ask(stack.port, "POST", "/seen", {}, b"x" * 100_001)
        assert (answer.status, answer.json()["error"]["code"]) == (413, 413)


@pytest.mark.parametrize("limit, headers", [
    ("--max-exchanges=1", {"test-wait-ms": "60000"}), ("--max-held=100000", {"test-wait-ms": "60000"})])
def test_what_is_more_than_it_may_hold_is_refused(limit, headers):
    with Stack(flags=(limit,)) as stack:
        first = Http1(stack.port)
        first.send("POST", "/seen", headers, b"x" * 90_000)
        refused = eventually(lambda: (a := ask(stack.port, "POST", "/seen", {}, b"x" * 90_000)).status == 503 and a, "full")
        assert refused.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated" and refused.headers["retry-after"]
        first.close()
        eventually(lambda: ask(stack.port, "POST", "/seen", {}, b"x" * 90_000).status == 200, "it has room again")


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_picker_that_is_down_and_comes_back(fail_open):
    with Stack(fail_open=fail_open) as stack:
        assert ask(stack.port, "POST", "/seen", {}, b"{}").status == 200
        stack.picker.stop(signal.SIGKILL)
        # Nobody chose: with fail-open Envoy goes on and has nowhere to go.
        assert ask(stack.port, "GET", "/seen").status == (503 if fail_open else 500)
        assert ask(stack.port, "POST", "/seen", {}, b"{}").status in (500, 503)
        stack.picker.start()
        eventually(lambda: ask(stack.port, "POST", "/seen", {}, b"{}").status == 200, "works again")


def test_a_client_cannot_choose_when_the_picker_is_down():
    with Stack(fail_open=True) as stack:
        stack.picker.stop(signal.SIGKILL)
        chosen = {"x-gateway-destination-endpoint": stack.upstreams[0].endpoint}
        assert ask(stack.port, "GET", "/seen", chosen).status == 503


def test_exchanges_in_progress_outlive_the_order_to_stop():
    with Stack() as stack:
        name = uuid.uuid4().hex
        connection = Http1(stack.port)
        connection.send("POST", "/stream?n=20&gap_ms=100", {"x-request-id": name}, b"{}")
        status, headers = connection.read_head()
        chunks = connection.chunks(headers)
        body = next(chunks)
        stack.picker.process.send_signal(signal.SIGTERM)
        body += b"".join(chunks)
        assert (status, body.count(b"data: ")) == (200, 20)
        assert stack.picker.process.wait(20) == 0
        assert stack.ended(name).startswith("Naturally")


def test_a_new_certificate_is_shown_without_a_restart(tmp_path):
    def make(name: str):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                        "-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt", "-days", "2", "-subj", f"/CN={name}"],
                       check=True, capture_output=True)

    def shown(port: int) -> str:
        seen = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2"], input=b"",
                              capture_output=True).stdout.decode()
        assert "ALPN protocol: h2" in seen
        return seen

    make("first")
    with Stack(flags=(f"--cert-path={tmp_path}",)) as stack:
        assert "CN = first" in shown(stack.picker.port) or "CN=first" in shown(stack.picker.port)
        assert ask(stack.port, "POST", "/seen", {}, b"{}").status == 200
        make("second")
        eventually(lambda: "second" in shown(stack.picker.port), "the second certificate")
        assert ask(stack.port, "POST", "/seen", {}, b"{}").status == 200


def test_plain_text_when_told_so():
    with Stack(tls=False) as stack:
        assert ask(stack.port, "POST", "/seen", {}, b"{}").status == 200
