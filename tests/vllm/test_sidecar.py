"""Two real vLLM servers, prefill and decode with NIXL between them, behind `baton sidecar` and `baton gateway`.

vLLM's CPU build and SmolLM2 in bf16. Its threads spin, so nothing here is timed. VLLM_PREFILL and VLLM_DECODE may name the
URLs of a pair that runs already; the tests that kill one are left out then.
"""
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/system"), str(ROOT / "tests/bench")]
from stack import BATON, Process, eventually, free_port, get, metric, post, stream_lines  # noqa: E402

NEW = 24
# Its metrics say what runs after each step: a prompt of one step is never seen running.
STEP = 256
START_DEADLINE_S = 900
# Its threads spin in turns on few cores, and stand still for a minute at times.
PATIENCE_S = 300
RUNNING = os.environ.get("VLLM_PREFILL"), os.environ.get("VLLM_DECODE")
kills = pytest.mark.skipif(all(RUNNING), reason="these servers are not ours to kill")


class Vllm:
    """One half of a pair."""

    def __init__(self, role: str, core: int, place):
        import subjects
        port, side = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile(prefix=f"vllm-{role}-", suffix=".log", delete=False)
        transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        environment = os.environ | subjects.vllm_environment(place) | {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side),
            "UCX_TLS": "tcp,self,sm,cma", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        self.child = subprocess.Popen(
            [pathlib.Path(sys.executable).with_name("vllm"), "serve", place.model("bf16"), "--host", "127.0.0.1",
             "--port", str(port), "--dtype", "bfloat16", "--served-model-name", "smollm2", "--max-model-len", "2048",
             "--enforce-eager", "--max-num-batched-tokens", str(STEP), "--kv-transfer-config", json.dumps(transfer)],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def await_ready(self):
        def ready():
            assert self.child.poll() is None, f"exit {self.child.returncode} before ready, see {self.log.name}"
            return answers(self.url)
        eventually(ready, START_DEADLINE_S, f"ready, see {self.log.name}", every_s=1)

    def kill(self):
        """With all of its processes, as a node that is lost."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


def answers(url: str) -> bool:
    try:
        get(url, "/health")
        return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def pair():
    """URLs of the prefill and the decode server, and what kills each."""
    if all(RUNNING):
        yield (*RUNNING, None, None)
        return
    import psutil
    import subjects
    gguf = pathlib.Path(subprocess.run([BATON, "fetch", "smollm2"], check=True, capture_output=True, text=True).stdout.strip())
    cores = psutil.Process().cpu_affinity()
    place = subjects.Place(cores, gguf, ROOT / "target/bench")
    halves = [Vllm("kv_producer", cores[0], place), Vllm("kv_consumer", cores[-1], place)]
    try:
        for half in halves:
            half.await_ready()
        yield (*(half.url for half in halves), *(half.kill for half in halves))
    finally:
        for half in halves:
            half.kill()


@pytest.fixture(scope="module")
def sidecar(pair):
    port, decode = free_port(), pair[1].rsplit(":", 1)[1]
    child = subprocess.Popen([BATON, "sidecar", "--host=127.0.0.1", f"--port={port}", f"--vllm-port={decode}",
                              "--secure-proxy=false", "--kv-connector=nixlv2"])
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: answers(url), 30, "the sidecar listens")
        yield url
    finally:
        child.terminate()
        child.wait(60)


def prompt(n: int = 300) -> list[int]:
    """Ids that no cache has seen, and of which a model knows how they go on: to what it cannot know, sums in bf16 that are
    taken in another order give another answer."""
    round_ = [random.randrange(1000, 40000) for _ in range(12)]
    return (round_ * n)[:n]


def body(ids: list[int]) -> dict:
    return {"model": "smollm2", "prompt": ids, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}


def through(url: str, pair, ids: list[int], **more) -> dict:
    status, answer = post(url, "/v1/completions", body(ids) | more, {"x-prefiller-host-port": authority(pair[0])})
    assert status == 200, answer
    return answer


def authority(url: str) -> str:
    return url.removeprefix("http://")


def alone(url: str, ids: list[int]) -> str:
    return post(url, "/v1/completions", body(ids))[1]["choices"][0]["text"]


def by_source(url: str, source: str) -> float:
    lines = [line for line in get(url, "/metrics").splitlines()
             if line.startswith("vllm:prompt_tokens_by_source_total{") and f'source="{source}"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_prefill_computes_the_prompt_and_decode_pulls_it(pair, sidecar):
    ids = prompt()
    prefilled, pulled = metric(pair[0], "vllm:prompt_tokens_total"), by_source(pair[1], "external_kv_transfer")
    computed = by_source(pair[1], "local_compute")
    answer = through(sidecar, pair, ids)
    assert answer["usage"]["completion_tokens"] == NEW
    assert metric(pair[0], "vllm:prompt_tokens_total") - prefilled == len(ids)
    assert by_source(pair[1], "external_kv_transfer") - pulled >= len(ids) - 1
    assert by_source(pair[1], "local_compute") - computed <= 1
    # The prefill server, asked alone, is the same engine on the same numbers.
    assert answer["choices"][0]["text"] == alone(pair[0], ids)


def test_the_guides_request_is_answered(pair, sidecar):
    text = "The capital of France is Paris, and the capital of Italy is " * 12
    status, answer = post(sidecar, "/v1/completions", {"model": "smollm2", "prompt": text, "max_tokens": 64, "ignore_eos": True},
                          {"x-prefiller-host-port": authority(pair[0])})
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 64


def test_a_stream_says_what_the_whole_answer_says(pair, sidecar):
    ids = prompt()
    import http.client
    connection = http.client.HTTPConnection(authority(sidecar), timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body(ids) | {"stream": True}),
                       {"content-type": "application/json", "x-prefiller-host-port": authority(pair[0])})
    response = connection.getresponse()
    assert response.status == 200
    lines = [line.decode().strip().removeprefix("data: ") for line in response if line.strip()]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert text == alone(pair[0], ids)


def test_chat_goes_the_same_way(pair, sidecar):
    talk = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about rivers. " * 40}],
            "max_tokens": NEW, "temperature": 0}
    pulled = by_source(pair[1], "external_kv_transfer")
    status, answer = post(sidecar, "/v1/chat/completions", talk, {"x-prefiller-host-port": authority(pair[0])})
    assert status == 200 and answer["choices"][0]["message"]["content"]
    assert by_source(pair[1], "external_kv_transfer") > pulled


def test_several_choices_are_left_to_decode_which_would_fetch_the_kv_for_each(pair, sidecar):
    pulled, prefilled = by_source(pair[1], "external_kv_transfer"), metric(pair[0], "vllm:prompt_tokens_total")
    # Without a seed: on a CPU vLLM's engine dies of one.
    answer = through(sidecar, pair, prompt(), n=2, temperature=1)
    assert len(answer["choices"]) == 2
    assert by_source(pair[1], "external_kv_transfer") == pulled
    assert metric(pair[0], "vllm:prompt_tokens_total") == prefilled


def test_our_gateway_schedules_the_pair(pair, sidecar):
    config = {"port": free_port(), "endpoints": [{"address": authority(sidecar), "role": "decode"},
                            {"address": authority(pair[0]), "role": "prefill"}], "pd_threshold": 100}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        gateway = Process("gateway", "--config", file.name)
        try:
            def pulled():
                """Servers that starve are unreachable at times, and the gateway does without."""
                ids, before = prompt(), by_source(pair[1], "external_kv_transfer")
                status, answer = post(gateway.url, "/v1/completions", body(ids))
                came = by_source(pair[1], "external_kv_transfer") - before
                return status == 200 and came >= len(ids) - 1 and (ids, answer)
            ids, answer = eventually(pulled, PATIENCE_S, "the gateway has a prompt handed over", every_s=1)
            assert answer["choices"][0]["text"] == alone(pair[0], ids)
            assert "smollm2" in get(gateway.url, "/v1/models")
        finally:
            gateway.stop()


@kills
def test_a_prefill_server_killed_midway_costs_no_request(pair, sidecar):
    ids, found = prompt(1900), []
    asking = threading.Thread(target=lambda: found.append(through(sidecar, pair, ids)))
    asking.start()
    eventually(lambda: metric(pair[0], "vllm:num_requests_running") > 0, PATIENCE_S, "prefill runs")
    pair[2]()
    asking.join(PATIENCE_S)
    assert found and found[0]["usage"]["completion_tokens"] == NEW
    again = through(sidecar, pair, ids)
    assert again["choices"][0]["text"] == found[0]["choices"][0]["text"]


@kills
def test_a_decode_server_that_is_gone_is_a_clear_error(pair, sidecar):
    pair[3]()
    status, answer = post(sidecar, "/v1/completions", body(prompt(10)))
    assert status == 503 and answer["error"]["message"]
