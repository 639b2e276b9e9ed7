#!/usr/bin/env python3
"""Writes the seeds that are binary or long: python3 fuzz/seeds/make.py. The others beside it are written by hand."""

import json
import struct
from pathlib import Path

HERE = Path(__file__).parent


def put(target: str, name: str, content: bytes | str) -> None:
    folder = HERE / target
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def frame(kind: int, body: bytes) -> bytes:
    return struct.pack("<IBBH", len(body), kind, 0, 1) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def gguf(keys: list[bytes], tensors: list[tuple[str, list[int], int, bytes]], data: bool = True) -> bytes:
    table, body = b"", b""
    for name, dims, kind, content in tensors:
        body += bytes(-len(body) % 32)
        table += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
        body += content
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + table
    return head + bytes(-len(head) % 32) + body if data else head


def model(query: tuple[int, int]) -> tuple[list[bytes], list[tuple[str, list[int], int, bytes]]]:
    number = lambda name, n: key("llama." + name, 4, struct.pack("<I", n))
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "i"]
    keys = [
        key("general.architecture", 8, text("llama")),
        number("block_count", 1),
        number("embedding_length", 4),
        number("feed_forward_length", 2),
        number("attention.head_count", 1),
        number("attention.head_count_kv", 1),
        number("context_length", 8),
        key("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        key("tokenizer.ggml.model", 8, text("llama")),
        key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))),
        key("tokenizer.ggml.scores", 9, struct.pack("<IQ6f", 6, 6, *range(6))),
        key("tokenizer.ggml.token_type", 9, struct.pack("<IQ6i", 5, 6, 2, 3, 3, 1, 1, 1)),
        key("tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 1)),
    ]
    f32 = lambda name, *dims: (name, list(dims), 0, bytes(4 * dims[0] * (dims[1] if len(dims) > 1 else 1)))
    tensors = [
        f32("token_embd.weight", 4, 6),
        f32("output_norm.weight", 4),
        f32("blk.0.attn_norm.weight", 4),
        f32("blk.0.attn_q.weight", *query),
        f32("blk.0.attn_k.weight", 4, 4),
        f32("blk.0.attn_v.weight", 4, 4),
        f32("blk.0.attn_output.weight", 4, 4),
        f32("blk.0.ffn_norm.weight", 4),
        f32("blk.0.ffn_gate.weight", 4, 2),
        f32("blk.0.ffn_up.weight", 4, 2),
        f32("blk.0.ffn_down.weight", 2, 4),
    ]
    return keys, tensors


def wire() -> None:
    put("kvx_wire", "preface", b"KVX1" + struct.pack("<BBH", 1, 0, 2))
    seal = struct.pack("<I", 0)
    put("kvx_wire", "chunk_header", struct.pack("<HBBIIIQI", 0x784B, 1, 0, 1, 2, 64, 128, 7) + seal)
    selection = struct.pack("<7I", 0, 2, 0, 2, 1, 2, 1)
    opened = struct.pack("<IQ32s", 1, 2, bytes(32)) + selection + struct.pack("<QI", 1 << 20, 0)
    bodies = {
        1: struct.pack("<QQ16sIHH", 1, 2, bytes(16), 1 << 20, 4, 0),
        2: bytes(32),
        4: bytes(40),
        5: bytes(40),
        6: bytes(34),
        7: opened,
        8: struct.pack("<IIIQ", 1, 64, 12, 768),
        9: struct.pack("<IH", 1, 1),
        10: struct.pack("<IQ", 1, 4096),
        13: struct.pack("<II", 1, 2),
        16: struct.pack("<IQQ", 2, 7, 8),
        17: struct.pack("<IQ32sQ32s", 2, 7, bytes(32), 8, bytes(32)),
        18: struct.pack("<IQI", 1, 7, 500),
        19: struct.pack("<Q32s", 7, bytes(32)),
        20: bytes(8),
        22: bytes(2),
        25: struct.pack("<IIQQIII", 1, 1, 1, 32768, 0, 0, 2) + struct.pack("<I", 0x6c7c5f7d),
    }
    for kind, body in bodies.items():
        put("kvx_wire", f"frame_{kind:02}", frame(kind, body))
    put("kvx_open", "all", bytes([0b01_01_10_11, 4, 16, 2]) + opened)
    put("kvx_open", "resumed", bytes([0b10_10_01_10, 9, 1, 7]) + opened[:-4] + struct.pack("<I", 3) + b"\x01\x80\xff")


def files() -> None:
    keys, tensors = model(query=(4, 4))
    put("model_gguf", "llama", gguf(keys, tensors, data=False))
    put("model_gguf", "kinds", gguf([key(f"k{k}", k, bytes(8)) for k in (10, 11, 12)], [("q", [256, 1], 12, b"")], data=False))
    put("checkpoint", "llama", gguf(keys, tensors))
    put("checkpoint", "half_a_head", gguf(*model(query=(8, 2))))
    put("model_gguf", "empty", gguf([], [("q", [32, 0, 1 << 40, 1 << 40], 0, b"")], data=False))
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}})
    put("model_safetensors", "one", struct.pack("<Q", len(header)) + header.encode() + bytes(12))
    sizes = {0: 4, 1: 2, 2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 12: 144, 13: 176, 14: 210, 30: 2}
    for kind, size in sizes.items():
        put("model_quant", f"kind_{kind:02}", bytes([kind, 1]) + bytes(i * 37 % 256 for i in range(size)))


def tokenizer(extra: dict) -> str:
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, **extra}, ensure_ascii=False, separators=(",", ":"))


def tokenizers() -> None:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    char_of = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    added = lambda i, content, special: {"id": i, "content": content, "special": special, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {char_of[b]: b for b in range(256)} | {"he": 256, "hel": 257}
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    put("text_tokenizer", "byte_level.json", tokenizer({
        "added_tokens": [added(258, "<|end|>", True), added(259, "<tool>", False)],
        "normalizer": None, "pre_tokenizer": bytes_of, "post_processor": None, "decoder": bytes_of,
        "model": {**bpe, "vocab": vocab, "merges": [["h", "e"], ["he", "l"]]}}))
    put("text_tokenizer", "small.json", tokenizer({
        "added_tokens": [added(0, "<s>", True)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": False}, bytes_of]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": bytes_of,
        "model": {**bpe, "vocab": {"<s>": 0, "h": 1, "e": 2, "he": 3, "l": 4, "o": 5, "Ġ": 6}, "merges": ["h e"]}}))
    put("text_tokenizer", "sentencepiece.json", tokenizer({
        "added_tokens": [added(0, "<unk>", True), added(1, "<s>", True)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {**bpe, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "h": 4, "e": 5, "he": 6, "▁he": 7}, "merges": [["h", "e"], ["▁", "he"]]}}))
    put("text_gguf_vocab", "llama", "llama\n\nu<unk>\nc<s>\nb<0x0A>\nn▁\nnh\nne\nnhe\nn▁he\nd<tool>\n")
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"):
        put("text_gguf_vocab", pre, f"gpt2\n{pre}\nu<unk>\nc<s>\nnĠ\nnh\nne\nnhe\nn1\n h e\n")


def field(number: int, content: bytes | str | int) -> bytes:
    """A field of a protobuf message."""
    if isinstance(content, int):
        return bytes([number << 3, content])
    content = content.encode() if isinstance(content, str) else content
    assert len(content) < 1 << 14
    size = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
    return bytes([number << 3 | 2]) + size + content


def envoy(*messages: bytes, cuts: bytes = b"\x07\x01\x64") -> bytes:
    """What Envoy sends on a stream, in gRPC's frames."""
    return cuts + b"\n" + b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)


def envoy_headers(number: int, headers: dict[str, str], end: int = 0, *more: bytes) -> bytes:
    values = b"".join(field(1, field(1, name) + field(3, value)) for name, value in headers.items())
    return field(number, field(1, values) + field(3, end)) + b"".join(more)


def envoy_body(number: int, body: str, end: int) -> bytes:
    return field(number, field(1, body) + field(2, end))


def envoy_streams() -> None:
    post, ok = envoy_headers(2, {":path": "/v1/completions", "x-prefiller-host-port": "a:1"}), envoy_headers(3, {":status": "200"})
    body = [envoy_body(4, '{"prompt":"hello"', 0), envoy_body(4, "}", 0), field(4, field(2, 1))]
    hint = field(8, field(1, field(1, "envoy.lb.subset_hint") + field(2, field(1, field(
        1, "x-gateway-destination-endpoint-subset") + field(2, field(6, field(1, field(3, "10.0.0.1:8000"))))))))
    protocol = field(11, field(1, 4) + field(2, 4))
    served = field(8, field(1, field(1, "envoy.lb") + field(2, field(1, field(
        1, "x-gateway-destination-endpoint-served") + field(2, field(3, "10.0.0.1:8000"))))))
    put("ext_proc_stream", "post", envoy(post + hint + protocol, *body, ok + served, envoy_body(5, "data: 1", 0), field(5, field(2, 1))))
    put("ext_proc_stream", "get", envoy(envoy_headers(2, {":path": "/v1/models"}, 1), ok, envoy_body(5, "{}", 1)))
    put("ext_proc_stream", "trailers", envoy(
        envoy_headers(2, {}), *body[:2], field(6, b""), envoy_headers(3, {"a": "b", "c": "d"}), envoy_body(5, "x", 0), field(7, b"")))
    put("ext_proc_stream", "local_reply", envoy(post, body[0], envoy_headers(3, {":status": "408"}, 1)))
    put("ext_proc_stream", "too_large", envoy(post, *[envoy_body(4, "x" * 4000, 0)] * 3))
    put("ext_proc_stream", "out_of_place", envoy(envoy_body(5, "x", 0), post))


def packed(value) -> bytes:
    """MessagePack, as far as the seeds need it."""
    match value:
        case None:
            return b"\xc0"
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case int() if 0 <= value < 128:
            return bytes([value])
        case int():
            return b"\xcf" + struct.pack(">Q", value)
        case bytes():
            return b"\xc4" + bytes([len(value)]) + value
        case str():
            return bytes([0xA0 | len(value)]) + value.encode() if len(value) < 32 else b"\xd9" + bytes([len(value)]) + value.encode()
        case list():
            return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
        case dict():
            return bytes([0x80 | len(value)]) + b"".join(packed(k) + packed(v) for k, v in value.items())


def events() -> None:
    stored = {"type": "BlockStored", "block_hashes": [1 << 63, bytes(32)], "parent_block_hash": 9, "token_ids": [1, 2, 3, 700],
              "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": "tuned",
              "extra_keys": [["tuned", ["image", 4]], None], "group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    removed = {"type": "BlockRemoved", "block_hashes": [5], "medium": "CPU", "group_idx": 0}
    cleared = {"type": "AllBlocksCleared"}
    every = [stored, removed, cleared]
    put("kv_events", "maps", packed({"ts": 1.5, "events": every, "data_parallel_rank": 0}))
    put("kv_events", "maps_in_an_array", packed([1.5, every, 0]))
    put("kv_events", "arrays", packed([1.5, [list(event.values()) for event in every]]))
    window = stored | {"kv_cache_spec_kind": "sliding_window"}
    put("kv_events", "window", packed([1.5, [window, removed | {"group_idx": 1}]]))
    greeting = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01NULL" + bytes(48)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
    put("zmtp_frames", "greeting", b"\x07" + greeting)
    put("zmtp_frames", "commands", b"\x03" + ready + b"\x04\x09\x04PING\x00\x0ahi" + b"\x04\x0c\x09SUBSCRIBEkv" + b"\x00\x03\x01kv")
    put("zmtp_frames", "message", b"\x05\x01\x02kv\x01\x08" + bytes(8) + b"\x02" + struct.pack(">Q", 300) + bytes(300))


def peers() -> None:
    def frame(kind: int, body: bytes) -> bytes:
        return struct.pack("<IB", len(body) + 1, kind) + body

    def load(number: int, requests: int) -> bytes:
        return frame(4, struct.pack("<HIQId", number, requests, 700, 1, 1e300))

    names = frame(3, struct.pack("<H", 0) + b"a") + frame(3, struct.pack("<H", 3) + b"b")
    note = frame(5, struct.pack("<HB", 0, 0) + struct.pack("<3Q", 1, 2, 3))
    done = frame(5, struct.pack("<HB", 3, 1) + struct.pack("<2Q", 1, 2))
    put("peers", "talk", names + load(0, 2) + note + done + frame(6, b"") + load(0, 1) + frame(3, struct.pack("<H", 0)))
    put("peers", "unknown_numbers", load(4000, 1 << 31) + note + names + load(3, 4))
    put("peers", "greets_again", names + frame(1, b"batonpr1" + bytes(28)))


def callers() -> None:
    """Two requests for one authority, which the second takes from the table; and a hello with such a name."""
    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body

    name = b"outbound|9002||picker.llm.svc"
    literal = bytes([0x83, 0x86, 0x84, 0x41, len(name)]) + name
    packed = bytes([0x83, 0x86, 0x84, 0x41, 0x82, 0xff, 0x9f])
    for kind, first in [("plain", literal), ("packed", packed)]:
        said = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
        said += frame(1, 12, 1, b"\x02" + first + bytes(2)) + frame(0, 1, 1, b"body")
        said += frame(1, 37, 3, bytes(5) + b"\x83\x86\x84\xbe")
        put("http_callers", kind, b"\x07" + said)
    list_of_names = struct.pack(">HBH", len(name) + 3, 0, len(name)) + name
    extensions = bytes([0, 35, 0, 0]) + struct.pack(">HH", 0, len(list_of_names)) + list_of_names
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0" + struct.pack(">H", len(extensions)) + extensions
    put("http_callers", "hello", b"\x07\x01" + struct.pack(">I", len(body))[1:] + body)


wire()
files()
events()
tokenizers()
envoy_streams()
peers()
callers()
