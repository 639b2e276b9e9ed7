"""Writes tests/fixtures/tiny-*: random Llama-family models and what Hugging Face transformers computes with them.

    pip install torch==2.13.0 transformers==5.19.0 safetensors
    python tests/reference/generate_tiny.py

Each folder holds config.json, model.safetensors (f32) and expected.json: for several prompts the logits after the
last token, the residual stream of the last token after every layer, and 16 greedy tokens with their top-2 margins.
"""
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(__file__).parent.parent / "fixtures"
COMMON = dict(vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, rms_norm_eps=1e-5,
              max_position_embeddings=512, hidden_act="silu", bos_token_id=1, eos_token_id=2)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "tiny-mha-untied": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
                            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "tiny-gqa8-tied": dict(num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=True,
                           rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
    "tiny-llama3-rope": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
                             rope_parameters=LLAMA3),
    "tiny-bias": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True,
                      mlp_bias=True, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
}
# These two are written as configs were before transformers 5.
OLD_FORM = {"tiny-mha-untied", "tiny-llama3-rope"}


def old_form(config: dict) -> dict:
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def expected(model: LlamaForCausalLM, prompt: list[int]) -> dict:
    with torch.no_grad():
        out = model(torch.tensor([prompt]), output_hidden_states=True)
        # The last entry is after the final norm; the ones before it are the residual stream.
        hidden = [h[0, -1].tolist() for h in out.hidden_states[1:-1]]
        tokens, margins, ids = [], [], list(prompt)
        for _ in range(16):
            logits = model(torch.tensor([ids])).logits[0, -1]
            top = torch.topk(logits, 2)
            tokens.append(int(top.indices[0]))
            margins.append(round(float(top.values[0] - top.values[1]), 6))
            ids.append(tokens[-1])
    return {"prompt": prompt, "logits": out.logits[0, -1].tolist(), "hidden": hidden,
            "greedy": tokens, "margins": margins}


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return value


for name, shape in SHAPES.items():
    torch.manual_seed(len(name))
    config = LlamaConfig(**COMMON, **shape)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (0.3 if "bias" in key else 0.35))
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()
               if not (config.tie_word_embeddings and k == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    as_dict = json.loads(config.to_json_string(use_diff=False))
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act",
            "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_parameters", "bos_token_id", "eos_token_id")
    slim = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **{k: as_dict[k] for k in keep if k in as_dict}}
    if name in OLD_FORM:
        slim = old_form(slim)
    (folder / "config.json").write_text(json.dumps(slim, indent=1) + "\n")
    gen = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, 96, (n,), generator=gen).tolist() for n in (1, 5, 16, 17, 40, 100)]
    (folder / "expected.json").write_text(json.dumps([rounded(expected(model, p)) for p in prompts]) + "\n")
    print(name, sum(f.stat().st_size for f in folder.iterdir()))
