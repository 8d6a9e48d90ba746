"""One step of a policy as a pure function of tensors, for `torch.export` and ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rllib_dreamer.model.agent import ActState
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.world_model import encode_action
from rllib_dreamer.policy.action_units import to_env, to_model
from rllib_dreamer.policy.parts import PolicyParts
from rllib_dreamer.spaces import canonical, leaf_spaces

STEP_FORMATS = {"torch": "read it by `torch.export.load`.", "onnx": "read it by onnxruntime."}
"""How a step can be written, with a hint for the model card."""

STEP_FILES = {"torch": "policy_step.pt2", "onnx": "policy_step.onnx"}
_ROWS = 2  # of the example that is traced; the number of rows stays free


class PolicyStep(nn.Module):
    """(deter, stoch, prev_action, obs, is_first) -> (deter, stoch, action), by position.

    Inputs, in this order: deter (n, D) float32; stoch (n, S) int64, class indices; the leaves of
    the previous action and then those of the observation, each sorted by key, (n, *shape) in the
    units and dtypes of the env (integers of discrete leaves as int64); is_first (n,) bool, True
    where an episode begins: there the state and action before do not count. Outputs: deter, stoch,
    the leaves of the action. Actions are the mean or mode, latents the most probable ones.
    """

    def __init__(self, policy: PolicyParts) -> None:
        super().__init__()
        self.agent = policy.agent
        self.conversion = policy.conversion
        self.observations = leaf_spaces(policy.observation_space)
        self.actions = leaf_spaces(policy.action_space, root="action")

    def forward(self, deter: Tensor, stoch: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        count = len(self.actions)
        previous = {
            key: to_model(x, space, self.conversion)
            for (key, space), x in zip(self.actions.items(), inputs[:count], strict=True)
        }
        obs = {
            key: canonical(x, space)
            for (key, space), x in zip(self.observations.items(), inputs[count:-1], strict=True)
        }
        first = inputs[-1].unsqueeze(-1)  # (n, 1)
        action = encode_action(previous, self.agent.world.actions)
        state = ActState(
            deter.masked_fill(first, 0.0),
            stoch.masked_fill(first, -1),
            action.masked_fill(first, 0.0),
        )
        actions, state = self.agent.act(obs, state, explore=False)
        chosen = [
            to_env(actions[key], space, self.conversion).to(_dtype(space))
            for key, space in self.actions.items()
        ]
        return state.deter, state.stoch.long(), *chosen


def example_inputs(policy: PolicyParts, rows: int = _ROWS) -> tuple[Tensor, ...]:
    """Inputs of a `PolicyStep` at the beginning of an episode."""
    config = policy.agent.world.config
    leaves = [
        *leaf_spaces(policy.action_space, root="action").values(),
        *leaf_spaces(policy.observation_space).values(),
    ]
    arrays = [np.stack([space.sample()] * rows) for space in leaves]
    return (
        torch.zeros(rows, config.deter),
        torch.full((rows, config.stoch), -1),
        *(
            torch.from_numpy(x if isinstance(space, spaces.Box) else x.astype(np.int64))
            for x, space in zip(arrays, leaves, strict=True)
        ),
        torch.ones(rows, dtype=torch.bool),
    )


def describe_step(policy: PolicyParts) -> dict[str, Any]:
    """Names, shapes and dtypes of a step's inputs and outputs, in their order."""
    config = policy.agent.world.config
    state = [("deter", [config.deter], "float32"), ("stoch", [config.stoch], "int64")]
    nested = isinstance(policy.action_space, spaces.Dict | spaces.Tuple)
    actions = [
        _leaf(f"action/{key}" if nested else key, space)
        for key, space in leaf_spaces(policy.action_space, root="action").items()
    ]
    leaves = leaf_spaces(policy.observation_space)
    observations = [_leaf(f"obs/{key}", space) for key, space in leaves.items()]
    previous = [(f"prev_{name}", shape, dtype) for name, shape, dtype in actions]
    following = [(f"next_{name}", shape, dtype) for name, shape, dtype in state]
    inputs = [*state, *previous, *observations, ("is_first", [], "bool")]
    return {"inputs": _rows(inputs), "outputs": _rows([*following, *actions])}


def write_steps(policy: PolicyParts, folder: Path, formats: Sequence[str]) -> dict[str, str]:
    """Writes the step of a policy.

    Args:
        policy: The policy.
        folder: Where to.
        formats: Of `STEP_FORMATS`.

    Returns:
        Format -> name of the file.
    """
    if formats:
        with _quiet(), _deterministic(policy):
            program = _traced(policy)
            for name in formats:
                if name == "torch":
                    torch.export.save(program, folder / STEP_FILES[name])
                else:
                    _write_onnx(policy, program, folder / STEP_FILES[name])
    return {name: STEP_FILES[name] for name in formats}


def _traced(policy: PolicyParts) -> torch.export.ExportedProgram:
    """The step as a graph, for any number of rows."""
    inputs = example_inputs(policy)
    rows = torch.export.Dim("rows", min=1, max=65536)
    shapes: Any = ({0: rows}, {0: rows}, tuple({0: rows} for _ in inputs[2:]))
    return torch.export.export(PolicyStep(policy).eval(), inputs, dynamic_shapes=shapes)


def require_packages(formats: Sequence[str]) -> None:
    """Checks that a step can be written in these formats.

    Raises:
        ImportError: If the packages for ONNX are needed and not installed.
    """
    if "onnx" not in formats:
        return
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ImportError(
            'the format "onnx" needs onnx and onnxscript; run: pip install onnx onnxscript'
        )


def _write_onnx(policy: PolicyParts, program: Any, path: Path) -> None:
    described = describe_step(policy)
    written = torch.onnx.export(
        program,
        input_names=[leaf["name"] for leaf in described["inputs"]],
        output_names=[leaf["name"] for leaf in described["outputs"]],
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    written.save(str(path))


def _dtype(space: gym.Space) -> torch.dtype:
    """That of a leaf among the step's tensors."""
    if isinstance(space, spaces.Box):
        return torch.from_numpy(np.zeros(0, space.dtype)).dtype
    return torch.int64


def _leaf(name: str, space: gym.Space) -> tuple[str, list[int], str]:
    return name, list(space.shape or ()), str(_dtype(space)).removeprefix("torch.")


def _rows(leaves: list[tuple[str, list[int], str]]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": ["n", *shape], "dtype": dtype} for name, shape, dtype in leaves]


@contextmanager
def _deterministic(policy: PolicyParts) -> Iterator[None]:
    """Within this context the agent takes the most probable latents."""
    noise, policy.agent.noise = policy.agent.noise, FixedNoise()
    device = next(policy.agent.parameters()).device
    policy.agent.cpu()
    try:
        yield
    finally:
        policy.agent.noise = noise
        policy.agent.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's notes about its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
