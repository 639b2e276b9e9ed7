"""Instructions per generated token, which a noisy machine does not change.

    tests/bench/instructions.py [--llama-python PYTHON]

Each program decodes the same file on one thread under valgrind, once with few tokens and once with more; the difference is
divided by the tokens. Valgrind has no AVX-512, so baton runs its AVX2 kernels, and llama.cpp has to be built without:
PYTHON is one whose llama-cpp-python was installed with
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON". Nothing here asserts a figure.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "system"))
from stack import BATON, free_port, eventually, get, post  # noqa: E402

FEW, MANY = 4, 36
PROMPT = [1, 4093, 28, 198]
DEADLINE_S = 600


def valgrind(out: pathlib.Path, command: list) -> list:
    return ["valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}", *map(str, command)]


def counted(out: pathlib.Path) -> int:
    return int(re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.M)[1])


def baton(new: int, out: pathlib.Path) -> int:
    port = free_port()
    command = [BATON, "serve", "smollm2", "--threads", 1, "--port", port]
    server = subprocess.Popen(valgrind(out, command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: answers(url), DEADLINE_S, "the server is ready")
        body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        status, answer = post(url, "/v1/completions", body, timeout=DEADLINE_S)
        assert status == 200 and answer["usage"]["completion_tokens"] == new, answer
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(DEADLINE_S)
    return counted(out)


def answers(url: str) -> bool:
    try:
        get(url, "/health")
        return True
    except OSError:
        return False


def llama(python: str, model: str, new: int, out: pathlib.Path) -> int:
    asked = json.dumps({"prompts": [PROMPT], "new": new}) + "\n"
    command = valgrind(out, [python, HERE / "llama_worker.py", model, 1])
    subprocess.run(command, input=asked, text=True, check=True, timeout=DEADLINE_S,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return counted(out)


def per_token(run) -> float:
    with tempfile.TemporaryDirectory() as folder:
        few, many = (run(new, pathlib.Path(folder) / f"{new}") for new in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--llama-python", metavar="PYTHON")
    python = options.parse_args().llama_python
    ours = per_token(baton)
    print(f"baton      {ours / 1e6:8.1f} million instructions a token", flush=True)
    if python:
        fetched = subprocess.run([BATON, "fetch", "smollm2"], check=True, capture_output=True, text=True)
        model = os.environ.get("BATON_SMOLLM2", fetched.stdout.strip())
        theirs = per_token(lambda new, out: llama(python, model, new, out))
        print(f"llama.cpp  {theirs / 1e6:8.1f} million instructions a token, {theirs / ours:.2f} times baton's")


if __name__ == "__main__":
    main()
