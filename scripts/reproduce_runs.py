"""One seed of an experiment: training in stretches, and the evaluations on the way.

A run may be interrupted at any time, by Ctrl-C, SIGTERM or a crash; the next call goes on from its
last checkpoint. Every such stretch is on record with what it cost.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from experiments import EPISODES, EVALUATION_SEED, Experiment

from rllib_dreamer.atomic import write_text
from rllib_dreamer.evaluation.curves import Trial, find_trials, read_trial
from rllib_dreamer.hardware import available_cpus, resolve_precision

ROOT = Path(__file__).resolve().parents[1]
RLLIB = [sys.executable, "-c", "from rllib_dreamer.cli import main; main()"]
SAMPLE_SECONDS = 5.0
"""Between two looks at the processes; CPU time that a process used after the last is not seen."""


class Stretch(NamedTuple):
    """An unbroken piece of a training run.

    Attributes:
        stop: The stop condition that it was to reach.
        begun: When, in UTC.
        seconds: Wall-clock time, starting up included.
        cpu_seconds: CPU time of the command and all its descendants.
        commit: Of this repository; ends with "+" where files had changed.
        hardware: What it ran on.
        reached: Whether the stop condition was met.
    """

    stop: dict[str, float]
    begun: str
    seconds: float
    cpu_seconds: float
    commit: str
    hardware: str
    reached: bool


class CpuClock:
    """CPU time of a process and all its descendants, also of those that have ended.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}

    def read(self) -> float:
        """Looks at every process; returns seconds, user and system."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    used = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = used.user + used.system
        return sum(self._seen.values())


class SeedRun:
    """The training run of one seed.

    Args:
        experiment: What to run.
        seed: One of its seeds.
        folder: Where all runs of the experiment go.
    """

    def __init__(self, experiment: Experiment, seed: int, folder: Path) -> None:
        self.experiment, self.seed, self.folder = experiment, seed, folder
        self._record = folder / f"seed_{seed}_stretches.json"

    @property
    def tune_folder(self) -> Path:
        """The folder of its Tune experiment."""
        return self.folder / f"seed_{self.seed}"

    def stretches(self, stop: int | None = None) -> list[Stretch]:
        """What was run so far; with `stop`, up to the one that reached `experiment.stops[stop]`."""
        if not self._record.is_file():
            return []
        found = [Stretch(**values) for values in json.loads(self._record.read_text())]
        if stop is None:
            return found
        last = [i for i, s in enumerate(found) if s.reached and s.stop == self._stop(stop)]
        return found[: last[0] + 1] if last else []

    def train(self, stop: int) -> None:
        """Trains until `experiment.stops[stop]`; does nothing if that was reached before.

        Raises:
            RuntimeError: If the training fails.
            KeyboardInterrupt: If it was stopped by Ctrl-C, with a checkpoint.
        """
        if self.stretches(stop):
            return
        words = ["train", "file", str(ROOT / self.experiment.file)]
        words += ["--storage-path", str(self.folder), "--name", self.tune_folder.name]
        words += ["--stop", json.dumps(self._stop(stop)), "--keep-checkpoints-num", "1"]
        for setting in (*self.experiment.settings, f"seed={self.seed}"):
            words += ["--set", setting]
        if any(self.tune_folder.glob("experiment_state-*.json")):
            words.append("--resume")
        else:
            shutil.rmtree(self.tune_folder, ignore_errors=True)
        code = self._run_stretch(words, stop)
        if code == 130:
            raise KeyboardInterrupt
        if code != 0:
            raise RuntimeError(f"training ended with exit code {code}: see above, then try again.")

    def evaluate(self, stop: int) -> dict[str, Any]:
        """Evaluates the policy at a stop, unless that was done before; returns `metrics.json`.

        Raises:
            RuntimeError: If the evaluation fails.
        """
        folder = self._evaluation(stop)
        if not self.evaluated(stop):
            words = ["evaluate", str(self.tune_folder), "--which", "last"]
            words += ["--episodes", str(EPISODES), "--seed", str(EVALUATION_SEED)]
            words += ["--save-dir", str(folder), "--file", str(ROOT / self.experiment.file)]
            with command([*RLLIB, *words], self._environment()) as process:
                code = process.wait()
            if code != 0:
                raise RuntimeError(f"the evaluation ended with exit code {code}.")
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        with (folder / "episodes.csv").open() as rows:
            metrics["episode_returns"] = [float(row.split(",")[2]) for row in list(rows)[1:]]
        return metrics

    def evaluated(self, stop: int) -> bool:
        """Whether `evaluate(stop)` was done before; its last file is `metrics.json`."""
        return bool(self.stretches(stop)) and (self._evaluation(stop) / "metrics.json").is_file()

    def curve(self) -> Trial:
        """The learning curve so far."""
        (folder,) = find_trials(self.tune_folder)
        return read_trial(folder)

    def _evaluation(self, stop: int) -> Path:
        return self.folder / f"seed_{self.seed}_evaluation_{stop}"

    def _stop(self, number: int) -> dict[str, float]:
        return self.experiment.stops[number]

    def _environment(self) -> dict[str, str]:
        """The commands' environment: a Ray of their own, and no GPU unless the experiment is."""
        found = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        return found if self.experiment.cuda else found | {"CUDA_VISIBLE_DEVICES": ""}

    def _run_stretch(self, words: Sequence[str], stop: int) -> int:
        """Runs a training command, keeping its record up to date; returns the exit code."""
        earlier, begun = self.stretches(), time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        stretch = Stretch(
            self._stop(stop),
            f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}",
            *(0.0, 0.0),
            commit(),
            hardware(self.experiment.cuda),
            reached=False,
        )
        with command([*RLLIB, *words], self._environment()) as process:
            clock, code = CpuClock(process.pid), None
            while code is None:
                # Ctrl-C reaches the command too, which saves a checkpoint before it ends.
                with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                    code = process.wait(SAMPLE_SECONDS)
                seconds, used = time.monotonic() - begun, clock.read()
                stretch = stretch._replace(seconds=seconds, cpu_seconds=used, reached=code == 0)
                write_json(self._record, [s._asdict() for s in (*earlier, stretch)])
        return code


@contextlib.contextmanager
def command(words: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a command that ends with this process: SIGTERM, unlike Ctrl-C, reaches one of them.

    Args:
        words: The command line.
        environment: Its environment variables.

    Yields:
        The process; it is waited for at the end.
    """
    with subprocess.Popen(words, env=environment) as process:
        earlier = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            yield process
        finally:
            signal.signal(signal.SIGTERM, earlier)


def commit() -> str:
    """The commit of this repository, "+" appended where code differs from it."""
    head = _git("rev-parse", "--short=7", "HEAD")
    code = ("rllib_dreamer", "tuned_examples", "scripts")  # results are written on the way
    changed = _git("status", "--porcelain", "--", *code)
    return f"{head}+" if head and changed else head or "unknown"


def _git(*words: str) -> str:
    """Output of a git command, empty if it fails."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def hardware(cuda: bool) -> str:
    """The machine in a few words: the GPU if it is used, else the processor and its CPUs.

    AMX is named because `precision="auto"` depends on it.
    """
    count = available_cpus()
    cpus = f"{count} CPU{'s' if count > 1 else ''}"
    if resolve_precision("auto", "cpu") is torch.bfloat16:
        cpus += " with AMX"
    if cuda:
        return f"{torch.cuda.get_device_name()}, {cpus}"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{names[0]}, {cpus}"
    return f"{platform.processor() or platform.machine()}, {cpus}"


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1) + "\n")
