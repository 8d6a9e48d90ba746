"""Tests of rllib_dreamer.model.behavior."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_export import TINY, agent_and_batch, discrete
from golden_run import gradient_norms, record
from torch import Tensor, nn

from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.behavior import Actor, ReturnNormalizer, pad_last
from rllib_dreamer.model.distributions import RandomNoise
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.sizes import ActionSpec, LossConfig
from rllib_dreamer.model.world_model import encode_action

CASE = TINY
B, T, H = CASE.rows, CASE.steps, CASE.horizon


_AGENT, _BATCH = agent_and_batch(CASE)


@pytest.fixture
def agent() -> Agent:
    return copy.deepcopy(_AGENT)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {key: x.clone() for key, x in _BATCH.items()}


@pytest.mark.parametrize(
    ("variant", "rate", "limit"), [("default", 0.01, 1.0), ("fast", 0.2, 1e-8)]
)
def test_return_normaliser_is_the_official_one(
    units_path: Path, variant: str, rate: float, limit: float
) -> None:
    """Five updates from zero. Debiasing, the third official variant, is not part of DreamerV3."""
    with np.load(units_path) as file:
        x = {k: torch.from_numpy(file[k]) for k in file.files if k.startswith("retnorm/")}
        constants = json.loads(str(file["config"]))["retnorm"]
    percentiles = (constants["perclo"], constants["perchi"])
    normalizer = ReturnNormalizer(
        LossConfig(return_rate=rate, return_limit=limit, return_percentiles=percentiles)
    )
    for step, returns in enumerate(x["retnorm/in"]):
        scale = normalizer.update(returns)
        ours = {
            "lo": normalizer.low,
            "hi": normalizer.high,
            "offset": normalizer.low,
            "scale": scale,
        }
        for key, value in ours.items():
            expected = x[f"retnorm/{variant}/{key}"][step]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16_gradients_point_where_those_of_float32_do(
    agent: Agent, batch: dict[str, Tensor], fuse: bool
) -> None:
    """The cosine is 0.999, or 0.96 where rounding flips a sampled class."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        twin = copy.deepcopy(agent)
        twin.fuse, twin.dtype = fuse, dtype
        ops.total_loss(twin(batch).losses, twin.scales).backward()
        actor = twin.behavior.actor
        for name, param in actor.named_parameters():
            assert param.grad is not None and param.grad.any(), name
        found.append([flat_gradient(part) for part in (twin.world, actor, twin.behavior.critic)])
    for full, half in zip(*found, strict=True):
        assert not torch.equal(full, half)
        assert torch.cosine_similarity(full, half, 0) > 0.95


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_classes_that_a_component_lacks_are_masked_on_the_device_of_the_actor() -> None:
    """The mask moves with the module, once, and no checkpoint has it."""
    spec = ActionSpec("discrete", 2, 5, (3, 5))
    actor = Actor({"valid.keys": spec}, _AGENT.world.config).to("meta")
    feat = torch.empty(4, _AGENT.world.config.feat, device="meta")
    first, again = (actor(feat)["valid.keys"] for _ in range(2))
    assert first.valid.device.type == "meta" and first.valid is again.valid
    assert first.max_entropy() == pytest.approx(math.log(3) + math.log(5))
    assert all(key.endswith(("weight", "bias", "scale")) for key in actor.state_dict())


def test_return_normaliser_is_saved_with_the_model() -> None:
    normalizer = ReturnNormalizer(LossConfig())
    normalizer.update(torch.randn(50))
    assert set(normalizer.state_dict()) == {"low", "high"}
    assert not list(normalizer.parameters())


def test_percentiles_are_taken_of_what_every_learner_has(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    gathered: list[Tensor] = []

    def gather(returns: Tensor) -> Tensor:
        gathered.append(returns)
        return torch.cat([returns, returns + 1000.0])

    agent.behavior.gather = gather
    before = agent.behavior.normalizer.high.clone()
    agent(batch)
    assert gathered[0].shape == (B * T, H)
    high = torch.quantile(torch.cat([gathered[0], gathered[0] + 1000.0]).flatten(), 0.8)
    expected = torch.lerp(before, high, agent.loss.return_rate)
    torch.testing.assert_close(agent.behavior.normalizer.high, expected)


def test_which_loss_reaches_what(agent: Agent, batch: dict[str, Tensor]) -> None:
    """Actor and imagined critic leave the world model alone; the replay value loss trains it."""
    norms = gradient_norms(agent, agent(batch))
    reached = {"policy": {"pol"}, "value": {"val"}, "repval": {"enc", "dyn", "val"}}
    for loss, modules in reached.items():
        found = {
            m
            for m in ("enc", "dyn", "dec", "rew", "con", "pol", "val", "slow")
            if norms[f"out/gradnorm/{loss}/{m}"] > 0
        }
        assert found == modules, loss


def test_trajectories_start_at_every_posterior_in_row_major_order(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    calls = record(agent, batch).calls
    posterior, trajectory = calls["observe"].result, calls["imagine"].result
    feat = agent.world.feat(State(posterior.deter, posterior.stoch))  # (B, T, F)
    assert trajectory.feat.shape[:2] == (B * T, H + 1)
    for b in range(B):
        for t in range(T):
            torch.testing.assert_close(trajectory.feat[b * T + t, 0], feat[b, t])
    assert not trajectory.feat.requires_grad


def test_imagined_step_follows_from_the_action_before_it(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    trajectory = record(agent, batch).calls["imagine"].result
    c, rssm = agent.world.config, agent.world.rssm
    for i in range(H):
        deter, stoch = trajectory.feat[:, i].split([c.deter, c.stoch * c.classes], -1)
        action = {key: x[:, i] for key, x in trajectory.actions.items()}
        state = State(deter, stoch.unflatten(-1, (c.stoch, c.classes)))
        following = rssm.imagine_step(state, encode_action(action, agent.world.actions), None)
        torch.testing.assert_close(agent.world.feat(following), trajectory.feat[:, i + 1])


def test_replay_targets_bootstrap_from_the_rollout_of_their_own_step(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    calls = record(agent, batch).calls
    imagined, args = calls["lambda_return"].result, calls["replay_return"].args
    assert torch.equal(args["boot"], imagined[:, 0].reshape(B, T))
    assert torch.equal(args["reward"], batch["reward"][:, 1:])
    assert torch.equal(args["is_last"], batch["is_last"][:, 1:])
    assert torch.equal(args["is_terminal"], batch["is_terminal"][:, 1:])


def test_losses_follow_the_equations(agent: Agent, batch: dict[str, Tensor]) -> None:
    """Column i of actor and critic loss: weight_i, action_i, value_i against return_i."""
    recording = record(agent, batch)
    trajectory = recording.calls["imagine"].result
    args, returns = recording.calls["lambda_return"]
    scale = agent.behavior.normalizer.scale()
    dists = agent.behavior.actor(trajectory.feat)
    critic, slow = agent.behavior.critic, agent.behavior.slow_critic
    for i in range(H):
        weight = args["cont"][:, : i + 1].prod(1)
        log_prob = sum(d.log_prob(trajectory.actions[k])[:, i] for k, d in dists.items())
        entropy = sum(d.entropy()[:, i] for d in dists.values())
        advantage = (returns[:, i] - args["value"][:, i]) / scale
        actor = -weight * (log_prob * advantage + agent.loss.entropy_scale * entropy)
        torch.testing.assert_close(recording.output.losses["actor"][:, i], actor)
        dist, slow_value = critic(trajectory.feat[:, i]), slow(trajectory.feat[:, i]).mean
        regular = agent.loss.slow_regularization * dist.loss(slow_value)
        expected = weight * (dist.loss(returns[:, i]) + regular)
        torch.testing.assert_close(recording.output.losses["critic"][:, i], expected)


def test_replay_value_loss_is_masked_where_an_episode_ends(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    loss = agent(batch).losses["repval"]
    assert loss.shape == (B, T - 1)
    assert torch.equal(loss == 0, batch["is_last"][:, 1:-1])


def test_a_time_limit_bootstraps_and_a_termination_does_not(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    """Through the whole forward pass: the target before the end of an episode at step 3."""
    for flag in ("is_last", "is_terminal", "is_first"):
        batch[flag][:] = False
    batch["is_last"][:, 3] = True
    calls = record(agent, batch).calls["replay_return"]
    boot, discount = calls.args["boot"], agent.loss.discount
    limit = batch["reward"][:, 3] + discount * boot[:, 2]
    torch.testing.assert_close(calls.result[:, 1], limit)
    batch["is_terminal"][:, 3] = True
    calls = record(agent, batch).calls["replay_return"]
    torch.testing.assert_close(calls.result[:, 1], batch["reward"][:, 3])


def test_slow_critic_follows_slowly(agent: Agent) -> None:
    slow = [p.clone() for p in agent.behavior.slow_critic.parameters()]
    agent.behavior.update_slow_critic()
    rate = agent.loss.slow_rate
    pairs = zip(slow, agent.behavior.critic.parameters(), strict=True)
    expected = [rate * fast.detach() + (1 - rate) * old for old, fast in pairs]
    torch.testing.assert_close(list(agent.behavior.slow_critic.parameters()), expected)


def test_an_agent_goes_to_other_processes(agent: Agent) -> None:
    again = pickle.loads(pickle.dumps(agent))
    returns = torch.ones(3)
    assert torch.equal(again.behavior.gather(returns), returns)


def test_slow_critic_starts_as_a_copy_without_gradients() -> None:
    agent = _AGENT
    names = [
        dict(m.named_parameters()) for m in (agent.behavior.critic, agent.behavior.slow_critic)
    ]
    assert names[0].keys() == names[1].keys()
    assert not any(p.requires_grad for p in names[1].values())


def test_imagination_is_random_and_repeatable(agent: Agent, batch: dict[str, Tensor]) -> None:
    agent.noise = RandomNoise()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(record(agent, batch).calls["imagine"].result)
    assert torch.equal(runs[0].feat, runs[1].feat)
    assert not torch.equal(runs[0].feat[:, 1], runs[2].feat[:, 1])
    for key in CASE.actions:
        assert torch.equal(runs[0].actions[key], runs[1].actions[key])


def test_pad_last() -> None:
    x = torch.tensor([[1.0, 2.0]])
    assert pad_last(x).tolist() == [[1.0, 2.0, 2.0]]
    assert ops.lambda_return(pad_last(x), pad_last(x), pad_last(x), 1.0).shape == x.shape


@pytest.mark.parametrize(("classes", "told"), [(1, False), (2, True)])
def test_randomness_is_told_where_there_is_a_choice(classes: int, told: bool) -> None:
    agent, batch = agent_and_batch(CASE._replace(actions={"key": discrete(classes)}))
    with torch.no_grad():
        metrics = agent(batch).metrics
    assert ("actor_randomness" in metrics) == told
    assert all(torch.isfinite(x).all() for x in metrics.values())
