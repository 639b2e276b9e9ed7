"""The far ends of KV events, on libzmq: who subscribes, who asks again, and a server that publishes."""
import collections
import json
import subprocess
import threading
import time

import msgspec
import zmq
from stack import ROOT

FOLLOW = ROOT / "target/release/examples/follow"
DEADLINE_MS = 60_000
END = (-1).to_bytes(8, "big", signed=True)


class Event(msgspec.Struct, array_like=True, tag=True):
    pass


class BlockStored(Event):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(Event):
    block_hashes: list[int | bytes]
    medium: str | None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def read(payload: bytes) -> Batch:
    return msgspec.msgpack.decode(payload, type=Batch)


class Subscriber:
    """Hears what is published at `endpoint`; `bind`: there it listens itself."""

    def __init__(self, endpoint: str, topic: str = "", bind: bool = False):
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.socket.rcvtimeo = DEADLINE_MS
        (self.socket.bind if bind else self.socket.connect)(endpoint)

    def next(self) -> tuple[bytes, int, bytes]:
        topic, seq, payload = self.socket.recv_multipart()
        return topic, int.from_bytes(seq, "big"), payload

    def close(self):
        self.socket.close(0)


def replay(endpoint: str, start: int) -> list[list[bytes]]:
    """All frames of the answer, the empty one before them left out."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.rcvtimeo = DEADLINE_MS
    socket.connect(endpoint)
    socket.send_multipart([b"", start.to_bytes(8, "big")])
    answers = []
    while not answers or answers[-1][-1]:
        empty, *frames = socket.recv_multipart()
        assert empty == b""
        answers.append(frames)
    socket.close(0)
    return answers


def apply(cached: set, batch: Batch):
    """What is cached after a batch, if that was cached before."""
    for event in batch.events:
        match event:
            case BlockStored():
                assert not cached & set(event.block_hashes), "stored twice"
                cached |= set(event.block_hashes)
            case BlockRemoved():
                assert cached >= set(event.block_hashes), "removed, and never there"
                cached -= set(event.block_hashes)
            case AllBlocksCleared():
                cached.clear()


class Server:
    """Publishes as vLLM does: a PUB socket, and a ROUTER for the last `keep` batches. Its ports outlive it."""

    def __init__(self, keep: int = 100, ports: tuple[int, int] = (0, 0), plain: bool = False, mute: bool = False):
        self.context, self.plain, self.mute = zmq.Context(), plain, mute
        self.live, self.router = self.context.socket(zmq.PUB), self.context.socket(zmq.ROUTER)
        for socket, port in zip((self.live, self.router), ports):
            socket.linger = 0
            socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.ports = tuple(int(s.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1]) for s in (self.live, self.router))
        self.kept, self.next, self.asked = collections.deque(maxlen=keep), 0, []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._answer)
        self.thread.start()

    def publish(self, *events, lost: bool = False) -> int:
        """Numbers a batch, and sends it unless it gets lost on the way."""
        payload = msgspec.msgpack.encode([time.time(), list(events)])
        with self.lock:
            seq, self.next = self.next, self.next + 1
            self.kept.append((seq, payload))
        if not lost:
            self.live.send_multipart([b"kv@server@model", seq.to_bytes(8, "big"), payload])
        return seq

    def _answer(self):
        while not self.over.is_set():
            if not self.router.poll(20):
                continue
            peer, _, start = self.router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            if self.mute:
                continue
            with self.lock:
                kept = list(self.kept)
            topic = [] if self.plain else [b"kv@server@model"]
            for seq, payload in kept:
                if seq >= self.asked[-1]:
                    self.router.send_multipart([peer, b"", *topic, seq.to_bytes(8, "big"), payload])
            self.router.send_multipart([peer, b"", *([] if self.plain else [b""]), END, b""])

    def close(self):
        self.over.set()
        self.thread.join()
        self.context.destroy(0)


class Follower:
    """The example program `follow` on the ports of a server; `replay=False`: on the first alone."""

    def __init__(self, ports: tuple[int, int], replay: bool = True):
        addresses = [f"127.0.0.1:{port}" for port in ports[:1 + replay]]
        self.child = subprocess.Popen([FOLLOW, *addresses], stdout=subprocess.PIPE, text=True)

    def next(self) -> dict:
        return json.loads(self.child.stdout.readline())

    def close(self):
        self.child.terminate()
        self.child.wait()
        self.child.stdout.close()


def removed(hash_: int) -> list:
    return ["BlockRemoved", [hash_]]
