"""Deaths, hang-ups and expiry under load. Each test has a stack of its own: they break things."""
import http.client
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stack import Process, Stack, eventually, free_port, metric, post, stream_lines

LONG = "The ferryman of the old town keeps a ledger of every crossing, and no two pages agree. " * 16


@pytest.fixture(scope="module")
def stack():
    running = Stack()
    yield running
    running.stop()


def body(i: int, **more) -> dict:
    return {"model": "smollm2", "prompt": f"Page {i}. {LONG}", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more


def whole_again(stack, prefill=2, decode=1):
    eventually(lambda: len(stack.servers("prefill")) == prefill and len(stack.servers("decode")) == decode,
               120, "all servers running again", every_s=0.5)


def idle(stack) -> bool:
    urls = [url for role in ("prefill", "decode") for _, url in stack.servers(role)]
    return all(metric(url, "vllm:num_requests_running") + metric(url, "vllm:num_requests_waiting") == 0 for url in urls) \
        and stack.blocks_in_use() == 0


def hang_up(url: str, request: dict, after_s: float):
    """Sends a request and closes the socket after a while, whatever came."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(request), {"content-type": "application/json"})
    time.sleep(after_s)
    connection.sock.close()


def test_a_killed_prefill_server_loses_no_request(stack):
    victim = stack.servers("prefill")[0][0]
    answers = {}

    def ask(i: int):
        answers[i] = post(stack.url, "/v1/completions", body(i))
        if len(answers) == 10:
            victim.send_signal(signal.SIGKILL)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(40)))
    answers = answers.values()
    assert [status for status, _ in answers] == [200] * 40
    assert all(len(a["choices"][0]["text"]) > 0 and a["usage"]["completion_tokens"] == 8 for _, a in answers)
    whole_again(stack)


def test_a_killed_decode_server_costs_only_streams_that_had_begun(stack):
    begun, ends = threading.Event(), {}

    def stream():
        ends["lines"] = []
        for line in stream_lines(stack.url, "/v1/completions", body(0, max_tokens=400)):
            ends["lines"].append(line)
            begun.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(120)
    ((victim, _),) = stack.servers("decode")
    victim.send_signal(signal.SIGKILL)
    reader.join(60)
    assert not reader.is_alive()
    assert ends["lines"][-1] == "[DONE]" and "error" in json.loads(ends["lines"][-2])
    whole_again(stack)
    eventually(lambda: post(stack.url, "/v1/completions", body(1))[0] == 200, 60, "an answer after the restart", every_s=0.5)


def test_a_client_that_hangs_up_frees_its_blocks_within_a_second(stack):
    whole_again(stack)
    # Before, during and after the prompt's computation and the hand-over, and while tokens stream.
    for i, delay in enumerate((0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)):
        hang_up(stack.url, body(100 + i, max_tokens=500, stream=i % 2 == 1), delay)
        eventually(lambda: idle(stack), 1.0, f"blocks free after a hang-up at {delay} s")


def cancels(stack, n: int, threads: int):
    rng = random.Random(3)
    delays = [rng.choice((0.0, 0.01, 0.05, 0.1, 0.3, 0.6)) * rng.random() for _ in range(n)]

    def one(i: int):
        prompt = f"{i} " + LONG[: rng.randrange(20, 900)]
        if i % 7 == 0:
            assert post(stack.url, "/v1/completions", body(i, prompt=prompt, max_tokens=2))[0] == 200
        else:
            hang_up(stack.url, body(i, prompt=prompt, max_tokens=64, stream=i % 3 == 0), delays[i])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(n)))
    eventually(lambda: idle(stack), 10, "no block in use after random cancels")
    assert post(stack.url, "/v1/completions", body(1))[0] == 200


def test_random_cancels_leave_no_block_in_use(stack):
    whole_again(stack)
    cancels(stack, 120, 8)


@pytest.mark.slow
def test_a_thousand_random_cancels_leave_no_block_in_use(stack):
    whole_again(stack)
    cancels(stack, 1000, 8)


def test_an_expired_lease_is_refused_and_the_prompt_recomputed():
    secret = {"BATON_KV_SECRET": os.urandom(32).hex()}
    start = lambda role: Process("serve", "smollm2", "--role", role, "--port", str(free_port()),
                                 "--kv-lease-ttl", "1s", env=secret)
    prefill = start("prefill")
    decode = start("decode")
    try:
        request = body(7)
        _, first = post(prefill.url, "/v1/completions",
                        request | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}})
        params = first["kv_transfer_params"]
        assert params["uuid"]
        time.sleep(2.5)
        before = metric(decode.url, "vllm:external_prefix_cache_hits_total")
        status, late = post(decode.url, "/v1/completions", request | {"kv_transfer_params": params})
        assert status == 200 and late["kv_transfer_params"] is None
        assert metric(decode.url, "vllm:external_prefix_cache_hits_total") == before
        _, again = post(decode.url, "/v1/completions", request)
        assert late["choices"][0]["text"] == again["choices"][0]["text"]
    finally:
        prefill.stop()
        decode.stop()
