"""The experiments of `make reproduce`: everything that decides a result, stated before the run.

To add one, add an entry to `EXPERIMENTS`. An entry is not changed once it has results: take a new
name.
"""

from __future__ import annotations

from typing import NamedTuple

EPISODES = 20
"""Episodes of an evaluation, played greedily by the last checkpoint."""

EVALUATION_SEED = 1_000_000
"""Episode k of every evaluation is reset with this plus k; training uses small seeds."""


class Experiment(NamedTuple):
    """One protocol, trained once for every seed.

    Attributes:
        file: Tuned example, relative to the repository.
        protocol: What a reader of the table has to know, in a few words.
        seeds: Seeds of the training runs.
        stops: Stop conditions in the order in which they are met, as `--stop` takes them; the
            policy is evaluated at each, then training goes on to the next.
        settings: Changes of the example's config, as `--set` takes them.
        reference: Published set of curves, see `rllib_dreamer.evaluation.curves.REFERENCES`.
        baseline: Experiment whose curve is drawn beside this one.
        cuda: Whether it needs a CUDA device; the others see none, even where there is one.
    """

    file: str
    protocol: str
    seeds: tuple[int, ...]
    stops: tuple[dict[str, float], ...]
    settings: tuple[str, ...] = ()
    reference: str | None = None
    baseline: str | None = None
    cuda: bool = False


_CARTPOLE_BEFORE = (
    *("precision=float32", "loss_scales.rec=1"),
    *("lr=0.001", "gamma=0.996996996996997"),
)
"""Settings of tuned_examples/cartpole.py until its present ones were found."""


def _ablation(
    protocol: str,
    *settings: str,
    seeds: tuple[int, ...] = (0, 1),
    baseline: str | None = "ablation_none",
) -> Experiment:
    """CartPole-v1 for 15,000 agent steps, the example's earlier settings, one thing changed."""
    return Experiment(
        file="tuned_examples/cartpole.py",
        protocol=f"CartPole-v1, {protocol}",
        seeds=seeds,
        stops=({"agent_steps": 15_000},),
        settings=(*_CARTPOLE_BEFORE, *settings),
        baseline=baseline if settings else None,
    )


_WALKER_BEFORE = ("model_size=1M", "gamma=0.996996996996997", "training_ratio=128")
"""Settings of tuned_examples/walker.py on a CPU until its present ones were found."""

_WALKER_3M = (
    *("model_config.deter=1024", "model_config.hidden=128", "model_config.units=128"),
    *("model_config.classes=8", "model_config.depth=8", "gamma=0.99"),
)
"""Its present size and discount, stated before the size had a name."""

EXPERIMENTS: dict[str, Experiment] = {
    "cartpole": Experiment(
        file="tuned_examples/cartpole.py",
        protocol="CartPole-v1, 10 minutes, two threads",
        seeds=(0, 1, 2),
        stops=({"seconds": 580},),
        settings=(*_CARTPOLE_BEFORE, "learner_threads=2"),
    ),
    "cartpole_rec100": Experiment(
        file="tuned_examples/cartpole.py",
        protocol=(
            "CartPole-v1, reconstruction loss x 100, discount 0.99, learning rate 4e-4, "
            "10 minutes, two threads"
        ),
        seeds=(0, 1, 2),
        stops=({"seconds": 580},),
        settings=(
            *("loss_scales.rec=100", "lr=0.0004", "gamma=0.99", "precision=float32"),
            "learner_threads=2",
        ),
    ),
    "walker_vision_cpu": Experiment(
        file="tuned_examples/walker.py",
        protocol="dmc walker-walk, 64x64 RGB, action repeat 2, 60 minutes",
        seeds=(0, 1),
        stops=({"seconds": 3_540},),
        settings=_WALKER_BEFORE,
        reference="dmc_vision",
    ),
    "walker_vision_cpu_150": Experiment(
        file="tuned_examples/walker.py",
        protocol="dmc walker-walk, 64x64 RGB, action repeat 2, 150 minutes",
        seeds=(2, 3),
        stops=({"seconds": 8_940},),
        settings=_WALKER_BEFORE,
        reference="dmc_vision",
    ),
    "walker_vision_cpu_3M_150": Experiment(
        file="tuned_examples/walker.py",
        protocol=(
            "dmc walker-walk, 64x64 RGB, action repeat 2, 2.7M parameters, discount 0.99, "
            "150 minutes"
        ),
        seeds=(4, 5),
        stops=({"seconds": 8_940},),
        settings=(*_WALKER_3M, "training_ratio=128"),
        reference="dmc_vision",
    ),
    "walker_vision_cpu_ratio64_150": Experiment(
        file="tuned_examples/walker.py",
        protocol=(
            "dmc walker-walk, 64x64 RGB, action repeat 2, 2.7M parameters, discount 0.99, "
            "training ratio 64, 150 minutes"
        ),
        seeds=(6, 7),
        stops=({"seconds": 8_940},),
        settings=(*_WALKER_3M, "training_ratio=64"),
        reference="dmc_vision",
    ),
    "dmc_cartpole_balance_proprio": Experiment(
        file="tuned_examples/walker_proprio.py",
        protocol="dmc cartpole-balance, proprioception, action repeat 2, training ratio 128",
        seeds=(0, 1),
        stops=({"env_steps": 60_000},),
        settings=(
            *("env=dmc/cartpole-balance", "env_config.action_repeat=2", "training_ratio=128"),
            *("batch_size_B=8", "lr=0.0003", "warmup_updates=100", "num_envs_per_env_runner=4"),
        ),
        reference="dmc_proprio",
    ),
    "minigrid": Experiment(
        file="tuned_examples/minigrid_empty.py",
        protocol="MiniGrid-Empty-Random-5x5-v0, 32x32 RGB, 7 actions",
        seeds=(0, 1),
        stops=({"agent_steps": 30_000},),
    ),
    "walker_vision_gpu": Experiment(
        file="tuned_examples/walker.py",
        protocol="dmc walker-walk, 64x64 RGB, action repeat 2, size 12M",
        seeds=(0, 1),
        stops=({"env_steps": 500_000}, {"env_steps": 1_000_000}),
        reference="dmc_vision",
        cuda=True,
    ),
    "pong100k_gpu": Experiment(
        file="tuned_examples/pong_100k.py",
        protocol="Pong, Atari 100k",
        seeds=(0,),
        stops=({"agent_steps": 100_000},),
        reference="atari100k",
        cuda=True,
    ),
    "ablation_none": _ablation("the base of the ablations"),
    "ablation_no_replay_context": _ablation("no replay context", "replay_context=false"),
    "ablation_no_replay_value_loss": _ablation("no replay value loss", "loss_scales.repval=0"),
    "ablation_bfloat16": _ablation("bfloat16", "precision=bfloat16"),
    "ablation_no_online_queue": _ablation("no online queue", "replay_online=false"),
    "ablation_no_actor_unimix": _ablation("actor unimix 0", "model_config.actor_unimix=0"),
    "precision_float32": _ablation("float32, more seeds", seeds=(2, 3, 4, 5)),
    "precision_bfloat16": _ablation(
        "bfloat16, more seeds",
        "precision=bfloat16",
        seeds=(2, 3, 4, 5),
        baseline="precision_float32",
    ),
}
