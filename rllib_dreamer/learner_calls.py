"""Calls of a group of learners, in which no error is lost and no wait is endless.

RLlib leaves a remote learner out from the first error on that a call of it gave, and some of its
own calls only log that error. In an update it waits for all learners, and they wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch

GRACE = 3.0
"""Seconds that the other learners get, once one has failed, to tell that they have, too."""


def on_learners(
    group: LearnerGroup,
    function: Callable[[Any], Any],
    ids: list[int] | None = None,
    *,
    take_back: bool = False,
) -> list[Any]:
    """Calls a function with all learners, or those of `ids`.

    Args:
        group: The learners.
        function: Called with each, where it is.
        ids: Of remote learners; None for all, also those that RLlib leaves out.
        take_back: Whether RLlib is to leave out no learner any more that answers.

    Returns:
        The results, in the order of the learners.

    Raises:
        RuntimeError: If a remote learner is lost, or raises; a local one raises its own error.
    """
    found = group.foreach_learner(
        function, remote_actor_ids=ids, healthy_only=False, mark_healthy=take_back
    )
    results = sorted(found, key=lambda r: r.actor_id or 0)
    errors = [r.get() for r in results if not r.ok]
    if errors:
        raise _told(errors) from errors[0]
    return [r.get() for r in results]


def update_learners(
    group: LearnerGroup, batches: Sequence[MultiAgentBatch], timesteps: dict[str, int]
) -> list[Any]:
    """Updates each learner with its batch.

    Where one of several fails, those that still wait for it in the exchange of gradients are ended:
    RLlib would let them wait for half an hour.

    Returns:
        The results, in the order of the learners.

    Raises:
        RuntimeError: If a remote learner is lost, or raises; a local one raises its own error.
    """
    if group.is_local:
        (batch,) = batches
        return list(group.update(batch=batch, timesteps=timesteps))
    calls = {
        worker.update.remote(training_data=TrainingData(batch=batch), timesteps=timesteps): worker
        for worker, batch in zip(group._workers, batches, strict=True)
    }
    results: dict[Any, Any] = {}
    waiting = list(calls)
    while waiting:
        (call,), waiting = ray.wait(waiting)
        try:
            results[call] = ray.get(call)
        except RayError as error:
            late = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE)[0] if waiting else []
            for other in set(waiting) - set(late):
                ray.kill(calls[other])
            raise _told([error, *filter(None, map(_error_of, late))]) from error
    return [results[call] for call in calls]


def require_saved(group: LearnerGroup) -> None:
    """Checks that no remote learner failed to save its state, which RLlib would only log.

    Raises:
        OSError: If one failed; it can go on.
        RuntimeError: If one is lost.
    """
    if len(list(group.foreach_learner(_nothing))) < len(group):
        on_learners(group, _nothing, take_back=True)
        raise OSError("a learner could not write its state, see its error in the log")


@contextmanager
def telling_refusals(group: LearnerGroup, state: str) -> Iterator[None]:
    """Turns RLlib's ways to say that no remote learner took a state into an error that says so.

    Args:
        group: The learners.
        state: Where the state is from, as part of the message.

    Raises:
        RuntimeError: If remote learners refuse it; a local one raises its own error.
    """
    try:
        yield
    except (IndexError, AssertionError) as error:  # no learner is left to take weights from
        if group.is_local:
            raise
        raise RuntimeError(
            f"the learners could not take the state {state}, see their error in the log: "
            "model_size, model_config, optimizer and the spaces of the env must be those of the "
            "checkpoint. This algorithm is of no more use, build a new one."
        ) from error


def _nothing(learner: Any) -> None:
    """Of a learner."""


def _error_of(call: Any) -> RayError | None:
    """The error of a call that has ended; None if it has a result."""
    try:
        ray.get(call)
    except RayError as error:
        return error
    return None


def _told(errors: list[Any]) -> RuntimeError:
    """What to tell of the errors of remote learners: where one is lost, the others fail with it."""
    lost = [error for error in errors if not isinstance(error, RayTaskError)]
    if not lost:
        cause = errors[0].cause
        return RuntimeError(f"a learner raised {type(cause).__name__}: {cause}")
    reason = " ".join(str(lost[0]).split())[:300]
    return RuntimeError(
        f"a learner was lost, and Ray starts no learner again: {reason}. Go on from the last "
        "checkpoint: `rllib train ... --resume`, or --max-failures N to do so by itself, or "
        "Algorithm.from_checkpoint(path)"
    )
