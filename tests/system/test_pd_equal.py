"""Prefill and decode apart give the tokens that one server gives."""
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from parity import differs_within_margin
from stack import metric, post

BLOCK, VOCAB = 16, 49152


def prompts(n: int) -> list[list[int]]:
    """Mixed lengths: one token, around block boundaries, long, and prompts that extend earlier ones."""
    rng = random.Random(20)
    fresh = lambda k: [rng.randrange(20, VOCAB) for _ in range(k)]
    base = fresh(160)
    made = [fresh(1), fresh(BLOCK - 1), fresh(BLOCK), fresh(BLOCK + 1), fresh(8 * BLOCK), fresh(8 * BLOCK + 1), base]
    while len(made) < n:
        kind = rng.random()
        if kind < 0.2:
            made.append(base[: rng.randrange(1, len(base))] + fresh(rng.randrange(1, 40)))
        elif kind < 0.35:
            made.append(rng.choice(made) + fresh(rng.randrange(1, 30)))
        else:
            made.append(fresh(rng.choice([1, 7, 15, 16, 17, 31, 33, 64, 100, 129, 200])))
    return made


def generate(url: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Eight greedy tokens and, at each, the distance of the two likeliest."""
    status, answer = post(url, "/v1/completions", {
        "model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "logprobs": 2, "return_tokens_as_token_ids": True})
    assert status == 200, answer
    (choice,) = answer["choices"]
    tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
    return choice["token_ids"], [top[0] - top[1] for top in tops]


def compare(stack, both, n: int):
    work = prompts(n)
    pulled = lambda: sum(metric(url, "vllm:external_prefix_cache_hits_total") for _, url in stack.servers("decode"))
    before = pulled()
    with ThreadPoolExecutor(8) as pool:
        apart = list(pool.map(lambda p: generate(stack.url, p), work))
    assert pulled() > before, "no KV was handed over"
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda p: generate(both.url, p), work))
    parted = sum(differs_within_margin(a[0], t[0], t[1]) for a, t in zip(apart, together))
    print(f"{n - parted} of {n} equal, {parted} parted at a margin under 1e-3")
    assert parted <= n // 50


def test_sixty_requests_at_once_are_equal(stack, both):
    compare(stack, both, 60)


@pytest.mark.slow
def test_three_hundred_requests_at_once_are_equal(stack, both):
    compare(stack, both, 300)
