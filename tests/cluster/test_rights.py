"""The deployment that docs/epp.md shows, with the roles as they are shipped: they allow all that is asked for, and no more."""
import json
import re

import pytest
from scene import IMAGE, ROOT, allowed, asked, eventually, http_ask, load_baton, network

ROLES = [("role", "baton-picker"), ("role", "baton-picker-leader"), ("clusterrole", "baton-picker-metrics")]
READER = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: scraper}
rules: [{nonResourceURLs: [/metrics], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: scraper}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: scraper}
subjects: [{kind: ServiceAccount, name: scraper, namespace: default}]
"""
LEADER = """
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: picker-leader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: baton-picker-leader}
subjects: [{kind: ServiceAccount, name: picker}]
"""
POOL = json.dumps({
    "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": {"name": "llama"},
    "spec": {"selector": {"matchLabels": {"app": "llama"}}, "targetPorts": [{"number": 8000}],
             "endpointPickerRef": {"name": "picker", "port": {"number": 9002}}}})


def manifests() -> str:
    """What docs/epp.md tells to apply, with an image that is on the node, and two replicas of which one leads."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/epp.md").read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "kind: Deployment" in block)
    changes = {"image: baton\n": f"image: {IMAGE}\n        imagePullPolicy: Never\n",
               "args: [epp, ": "args: [epp, --ha-enable-leader-election, ", "spec:\n  selector: {matchLabels":
               "spec:\n  replicas: 2\n  selector: {matchLabels"}
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def pickers(mesh):
    load_baton(mesh)
    mesh.define("llm-d")
    mesh.kubectl("apply", "-f", str(ROOT / "crates/k8s/rbac"))
    for text in (manifests(), LEADER, READER, POOL):
        mesh.kubectl("apply", "-f", "-", stdin=text)
    mesh.kubectl("create", "serviceaccount", "scraper")
    return mesh


def test_the_roles_are_used_to_the_last_verb_and_nothing_is_refused(pickers):
    roles = [json.loads(pickers.kubectl("get", kind, name, "-o", "json")) for kind, name in ROLES]
    eventually(lambda: pickers.kubectl("get", "deployment", "picker", "-o", "jsonpath={.status.readyReplicas}") == "1",
               "one of two pickers is ready", 60)
    scrape(pickers)
    # The older group is asked where the newer one is not served.
    for kind in ("inferenceobjectives", "inferencemodelrewrites"):
        pickers.kubectl("delete", "crd", f"{kind}.llm-d.ai")
    try:
        wanted = allowed(*roles)
        def used():
            return {what for what, codes in asked(pickers, "default", "picker").items() if min(codes) < 300}
        eventually(lambda: wanted <= used(), lambda: f"unused: {wanted - used()}", 90)
        beyond = {what for what in used() - wanted if not re.fullmatch("get /apis/.*", what)}
        assert beyond == set()
        refused = {what: codes for what, codes in asked(pickers, "default", "picker").items() if codes & {401, 403}}
        assert refused == {}
    finally:
        pickers.define("llm-d")


def scrape(cluster):
    """Metrics are for who may read them."""
    addresses = cluster.kubectl("get", "pods", "-l", "app=picker", "-o", "jsonpath={.items[*].status.podIP}").split()
    tokens = {name: cluster.kubectl("create", "token", name).strip() for name in ("scraper", "picker")}

    def status(address: str, token: str | None) -> int:
        head = {"authorization": f"Bearer {token}"} if token else {}
        with network(cluster):
            return http_ask(f"{address}:9090", "/metrics", headers=head)[0]

    for address in addresses:
        eventually(lambda: status(address, tokens["scraper"]) == 200, "who may read reads", 90)
        assert status(address, tokens["picker"]) == 403 and status(address, None) == 401
