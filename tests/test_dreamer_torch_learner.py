from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from tiny import (
    CONTINUOUS,
    MIXED,
    agent_of,
    assert_same,
    built,
    learner_of,
    parameters_of,
    tiny_config,
    train_until,
)

from rllib_dreamer.dreamer import DreamerTorch
from rllib_dreamer.learner_calls import update_learners
from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.optim import FLUSHED_EPS, OFFICIAL_EPS, LaProp
from rllib_dreamer.part_rates import PARTS

Batch = dict[str, np.ndarray]


def fill(algo: DreamerTorch, steps: int = 60) -> None:
    """Puts steps into the replay without learning from them."""
    while len(algo.replay) < steps:
        algo._sample()


def update(algo: DreamerTorch, batch: Batch) -> dict[str, float]:
    """One update through RLlib's learner group; the learner's results."""
    batch = {key: x for key, x in batch.items() if key != "index"}
    results = update_learners(algo.learner_group, algo._shards(batch), {})
    return {key: stat.peek() for key, stat in results[0][DEFAULT_MODULE_ID].items()}


class BareUpdate:
    """The update, written down with nothing but the model."""

    def __init__(self, agent: Agent, config: Any) -> None:
        self.agent = agent
        options = {"agc": config.agc, "eps": FLUSHED_EPS, "fused": config.compile}
        options |= {"warmup": config.warmup_updates}
        self.optimizer = LaProp(
            [p for p in agent.parameters() if p.requires_grad], lr=config.lr, **options
        )

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.agent(batch)
        self.optimizer.zero_grad()
        ops.total_loss(out.losses, self.agent.scales).backward()
        self.optimizer.step()
        self.agent.behavior.update_slow_critic()
        return out.deter, out.stoch


def test_the_update_through_rllib_is_that_of_the_bare_model() -> None:
    config = tiny_config(observation_space=MIXED, action_space=CONTINUOUS)
    config.training(warmup_updates=3)
    with built(config) as algo:
        fill(algo)
        learner, agent = learner_of(algo), agent_of(algo)
        agent.noise = FixedNoise(0.5)
        bare = BareUpdate(copy.deepcopy(agent), config)
        for _ in range(5):
            batch = algo.replay.sample()
            tensors = {key: torch.as_tensor(x) for key, x in batch.items() if key != "index"}
            deter, stoch = bare(learner.module[DEFAULT_MODULE_ID].model_batch(tensors))
            update(algo, batch)
            latents = learner.take_latents()
            assert latents is not None
            np.testing.assert_array_equal(latents[0], deter.half().numpy())
            np.testing.assert_array_equal(latents[1], stoch.numpy())
        assert_same(parameters_of(algo), dict(bare.agent.state_dict()))


def test_bfloat16_is_near_float32() -> None:
    """Losses within 2 %, the gradient's norm within 1 %: bfloat16 has 8 bits of mantissa.

    Not the update's norm: LaProp's first step has the same norm whatever the gradient.
    """
    results = {}
    for precision in ("float32", "bfloat16"):
        config = tiny_config(observation_space=MIXED, training={"precision": precision})
        with built(config) as algo:
            assert learner_of(algo).agent().dtype == getattr(torch, precision)
            agent_of(algo).noise = FixedNoise(0.5)
            fill(algo)
            results[precision] = update(algo, algo.replay.sample())
            assert {p.dtype for p in agent_of(algo).parameters()} == {torch.float32}
    full, half = results["float32"], results["bfloat16"]
    assert full.keys() == half.keys()
    losses = [key for key in full if key.startswith("loss_")]
    assert len(losses) == 10
    for key in losses:
        assert half[key] == pytest.approx(full[key], rel=0.02, abs=0.01), key
    assert half["loss_camera"] != full["loss_camera"]
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.01)


def everything(algo: DreamerTorch) -> dict[str, Any]:
    """A copy of what an update changes: model, slow critic, normaliser, optimizers."""
    optimizers = [
        learner_of(algo).get_optimizer(DEFAULT_MODULE_ID, name).state_dict() for name in PARTS
    ]
    return {"model": parameters_of(algo), "optimizers": copy.deepcopy(optimizers)}


@pytest.mark.parametrize("source", ["observation", "gradient"])
def test_an_update_with_a_nan_gradient_changes_nothing(source: str) -> None:
    """With NaN in the gradient alone the imagined returns, finite, have moved the normaliser."""
    config = tiny_config(observation_space=MIXED, training={"max_nonfinite_updates": 3})
    with built(config) as algo:
        train_until(algo, 2)
        before, latents = everything(algo), algo.replay.get_state()["data"]
        good, bad = algo.replay.sample(), algo.replay.sample()
        hook = None
        if source == "observation":
            bad["obs/joints"][0, 2] = np.nan
        else:
            weight = agent_of(algo).world.cont.out.weight
            hook = weight.register_hook(lambda grad: grad * float("nan"))
        algo._batches.next = lambda: copy.deepcopy(given)  # type: ignore[method-assign]
        given = bad
        for _ in range(2):
            algo._update()
        assert_same(everything(algo), before)
        assert_same(algo.replay.get_state()["data"], latents)
        if hook is not None:
            hook.remove()
        assert algo.metrics.peek(("learners", DEFAULT_MODULE_ID, "skipped_updates")) == 2
        given = good
        algo._update()
        after = everything(algo)
        for name in ("model", "optimizers"):
            with pytest.raises(AssertionError):
                assert_same(after[name], before[name])

        agent_of(algo).world.cont.out.weight.register_hook(lambda grad: grad * float("nan"))
        algo._update()
        algo._update()
        with pytest.raises(RuntimeError, match="3 updates in a row had a NaN or infinite gradient"):
            algo._update()


def groups_of(algo: DreamerTorch) -> list[dict[str, Any]]:
    optimizers = (learner_of(algo).get_optimizer(DEFAULT_MODULE_ID, name) for name in PARTS)
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def test_settings_of_the_config_win_over_those_of_a_checkpoint(tmp_path: Path) -> None:
    """As in a population (PBT), or with `--resume --set lr=...`; a schedule's rate goes on."""
    scheduled = [[0, 1e-3], [100, 0.0]]
    with built(tiny_config(training={"actor_lr": scheduled})) as algo:
        train_until(algo, 3)
        path = algo.save_to_path(tmp_path / "c")
        trained = groups_of(algo)
    settings = {"lr": 5e-4, "agc": 0.1, "weight_decay": 0.2, "warmup_updates": 7}
    with built(tiny_config(training=settings | {"actor_lr": scheduled})) as algo:
        algo.restore_from_path(path)
        world, actor, critic = groups_of(algo)
        for group in (world, actor, critic):
            assert (group["agc"], group["weight_decay"], group["warmup"]) == (0.1, 0.2, 7)
            assert group["step"] == trained[0]["step"] == 3
        assert world["lr"] == critic["lr"] == 5e-4
        assert 0 < actor["lr"] == trained[1]["lr"] < 1e-3


def frozen(algo: DreamerTorch, part: str) -> dict[str, np.ndarray]:
    return {k: x for k, x in parameters_of(algo).items() if k.startswith(part)}


def test_an_actor_that_does_not_train_stays_as_it_is(tmp_path: Any) -> None:
    """Neither by weight decay nor by momentum from a checkpoint."""
    with built(tiny_config()) as algo:
        train_until(algo, 3)
        path = algo.save_to_path(tmp_path / "c")
    config = tiny_config(training={"train_actor": False, "weight_decay": 0.1})
    with built(config) as algo:
        algo.restore_from_path(path)
        before = parameters_of(algo)
        train_until(algo, 6)
        assert_same(
            frozen(algo, "behavior.actor"), {k: before[k] for k in frozen(algo, "behavior.actor")}
        )
        for part in ("world.encoder", "behavior.critic", "behavior.slow_critic"):
            for key, value in frozen(algo, part).items():
                assert (value != before[key]).any(), key


def test_a_learner_on_a_cpu_flushes_denormals_and_has_the_eps_for_that(tmp_path: Any) -> None:
    with built(tiny_config()) as algo:
        groups = [o.param_groups[0] for o in learner_of(algo)._named_optimizers.values()]
        assert (torch.full((1,), 1e-30) * 1e-10).item() == 0.0
        assert [group["eps"] for group in groups] == [FLUSHED_EPS] * 3
        for group in groups:
            group["eps"] = OFFICIAL_EPS  # as on a GPU
        path = algo.save_to_path(tmp_path / "c")
    with built(tiny_config()) as algo:
        algo.restore_from_path(path)
        groups = [o.param_groups[0] for o in learner_of(algo)._named_optimizers.values()]
        assert [group["eps"] for group in groups] == [FLUSHED_EPS] * 3


def test_a_critic_that_does_not_train_stays_as_it_is() -> None:
    config = tiny_config(
        training={"train_actor": False, "train_critic": False, "weight_decay": 0.1}
    )
    with built(config) as algo:
        before = frozen(algo, "behavior.critic")
        train_until(algo, 3)
        assert_same(frozen(algo, "behavior.critic"), before)


def test_learning_rates_are_numbers_or_schedules() -> None:
    config = tiny_config(training={"world_model_lr": [[0, 1e-3], [100, 1e-4]], "actor_lr": 5e-4})
    with built(config) as algo:

        def rates() -> list[float]:
            optimizers = [learner_of(algo).get_optimizer(DEFAULT_MODULE_ID, n) for n in PARTS]
            return [o.param_groups[0]["lr"] for o in optimizers]

        assert rates() == pytest.approx([1e-3, 5e-4, 1e-3])
        while train_until(algo, 1)["dreamer"]["agent_steps"] < 50:
            pass
        steps = algo._agent_steps
        assert rates() == pytest.approx([1e-3 - 9e-4 * steps / 100, 5e-4, 1e-3], rel=0.03)
        while train_until(algo, 1)["dreamer"]["agent_steps"] < 104:
            pass
        assert rates() == pytest.approx([1e-4, 5e-4, 1e-3])


def test_latents_written_back_are_those_of_the_update_that_just_ran() -> None:
    config = tiny_config(training={"horizon_H": 2}, length=20)
    with built(config) as algo:
        train_until(algo, 3)
        agent_of(algo).noise = FixedNoise()
        agent = copy.deepcopy(agent_of(algo))
        batch = algo.replay.sample()
        algo._batches.next = lambda: copy.deepcopy(batch)  # type: ignore[method-assign]
        tensors = {key: torch.as_tensor(x) for key, x in batch.items() if key != "index"}
        module = learner_of(algo).module[DEFAULT_MODULE_ID]
        out = agent(module.model_batch(tensors))
        algo._update()

        stored = algo.replay.refresh_latents(copy.deepcopy(batch))
        steps, counts = np.unique(batch["index"][:, 1:], return_counts=True)
        once = np.isin(batch["index"][:, 1:], steps[counts == 1])
        assert once.sum() >= 8
        deter, stoch = out.deter.half().numpy(), out.stoch.numpy()
        np.testing.assert_array_equal(stored["deter"][:, 1:][once], deter[once])
        np.testing.assert_array_equal(stored["stoch"][:, 1:][once], stoch[once])
        assert (deter[once][1:] != deter[once][:-1]).any(-1).all()  # a shift would show

        written = {i: d for i, d in zip(batch["index"][:, 1:][once], deter[once], strict=True)}
        contexts = 0
        for _ in range(20):
            sample = algo.replay.sample()
            for i, context in zip(sample["index"][:, 0], sample["deter"][:, 0], strict=True):
                if i in written:
                    contexts += 1
                    np.testing.assert_array_equal(context, written[i])
        assert contexts > 5


def test_a_row_starts_from_its_stored_latents_unless_it_begins_an_episode() -> None:
    with built(tiny_config(length=40)) as algo:
        fill(algo, 80)
        agent = agent_of(algo)
        agent.noise = FixedNoise()
        module = learner_of(algo).module[DEFAULT_MODULE_ID]
        batch = {key: torch.as_tensor(x) for key, x in algo.replay.sample().items()}
        batch.pop("index")
        batch["is_first"][:] = False
        batch["is_first"][:2, 1] = True  # two of four rows begin an episode right after the context

        def posterior(changed: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                return agent(module.model_batch(changed)).deter

        base = posterior(batch)
        for name in ("deter", "action/action"):
            changed = copy.deepcopy(batch)
            changed[name][:, 0] = (changed[name][:, 0] + 1) % 3
            same = (posterior(changed) == base).flatten(1).all(1)
            assert same.tolist() == [True, True, False, False], name
