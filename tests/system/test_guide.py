"""The guide's three curls, with curl, against the whole stack."""
import json
import subprocess

LONG = "The lighthouse keeper counted the ships again, and again the sum was different. " * 24
FOUR_KEYS = {"remote_block_ids": list, "remote_host": str, "remote_port": str, "uuid": int}


def curl(*args: str) -> dict:
    done = subprocess.run(["curl", "-s", "--fail-with-body", "--max-time", "120", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def complete(url: str, prompt: str) -> dict:
    body = json.dumps({"model": "smollm2", "max_tokens": 64, "prompt": prompt, "ignore_eos": True})
    return curl("-X", "POST", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body)


def test_models_have_the_guides_shape(stack):
    listed = curl(f"{stack.url}/v1/models", "-H", "Content-Type: application/json")
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model["id"] == "smollm2" and model["object"] == "model" and model["max_model_len"] > 0
    assert {"created", "owned_by", "root", "parent", "permission"} <= model.keys()
    assert model["permission"][0]["id"].startswith("modelperm-")


def test_a_short_prompt_is_answered_by_decode_alone(stack):
    answer = complete(stack.url, "How are you today?")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and choice["text"]
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 64
    assert answer["object"] == "text_completion" and answer["kv_transfer_params"] is None


def test_a_long_prompt_names_the_prefill_server_that_did_the_work(stack):
    answer = complete(stack.url, LONG)
    params = answer["kv_transfer_params"]
    assert {key: type(value) for key, value in params.items()} == FOUR_KEYS
    assert params["remote_host"] == "127.0.0.1" and params["uuid"] < 2**50
    assert len(params["remote_block_ids"]) * 16 >= answer["usage"]["prompt_tokens"]
    prefills = stack.servers("prefill")
    ports = {str(c.laddr.port) for process, _ in prefills for c in process.net_connections("tcp")}
    assert len(prefills) == 2 and params["remote_port"] in ports
    assert answer["choices"][0]["finish_reason"] == "length"


def test_chat_answers_as_the_reference_does(stack, reference):
    case = next(c for c in reference if c["name"] == "chat-capital")
    answer = curl("-X", "POST", f"{stack.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d",
                  json.dumps({"model": "smollm2", "temperature": 0, "max_tokens": 64, "messages": case["messages"]}))
    content = answer["choices"][0]["message"]["content"]
    assert len(content) > 20 and case["text"].startswith(content)
