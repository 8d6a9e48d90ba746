"""Agent steps a second of env runners: how many, how many envs each, in one process or in several.

    python benchmarks/runners.py --json runners.json

Sampling alone, as `DreamerTorch` does it: 0 runners step in the main process, others are processes
of their own which a round is asked of at once. All share the cores of this machine, so that more
runners than cores cannot be faster here. The ratio is to the first row, one local env by default,
which takes turns with each of the others.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import ray
import typer
from common import Figure, Observation, Program, figure, median_ratio, report
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


def rate(algo: DreamerTorch, seconds: float) -> float:
    """Agent steps a second over at least so many seconds."""
    begin, before = time.perf_counter(), algo._agent_steps
    while time.perf_counter() - begin < seconds or algo._agent_steps == before:
        algo._sample()
    return (algo._agent_steps - before) / (time.perf_counter() - begin)


class Turns(NamedTuple):
    """Rates of a case, and those of the first one between them; none for the first one itself."""

    rates: list[float]
    beside: list[float]


def measure(cases: list[Case], rounds: int, seconds: float) -> list[Turns]:
    """Times each case in turn with the first one.

    Each has a process of its own: one that has drawn may not fork envs that draw. No more than two
    are alive at once, since all of them together would not fit into memory.
    """
    once = partial(rate, seconds=seconds)
    first = Program(build, cases[0])
    try:
        found = [Turns([first.ask(once) for _ in range(rounds)], [])]
        for case in cases[1:]:
            found.append(Turns([], []))
            program = Program(build, case)
            try:
                for _ in range(rounds):
                    found[-1].beside.append(first.ask(once))
                    found[-1].rates.append(program.ask(once))
            finally:
                program.close()
    finally:
        first.close()
    return found


def figures(name: str, cases: list[Case], found: list[Turns]) -> list[Figure]:
    """The rows: each case, all but the first beside the first one's rate in the same rounds."""
    rows = []
    for case, (rates, beside) in zip(cases, found, strict=True):
        more: dict[str, Any] = {}
        if beside:
            more["beside"] = f"{cases[0]} {median(beside):.4g} steps/s"
            more["ratio"] = median_ratio(rates, beside)
        rows.append(figure(f"sampling {name}, {case}", rates, "steps/s", **more))
    return rows


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
    found = measure(cases, rounds, seconds)
    report("env runners", figures(f"{env} {obs.value}", cases, found), json_)


if __name__ == "__main__":
    typer.run(main)
