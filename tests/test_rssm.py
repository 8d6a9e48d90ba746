"""Tests of rllib_dreamer.model.rssm."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from golden import relative_error
from torch import Tensor

from rllib_dreamer.model import ops
from rllib_dreamer.model.distributions import FixedNoise, RandomNoise
from rllib_dreamer.model.rssm import RSSM, Posterior, State
from rllib_dreamer.model.sizes import ModelConfig, model_config
from rllib_dreamer.model.world_model import kl_losses

B, T, E, A = 3, 6, 7, 5
CONFIG = model_config("1M", deter=32, hidden=12, stoch=3, blocks=4, units=12)


@pytest.fixture(scope="module")
def units(units_path: Path) -> dict[str, Tensor]:
    """One step of the official recurrent cell, and its latent distribution."""
    with np.load(units_path) as file:
        names = ("gru/", "latent/")
        return {k: torch.from_numpy(file[k]) for k in file.files if k.startswith(names)}


def test_recurrent_cell_is_the_official_one(units: dict[str, Tensor]) -> None:
    rssm = RSSM(
        E, A, ModelConfig(deter=32, hidden=12, classes=4, depth=4, units=12, stoch=3, blocks=4)
    )
    layers = {"dynin0": rssm.deter_in, "dynin1": rssm.stoch_in, "dynin2": rssm.action_in}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.linear.weight.copy_(units[f"gru/param/dyn/{name}/kernel"].T)
            layer.linear.bias.copy_(units[f"gru/param/dyn/{name}/bias"])
            layer.norm.scale.copy_(units[f"gru/param/dyn/{name}norm/scale"])
        for name, block in {"dynhid0": rssm.cell_in, "dyngru": rssm.gates}.items():
            block.weight.copy_(units[f"gru/param/dyn/{name}/kernel"])
            block.bias.copy_(units[f"gru/param/dyn/{name}/bias"])
        rssm.cell_norm.scale.copy_(units["gru/param/dyn/dynhid0norm/scale"])
    state = State(units["gru/deter"], units["gru/stoch"])
    ours = rssm.cell(state, rssm.prepare_action(units["gru/action"]))
    assert relative_error(ours, units["gru/out"]) < 1e-5


def test_latent_probabilities_kl_and_free_nats_are_the_official_ones(
    units: dict[str, Tensor],
) -> None:
    logits = {k: units[f"latent/{k}_logit"].clone().requires_grad_() for k in ("post", "prior")}
    probs = ops.unimix_log_probs(logits["post"], 0.01).exp()
    torch.testing.assert_close(probs, units["latent/post_prob"])
    losses, metrics = kl_losses(logits["post"], logits["prior"], 0.01, 1.0)
    raw, _ = kl_losses(logits["post"], logits["prior"], 0.01, 0.0)
    torch.testing.assert_close(raw["dyn"], units["latent/kl"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["dyn"], units["latent/dyn"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["rep"], units["latent/rep"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["posterior_entropy"], units["latent/post_entropy"].mean())
    losses["dyn"].mean().backward(retain_graph=True)
    assert logits["post"].grad is None  # the dynamics loss trains the prior alone
    assert relative_error(logits["prior"].grad, units["latent/grad_dyn_prior"]) < 1e-5
    logits["prior"].grad = None
    losses["rep"].mean().backward()
    assert logits["prior"].grad is None  # and the representation loss the posterior alone
    assert relative_error(logits["post"].grad, units["latent/grad_rep_post"]) < 1e-5


def test_latent_sample_and_its_gradient_are_the_official_ones(units: dict[str, Tensor]) -> None:
    rssm = RSSM(E, A, CONFIG)
    logits = units["latent/post_logit"].clone().requires_grad_()
    sample, index = rssm.sample(logits, None)
    torch.testing.assert_close(sample, units["latent/sample"], rtol=0, atol=1e-6)
    assert torch.equal(index, units["latent/sample"].argmax(-1))
    sample.backward(units["latent/sample_cotangent"])
    assert relative_error(logits.grad, units["latent/grad_sample_post"]) < 1e-5


class Inputs(NamedTuple):
    """What `observe` takes: carry, previous actions, tokens and where episodes begin."""

    state: State
    action: Tensor
    tokens: Tensor
    is_first: Tensor


@pytest.fixture
def rssm() -> RSSM:
    torch.manual_seed(0)
    return RSSM(E, A, CONFIG)


@pytest.fixture
def inputs() -> Inputs:
    torch.manual_seed(1)
    stoch = ops.one_hot(torch.randint(0, CONFIG.classes, (B, CONFIG.stoch)), CONFIG.classes)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    return Inputs(
        State(torch.randn(B, CONFIG.deter), stoch),
        torch.randn(B, T, A),
        torch.randn(B, T, E),
        is_first,
    )


def observe(rssm: RSSM, inputs: Inputs) -> Posterior:
    return rssm.observe(*inputs, FixedNoise())


def test_filtering_is_the_step_repeated(rssm: RSSM, inputs: Inputs) -> None:
    """Step t uses the previous action and the tokens of t."""
    posterior, state = observe(rssm, inputs), inputs.state
    for t in range(T):
        action = rssm.prepare_action(inputs.action[:, t])
        state, index, logits = rssm.observe_step(state, action, inputs.tokens[:, t], None)
        torch.testing.assert_close(posterior.deter[:, t], state.deter)
        torch.testing.assert_close(posterior.logits[:, t], logits)
        assert torch.equal(posterior.index[:, t], index)


@pytest.mark.parametrize("first", [0, 1, 3, T - 1])
def test_is_first_inside_a_row_starts_afresh(rssm: RSSM, inputs: Inputs, first: int) -> None:
    """From there on the row equals one that begins with the zero state and no action."""
    inputs.is_first[1, first] = True
    posterior = observe(rssm, inputs)
    action = inputs.action[1:2, first:].clone()
    action[:, 0] = 0.0
    none = torch.zeros(1, T - first, dtype=torch.bool)
    fresh = Inputs(rssm.initial(1), action, inputs.tokens[1:2, first:], none)
    for ours, theirs in zip(posterior, observe(rssm, fresh), strict=True):
        torch.testing.assert_close(ours[1:2, first:], theirs)
    inputs.is_first[1, first] = False
    unbroken = observe(rssm, inputs)
    assert torch.equal(posterior.deter[:, :first], unbroken.deter[:, :first])
    assert not torch.equal(posterior.deter[1, first], unbroken.deter[1, first])
    torch.testing.assert_close(posterior.deter[[0, 2]], unbroken.deter[[0, 2]])


def test_nothing_before_a_reset_gets_a_gradient_from_after_it(rssm: RSSM, inputs: Inputs) -> None:
    inputs.is_first[:, 3] = True
    inputs.tokens.requires_grad_()
    observe(rssm, inputs).deter[:, 4:].sum().backward()
    assert inputs.tokens.grad[:, :3].count_nonzero() == 0
    assert inputs.tokens.grad[:, 3].count_nonzero() > 0


def test_rows_do_not_see_each_other(rssm: RSSM, inputs: Inputs) -> None:
    before = observe(rssm, inputs)
    inputs.tokens[0] += 1.0
    inputs.action[0] += 1.0
    inputs.state.deter[0] += 1.0
    after = observe(rssm, inputs)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[1:], y[1:])
    assert not torch.equal(before.deter[0], after.deter[0])


def test_no_step_sees_the_future(rssm: RSSM, inputs: Inputs) -> None:
    before = observe(rssm, inputs)
    inputs.tokens[:, 3] += 1.0
    inputs.action[:, 4] += 1.0
    after = observe(rssm, inputs)
    assert torch.equal(before.deter[:, :4], after.deter[:, :4])  # deter 3 has not seen tokens 3
    assert torch.equal(before.logits[:, :3], after.logits[:, :3])
    assert not torch.equal(before.logits[:, 3], after.logits[:, 3])
    assert not torch.equal(before.deter[:, 4], after.deter[:, 4])


def test_actions_beyond_one_are_scaled_back(rssm: RSSM) -> None:
    action = torch.tensor([[2.0, -4.0, 0.5, -1.0, 1.0]])
    inside = torch.tensor([[1.0, -1.0, 0.5, -1.0, 1.0]])
    torch.testing.assert_close(rssm.prepare_action(action), rssm.prepare_action(inside))
    action.requires_grad_()
    rssm.prepare_action(action).sum().backward()
    unit = inside.clone().requires_grad_()
    rssm.prepare_action(unit).sum().backward()
    expected = unit.grad / torch.tensor([[2.0, 4.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(action.grad, expected)  # the divisor has no gradient


def test_imagination_samples_the_prior(rssm: RSSM) -> None:
    torch.manual_seed(0)
    n = 20_000
    state, action = rssm.initial(1), torch.zeros(1, A)
    deter = rssm.cell(state, rssm.prepare_action(action))
    probs = ops.unimix_log_probs(rssm.prior_logits(deter), CONFIG.unimix).exp()[0]
    many = State(*(x.expand(n, *x.shape[1:]) for x in state))
    uniform = RandomNoise().uniform((n, CONFIG.stoch), torch.device("cpu"))
    imagined = rssm.imagine_step(many, action.expand(n, A), uniform)
    torch.testing.assert_close(imagined.deter[0], deter[0])
    torch.testing.assert_close(imagined.stoch.mean(0), probs, rtol=0, atol=0.015)


def test_observe_samples_the_posterior_with_its_frequencies(rssm: RSSM, inputs: Inputs) -> None:
    torch.manual_seed(0)
    n = 20_000
    one = Inputs(
        *(State(*(s[:1] for s in x)) if isinstance(x, State) else x[:1, :1] for x in inputs)
    )
    probs = ops.unimix_log_probs(observe(rssm, one).logits, CONFIG.unimix).exp()[0, 0]
    many = Inputs(
        State(*(s.expand(n, *s.shape[1:]) for s in one.state)),
        *(x.expand(n, *x.shape[1:]) for x in one[1:]),
    )
    index = rssm.observe(*many, RandomNoise()).index[:, 0]  # (n, S)
    frequency = ops.one_hot(index, CONFIG.classes).mean(0)
    torch.testing.assert_close(frequency, probs, rtol=0, atol=0.015)
