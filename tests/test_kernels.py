"""Native kernels against the plain functions that they stand for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import agent_and_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rllib_dreamer.model import fuse, kernels, kernels_build, ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.distributions import FixedNoise, TwoHot
from rllib_dreamer.model.fuse import fusing
from rllib_dreamer.model.kernels_rssm import FEW_ROWS, add_block_products
from rllib_dreamer.model.optim import LaProp
from rllib_dreamer.model.rssm import RSSM, State
from rllib_dreamer.model.sizes import model_config
from rllib_dreamer.model.world_model import NativeTwoHot

# Relative L2 error: a few roundings of float32; one rounding of bfloat16 (2^-8), where the plain
# function rounds once more, before SiLU.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


Case = tuple[str, Callable[[torch.dtype], tuple[Tensor, ...]]]


def _frames(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _rows(name: str, *shape: int, width: int) -> Case:
    return name, lambda dtype: (torch.randn(*shape).to(dtype), torch.rand(width) + 0.5)


CASES = [
    *(_rows("norm_silu", n, c, width=c) for n, c in ((1, 3), (1000, 7), (70, 48), (3, 2049))),
    *(_rows("norm_silu", 3, 5, c, width=c) for c in (8, 12, 16, 32, 64)),
    *(_rows("pool_norm_silu", 3, 6, 10, c, width=c) for c in (1, 8, 12, 50)),
    *(_rows("phase_norm_silu", 3, 5, 7, 4 * c, width=c) for c in (1, 8, 12, 50)),
    *(
        (
            "image_loss",
            lambda dtype, c=c: (torch.randn(5, 7, 3, 4 * c).to(dtype), _frames(5, 14, 6, c)),
        )
        for c in (1, 3, 6)
    ),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels_built() -> None:
    """Else the plain functions would be compared with themselves."""
    assert kernels.available()


with_kernels = pytest.mark.usefixtures("kernels_built")


def error(ours: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over that of the reference."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-20))


def results(function: Callable, args: tuple[Tensor, ...], native: bool) -> list[Tensor]:
    """The result and the gradients of all real arguments, for a random gradient of the result."""
    args = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in args)
    with fusing(native):
        y = function(*args)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return [y, *(x.grad for x in args if x.grad is not None)]


@with_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "make"), CASES)
def test_kernels_are_twins_of_the_plain_functions(name: str, make: Callable, dtype) -> None:
    args = make(dtype)
    native, plain = (results(getattr(ops, name), args, on) for on in (True, False))
    assert native[0].dtype == plain[0].dtype and native[0].shape == plain[0].shape
    for ours, reference in zip(native, plain, strict=True):
        assert ours.dtype == reference.dtype
        assert error(ours, reference) <= TOLERANCE[dtype]


@with_kernels
def test_bfloat16_is_rounded_once() -> None:
    x, scale = torch.randn(50, 40).bfloat16(), torch.rand(40) + 0.5
    with fusing(True):
        assert torch.equal(ops.norm_silu(x, scale), ops.norm_silu(x.float(), scale).bfloat16())


def test_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    call = kernels.call
    monkeypatch.setattr(
        kernels, "call", lambda name, *args: called.append(name) or call(name, *args)
    )
    frames = _frames(3, 5, 7, 3).transpose(1, 2)
    with fusing(True):
        assert torch.equal(ops.normalize_frames(frames), frames / 255.0 - 0.5)
    assert called == ["normalize_frames"]


@with_kernels
@pytest.mark.parametrize("name", ["norm_silu", "pool_norm_silu", "phase_norm_silu"])
def test_views_give_what_copies_give(name: str) -> None:
    x, scale = torch.randn(4, 8, 6, 2).permute(3, 2, 0, 1), torch.ones(8)  # (2, 6, 4, 8)
    scale = scale[: 2 if name.startswith("phase") else 8]
    native, plain = (results(getattr(ops, name), (x, scale), on) for on in (True, False))
    assert all(error(a, b) <= 2e-6 for a, b in zip(native, plain, strict=True))


@with_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_vanish(bad: float) -> None:
    x = torch.randn(4, 40)
    x[2, 35] = bad
    with fusing(True):
        y = ops.norm_silu(x, torch.ones(40))
    assert y[2].isnan().any() and y[[0, 1, 3]].isfinite().all()


@with_kernels
def test_equal_entries_of_a_pool_give_the_gradient_to_the_first() -> None:
    x = torch.zeros(1, 2, 4, 8)
    x[0, :, :, 1:] = torch.randn(1, 1, 2, 7).repeat_interleave(2, 2)
    grads = [results(ops.pool_norm_silu, (x, torch.ones(8)), on)[1] for on in (True, False)]
    torch.testing.assert_close(*grads)
    assert grads[0][0, 0, ::2, 1:].all() and not grads[0][0, 0, 1::2].any()


def test_float64_takes_the_plain_path() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    with fusing(True):
        assert torch.equal(
            ops.norm_silu(x, torch.ones(8)), ops.norm_silu.__wrapped__(x, torch.ones(8))
        )


@with_kernels
@pytest.mark.parametrize(
    ("function", "x", "other"),
    [
        (ops.norm_silu, torch.ones(2, 8), torch.ones(8, dtype=torch.bfloat16)),
        (ops.norm_silu, torch.ones(2, 8), torch.ones(4)),
        (ops.phase_norm_silu, torch.ones(1, 2, 2, 16), torch.ones(16)),
        (ops.pool_norm_silu, torch.ones(2, 5, 6, 8), torch.ones(8)),
        (ops.pool_norm_silu, torch.ones(2, 6, 5, 8), torch.ones(8)),
        (ops.image_loss, torch.ones(2, 3, 3, 12), torch.ones(2, 6, 6, 3)),
        (ops.image_loss, torch.ones(2, 3, 3, 12), torch.ones(2, 3, 3, 3, dtype=torch.uint8)),
    ],
)
def test_what_a_kernel_would_read_or_write_past_is_refused(
    function: Any, x: torch.Tensor, other: torch.Tensor
) -> None:
    with fusing(True), pytest.raises(AssertionError):
        function(x, other)


def test_two_hot() -> None:
    bins, logits = ops.symexp_bins(255), torch.randn(3, 5, 255)
    target = torch.tensor([0.0, 1e9, -1e9, 0.17, float(bins[200])]) * torch.ones(3, 1)
    native, plain = (
        results(lambda x, c=c: c(x, bins).loss(target), (logits,), True)
        for c in (NativeTwoHot, TwoHot)
    )
    assert all(error(a, b) <= 2e-6 for a, b in zip(native, plain, strict=True))
    narrow = logits - 0.1 * torch.arange(-127, 128).square()  # else rounding of far bins rules
    assert error(NativeTwoHot(narrow, bins).mean, TwoHot(narrow, bins).mean) <= 2e-6
    assert not NativeTwoHot(torch.zeros(2, 255), bins).mean.any()


@with_kernels
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize(("depth", "columns"), [(5, 18), (24, 32), (7, 75)])
@pytest.mark.parametrize("rows", [1, 8, 19, FEW_ROWS + 1])
def test_block_products(rows: int, depth: int, columns: int, beta: int) -> None:
    """In tiles and beside them, on rows and blocks that lie inside wider ones."""
    x = torch.randn(rows, 3 * depth + 2)[:, 2:]
    weight = torch.randn(3, depth + 4, columns)[:, :depth]
    wide = torch.randn(rows, 3 * columns + 2)
    out = wide[:, 1:-1]
    product = torch.einsum("ngi,gio->ngo", x.unflatten(1, (3, depth)).double(), weight.double())
    expected = beta * out + product.flatten(1)
    edges = wide[:, [0, -1]]
    if not beta:
        out.fill_(torch.nan)
    add_block_products(out, x, weight, beta)
    assert error(out.double(), expected) <= 2e-6
    assert torch.equal(wide[:, [0, -1]], edges)


def rssm_and_rows(noise: bool) -> tuple[RSSM, tuple]:
    """A small RSSM and arguments for `observe`, with episodes that begin inside."""
    config = model_config("1M", deter=40, hidden=12, classes=5, stoch=3, blocks=4)
    rssm = RSSM(7, 2, config)
    with torch.no_grad():
        for param in rssm.parameters():
            param.add_(0.1 * torch.randn_like(param))
    first = torch.zeros(3, 6, dtype=torch.bool)
    first[0, 0] = first[1, 4] = True
    stoch = ops.one_hot(torch.randint(0, 5, (3, 3)), 5)
    uniform = torch.rand(6, 3, 3) if noise else None
    source = FixedNoise()
    source.uniform = lambda shape, device: uniform  # type: ignore[method-assign]
    rows = (torch.randn(3, 6, 2), torch.randn(3, 6, 7), first, source)
    return rssm, (State(torch.randn(3, 40), stoch), *rows)


@with_kernels
@pytest.mark.parametrize("noise", [True, False])
def test_backward_through_time(noise: bool) -> None:
    """The native loop against the plain one, which PyTorch differentiates."""
    rssm, (state, action, tokens, first, source) = rssm_and_rows(noise)
    found = []
    for on in (True, False):
        module = copy.deepcopy(rssm)
        action, tokens, *state = (x.detach().requires_grad_() for x in (action, tokens, *state))
        with fusing(on):
            out = module.observe(State(*state), action, tokens, first, source)
        torch.manual_seed(2)
        real = (out.deter, out.stoch, out.logits)
        sum((x * torch.randn(x.shape)).sum() for x in real).backward()
        grads = {n: p.grad for n, p in module.named_parameters() if not n.startswith("prior")}
        inputs = {"action": action, "tokens": tokens, "deter": state[0], "stoch": state[1]}
        found.append((out, grads | {name: x.grad for name, x in inputs.items()}))
    (native, ours), (plain, reference) = found
    assert torch.equal(native.index, plain.index)
    assert all(error(a, b) <= 2e-6 for a, b in zip(native, plain, strict=True))
    assert {n: e for n, g in reference.items() if (e := error(ours[n], g)) > 1e-5} == {}


@with_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_imagination(dtype: torch.dtype) -> None:
    rssm, (state, action, *_) = rssm_and_rows(True)
    noise, feats = torch.rand(3, 3), []
    for on in (True, False):
        feat = torch.cat([state.deter, state.stoch.flatten(1)], 1)
        out = torch.zeros(3, 2, feat.shape[1])
        enabled = dtype != torch.float32
        with fusing(on), torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            rssm.transition(3)(feat, action[:, 0], noise, out[:, 1])
        assert not out[:, 0].any()
        feats.append(out[:, 1])
    assert error(feats[0][:, :40], feats[1][:, :40]) <= TOLERANCE[dtype]
    if dtype == torch.float32:
        assert torch.equal(feats[0][:, 40:], feats[1][:, 40:])


@with_kernels
def test_whole_update() -> None:
    agent, batch = agent_and_batch()
    found = []
    for native in (True, False):
        twin = copy.deepcopy(agent)
        twin.fuse = native
        output = twin(batch)
        ops.total_loss(output.losses, twin.scales).backward()
        grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        found.append((output.losses, grads))
    for ours, reference in zip(*found, strict=True):
        assert ours.keys() == reference.keys()
        assert {k: e for k, x in reference.items() if (e := error(ours[k], x)) > 1e-4} == {}


@with_kernels
def test_other_shapes_build_nothing_and_no_graph_is_compiled_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels_build, "build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled a graph"))
    agent, _ = agent_and_batch()
    agent.fuse = True
    for rows, steps in ((2, 3), (3, 5), (1, 2)):
        agent(agent_and_batch(rows, steps)[1])


def test_elsewhere_a_function_is_compiled_once_for_all_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(how) or f)
    monkeypatch.setattr(fuse, "can_compile", lambda: True)
    function = fuse.fused(lambda x: x + 1)
    with fusing(True):
        for rows in (2, 3, 5):
            assert function(torch.empty(rows, 4, device="meta")).shape == (rows, 4)
    assert compiled == [{"dynamic": True}]


def test_what_fails_to_compile_runs_plain_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[Any] = []

    def broken(*args: Any) -> None:
        attempts.append(args)
        raise RuntimeError("\nfatal error: Python.h: No such file or directory\n1 error")

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    monkeypatch.setattr(fuse, "can_compile", lambda: True)
    function = fuse.fused(lambda x: x + 1)
    with fusing(True), caplog.at_level(logging.WARNING):
        for rows in (2, 3):
            assert function(torch.empty(rows, 4, device="meta")).shape == (rows, 4)
    assert len(attempts) == len(caplog.records) == 1
    assert "RuntimeError: fatal error: Python.h" in caplog.text and "python3-dev" in caplog.text


@pytest.mark.parametrize("missing", ["gcc", "Triton"])
def test_where_nothing_can_be_compiled_one_warning_and_the_plain_path(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing == "gcc":
        monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(fuse, "has_triton", lambda: missing != "Triton")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    fuse.can_compile.cache_clear()
    try:
        with fusing(True), caplog.at_level(logging.WARNING):
            for rows in (2, 3):
                y = ops.norm_silu(torch.empty(rows, 4, device="meta"), torch.ones(4, device="meta"))
                assert y.shape == (rows, 4)
    finally:
        fuse.can_compile.cache_clear()
    assert len(caplog.records) == 1 and missing in caplog.text


class HostReads(TorchDispatchMode):
    """Notes the operations for which the host would wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def plain_update(agent: Agent, batch: dict[str, Tensor], optimizer: LaProp) -> None:
    """One update by the code that CUDA runs too."""
    output = agent(batch)
    optimizer.zero_grad()
    ops.total_loss(output.losses, agent.scales).backward()
    optimizer.step()
    agent.behavior.update_slow_critic()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_host_reads_nothing_during_an_update(dtype: torch.dtype) -> None:
    agent, batch = agent_and_batch()
    agent.dtype = dtype
    optimizer = LaProp([p for p in agent.parameters() if p.requires_grad])
    with HostReads() as reads:
        plain_update(agent, batch, optimizer)
        assert reads.seen == []
        float(batch["reward"].sum())
    assert reads.seen == ["_local_scalar_dense"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fused", [False, True])
def test_no_update_on_cuda_waits_for_the_device(fused: bool, dtype: torch.dtype) -> None:
    def compiled() -> dict[str, Any]:
        return dict(torch._dynamo.utils.counters["stats"])

    agent, batch = agent_and_batch()
    agent.to("cuda")
    agent.fuse, agent.dtype = fused, dtype
    batch = {key: x.to("cuda") for key, x in batch.items()}
    optimizer = LaProp([p for p in agent.parameters() if p.requires_grad])
    for _ in range(3):  # compiles, and allocates the optimizer's state
        plain_update(agent, batch, optimizer)
    before = compiled()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain_update(agent, batch, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled() == before


@with_kernels
def test_threads_do_not_change_a_result() -> None:
    args = torch.randn(5000, 24), torch.ones(24)
    once, again = (results(ops.norm_silu, args, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = results(ops.norm_silu, args, True)
    finally:
        torch.set_num_threads(threads)
    assert all(error(a, b) <= 1e-6 for a, b in zip(once, single, strict=True))


@with_kernels
def test_optimizer() -> None:
    found = []
    for fused in (True, False):
        torch.manual_seed(3)
        params = [torch.randn(shape, requires_grad=True) for shape in ((7,), (33, 65), (2, 3, 4))]
        optimizer = LaProp(params, lr=1e-2, warmup=2, weight_decay=0.1, fused=fused)
        for exponent in range(-2, 3):
            for p in params:
                p.grad = torch.randn_like(p) * 10.0**exponent
            params[0].grad = torch.zeros_like(params[0])
            optimizer.step()
        found.append((params, optimizer.update_norm()))
    for ours, reference in zip(found[0][0], found[1][0], strict=True):
        assert error(ours, reference) <= 1e-6
    assert error(found[0][1], found[1][1]) <= 1e-5
