"""Captured updates. On a CPU a list of operations that is done again stands in for a CUDA graph."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from tiny import (
    CountingEnv,
    agent_and_batch,
    agent_of,
    assert_same,
    built,
    learner_of,
    parameters_of,
    tiny_config,
    train_until,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rllib_dreamer.model import ops
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.cuda_graphs import (
    WARMUP,
    Captured,
    CudaRecorder,
    no_garbage_collection,
)
from rllib_dreamer.model.distributions import FixedNoise, RandomNoise
from rllib_dreamer.model.optim import LaProp

R = TypeVar("R")
Batch = Mapping[str, Tensor]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tape(TorchDispatchMode):
    """Keeps every operation with its tensors; `replay` does them again into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info for r in func._schema.returns) and not func._schema.is_mutable
        if not is_view:  # those follow their tensors by themselves
            self.operations.append((func, args, kwargs or {}, tensors(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Does all of it again."""
        for func, args, kwargs, outs in self.operations:
            for old, new in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class TapeRecorder:
    """Leaves agent and random numbers as they were, as the capture of a CUDA graph does."""

    def __init__(self, agent: nn.Module) -> None:
        self.agent = agent

    def run(self, function: Callable[[], R]) -> R:
        return function()

    def capture(self, function: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        before = {name: x.clone() for name, x in self.agent.state_dict().items()}
        random = torch.get_rng_state()
        with Tape() as tape:
            result = function()
        self.agent.load_state_dict(before)
        torch.set_rng_state(random)
        return result, tape.replay


class Output(NamedTuple):
    """What a forward and a backward pass give."""

    loss: Tensor
    deter: Tensor
    stoch: Tensor


class Updates:
    """Updates whose passes may be captured."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.manual_seed(3)
        self.agent, batch = agent_and_batch()
        self.agent.dtype, self.agent.noise = dtype, RandomNoise()
        self.agent.to(device)
        self.optimizer = LaProp([p for p in self.agent.parameters() if p.requires_grad], warmup=0)
        self.batches = []
        for _ in range(WARMUP + 4):
            rows = torch.randperm(batch["reward"].shape[0])
            self.batches.append({key: x[rows].to(device) for key, x in batch.items()})
        self.passes = 0

    def forward_backward(self, batch: Batch) -> Output:
        self.passes += 1
        output = self.agent(batch)
        self.optimizer.zero_grad()
        loss = ops.total_loss(output.losses, self.agent.scales)
        loss.backward()
        return Output(loss.detach(), output.deter, output.stoch)

    def run(self, function: Callable[[Batch], Output]) -> list[tuple[Tensor, ...]]:
        """Loss, latents and the sum of all parameters after each update."""
        torch.manual_seed(5)
        found = []
        for batch in self.batches:
            output = function(batch)
            self.optimizer.step()
            self.agent.behavior.update_slow_critic()
            total = torch.stack([p.detach().double().sum() for p in self.agent.parameters()])
            found.append((*(x.clone() for x in output), total))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_updates_equal_plain_ones(dtype: torch.dtype) -> None:
    plain, updates = Updates(dtype), Updates(dtype)
    expected = plain.run(plain.forward_backward)
    found = updates.run(Captured(updates.forward_backward, TapeRecorder(updates.agent)))
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert (updates.passes, plain.passes) == (WARMUP + 1, WARMUP + 4)


def test_the_learner_updates_alike_when_its_passes_are_captured() -> None:
    training = {"training_ratio": 64, "compile": False}  # a tape sees no native kernels
    found = []
    for captured in (False, True):
        with built(tiny_config(CountingEnv, training=training)) as algo:
            learner = learner_of(algo)
            if captured:
                learner._captured = Captured(learner._pass, TapeRecorder(agent_of(algo)))
            result = train_until(algo, WARMUP + 5)
            found.append((parameters_of(algo), result["learners"]["default_policy"]))
            if captured:
                learner._pass = lambda batch: pytest.fail("not replayed")
                for p in learner._params.values():
                    p.grad = None  # as the pass of a batch of another shape does
                train_until(algo, algo._updates + 1)
                weight = "world.encoder.vector.0.linear.weight"
                assert not np.array_equal(parameters_of(algo)[weight], found[-1][0][weight])
    (plain, measured), (replayed, measured_too) = found
    assert_same(plain, replayed)
    for name in ("loss_critic", "kl", "return_scale", "grad_norm", "update_norm", "total_loss"):
        assert float(measured[name]) == float(measured_too[name])


def test_several_learners_have_no_cuda_graphs() -> None:
    config = tiny_config(training={"cuda_graphs": True}).learners(num_learners=2)
    with pytest.raises(ValueError, match=r"`cuda_graphs`=True is for one learner, `num_learners` "):
        config.validate()


def test_a_batch_of_another_shape_is_not_captured_and_leaves_the_capture_as_it_is() -> None:
    calls = []

    def double(batch: Batch) -> Tensor:
        calls.append(len(batch["x"]))
        return batch["x"] * 2

    captured = Captured(double, TapeRecorder(nn.Module()))
    for _ in range(WARMUP + 1):
        captured({"x": torch.full((2,), 1.0)})
    assert calls == [2] * (WARMUP + 1)
    first = captured({"x": torch.full((2,), 4.0)})
    assert first.tolist() == [8.0, 8.0] and calls == [2] * (WARMUP + 1)
    assert captured({"x": torch.full((3,), 5.0)}).tolist() == [10.0] * 3
    assert captured({"x": torch.full((2,), 5, dtype=torch.int64)}).tolist() == [10, 10]
    assert calls == [2] * (WARMUP + 1) + [3, 2]
    assert captured({"x": torch.full((2,), 6.0)}) is first and first.tolist() == [12.0, 12.0]


def test_every_thread_and_every_shape_warms_up() -> None:
    calls = []

    def count(batch: Batch) -> Tensor:
        calls.append(threading.get_ident())
        return batch["x"] + 1

    captured = Captured(count, TapeRecorder(nn.Module()))
    for n in (1, 2) * (WARMUP - 1):
        captured({"x": torch.zeros(n)})
    thread = threading.Thread(target=captured, args=({"x": torch.zeros(2)},))
    thread.start()
    thread.join()
    assert len(calls) == 2 * WARMUP - 1 and len(set(calls)) == 2
    for _ in range(4):
        assert captured({"x": torch.zeros(2)}).tolist() == [1.0, 1.0]
    assert len(calls) == 2 * WARMUP - 1 + 2  # the last to warm up, and the capture


def test_after_a_capture_that_failed_the_next_call_captures_again() -> None:
    class Failing(TapeRecorder):
        def capture(self, function: Callable[[], R]) -> tuple[R, Callable[[], None]]:
            if failures:
                raise failures.pop()
            return super().capture(function)

    failures = [RuntimeError("stream is capturing")]
    captured = Captured(lambda batch: batch["x"] * 2, Failing(nn.Module()))
    for _ in range(WARMUP):
        captured({"x": torch.ones(1)})
    with pytest.raises(RuntimeError, match="stream is capturing"):
        captured({"x": torch.ones(1)})
    assert captured({"x": torch.full((1,), 3.0)}).tolist() == [6.0]


def with_a_graph() -> set[int]:
    """Tensors that hold a graph of autograd."""
    gc.collect()
    return {id(x) for x in gc.get_objects() if isinstance(x, Tensor) and x.grad_fn is not None}


def test_nothing_of_a_pass_keeps_a_graph_of_autograd() -> None:
    """Its nodes would remember the stream that they were made on, which no capture may wait for."""
    before = with_a_graph()  # of other tests
    with built(tiny_config(CountingEnv, training={"training_ratio": 64})) as algo:
        learner = learner_of(algo)
        learner._captured = Captured(learner._pass, TapeRecorder(agent_of(algo)))
        train_until(algo, 2)
        assert not with_a_graph() - before
        kept = next(learner.agent().parameters()) * 2
        assert id(kept) in with_a_graph() - before


def test_garbage_is_collected_before_a_capture_and_not_during_it() -> None:
    cycle: list[Any] = [torch.zeros(1)]
    cycle.append(cycle)
    gone = weakref.ref(cycle[0])
    del cycle
    with no_garbage_collection():
        assert gone() is None
        assert not gc.isenabled()
    assert gc.isenabled()


class Devices(TorchDispatchMode):
    """Notes operations on tensors that are elsewhere than on one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(x.device.type != self.device for x in tensors((args, kwargs, out))):
            self.elsewhere.append(str(func))
        return out


def test_no_tensor_of_an_update_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture may not contain copies between host and device."""
    monkeypatch.setattr(Agent, "autocast", lambda *_: nullcontext())  # there is none for "meta"
    updates = Updates(torch.float32, "meta")
    with Devices("meta") as devices:
        updates.forward_backward(updates.batches[0])
        updates.optimizer.step()
        updates.agent.behavior.update_slow_critic()
        assert devices.elsewhere == []
        torch.tensor([1.0]).to("meta")
    assert devices.elsewhere


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_cuda_graph_gives_what_plain_updates_give(fused: bool, dtype: torch.dtype) -> None:
    found = []
    for graph in (False, True):
        updates = Updates(dtype, "cuda")
        updates.agent.fuse, updates.agent.noise = fused, FixedNoise(0.3)
        run = updates.forward_backward
        found.append(updates.run(Captured(run, CudaRecorder()) if graph else run))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a[3], b[3], rtol=tolerance, atol=tolerance)


@on_cuda
def test_a_cuda_graph_draws_other_numbers_every_time() -> None:
    recorder = CudaRecorder()
    recorder.run(lambda: torch.rand(8, device="cuda"))
    result, replay = recorder.capture(lambda: torch.rand(8, device="cuda"))
    replay()
    first = result.clone()
    replay()
    assert not torch.equal(first, result)
