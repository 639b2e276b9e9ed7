"""Clients of Envoy that do what ordinary libraries do not: pieces on purpose, trailers, leaving in the middle."""
import json
import socket
import time

import h2.config
import h2.connection
import h2.events


class Answer:
    def __init__(self, status: int, headers: dict, body: bytes, trailers: dict | None = None):
        self.status, self.headers, self.body, self.trailers = status, headers, body, trailers or {}

    def json(self):
        return json.loads(self.body)


def head(method: str, path: str, headers: dict) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: model", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Http1:
    """One connection with one request at a time."""

    def __init__(self, port: int, timeout: float = 30):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def send(self, method: str, path: str, headers: dict, *pieces: bytes, pause_s: float = 0):
        """A request whose body goes out piece by piece; without any, it has none."""
        if pieces:
            headers = headers | {"content-length": str(sum(map(len, pieces)))}
        self.socket.sendall(head(method, path, headers))
        for piece in pieces:
            time.sleep(pause_s)
            self.socket.sendall(piece)

    def read_head(self) -> tuple[int, dict]:
        status = int(self.file.readline().split()[1])
        headers = {}
        while line := self.file.readline().strip().decode():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, headers

    def chunks(self, headers: dict):
        """The pieces of the body as the server cut them; trailers go to self.trailers."""
        self.trailers = {}
        if "content-length" in headers:
            yield self.file.read(int(headers["content-length"]))
            return
        while size := int(self.file.readline(), 16):
            yield self.file.read(size)
            self.file.readline()
        while line := self.file.readline().strip().decode():
            name, _, value = line.partition(": ")
            self.trailers[name.lower()] = value

    def read(self) -> Answer:
        status, headers = self.read_head()
        body = b"".join(self.chunks(headers))
        return Answer(status, headers, body, self.trailers)

    def close(self):
        # The file shares the socket and keeps it open.
        self.file.close()
        self.socket.close()


def ask(port: int, method: str = "POST", path: str = "/seen", headers: dict | None = None, *pieces: bytes,
        pause_s: float = 0) -> Answer:
    connection = Http1(port)
    try:
        connection.send(method, path, headers or {}, *pieces, pause_s=pause_s)
        return connection.read()
    finally:
        connection.close()


def ask_http2(port: int, path: str, headers: dict, pieces: list[bytes], trailers: dict | None = None) -> Answer:
    """HTTP/2 with prior knowledge, for small bodies."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    with socket.create_connection(("127.0.0.1", port), 30) as wire:
        connection.initiate_connection()
        fields = {":method": "POST", ":path": path, ":scheme": "http", ":authority": "model", **headers}
        connection.send_headers(1, list(fields.items()))
        for piece in pieces:
            connection.send_data(1, piece)
        if trailers:
            connection.send_headers(1, list(trailers.items()), end_stream=True)
        else:
            connection.end_stream(1)
        seen: dict = {"headers": {}, "trailers": {}, "body": b""}
        while True:
            wire.sendall(connection.data_to_send())
            data = wire.recv(65536)
            assert data, "Envoy closed the connection"
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    seen["headers"] = dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    seen["body"] += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, h2.events.TrailersReceived):
                    seen["trailers"] = dict(event.headers)
                elif isinstance(event, h2.events.StreamEnded):
                    return Answer(int(seen["headers"][":status"]), seen["headers"], seen["body"], seen["trailers"])
                elif isinstance(event, h2.events.StreamReset):
                    raise ConnectionError(f"reset: {event.error_code}")


def checksum(data: bytes) -> str:
    """As the example server sums a body up."""
    total = 0
    for byte in data:
        total = (total * 31 + byte) % (1 << 64)
    return str(total)
