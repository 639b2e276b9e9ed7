"""Writes tests/fixtures/smollm2-greedy.json: what Hugging Face transformers generates, in f32, from the GGUF's weights.

    pip install torch==2.13.0 transformers==5.19.0 gguf accelerate
    python tests/reference/generate_smollm2.py FOLDER_WITH_THE_GGUF

For each prompt: its ids, 64 greedy tokens (end-of-sequence ignored), and at each step the difference between the two
largest logits. A step whose margin is tiny may go the other way on other hardware; no other step may.
"""
import json
import pathlib
import sys

import torch
from prompts import CHAT, EXACT, PLAIN, prose
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

FILE, STEPS = "SmolLM2-135M-Instruct.Q4_1.gguf", 64
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)).eval()
assert model.dtype == torch.float32 and model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def cases():
    for name, text in PLAIN.items():
        yield {"name": name, "prompt": text}, tokenizer(text).input_ids
    for name, messages in CHAT.items():
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        yield {"name": name, "messages": messages}, ids
    for i, (name, n) in enumerate(EXACT.items()):
        yield {"name": name}, tokenizer(prose(n // 12 + 4, 17 + i)).input_ids[:n]


def greedy(ids):
    tokens, margins, first = [], [], None
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True)
        for _ in range(STEPS):
            top = torch.topk(out.logits[0, -1].double(), 5)
            first = first or [[int(i), round(float(v), 4)] for i, v in zip(top.indices, top.values)]
            tokens.append(int(top.indices[0]))
            margins.append(round(float(top.values[0] - top.values[1]), 5))
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return {"tokens": tokens, "margins": margins, "first_top5": first}


result = []
for head, ids in cases():
    assert len(ids) == EXACT.get(head["name"], len(ids))
    result.append({**head, "prompt_ids": ids, **greedy(ids)})
    result[-1]["text"] = tokenizer.decode(result[-1]["tokens"])
    print(head["name"], len(ids), min(result[-1]["margins"]), flush=True)
out = pathlib.Path(__file__).parent.parent / "fixtures" / "smollm2-greedy.json"
out.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in result) + "\n]\n")
print(len(result), "prompts", out.stat().st_size, "bytes")
