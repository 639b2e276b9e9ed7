"""Prints the figures of BENCHMARKS.md: start-up, memory, prefill, decode, time to first token, KV hand-over, neighbours.

    make bench            (or: .venv/bin/python tests/bench/figures.py [--rounds N])

The machine's copy bandwidth stands beside them, measured in the same run. Nothing here asserts a time.
"""
import argparse
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from stack import Process, Stack, free_port, metric, post, stream_lines  # noqa: E402

rng = random.Random(time.time_ns())


def say(name: str, value: str):
    print(f"{name:<58} {value}", flush=True)


def copy_bandwidth() -> float:
    """GB/s written by a plain copy of 256 MiB, best of five."""
    source, target = bytearray(os.urandom(1 << 20) * 256), bytearray(256 << 20)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        memoryview(target)[:] = source
        best = max(best, len(source) / (time.perf_counter() - start) / 1e9)
    return best


def fresh(n: int) -> list[int]:
    """A prompt that no cache has seen."""
    return [rng.randrange(20, 49152) for _ in range(n)]


def body(prompt: list[int], tokens: int) -> dict:
    return {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def first_token_and_rest(url: str, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    start = time.perf_counter()
    first = None
    for line in stream_lines(url, "/v1/completions", body(prompt, tokens)):
        if line != "[DONE]" and first is None:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start - first


def beside_a_prompt(url: str) -> float:
    """How many times longer the gaps between a stream's tokens are while somebody else's 1000-token prompt is computed."""
    stamps: list[float] = []

    def generate():
        stamps.extend(time.perf_counter() for _ in stream_lines(url, "/v1/completions", body(fresh(16), 800)))

    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(generate)
        time.sleep(0.6)
        begin = time.perf_counter()
        first_token_and_rest(url, fresh(1000), 1)
        end = time.perf_counter()
        stream.result()
    gaps = lambda start, stop: [b - a for a, b in zip(stamps, stamps[1:]) if start <= a and b <= stop]  # noqa: E731
    return statistics.mean(gaps(begin, end)) / statistics.mean(gaps(begin - 0.5, begin))


def peak_mb(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1000


def starts():
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold, no packed weights yet", "warm"):
            os.environ["BATON_WEIGHT_CACHE"] = cache
            start = time.perf_counter()
            stack = Stack()
            say(f"baton up ready, {state}", f"{time.perf_counter() - start:.1f} s")
            start = time.perf_counter()
            post(stack.url, "/v1/completions", body(fresh(5), 1))
            say("  first answer after that", f"{time.perf_counter() - start:.2f} s")
            stack.stop()
        del os.environ["BATON_WEIGHT_CACHE"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = range(parser.parse_args().rounds)
    say("date", time.strftime("%Y-%m-%d"))
    say("copy bandwidth, one thread", f"{copy_bandwidth():.1f} GB/s")
    starts()

    both = Process("serve", "smollm2", "--role", "both", "--port", str(free_port()))
    first_token_and_rest(both.url, fresh(40), 4)
    prefill = [first_token_and_rest(both.url, fresh(1000), 1)[0] for _ in rounds]
    say("prefill, 1000 tokens, one server", f"{1000 / statistics.median(prefill):.0f} tokens/s")
    rest = [first_token_and_rest(both.url, fresh(16), 256)[1] for _ in rounds]
    say("decode, batch 1", f"{255 / statistics.median(rest):.1f} tokens/s")
    with ThreadPoolExecutor(8) as pool:
        start = time.perf_counter()
        list(pool.map(lambda _: post(both.url, "/v1/completions", body(fresh(16), 64)), range(8)))
    say("decode, batch 8, all requests together", f"{8 * 64 / (time.perf_counter() - start):.1f} tokens/s")
    ratio = statistics.median(beside_a_prompt(both.url) for _ in rounds)
    say("gaps between tokens while a prompt arrives, one server", f"{ratio:.2f} times")
    say("peak memory, role both", f"{peak_mb(both.child.pid):.0f} MB")
    both.stop()

    stack = Stack()
    first_token_and_rest(stack.url, fresh(200), 2)
    decode = stack.servers("decode")[0][1]
    handed_over = [(f"kvx_transfer_seconds_{part}", 'phase="total"') for part in ("sum", "count")]
    before = [metric(decode, *series) for series in handed_over]
    apart = [first_token_and_rest(stack.url, fresh(1000), 1)[0] for _ in rounds]
    seconds, count = (metric(decode, *series) - b for series, b in zip(handed_over, before))
    ttft = statistics.median(apart)
    say("time to first token, 1000 tokens, one server", f"{statistics.median(prefill) * 1000:.0f} ms")
    say("time to first token, 1000 tokens, prefill and decode apart", f"{ttft * 1000:.0f} ms")
    say("KV hand-over, mean (pull, verify, place)", f"{seconds / count * 1000:.0f} ms, {seconds / count / ttft:.1%} of time to first token")
    say("KV hand-over, bytes", f"{metric(decode, 'kvx_transfer_bytes_total') / metric(decode, *handed_over[1]) / 1e6:.1f} MB a prompt, mean over all")
    ratio = statistics.median(beside_a_prompt(stack.url) for _ in rounds)
    say("gaps between tokens while a prompt arrives, apart", f"{ratio:.2f} times")
    for role in ("prefill", "decode"):
        for process, _ in stack.servers(role):
            say(f"peak memory, {role}", f"{peak_mb(process.pid):.0f} MB")
    stack.stop()


if __name__ == "__main__":
    main()
