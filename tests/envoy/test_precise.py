"""Prefixes by what servers say of their caches: a picker that is started after a server answered finds the server."""
import contextlib
import json
import pathlib
import re
import sys
import uuid

import pytest
from harness import eventually
from test_epp import Door

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "system"))
from stack import Process, metric, post  # noqa: E402
from stack import free_port as port_of_system  # noqa: E402

BLOCK = 16
# Servers of one machine tell themselves apart by their addresses, as pods do.
HOSTS = "127.0.0.2", "127.0.0.3"
KINDS = "/v1/completions", "/v1/chat/completions"


def config(live: int, replay: int) -> str:
    return f"""
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {{type: token-producer, parameters: {{modelName: smollm2}}}}
- type: precise-prefix-cache-producer
  parameters:
    tokenProcessorConfig: {{blockSizeTokens: {BLOCK}}}
    indexerConfig: {{kvBlockIndexConfig: {{enableMetrics: true}}}}
    kvEventsConfig: {{topicFilter: "kv@", podDiscoveryConfig: {{socketPort: {live}, replaySocketPort: {replay}}}}}
- {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}}}
- type: max-score-picker
schedulingProfiles:
- {{name: default, plugins: [{{pluginRef: prefix-cache-scorer, weight: 1}}, {{pluginRef: max-score-picker}}]}}
"""


class Server(Process):
    """A model server that thinks nothing, and says what it caches."""

    def __init__(self, host: str, port: int, live: str, replay: int | None = None):
        self.address = f"{host}:{port}"
        events = {"enable_kv_cache_events": True, "endpoint": live, "topic": f"kv@{self.address}@smollm2"}
        events |= {} if replay is None else {"replay_endpoint": f"tcp://*:{replay}"}
        super().__init__("serve", "smollm2", "--device", "sim", "--host", host, "--port", str(port), "--block-size",
                         str(BLOCK), "--kv-events-config", json.dumps(events))

    def _ready_address(self) -> str:
        url = f"http://{self.address}"

        def answers():
            with contextlib.suppress(OSError):
                return metric(url, "vllm:num_requests_running") == 0
        eventually(lambda: self.child.poll() is not None or answers(), f"{url} is ready", 120)
        assert self.child.poll() is None, pathlib.Path(self.log.name).read_text()
        return url


class Site:
    """Two servers, and where they publish; pickers that follow them."""

    def __init__(self):
        self.live, self.replay, self.port = port_of_system(), port_of_system(), port_of_system()
        self.servers = {host: self.serve(host) for host in HOSTS}

    def serve(self, host: str) -> Server:
        return Server(host, self.port, f"tcp://*:{self.live}", self.replay)

    def stop(self):
        for server in self.servers.values():
            server.stop()

    def door(self) -> Door:
        listed = [(server.address, "both") for server in self.servers.values()]
        door = Door(listed, "--tokenizer=smollm2", config=config(self.live, self.replay))
        door.picker.await_servers(len(listed))
        return door


@pytest.fixture
def site():
    running = Site()
    yield running
    running.stop()


def request(path: str, words: int = 60) -> dict:
    text = f"{uuid.uuid4().hex} tells: " + "the baton goes from hand to hand " * words
    said = {"prompt": text} if path == KINDS[0] else {"messages": [{"role": "user", "content": text}]}
    return {"model": "smollm2", "max_tokens": 2, **said}


def scores(door: Door, path: str, body: dict) -> tuple[str, dict]:
    """Where a request goes, and what the scorer says of each server."""
    name = uuid.uuid4().hex
    answer = door.post(body, {"x-request-id": name}, path=path)
    assert answer.status == 200, answer.body
    decision = door.picker.decision(name)
    (stage,) = decision["stages"]
    found = {pod(c["endpoint"]): next(iter(c["scores"].values())) for c in stage["candidates"]}
    return pod(decision["decode"]), found


def pod(endpoint: str) -> str:
    return re.search(r"pod-\d", endpoint)[0]


def direct(server: Server, path: str, body: dict):
    status, answer = post(server.url, path, body)
    assert status == 200, answer


def mark(server: Server) -> dict:
    """What the server answers last: who has heard of this has heard of everything before."""
    body = request(KINDS[0], 4)
    direct(server, KINDS[0], body)
    return body


def hears(door: Door, marker: dict, name: str):
    # Asking has the marker cached elsewhere too, which is why it is not the prompt that counts.
    eventually(lambda: scores(door, KINDS[0], marker)[1].get(name, 0) > 0.3, f"the picker has heard of {name}")


@pytest.mark.parametrize("path", KINDS)
def test_what_was_answered_before_the_picker_began_is_found(site, path):
    bodies = [request(path, 4), request(path, 200)]
    for server, body in zip(site.servers.values(), bodies):
        direct(server, path, body)
    markers = [mark(server) for server in site.servers.values()]
    with site.door() as door:
        for i, marker in enumerate(markers):
            hears(door, marker, f"pod-{i}")
        # No more of it than the template's own words.
        assert max(scores(door, path, request(path))[1].values()) < 0.1
        for i, (server, body) in enumerate(zip(site.servers.values(), bodies)):
            hits = metric(server.url, "vllm:prefix_cache_hits_total")
            decode, found = scores(door, path, body)
            assert decode == f"pod-{i}" and found[f"pod-{1 - i}"] < 0.3 and found[decode] > 0.8, found
            assert metric(server.url, "vllm:prefix_cache_hits_total") > hits


def test_token_ids_are_looked_up_as_they_are(site):
    ids = {"model": "smollm2", "prompt": list(range(100, 100 + 10 * BLOCK)), "max_tokens": 1}
    server = site.servers[HOSTS[1]]
    direct(server, KINDS[0], ids)
    marker = mark(server)
    with site.door() as door:
        hears(door, marker, "pod-1")
        counted = lambda what: door.picker.metric(f"llm_d_epp_kv_cache_index_{what}_total")
        lookups, hits = counted("lookup_requests"), counted("lookup_hits")
        assert scores(door, KINDS[0], ids) == ("pod-1", {"pod-0": 0.0, "pod-1": 1.0})
        assert (counted("lookup_requests"), counted("lookup_hits")) == (lookups + 1, hits + 10)
        assert counted("max_pod_hit_count") == hits + 10 and counted("admissions") >= 10


def test_a_server_that_was_started_again_has_nothing(site):
    path, host = KINDS[0], HOSTS[0]
    body = request(path)
    with site.door() as door:
        direct(site.servers[host], path, body)
        hears(door, mark(site.servers[host]), "pod-0")
        decode, found = scores(door, path, body)
        assert decode == "pod-0" and found["pod-0"] > 0.8 and found["pod-1"] == 0
        site.servers[host].stop()
        eventually(lambda: door.picker.metric("llm_d_epp_ready_endpoints") == 1, "it is missed")
        site.servers[host] = site.serve(host)
        hears(door, mark(site.servers[host]), "pod-0")
        assert set(scores(door, path, body)[1].values()) == {0.0}


def test_servers_may_connect_to_the_picker():
    at, port = port_of_system(), port_of_system()
    servers = [Server(host, port, f"tcp://127.0.0.1:{at}") for host in HOSTS]
    text = config(1, 0).replace("podDiscoveryConfig", f'zmqEndpoint: "tcp://127.0.0.1:{at}", podDiscoveryConfig')
    try:
        with Door([(s.address, "both") for s in servers], "--tokenizer=smollm2", config=text) as door:
            door.picker.await_servers(2)
            # Nobody can be asked for the past, so there is one when the picker hears.
            eventually(lambda: all(metric(s.url, "kvx_event_subscribers") == 1 for s in servers), "they connect")
            body = request(KINDS[1])
            direct(servers[1], KINDS[1], body)
            hears(door, mark(servers[1]), "pod-1")
            decode, found = scores(door, KINDS[1], body)
            assert decode == "pod-1" and found["pod-1"] > 0.8 and found["pod-0"] < 0.3, found
    finally:
        for server in servers:
            server.stop()


def test_without_a_tokenizer_the_picker_says_so_and_goes_by_what_it_sent(site):
    listed = [(server.address, "both") for server in site.servers.values()]
    with Door(listed, config=config(site.live, site.replay)) as door:
        door.picker.await_servers(2)
        assert "--tokenizer" in door.picker.text()
        body = request(KINDS[0], 300)
        first = scores(door, KINDS[0], body)[0]
        decode, found = scores(door, KINDS[0], body)
        assert decode == first and found[decode] > 0.8
