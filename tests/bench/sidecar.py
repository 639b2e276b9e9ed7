"""What `baton sidecar` costs: latency and CPU of a request with a 1 KB body, straight to a server and through the sidecar.

The servers are a few lines of Python in a process of their own, which answer at once. Prints medians over ROUNDS rounds
that alternate between the ways, so that a machine that speeds up or slows down does so for all of them.

    python3 tests/bench/sidecar.py [BATON]
"""
import json
import multiprocessing
import pathlib
import socket
import statistics
import subprocess
import sys
import time

BATON = sys.argv[1] if len(sys.argv) > 1 else str(pathlib.Path(__file__).parents[2] / "target/release/baton")
ROUNDS, REQUESTS, WARM_UP = 10, 500, 200
ANSWER = json.dumps({"id": "x", "choices": [{"text": "y" * 800}], "usage": {"prompt_tokens": 200, "total_tokens": 201},
                     "kv_transfer_params": {"remote_block_ids": [1, 2], "remote_host": "127.0.0.1",
                                            "remote_port": "9100", "uuid": 7}}).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER


def read_message(connection: socket.socket) -> bytes:
    """One message with a content-length or in chunks, from its first byte to its last."""
    data = b""
    while True:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
        head, found, body = data.partition(b"\r\n\r\n")
        if not found:
            continue
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            if body.endswith(b"0\r\n\r\n"):
                return data
        elif len(body) >= int(lower.split(b"content-length: ")[1].split(b"\r\n")[0]):
            return data


def answer_for_ever(listener: socket.socket):
    """Serves one connection after the other in threads: each has a request at a time."""
    import threading

    def serve(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while read_message(connection):
            connection.sendall(RESPONSE)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def start_server() -> tuple[multiprocessing.Process, int]:
    listener = socket.create_server(("127.0.0.1", 0))
    process = multiprocessing.Process(target=answer_for_ever, args=(listener,), daemon=True)
    process.start()
    return process, listener.getsockname()[1]


def cpu_s(pid: int) -> float:
    """Time on a core, user and kernel, of all threads; by the scheduler's own clock, which is finer than ticks."""
    threads = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def request(headers: str) -> bytes:
    body = json.dumps({"model": "m", "prompt": "z" * 960, "max_tokens": 16}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: r\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Way:
    """One way to the server: a connection, and what is sent over it."""

    def __init__(self, name: str, port: int, headers: str = ""):
        self.name, self.message, self.times = name, request(headers), []
        self.connection = socket.create_connection(("127.0.0.1", port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self, n: int) -> list[float]:
        times = []
        for _ in range(n):
            start = time.perf_counter()
            self.connection.sendall(self.message)
            assert read_message(self.connection).startswith(b"HTTP/1.1 200")
            times.append(time.perf_counter() - start)
        return times


def main():
    decode_process, decode = start_server()
    prefill_process, prefill = start_server()
    sidecar = subprocess.Popen([BATON, "sidecar", "--host=127.0.0.1", "--port=0", "--secure-proxy=false",
                                f"--model-server-port={decode}"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(sidecar.stdout.readline().rsplit(":", 1)[1])
        named = f"x-prefiller-host-port: 127.0.0.1:{prefill}\r\n"
        ways = [Way("straight to the server", decode), Way("through the sidecar", port),
                Way("through the sidecar, prefill first", port, named)]
        spent = {way.name: 0.0 for way in ways}
        for way in ways:
            way.run(WARM_UP)
        for _ in range(ROUNDS):
            for way in ways:
                before = cpu_s(sidecar.pid)
                way.times += way.run(REQUESTS)
                spent[way.name] += cpu_s(sidecar.pid) - before
        base = statistics.median(ways[0].times)
        print(f"{'way':36} {'median':>9} {'p99':>9} {'added':>9}   sidecar's CPU")
        for way in ways:
            median = statistics.median(way.times)
            p99 = statistics.quantiles(way.times, n=100)[98]
            core = spent[way.name] / len(way.times) * 1e6
            print(f"{way.name:36} {median * 1e6:6.0f} us {p99 * 1e6:6.0f} us {(median - base) * 1e6:6.0f} us   "
                  f"{core:5.0f} us a request")
    finally:
        sidecar.terminate()
        sidecar.wait(10)
        decode_process.terminate()
        prefill_process.terminate()


if __name__ == "__main__":
    main()
