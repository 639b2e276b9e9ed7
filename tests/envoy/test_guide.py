"""The guide's requests through Envoy and `baton epp` to real servers, prefill and decode apart."""
import json
import pathlib
import secrets
import sys
import uuid

import pytest
from client import ask
from harness import eventually
from test_epp import Door

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from stack import Process, metric, stream_lines  # noqa: E402
from stack import free_port as port_of_system  # noqa: E402

PREFILLS = 2


@pytest.fixture(scope="module")
def servers():
    env = {"BATON_KV_SECRET": secrets.token_hex(32)}
    running = [(role, Process("serve", "smollm2", "--role", role, "--port", str(port_of_system()), env=env))
               for role in ["prefill"] * PREFILLS + ["decode"]]
    yield running
    for _, server in running:
        server.stop()


@pytest.fixture(scope="module")
def door(servers):
    listed = [(server.url.removeprefix("http://"), role) for role, server in servers]
    with Door(listed) as running:
        running.picker.await_servers(len(listed))
        yield running


def complete(door, prompt: str, **more):
    return door.post({"model": "smollm2", "prompt": prompt, "max_tokens": 16, "temperature": 0, **more},
                     path="/v1/completions")


def long_text() -> str:
    return f"{uuid.uuid4().hex} tells a story. " + "The baton goes from hand to hand. " * 60


def test_the_models_are_those_of_the_servers(door):
    answer = ask(door.port, "GET", "/v1/models")
    assert answer.status == 200
    assert [model["id"] for model in answer.json()["data"]] == ["smollm2"]


def test_a_short_prompt_stays_on_decode(door):
    answer = complete(door, "Once upon a time").json()
    assert answer["kv_transfer_params"] is None
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_long_prompt_is_computed_elsewhere_and_decode_pulls_it(door, servers):
    decode = servers[-1][1].url
    pulled = lambda: metric(decode, "vllm:external_prefix_cache_hits_total")
    before, text = pulled(), long_text()
    first = complete(door, text).json()
    assert set(first["kv_transfer_params"]) >= {"remote_block_ids", "remote_host", "remote_port", "uuid"}
    assert pulled() > before
    # The same again is cached on decode: nobody else is asked, and the words are the same.
    again = complete(door, text).json()
    assert again["kv_transfer_params"] is None
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_a_chat_is_streamed_and_its_usage_counted(door):
    url = f"http://127.0.0.1:{door.port}"
    counted = lambda: door.picker.metric("llm_d_epp_request_output_tokens_sum")
    before = counted()
    events = list(stream_lines(url, "/v1/chat/completions", {
        "model": "smollm2", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12,
        "ignore_eos": True, "stream_options": {"include_usage": True}}))
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 12
    eventually(lambda: counted() == before + 12, "the picker read the usage")


def test_a_model_under_another_name_answers_under_the_name_that_was_asked_for(door):
    body = {"model": "alias", "prompt": "Once", "max_tokens": 4}
    for stream in (False, True):
        answer = door.post(body | {"stream": stream}, {"x-llm-d-model-name-rewrite": "smollm2"}, path="/v1/completions")
        assert answer.status == 200, answer.body
        assert b'"alias"' in answer.body and b'"smollm2"' not in answer.body


def test_a_model_that_nobody_serves_is_404(door):
    answer = door.post({"model": "nobody's", "prompt": "x"}, path="/v1/completions")
    assert answer.status == 404 and answer.json()["error"]["param"] == "model"


def test_a_prompt_of_a_megabyte_gets_the_servers_own_answer(door):
    answer = complete(door, "word " * 200_000)
    assert answer.status == 400 and "maximum context length" in answer.json()["error"]["message"]


def test_a_prefill_server_that_dies_costs_no_request(door, servers):
    servers[0][1].stop()
    for _ in range(4):
        answer = complete(door, long_text())
        assert answer.status == 200
    eventually(lambda: door.picker.metric("llm_d_epp_ready_endpoints") == PREFILLS, "the picker notices")
