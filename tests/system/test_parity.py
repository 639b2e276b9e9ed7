"""Greedy tokens equal those of Hugging Face transformers."""
from concurrent.futures import ThreadPoolExecutor

import pytest
from parity import differs_within_margin
from stack import post


def generate(url: str, case: dict) -> list[int]:
    status, answer = post(url, "/v1/completions", {
        "model": "smollm2", "prompt": case["prompt_ids"], "max_tokens": len(case["tokens"]), "temperature": 0,
        "ignore_eos": True, "return_token_ids": True})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(case["prompt_ids"])
    return answer["choices"][0]["token_ids"]


@pytest.mark.parametrize("through, every", [("exact_stack", 1), ("exact_both", 1), ("xla_both", 5)])
def test_greedy_tokens_equal_the_reference(through, every, request, reference):
    url = request.getfixturevalue(through).url
    assert len(reference) == 40
    cases = reference[::every]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda case: generate(url, case), cases))
    parted = [case["name"] for case, ours in zip(cases, outputs)
              if differs_within_margin(ours, case["tokens"], case["margins"])]
    print(f"{through}: {len(cases) - len(parted)} of {len(cases)} equal; parted at a margin under 1e-3: {parted}")
    assert len(parted) <= sum(min(case["margins"]) < 1e-3 for case in cases)


def test_text_is_tokenized_as_the_reference_does(both, reference):
    for case in reference:
        body = {"model": "smollm2", "messages": case["messages"]} if "messages" in case else \
            {"model": "smollm2", "prompt": case["prompt"]} if "prompt" in case else None
        if body:
            assert post(both.url, "/tokenize", body)[1]["tokens"] == case["prompt_ids"], case["name"]


def test_text_of_the_answer_is_the_references(exact_both, reference):
    case = next(c for c in reference if c["name"] == "capital")
    status, answer = post(exact_both.url, "/v1/completions", {
        "model": "smollm2", "prompt": case["prompt"], "max_tokens": 64, "temperature": 0, "ignore_eos": True,
        "skip_special_tokens": False})
    assert status == 200 and answer["choices"][0]["text"] == case["text"]
