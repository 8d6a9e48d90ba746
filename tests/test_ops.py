"""Tests of rllib_dreamer.model.ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from torch import Tensor

from rllib_dreamer.model import ops


@pytest.fixture(scope="module")
def units(units_path: Path) -> dict[str, Tensor]:
    """Single functions of the official code."""
    with np.load(units_path) as file:
        names = ("symlog/", "symexp/", "rms_norm/", "twohot/bins", "lambda_return/", "retnorm/")
        return {k: torch.from_numpy(file[k]) for k in file.files if k.startswith(names)}


@pytest.mark.parametrize("function", [ops.symlog, ops.symexp])
def test_symlog_and_symexp_are_the_official_ones(units: dict[str, Tensor], function) -> None:
    name = function.__name__
    ours = function(units[f"{name}/in"])
    torch.testing.assert_close(ours, units[f"{name}/out"], rtol=1e-6, atol=0)


def test_symexp_inverts_symlog() -> None:
    x = torch.tensor([-1e6, -3.0, -1e-3, 0.0, 0.5, 42.0, 1e8], dtype=torch.float64)
    torch.testing.assert_close(ops.symexp(ops.symlog(x)), x, rtol=1e-12, atol=1e-15)


def test_rms_norm_is_the_official_one(units: dict[str, Tensor]) -> None:
    ours = ops.rms_norm(units["rms_norm/in"], units["rms_norm/param/scale"])
    torch.testing.assert_close(ours, units["rms_norm/out"], rtol=1e-6, atol=1e-7)


def test_rms_norm_works_in_float32_and_returns_the_type_it_got() -> None:
    x = torch.full((2, 512), 300.0, dtype=torch.float16)  # whose squares float16 cannot hold
    y = ops.rms_norm(x, torch.ones(512))
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


def test_bins_are_the_official_ones(units: dict[str, Tensor]) -> None:
    bins = ops.symexp_bins(255)
    assert relative_error(bins, units["twohot/bins"]) < 1e-6
    torch.testing.assert_close(bins, units["twohot/bins"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("count", [5, 41, 255])
def test_bins_are_symmetric_and_hold_an_exact_zero(count: int) -> None:
    bins = ops.symexp_bins(count)
    assert bins.shape == (count,) and bins[count // 2] == 0
    assert torch.equal(bins, -bins.flip(0))
    assert (bins.diff() > 0).all()


def test_one_hot_of_a_negative_index_is_zero() -> None:
    x = ops.one_hot(torch.tensor([[0, 2], [-1, 1]]), 3)
    expected = [[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]]]
    assert torch.equal(x, torch.tensor(expected, dtype=torch.float32))


def test_unimix_is_a_floor_under_every_probability() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0, 0.0], [0.3, -0.2, 0.1, 0.0]])
    probs = ops.unimix_log_probs(logits, 0.01).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))
    torch.testing.assert_close(probs[0], torch.tensor([0.9925, 0.0025, 0.0025, 0.0025]))
    expected = 0.99 * logits[1].softmax(-1) + 0.0025
    torch.testing.assert_close(probs[1], expected)
    assert torch.equal(ops.unimix_log_probs(logits, 0.0), logits.log_softmax(-1))


def test_kl_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
    q = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert ops.categorical_kl(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-6)
    assert ops.categorical_kl(p.log(), p.log()).item() == 0.0


def test_samples_have_the_frequencies_of_the_probabilities() -> None:
    probs = torch.tensor([0.05, 0.0, 0.6, 0.35])
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    index = ops.sample_index(probs.expand(100_000, 4), uniform)
    frequency = index.bincount(minlength=4) / 100_000
    # three standard deviations of a frequency are at most 3 * sqrt(.25 / 1e5) = 0.005
    torch.testing.assert_close(frequency, probs, rtol=0, atol=0.005)
    assert frequency[1] == 0


def test_sample_at_the_ends_of_the_noise() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
    below_one = torch.tensor([1.0 - 2**-24] * 2)
    assert ops.sample_index(probs, torch.zeros(2)).tolist() == [1, 0]
    assert ops.sample_index(probs, below_one).tolist() == [2, 3]
    unnormalised = torch.full((1, 512), 1 / 512) * 0.9999  # a sum below one picks no class beyond
    assert ops.sample_index(unnormalised, below_one[:1]).item() == 511


def test_sample_without_noise_is_the_mode() -> None:
    assert ops.sample_index(torch.tensor([[0.2, 0.5, 0.3]]), None).tolist() == [1]


def test_straight_through() -> None:
    probs = torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True)
    sample = ops.straight_through(torch.tensor([2]), probs)
    assert torch.equal(sample.detach(), torch.tensor([[0.0, 0.0, 1.0]]))
    weights = torch.tensor([[3.0, 5.0, 7.0]])
    (sample * weights).sum().backward()
    assert torch.equal(probs.grad, weights)


def test_lambda_return_is_the_official_one(units: dict[str, Tensor]) -> None:
    x = {k.rsplit("/", 1)[1]: v for k, v in units.items() if k.startswith("lambda_return/imag")}
    ours = ops.lambda_return(x["reward"], x["con"], x["value"], 0.95)
    torch.testing.assert_close(ours, x["ret"], rtol=1e-5, atol=1e-6)


def test_lambda_return_by_hand() -> None:
    reward = torch.tensor([[100.0, 1.0, 2.0]])
    cont = torch.tensor([[100.0, 0.5, 0.25]])
    value = torch.tensor([[100.0, 10.0, 20.0]])
    last = 2.0 + 0.25 * 20.0  # the value of the final state stands for everything after it
    first = 1.0 + 0.5 * (0.1 * 10.0 + 0.9 * last)
    ours = ops.lambda_return(reward, cont, value, 0.9)
    torch.testing.assert_close(ours, torch.tensor([[first, last]]))


@pytest.mark.parametrize("changed", range(3))
def test_lambda_return_ignores_everything_of_the_start(changed: int) -> None:
    inputs = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(1))
    ours = ops.lambda_return(*inputs, 0.95)
    start, next_one = inputs.clone(), inputs.clone()
    start[changed, :, 0] += 1.0
    next_one[changed, :, 1] += 1.0
    assert torch.equal(ops.lambda_return(*start, 0.95), ours)
    assert (ops.lambda_return(*next_one, 0.95)[:, 0] != ours[:, 0]).all()


def test_replay_return_is_the_official_one(units: dict[str, Tensor]) -> None:
    x = {k.rsplit("/", 1)[1]: v for k, v in units.items() if k.startswith("lambda_return/repl")}
    ours = ops.replay_return(x["reward"], x["last"], x["terminal"], x["boot"], 332 / 333, 0.95)
    torch.testing.assert_close(ours, x["ret"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("is_last", "is_terminal", "expected"),
    [
        (0, 0, 2.0 + 0.9 * (0.2 * 30.0 + 0.8 * (3.0 + 0.9 * 40.0))),  # goes on
        (1, 0, 2.0 + 0.9 * 30.0),  # a time limit: the boot stands for what would have come
        (1, 1, 2.0),  # a termination: nothing comes
    ],
)
def test_a_time_limit_bootstraps_and_a_termination_does_not(
    is_last: int, is_terminal: int, expected: float
) -> None:
    """The end is at step 2 of four; the target of step 1 is what it changes."""
    reward = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    boot = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    last = torch.tensor([[0, 0, is_last, 0]]).bool()
    terminal = torch.tensor([[0, 0, is_terminal, 0]]).bool()
    ours = ops.replay_return(reward, last, terminal, boot, 0.9, 0.8)
    assert ours.shape == (1, 3)
    assert ours[0, 1].item() == pytest.approx(expected)
    assert ours[0, 2].item() == pytest.approx(3.0 + 0.9 * 40.0)  # of the next episode: untouched


def test_percentiles_are_those_of_numpy_and_of_the_official_code(units: dict[str, Tensor]) -> None:
    for x, expected in zip(units["retnorm/in"], units["retnorm/percentile"], strict=True):
        ours = torch.stack(ops.percentiles(x, 5.0, 95.0))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    ours = ops.percentiles(torch.from_numpy(x), 0.0, 100.0)
    assert [v.item() for v in ours] == [x.min(), x.max()]
    ours = ops.percentiles(torch.from_numpy(x), 33.0, 72.5)
    np.testing.assert_allclose([v.item() for v in ours], np.percentile(x, [33.0, 72.5]), rtol=1e-5)


def reference_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `upsample_conv` computes, said plainly."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("h", "w"), [(4, 4), (1, 1), (3, 6)])
def test_subpixel_convolution_is_upsampling_and_convolution(
    dtype: torch.dtype, tolerance: float, h: int, w: int
) -> None:
    """Values and the gradients of all three arguments."""
    generator = torch.Generator().manual_seed(h)
    shapes = [(2, 5, h, w), (3, 5, 5, 5), (3,)]
    ours = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    y, z = ops.place_phases(ops.upsample_conv(*ours)), reference_upsample_conv(*theirs)
    y = y.permute(0, 3, 1, 2)
    assert y.shape == (2, 3, 2 * h, 2 * w)
    assert relative_error(y, z.detach()) < tolerance
    cotangent = torch.randn(y.shape, generator=generator, dtype=dtype)
    y.backward(cotangent)
    z.backward(cotangent)
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.grad, other.grad) < tolerance


def test_fused_pooling_is_pooling_norm_and_silu() -> None:
    """Values and gradients, ties among equal entries included."""
    x = torch.randint(-2, 3, (2, 6, 4, 5), generator=torch.Generator().manual_seed(0)).double()
    scale = torch.linspace(0.5, 1.5, 5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pooled = F.max_pool2d(theirs.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    y, z = ops.pool_norm_silu(ours, scale), F.silu(ops.rms_norm(pooled, scale))
    assert torch.equal(y, z)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    y.backward(cotangent)
    z.backward(cotangent)
    assert torch.equal(ours.grad, theirs.grad)


def test_image_loss_is_the_sum_of_squared_errors_of_pixels() -> None:
    phases = torch.randn(3, 2, 4, 4 * 2, generator=torch.Generator().manual_seed(0))
    frames = torch.randint(0, 256, (3, 4, 8, 2), generator=torch.Generator().manual_seed(1))
    expected = (torch.sigmoid(ops.place_phases(phases)) - frames / 255).square().sum((1, 2, 3))
    torch.testing.assert_close(ops.image_loss(phases, frames.to(torch.uint8)), expected)


def test_total_loss_weighs_means_and_checks_names() -> None:
    losses = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[5.0]])}
    assert ops.total_loss(losses, {"a": 0.5, "b": 2.0}).item() == 11.0
    with pytest.raises(ValueError, match=r"losses without a scale: \['b'\], .*`images`"):
        ops.total_loss(losses, {"a": 0.5})
    with pytest.raises(ValueError, match=r"scales without a loss: \['c'\]"):
        ops.total_loss(losses, {"a": 0.5, "b": 2.0, "c": 1.0})


def test_concat() -> None:
    x = torch.ones(2, 1)
    assert ops.concat([x]) is x
    assert ops.concat([x, 2 * x]).tolist() == [[1, 2], [1, 2]]
