"""baton on a CPU beside llama.cpp (same GGUF file) and vLLM's CPU build (bf16): same model, same cores, one run.

    make bench-peers THREADS=2      (or: .venv-peers/bin/python tests/bench/cpu_peers.py --threads 2 [--rounds N] ...)

Subjects take turns within each round; medians are printed with the lowest and the highest of the rounds. All processes of
a subject are confined to the first THREADS cores; the asking side keeps to the other cores where there are any. The last
rows tell how much of those cores went to other work meanwhile: compare only what was measured beside little of it.
llama.cpp is driven inside its process and pays for no HTTP, the servers pay for theirs. It also runs the model in Q4_0,
for which it has faster products than for the file's own Q4_1. Nothing here asserts a time.
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import psutil
import subjects
from neighbours import Watch
from subjects import HERE, Baton, LlamaCpp, Place, Stamps, Subject, Unavailable, Vllm

CACHE = HERE.parents[1] / "target" / "bench"
# The short ones are over in a second or less, so a turn has several.
BATCHES = (1, 1, 1, 4, 16)
PREFILLS = (128, 128, 128, 1000, 4000)
NEW = 128
SUBJECTS = ("baton-q4_1", "baton-bf16", "llama-q4_1", "llama-q4_0", "vllm-bf16")
READING = "decode, batch 1, weights read, GB/s"
SHARE = "decode, batch 1, share of the machine's reading"
NOISE = "share of the cores that other work took"
FAILURES = (OSError, RuntimeError, AssertionError, http.client.HTTPException, psutil.Error)
rng = random.Random(time.time_ns())


def fresh(n: int) -> list[int]:
    """A prompt that no cache has seen, of ids every subject's vocabulary has."""
    return [rng.randrange(20, 49152) for _ in range(n)]


def decode_rate(stamps: Stamps, new: int) -> float:
    """Tokens a second, all streams together, from the moment when each has its first token until the last token.

    An event may hold two tokens, so a stream's events stand for its `new` tokens evenly.
    """
    begin, end = max(s[0] for s in stamps), max(s[-1] for s in stamps)
    tokens = sum(sum(at > begin for at in s) / (len(s) - 1) * (new - 1) for s in stamps)
    return tokens / (end - begin)


def total_rate(stamps: Stamps, new: int) -> float:
    """Tokens a second, all streams together, prompts included in the time."""
    return len(stamps) * new / max(s[-1] for s in stamps)


def first_token_ms(stamps: Stamps) -> float:
    return statistics.mean(s[0] for s in stamps) * 1000


@dataclass
class Row:
    """One line of the table: a figure of every subject, once a round."""
    what: str
    more_is_better: bool = True
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, subject: str, value: float):
        self.values.setdefault(subject, []).append(value)

    def median(self, subject: str) -> float | None:
        return statistics.median(self.values[subject]) if self.values.get(subject) else None

    def cell(self, subject: str) -> str:
        values = self.values.get(subject)
        if not values:
            return "-"
        spread = f" ({digits(min(values))} to {digits(max(values))})" if len(values) > 1 else ""
        return digits(statistics.median(values)) + spread

    def ratio(self, ours: str, theirs: str) -> str:
        """Above 1: ours is ahead."""
        if self.what == NOISE:
            return ""
        a, b = self.median(ours), self.median(theirs)
        return f"{(a / b if self.more_is_better else b / a):.2f}" if a and b else "-"


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class Report:
    """The figures of a run, and the table they make."""

    def __init__(self):
        self.rows: dict[str, Row] = {}

    def add(self, subject: Subject, what: str, value: float, more_is_better: bool = True):
        self.rows.setdefault(what, Row(what, more_is_better)).add(subject.name, value)

    def relate(self, what: str, share: str, limit: float):
        """Puts a row's figures as parts of a limit."""
        row = self.rows[what]
        row.what, row.values = share, {name: [v / limit for v in values] for name, values in row.values.items()}

    def table(self, names: list[str]) -> str:
        ours = [name for name in names if name.startswith("baton")]
        pairs = [(a, b) for a in ours for b in names if b not in ours]
        lines = [["", *names, *(f"{a} : {b}" for a, b in pairs)]]
        lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
        for row in self.rows.values():
            lines.append([row.what, *map(row.cell, names), *(row.ratio(*pair) for pair in pairs)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Limits:
    """What the machine did at its best on these cores, among the rounds; see machine.py."""

    def __init__(self, cores: list[int]):
        self.cores = cores
        self.best: dict[str, float] = {}

    def measure(self):
        command = [sys.executable, HERE / "machine.py", str(len(self.cores))]
        with subjects.pinned(self.cores):
            done = subprocess.run(command, check=True, timeout=120, capture_output=True)
        for name, rate in json.loads(done.stdout).items():
            self.best[name] = max(rate, self.best.get(name, 0))

    def __str__(self) -> str:
        return ", ".join(f"{name} {digits(rate)}" for name, rate in self.best.items())


def measure(subject: Subject, report: Report):
    """One turn of one subject."""
    subject.streams([fresh(64)], 8)
    for batch in BATCHES:
        rate = decode_rate(subject.streams([fresh(16) for _ in range(batch)], NEW), NEW)
        report.add(subject, f"decode, batch {batch}, tokens/s", rate)
        if batch == 1:
            report.add(subject, READING, rate * subject.weights / 1e9)
    for length in PREFILLS:
        seconds = subject.streams([fresh(length)], 1)[0][0]
        report.add(subject, f"prefill, {length} tokens, tokens/s", length / seconds)
    stamps = subject.streams([fresh(64) for _ in range(8)], NEW)
    report.add(subject, "8 conversations, output tokens/s", total_rate(stamps, NEW))
    report.add(subject, "8 conversations, mean time to first token, ms", first_token_ms(stamps), False)


def start(args: argparse.Namespace, place: Place, running: list[Subject]):
    """Starts what is installed, one after the other, into `running`; each waits, stopped, for its turn."""
    makers = {"baton-q4_1": lambda: Baton("q4_1", place, args.baton_flags),
              "baton-bf16": lambda: Baton("bf16", place, f"{args.baton_flags} {args.baton_bf16_flags}"),
              "llama-q4_1": lambda: LlamaCpp("q4_1", place),
              "llama-q4_0": lambda: LlamaCpp("q4_0", place),
              "vllm-bf16": lambda: Vllm(place, args.vllm_flags)}
    for key in args.only or SUBJECTS:
        say(f"starting {key}")
        try:
            running.append(makers[key]())
        except Unavailable as error:
            say(f"skipped {key}: {error}")
            continue
        running[-1].streams([fresh(3)], 2)
        running[-1].pause()


def asking_side(cores: list[int]) -> list[psutil.Process]:
    """This process, where it has to share the subject's cores."""
    return [psutil.Process()] if os.sched_getaffinity(0) & set(cores) else []


def rounds(running: list[Subject], n: int, report: Report, limits: Limits):
    """Interleaved turns. A subject that fails loses its further turns, not the figures it has."""
    for turn in range(n):
        limits.measure()
        for subject in list(running):
            say(f"round {turn + 1} of {n}: {subject.name}")
            subject.resume()
            try:
                watch = Watch(subject.cores, subject.family() + asking_side(subject.cores))
                measure(subject, report)
                report.add(subject, NOISE, watch.share(), False)
                if turn == n - 1:
                    report.add(subject, "peak memory, MB", subject.peak_mb(), False)
                subject.pause()
            except FAILURES as error:
                say(f"{subject.name} failed and is left out from here: {error!r}")
                running.remove(subject)
                subject.stop()


def say(line: str):
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="cores, and threads, of every subject")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, help="subjects; default: all")
    parser.add_argument("--baton-flags", default="", help="for both of baton's servers, as one argument")
    parser.add_argument("--baton-bf16-flags", default="", help="for the one that serves the bf16 folder")
    parser.add_argument("--vllm-flags", default="", help="such as --enforce-eager, which starts sooner and runs slower")
    parser.add_argument("--gguf", type=pathlib.Path, help="default: what `baton fetch smollm2` names")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the raw figures")
    return parser.parse_args()


def gguf_of_baton() -> pathlib.Path:
    found = subprocess.run([subjects.BATON, "fetch", "smollm2"], check=True, timeout=600, capture_output=True, text=True)
    return pathlib.Path(found.stdout.strip())


def run(args: argparse.Namespace, place: Place, report: Report, limits: Limits) -> list[str]:
    """Starts, measures and ends all subjects; their names, in the order of the table."""
    running: list[Subject] = []
    try:
        start(args, place, running)
        started = list(running)
        rounds(running, args.rounds, report, limits)
    finally:
        for subject in running:
            subject.stop()
        for child in psutil.Process().children(recursive=True):
            child.kill()
    for subject in started:
        report.add(subject, "start to ready, s", subject.ready_s, False)
    return [subject.name for subject in started]


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    everywhere = sorted(os.sched_getaffinity(0))
    cores, rest = everywhere[:args.threads], everywhere[args.threads:]
    place = Place(cores, args.gguf or gguf_of_baton(), CACHE)
    os.sched_setaffinity(0, rest or everywhere)
    report, limits = Report(), Limits(cores)
    names = run(args, place, report, limits)
    if not report.rows:
        sys.exit("nothing was measured")
    report.relate(READING, SHARE, limits.best["read GB/s"])
    print(f"{time.strftime('%Y-%m-%d')}, {len(cores)} of {os.cpu_count()} cores, {args.rounds} rounds")
    print(f"machine, best of the rounds: {limits}\n")
    print(report.table(names))
    print("\nMedian (lowest to highest). Ratios above 1: baton is ahead.")
    if args.json:
        figures = {row.what: row.values for row in report.rows.values()}
        args.json.write_text(json.dumps({"machine": limits.best, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
