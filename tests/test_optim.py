"""Tests of rllib_dreamer.model.optim."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rllib_dreamer.model.optim import FLUSHED_EPS, Adam, LaProp, clip_by_parameter_norm

# The official optimizer also has linear and cosine schedules, which DreamerV3 does not use.
VARIANTS = ("default", "warmup", "decay")
STEPS = 5


@pytest.fixture(scope="module")
def units(units_path: Path) -> dict[str, np.ndarray]:
    """Five steps of the official optimizer."""
    with np.load(units_path) as file:
        return {key: file[key] for key in file.files if key.startswith("opt/") or key == "config"}


def read(units: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """Arrays below a prefix by tensor name, in float64.

    Official weight decay goes by the name `kernel`, ours by the rank: kernels get two axes.
    """
    result = {}
    for key in units:
        if key.startswith(prefix):
            x = torch.from_numpy(units[key]).double()
            lead = 0 if prefix == "opt/param0/" else 1
            flat = x.ndim - lead == 1 and key.endswith("kernel")
            result[key.removeprefix(prefix)] = x.unsqueeze(lead) if flat else x
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_steps_are_the_official_ones(units: dict[str, np.ndarray], variant: str) -> None:
    """Tensors of normal, zero and tiny norm; huge, zero and sometimes-zero gradients.

    Ours runs in float64, so that the difference of two parameters shows the update; the official
    float32 moments are good to 1e-5 of the learning rate.
    """
    constants = json.loads(str(units["config"]))["opt"]
    settings = json.loads(str(units["opt/variants"]))[variant]
    params, grads = read(units, "opt/param0/"), read(units, "opt/grad/")
    updates, after = read(units, f"opt/{variant}/update/"), read(units, f"opt/{variant}/param/")
    optimizer = LaProp(
        list(params.values()),
        settings["lr"],
        agc=constants["agc"],
        betas=(constants["beta1"], constants["beta2"]),
        eps=constants["eps"],
        warmup=settings["warmup"],
        weight_decay=settings.get("wd", 0.0),
    )
    for step in range(STEPS):
        before = {name: param.clone() for name, param in params.items()}
        for name, param in params.items():
            param.grad = grads[name][step]
        optimizer.step()
        for name, param in params.items():
            update = param - before[name]
            limit = 1e-4 * settings["lr"]
            torch.testing.assert_close(update, updates[name][step], rtol=1e-4, atol=limit)
            torch.testing.assert_close(param, after[name][step], rtol=1e-6, atol=limit)


def test_clipping_is_the_official_one(units: dict[str, np.ndarray]) -> None:
    params, grads = read(units, "opt/param0/"), read(units, "opt/grad/")
    after, clipped = read(units, "opt/default/param/"), read(units, "opt/default/agc_grad/")
    for step in range(STEPS):
        now = params if step == 0 else {name: x[step - 1] for name, x in after.items()}
        ours = clip_by_parameter_norm([grads[n][step] for n in now], list(now.values()), 0.3)
        for name, grad in zip(now, ours, strict=True):
            torch.testing.assert_close(grad, clipped[name][step], rtol=1e-5, atol=0)


def test_clipping_by_hand() -> None:
    params = [torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), torch.zeros(1)]
    grads = [torch.tensor([0.0, 15.0]), torch.tensor([0.0, 1.0]), torch.tensor([5.0])]
    ours = clip_by_parameter_norm(grads, params, 0.3)
    expected = [torch.tensor([0.0, 1.5]), torch.tensor([0.0, 1.0]), torch.tensor([0.3e-3])]
    torch.testing.assert_close(ours, expected)
    assert grads[0][1] == 15.0  # the gradients given are left alone


def test_warmup_starts_at_zero_and_ends_at_the_learning_rate() -> None:
    param = torch.full((4,), 100.0, dtype=torch.float64)  # too large for its gradient to be clipped
    optimizer = LaProp([param], lr=0.1, warmup=4)
    moved = []
    for _ in range(6):
        before = param.clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved.append(float((before - param)[0]))
    assert moved == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.1], rel=1e-6)
    assert optimizer.update_norm().item() == pytest.approx(0.1 * 2.0, rel=1e-6)


def test_parameters_without_gradient_stay() -> None:
    used, unused = torch.ones(2), torch.ones(2)
    used.grad = torch.ones(2)
    LaProp([used, unused], lr=0.1, warmup=0).step()
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))


def test_a_resumed_run_equals_an_unbroken_one() -> None:
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(3, generator=generator), torch.randn(6, 3, generator=generator)

    def go_on(param: Tensor, optimizer: LaProp, gradients: Tensor) -> None:
        for grad in gradients:
            param.grad = grad.clone()
            optimizer.step()

    unbroken = start.clone()
    go_on(unbroken, LaProp([unbroken], lr=0.1, warmup=4), grads)
    first = start.clone()
    optimizer = LaProp([first], lr=0.1, warmup=4)
    go_on(first, optimizer, grads[:3])
    second = first.clone()
    resumed = LaProp([second], lr=0.5, warmup=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go_on(second, resumed, grads[3:])
    assert torch.equal(second, unbroken)


@pytest.mark.parametrize("fused", [False, True])
def test_no_step_gets_long_where_denormals_are_flushed(fused: bool) -> None:
    """The squares of such gradients are zero then."""
    assert torch.set_flush_denormal(True)
    try:
        for size, expected in ((1e-16, 0.97), (3e-18, 1.0), (1e-18, 0.33), (1e-19, 0.033)):
            param = torch.full((4,), 1e3)
            optimizer = LaProp([param], lr=0.1, warmup=0, eps=FLUSHED_EPS, fused=fused)
            for _ in range(30):
                param.grad = torch.full_like(param, size)
                optimizer.step()
            length = float(optimizer.update_norm()) / 2.0 / 0.1
            assert length == pytest.approx(expected, rel=0.02)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"agc": 0.0}, {"warmup": -1}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"lr=.* and warmup=.* must be >= 0 and agc=.* > 0"):
        LaProp([torch.ones(1)], **bad)


def test_adam_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine, reference = Adam(ours, lr=1e-2), torch.optim.Adam(theirs, lr=1e-2)
    for scale in (0.1, 50.0, 3.0):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = scale * torch.randn_like(p)
        before = torch.cat([p.detach().flatten().clone() for p in ours])
        mine.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
        moved = torch.cat([p.detach().flatten() for p in ours]) - before
        torch.testing.assert_close(mine.update_norm(), moved.norm(), rtol=1e-4, atol=1e-6)


def test_adam_warms_up_like_laprop() -> None:
    param = nn.Parameter(torch.zeros(3))
    adam = Adam([param], lr=1e-2, warmup=2)
    moves = []
    for _ in range(4):
        before = param.detach().clone()
        param.grad = torch.ones(3)
        adam.step()
        moves.append(float((before - param.detach())[0]))
        assert adam.param_groups[0]["lr"] == 1e-2
    assert moves == pytest.approx([0.0, 5e-3, 1e-2, 1e-2], rel=1e-4)
    again = Adam([nn.Parameter(torch.zeros(3))], lr=1e-2, warmup=2)
    again.load_state_dict(adam.state_dict())
    assert again.param_groups[0]["count"] == 4
