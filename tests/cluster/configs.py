"""The configuration files and command lines of a cluster's parts, as functions of where they lie and listen."""
import json
import pathlib

from parts import BIN

NODE_ADDRESS = "198.18.0.1"
SERVICES = "10.96.0.0/16"
PODS = "10.244.0.0/16"
PAUSE_IMAGE = "baton.local/pause:1"


def kubeconfig(server: str, ca: pathlib.Path, token: str) -> str:
    """JSON, which is YAML. Everyone inside is the administrator: what is tested here are roles of ours, not theirs."""
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": str(ca)}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }, indent=1)


def etcd(folder: pathlib.Path, address: str, client: int, peer: int) -> list[str]:
    return [str(BIN / "etcd"), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
            "--listen-client-urls", f"http://{address}:{client}", "--advertise-client-urls", f"http://{address}:{client}",
            "--listen-peer-urls", f"http://{address}:{peer}", "--initial-advertise-peer-urls", f"http://{address}:{peer}",
            "--initial-cluster", f"default=http://{address}:{peer}"]


def api_server(folder: pathlib.Path, bind: str, advertise: str, port: int, store: str) -> list[str]:
    policy = folder / "audit.json"
    # What service accounts ask for, so that tests can compare it with what they may.
    policy.write_text(json.dumps({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}]}))
    return [str(BIN / "kube-apiserver"), "--bind-address", bind, "--advertise-address", advertise,
            "--secure-port", str(port), "--etcd-servers", store, "--cert-dir", str(folder / "certs"),
            "--token-auth-file", str(folder / "tokens.csv"), "--authorization-mode", "RBAC,Node",
            "--service-cluster-ip-range", SERVICES, "--allow-privileged",
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", str(folder / "accounts.pub"),
            "--service-account-signing-key-file", str(folder / "accounts.key"),
            "--audit-policy-file", str(policy), "--audit-log-path", str(folder / "audit.log"),
            # Otherwise `kubectl logs` looks the node's name up in a DNS that is not there.
            "--kubelet-preferred-address-types", "InternalIP"]


def controllers(folder: pathlib.Path) -> list[str]:
    return [str(BIN / "kube-controller-manager"), "--kubeconfig", str(folder / "kubeconfig"), "--controllers=*,-nodeipam",
            "--root-ca-file", str(folder / "certs/apiserver.crt"), "--leader-elect=false", "--secure-port=0",
            "--service-account-private-key-file", str(folder / "accounts.key")]


def scheduler(folder: pathlib.Path) -> list[str]:
    return [str(BIN / "kube-scheduler"), "--kubeconfig", str(folder / "kubeconfig"), "--leader-elect=false",
            "--secure-port=0"]


def containerd(folder: pathlib.Path) -> list[str]:
    path = folder / "containerd.toml"
    path.write_text(f"""version = 2
root = "{folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Without the capability to lower it, runc dies when it tries.
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{folder}/cni"
""")
    network = folder / "cni/10-bridge.conflist"
    network.parent.mkdir(exist_ok=True)
    network.write_text(json.dumps({
        "cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": {
                "type": "host-local", "dataDir": f"{folder}/addresses",
                "ranges": [[{"subnet": "10.244.0.0/20"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]}))
    return ["containerd", "--config", str(path)]


def kubelet(folder: pathlib.Path, name: str, cgroup: str) -> list[str]:
    path = folder / "kubelet.json"
    path.write_text(json.dumps({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "cgroupDriver": "cgroupfs", "cgroupRoot": cgroup, "failCgroupV1": False, "enforceNodeAllocatable": [],
        "failSwapOn": False, "localStorageCapacityIsolation": False, "resolvConf": "",
        "podLogsDir": f"{folder}/logs", "volumePluginDir": f"{folder}/plugins", "maxPods": 1000,
        # Images come from files and could not be had again; a full disk is the machine's own matter.
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "evictionHard": {key: "0%" for key in ("imagefs.available", "nodefs.available", "nodefs.inodesFree")},
        # One machine, one node: no need to be gentle.
        "nodeStatusUpdateFrequency": "5s", "serializeImagePulls": False, "kubeAPIQPS": 100, "kubeAPIBurst": 200,
    }, indent=1))
    return [str(BIN / "kubelet"), "--config", str(path), "--kubeconfig", str(folder / "kubeconfig"),
            "--root-dir", str(folder / "kubelet"), "--cert-dir", str(folder / "kubelet-certs"),
            "--hostname-override", name, "--node-ip", NODE_ADDRESS]


def proxy(folder: pathlib.Path, name: str) -> list[str]:
    path = folder / "proxy.json"
    path.write_text(json.dumps({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "iptables",
        "clientConnection": {"kubeconfig": str(folder / "kubeconfig")}, "hostnameOverride": name, "clusterCIDR": PODS,
        # These settings are the whole machine's and not ours to change.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }, indent=1))
    return [str(BIN / "kube-proxy"), "--config", str(path)]


ISTIO_ENVIRONMENT = {
    "ENABLE_GATEWAY_API_INFERENCE_EXTENSION": "true",
    # A plain Envoy knows none of Istio's own filters and protocols.
    "PILOT_ENABLE_METADATA_EXCHANGE": "false", "PILOT_DISABLE_MX_ALPN": "true", "PILOT_ENABLE_ALPN_FILTER": "false",
    "POD_NAMESPACE": "istio-system", "POD_NAME": "istiod", "JWT_POLICY": "none",
}


def istiod(folder: pathlib.Path) -> list[str]:
    mesh = folder / "mesh.yaml"
    mesh.write_text("enableAutoMtls: false\ndefaultProviders: {}\naccessLogFile: /dev/stdout\n")
    return [str(BIN / "istiod"), "discovery", "--kubeconfig", str(folder / "kubeconfig"), "--meshConfig", str(mesh),
            "--grpcAddr", ":15010", "--secureGRPCAddr", "", "--httpsAddr", "", "--httpAddr", ":15080",
            "--monitoringAddr", ":15014"]
