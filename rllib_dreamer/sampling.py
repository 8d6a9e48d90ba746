"""Steps the environments: those of remote EnvRunners while the learners work."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

logger = logging.getLogger(__name__)

TAG = "sample"


class Samples(NamedTuple):
    """Episodes, whole or in chunks, and the metrics of the EnvRunners that they are from.

    complete: whether all EnvRunners gave theirs.
    """

    episodes: list[SingleAgentEpisode]
    metrics: list[dict[str, Any]]
    complete: bool


class Sampler:
    """Asks EnvRunners for samples, and remote ones always one round ahead.

    A round is one call of `sample()` on every EnvRunner. When remote EnvRunners hand over a round,
    they are asked for the next one at once and step their environments during the updates that
    follow, with weights that are one round older than if they waited. Whoever counts steps when
    they are handed over counts as without overlap. A local EnvRunner samples when it is asked to.

    Args:
        group: The EnvRunners.
        config: Its `sample_timeout_s` are the seconds to wait for a round, what comes later belongs
            to the next one; its `env_runner_restore_timeout_s` those after which a run without any
            sample stops.
    """

    def __init__(self, group: EnvRunnerGroup, config: AlgorithmConfig) -> None:
        self._group, self._config = group, config
        self._empty_since: float | None = None

    def next(self) -> Samples:
        """Returns a round, in the order of the EnvRunners.

        Raises:
            RuntimeError: The local EnvRunner's env failed, or remote ones have given nothing for
                too long.
        """
        if self._group.num_remote_env_runners() == 0:
            return self._sample_here()
        self._request()  # those that have nothing in flight: all at first, then restarted ones
        ready = self._fetch()
        self._request()
        self._check_that_samples_arrive(bool(ready))
        rounds = [samples for _, samples in sorted(ready, key=lambda pair: pair[0])]
        return Samples(
            [episode for episodes, _ in rounds for episode in episodes],
            [metrics for _, metrics in rounds],
            complete=len(ready) == self._group.num_remote_env_runners(),
        )

    def drop(self) -> None:
        """Waits for what is in flight and throws it away."""
        self._fetch()

    def _sample_here(self) -> Samples:
        try:
            episodes, metrics = synchronous_parallel_sample(
                worker_set=self._group,
                concat=True,
                _uses_new_env_runners=True,
                _return_metrics=True,
            )
        except RuntimeError as error:
            if error.args or error.__cause__ is None:
                raise
            raise self._failed_env(error.__cause__) from error.__cause__
        return Samples(episodes, metrics, complete=True)

    def _failed_env(self, cause: BaseException) -> RuntimeError:
        """The error of a local env, in words; RLlib's has none."""
        died = " (a process of a sub-environment died: killed, or out of memory)"
        return RuntimeError(
            f"env {self._config.env} failed in step(): {type(cause).__name__}: {cause}"
            f"{died if isinstance(cause, (EOFError, ConnectionError)) else ''}. "
            "config.fault_tolerance(restart_failed_sub_environments=True) builds it anew and goes "
            "on."
        )

    def _request(self) -> None:
        self._group.foreach_env_runner_async(
            lambda runner: (runner.sample(), runner.get_metrics()), tag=TAG
        )

    def _fetch(self) -> list[tuple[int, Any]]:
        """Waits for all requests; pairs of an EnvRunner's id and what it gave."""
        return self._group.fetch_ready_async_reqs(
            tags=TAG, timeout_seconds=self._config.sample_timeout_s
        )

    def _check_that_samples_arrive(self, arrived: bool) -> None:
        """Warns of a round without samples; stops a run that would go on like that for ever."""
        now = time.monotonic()
        if arrived:
            self._empty_since = None
            return
        since = self._empty_since = self._empty_since or now
        limit = self._config.env_runner_restore_timeout_s
        healthy = self._group.num_healthy_remote_env_runners()
        several = self._group.num_remote_env_runners()
        if now - since > limit:
            raise RuntimeError(
                f"no env runner gave a sample for {now - since:.0f} s "
                f"(env_runner_restore_timeout_s={limit:g}), {healthy} of {several} are healthy: "
                "the env fails or hangs in all of them, or their machines are gone. "
                "num_env_runners=0 shows the env's error, sample_timeout_s is what a slow env is "
                "given."
            )
        logger.warning(
            "No remote EnvRunner gave samples within sample_timeout_s=%s seconds, %d of %d are "
            "healthy: raise it in `config.env_runners()` if the environments are slow.",
            self._config.sample_timeout_s,
            healthy,
            several,
        )
