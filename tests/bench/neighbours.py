"""How much of a subject's cores other work took while it was measured: figures taken beside much of it are worth little."""
import os
import pathlib
import time

import psutil

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def busy_s(cores: list[int]) -> float:
    """Seconds that these cores did not idle since the machine started; time the hypervisor took away counts as busy."""
    lines = pathlib.Path("/proc/stat").read_text().splitlines()
    ticks = {line.split()[0]: [int(n) for n in line.split()[1:9]] for line in lines if line.startswith("cpu")}
    columns = [sum(column) for column in zip(*(ticks[f"cpu{core}"] for core in cores))]
    user, nice, system, _idle, _iowait, irq, softirq, steal = columns
    return (user + nice + system + irq + softirq + steal) * TICK_S


def own_s(processes: list[psutil.Process]) -> float:
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


class Watch:
    """From its making until `share`: the part of the cores' time that went neither to `processes` nor to idling."""

    def __init__(self, cores: list[int], processes: list[psutil.Process]):
        self.cores, self.processes = cores, processes
        self.start, self.busy, self.own = time.perf_counter(), busy_s(cores), own_s(processes)

    def share(self) -> float:
        others = busy_s(self.cores) - self.busy - (own_s(self.processes) - self.own)
        return max(0.0, others / (time.perf_counter() - self.start) / len(self.cores))
