"""llama.cpp behind a pipe: one JSON request a line in, one JSON answer a line out.

Started by subjects.py as `llama_worker.py MODEL THREADS`. A request {"prompts": [[id, ...], ...], "new": n} continues all
prompts together, greedily and past any end of sequence; the answer holds, for each prompt, the seconds at which its tokens
came. It drives the library's own loop in this process, so that no HTTP and no tokenizer stand between it and its figures.
"""
import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np

# Most tokens handed over in one call: the library's default.
BATCH = 2048
MANY = 16


class Sequences:
    """A context for up to `most` sequences of up to `length` tokens each."""

    def __init__(self, model, threads: int, most: int, length: int):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = most * length, most, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.context = llama.llama_init_from_model(model, params)
        assert self.context, "llama.cpp made no context"
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def forward(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes (token, position, sequence, wanted) entries; the likeliest next token of each wanted one."""
        found = []
        for at in range(0, len(entries), BATCH):
            part, batch = entries[at:at + BATCH], self.batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            assert llama.llama_decode(self.context, batch) == 0, "llama_decode failed"
            found += [self.likeliest(i) for i, entry in enumerate(part) if entry[3]]
        return found

    def likeliest(self, entry: int) -> int:
        logits = ctypes.cast(llama.llama_get_logits_ith(self.context, entry), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def streams(self, prompts: list[list[int]], new: int) -> list[list[float]]:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        start, stamps = time.perf_counter(), []
        tokens = self.forward([(token, position, sequence, position == len(prompt) - 1)
                               for sequence, prompt in enumerate(prompts) for position, token in enumerate(prompt)])
        stamps.append(time.perf_counter() - start)
        for step in range(new - 1):
            tokens = self.forward([(token, len(prompt) + step, sequence, True)
                                   for sequence, (token, prompt) in enumerate(zip(tokens, prompts))])
            stamps.append(time.perf_counter() - start)
        return [stamps] * len(prompts)


def main():
    path, threads = sys.argv[1], int(sys.argv[2])
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    alone, together = Sequences(model, threads, 1, 4608), Sequences(model, threads, MANY, 256)
    print(json.dumps({"ready": llama.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sequences = alone if len(asked["prompts"]) == 1 else together
        print(json.dumps(sequences.streams(**asked)), flush=True)


main()
