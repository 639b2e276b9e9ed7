"""ext_proc as a proxy speaks it, from nothing but sockets, HTTP/2 and the numbers of the fields."""
import socket
import ssl
import struct

import h2.config
import h2.connection
import h2.events
import h2.settings

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number: int, content: bytes | str | int) -> bytes:
    """A field of a message: bytes, text, a message, or a small number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def fields(message: bytes) -> dict[int, list]:
    """Every field of a message by its number, undecoded."""
    found: dict[int, list] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        match key & 7:
            case 0:
                value = number()
            case 1:
                value, at = struct.unpack_from("<d", message, at)[0], at + 8
            case 2:
                size = number()
                value, at = message[at:at + size], at + size
                assert len(value) == size, "a field is longer than its message"
            case 5:
                value, at = message[at:at + 4], at + 4
            case kind:
                raise AssertionError(f"unknown kind of field: {kind}")
        found.setdefault(key >> 3, []).append(value)
    return found


def one(message: bytes, *path: int, default=b""):
    """The last field at the end of a path of numbers."""
    for number in path:
        values = fields(message).get(number)
        if values is None:
            return default
        message = values[-1]
    return message


REQUEST, RESPONSE = 0, 1


def headers(half: int, values: dict[str, str], end: bool = False, raw: bool = True) -> bytes:
    entries = b"".join(field(1, field(1, name) + field(3 if raw else 2, value)) for name, value in values.items())
    return field(2 + half, field(1, entries) + field(3, int(end)))


def body(half: int, data: bytes, end: bool = False) -> bytes:
    return field(4 + half, field(1, data) + field(2, int(end)))


def trailers(half: int) -> bytes:
    return field(6 + half, field(1, field(1, field(1, "x-trailer") + field(3, "yes"))))


def metadata(namespace: str, key: str, value: bytes) -> bytes:
    """`metadata_context` with one `Value`."""
    struct_value = field(1, field(1, key) + field(2, value))
    return field(8, field(1, field(1, namespace) + field(2, struct_value)))


def text_list(texts: list[str]) -> bytes:
    """A `Value` that is a list of texts."""
    return field(6, b"".join(field(1, field(3, text)) for text in texts))


class Answer:
    """A `ProcessingResponse`."""

    NAMES = {1: "request headers", 2: "response headers", 3: "request body", 4: "response body", 5: "request trailers",
             6: "response trailers", 7: "immediate"}

    def __init__(self, message: bytes):
        found = fields(message)
        (self.number,) = set(found) & set(self.NAMES)
        self.name, self.content = self.NAMES[self.number], found[self.number][-1]
        self.dynamic = found.get(8, [b""])[-1]
        mutation = {7: [2], 5: [1], 6: [1]}.get(self.number, [1, 2])
        changes = fields(one(self.content, *mutation))
        self.set, self.remove = {}, [name.decode().lower() for name in changes.get(2, [])]
        for option in changes.get(1, []):
            value = one(option, 1, 3) or one(option, 1, 2)
            self.set[one(option, 1, 1).decode().lower()] = value.decode()
        self.status = one(self.content, 1, 1, default=0) if self.number == 7 else 0
        self.body = one(self.content, 3) if self.number == 7 else one(self.content, 1, 3, 3, 1)
        self.end = bool(one(self.content, 1, 3, 3, 2, default=0)) if self.number in (3, 4) else False
        self.clears_route = bool(one(self.content, 1, 5, default=0)) if self.number in (1, 2) else False

    def metadata_text(self, namespace: str, key: str) -> str | None:
        for entry in fields(self.dynamic).get(1, []):
            if one(entry, 1).decode() == namespace:
                for inner in fields(one(entry, 2, 5)).get(1, []):
                    if one(inner, 1).decode() == key:
                        return one(inner, 2, 3).decode()
        return None


class Ended(Exception):
    """The stream ended; `status` is gRPC's, or nothing if it was reset."""

    def __init__(self, status: str | None, message: str = ""):
        super().__init__(f"stream ended with status {status} {message}")
        self.status = status


class Connection:
    """One connection to a picker, with one stream at a time."""

    def __init__(self, host: str, port: int, tls: bool, timeout_s: float = 10):
        self.socket = socket.create_connection((host, port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            self.socket = context.wrap_socket(self.socket, server_hostname=host)
            assert self.socket.selected_alpn_protocol() == "h2", "ALPN does not give h2"
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(1 << 24)
        self.flush()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def stream(self, path: str = PROCESS) -> "Stream":
        return Stream(self, path)

    def close(self):
        self.socket.close()


class Stream:
    """One gRPC call: messages in both directions."""

    def __init__(self, connection: Connection, path: str):
        self.connection, self.h2, self.id = connection, connection.h2, connection.h2.get_next_available_stream_id()
        self.data, self.ended, self.window = b"", None, 0
        self.h2.send_headers(self.id, [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "picker"),
                                       ("content-type", "application/grpc"), ("te", "trailers")])
        connection.flush()

    def send(self, *messages: bytes):
        for message in messages:
            data = struct.pack(">BI", 0, len(message)) + message
            while data:
                size = min(len(data), self.h2.local_flow_control_window(self.id), self.h2.max_outbound_frame_size)
                if size == 0:
                    self.receive()
                    continue
                self.h2.send_data(self.id, data[:size])
                data = data[size:]
                self.connection.flush()

    def finish(self):
        self.h2.end_stream(self.id)
        self.connection.flush()

    def reset(self):
        self.h2.reset_stream(self.id, 8)
        self.connection.flush()

    def receive(self):
        data = self.connection.socket.recv(1 << 16)
        if not data:
            raise Ended(None, "the connection was closed")
        for event in self.h2.receive_data(data):
            if getattr(event, "stream_id", self.id) != self.id:
                continue
            match event:
                case h2.events.DataReceived():
                    self.data += event.data
                    if event.flow_controlled_length:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, self.id)
                case h2.events.TrailersReceived() | h2.events.ResponseReceived():
                    seen = dict(event.headers)
                    if "grpc-status" in seen:
                        self.ended = Ended(seen["grpc-status"], seen.get("grpc-message", ""))
                case h2.events.StreamReset():
                    self.ended = self.ended or Ended(None, f"reset {event.error_code}")
        self.connection.flush()

    def message(self) -> bytes:
        """The next message; raises Ended after the last."""
        while True:
            if len(self.data) >= 5:
                size = struct.unpack(">I", self.data[1:5])[0]
                if len(self.data) >= 5 + size:
                    message, self.data = self.data[5:5 + size], self.data[5 + size:]
                    return message
            if self.ended:
                raise self.ended
            self.receive()

    def answer(self) -> Answer:
        return Answer(self.message())
