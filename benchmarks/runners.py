"""Agent steps a second of env runners: how many, how many envs each, in one process or in several.

    python benchmarks/runners.py --json runners.json

Sampling alone, as `DreamerTorch` does it: 0 runners step in the main process, others are processes
of their own which a round is asked of at once. All share the cores of this machine, so that more
runners than cores cannot be faster here. The ratio is to the first row, one local env by default.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import ray
import typer
from common import Observation, Program, figure, median_ratio, report
from loop import NoiseEnv

from rllib_dreamer import DreamerConfig, DreamerTorch


class Case(NamedTuple):
    """Env runners of one kind."""

    env: str
    obs: Observation
    runners: int
    envs: int
    mode: str

    def __str__(self) -> str:
        where = f"{self.runners} runners" if self.runners else "local"
        return f"{where} x {self.envs} envs" + (f", {self.mode}" if self.envs > 1 else "")


def build(case: Case) -> DreamerTorch:
    """The algorithm of a case, its envs built and reset."""
    ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    kind = {"observation": "pixels" if case.obs is Observation.image else "proprio"}
    config = (
        DreamerConfig()
        .environment(NoiseEnv if case.env == "noise" else case.env, env_config=kind)
        .training(model_size="1M", replay_capacity=20_000)
        .env_runners(
            num_env_runners=case.runners,
            num_envs_per_env_runner=case.envs,
            gym_env_vectorize_mode=case.mode,
        )
        .debugging(seed=0, log_level="ERROR")
    )
    algo = config.build_algo()
    algo._sample()
    return algo


def rates(algo: DreamerTorch, rounds: int, seconds: float) -> list[float]:
    """Agent steps a second, so many times over at least so many seconds."""
    return [rate(algo, seconds) for _ in range(rounds)]


def rate(algo: DreamerTorch, seconds: float) -> float:
    """Agent steps a second over at least so many seconds."""
    begin, before = time.perf_counter(), algo._agent_steps
    while time.perf_counter() - begin < seconds or algo._agent_steps == before:
        algo._sample()
    return (algo._agent_steps - before) / (time.perf_counter() - begin)


def measure(case: Case, rounds: int, seconds: float) -> list[float]:
    """`rates` in a process of its own: one that has drawn may not fork envs that draw."""
    program = Program(build, case)
    try:
        return program.ask(partial(rates, rounds=rounds, seconds=seconds))
    finally:
        program.close()


def whole_numbers(text: str) -> list[int]:
    """The numbers in "1,2,4"."""
    return [int(number) for number in text.split(",")]


def main(
    env: Annotated[str, typer.Option(help='"noise", or one of `dmc/`.')] = "dmc/walker-walk",
    obs: Annotated[Observation, typer.Option(help="Pixels or proprioception.")] = Observation.image,
    runners: Annotated[str, typer.Option(help="Numbers of runners, 0 for local.")] = "0,1,2,4",
    envs: Annotated[str, typer.Option(help="Numbers of envs of each runner.")] = "1,4",
    rounds: Annotated[int, typer.Option(help="Measurements of each.")] = 5,
    seconds: Annotated[float, typer.Option(help="Least seconds of a measurement.")] = 5.0,
    json_: Annotated[Path | None, typer.Option("--json", help="Writes the figures.")] = None,
) -> None:
    """Times env runners."""
    cases = [
        Case(env, obs, number, each, mode)
        for number in whole_numbers(runners)
        for each in whole_numbers(envs)
        for mode in (("sync", "async") if each > 1 else ("sync",))
    ]
    found = [measure(case, rounds, seconds) for case in cases]
    rows = [
        figure(
            f"sampling {env} {obs.value}, {case}",
            rates,
            "steps/s",
            beside=str(cases[0]),
            ratio=median_ratio(rates, found[0]),
        )
        for case, rates in zip(cases, found, strict=True)
    ]
    report("env runners", rows, json_)


if __name__ == "__main__":
    typer.run(main)
