"""`baton sidecar` between real servers: the exchange that llm-d's sidecar makes, and the tokens that come of it."""
import secrets

import pytest
from parity import differs_within_margin
from stack import Process, free_port, metric, post
from test_pd_equal import generate, prompts


@pytest.fixture(scope="module")
def servers():
    """A prefill server and a decode server of one pool; nothing but a sidecar brings them together."""
    env = {"BATON_KV_SECRET": secrets.token_hex(32)}
    running = [Process("serve", "smollm2", "--role", role, "--port", str(free_port()), env=env)
               for role in ("prefill", "decode")]
    yield running
    for server in running:
        server.stop()


def sidecar(decode: Process, *flags: str) -> Process:
    port = decode.url.rsplit(":", 1)[1]
    return Process("sidecar", "--host=127.0.0.1", f"--port={free_port()}", "--secure-proxy=false",
                   "--connector=nixlv2", f"--vllm-port={port}", "-v=5", *flags)


def routed(url: str, prefill: str, prompt: list[int]) -> dict:
    status, answer = post(url, "/v1/completions", {
        "model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True}, {"x-prefiller-host-port": prefill})
    assert status == 200, answer
    return answer


def test_tokens_are_those_of_one_server_and_decode_pulled(servers, both):
    prefill, decode = servers
    running = sidecar(decode)
    try:
        pulled = lambda: metric(decode.url, "vllm:external_prefix_cache_hits_total")
        asked = lambda: metric(prefill.url, "vllm:request_success_total")
        before, asked_before, work = pulled(), asked(), prompts(20)
        target = prefill.url.removeprefix("http://")
        for prompt in work:
            (choice,) = routed(running.url, target, prompt)["choices"]
            expect, margins = generate(both.url, prompt)
            differs_within_margin(choice["token_ids"], expect, margins)
        assert asked() >= asked_before + len(work)
        assert pulled() > before, "no KV was handed over"
    finally:
        running.stop()


def test_a_dead_prefill_server_costs_no_request(servers):
    _, decode = servers
    metrics = free_port()
    running = sidecar(decode, f"--metrics-port={metrics}")
    try:
        answer = routed(running.url, f"127.0.0.1:{free_port()}", prompts(7)[6])
        assert len(answer["choices"][0]["token_ids"]) == 8
        assert metric(f"http://127.0.0.1:{metrics}", "baton_sidecar_fallbacks_total") == 1
    finally:
        running.stop()


def test_the_end_is_clean_and_bad_settings_are_refused_by_name(servers, tmp_path):
    _, decode = servers
    running = sidecar(decode)
    running.stop()
    assert running.child.returncode == 0
    for flags, words in [(["--kv-connector=lmcache"], "--kv-connector=lmcache"),
                         (["--moriio-write-mode=true"], "--moriio-write-mode"),
                         (["--configuration", "prot: 1"], "prot")]:
        with pytest.raises(RuntimeError, match="exit 64") as failed:
            Process("sidecar", *flags)
        assert words in str(failed.value)
    file = tmp_path / "sidecar.yaml"
    file.write_text("kv-connector: sglang\nenable-tls: [prefiller]\nmodel-server-port: 8200\nprefill-retry-backoff: 300ms\n")
    running = Process("sidecar", "--configuration-file", str(file), "--host=127.0.0.1", "--port=0", "--secure-proxy=false")
    running.stop()
