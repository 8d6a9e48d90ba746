"""Tests of the classic variant: other arguments of the same classes."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classic import TINY, tiny_agent
from gymnasium import spaces
from ray.rllib.core import DEFAULT_MODULE_ID
from tiny import CONTINUOUS, DISCRETE, IMAGE, agent_of, built, learner_of, tiny_config, train_until
from torch import nn

from rllib_dreamer.dreamer_catalog import DreamerCatalog
from rllib_dreamer.dreamer_config import DreamerConfig
from rllib_dreamer.model import nets, ops
from rllib_dreamer.model.agent import Agent, build_agent
from rllib_dreamer.model.distributions import FixedNoise, RandomNoise, TanhNormal
from rllib_dreamer.model.optim import Adam
from rllib_dreamer.model.rssm import DenseRSSM, State
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig, ObsSpec, model_config
from rllib_dreamer.policy import DreamerPolicy

EXAMPLE = Path(__file__).resolve().parents[1] / "tuned_examples" / "walker_classic.py"

# Millions, as published.
PUBLISHED = {
    "encoder": 4.2,
    "RSSM": 4.8,
    "decoder": 4.3,
    "reward": 4.3,
    "continue": 4.3,
    "actor": 1.3,
    "critic, online and target": 2.0,
}


def example() -> DreamerConfig:
    """The config of the tuned example."""
    return runpy.run_path(str(EXAMPLE))["config"]


# -- size ------------------------------------------------------------------------------------------


def test_parameters_are_within_a_tenth_of_the_published_table() -> None:
    """Each row of the table; its rows sum to 25.2M, not to the 29.5M that it states as the total.

    So the sum of ours is held against that of the rows.
    """
    config = example()
    with torch.device("meta"):
        catalog = DreamerCatalog(
            observation_space=spaces.Box(0, 255, (64, 64, 3), np.uint8),
            action_space=spaces.Box(-1.0, 1.0, (6,), np.float32),
            model_config_dict=config.model_config,
        )
        agent = catalog.build_agent()
    world, behavior = agent.world, agent.behavior
    parts: dict[str, list[nn.Module]] = {
        "encoder": [world.encoder],
        "RSSM": [world.rssm],
        "decoder": [world.decoder],
        "reward": [world.reward],
        "continue": [world.cont],
        "actor": [behavior.actor],
        "critic, online and target": [behavior.critic, behavior.slow_critic],
    }
    ours = {k: sum(p.numel() for m in ms for p in m.parameters()) / 1e6 for k, ms in parts.items()}
    assert sum(ours.values()) == pytest.approx(sum(p.numel() for p in agent.parameters()) / 1e6)
    print(f"\n{'':28}{'published':>10}{'ours':>8}{'':>8}")
    rows = [(name, PUBLISHED[name], ours[name]) for name in PUBLISHED]
    rows.append(("all rows (29.5M as stated)", sum(PUBLISHED.values()), sum(ours.values())))
    for name, theirs, mine in rows:
        print(f"{name:28}{theirs:9.1f}M{mine:7.2f}M{mine / theirs - 1:+8.1%}")
    for name, theirs, mine in rows:
        assert mine == pytest.approx(theirs, rel=0.1), name


def test_the_example_is_the_published_set_up() -> None:
    config = example()
    config.validate()
    model = DreamerCatalog(
        observation_space=IMAGE, action_space=CONTINUOUS, model_config_dict=config.model_config
    )
    m, loss = model.model_config, model.loss_config
    assert (m.deter, m.stoch, m.classes, m.embed, m.feat) == (512, 32, 32, 1024, 1536)
    assert (m.reward_layers, m.cont_layers, m.actor_layers, m.critic_layers) == (4, 4, 4, 4)
    assert (loss.horizon, loss.free_nats, loss.slow_rate) == (15, 1.0, 0.02)
    assert loss.return_percentiles == (5.0, 95.0) and loss.actor_grad == "dynamics"
    assert loss.discount == pytest.approx(0.997)
    assert (loss.scales["dyn"], loss.scales["rep"]) == (0.8, 0.2)
    assert model.initial_random_steps == 5000


def test_every_default_is_off() -> None:
    config = model_config("1M")
    assert (config.cell, config.norm, config.downsample) == ("block_gru", "rms", "pool")
    assert config.actor_dist == "bounded_normal" and LossConfig().actor_grad == "reinforce"
    widths = (config.embed, config.reward_units, config.cont_units)
    assert {*widths, config.actor_units, config.critic_units} == {0}
    assert DreamerConfig().optimizer == "laprop" and DreamerConfig().grad_clip_norm is None


# -- parts -----------------------------------------------------------------------------------------


def test_layer_norm_gru_is_the_plain_one() -> None:
    """Against the textbook equations with PyTorch's own layer norm."""
    config = model_config("1M", **TINY)
    torch.manual_seed(0)
    rssm = DenseRSSM(14, 2, config)
    with torch.no_grad():
        for param in rssm.parameters():
            param.add_(0.2 * torch.randn_like(param))
    deter, stoch, action = torch.randn(5, 16), torch.rand(5, 3, 4), 3.0 * torch.randn(5, 2)
    scaled = action / action.abs().clamp(min=1.0)

    first, gates, norm = rssm.inputs, rssm.dense_gates, rssm.gates_norm
    x = F.linear(torch.cat([stoch.flatten(1), scaled], 1), first.linear.weight, first.linear.bias)
    x = F.silu(F.layer_norm(x, (12,), first.norm.scale, first.norm.shift, 1e-3))
    x = F.linear(torch.cat([x, deter], 1), gates.weight, gates.bias)
    x = F.layer_norm(x, (48,), norm.scale, norm.shift, 1e-3)
    reset, cand, update = x[:, :16].sigmoid(), x[:, 16:32], (x[:, 32:] - 1.0).sigmoid()
    expected = update * torch.tanh(reset * cand) + (1.0 - update) * deter

    ours = rssm.cell(State(deter, stoch), rssm.prepare_action(action))
    torch.testing.assert_close(ours, expected)


def test_layer_norm_forms() -> None:
    norm = nets.LayerNorm(3)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.shift.copy_(torch.tensor([0.1, 0.0, -0.1]))
    x = torch.randn(2, 4, 4, 3)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = normed * norm.scale + norm.shift
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.silu(x), F.silu(expected))
    pooled = x.reshape(2, 2, 2, 2, 2, 3).amax((2, 4))
    torch.testing.assert_close(norm.pool_silu(x), F.silu(norm(pooled)))
    phases = torch.randn(2, 2, 2, 12)
    torch.testing.assert_close(norm.phase_silu(phases), F.silu(norm(ops.place_phases(phases))))


def test_strided_encoder_halves_like_the_pooled_one() -> None:
    frames = torch.randint(0, 256, (2, 32, 64, 3), dtype=torch.uint8)
    for norm in ("rms", "layer"):
        for downsample in ("stride", "pool"):
            config = model_config(
                "1M", **{**TINY, "norm": norm, "downsample": downsample, "embed": 0}
            )
            agent = build_agent(
                {"image": ObsSpec("image", (32, 64, 3))},
                {"action": ActionSpec("continuous", 2)},
                config,
                LossConfig(),
            )
            encoder = agent.world.encoder
            assert encoder({"image": frames}).shape == (2, 2 * 4 * 8) == (2, encoder.embed)
    wide = tiny_agent().world.encoder
    assert wide({"image": frames[:, :, :32]}).shape == (2, 14) == (2, wide.embed)


def test_heads_have_their_own_widths() -> None:
    agent = tiny_agent()
    widths = {
        "reward": agent.world.reward.out.in_features,
        "cont": agent.world.cont.out.in_features,
        "actor": agent.behavior.actor.mlp[-1].linear.out_features,
        "critic": agent.behavior.slow_critic.out.in_features,
    }
    assert widths == {"reward": 9, "cont": 8, "actor": 7, "critic": 6}


def test_tanh_normal_is_the_transformed_one_of_pytorch() -> None:
    mean, raw_std = torch.randn(6, 3), torch.randn(6, 3)
    dist = TanhNormal(mean, raw_std, 0.2, 0.9)
    base = torch.distributions.Normal(mean, 0.7 * torch.sigmoid(raw_std + 2.0) + 0.2)
    reference = torch.distributions.TransformedDistribution(
        base, torch.distributions.TanhTransform(cache_size=1)
    )
    event = reference.sample()
    torch.testing.assert_close(
        dist.log_prob(event), reference.log_prob(event).sum(-1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(dist.mode(), torch.tanh(mean))
    noise = FixedNoise(0.7)
    torch.testing.assert_close(dist.sample(noise), torch.tanh(mean + 0.7 * base.scale))
    torch.testing.assert_close(dist.entropy(noise), -dist.log_prob(dist.sample(noise)))
    assert torch.isfinite(dist.log_prob(torch.tensor([1.0, -1.0, 0.0]))).all()


def test_tanh_normal_entropy_is_right_on_average() -> None:
    """Against the integral of -p log p, and its gradient against a finite difference."""
    grid = torch.linspace(-1 + 1e-5, 1 - 1e-5, 200_001)

    def integral(mean: float, raw_std: float) -> float:
        log_prob = TanhNormal(
            torch.full((grid.numel(), 1), mean), torch.full((grid.numel(), 1), raw_std)
        ).log_prob(grid.unsqueeze(-1))
        return float(torch.trapezoid(-log_prob.exp() * log_prob, grid))

    torch.manual_seed(0)
    mean = torch.tensor(0.3, requires_grad=True)
    draws = 200_000
    dist = TanhNormal(mean.expand(draws, 1), torch.full((draws, 1), -2.0))
    entropy = dist.entropy(RandomNoise()).mean()
    assert float(entropy.detach()) == pytest.approx(integral(0.3, -2.0), abs=0.01)
    (slope,) = torch.autograd.grad(entropy, mean)
    expected = (integral(0.35, -2.0) - integral(0.25, -2.0)) / 0.1
    assert float(slope) == pytest.approx(expected, abs=0.01)
    assert dist.max_entropy() == pytest.approx(np.log(2.0))


def test_random_actions_cover_their_range() -> None:
    """Also by way of the agent, whose state must hold the action that was really taken."""
    agent = tiny_agent()
    obs = {"image": torch.zeros(500, 32, 32, 3, dtype=torch.uint8)}
    state = agent.initial_state(500)
    actions, after = agent.act(obs, state, explore=True, random=True)
    assert actions["action"].min() < -0.95 and actions["action"].max() > 0.95
    assert abs(float(actions["action"].mean())) < 0.1
    assert torch.equal(after.action, actions["action"])
    sampled, _ = agent.act(obs, state, explore=True)
    assert sampled["action"].std(0).max() < 1e-6  # fixed noise: the actor


# -- through RLlib ---------------------------------------------------------------------------------


def test_the_classic_config_trains() -> None:
    """Random steps first, then updates of every part by Adam, clipped."""
    training = {
        "actor_grad": "dynamics",
        "optimizer": "adam",
        "grad_clip_norm": 100.0,
        "initial_random_steps": 20,
        "loss_scales": {"dyn": 0.8, "rep": 0.2, "repval": 0.0},
    }
    config = tiny_config(
        model=TINY, training=training, observation_space=IMAGE, action_space=CONTINUOUS
    )
    with built(config) as algo:
        before = copy.deepcopy(agent_of(algo))
        result = train_until(algo, 2)
        names = ("world_model", "actor", "critic")
        optimizers = [learner_of(algo).get_optimizer(DEFAULT_MODULE_ID, n) for n in names]
        assert all(type(optimizer) is Adam for optimizer in optimizers)
        learned = result["learners"]["default_policy"]
        assert all(np.isfinite(float(learned[k])) for k in ("loss_actor", "loss_image", "kl"))
        assert float(learned["update_norm"]) > 0
        after = agent_of(algo)
        for part in ("world.encoder", "world.rssm", "behavior.actor", "behavior.critic"):
            pairs = zip(
                before.get_submodule(part).parameters(),
                after.get_submodule(part).parameters(),
                strict=True,
            )
            assert any(not torch.equal(a, b) for a, b in pairs), part


def test_gradients_are_clipped_together() -> None:
    """To a norm far below Adam's epsilon they move nothing, above their own norm they are free."""
    norms = {}
    for limit in (None, 1e6, 1e-12):
        training = {"optimizer": "adam", "grad_clip_norm": limit}
        with built(tiny_config(training=training)) as algo:
            learned = train_until(algo, 1)["learners"]["default_policy"]
            norms[limit] = float(learned["update_norm"])
    assert norms[1e6] == norms[None] > 1e-2
    assert norms[1e-12] < 1e-3 * norms[None]


def test_an_exported_classic_policy_acts_as_before(tmp_path: Path) -> None:
    config = tiny_config(
        model=TINY,
        training={"actor_grad": "dynamics"},
        observation_space=IMAGE,
        action_space=CONTINUOUS,
    )
    with built(config) as algo:
        policy = DreamerPolicy.from_checkpoint(algo.save_to_path(tmp_path / "c"), seed=0)
    loaded = DreamerPolicy.load(policy.export(tmp_path / "policy"), seed=0)
    for _ in range(3):
        obs = IMAGE.sample()
        np.testing.assert_array_equal(loaded.act(obs), policy.act(obs))


def test_random_steps_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    act = Agent.act

    def spy(self: Agent, obs: Any, state: Any, explore: bool, random: bool = False) -> Any:
        calls.append(random)
        return act(self, obs, state, explore, random)

    monkeypatch.setattr(Agent, "act", spy)
    config = tiny_config(training={"initial_random_steps": 6}, length=50)
    with built(config) as algo:
        calls.clear()
        for _ in range(12):
            algo.train()
        steps = algo._agent_steps
    assert steps == 12 and calls == [True] * 6 + [False] * 6


# -- wrong values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cell", "cell='no' is not known: choose one of block_gru, gru"),
        ("norm", "norm='no' is not known: choose one of rms, layer"),
        ("downsample", "downsample='no' is not known: choose one of pool, stride"),
        ("actor_dist", "actor_dist='no' is not known: choose one of bounded_normal, tanh_normal"),
    ],
)
def test_an_unknown_variant_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config("1M", **{name: "no"})


def test_an_unknown_policy_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="actor_grad='no' is not known: choose one of reinforce"):
        LossConfig(actor_grad="no")


@pytest.mark.parametrize(
    "name", ["embed", "reward_units", "cont_units", "actor_units", "critic_units"]
)
def test_a_negative_width_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be a width >= 1, or 0"):
        ModelConfig(16, 8, 4, 2, 8, **{name: -1})


def test_discrete_actions_have_no_gradient_through_the_dynamics() -> None:
    config = tiny_config(training={"actor_grad": "dynamics"}, action_space=DISCRETE)
    message = r"actor_grad='dynamics' needs continuous actions, but \['action'\] are discrete"
    with pytest.raises(ValueError, match=message):
        DreamerCatalog(
            observation_space=IMAGE, action_space=DISCRETE, model_config_dict=config.model_config
        ).build_agent()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "`optimizer`='sgd' must be one of"),
        ({"grad_clip_norm": 0}, "`grad_clip_norm`=0 must be None or a number > 0"),
        ({"actor_grad": "no"}, "`actor_grad`='no' must be one of"),
        ({"initial_random_steps": -1}, "`initial_random_steps`=-1 must be a whole number >= 0"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "`weight_decay`=0.1 is not for"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(training=settings).validate()
