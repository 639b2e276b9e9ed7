#!/usr/bin/env python3
"""A real Kubernetes cluster on this machine, for tests: see README.md beside this file."""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import images
import parts
from running import Cluster, Failed


def main() -> int:
    args = arguments().parse_args()
    try:
        return args.run(args) or 0
    except (parts.Missing, Failed, subprocess.CalledProcessError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1


def arguments() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__)
    root.add_argument("--name", default="baton", help="which cluster; several run side by side")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        parser = commands.add_parser(name, help=help)
        parser.set_defaults(run=run)
        return parser

    command("build", lambda a: parts.build(a.parts), "make the parts, all or those named, once").add_argument("parts", nargs="*")
    up = command("up", do_up, "start it; prints the path of the kubeconfig when ready")
    kind = up.add_mutually_exclusive_group()
    kind.add_argument("--control-plane-only", dest="kind", action="store_const", const="control-plane",
                      help="API server, its store and the controllers on loopback: no node, no root")
    kind.add_argument("--istio", dest="kind", action="store_const", const="istio",
                      help="with Gateway API, inference extension and Istio's control plane")
    up.set_defaults(kind="node")
    command("down", lambda a: Cluster(a.name).down(), "end it; nothing of it stays")
    command("kubeconfig", lambda a: print(running(a).kubeconfig), "print the path of the kubeconfig")
    command("status", do_status, "print each part and whether it runs")
    for name, what in [("start", "start a stopped part again"), ("stop", "end a part by SIGTERM"),
                       ("kill", "end a part by SIGKILL")]:
        command(name, lambda a, name=name: getattr(running(a), name)(a.part), what).add_argument("part")
    define = command("define", lambda a: running(a).define(a.set), "install a set of resource definitions")
    define.add_argument("set", choices=[*parts.DEFINITIONS, "llm-d"])
    inside = command("exec", do_exec, "run a program on the cluster's network, with its kubectl on the path")
    inside.add_argument("argv", nargs=argparse.REMAINDER)
    load = command("load", lambda a: running(a).load(a.image), "give the node an image that `docker save` wrote")
    load.add_argument("image", type=pathlib.Path)
    image = command("image", do_image, "make an image of a program and its libraries, and load it or write it to a file")
    image.add_argument("program", type=pathlib.Path)
    image.add_argument("image", help="name and tag; use it with imagePullPolicy Never")
    image.add_argument("--output", type=pathlib.Path)
    image.add_argument("--file", action="append", default=[], metavar="PATH=SOURCE", help="put a file in besides")
    return root


def running(args) -> Cluster:
    cluster = Cluster(args.name)
    if not cluster.state.get("ready"):
        raise Failed(f"cluster {args.name} is not up")
    return cluster


def do_up(args):
    cluster = Cluster(args.name)
    cluster.up(args.kind)
    print(cluster.kubeconfig)


def do_status(args):
    cluster = running(args)
    ended = cluster.ended()
    for part in cluster.state["parts"]:
        print(f"{part}: {'ended' if part in ended else 'runs'}")
    return 1 if ended else 0


def do_exec(args):
    cluster = running(args)
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise Failed("exec: which program?")
    whole = cluster.inside(*argv)
    os.execvpe(whole[0], whole, cluster.environment())


def do_image(args):
    files = {path: pathlib.Path(source) for path, _, source in (entry.partition("=") for entry in args.file)}
    if args.output:
        images.make(args.output, args.image, args.program, files)
        return
    cluster = running(args)
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "image.tar"
        images.make(target, args.image, args.program, files)
        cluster.load(target)


if __name__ == "__main__":
    sys.exit(main())
