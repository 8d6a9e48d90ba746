"""RLlib's env runner, with every env checked and named in errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_AGENT_ID, DEFAULT_MODULE_ID
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner
from ray.rllib.utils.metrics import (
    EPISODE_DURATION_SEC_MEAN,
    EPISODE_LEN_MAX,
    EPISODE_LEN_MEAN,
    EPISODE_LEN_MIN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
)

from rllib_dreamer.envs import checked_creator
from rllib_dreamer.envs.success import SUCCESS_KEYS, success_of
from rllib_dreamer.episode_averages import EPISODE_SUCCESS_MEAN

_OF_SINGLE_ENVS = (gym.VectorizeMode.SYNC, gym.VectorizeMode.ASYNC)

#: Path of each metric of episodes in a runner's results -> the field of `Totals` that it is of.
_METRICS = {
    (EPISODE_LEN_MEAN,): "length",
    (EPISODE_LEN_MIN,): "length",
    (EPISODE_LEN_MAX,): "length",
    (EPISODE_RETURN_MEAN,): "reward",
    (EPISODE_RETURN_MIN,): "reward",
    (EPISODE_RETURN_MAX,): "reward",
    ("agent_episode_return_mean", DEFAULT_AGENT_ID): "reward",
    ("module_episode_return_mean", DEFAULT_MODULE_ID): "reward",
    (EPISODE_DURATION_SEC_MEAN,): "duration_s",
    (EPISODE_SUCCESS_MEAN,): "success",
}


@dataclass(frozen=True)
class Totals:
    """What episode metrics ask of the chunks of an episode, under the names that RLlib calls."""

    length: int
    reward: float
    duration_s: float
    success: bool | None

    @classmethod
    def of(cls, chunks: Sequence[Any]) -> Totals:
        """Adds up chunks, or totals of earlier ones."""
        return cls(
            sum(len(chunk) for chunk in chunks),
            sum(chunk.get_return() for chunk in chunks),
            sum(chunk.get_duration_s() for chunk in chunks),
            success_of(info for chunk in chunks for info in chunk.get_infos()),
        )

    def __len__(self) -> int:
        """Env steps."""
        return self.length

    def get_return(self) -> float:
        """Sum of rewards."""
        return self.reward

    def get_duration_s(self) -> float:
        """Seconds."""
        return self.duration_s

    def get_infos(self) -> list[dict[str, bool]]:
        """What is known of the success, told as environments do."""
        return [] if self.success is None else [{SUCCESS_KEYS[0]: self.success}]


class DreamerEnvRunner(SingleAgentEnvRunner):
    """Samples as RLlib does; differs in how it builds envs and in what it does after an error.

    Whatever `config.environment` was given (a name of this package or of Ray Tune, a Gymnasium id,
    a class), the env is built by `make_env` of `rllib_dreamer.envs`, so that its output is checked.
    An env that gives no answer within `config.sample_timeout_s` counts as failed.

    A runner whose env failed, and which RLlib asks again, builds its envs anew: the failed episode
    is not continued.

    With `config.seed` every env of every runner starts from seeds of its own. RLlib's are the sum
    of seed, runner and env, so that neighbours share theirs.

    Of steps handed over it keeps only totals, where RLlib keeps everything to the episode's end:
    50 kB a step for a small picture and its latents.
    """

    config: AlgorithmConfig
    _failed = False
    _builds = 0

    def make_env(self) -> None:
        """Builds the envs; `self.config` tells RLlib which, so it holds the creator meanwhile."""
        given = self.config
        self._builds += 1
        mode = gym.VectorizeMode(given.gym_env_vectorize_mode)
        if given.env is None or mode not in _OF_SINGLE_ENVS:
            super().make_env()
            return
        self._end_broken_workers()
        self.config = given.copy(copy_frozen=False)
        self.config.env = checked_creator(given.env, given.sample_timeout_s)
        try:
            super().make_env()
        finally:
            self.config = given

    def sample(self, **kwargs: Any) -> list[Any]:
        """Samples as RLlib does; what resets the envs for an evaluation gives them their seeds.

        Raises:
            Exception: An env failed, and `config.restart_failed_sub_environments` is False.
        """
        if self._failed:
            self.make_env()
        if self.config.in_evaluation and kwargs.get("force_reset"):
            self._needs_initial_reset = True  # which RLlib says where episodes are counted alone
        self._failed = True
        episodes: list[Any] = super().sample(**kwargs)
        self._failed = False
        if not self._shows_chunks():
            for chunks in self._ongoing_episodes_for_metrics.values():
                chunks[:] = [Totals.of(chunks)]
        return episodes

    def get_metrics(self) -> dict[str, Any]:
        """RLlib's, over every episode that ended, and `episode_success_mean` where the env tells.

        RLlib's own are over the latest `metrics_num_episodes_for_smoothing` episodes alone, and a
        call in which one episode ended weighs as much as one in which many did. So each metric
        carries all its values, which RLlib averages where those of all calls and runners meet.
        """
        ended = [
            Totals.of([*self._ongoing_episodes_for_metrics.get(episode.id_, ()), episode])
            for episode in self._done_episodes_for_metrics
        ]
        if any(totals.success is not None for totals in ended):  # makes the metric, empty as yet
            self.metrics.log_value(EPISODE_SUCCESS_MEAN, 0.0, reduce="mean", window=1)
        metrics: dict[str, Any] = super().get_metrics()
        for path, field in _METRICS.items():
            values = [getattr(totals, field) for totals in ended]
            known = [float(value) for value in values if value is not None]
            if known:
                stats: Any = reduce(getitem, path, metrics)
                stats.values = known
        return metrics

    def _try_env_reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        """RLlib's, which calls it again after a failure; with a seed of ours for each attempt."""
        own = None if seed is None else self._start_seed()
        return super()._try_env_reset(seed=own, options=options)

    def _start_seed(self) -> int:
        """Of the episodes that begin now; in training another one each time.

        An env that failed may fail again from the same state, and a run that is resumed, or a
        runner that is started anew, would see the episodes of its beginning again. Evaluations
        all begin alike.
        """
        evaluation = self.config.in_evaluation
        steps = 0 if evaluation else self.num_env_steps_sampled_lifetime
        runner = (self.worker_index or 0, int(evaluation), self._builds, steps)
        (drawn,) = np.random.SeedSequence([self.config.seed, *runner]).generate_state(1)
        return int(drawn >> 1)  # some envs take no more than 31 bits

    def stop(self) -> None:
        """Closes the envs."""
        self._end_broken_workers()
        super().stop()

    def _shows_chunks(self) -> bool:
        """Whether a user's callback will be given the chunks of an episode at its end."""
        base = RLlibCallback.on_episode_end
        overridden = any(type(c).on_episode_end is not base for c in self._callbacks)
        return overridden or self.config.callbacks_on_episode_end is not None

    def _end_broken_workers(self) -> None:
        """Ends the processes of a vector env of which one hangs or died: `close` would wait."""
        vector = None if self.env is None else self.env.unwrapped
        if not isinstance(vector, gym.vector.AsyncVectorEnv) or vector.closed:
            return
        if self._failed or not all(process.is_alive() for process in vector.processes):
            for process in vector.processes:
                process.terminate()
                process.join()
            vector.closed = True


class RecordingEnvRunner(DreamerEnvRunner, OfflineSingleAgentEnvRunner):
    """Also writes what it samples to `config.output`, as RLlib's runner for that does.

    Each step once: RLlib's keeps what it has written, and writes it again with every sample.
    """

    def sample(self, **kwargs: Any) -> list[Any]:
        """Samples and writes."""
        episodes = super().sample(**kwargs)
        if not self.output_max_rows_per_file:
            self._samples.clear()
        return episodes

    def stop(self) -> None:
        """Writes what is left, once, and closes the envs, which RLlib's leaves open."""
        super().stop()
        self._samples.clear()
        SingleAgentEnvRunner.stop(self)
