"""The official OpenAI client against the gateway."""
import openai
import pytest


@pytest.fixture(scope="module")
def client(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]


def test_models(client):
    assert [m.id for m in client.models.list()] == ["smollm2"]


def test_completion(client):
    answer = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=3, temperature=0)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 3, 8)


def test_several_prompts_and_choices(client):
    answer = client.completions.create(model="smollm2", prompt=["One, two,", "Red, green,"], n=2, max_tokens=4,
                                       temperature=0.8, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3] and all(c.text for c in answer.choices)


def test_chat(client):
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=24)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 24


def test_streamed_chat_equals_the_whole_answer(client):
    kwargs = dict(model="smollm2", messages=QUESTION, temperature=0, max_tokens=24)
    whole = client.chat.completions.create(**kwargs)
    chunks = list(client.chat.completions.create(**kwargs, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[-1].choices and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_streamed_completion_equals_the_whole_answer(client):
    kwargs = dict(model="smollm2", prompt="Übung macht den 🥇", temperature=0, max_tokens=24)
    whole = client.completions.create(**kwargs)
    parts = list(client.completions.create(**kwargs, stream=True))
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text


def test_stop_string_ends_the_text_before_it(client):
    kwargs = dict(model="smollm2", prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=32)
    assert "9" in client.completions.create(**kwargs).choices[0].text
    stopped = client.completions.create(**kwargs, stop=["9", "never this"]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text.rstrip().endswith("8,")


def test_seed_makes_a_sampled_answer_repeat(client):
    ask = lambda seed: client.completions.create(model="smollm2", prompt="Once upon a time", temperature=1.0, seed=seed,
                                                 max_tokens=16, top_p=0.95).choices[0].text
    assert ask(11) == ask(11)
    assert len({ask(seed) for seed in (11, 12, 13, 14)}) > 1


def test_logprobs(client):
    completion = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=2, temperature=0,
                                           logprobs=3).choices[0].logprobs
    assert len(completion.token_logprobs) == 2 and completion.tokens[0] == " Paris"
    assert all(value <= 0 for value in completion.token_logprobs) and len(completion.top_logprobs[0]) == 3
    chat = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=2, logprobs=True,
                                          top_logprobs=2).choices[0].logprobs.content
    assert len(chat) == 2 and len(chat[0].top_logprobs) == 2 and chat[0].logprob == chat[0].top_logprobs[0].logprob


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nope", prompt="x")


def test_bad_values_are_bad_requests(client):
    for bad in ({"max_tokens": -1}, {"temperature": 5}, {"top_p": 0}, {"n": 0}):
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="smollm2", prompt="x", **bad)
        assert raised.value.body["code"] == 400 and raised.value.body["type"] == "BadRequestError"


def test_a_prompt_beyond_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="smollm2", prompt=[7] * 20000, max_tokens=1)
