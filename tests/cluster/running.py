"""A running cluster: its processes, the namespaces around them, and how nothing of it stays behind.

A control plane alone is three processes on loopback ports that were free. A cluster with a node lives in namespaces of its
own (network, mounts, processes, host name), held by one process: when that one is killed, the kernel ends all the others,
pods included, and mounts and devices go with them. Only control groups must be removed by hand.
"""
import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import configs
import images
import parts
from parts import BIN, CACHE, CRDS, Missing, say

# In the environment of each process of a cluster, with the cluster's folder, so that `down` finds even what was not noted.
TAG = "BATON_CLUSTER_FOLDER"
CONTROL_GROUPS = pathlib.Path("/sys/fs/cgroup")


class Failed(Exception):
    """A cluster that did not come up, or a part that is not there."""


class Cluster:
    """The cluster of a name, whether it runs or not."""

    def __init__(self, name: str):
        if not name.isidentifier() or len(name) > 20:
            raise Failed(f"{name!r} is no name for a cluster: letters and digits, 20 at most")
        self.name = name
        self.folder = CACHE / "run" / name
        self.kubeconfig = self.folder / "kubeconfig"
        try:
            self.state = json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            self.state = {}

    # What a caller may do.

    def up(self, kind: str):
        """Starts the cluster and returns when it is ready. One that runs already is left as it is."""
        with self._locked():
            if self.state.get("ready") == kind and not self.ended():
                return
            lacking = parts.absent(parts.wanted(kind))
            if lacking:
                raise Missing(f"not built: {', '.join(lacking)}; run `cluster.py build {' '.join(lacking)}`")
            if kind != "control-plane" and os.geteuid() != 0:
                raise Missing("a node needs root")
            self._down()
            try:
                self._up(kind)
            except BaseException:
                self._keep_logs()
                self._down()
                raise

    def down(self):
        """Ends the cluster and removes all that is left of it, also after an `up` that failed half way."""
        with self._locked():
            self._down()

    def stop(self, part: str):
        """Ends one process as an operator would, by SIGTERM."""
        noted = self._noted(part)
        _end(noted["pid"], noted["started"], 30)

    def kill(self, part: str):
        """Ends one process without a warning."""
        noted = self._noted(part)
        _end(noted["pid"], noted["started"], 0)

    def start(self, part: str):
        """Starts a stopped process again, with the command line it had."""
        noted = self._noted(part)
        if not _alive(noted["pid"], noted["started"]):
            self._start(part, noted["argv"], noted["environment"])

    def ended(self) -> list[str]:
        """The parts that should run and do not."""
        return [name for name, part in self.state.get("parts", {}).items() if not _alive(part["pid"], part["started"])]

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs `argv` on the cluster's network."""
        holder = self.state.get("holder")
        return ["nsenter", "--target", str(holder["pid"]), "--net", "--", *argv] if holder else list(argv)

    def environment(self) -> dict[str, str]:
        """What a program on the cluster's network wants to find in its environment."""
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """Runs a program on the cluster's network; its standard output."""
        done = subprocess.run(self.inside(*argv), input=stdin, text=True, capture_output=True, check=False,
                              env=self.environment())
        if check and done.returncode != 0:
            raise Failed(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def kubectl(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        return self.run(str(BIN / "kubectl"), *argv, stdin=stdin, check=check)

    def load(self, image: pathlib.Path):
        """Gives the node an image that `docker save` or `images.make` wrote."""
        self.run("ctr", "--address", str(self.folder / "containerd.sock"), "--namespace", "k8s.io",
                 "images", "import", str(image))

    def define(self, name: str):
        """Installs a set of resource definitions."""
        own = parts.HERE / "definitions" / f"{name}.yaml"
        self.kubectl("apply", "--server-side", "-f", str(own if own.exists() else CRDS / name))
        self.kubectl("wait", "--for=condition=Established", "crds", "--all", "--timeout=30s")

    # How.

    def _up(self, kind: str):
        self.folder.mkdir(parents=True)
        self.state = {"kind": kind, "parts": {}}
        self._save()
        self._secrets()
        if kind == "control-plane":
            address, (client, peer, port) = "127.0.0.1", _free_ports(3)
            # Written into a Service that nobody here asks; an address of loopback would be refused.
            advertise = "192.0.2.1"
        else:
            self._hold()
            address, (client, peer, port) = "127.0.0.1", (2379, 2380, 6443)
            advertise = configs.NODE_ADDRESS
        bind = address if kind == "control-plane" else "0.0.0.0"
        server = f"https://{address if kind == 'control-plane' else advertise}:{port}"
        self._write("kubeconfig", configs.kubeconfig(server, self.folder / "certs/apiserver.crt", self.state["token"]))
        self._start("etcd", configs.etcd(self.folder, address, client, peer))
        self._start("kube-apiserver",
                    configs.api_server(self.folder, bind, advertise, port, f"http://{address}:{client}"))
        if kind != "control-plane":
            self._start("containerd", configs.containerd(self.folder))
        self._wait("the API server", lambda: self.kubectl("get", "--raw", "/readyz", check=False) == "ok")
        self._start("kube-controller-manager", configs.controllers(self.folder))
        if kind != "control-plane":
            self._node()
        self._wait("the first service account",
                   lambda: "default" in self.kubectl("get", "serviceaccounts", "-o", "name", check=False))
        if kind == "istio":
            self._istio()
        self.state["ready"] = kind
        self._save()

    def _node(self):
        self._wait("containerd", lambda: (self.folder / "containerd.sock").exists())
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            image = pathlib.Path(folder) / "pause.tar"
            images.make(image, configs.PAUSE_IMAGE, BIN / "pause")
            self._wait("containerd", lambda: self._imported(image))
        group = f"baton-{self.name}"
        for controller in _controllers():
            (controller / group).mkdir(exist_ok=True)
        self._start("kube-scheduler", configs.scheduler(self.folder))
        self._start("kubelet", configs.kubelet(self.folder, self.name, f"/{group}"))
        self._start("kube-proxy", configs.proxy(self.folder, self.name))
        self._wait("the node", lambda: self.kubectl(
            "get", "node", self.name, "-o", 'jsonpath={.status.conditions[?(@.type=="Ready")].status}', check=False) == "True")

    def _imported(self, image: pathlib.Path) -> bool:
        try:
            self.load(image)
        except Failed:
            return False
        return True

    def _istio(self):
        for name in ("gateway", "inference", "istio"):
            self.define(name)
        self.kubectl("create", "namespace", "istio-system")
        self._start("istiod", configs.istiod(self.folder), configs.ISTIO_ENVIRONMENT)
        self._wait("istiod", lambda: "istio" in self.kubectl("get", "gatewayclasses", "-o", "name", check=False))

    def _hold(self):
        """Makes the namespaces: a network that leads nowhere, mounts of which the machine sees nothing."""
        made = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--uts", "--ipc", "--propagation", "private",
             "--mount-proc", str(BIN / "pause")],
            env=os.environ | {TAG: str(self.folder)}, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=(self.folder / "namespaces.log").open("ab"))
        pid = self._child(made.pid)
        self.state["holder"] = {"pid": pid, "started": _started(pid)}
        self._save()
        # Until the new /proc is mounted, the namespaces are not finished.
        self._wait("the namespaces", lambda: pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == "pause")
        script = f"""set -e
            mount --make-rshared /
            mount -t tmpfs tmpfs /run
            mkdir -p /run/lock /run/netns
            hostname {self.name}
            ip link set lo up
            ip link add node type veth peer name beyond
            ip addr add {configs.NODE_ADDRESS}/24 dev node
            ip link set node up
            ip link set beyond up
            ip route add default dev node
            echo 1 > /proc/sys/net/ipv4/ip_forward"""
        done = subprocess.run([*self._entered(), "sh", "-c", script], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"the namespaces: {done.stderr.strip()}")

    def _entered(self) -> list[str]:
        holder = self.state.get("holder")
        if not holder:
            return []
        return ["nsenter", "--target", str(holder["pid"]), "--net", "--mount", "--pid", "--uts", "--ipc", "--"]

    def _start(self, part: str, argv: list[str], environment: dict | None = None):
        entered = self._entered()
        with (self.folder / f"{part}.log").open("ab") as log:
            process = subprocess.Popen(
                [*entered, *argv], env=os.environ | (environment or {}) | {TAG: str(self.folder)}, cwd=self.folder,
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        pid = self._child(process.pid) if entered else process.pid
        self.state["parts"][part] = {"pid": pid, "started": _started(pid), "argv": argv, "environment": environment or {}}
        self._save()

    @staticmethod
    def _child(pid: int) -> int:
        """The process that `unshare` or `nsenter` forked."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):
                children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                if children:
                    return int(children[0])
            time.sleep(0.01)
        raise Failed("a process did not enter its namespaces")

    def _wait(self, what: str, ready, within_s: float = 90):
        end = time.monotonic() + within_s
        while not ready():
            gone = self.ended()
            if gone:
                raise Failed(f"{', '.join(gone)} ended while waiting for {what}; its log: {self._tail(gone[0])}")
            if time.monotonic() > end:
                raise Failed(f"{what} not ready within {within_s:.0f} s")
            time.sleep(0.1)

    def _tail(self, part: str) -> str:
        with contextlib.suppress(OSError):
            return "\n".join((self.folder / f"{part}.log").read_text(errors="replace").splitlines()[-5:])
        return "none"

    def _keep_logs(self):
        kept = CACHE / "failed" / self.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for log in self.folder.glob("*.log"):
            shutil.copy(log, kept)
        say(f"logs of the failed start are in {kept}")

    def _secrets(self):
        self.state["token"] = secrets.token_hex(16)
        self._write("tokens.csv", f"{self.state['token']},admin,admin,system:masters\n")
        key, public = self.folder / "accounts.key", self.folder / "accounts.pub"
        quiet = {"check": True, "capture_output": True}
        subprocess.run(["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", key], **quiet)
        subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], **quiet)

    def _write(self, name: str, text: str):
        path = self.folder / name
        path.touch(0o600)
        path.write_text(text)

    def _save(self):
        fresh = self.folder / "state.json.new"
        fresh.touch(0o600)
        fresh.write_text(json.dumps(self.state, indent=1))
        fresh.replace(self.folder / "state.json")

    def _noted(self, part: str) -> dict:
        try:
            return self.state["parts"][part]
        except KeyError:
            raise Failed(f"cluster {self.name} has no part {part}; it has {list(self.state.get('parts', {}))}") from None

    def _down(self):
        holder = self.state.get("holder")
        if holder:
            # The kernel ends all that lives in its namespaces before it is gone.
            _end(holder["pid"], holder["started"], 0)
        for pid in self._tagged():
            _end(pid, _started(pid), 0)
        self._remove_control_groups()
        under = f" {self.folder}/"
        mounts = [line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if under in line]
        if mounts:
            raise Failed(f"still mounted, nothing removed: {', '.join(mounts)}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.state = {}

    def _tagged(self) -> list[int]:
        tag, found = f"{TAG}={self.folder}".encode(), []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            # Others' processes are not readable, and some end while we look.
            with contextlib.suppress(OSError):
                if tag in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def _remove_control_groups(self):
        end = time.monotonic() + 10
        # Of version 2's own hierarchy beside those of version 1 too, where the container runtime makes one.
        for root in [group for place in ("", "*/") for group in CONTROL_GROUPS.glob(f"{place}baton-{self.name}")]:
            while root.exists():
                for folder, _, _ in os.walk(root, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)
                if root.exists() and time.monotonic() > end:
                    raise Failed(f"{root} does not go away")
                time.sleep(0.02)

    @contextlib.contextmanager
    def _locked(self):
        """One `up` or `down` of a name at a time."""
        path = CACHE / "run" / f"{self.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.__init__(self.name)
            yield


def _controllers() -> list[pathlib.Path]:
    """The roots under which each control group of ours has a folder: one in version 2, one a controller in version 1."""
    if (CONTROL_GROUPS / "cgroup.controllers").exists():
        return [CONTROL_GROUPS]
    return [path for path in CONTROL_GROUPS.iterdir() if path.is_dir() and not path.is_symlink() and path.name != "unified"]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat that follow the name, which may hold anything: state first, start time the twentieth."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _started(pid: int) -> int:
    fields = stat_of(pid)
    return int(fields[19]) if fields else -1


def _alive(pid: int, started: int) -> bool:
    """Whether the process that got this id at that time still runs: ids come again."""
    fields = stat_of(pid)
    return bool(fields) and fields[0] not in "ZX" and int(fields[19]) == started


def _end(pid: int, started: int, patience_s: float):
    """SIGTERM and, after so many seconds, SIGKILL; returns when the process is gone."""
    end = time.monotonic() + patience_s
    if patience_s and _alive(pid, started):
        os.kill(pid, signal.SIGTERM)
    while _alive(pid, started) and time.monotonic() < end:
        time.sleep(0.02)
    if _alive(pid, started):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while _alive(pid, started):
        if time.monotonic() > end:
            raise Failed(f"process {pid} does not end")
        time.sleep(0.02)
    # If it was a child of this process, and not of another `cluster.py` before.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
