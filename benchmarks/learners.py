"""Times an update of two learners beside one with the same global batch, and the all-reduce in it.

    python benchmarks/learners.py --size 12M --json learners.json

Learners are remote processes that share this machine's cores, as `num_learners` makes them: one has
all cores for its threads, two have half of them each. Both groups are alive and take turns. The
all-reduce is that of one float32 for each parameter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import ray
import torch
import typer
from common import Figure, Observation, figure, median_ratio, report, timed
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from updates import ACTION, FRAME, VECTOR, Case, synthetic_batch

from rllib_dreamer import DreamerConfig

COUNTS = (1, 2)


def learner_group(count: int, case: Case) -> LearnerGroup:
    """A group of so many remote learners."""
    image = case.obs == "image"
    obs = gym.spaces.Box(0, 255, FRAME, np.uint8) if image else gym.spaces.Box(-1, 1, (VECTOR,))
    actions = gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    config = (
        DreamerConfig()
        .environment(observation_space=obs, action_space=actions)
        .training(
            model_size=case.size,
            precision=case.precision,
            batch_size_B=case.batch,
            batch_length_T=case.length,
            learner_threads=case.threads or "auto",
        )
        .learners(num_learners=count, num_cpus_per_learner=1)
    )
    return config.build_learner_group(spaces={DEFAULT_MODULE_ID: (obs, actions)})


def shards(case: Case, count: int, deter: int) -> list[MultiAgentBatch]:
    """The global batch, cut in rows for the learners."""
    batch = {k: x.numpy() for k, x in synthetic_batch(case, deter, "cpu").items()}
    rows = case.batch // count
    cut = [{k: x[i * rows : (i + 1) * rows] for k, x in batch.items()} for i in range(count)]
    steps = rows * case.length
    return [MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(c)}, env_steps=steps) for c in cut]


def update_of(group: LearnerGroup, case: Case, count: int) -> Callable[[], Any]:
    """One update of the group."""
    deter = group.foreach_learner(lambda learner: learner.agent().world.config.deter)
    batches = shards(case, count, next(iter(deter)).get())
    return lambda: group.update(batches=batches, timesteps={})


def reduce_gradients(learner: Any) -> tuple[float, int]:
    """Seconds of one all-reduce of all gradients at once, and their bytes."""
    parameters = [p for p in learner.agent().parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters))
    torch.distributed.barrier()
    start = time.perf_counter()
    torch.distributed.all_reduce(flat)
    return time.perf_counter() - start, flat.numel() * flat.element_size()


def measure(case: Case, rounds: int, warmup: int) -> tuple[dict[int, list[float]], list[Any]]:
    """Seconds an update by the number of learners, and all-reduces: (seconds, bytes)."""
    groups = {count: learner_group(count, case) for count in COUNTS}
    try:
        updates = {count: update_of(group, case, count) for count, group in groups.items()}
        walls: dict[int, list[float]] = {count: [] for count in COUNTS}
        for turn in range(warmup + rounds):
            for count, update in updates.items():
                wall = timed(update).wall
                if turn >= warmup:
                    walls[count].append(wall)
        reduces = [
            result.get()
            for _ in range(warmup + rounds)
            for result in groups[2].foreach_learner(reduce_gradients)
        ]
    finally:
        for group in groups.values():
            group.shutdown()
    return walls, reduces[2 * warmup :]


def figures(name: str, walls: dict[int, list[float]], reduces: list[Any]) -> list[Figure]:
    """The rows: two learners beside one, the all-reduce beside the update."""
    one, two = (figure("", walls[count], "s").value for count in COUNTS)
    reduce = figure("", [1e3 * seconds for seconds, _ in reduces], "ms")
    megabytes = reduces[0][1] / 1e6
    return [
        figure(f"update of one learner {name}", walls[1], "s"),
        figure(
            f"update of two learners {name}",
            walls[2],
            "s",
            beside=f"one learner {one:.3g} s",
            ratio=median_ratio(walls[2], walls[1]),
        ),
        reduce._replace(
            what=f"all-reduce of {megabytes:.1f} MB {name}",
            beside=f"update of two learners {two:.3g} s",
            ratio=reduce.value / 1e3 / two,
        ),
    ]


def main(
    size: Annotated[str, typer.Option(help="Model size, 1M ... 400M.")] = "1M",
    obs: Annotated[Observation, typer.Option(help="Observation.")] = Observation.image,
    precision: Annotated[str, typer.Option(help="Compute type.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads a learner; 0: the cores, shared.")] = 0,
    batch: Annotated[int, typer.Option(help="Rows over all learners, B.")] = 16,
    length: Annotated[int, typer.Option(help="Steps of a row, T.")] = 64,
    rounds: Annotated[int, typer.Option(help="Updates timed.")] = 5,
    warmup: Annotated[int, typer.Option(help="Updates before that.")] = 2,
    json_: Annotated[Path | None, typer.Option("--json", help="Writes the figures.")] = None,
) -> None:
    """Times groups of learners."""
    ray.init(
        "local", num_cpus=4, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True
    )
    case = Case(size, obs.value, precision, threads=threads, batch=batch, length=length)
    walls, reduces = measure(case, rounds, warmup)
    name = f"{size} {obs.value} {precision}"
    report(f"learners, B={batch}, T={length}", figures(name, walls, reduces), json_)


if __name__ == "__main__":
    typer.run(main)
