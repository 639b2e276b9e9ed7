"""KV events of a real server, heard by libzmq, and those of servers on libzmq, heard by us."""
import json
import random
import subprocess
import threading

import msgspec
import pytest
from kv_events import END, BlockRemoved, Follower, Server, Subscriber, apply, read, removed, replay
from stack import BATON, Process, eventually, free_port, metric, post

BLOCK = 16
TOPIC = "kv@127.0.0.1:8000@smollm2"
# Room for 1536 blocks, which a few hundred prompts fill.
SMALL = "--max-model-len", "64", "--kv-cache-memory-bytes", "3MiB"


def serve(config: dict, *args: str, **env: str) -> Process:
    config = {"enable_kv_cache_events": True, "topic": TOPIC} | config
    return Process("serve", "smollm2", "--device", "sim", "--port", str(free_port()), "--block-size", str(BLOCK),
                   "--kv-events-config", json.dumps(config), *args, env=env)


def endpoints(**more) -> tuple[dict, str, str]:
    live, again = free_port(), free_port()
    config = {"endpoint": f"tcp://*:{live}", "replay_endpoint": f"tcp://*:{again}"} | more
    return config, f"tcp://127.0.0.1:{live}", f"tcp://127.0.0.1:{again}"


def prompt(n: int) -> list[int]:
    return [random.randrange(1000, 40000) for _ in range(n)]


def complete(server: Process, ids: list[int], n: int = 1):
    status, answer = post(server.url, "/v1/completions", {"model": "smollm2", "prompt": ids, "max_tokens": n, "ignore_eos": True})
    assert status == 200, answer


@pytest.fixture
def closing():
    """Things to close after the test, the last first."""
    things = []
    yield lambda thing: things.append(thing) or thing
    for thing in reversed(things):
        (getattr(thing, "close", None) or thing.stop)()


def test_a_prompts_blocks_are_told_with_their_tokens_and_parents(closing):
    config, live, _ = endpoints()
    server = closing(serve(config))
    subscriber = closing(Subscriber(live, "kv@"))
    eventually(lambda: metric(server.url, "kvx_event_subscribers") == 1, 10, "subscribed")
    ids = prompt(5 * BLOCK + 3)
    complete(server, ids)
    topic, seq, payload = subscriber.next()
    batch = read(payload)
    assert (topic.decode(), seq, batch.data_parallel_rank) == (TOPIC, 0, 0)
    (stored,) = batch.events
    assert stored.token_ids == ids[:5 * BLOCK] and len(stored.block_hashes) == 5
    assert (stored.parent_block_hash, stored.block_size, stored.medium) == (None, BLOCK, "GPU")
    assert (stored.lora_id, stored.lora_name) == (None, None)

    # Three blocks are known; what parts from them is told alone.
    other = ids[:3 * BLOCK] + prompt(2 * BLOCK)
    complete(server, other)
    _, seq, payload = subscriber.next()
    (then,) = read(payload).events
    assert seq == 1 and then.parent_block_hash == stored.block_hashes[2]
    assert then.token_ids == other[3 * BLOCK:]


def test_whoever_listens_and_whoever_asks_later_know_the_same(closing):
    config, live, again = endpoints()
    server = closing(serve(config, *SMALL))
    subscriber = closing(Subscriber(live))
    eventually(lambda: metric(server.url, "kvx_event_subscribers") == 1, 10, "subscribed")
    prompts = [prompt(3 * BLOCK) for _ in range(600)]
    for i, ids in enumerate(prompts):
        complete(server, ids, random.randrange(1, 12))
        known = random.choice(prompts[:i + 1])
        complete(server, known[:random.randrange(1, 3 * BLOCK)] + prompt(random.randrange(12)))
    heard, cached = [], set()
    while len(heard) < metric(server.url, "kvx_event_batches_total"):
        _, seq, payload = subscriber.next()
        assert seq == len(heard), "a hole"
        heard.append(payload)
        apply(cached, read(payload))
    events = [event for payload in heard for event in read(payload).events]
    assert any(isinstance(event, BlockRemoved) for event in events), "blocks were given away"
    assert len(events) == metric(server.url, "kvx_events_total")

    *answers, end = replay(again, 0)
    assert end == [b"", END, b""]
    assert [frames[0].decode() for frames in answers] == [TOPIC] * len(heard)
    assert [int.from_bytes(frames[1], "big") for frames in answers] == list(range(len(heard)))
    assert [frames[2] for frames in answers] == heard
    *answers, _ = replay(again, len(heard) - 2)
    assert [frames[2] for frames in answers] == heard[-2:]
    assert replay(again, len(heard)) == [[b"", END, b""]]


def test_our_own_follower_knows_it_too(closing):
    config, live, again = endpoints()
    server = closing(serve(config, *SMALL))
    for _ in range(540):
        complete(server, prompt(3 * BLOCK))
    follower = closing(Follower(tuple(int(e.rsplit(":", 1)[1]) for e in (live, again))))
    *answers, _ = replay(again, 0)
    expected, cached = set(), set()
    for frames in answers:
        apply(expected, read(frames[2]))
        for event in follower.next()["events"]:
            cached |= set(event.get("stored", []))
            cached -= set(event.get("removed", []))
    assert cached == expected


def test_only_the_last_batches_are_kept_and_may_come_plain(closing):
    config, live, again = endpoints(buffer_steps=3, replay_format="plain")
    server = closing(serve(config))
    for _ in range(7):
        complete(server, prompt(2 * BLOCK))
    *answers, end = replay(again, 0)
    assert end == [END, b""]
    assert [int.from_bytes(frames[0], "big") for frames in answers] == [4, 5, 6]
    # What is not kept for replays is no less published.
    subscriber = closing(Subscriber(live))
    eventually(lambda: metric(server.url, "kvx_event_subscribers") == 1, 10, "subscribed")
    complete(server, prompt(2 * BLOCK))
    assert subscriber.next()[1] == 7


def test_events_may_be_maps_and_hashes_bytes(closing):
    config, _, again = endpoints(event_format="map")
    server = closing(serve(config, VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES="0"))
    ids = prompt(2 * BLOCK)
    complete(server, ids)
    (_, _, payload), _ = replay(again, 0)
    ts, (event,), rank = msgspec.msgpack.decode(payload)
    hashes = event.pop("block_hashes")
    assert ts > 1.7e9 and rank == 0 and [len(hash_) for hash_ in hashes] == [32, 32]
    assert event == {"type": "BlockStored", "parent_block_hash": None, "token_ids": ids, "block_size": BLOCK, "lora_id": None,
                     "medium": "GPU", "lora_name": None}


def test_a_server_may_connect_to_who_listens(closing):
    port = free_port()
    subscriber = closing(Subscriber(f"tcp://127.0.0.1:{port}", "kv@", bind=True))
    server = closing(serve({"endpoint": f"tcp://127.0.0.1:{port}"}))
    # libzmq says what it wants when it is asked for something.
    eventually(lambda: subscriber.socket.poll(0) or metric(server.url, "kvx_event_subscribers") == 1, 20, "subscribed")
    complete(server, prompt(BLOCK + 1))
    topic, seq, _ = subscriber.next()
    assert (topic.decode(), seq) == (TOPIC, 0)


@pytest.mark.parametrize("config, key", [
    ('{"enable_kv_cache_events": true, "endpoints": "tcp://*:1"}', "endpoints"),
    ('{"enable_kv_cache_events": true, "endpoint": "udp://*:1"}', "endpoint"),
    ('{"enable_kv_cache_events": true, "publisher": "kafka"}', "publisher"),
    ('{"enable_kv_cache_events": true, "buffer_steps": "many"}', "buffer_steps"),
    ("no json", "kv-events-config"),
])
def test_a_wrong_configuration_is_refused_by_name(config, key):
    done = subprocess.run([BATON, "serve", "smollm2", "--device", "sim", "--kv-events-config", config],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 64 and key in done.stderr, done.stderr


def test_without_the_flag_nothing_is_published(both):
    with pytest.raises(AssertionError, match="no metric"):
        metric(both.url, "kvx_events_total")


def news(follower: Follower, n: int) -> list:
    """The hashes of the next n pieces of news; None: a reset."""
    def short(said: dict):
        return None if "reset" in said else said["events"][0]["removed"][0]
    return [short(follower.next()) for _ in range(n)]


@pytest.mark.parametrize("plain", [False, True])
def test_the_past_of_a_server_on_libzmq_is_heard(closing, plain):
    server = closing(Server(keep=4, plain=plain))
    for n in range(10):
        server.publish(removed(n))
    follower = closing(Follower(server.ports))
    assert news(follower, 4) == [6, 7, 8, 9]
    server.publish(removed(10))
    assert news(follower, 1) == [10]


def test_batches_that_were_lost_are_had_again(closing):
    server = closing(Server())
    server.publish(removed(0))
    follower = closing(Follower(server.ports))
    assert news(follower, 1) == [0]
    server.publish(removed(1))
    for n in (2, 3):
        server.publish(removed(n), lost=True)
    server.publish(removed(4))
    assert news(follower, 4) == [1, 2, 3, 4]
    assert server.asked == [0, 2]


def test_batches_that_are_gone_cost_what_was_known(closing):
    server = closing(Server(keep=2))
    server.publish(removed(0))
    follower = closing(Follower(server.ports))
    assert news(follower, 1) == [0]
    for n in (1, 2, 3):
        server.publish(removed(n), lost=True)
    server.publish(removed(4))
    assert news(follower, 3) == [None, 3, 4]


def test_a_server_that_starts_anew_is_told_from_itself(closing):
    server = Server()
    for n in range(3):
        server.publish(removed(n))
    follower = closing(Follower(server.ports))
    assert news(follower, 3) == [0, 1, 2]
    server.close()
    # Further than the old one was before anybody listens again.
    server = closing(Server(ports=server.ports))
    for n in range(10, 15):
        server.publish(removed(n))
    assert news(follower, 6) == [None, 10, 11, 12, 13, 14]


def test_a_server_that_does_not_answer_is_followed_from_now_on(closing):
    server = closing(Server(mute=True))
    server.publish(removed(0))
    follower = closing(Follower(server.ports))
    eventually(lambda: len(server.asked) == 3, 30, "asked three times")
    over = threading.Event()

    def publish():
        # Until it is heard: nothing tells when the follower has given up.
        while not over.wait(0.1):
            server.publish(removed(1))
    thread = threading.Thread(target=publish)
    thread.start()
    try:
        assert news(follower, 2) == [1, 1]
    finally:
        over.set()
        thread.join()


def test_events_of_any_form_and_sense_are_heard(closing):
    server = closing(Server())
    follower = closing(Follower(server.ports))
    server.publish(
        {"type": "BlockStored", "block_hashes": [1 << 63, bytes(31) + b"\x09"], "parent_block_hash": 5,
         "token_ids": [1, 2, 3, 70000], "block_size": 2, "lora_id": None, "medium": "CPU", "lora_name": "tuned",
         "extra_keys": [["tuned"], None], "group_idx": 0, "kv_cache_spec_kind": "full_attention", "session_id": "x"},
        ["BlockRemoved", "nonsense"], ["BlockStored", [7], None, [], 16, None], ["AllBlocksCleared"])
    said = follower.next()
    assert said["dropped"] == 1
    assert said["events"] == [
        {"stored": [1 << 63, 9], "parent": 5, "tokens": [1, 2, 3, 70000], "block_size": 2, "medium": "Host", "adapter": "tuned"},
        {"stored": [7], "parent": None, "tokens": [], "block_size": 16, "medium": "Device", "adapter": None},
        {"cleared": True}]

