"""Watches the memory of a training run whose replay is full: it must not grow any more.

    python benchmarks/memory.py --minutes 30 --json memory.json

The replay is filled by sampling alone, then `DreamerTorch` trains with a local env runner and a
local learner, and the resident memory of the process is read after every update. The first tenth of
the readings, during which PyTorch allocates what it needs, does not count.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import psutil
import ray
import typer
from common import Figure, Observation, figure, report
from loop import build, train

from rllib_dreamer import DreamerTorch

TARGET_GROWTH = 1.01


class Reading(NamedTuple):
    """Resident memory, GiB, at a time since the beginning, seconds."""

    seconds: float
    gib: float


def fill(algo: DreamerTorch) -> None:
    """Samples until the replay has evicted its first steps, and forgets the updates owed."""
    while algo.replay.stats()["inserts"] <= algo.config.replay_capacity:
        algo._sample()
    algo._ratio.updates(algo._agent_steps)


def watch(algo: DreamerTorch, seconds: float) -> list[Reading]:
    """Trains for a time; the memory after each update."""
    process, begin, readings = psutil.Process(), time.monotonic(), []
    while len(readings) < 2 or readings[-1].seconds < seconds:
        train(algo, 1)
        gib = process.memory_info().rss / 2**30
        readings.append(Reading(time.monotonic() - begin, gib))
    return readings


def figures(name: str, readings: list[Reading]) -> list[Figure]:
    """Memory in the second tenth of the readings, and in the last beside it."""
    tenth = max(1, len(readings) // 10)
    first = [reading.gib for reading in readings[tenth : 2 * tenth]]
    last = [reading.gib for reading in readings[-tenth:]]
    return [
        figure(f"memory {name}, replay just full", first, "GiB"),
        figure(
            f"memory {name}, {readings[-1].seconds / 60:.3g} minutes later",
            last,
            "GiB",
            beside=f"replay just full {median(first):.4g} GiB",
            ratio=median(last) / median(first),
            target_ratio=TARGET_GROWTH,
        ),
    ]


def main(
    env: Annotated[str, typer.Option(help='"noise", or one of `dmc/`.')] = "noise",
    size: Annotated[str, typer.Option(help="Model size, 1M ... 400M.")] = "1M",
    obs: Annotated[Observation, typer.Option(help="Pixels or proprioception.")] = Observation.image,
    capacity: Annotated[int, typer.Option(help="Steps in the replay.")] = 5000,
    batch: Annotated[int, typer.Option(help="Rows, B.")] = 16,
    length: Annotated[int, typer.Option(help="Steps of a row, T.")] = 64,
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 30.0,
    json_: Annotated[Path | None, typer.Option("--json", help="Writes the figures.")] = None,
) -> None:
    """Watches the memory of a long run."""
    ray.init("local", include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    shape = {"batch_size_B": batch, "batch_length_T": length}
    algo = build(env, size, obs, 0.0, shape | {"replay_capacity": capacity})
    try:
        fill(algo)
        readings = watch(algo, 60 * minutes)
    finally:
        algo.stop()
    rows = figures(f"{size} {obs.value} {env}", readings)
    report(f"memory, replay of {capacity:,} steps", rows, json_, readings=readings)


if __name__ == "__main__":
    typer.run(main)
