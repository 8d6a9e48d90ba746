"""Runs our model on a golden file and names everything that it computes as the file does.

The forward pass under test is `Agent.forward` itself: four calls inside it are overheard
(filtering, imagination and the two kinds of returns), heads are evaluated once more on the states
overheard.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from golden import LOSS_NAMES, MODULES, Golden, is_slow
from torch import Tensor

from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent, AgentOutput
from rllib_dreamer.model.optim import clip_by_parameter_norm
from rllib_dreamer.model.rssm import State
from rllib_dreamer.model.world_model import kl_losses

# Gradients agree to 4e-6 of their norm: elements below this share of a tensor's largest are noise.
# Nearly all of them belong to far bins of the two-hot heads, whose probability is 1e-10.
NEGLIGIBLE = 1e-5

OFFICIAL_LOSSES = {ours: official for official, ours in LOSS_NAMES.items()}


class Call(NamedTuple):
    """An overheard call: its arguments by name and its result."""

    args: dict[str, Any]
    result: Any


class Recording(NamedTuple):
    """One forward pass and the calls overheard in it, by name of the function."""

    output: AgentOutput
    calls: dict[str, Call]


class Update(NamedTuple):
    """One training step: tensors by our parameter names, taken after the step.

    grads are those before clipping, clip_factors what clipping multiplies them with, steps is the
    optimizer's count.
    """

    total: Tensor
    losses: dict[str, Tensor]
    grads: dict[str, Tensor]
    clip_factors: dict[str, Tensor]
    params: dict[str, Tensor]
    low: Tensor
    high: Tensor
    steps: int


@contextmanager
def overhear(owner: Any, name: str, calls: dict[str, Call]) -> Iterator[None]:
    """Keeps arguments and result of the calls of `owner.name`; the last one stays."""
    function: Callable[..., Any] = getattr(owner, name)
    signature = inspect.signature(function)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls[name] = Call(dict(signature.bind(*args, **kwargs).arguments), result)
        return result

    with mock.patch.object(owner, name, wrapper):
        yield


def record(agent: Agent, batch: Mapping[str, Tensor]) -> Recording:
    """One forward pass of the agent. The return normaliser moves, as in training."""
    calls: dict[str, Call] = {}
    with (
        overhear(agent.world.rssm, "observe", calls),
        overhear(agent.behavior, "imagine", calls),
        overhear(ops, "lambda_return", calls),
        overhear(ops, "replay_return", calls),
    ):
        output = agent(batch)
    return Recording(output, calls)


@torch.no_grad()
def outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """Every `out/...` entry of the forward pass, by its key in the file and in its shape."""
    return {
        f"out/{key}": value
        for part in PARTS
        for key, value in part(golden, agent, recording).items()
    }


def posterior_outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """tokens, prevaction, latents, logits, kl, reward and continue heads, reconstructions."""
    observe = recording.calls["observe"]
    posterior, rssm = observe.result, agent.world.rssm
    prior_logits = rssm.prior_logits(posterior.deter)
    kl, _ = kl_losses(posterior.logits, prior_logits, agent.world.config.unimix, 0.0)
    feat = agent.world.feat(State(posterior.deter, posterior.stoch))
    reward = agent.world.reward(feat)
    result = {
        "tokens": observe.args["tokens"],
        "deter": posterior.deter,
        "stoch": posterior.stoch,
        "post_logit": posterior.logits,
        "prior_logit": prior_logits,
        "kl": kl["dyn"],
        "reward_logit": reward.logits,
        "reward_pred": reward.mean,
        "con_logit": agent.world.cont(feat).logit,
    }
    start = 0
    for key in sorted(golden.actions):
        spec = golden.actions[key]
        x = observe.args["action"][..., start : start + spec.width]
        if spec.kind == "discrete":
            x = x.unflatten(-1, (spec.size, spec.classes)).argmax(-1)
        result[f"prevaction/{key}"] = shaped(x, golden.config["act_space"][key])
        start += spec.width
    return result | reconstructions(golden, agent, posterior.deter, posterior.stoch)


def reconstructions(
    golden: Golden, agent: Agent, deter: Tensor, stoch: Tensor
) -> dict[str, Tensor]:
    """Decoder means: images as one frame and as pixel means, vectors in symlog space."""
    rows = deter.shape[0]
    raw = agent.world.decoder(deter.flatten(0, 1), stoch.flatten(0, 1).flatten(1))
    predictions = agent.world.decoder.predictions(raw)
    result = {}
    for key, spec in golden.obs.items():
        space = golden.config["obs_space"][key]
        x = (raw if spec.kind == "vector" else predictions)[key].unflatten(0, (rows, -1))
        if spec.kind == "image":
            result[f"recon/{key}_t0"] = x[:1, :1]
            result[f"recon/{key}_mean_hw"] = x.mean((2, 3))
        else:
            result[f"recon/{key}"] = shaped(x, space)
    return result


def imagined_outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """Trajectory, heads along it, returns, weights, advantages and the losses before averaging."""
    c, feat = agent.world.config, recording.calls["imagine"].result.feat
    args, returns = recording.calls["lambda_return"]
    deter, stoch = feat.split([c.deter, c.stoch * c.classes], -1)
    normalizer = agent.behavior.normalizer
    scale = normalizer.scale()
    critic = agent.behavior.critic(feat)
    return {
        "imag/deter": deter,
        "imag/stoch": stoch.unflatten(-1, (c.stoch, c.classes)),
        "imag/prior_logit": agent.world.rssm.prior_logits(deter[:, 1:]),
        "imag/reward": args["reward"],
        "imag/con": args["cont"],
        "imag/value": args["value"],
        "imag/slowvalue": agent.behavior.slow_critic(feat).mean,
        "imag/value_logit": critic.logits,
        "imag/weight": args["cont"].cumprod(1),
        "imag/ret": returns,
        "imag/adv": (returns - args["value"][:, :-1]) / scale,
        "imag/ret_offset": normalizer.low.clone(),
        "imag/ret_scale": scale,
        "imag/policy_loss": recording.output.losses["actor"],
        "imag/value_loss": recording.output.losses["critic"],
    }


def policy_outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """Action, policy, log-probability and entropy of each action leaf along the trajectory."""
    trajectory = recording.calls["imagine"].result
    result = {}
    for key, dist in agent.behavior.actor(trajectory.feat).items():
        space, spec = golden.config["act_space"][key], golden.actions[key]
        action = trajectory.actions[key]
        result[f"imag/action/{key}"] = shaped(action, space)
        result[f"imag/logp/{key}"] = dist.log_prob(action)
        result[f"imag/entropy/{key}"] = dist.entropy()
        if spec.kind == "discrete":  # logits up to a constant: compared after normalising both
            logits = dist.log_probs.flatten(-2)
            result[f"imag/policy/{key}/logit"] = shaped(logits, space, spec.classes)
        else:
            result[f"imag/policy/{key}/mean"] = shaped(dist.mean, space)
            result[f"imag/policy/{key}/std"] = shaped(dist.std, space)
    return result


def replay_outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """Inputs and targets of the replay value loss."""
    posterior = recording.calls["observe"].result
    feat = agent.world.feat(State(posterior.deter, posterior.stoch))
    critic = agent.behavior.critic(feat)
    args, returns = recording.calls["replay_return"]
    return {
        "repl/boot": args["boot"],
        "repl/ret": returns,
        "repl/value": critic.mean,
        "repl/slowvalue": agent.behavior.slow_critic(feat).mean,
        "repl/value_logit": critic.logits,
    }


def loss_outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """Every loss elementwise and its mean, and the total. Actor and critic are averaged over H."""
    losses = recording.output.losses
    rows, steps = recording.output.deter.shape[:2]
    result = {"loss_total": ops.total_loss(losses, agent.scales)}
    for name, loss in losses.items():
        if name in ("actor", "critic"):
            loss = loss.mean(1).unflatten(0, (rows, steps))
        official = OFFICIAL_LOSSES.get(name, name)
        result |= {f"loss/{official}": loss, f"loss_mean/{official}": loss.mean()}
    return result


def metric_outputs(golden: Golden, agent: Agent, recording: Recording) -> dict[str, Tensor]:
    """The official log's means, of returns after normalising them."""
    imagined = imagined_outputs(golden, agent, recording)
    policy = policy_outputs(golden, agent, recording)
    x = {key.removeprefix("imag/"): value for key, value in imagined.items()}
    normed = (x["ret"] - x["ret_offset"]) / x["ret_scale"]
    result = {
        "dyn_ent": recording.output.metrics["prior_entropy"],
        "rep_ent": recording.output.metrics["posterior_entropy"],
        "adv": x["adv"].mean(),
        "adv_std": x["adv"].std(correction=0),
        "adv_mag": x["adv"].abs().mean(),
        "rew": x["reward"].mean(),
        "con": x["con"].mean(),
        "val": x["value"].mean(),
        "slowval": x["slowvalue"].mean(),
        "weight": x["weight"].mean(),
        "tar": x["ret"].mean(),
        "ret": normed.mean(),
        "ret_min": normed.min(),
        "ret_max": normed.max(),
        "ret_rate": (normed.abs() >= 1.0).float().mean(),
    }
    for key, dist in agent.behavior.actor(recording.calls["imagine"].result.feat).items():
        result[f"ent/{key}"] = policy[f"imag/entropy/{key}"][:, :-1].mean()
        if golden.actions[key].kind == "discrete":
            result[f"rand/{key}"] = result[f"ent/{key}"] / dist.max_entropy()
    return {f"metric/{key}": value for key, value in result.items()}


PARTS = (
    posterior_outputs,
    imagined_outputs,
    policy_outputs,
    replay_outputs,
    loss_outputs,
    metric_outputs,
)


def shaped(x: Tensor, space: Mapping[str, Any], *trailing: int) -> Tensor:
    """(..., flat) -> (..., *shape of the space, *trailing)."""
    return x.reshape(*x.shape[:-1], *space["shape"], *trailing)


def gradient_norms(agent: Agent, output: AgentOutput) -> dict[str, Tensor]:
    """L2 norm of the gradient of every unscaled mean loss in every module, `out/gradnorm/...`.

    The slow critic is module "slow", where nothing may arrive.
    """
    modules = MODULES | {"slow": "behavior.slow_critic."}
    named = [(name, param.requires_grad_()) for name, param in agent.named_parameters()]
    result = {}
    for loss_name, loss in output.losses.items():
        grads = torch.autograd.grad(
            loss.mean(), [p for _, p in named], retain_graph=True, allow_unused=True
        )
        for module, prefix in modules.items():
            parts = [
                g.double().square().sum()
                for (name, _), g in zip(named, grads, strict=True)
                if g is not None and name.startswith(prefix)
            ]
            norm = torch.stack(parts).sum().sqrt() if parts else torch.zeros(())
            result[f"out/gradnorm/{OFFICIAL_LOSSES.get(loss_name, loss_name)}/{module}"] = norm
    return result


def is_zero_by_arithmetic(golden: Golden, name: str) -> bool:
    """True for mean heads of a policy whose every sample is its mean: d log p / d mean = 0."""
    return golden.eps == 0.0 and bool(re.search(r"actor\.heads\..*\.mean\.", name))


def train(golden: Golden, agent: Agent, updates: int = 2) -> list[Update]:
    """Updates of the agent on the file's batch, with our optimizer and slow critic.

    The second starts where the first ended, except for undecided elements, see `settle`.
    """
    batch = golden.batch()
    trained = {name: p for name, p in agent.named_parameters() if not is_slow(name)}
    optimizer = golden.optimizer(list(trained.values()))
    results = []
    for _ in range(updates):
        output = agent(batch)
        total = ops.total_loss(output.losses, agent.scales)
        optimizer.zero_grad()
        total.backward()
        grads = {name: param.grad.clone() for name, param in trained.items()}
        factors = clip_factors(golden, grads, trained)
        for name, param in trained.items():
            if is_zero_by_arithmetic(golden, name):
                param.grad.zero_()
        optimizer.step()
        params = {name: param.detach().clone() for name, param in trained.items()}
        settle(golden, trained, len(results) + 1)
        agent.behavior.update_slow_critic()
        slow = {n: p.detach().clone() for n, p in agent.named_parameters() if is_slow(n)}
        norm = agent.behavior.normalizer
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        results.append(
            Update(
                total.detach(),
                losses,
                grads,
                factors,
                params | slow,
                norm.low.clone(),
                norm.high.clone(),
                optimizer.param_groups[0]["step"],
            )
        )
    return results


def decided(golden: Golden, name: str, like: Tensor, update: int) -> Tensor:
    """True for the elements of a parameter whose gradients up to an update are more than noise.

    The first update is lr * sign(g), so an element whose gradient is smaller than the noise may
    turn round; the second depends on g2 / g1. Exact zeros count as decided: nothing moves there.
    """
    result = torch.ones_like(like, dtype=torch.bool)
    for i in range(1, update + 1):
        grad = golden.read(f"out/grad{i}/", name, like).abs()
        result &= (grad == 0) | (grad >= NEGLIGIBLE * grad.max())
    return result


@torch.no_grad()
def settle(golden: Golden, params: Mapping[str, Tensor], update: int) -> None:
    """Gives undecided elements the file's value, so that both go on from the same point.

    A single weight of the first convolution, off by two learning rates, changes the next gradient
    by several percent.
    """
    if golden.keys(f"out/param{update}/"):
        for name, param in params.items():
            theirs = golden.read(f"out/param{update}/", name, param)
            param.copy_(torch.where(decided(golden, name, param, update), param, theirs))


def clip_factors(
    golden: Golden, grads: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What adaptive clipping multiplies each gradient with; 1 for a gradient of zero."""
    agc = golden.config["agent"]["opt"]["agc"]
    values = [param.detach() for param in params.values()]
    clipped = clip_by_parameter_norm(list(grads.values()), values, agc)
    return {
        name: after.norm() / before.norm() if before.norm() > 0 else torch.ones(())
        for (name, before), after in zip(grads.items(), clipped, strict=True)
    }


def updates_of_stored_gradients(
    golden: Golden, params: Mapping[str, Tensor], grads: list[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """What our optimizer, alone, adds to each parameter at each step.

    In float64, so that the difference of two parameters does not drown in their rounding.
    """
    copies = {name: param.detach().double() for name, param in params.items()}
    optimizer = golden.optimizer(list(copies.values()))
    results = []
    for step in grads:
        before = {name: param.clone() for name, param in copies.items()}
        for name, param in copies.items():
            param.grad = step[name].double()
        optimizer.step()
        results.append({name: param - before[name] for name, param in copies.items()})
    return results
