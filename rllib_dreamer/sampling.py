"""Steps the environments: those of remote EnvRunners while the learners work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds to wait for EnvRunners of which no sample is expected now."""


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

    A remote EnvRunner that gives nothing in time is late: the others go on without it, and what it
    gives later belongs to the round of that moment.

    Args:
        group: The EnvRunners.
        config: Its `sample_timeout_s` are the seconds to wait for a round; its
            `env_runner_restore_timeout_s` those after which a run without any sample stops; after
            half of them a late EnvRunner is started again.
    """

    def __init__(self, group: EnvRunnerGroup, config: AlgorithmConfig) -> None:
        self._group, self._config = group, config
        self._empty_since: float | None = None
        self._late: dict[int, float] = {}  # since when, by the EnvRunner's id
        # Beside an evaluation RLlib trains in a new thread each time; OpenGL stays with its thread.
        lasting = config.evaluation_parallel_to_training
        self._thread = ThreadPoolExecutor(1, "sampler") if lasting else None

    def next(self) -> Samples:
        """Returns a round, in the order of the EnvRunners.

        Raises:
            RuntimeError: The local EnvRunner's env failed, or remote ones have given nothing for
                too long.
        """
        if self._group.num_remote_env_runners() == 0:
            return self._sample_here()
        asked = self._in_flight()
        self._late = {id: since for id, since in self._late.items() if id in asked}
        self._request()  # those that have nothing in flight: all at first, then restarted ones
        ready = self._fetch()
        self._restart_lost()
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
        self._take(self._in_flight(), self._config.sample_timeout_s)
        self._late.clear()

    def close(self) -> None:
        """Ends late EnvRunners; closes the envs of a local one in the thread that stepped them."""
        for runner in self._late:  # for which RLlib would wait without end
            ray.kill(self._group._worker_manager.actors()[runner])
        if self._thread is not None and self._group.local_env_runner is not None:
            closed = self._thread.submit(self._group.local_env_runner.stop)
            self._thread.shutdown(wait=False)
            try:
                closed.result(self._config.sample_timeout_s)
            except Exception:
                logger.exception("The envs of the local EnvRunner could not be closed.")

    def _sample_here(self) -> Samples:
        sample = partial(
            synchronous_parallel_sample,
            worker_set=self._group,
            concat=True,
            _uses_new_env_runners=True,
            _return_metrics=True,
        )
        try:
            episodes, metrics = self._thread.submit(sample).result() if self._thread else sample()
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
        for runner in self._group._worker_manager.actor_ids():
            self._group.foreach_env_runner_async(
                lambda runner: (runner.sample(), runner.get_metrics()),
                tag=tag_of(runner),
                remote_worker_ids=[runner],
            )

    def _fetch(self) -> list[tuple[int, Any]]:
        """Waits for all EnvRunners but late ones; pairs of an EnvRunner's id and what it gave."""
        asked = self._in_flight()
        ready = self._take(set(asked) - self._late.keys(), self._config.sample_timeout_s)
        ready += self._take(self._late, 0.0 if ready else PAUSE)
        if not asked:
            time.sleep(PAUSE)
        now = time.monotonic()
        late = {runner: self._late.get(runner, now) for runner in self._in_flight()}
        for runner in late.keys() - self._late.keys():
            logger.warning(
                "EnvRunner %d gave no sample within sample_timeout_s=%g seconds, the others go on "
                "without it: raise it in `config.env_runners()` if the environments are slow.",
                runner,
                self._config.sample_timeout_s,
            )
        self._late = late
        return ready

    def _in_flight(self) -> list[int]:
        """The EnvRunners that have been asked for samples."""
        runners = self._group._worker_manager.actor_ids()
        return [id for id in runners if self._group.num_in_flight_async_reqs(tag_of(id))]

    def _take(self, runners: Iterable[int], seconds: float | None) -> list[tuple[int, Any]]:
        """Waits for some EnvRunners; pairs of an id and what it gave of those that gave it."""
        tags = [tag_of(runner) for runner in runners]
        if not tags:  # which would be those of all
            return []
        return self._group.fetch_ready_async_reqs(tags=tags, timeout_seconds=seconds)

    def _restart_lost(self) -> None:
        """Ends EnvRunners that hang for good, in code that no signal reaches: Ray starts others."""
        now, limit = time.monotonic(), self._config.env_runner_restore_timeout_s / 2
        for runner, since in self._late.items():
            if self._config.restart_failed_env_runners and now - since > limit:
                logger.warning(
                    "EnvRunner %d gave no sample for %.0f seconds more (half of "
                    "env_runner_restore_timeout_s) and is started again.",
                    runner,
                    now - since,
                )
                ray.kill(self._group._worker_manager.actors()[runner], no_restart=False)
                self._late[runner] = now

    def _check_that_samples_arrive(self, arrived: bool) -> None:
        """Stops a run that would go on without samples for ever."""
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


def tag_of(runner: int) -> str:
    """What RLlib knows the requests to an EnvRunner for samples by."""
    return f"sample_{runner}"
