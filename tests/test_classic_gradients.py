"""Gradients of the classic variant: the actor's, through the dynamics; nobody else's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from classic import H, gradients, start_state, tiny_agent, tiny_batch
from torch import Tensor, nn

from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.behavior import constant
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.sizes import LossConfig


def actor_gradient(agent: Agent, relaxed: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the mean imagined return with respect to the actor's parameters; the return."""
    with samples_as_probabilities(relaxed):
        _, returns = agent.behavior.imagine_through(agent.world, start_state(agent), agent.noise)
        return gradients(agent, returns.mean()), returns.mean().detach()


def samples_as_probabilities(enabled: bool) -> Any:
    """Patches the straight-through sample to be its own gradient: then it is differentiable."""

    def relaxed(index: Tensor, probs: Tensor) -> Tensor:
        return probs

    function: Callable = relaxed if enabled else ops.straight_through
    return mock.patch.object(ops, "straight_through", function)


def test_actor_gradient_through_the_dynamics_is_the_finite_difference() -> None:
    """Of the imagined return, in the direction of the gradient.

    Samples are replaced by their probabilities, which a finite difference can see. The actor reads
    features without gradient, so the difference holds them as they were before the step.
    """
    agent = tiny_agent()
    actor, forward = agent.behavior.actor, agent.behavior.actor.forward
    seen: list[Tensor] = []

    def recording(feat: Tensor) -> Any:
        seen.append(feat)
        return forward(feat)

    with mock.patch.object(actor, "forward", recording):
        found, _ = actor_gradient(agent)
    assert found and all(name.startswith("behavior.actor.") for name in found)
    assert not any(feat.requires_grad for feat in seen)
    params = dict(agent.named_parameters())
    norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    step = 2e-2
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, grad in found.items():
                params[name].add_(grad / norm, alpha=sign * step)
        replay = iter(seen)
        with mock.patch.object(actor, "forward", lambda _, r=replay: forward(next(r))):
            values.append(float(actor_gradient(agent)[1]))
        with torch.no_grad():
            for name, grad in found.items():
                params[name].sub_(grad / norm, alpha=sign * step)
    difference = (values[0] - values[1]) / (2 * step)
    assert difference == pytest.approx(float(norm), rel=2e-2)
    assert float(norm) > 1e-4


def test_cutting_the_dynamics_changes_the_actors_gradient() -> None:
    """What comes by the recurrent cell is a part of it: without it only nothing is left."""
    whole, _ = actor_gradient(tiny_agent(), relaxed=False)
    agent = tiny_agent()
    step = agent.world.rssm.imagine_step

    def cut(state: State, action: Tensor, uniform: Tensor | None) -> State:
        return step(State(*(x.detach() for x in state)), action, uniform)

    with mock.patch.object(agent.world.rssm, "imagine_step", cut):
        short, _ = actor_gradient(agent, relaxed=False)
    name = "behavior.actor.heads.action.mean.weight"
    assert whole[name].norm() > 0 and short[name].norm() > 0
    assert not torch.allclose(whole[name], short[name], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
def test_each_loss_reaches_what_it_should(dtype: torch.dtype, compile: bool) -> None:
    """The actor's loss moves the actor alone, the imagined critic loss the critic alone."""
    agent = tiny_agent()
    agent.dtype, agent.fuse = dtype, compile
    losses = agent(tiny_batch()).losses
    reached = {"actor": "behavior.actor.", "critic": "behavior.critic."}
    for loss, prefix in reached.items():
        found = gradients(agent, losses[loss].mean()) if loss == "critic" else None
        if found is None:
            params = {n: p for n, p in agent.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(
                losses[loss].mean(), list(params.values()), allow_unused=True, retain_graph=True
            )
            found = {n: g for n, g in zip(params, grads, strict=True) if g is not None and g.any()}
        assert found and all(name.startswith(prefix) for name in found), loss
        expected = {n for n, p in agent.named_parameters() if n.startswith(prefix)}
        assert len(found) >= 0.8 * len(expected), loss  # all layers, but dead units


def test_one_backward_gives_the_sum_of_the_gradients() -> None:
    """The world model's gradient is that without an actor; the actor's that of its loss alone."""
    agent, batch = tiny_agent(), tiny_batch()

    def run(keys: list[str] | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        copied = copy.deepcopy(agent)
        losses = copied(batch).losses
        chosen = [x.mean() for k, x in losses.items() if keys is None or k in keys]
        return gradients(copied, torch.stack(chosen).sum())

    total, actor = run(None), run(["actor"])
    others = run([k for k in copy.deepcopy(agent)(batch).losses if k != "actor"])
    for name, grad in total.items():
        alone = actor if name.startswith("behavior.actor.") else others
        torch.testing.assert_close(grad, alone[name], msg=name)


def test_the_value_of_the_actors_loss_is_the_normalised_advantage() -> None:
    agent, batch = tiny_agent(), tiny_batch()
    agent.behavior.loss = LossConfig(horizon=H, actor_grad="dynamics", entropy_scale=0.0)
    calls: list[tuple[Tensor, ...]] = []
    plain = agent.behavior._actor_loss

    def spy(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    with mock.patch.object(agent.behavior, "_actor_loss", spy):
        loss = agent(batch).losses["actor"]
    _, advantage, weight, _ = calls[0]
    assert advantage.requires_grad and not weight.requires_grad
    torch.testing.assert_close(loss.detach(), -weight * advantage.detach())


def test_constant_gives_back_what_it_took() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].bias.requires_grad_(False)
    with pytest.raises(KeyError), constant(module):
        assert not any(p.requires_grad for p in module.parameters())
        raise KeyError
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("name", ["norm", "cell"])
def test_native_kernels_are_left_out_where_they_do_not_fit(name: str) -> None:
    """With the fast forms switched on the losses are the same, not those of the other cell."""
    value = {"norm": "layer", "cell": "gru"}[name]
    overrides = {"cell": "block_gru", "norm": "rms", "blocks": 2, name: value}
    agent = tiny_agent("reinforce", **overrides)
    batch, results = tiny_batch(), []
    for agent.fuse in (False, True):
        copied = copy.deepcopy(agent)
        results.append({k: x.detach() for k, x in copied(batch).losses.items()})
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=1e-3, atol=1e-3, msg=key)
