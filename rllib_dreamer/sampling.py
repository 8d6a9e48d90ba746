"""Steps the environments: those of remote EnvRunners while the learners work."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample

logger = logging.getLogger(__name__)

TAG = "sample"


class Samples(NamedTuple):
    """Episodes, whole or in chunks, and the metrics of the EnvRunners that they are from."""

    episodes: list[SingleAgentEpisode]
    metrics: list[dict[str, Any]]


class Sampler:
    """Asks EnvRunners for samples, and remote ones always one round ahead.

    A round is one call of `sample()` on every EnvRunner. When remote EnvRunners hand over a round,
    they are asked for the next one at once and step their environments during the updates that
    follow, with weights that are one round older than if they waited. Whoever counts steps when
    they are handed over counts as without overlap. A local EnvRunner samples when it is asked to.

    Args:
        group: The EnvRunners.
        timeout_s: Seconds to wait for a round; what comes later belongs to the next one. None
            waits for ever.
    """

    def __init__(self, group: EnvRunnerGroup, timeout_s: float | None) -> None:
        self._group, self._timeout_s = group, timeout_s

    def next(self) -> Samples:
        """Returns a round, in the order of the EnvRunners."""
        if self._group.num_remote_env_runners() == 0:
            return self._sample_here()
        self._request()  # those that have nothing in flight: all at first, then restarted ones
        ready = self._fetch()
        self._request()
        if not ready:
            logger.warning(
                "No remote EnvRunner gave samples within sample_timeout_s=%s seconds, %d of %d are "
                "healthy: raise it in `config.env_runners()` if the environments are slow.",
                self._timeout_s,
                self._group.num_healthy_remote_env_runners(),
                self._group.num_remote_env_runners(),
            )
        rounds = [samples for _, samples in sorted(ready, key=lambda pair: pair[0])]
        return Samples([e for episodes, _ in rounds for e in episodes], [m for _, m in rounds])

    def drop(self) -> None:
        """Waits for what is in flight and throws it away."""
        self._fetch()

    def _sample_here(self) -> Samples:
        episodes, metrics = synchronous_parallel_sample(
            worker_set=self._group,
            concat=True,
            _uses_new_env_runners=True,
            _return_metrics=True,
        )
        return Samples(episodes, metrics)

    def _request(self) -> None:
        self._group.foreach_env_runner_async(
            lambda runner: (runner.sample(), runner.get_metrics()), tag=TAG
        )

    def _fetch(self) -> list[tuple[int, Any]]:
        """Waits for all requests; pairs of an EnvRunner's id and what it gave."""
        return self._group.fetch_ready_async_reqs(tags=TAG, timeout_seconds=self._timeout_s)
