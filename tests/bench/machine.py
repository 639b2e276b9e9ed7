"""What this machine can do at most, in a process of its own: reading memory, and multiplying matrices in three types.

Prints one JSON object; rates are the best of several passes, products are those of numpy (f32) and torch (bf16, int8).
The products are library rates, not the limit of the hardware; a library that is missing is left out.
"""
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

THREADS = int(sys.argv[1])
os.environ |= {name: str(THREADS) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}

import numpy as np  # noqa: E402  (reads the variables above)

READ_BYTES = 1 << 30
# Rows, inner length and columns of the products: about those of a small model's prefill.
PRODUCT = (1024, 1536, 1536)


def best(seconds: float, work) -> float:
    """The shortest time of `work` among the repeats that fit into `seconds`, three at least."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def read_gb_s() -> float:
    """A pass over memory that no cache holds, split among the threads."""
    parts = np.array_split(np.ones(READ_BYTES // 8, dtype=np.int64), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        passes = (np.bitwise_or.reduce, lambda part: part.view(np.float32).max())
        return READ_BYTES / min(best(1.0, lambda p=p: list(pool.map(p, parts))) for p in passes) / 1e9


def giga_operations(product) -> float:
    """1e9 multiplications and additions a second."""
    rows, inner, columns = PRODUCT
    return 2 * rows * inner * columns / best(1.0, product) / 1e9


def products() -> dict[str, float]:
    rows, inner, columns = PRODUCT
    a, b = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    found = {"f32 products 1e9/s": giga_operations(lambda: a @ b)}
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        x, y = torch.ones(rows, inner, dtype=torch.bfloat16), torch.ones(inner, columns, dtype=torch.bfloat16)
        found["bf16 products 1e9/s"] = giga_operations(lambda: x @ y)
        i, j = x.to(torch.int8), y.to(torch.int8)
        found["int8 products 1e9/s"] = giga_operations(lambda: torch._int_mm(i, j))
    return found


print(json.dumps({"read GB/s": read_gb_s()} | products()))
