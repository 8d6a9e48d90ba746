"""Times one step of the policy: encoder, recurrent step, actor, for 1 and 16 envs.

    python benchmarks/policy_step.py --size 12M --json policy_step.json

The plain and the fused form take turns in one process, step by step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from common import Figure, Observation, figure, median_ratio, report, timed
from updates import Case, build, observation, prepare

from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.fuse import fusing

ENVS = (1, 16)
TARGET_MS = 2.0
WARMUP = 10


def step_times(agent: Agent, obs: str, envs: int, steps: int) -> dict[bool, list[float]]:
    """Milliseconds of every step, by whether it was fused."""
    times: dict[bool, list[float]] = {False: [], True: []}
    leaves, state = observation(obs, (envs,)), agent.initial_state(envs)
    for step in range(WARMUP + steps):
        for fused, found in times.items():
            with fusing(fused):
                seconds = timed(lambda: agent.act(leaves, state, explore=True)).wall
            if step >= WARMUP:
                found.append(1e3 * seconds)
    return times


def row_of(name: str, envs: int, times: dict[bool, list[float]]) -> Figure:
    """The fused form beside the plain one."""
    plain = figure("", times[False], "ms").value
    return figure(
        f"policy step {name}, {envs} env{'s' if envs > 1 else ''}",
        times[True],
        "ms",
        beside=f"plain {plain:.3g} ms",
        ratio=median_ratio(times[True], times[False]),
        target=TARGET_MS if envs == 1 else None,
    )


def main(
    size: Annotated[str, typer.Option(help="Model size, 1M ... 400M.")] = "12M",
    obs: Annotated[Observation, typer.Option(help="Observation.")] = Observation.image,
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves it to PyTorch.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps timed.")] = 200,
    json_: Annotated[Path | None, typer.Option("--json", help="Writes the figures.")] = None,
) -> None:
    """Times one step of the policy."""
    prepare(threads)
    agent = build(Case(size, obs.value), "cpu")
    agent.keep_acting_parts()
    rows = [
        row_of(f"{size} {obs.value}", envs, step_times(agent, obs.value, envs, steps))
        for envs in ENVS
    ]
    report(f"one step of the policy, {torch.get_num_threads()} threads", rows, json_)


if __name__ == "__main__":
    typer.run(main)
