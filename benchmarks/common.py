"""What the benchmarks share: figures and their table, the machine, programs in fresh processes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from enum import Enum
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What of a CPU's abilities decides how fast an update is.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
HEADER = ("what", "median", "least to most", "beside it", "ratio", "target", "met")


class Observation(str, Enum):
    """What the model sees: a 64x64x3 frame, or a vector of 24 numbers."""

    image = "image"
    vector = "vector"


class Precision(str, Enum):
    """Compute type."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    """Where it runs."""

    cpu = "cpu"
    cuda = "cuda"


class Figure(NamedTuple):
    """One row of the table.

    Attributes:
        what: What was measured.
        value: Median.
        unit: Its unit.
        least: Smallest of what was measured; None if it was measured once.
        most: Largest.
        beside: What the ratio is to, with its own value.
        ratio: Value over the reference's, the median of the rounds in which both took turns.
        target: Bound on the value, if there is one.
        target_ratio: Bound on the ratio, if there is one.
        higher: Whether the bound is a lower one.
    """

    what: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    beside: str = ""
    ratio: float | None = None
    target: float | None = None
    target_ratio: float | None = None
    higher: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        bound, found = self.target, self.value
        if self.target_ratio is not None and self.ratio is not None:
            bound, found = self.target_ratio, self.ratio
        if bound is None:
            return None
        return found >= bound if self.higher else found <= bound

    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell for each column of `HEADER`."""
        spread = "" if self.least is None else f"{self.least:.4g} to {self.most:.4g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        sign, target = ">=" if self.higher else "<=", ""
        if self.target_ratio is not None and self.ratio is not None:
            target = f"ratio {sign} {self.target_ratio:g}"
        elif self.target is not None:
            target = f"{sign} {self.target:g} {self.unit}"
        met = {None: "", True: "yes", False: "no"}[self.met]
        return self.what, f"{self.value:.4g} {self.unit}", spread, self.beside, ratio, target, met


def figure(what: str, values: Sequence[float], unit: str, **more: Any) -> Figure:
    """The figure of repeated measurements: their median and spread."""
    return Figure(what, statistics.median(values), unit, min(values), max(values), **more)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, versions, what else ran, and when."""
    info = Path("/proc/cpuinfo")
    fields = [line.partition(":") for line in info.read_text().splitlines() if ":" in line]
    cpu = {name.strip(): value.strip() for name, _, value in fields}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [name for name in CPU_FLAGS if name in cpu.get("flags", "").split()],
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": [round(x, 2) for x in os.getloadavg()],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def report(title: str, figures: Sequence[Figure], path: Path | None, **details: Any) -> None:
    """Prints the figures as a table and writes them as JSON.

    Args:
        title: Of the table.
        figures: The rows.
        path: JSON file, or None for no file. Its keys: `title`, `machine`, `figures`, each with
            the attributes of `Figure` and `met`, and `details`.
        **details: Everything else worth keeping, such as single measurements.
    """
    table = Table(*HEADER, title=title)
    for row in figures:
        table.add_row(*row.cells())
    Console().print(table)
    if path is not None:
        rows = [row._asdict() | {"met": row.met} for row in figures]
        content = {"title": title, "machine": machine(), "figures": rows, "details": details}
        path.write_text(json.dumps(content, indent=1))


class Sample(NamedTuple):
    """Seconds that one call took: passed, and of CPU time over all threads of the process."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> Sample:
    """Times one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def peak_rss_gib() -> float:
    """Most memory that this process ever had resident, GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**20


_built: Any = None


def _build(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _built
    _built = function(*args)


def _call(function: Callable[..., Any]) -> Any:
    return function(_built)


class Program:
    """A callable to be timed, in a fresh process that builds it once and keeps it.

    Args:
        build: Function at the top of a module that returns the callable; called in the process.
        *args: Its arguments.
    """

    def __init__(self, build: Callable[..., Callable[[], Any]], *args: Any) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._process.submit(_build, build, args).result()

    def ask(self, function: Callable[[Any], Any]) -> Any:
        """Calls a function in the process with what was built, and returns its result."""
        return self._process.submit(_call, function).result()

    def close(self) -> None:
        """Ends the process."""
        self._process.shutdown()


def take_turns(
    programs: Mapping[str, Program], rounds: int, warmup: int = 2
) -> dict[str, list[Sample]]:
    """Times programs in turn, so that whatever else the machine does falls on all of them.

    Args:
        programs: By name.
        rounds: Timed calls of each.
        warmup: Calls before, not counted.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in programs}
    for turn in range(warmup + rounds):
        for name, program in programs.items():
            sample = program.ask(timed)
            if turn >= warmup:
                samples[name].append(sample)
    return samples


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
