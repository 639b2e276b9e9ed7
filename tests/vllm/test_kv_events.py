"""KV events between baton and vLLM's own classes: its publisher heard by us, our server read by its decoder."""
import json
import pathlib
import sys

import msgspec
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/system"))
from kv_events import Follower, replay  # noqa: E402
from stack import Process, free_port, post  # noqa: E402

theirs = pytest.importorskip("vllm.distributed.kv_events")
BLOCK = 16


def stored(hashes: list[int], parent: int | None, tokens: list[int]):
    return theirs.BlockStored(block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=BLOCK, lora_id=None,
                              medium=theirs.MEDIUM_GPU, lora_name=None, extra_keys=[None] * len(hashes), group_idx=0,
                              kv_cache_spec_kind="full_attention")


def test_vllms_publisher_is_followed():
    ports = free_port(), free_port()
    publisher = theirs.ZmqEventPublisher(0, endpoint=f"tcp://*:{ports[0]}", replay_endpoint=f"tcp://*:{ports[1]}",
                                         topic="kv@127.0.0.1:8000@model")
    follower = Follower(ports)
    try:
        first = list(range(BLOCK))
        publisher.publish(theirs.KVEventBatch(ts=1.5, events=[stored([1 << 63], None, first)]))
        publisher.publish(theirs.KVEventBatch(ts=2.5, events=[
            stored([7, 8], 1 << 63, first + first),
            theirs.BlockRemoved(block_hashes=[7], medium=theirs.MEDIUM_GPU, group_idx=0),
            theirs.AllBlocksCleared()]))
        said = [follower.next(), follower.next()]
        assert [(news["ts"], news["rank"], news["dropped"]) for news in said] == [(1.5, 0, 0), (2.5, 0, 0)]
        on_device = {"block_size": BLOCK, "medium": "Device", "adapter": None}
        assert said[0]["events"] == [{"stored": [1 << 63], "parent": None, "tokens": first} | on_device]
        assert said[1]["events"] == [{"stored": [7, 8], "parent": 1 << 63, "tokens": first + first} | on_device,
                                     {"removed": [7], "medium": "Device"}, {"cleared": True}]
    finally:
        follower.close()
        publisher.shutdown()


@pytest.mark.parametrize("int_hashes", ["0", "1"])
def test_vllm_reads_what_we_publish(int_hashes):
    live, again = free_port(), free_port()
    config = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{live}", "replay_endpoint": f"tcp://*:{again}",
              "event_format": "map"}
    server = Process("serve", "smollm2", "--device", "sim", "--port", str(free_port()), "--kv-events-config", json.dumps(config),
                     "--max-model-len", "64", "--kv-cache-memory-bytes", "3MiB", env={"VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": int_hashes})
    try:
        # More than the 1536 blocks there is room for.
        for family in range(600):
            ids = [1000 + family * 60 + i for i in range(3 * BLOCK + 1)]
            assert post(server.url, "/v1/completions", {"model": "smollm2", "prompt": ids, "max_tokens": 1})[0] == 200
        *answers, _ = replay(f"tcp://127.0.0.1:{again}", 0)
        decoder = msgspec.msgpack.Decoder(type=theirs.KVEventBatch)
        batches = [decoder.decode(frames[2]) for frames in answers]
    finally:
        server.stop()
    events = [event for batch in batches for event in batch.events]
    assert {type(event) for event in events} == {theirs.BlockStored, theirs.BlockRemoved}
    kind = int if int_hashes == "1" else bytes
    assert all(isinstance(hash_, kind) for event in events for hash_ in event.block_hashes)
    assert all(batch.data_parallel_rank == 0 for batch in batches)
    assert events[0].token_ids == [1000 + i for i in range(3 * BLOCK)] and events[0].medium == theirs.MEDIUM_GPU


def test_block_hashes_are_vllms():
    """What we publish for tokens is what vLLM computes for them."""
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from vllm.utils.hashing import sha256_cbor
    live, again = free_port(), free_port()
    config = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{live}", "replay_endpoint": f"tcp://*:{again}"}
    server = Process("serve", "smollm2", "--device", "sim", "--port", str(free_port()), "--kv-events-config", json.dumps(config))
    ids = [1000 + 37 * i for i in range(3 * BLOCK + 1)]
    try:
        assert post(server.url, "/v1/completions", {"model": "smollm2", "prompt": ids, "max_tokens": 1})[0] == 200
        (_, _, payload), _ = replay(f"tcp://127.0.0.1:{again}", 0)
    finally:
        server.stop()
    (event,) = msgspec.msgpack.decode(payload)[1]
    parent, expected = sha256_cbor("0"), []
    for at in range(0, 3 * BLOCK, BLOCK):
        parent = sha256_cbor((parent, tuple(ids[at:at + BLOCK]), None))
        expected.append(utils.maybe_convert_block_hash(parent))
    assert event[1] == expected
