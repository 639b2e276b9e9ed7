"""Other forms of the GGUF file, each made once, so that all subjects compute the same model.

    python peer_model.py bf16 FILE.gguf FOLDER     for vLLM and baton beside it; needs transformers
    python peer_model.py q4_0 FILE.gguf FILE       the format that llama.cpp has its fastest products for; needs llama_cpp

Q4_0 from Q4_1 loses accuracy a second time. It is made to time it, not to talk to it.
"""
import pathlib
import sys


def bf16(file: pathlib.Path, folder: pathlib.Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)


def q4_0(file: pathlib.Path, out: pathlib.Path):
    import llama_cpp
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    assert llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), params) == 0


def main():
    form, file, out = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    # Made beside its place and moved there whole: what exists is complete.
    half = out.with_name(out.name + ".half")
    {"bf16": bf16, "q4_0": q4_0}[form](file, half)
    half.rename(out)


main()
