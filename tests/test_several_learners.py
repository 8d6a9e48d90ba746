"""Two learners, each with half of a batch, are one learner with the whole of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.rllib.core import DEFAULT_MODULE_ID
from tiny import CONTINUOUS, MIXED, MODEL, built, tiny_config, train_until

from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.learner_calls import update_learners
from rllib_dreamer.model.distributions import FixedNoise

UPDATES = 10


def config_of(learners: int) -> DreamerConfig:
    config = tiny_config(observation_space=MIXED, action_space=CONTINUOUS)
    return config.learners(num_learners=learners, num_cpus_per_learner=1 if learners else "auto")


@pytest.fixture(scope="module")
def single() -> Iterator[DreamerTorch]:
    """An algorithm with one remote learner; each test goes on where the one before has ended."""
    with built(config_of(1)) as algo:
        yield algo


@pytest.fixture(scope="module")
def two() -> Iterator[DreamerTorch]:
    """The same with two of them."""
    with built(config_of(2)) as algo:
        yield algo


@pytest.fixture
def algo(request: pytest.FixtureRequest) -> Iterator[DreamerTorch]:
    """An algorithm with as many learners as the parameter says."""
    if request.param == 2:
        yield request.getfixturevalue("two")
        return
    with built(config_of(request.param)) as algo:
        yield algo


def take_away_noise(learner: Any) -> None:
    learner.kept_noise, learner.agent().noise = learner.agent().noise, FixedNoise(0.5)


def give_noise_back(learner: Any) -> None:
    learner.agent().noise = learner.kept_noise


def state_of(learner: Any) -> dict[str, np.ndarray]:
    """The model with slow critic and return percentiles, and the latest gradients."""
    agent = learner.agent()
    state = {key: x.detach().numpy().copy() for key, x in agent.state_dict().items()}
    grads = {
        f"grad/{k}": p.grad.numpy().copy() for k, p in agent.named_parameters() if p.requires_grad
    }
    return state | grads


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """In L2 over the tensor: sums in another order leave single elements near zero further off."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-3))


def run(algo: DreamerTorch, batches: list[dict], start: Any) -> tuple[list[dict], list[dict], list]:
    """Updates from the same start on the same batches: losses, states of learners, latents."""
    algo.learner_group.set_state({"learner": start})
    algo._on_learners(take_away_noise)
    losses, latents = [], []
    for batch in batches:
        shards = algo._shards(copy.deepcopy(batch))
        results = update_learners(algo.learner_group, shards, {})
        each = [
            {k: float(stat.peek()) for k, stat in r[DEFAULT_MODULE_ID].items() if "loss" in k}
            for r in results
        ]
        losses.append({key: np.mean([x[key] for x in each]) for key in each[0]})
        parts = algo._on_learners(lambda learner: learner.take_latents())
        latents.append([np.concatenate(x) for x in zip(*parts, strict=True)])
    algo._on_learners(give_noise_back)
    return losses, algo._on_learners(state_of), latents


def test_two_learners_train_and_go_on_as_one(two: DreamerTorch, tmp_path: Path) -> None:
    """Each learner draws its own noise from the start; a checkpoint of two goes on with one."""
    train_until(two, two._updates + 2)
    draws = two._on_learners(lambda learner: learner.agent().noise.uniform((4,), "cpu").tolist())
    assert draws[0] != draws[1]
    states = two._on_learners(state_of)
    updates = two._updates
    path = two.save_to_path(tmp_path / "c")
    with built(config_of(0)) as one:
        one.restore_from_path(path)
        assert one._updates == updates
        state = one._on_learners(lambda learner: learner.agent().state_dict())[0]
        for key, value in state.items():
            np.testing.assert_array_equal(value.numpy(), states[0][key], err_msg=key)
        train_until(one, updates + 1)


def test_two_learners_are_one_learner(two: DreamerTorch) -> None:
    with built(config_of(0)) as one:
        while len(one.replay) < 60:
            one._sample()
        batches, rng = [one.replay.sample() for _ in range(UPDATES)], np.random.default_rng(0)
        for batch in batches:
            batch.pop("index")
            # Constant ones leave no advantage but rounding, which LaProp scales up to full steps.
            batch["reward"][:] = rng.normal(size=batch["reward"].shape)
        start = one.learner_group.get_state()["learner"]
        losses, states, latents = run(one, batches, start)
    losses2, states2, latents2 = run(two, batches, start)
    assert len(states2) == 2
    for key, value in states2[0].items():
        np.testing.assert_array_equal(states2[1][key], value, err_msg=key)
        assert relative_error(value, states[0][key]) < 3e-5, key
    percentiles = {key for key in states2[0] if "normalizer" in key}
    assert percentiles == {"behavior.normalizer.low", "behavior.normalizer.high"}
    assert all(states2[0][key] != 0 for key in percentiles)
    for mine, theirs in zip(losses, losses2, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for mine_, theirs_ in zip(latents, latents2, strict=True):
        np.testing.assert_allclose(theirs_[0], mine_[0], atol=2e-3)  # 16 bits
        np.testing.assert_array_equal(theirs_[1], mine_[1])


def test_one_remote_learner_trains(single: DreamerTorch) -> None:
    result = train_until(single, 2)
    assert np.isfinite(float(result["learners"]["default_policy"]["loss_camera"]))
    trained = result["learners"]["__all_modules__"]["num_env_steps_trained_lifetime"]
    assert trained == single._updates * 4 * 8  # steps, not rows


def moments_of(learner: Any) -> dict[str, np.ndarray]:
    """The second moments of all optimizers."""
    return {
        f"{name}/{i}": optimizer.state[p]["exp_avg_sq"].numpy().copy()
        for name, optimizer in learner._named_optimizers.items()
        for i, p in enumerate(optimizer.param_groups[0]["params"])
    }


@pytest.mark.parametrize("algo", [0, 2], indirect=True)
def test_a_state_in_memory_is_a_snapshot_that_can_be_gone_back_to(algo: DreamerTorch) -> None:
    """Learners share no memory with the state or one another; weights and moments go together."""
    train_until(algo, algo._updates + 2)
    before, moments = algo._on_learners(state_of)[0], algo._on_learners(moments_of)[0]
    state, updates = algo.get_state(), algo._updates
    train_until(algo, updates + 2)
    for _ in range(2):
        algo.set_state(state)
        assert algo._updates == updates
        for found, expected in (
            (algo._on_learners(state_of), before),
            (algo._on_learners(moments_of), moments),
        ):
            for learner in found:
                for key in expected.keys() - {k for k in expected if k.startswith("grad/")}:
                    np.testing.assert_array_equal(learner[key], expected[key], err_msg=key)
        train_until(algo, updates + 2)
    first, *others = algo._on_learners(state_of)
    for other in others:
        for key, value in first.items():
            np.testing.assert_array_equal(other[key], value, err_msg=key)


def test_remote_learners_that_refuse_a_checkpoint_are_told_of(
    single: DreamerTorch, tmp_path: Path
) -> None:
    path = single.save_to_path(tmp_path / "c")
    other = config_of(1).rl_module(model_config={**MODEL, "units": 32})
    message = "the learners could not take the state in .*model_config"
    with built(other) as algo, pytest.raises(RuntimeError, match=message):
        algo.restore_from_path(path)
