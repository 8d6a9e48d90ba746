"""Tests of rllib_dreamer.model.distributions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import relative_error
from torch import Tensor

from rllib_dreamer.model import ops
from rllib_dreamer.model.distributions import (
    Binary,
    BoundedNormal,
    Categorical,
    FixedNoise,
    RandomNoise,
    TwoHot,
    two_hot,
)


@pytest.fixture(scope="module")
def units(units_path: Path) -> dict[str, Tensor]:
    """Single functions of the official code."""
    with np.load(units_path) as file:
        names = ("twohot/", "bounded_normal/", "categorical/", "binary/")
        return {k: torch.from_numpy(file[k]) for k in file.files if k.startswith(names)}


def test_two_hot_loss_and_gradient_are_the_official_ones(units: dict[str, Tensor]) -> None:
    """Targets on bins, half way, and beyond both ends are among them."""
    logits = units["twohot/logits"].clone().requires_grad_()
    loss = TwoHot(logits, ops.symexp_bins(255)).loss(units["twohot/target"])
    torch.testing.assert_close(loss, units["twohot/loss"], rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert relative_error(logits.grad, units["twohot/grad_logits"]) < 1e-5


def test_two_hot_prediction_is_the_official_one(units: dict[str, Tensor]) -> None:
    ours = TwoHot(units["twohot/logits"], ops.symexp_bins(255)).mean
    # sums of numbers up to 5e8 in float32: an error relative to the largest bin's share
    scale = (units["twohot/logits"].softmax(-1) * units["twohot/bins"].abs()).sum(-1)
    assert ((ours - units["twohot/pred"]).abs() <= 1e-6 * scale).all()


def test_two_hot_weights_are_the_official_ones(units: dict[str, Tensor]) -> None:
    bins = units["twohot/bins"]
    below, above, weight = two_hot(units["twohot/target"], bins)
    ours = (1 - weight)[:, None] * ops.one_hot(below, 255) + weight[:, None] * ops.one_hot(
        above, 255
    )
    torch.testing.assert_close(ours, units["twohot/weights"], rtol=0, atol=1e-5)


def test_untrained_two_hot_predicts_exactly_zero(units: dict[str, Tensor]) -> None:
    """Uniform logits: the bins cancel in pairs although they reach 5e8; the loss is ln 255."""
    target = units["twohot/target"]
    dist = TwoHot(torch.zeros(len(target), 255), ops.symexp_bins(255))
    assert dist.mean.count_nonzero() == 0
    torch.testing.assert_close(dist.loss(target), units["twohot/loss_uniform"])
    assert dist.loss(target)[0].item() == pytest.approx(math.log(255))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.25, {3: 0.75, 4: 0.25}),
        (1.0, {4: 1.0}),
        (9.0, {6: 1.0}),
        (-7.5, {0: 1.0}),
        (0.0, {3: 1.0}),
    ],
)
def test_two_hot_by_hand(target: float, expected: dict[int, float]) -> None:
    bins = torch.tensor([-5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0])
    below, above, weight = two_hot(torch.tensor([target]), bins)
    ours = torch.zeros(7)
    ours[below] += 1 - weight
    ours[above] += weight
    assert {i: w for i, w in enumerate(ours.tolist()) if w} == expected


def test_two_hot_loss_of_nan_is_nan() -> None:
    dist = TwoHot(torch.zeros(3, 255), ops.symexp_bins(255))
    loss = dist.loss(torch.tensor([0.5, math.nan, math.inf]))
    assert loss.isnan().tolist() == [False, True, False]


def test_two_hot_loss_stops_the_gradient_of_the_target() -> None:
    target = torch.tensor([0.3], requires_grad=True)
    logits = torch.zeros(1, 5, requires_grad=True)
    TwoHot(logits, ops.symexp_bins(5)).loss(target).sum().backward()
    assert target.grad is None and logits.grad is not None


def test_binary_is_the_official_one(units: dict[str, Tensor]) -> None:
    dist = Binary(units["binary/logit"])
    torch.testing.assert_close(dist.prob(), units["binary/prob"])
    torch.testing.assert_close(
        dist.loss(units["binary/target"]), units["binary/loss"], rtol=1e-5, atol=1e-6
    )


def test_categorical_is_the_official_one(units: dict[str, Tensor]) -> None:
    dist = Categorical(units["categorical/logits"].unsqueeze(-2))
    event = units["categorical/event"].unsqueeze(-1)
    torch.testing.assert_close(dist.log_prob(event), units["categorical/logp"])
    torch.testing.assert_close(dist.entropy(), units["categorical/entropy"])
    assert dist.max_entropy() == pytest.approx(math.log(5))


def test_categorical_mixes_the_uniform_distribution_into_the_actor() -> None:
    dist = Categorical(torch.tensor([[[50.0, 0.0, 0.0, 0.0]]]), unimix=0.04)
    torch.testing.assert_close(dist.log_probs.exp()[0, 0, 1:], torch.full((3,), 0.01))
    assert dist.log_prob(torch.tensor([[2]])).item() == pytest.approx(math.log(0.01))


def test_categorical_sums_over_components() -> None:
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    event = torch.tensor([[0, 2]] * 6)
    log_probs = logits.log_softmax(-1)
    dist = Categorical(logits)
    torch.testing.assert_close(dist.log_prob(event), log_probs[:, 0, 0] + log_probs[:, 1, 2])
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(dist.entropy(), entropy[:, 0] + entropy[:, 1])
    assert torch.equal(dist.mode(), logits.argmax(-1))
    assert dist.max_entropy() == pytest.approx(2 * math.log(3))


def test_categorical_samples_have_its_frequencies() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    dist = Categorical(logits.expand(40_000, 2, 3), unimix=0.01)
    samples = dist.sample(RandomNoise())
    assert samples.shape == (40_000, 2)
    for i in range(2):
        frequency = samples[:, i].bincount(minlength=3) / 40_000
        torch.testing.assert_close(frequency, dist.log_probs[0, i].exp(), rtol=0, atol=0.008)


def test_categorical_never_draws_a_class_that_a_component_lacks() -> None:
    valid, limits = torch.tensor([[True, True, False], [True, True, True]]), (2, 3)
    logits = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0]]).expand(5000, 2, 3)
    logits = logits.clone().requires_grad_()
    dist = Categorical(logits, 0.1, valid, limits)
    torch.manual_seed(0)
    samples = dist.sample(RandomNoise())
    assert samples[:, 0].max() == 1 and samples[:, 1].max() == 2
    assert dist.mode()[:, 0].max() <= 1
    assert dist.max_entropy() == pytest.approx(math.log(2) + math.log(3))
    torch.testing.assert_close(dist.entropy()[0].item(), dist.max_entropy())
    (dist.entropy() + dist.log_prob(samples)).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[:, 0, 2].count_nonzero() == 0


def test_bounded_normal_is_the_official_one(units: dict[str, Tensor]) -> None:
    x = {key.split("/")[1]: value for key, value in units.items() if "bounded" in key}
    dist = BoundedNormal(x["raw_mean"], x["raw_std"])
    torch.testing.assert_close(dist.mean, x["mean"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dist.std, x["std"], rtol=1e-6, atol=0)
    torch.testing.assert_close(dist.log_prob(x["event"]), x["logp"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dist.entropy(), x["entropy"], rtol=1e-5, atol=1e-6)


def test_bounded_normal_agrees_with_torch_and_keeps_its_bounds() -> None:
    raw = torch.linspace(-50, 50, 11).reshape(11, 1)
    dist = BoundedNormal(raw / 50, raw, 0.2, 0.7)
    assert dist.std.min() >= 0.2 and dist.std.max() <= 0.7 + 1e-6
    event = torch.full((11, 1), 0.3)
    reference = torch.distributions.Normal(dist.mean, dist.std)
    torch.testing.assert_close(dist.log_prob(event), reference.log_prob(event).sum(-1))
    torch.testing.assert_close(dist.entropy(), reference.entropy().sum(-1))
    assert dist.max_entropy() == pytest.approx(dist.entropy().max().item())


def test_bounded_normal_starts_wide_and_is_not_squashed() -> None:
    torch.manual_seed(0)
    dist = BoundedNormal(torch.zeros(50_000, 2), torch.zeros(50_000, 2))
    assert dist.std[0, 0].item() == pytest.approx(0.893, abs=1e-3)
    samples = dist.sample(RandomNoise())
    assert samples.abs().max() > 2.0
    assert samples.mean().abs() < 0.01 and samples.std().item() == pytest.approx(0.893, abs=0.01)
    assert torch.equal(dist.mode(), dist.mean)


def test_fixed_noise() -> None:
    dist = BoundedNormal(torch.zeros(2, 3), torch.zeros(2, 3))
    torch.testing.assert_close(dist.sample(FixedNoise(0.5)), dist.mean + 0.5 * dist.std)
    assert torch.equal(dist.sample(FixedNoise()), dist.mean)
    logits = torch.tensor([[[0.1, 0.3, 0.2]]])
    assert Categorical(logits).sample(FixedNoise(0.5)).item() == 1
