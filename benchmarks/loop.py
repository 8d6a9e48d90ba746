"""Times whole training iterations of `DreamerTorch`, split by what they do.

    python benchmarks/loop.py --size 1M --env dmc/walker-walk --json loop.json

Local env runner, local learner. The parts are env steps, the policy, adding to the replay, sampling
from it, writing latents back, and updates; `overhead` is all the rest: connectors, episodes,
metrics, RLlib, the report that ends an iteration. `--env noise` steps an env that costs nothing,
for 64x64x3 frames of noise.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import ray
import typer
from common import Figure, Observation, report

from rllib_dreamer import DreamerConfig, DreamerTorch

PARTS = ("env", "policy", "replay add", "replay sample", "replay write back", "update")
TARGET_OVERHEAD = 0.05


class NoiseEnv(gym.Env):
    """Frames of noise, drawn beforehand; episodes of 500 steps."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def __init__(self, config: dict[str, Any]) -> None:
        self._frames = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode."""
        self._t = 0
        return self._frames[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes no notice of the action."""
        self._t += 1
        return self._frames[self._t % 64], 0.0, False, self._t == 500, {}


class Stopwatch:
    """Times methods of objects; a method called within another one counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._mark = 0.0

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Counts what a method of an object takes as that part."""
        call: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._switch(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._switch(None)

        setattr(owner, method, watched)

    def _switch(self, part: str | None) -> None:
        """Enters a part, or leaves the present one."""
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._mark
        if part is None:
            self._running.pop()
        else:
            self._running.append(part)
        self._mark = now


def watch_algorithm(algo: DreamerTorch) -> Stopwatch:
    """A stopwatch on the parts of an algorithm."""
    watch, runner = Stopwatch(), algo.env_runner
    watch.watch(runner.env, "step", "env")
    watch.watch(runner.env, "reset", "env")
    watch.watch(runner.module, "forward_exploration", "policy")
    watch.watch(algo.replay, "add", "replay add")
    watch.watch(algo._batches, "next", "replay sample")
    watch.watch(algo.replay, "update_latents", "replay write back")
    watch.watch(algo.learner_group, "update", "update")
    return watch


def build(
    env: str, size: str, obs: Observation, seconds: float, training: dict[str, Any]
) -> DreamerTorch:
    """The algorithm, with its replay filled as far as the first update needs."""
    kind = {"observation": "pixels" if obs is Observation.image else "proprio"}
    config = (
        DreamerConfig()
        .environment(NoiseEnv if env == "noise" else env, env_config=kind)
        .training(**{"model_size": size, "replay_capacity": 20_000} | training)
        .reporting(min_time_s_per_iteration=seconds)
        .debugging(seed=0, log_level="ERROR")
    )
    algo = config.build_algo()
    train(algo, 2)
    return algo


def train(algo: DreamerTorch, updates: int) -> int:
    """Trains for at least so many updates, returns how many they were."""
    before = done = algo._updates
    while done < before + updates:
        done = algo.train()["dreamer"]["updates"]
    return done - before


def figures(name: str, seconds: dict[str, float], wall: float, updates: int) -> list[Figure]:
    """Each part as milliseconds an update and as its share of the time."""
    parts = {part: seconds.get(part, 0.0) for part in PARTS}
    parts["overhead"] = wall - sum(parts.values())
    targets = {"overhead": TARGET_OVERHEAD}
    beside = f"all of it {1e3 * wall / updates:.4g} ms"
    return [
        Figure(
            f"loop {name}, {part}",
            1e3 * found / updates,
            "ms/update",
            beside=beside,
            ratio=found / wall,
            target_ratio=targets.get(part),
        )
        for part, found in parts.items()
    ]


def main(
    env: Annotated[str, typer.Option(help='"noise", or one of `dmc/`.')] = "dmc/walker-walk",
    size: Annotated[str, typer.Option(help="Model size, 1M ... 400M.")] = "1M",
    obs: Annotated[Observation, typer.Option(help="Pixels or proprioception.")] = Observation.image,
    precision: Annotated[str, typer.Option(help="Compute type.")] = "auto",
    ratio: Annotated[float, typer.Option(help="Training ratio.")] = 256.0,
    batch: Annotated[int, typer.Option(help="Rows, B.")] = 16,
    length: Annotated[int, typer.Option(help="Steps of a row, T.")] = 64,
    updates: Annotated[int, typer.Option(help="Updates timed.")] = 20,
    seconds: Annotated[float, typer.Option(help="Least seconds of an iteration.")] = 5.0,
    json_: Annotated[Path | None, typer.Option("--json", help="Writes the figures.")] = None,
) -> None:
    """Times whole training iterations."""
    ray.init("local", include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    training = {"training_ratio": ratio, "batch_size_B": batch, "batch_length_T": length}
    algo = build(env, size, obs, seconds, training | {"precision": precision})
    try:
        watch = watch_algorithm(algo)
        begin, done = time.perf_counter(), train(algo, updates)
        wall = time.perf_counter() - begin
    finally:
        algo.stop()
    rows = figures(f"{size} {obs.value} {env}", watch.seconds, wall, done)
    report(f"training loop, ratio {ratio:g}, B={batch}, T={length}", rows, json_)


if __name__ == "__main__":
    typer.run(main)
