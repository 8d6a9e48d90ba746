"""Times agent steps of our envs beside the simulators' own rendering and wrappers.

    python benchmarks/env_step.py --rounds 5 --json env_step.json

Each row plays the same actions at action repeat 2, or 4 for Atari, in the same process; the
programs of a comparison take turns, so that load from elsewhere falls on all of them. The ratio is
to the reference of the comparison. The last rows step several envs in parallel processes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gymnasium as gym
import numpy as np
import typer
from common import Figure, figure, median_ratio, report

from rllib_dreamer import envs
from rllib_dreamer.envs import rendering
from rllib_dreamer.envs.robosuite import load_robosuite

Step = Callable[[Any], Any]


class Program(NamedTuple):
    """One way to step an env."""

    name: str
    build: Callable[[], tuple[Step, Callable[[], Any]]]  # step(action), close()
    reference: bool = False


class Comparison(NamedTuple):
    """Programs that play the same thing, and what they are fed."""

    name: str
    programs: list[Program]
    action: Callable[[np.random.Generator], Any]
    target: float | None = None


def playing(env: gym.Env) -> tuple[Step, Callable[[], Any]]:
    """Returns a step of the env, which resets it at the end of an episode, and its close."""
    env.reset(seed=0)

    def step(action: Any) -> None:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()

    return step, env.close


def ours(name: str, **config: Any) -> Callable[[], tuple[Step, Callable[[], Any]]]:
    """Returns a builder of one of our envs."""
    return lambda: playing(envs.make_env(name, config))


def plain_dm_control() -> tuple[Step, Callable[[], Any]]:
    """dm_control's walker, drawn by `physics.render` once an agent step."""
    from dm_control import suite

    env = suite.load("walker", "walk", task_kwargs={"random": 0})
    env.reset()

    def step(action: Any) -> None:
        for _ in range(2):
            if env.step(action).last():
                env.reset()
        env.physics.render(64, 64, camera_id=0)

    return step, env.physics.free


def plain_robosuite() -> tuple[Step, Callable[[], Any]]:
    """The GymWrapper of robosuite over Lift with one camera, at action repeat 2."""
    suite = load_robosuite()
    from robosuite.wrappers import GymWrapper

    env = suite.make(
        "Lift",
        robots="Panda",
        has_renderer=False,
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names="agentview",
        camera_heights=64,
        camera_widths=64,
        hard_reset=False,
        horizon=500,
    )
    context = env.sim._render_context_offscreen
    env = GymWrapper(env, keys=["agentview_image"], flatten_obs=False)
    env.reset()

    def step(action: Any) -> None:
        context.gl_ctx.make_current()  # it would draw into the context of another env
        for _ in range(2):
            if env.step(action)[2]:
                env.reset()

    return step, env.close


def gymnasium_atari() -> tuple[Step, Callable[[], Any]]:
    """Gymnasium's AtariPreprocessing with colours."""
    import ale_py
    from gymnasium.wrappers import AtariPreprocessing

    gym.register_envs(ale_py)
    env = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    return playing(AtariPreprocessing(env, screen_size=64, grayscale_obs=False))


def in_parallel(name: str, count: int, **config: Any) -> Callable[[], Any]:
    """Returns a builder of `count` of our envs in processes of their own."""

    def build() -> tuple[Step, Callable[[], Any]]:
        makers = [lambda: envs.make_env(name, config)] * count
        vector = gym.vector.AsyncVectorEnv(makers, context="spawn")
        vector.reset(seed=0)
        return (lambda action: vector.step(np.stack([action] * count))), vector.close

    return build


def comparisons(cores: int) -> list[Comparison]:
    """Returns every comparison; dm_control and robosuite have the targets of the project."""

    def box(size: int) -> Callable[[np.random.Generator], Any]:
        return lambda rng: rng.uniform(-1, 1, size).astype(np.float32)

    return [
        Comparison(
            "dmc/walker-walk, 64x64, repeat 2",
            [
                Program("dm_control's own rendering", plain_dm_control, reference=True),
                Program("render='exact'", ours("dmc/walker-walk", render="exact")),
                Program("render='fast' (default)", ours("dmc/walker-walk")),
                Program("render='faster'", ours("dmc/walker-walk", render="faster")),
            ],
            box(6),
            1.4,
        ),
        Comparison(
            "robosuite/Lift, 64x64, repeat 2",
            [
                Program("robosuite's GymWrapper", plain_robosuite, reference=True),
                Program("render='exact'", ours("robosuite/Lift", action_repeat=2, render="exact")),
                Program("render='fast' (default)", ours("robosuite/Lift", action_repeat=2)),
                Program(
                    "render='faster'", ours("robosuite/Lift", action_repeat=2, render="faster")
                ),
            ],
            box(7),
            2.0,
        ),
        Comparison(
            "Pong, 64x64 RGB, repeat 4",
            [
                Program("Gymnasium's AtariPreprocessing", gymnasium_atari, reference=True),
                Program("atari100k/pong", ours("atari100k/pong")),
            ],
            lambda rng: int(rng.integers(6)),
        ),
        Comparison(
            "CartPole-v1",
            [
                Program("gym.make", gym_cartpole, reference=True),
                Program("with our checks", ours("CartPole-v1")),
            ],
            lambda rng: int(rng.integers(2)),
        ),
        Comparison(
            f"dmc/walker-walk in {cores} processes",
            [
                Program("one env", ours("dmc/walker-walk"), reference=True),
                Program(f"{cores} envs, steps of all", in_parallel("dmc/walker-walk", cores)),
            ],
            box(6),
        ),
    ]


def gym_cartpole() -> tuple[Step, Callable[[], Any]]:
    """Plain CartPole."""
    return playing(gym.make("CartPole-v1"))


def steps_per_second(step: Step, actions: list[Any], seconds: float) -> float:
    """Steps for about `seconds` and returns the rate."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or count == 0:
        step(actions[count % len(actions)])
        count += 1
    return count / elapsed


def run(comparison: Comparison, rounds: int, seconds: float, cores: int) -> list[Figure]:
    """Times the programs of a comparison in turn; a figure of each, beside the reference."""
    rng = np.random.default_rng(0)
    actions = [comparison.action(rng) for _ in range(64)]
    built = [program.build() for program in comparison.programs]
    rates: list[list[float]] = [[] for _ in built]
    for turn in range(rounds + 1):
        for program, (step, _), measured in zip(comparison.programs, built, rates, strict=True):
            envs_at_once = cores if program.name.endswith("steps of all") else 1
            rate = envs_at_once * steps_per_second(step, actions, seconds)
            if turn > 0:  # the first turn compiles and fills caches
                measured.append(rate)
    for _, close in built:
        close()
    base = next(r for p, r in zip(comparison.programs, rates, strict=True) if p.reference)
    found = []
    for program, measured in zip(comparison.programs, rates, strict=True):
        more: dict[str, Any] = {"higher": True}
        if not program.reference:
            more["beside"] = f"{statistics.median(base):.4g} steps/s"
            more["ratio"] = median_ratio(measured, base)
        if "default" in program.name:
            more["target_ratio"] = comparison.target
        found.append(figure(f"{comparison.name}: {program.name}", measured, "steps/s", **more))
    return found


def main(
    rounds: Annotated[int, typer.Option(help="Timed turns of each program.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds a turn.")] = 2.0,
    only: Annotated[str, typer.Option(help="Only comparisons with this in their name.")] = "",
    processes: Annotated[int, typer.Option(help="Parallel envs; 0: the cores there are.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows.")] = None,
) -> None:
    """Prints the table."""
    rendering.setup_rendering()
    cores = processes or len(os.sched_getaffinity(0))
    figures: list[Figure] = []
    for comparison in comparisons(cores):
        if only in comparison.name:
            figures += run(comparison, rounds, seconds, cores)
    report("agent steps per second", figures, json_file)


if __name__ == "__main__":
    typer.run(main)
