"""Several learners of which one is killed, or that get gradients which are not finite."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError
from ray.rllib.core import DEFAULT_MODULE_ID
from tiny import CountingEnv, assert_same, built, learner_of, tiny_config, train_until

from rllib_dreamer import checkpoint
from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.learner_calls import on_learners


def config_of(learners: int, runners: int = 0, **training: Any) -> DreamerConfig:
    config = tiny_config(CountingEnv, training=training, length=60)
    config.env_runners(num_env_runners=runners)
    return config.learners(num_learners=learners, num_cpus_per_learner=1 if learners else "auto")


@pytest.fixture(scope="module")
def local() -> Iterator[DreamerTorch]:
    """An algorithm with a local learner, for tests that leave it as it is."""
    with built(config_of(0)) as algo:
        yield algo


@pytest.fixture(scope="module")
def remote() -> Iterator[DreamerTorch]:
    """One with a remote learner, for tests that leave it alive."""
    with built(config_of(1)) as algo:
        yield algo


def state_of(learner: Any) -> dict[str, np.ndarray]:
    return {key: x.detach().numpy().copy() for key, x in learner.agent().state_dict().items()}


def test_learners_skip_together_and_a_killed_one_stops_the_run(tmp_path: Path) -> None:
    """The checkpoint of two learners and a runner goes on with one learner and none."""
    with built(config_of(2, runners=1, max_nonfinite_updates=3)) as two:
        train_until(two, 2)
        path = Path(two.save_to_path(tmp_path / "c"))
        saved = two._on_learners(state_of)
        counters = two.get_state(components="nothing")["dreamer"]
        stored = len(two.replay)

        batch = two.replay.sample()
        batch["obs/vector"][0, 2] = np.nan  # the rows of the first learner alone
        sample = two._batches.next
        two._batches.next = lambda: dict(batch)  # type: ignore[method-assign]
        two._update()
        two._update()
        for state in two._on_learners(state_of):
            assert_same(state, saved[0])
        skipped = two.metrics.peek(("learners", DEFAULT_MODULE_ID, "skipped_updates"))
        assert skipped == 2  # updates, not updates times learners
        with pytest.raises(RuntimeError, match="3 updates in a row had a NaN or infinite gradient"):
            two._update()

        two._batches.next = sample  # type: ignore[method-assign]
        two._update()
        one, other = two._on_learners(state_of)
        assert_same(one, other)
        os.kill(two._on_learners(lambda learner: os.getpid())[1], signal.SIGKILL)
        start = time.monotonic()
        message = r"a learner was lost, and Ray starts no learner again: .*rllib train .* --resume"
        with pytest.raises(RuntimeError, match=message):
            train_until(two, 1000)
        print(f"\nstopped after {time.monotonic() - start:.1f} s")

    checkpoint.verify(path)
    with built(config_of(0)) as alone:
        alone.restore_from_path(path)
        assert_same(alone._on_learners(state_of)[0], saved[0])
        assert_same(alone.get_state(components="nothing")["dreamer"], counters)
        assert len(alone.replay) == stored
        steps, updates = alone._agent_steps, alone._updates
        alone.train()
        assert (alone._agent_steps, alone._updates) == (steps + 1, updates + 1)
        assert alone.replay.stats()["streams"] == 1


def add_apples(learner: Any) -> None:
    raise TypeError("one apple\nand one pear")


def test_an_error_of_a_learner_is_told_as_what_it_is(
    remote: DreamerTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(remote, 1)
    batch = remote.replay.sample()
    del batch["reward"]
    monkeypatch.setattr(remote._batches, "next", lambda: batch)
    with pytest.raises(RuntimeError, match=r"^a learner raised KeyError: 'reward'$") as error:
        remote._update()
    assert isinstance(error.value.__cause__, RayTaskError)
    message = r"^a learner raised TypeError: one apple\nand one pear$"
    with pytest.raises(RuntimeError, match=message):
        remote._on_learners(add_apples)
    on_learners(remote.learner_group, lambda learner: None, take_back=True)


def fail_in_the_loss(learner: Any) -> None:
    """Lets the second of two learners fail before it exchanges gradients with the other one."""

    def fail(**_: Any) -> None:
        raise MemoryError("as of one GPU")

    if not learner._is_first:
        learner.compute_loss_for_module = fail


def test_the_others_do_not_wait_for_a_learner_that_raised() -> None:
    with built(config_of(2)) as algo:
        train_until(algo, 1)
        algo._on_learners(fail_in_the_loss)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"^a learner raised MemoryError: as of one GPU$"):
            algo._update()
        print(f"\nstopped after {time.monotonic() - start:.1f} s")


def cannot_save(learner: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    learner.save_to_path = fail


def dies_saving(learner: Any) -> None:
    learner.save_to_path = lambda *args, **kwargs: os._exit(1)


def test_what_a_remote_learner_could_not_save_is_no_checkpoint(tmp_path: Path) -> None:
    """The earlier one stays; a learner that raised goes on, one that died does not."""
    path = tmp_path / "c"
    with built(config_of(1)) as algo:
        train_until(algo, 1)
        algo.save_to_path(path)
        entries = (path / checkpoint.MANIFEST).read_text()
        algo._on_learners(cannot_save)
        with pytest.raises(OSError, match=r"a learner could not write its state.*earlier checkp"):
            algo.save_to_path(path)
        train_until(algo, algo._updates + 1)
        algo._on_learners(dies_saving)
        with pytest.raises(RuntimeError, match="a learner was lost"):
            algo.save_to_path(path)
        assert (path / checkpoint.MANIFEST).read_text() == entries
        checkpoint.verify(path)
        assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_state_that_a_remote_learner_refuses_is_told(remote: DreamerTorch) -> None:
    state = remote.get_state()
    weights = state["learner_group"]["learner"]["rl_module"][DEFAULT_MODULE_ID]
    weights[next(iter(weights))] = np.zeros(3, np.float32)  # of no shape that any has
    with pytest.raises(RuntimeError, match="the learners could not take the state given"):
        remote.set_state(state)


def test_an_error_of_a_local_learner_stays_what_it_is(
    local: DreamerTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(state: Any) -> None:
        raise IndexError("of the learner")

    state = local.get_state()
    monkeypatch.setattr(learner_of(local), "set_state", refuse)
    with pytest.raises(IndexError, match="of the learner"):
        local.set_state(state)


def test_random_state_of_a_gpu_does_not_hinder_a_cpu(local: DreamerTorch) -> None:
    learner = learner_of(local)
    before = learner.get_state()
    learner.set_state({**before, "rng": {**before["rng"], "cuda": np.zeros(16, np.uint8)}})
    assert_same(learner.get_state()["rng"], before["rng"])
