"""Writes crates/model/tests/fixtures/quant_vectors.json: random blocks and what the package gguf makes of them.

    pip install gguf==0.19.0 numpy
    python tests/reference/quant_vectors.py
"""
import json
import pathlib

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

rng = np.random.default_rng(3)
# Where a block's 16-bit scales lie.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
out = {}
for kind in (T.F32, T.F16, T.BF16, *SCALES):
    elements, size = GGML_QUANT_SIZES[kind]
    if kind not in SCALES:
        values = rng.normal(size=16).astype(np.float32)
        if kind == T.F32:
            blocks = values.view(np.uint8)
        elif kind == T.F16:
            blocks = values.astype(np.float16).view(np.uint8)
        else:
            blocks = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        blocks = blocks.reshape(1, -1)
    else:
        blocks = rng.integers(0, 256, size=(2, size), dtype=np.uint8)
        for at in SCALES[kind]:
            blocks[:, at:at + 2] = rng.normal(scale=0.1, size=(2, 1)).astype(np.float16).view(np.uint8)
    values = dequantize(blocks.reshape(1, -1), kind).reshape(-1)
    out[kind.name] = (int(kind), blocks.reshape(-1).tolist(), [float(f"{v:.9g}") for v in values])
path = pathlib.Path(__file__).parents[2] / "crates/model/tests/fixtures/quant_vectors.json"
path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
print(path.stat().st_size, "bytes")
