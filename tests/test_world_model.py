"""Tests of rllib_dreamer.model.world_model, most of them of what belongs to which step."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_export import TINY, agent_and_batch
from golden_run import gradient_norms, record
from torch import Tensor

from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import RandomNoise
from rllib_dreamer.model.sizes import ActionSpec
from rllib_dreamer.model.world_model import encode_action, kl_losses

CASE = TINY
T = CASE.steps
Losses = dict[str, Tensor]


_AGENT, _BATCH = agent_and_batch(CASE)


@pytest.fixture
def agent() -> Agent:
    return copy.deepcopy(_AGENT)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {key: x.clone() for key, x in _BATCH.items()}


def losses_of(agent: Agent, batch: dict[str, Tensor]) -> Losses:
    """Losses of one forward pass, the return normaliser as it was."""
    normalizer = agent.behavior.normalizer
    low, high = normalizer.low.clone(), normalizer.high.clone()
    losses = {key: loss.detach() for key, loss in agent(batch).losses.items()}
    normalizer.low.copy_(low)
    normalizer.high.copy_(high)
    return losses


def change(agent: Agent, batch: dict[str, Tensor], key: str, step: int) -> None:
    """Changes an entry of every row at one step."""
    x = batch[key]
    if x.dtype == torch.bool:
        x[:, step] = ~x[:, step]
    elif x.dtype == torch.uint8:
        x[:, step] = 255 - x[:, step]
    elif key == "stoch":
        x[:, step] = (x[:, step] + 1) % agent.world.config.classes
    elif not x.is_floating_point():
        kind, name = key.split("/", 1)
        specs = agent.world.encoder.vectors if kind == "obs" else agent.world.actions
        x[:, step] = (x[:, step] + 1) % specs[name].classes
    else:
        x[:, step] = -x[:, step] - 0.3


def changed(before: Losses, after: Losses) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


KEYS = [*(f"obs/{key}" for key in CASE.obs), *(f"action/{key}" for key in CASE.actions)]
STORED = ["deter", "stoch"]
FLAGS = ["reward", "is_first", "is_last", "is_terminal"]


@pytest.mark.parametrize(
    ("key", "step"),
    [
        *((key, 0) for key in [*KEYS[: len(CASE.obs)], *FLAGS]),
        *((key, step) for key in STORED for step in range(1, T + 1)),
        *((f"action/{key}", T) for key in CASE.actions),
    ],
)
def test_what_no_loss_depends_on(
    agent: Agent, batch: dict[str, Tensor], key: str, step: int
) -> None:
    """Step 0 gives its latents and its action and nothing else; stored latents count only there."""
    before = losses_of(agent, batch)
    change(agent, batch, key, step)
    assert changed(before, losses_of(agent, batch)) == set()


@pytest.mark.parametrize(
    ("key", "step"),
    [
        *((key, 0) for key in STORED),
        *((key, step) for key in KEYS[: len(CASE.obs)] for step in (1, T)),
        *((key, step) for key in KEYS[len(CASE.obs) :] for step in (0, T - 1)),
        *((key, step) for key in ("reward", "is_terminal") for step in (1, T)),
        ("is_first", 1),
        ("is_first", T),
        ("is_last", 1),
        ("is_last", T - 1),  # of the last step, only a termination matters: boot or boot
    ],
)
def test_what_losses_depend_on(agent: Agent, batch: dict[str, Tensor], key: str, step: int) -> None:
    before = losses_of(agent, batch)
    change(agent, batch, key, step)
    assert changed(before, losses_of(agent, batch))


@pytest.mark.parametrize("step", range(1, T + 1))
def test_each_step_has_its_own_losses(agent: Agent, batch: dict[str, Tensor], step: int) -> None:
    """Reward and terminal flag of batch step t meet in column t - 1 and nowhere else."""
    before = losses_of(agent, batch)
    change(agent, batch, "reward", step)
    change(agent, batch, "is_terminal", step)
    after = losses_of(agent, batch)
    for name in ("reward", "cont"):
        columns = (before[name] != after[name]).any(0)
        assert columns.nonzero().flatten().tolist() == [step - 1], name
    assert {"dyn", "rep", "actor", "critic"}.isdisjoint(changed(before, after))


@pytest.mark.parametrize("step", range(1, T + 1))
def test_an_observation_reaches_its_own_step_first(
    agent: Agent, batch: dict[str, Tensor], step: int
) -> None:
    before = losses_of(agent, batch)
    change(agent, batch, "obs/camera", step)
    after = losses_of(agent, batch)
    columns = (before["camera"] != after["camera"]).any(0)
    assert columns.nonzero().min() == step - 1


@pytest.mark.parametrize("step", range(T))
def test_an_action_reaches_the_step_after_it_first(
    agent: Agent, batch: dict[str, Tensor], step: int
) -> None:
    batch["is_first"][:] = False
    before = agent(batch).deter
    change(agent, batch, "action/arm/left", step)
    columns = (before != agent(batch).deter).any(-1)
    for row in columns:
        assert row.nonzero().min() == step  # column t - 1 is step t


@pytest.mark.parametrize(
    "shifted", [*KEYS, *STORED, "reward", "is_first", "is_last", "is_terminal"]
)
def test_shifting_anything_by_one_changes_the_losses(
    agent: Agent, batch: dict[str, Tensor], shifted: str
) -> None:
    before = losses_of(agent, batch)
    batch[shifted] = batch[shifted].roll(1, 1)
    assert changed(before, losses_of(agent, batch))


def test_latents_given_back_are_those_of_this_pass(agent: Agent, batch: dict[str, Tensor]) -> None:
    """Column t - 1 is step t; used as a context, they carry the row on exactly where it was."""
    recording = record(agent, batch)
    posterior = recording.calls["observe"].result
    assert torch.equal(recording.output.deter, posterior.deter.detach())
    assert torch.equal(recording.output.stoch, posterior.index)
    cut = 2
    later = {key: x[:, cut:].clone() for key, x in batch.items()}
    later["deter"][:, 0] = recording.output.deter[:, cut - 1]
    later["stoch"][:, 0] = recording.output.stoch[:, cut - 1]
    again = record(agent, later)
    torch.testing.assert_close(again.output.deter, recording.output.deter[:, cut:])
    assert torch.equal(again.output.stoch, recording.output.stoch[:, cut:])


def test_a_zero_context_is_a_stoch_of_minus_one(agent: Agent, batch: dict[str, Tensor]) -> None:
    """Stored as class indices, the zero state equals a reset but for the previous action."""
    batch["deter"][:, 0], batch["stoch"][:, 0] = 0.0, -1
    for key in CASE.actions:
        spec = agent.world.actions[key]
        batch[f"action/{key}"][:, 0] = -1 if spec.kind == "discrete" else 0.0
    before = losses_of(agent, batch)
    batch["is_first"][:, 1] = True
    after = losses_of(agent, batch)
    for key in before:
        torch.testing.assert_close(before[key], after[key])


def test_cont_target_is_the_discount_or_zero(agent: Agent, batch: dict[str, Tensor]) -> None:
    """A perfect head says 1 - 1 / horizon; a time limit is no termination."""
    batch["is_terminal"][:] = False
    with torch.no_grad():
        agent.world.cont.out.weight.zero_()
        agent.world.cont.out.bias.fill_(30.0)
    loss = losses_of(agent, batch)["cont"]
    torch.testing.assert_close(loss, torch.full_like(loss, 30.0 * (1.0 - agent.loss.discount)))
    batch["is_last"][:] = True
    assert torch.equal(losses_of(agent, batch)["cont"], loss)
    batch["is_terminal"][:, 2] = True
    loss = losses_of(agent, batch)["cont"]
    torch.testing.assert_close(loss[:, 1], torch.full_like(loss[:, 1], 30.0))


def test_a_decoder_with_the_loss_of_an_unknown_leaf_is_refused(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    losses = agent.world.decoder.losses
    agent.world.decoder.losses = lambda outputs, obs: {
        "sound": torch.zeros(CASE.rows * T),
        **losses(outputs, obs),
    }
    with pytest.raises(ValueError, match=r"without a scale: \['sound'\].*`images` and `vectors`"):
        ops.total_loss(agent(batch).losses, agent.scales)


def test_free_nats_apply_to_each_step_after_summing_over_groups() -> None:
    posterior = torch.zeros(1, 2, 3, 4)
    posterior[0, 1, :, 0] = 2.0  # about 0.6 nats a group: below one each, above one together
    prior = torch.zeros(1, 2, 3, 4, requires_grad=True)
    losses, _ = kl_losses(posterior, prior, 0.0, 1.0)
    assert losses["dyn"][0, 0] == losses["rep"][0, 0] == 1.0
    assert losses["dyn"][0, 1] > 1.0
    losses["dyn"].sum().backward()
    assert prior.grad[0, 0].count_nonzero() == 0 and prior.grad[0, 1].count_nonzero() > 0


def test_encoded_actions_are_sorted_and_one_hot() -> None:
    specs = {"b": ActionSpec("discrete", 2, 3), "a": ActionSpec("continuous", 2)}
    actions = {"a": torch.tensor([[0.5, -2.0]]), "b": torch.tensor([[2, -1]])}
    assert encode_action(actions, specs).tolist() == [[0.5, -2.0, 0, 0, 1, 0, 0, 0]]


def test_reward_trains_encoder_and_rssm(agent: Agent, batch: dict[str, Tensor]) -> None:
    norms = gradient_norms(agent, agent(batch))
    for loss in ("rew", "con", "rep", "camera"):
        for module in ("enc", "dyn"):
            assert norms[f"out/gradnorm/{loss}/{module}"] > 0, (loss, module)
    for loss in ("rew", "con", "rep", "dyn", "camera"):
        for module in ("pol", "val", "slow"):
            assert norms[f"out/gradnorm/{loss}/{module}"] == 0, (loss, module)


def test_same_seed_gives_bitwise_the_same_losses(agent: Agent, batch: dict[str, Tensor]) -> None:
    agent.noise = RandomNoise()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(losses_of(agent, batch))
    assert changed(runs[0], runs[1]) == set()
    assert "dyn" in changed(runs[0], runs[2])


def test_losses_of_a_row_do_not_depend_on_the_other_rows(
    agent: Agent, batch: dict[str, Tensor]
) -> None:
    before = losses_of(agent, batch)
    other = {key: x.clone() for key, x in batch.items()}
    for key in [*KEYS, *STORED, "reward"]:
        for step in range(T + 1):
            change(agent, other, key, step)
    mixed = {key: torch.cat([x[:1], other[key][1:]]) for key, x in batch.items()}
    after = losses_of(agent, mixed)
    for key in [*CASE.obs, "dyn", "rep", "reward", "cont", "repval"]:
        torch.testing.assert_close(before[key][0], after[key][0])
    start = slice(0, T)  # trajectories of the first row; the actor's share a return scale
    torch.testing.assert_close(before["critic"][start], after["critic"][start])
