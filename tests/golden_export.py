"""Writes files in the layout of the official ones from our own model, to test their reader.

The numbers prove nothing about the algorithm. They prove that names, layouts and spaces of every
kind are read as they were written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from golden import (
    Golden,
    action_spec,
    is_slow,
    loss_config,
    model_config,
    obs_spec,
    official_name,
    our_batch,
    to_official,
)
from golden_run import gradient_norms, outputs, record, train, updates_of_stored_gradients
from torch import Tensor

from rllib_dreamer.model.agent import Agent, build_agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.sizes import LossConfig, ModelConfig

Arrays = dict[str, np.ndarray]


def box(*shape: int) -> dict[str, Any]:
    """A real space."""
    return {"dtype": "float32", "shape": list(shape)}


def image(*shape: int) -> dict[str, Any]:
    """An image space."""
    return {"dtype": "uint8", "shape": list(shape)}


def discrete(classes: int, *shape: int) -> dict[str, Any]:
    """A space of class indices."""
    return {"dtype": "int32", "shape": list(shape), "classes": classes}


class Case(NamedTuple):
    """What a file is made for."""

    name: str
    obs: dict[str, dict[str, Any]]
    actions: dict[str, dict[str, Any]]
    size: dict[str, Any]
    horizon: int
    eps: float
    warmup: int = 0
    decay: float = 0.0
    rows: int = 2
    steps: int = 5


CASES = [
    Case(
        name="mixed",
        obs={
            "camera": image(32, 32, 3),
            "camera.depth": image(32, 32, 1),
            "matrix": box(2, 3),
            "body/pos.x": box(4),
            "scalar": box(),
            "flag": discrete(3),
            "counts": discrete(4, 2),
        },
        actions={"arm/left": box(2), "mode": discrete(3), "keys": discrete(4, 2), "grip": box()},
        size={"deter": 48, "hidden": 12, "classes": 6, "depth": 4, "units": 20, "stoch": 5}
        | {"blocks": 4, "bspace": 8, "mults": [2, 3, 4]},
        horizon=3,
        eps=0.3,
        decay=0.1,
    ),
    Case(
        name="discrete_only",
        obs={"cells": discrete(5, 3)},
        actions={"moves": discrete(4, 3), "push": box(3)},
        size={"deter": 32, "hidden": 10, "classes": 3, "depth": 2, "units": 14, "stoch": 6}
        | {"blocks": 2, "bspace": 2, "mults": [2, 3, 4, 4]},
        horizon=6,
        eps=0.0,
        warmup=2,
        rows=3,
        steps=4,
    ),
]


TINY = Case(  # for tests of single modules, which take many forward passes
    name="tiny",
    obs={"camera": image(8, 8, 1), "camera.back": image(8, 8, 2), "flag": discrete(3)}
    | {"matrix": box(2, 2), "scalar": box()},
    actions={"arm/left": box(2), "keys": discrete(3, 2)},
    size={"deter": 16, "hidden": 8, "classes": 4, "depth": 2, "units": 8, "stoch": 3}
    | {"blocks": 2, "bspace": 2, "mults": [2, 4]},
    horizon=2,
    eps=0.3,
    steps=5,
)


def configuration(case: Case) -> dict[str, Any]:
    """The JSON entry `config`."""
    stack = {"layers": 2, "kernel": 5, "symlog": True, "strided": False, "outer": False}
    agent = {
        "horizon": 100,
        "dyn": {"rssm": {"imglayers": 1, "obslayers": 2, "unimix": 0.02, "free_nats": 0.5}},
        "enc": {"simple": stack},
        "dec": {"simple": stack | {"layers": 1}},
        "rewhead": {"layers": 2, "bins": 41},
        "conhead": {"layers": 1},
        "policy": {"layers": 2, "minstd": 0.2, "maxstd": 0.9},
        "value": {"layers": 2, "bins": 41},
        "imag_loss": {"lam": 0.9, "actent": 1e-2, "slowreg": 0.7, "slowtar": False},
        "repl_loss": {"lam": 0.9, "slowreg": 0.7, "slowtar": False},
        "slowvalue": {"rate": 0.1, "every": 1},
        "retnorm": {"rate": 0.05, "limit": 0.5, "perclo": 10.0, "perchi": 80.0},
        "loss_scales": {"con": 1.0, "dyn": 0.9, "policy": 0.8, "rec": 0.5}
        | {"rep": 0.1, "repval": 0.3, "rew": 0.7, "value": 0.6},
        "opt": {"agc": 0.2, "beta1": 0.8, "beta2": 0.99, "eps": 1e-20, "wd": case.decay},
    }
    return {
        "B": case.rows,
        "T": case.steps,
        "H": case.horizon,
        "agent": agent,
        "size": case.size,
        "obs_space": case.obs,
        "act_space": case.actions,
        "lr": 2e-3,
        "warmup": case.warmup,
        "sampling": {"normal_eps": case.eps},
    }


def sample(space: dict[str, Any], lead: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random values (*lead, *shape) of a space."""
    shape = (*lead, *space["shape"])
    if space["dtype"] == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    if "classes" in space:
        return rng.integers(0, space["classes"], shape, np.int32)
    return (2.0 * rng.normal(size=shape)).astype(np.float32)


def random_batch(case: Case, config: ModelConfig, rng: np.random.Generator) -> Arrays:
    """One replay batch with a time limit, a termination and starts in the middle of rows."""
    lead = (case.rows, case.steps + 1)
    batch = {key: sample(space, lead, rng) for key, space in case.obs.items()}
    batch |= {key: sample(space, lead, rng) for key, space in case.actions.items()}
    flags = {name: np.zeros(lead, bool) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][:, 0] = True
    for row, terminal in ((0, False), (1, True)):
        flags["is_last"][row, 1 + row], flags["is_terminal"][row, 1 + row] = True, terminal
        flags["is_first"][row, 2 + row] = True
    for key in case.actions:
        batch[key][flags["is_last"]] = 0
    classes = rng.integers(0, config.classes, (*lead, config.stoch))
    stoch = np.eye(config.classes, dtype=np.float32)[classes]
    stoch[0, 0] = 0.0  # the latent of a step that was never acted on
    latents = {"dyn/deter": rng.normal(size=(*lead, config.deter)), "dyn/stoch": stoch}
    batch |= {key: value.astype(np.float32) for key, value in latents.items()}
    return batch | flags | {"reward": rng.normal(size=lead).astype(np.float32)}


def random_agent(case: Case, config: ModelConfig, loss: LossConfig, seed: int) -> Agent:
    """An agent whose every parameter, output layers and slow critic too, is away from its start."""
    torch.manual_seed(seed)
    obs = {key: obs_spec(space) for key, space in case.obs.items()}
    actions = {key: action_spec(space) for key, space in case.actions.items()}
    agent = build_agent(obs, actions, config, loss)
    middle = (config.bins - 1) / 2
    bump = -(((torch.arange(config.bins) - middle) / 2.0) ** 2) / 2
    with torch.no_grad():
        for name, param in agent.named_parameters():
            param.add_(0.05 * torch.randn_like(param))
            if param.shape == bump.shape and name.endswith("out.bias"):
                param.add_(bump.clamp(min=-23.0))
        agent.behavior.normalizer.low.fill_(-0.2)
        agent.behavior.normalizer.high.fill_(0.9)
    agent.noise = FixedNoise(case.eps)
    return agent


def agent_and_batch(case: Case, seed: int = 7) -> tuple[Agent, dict[str, Tensor]]:
    """A random agent and a batch in our layout, for tests of single modules."""
    config = configuration(case)
    agent = random_agent(case, model_config(config), loss_config(config), seed)
    arrays = random_batch(case, agent.world.config, np.random.default_rng(seed))
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    obs = {key: obs_spec(space) for key, space in case.obs.items()}
    return agent, our_batch(tensors, obs, agent.world.actions)


def export(path: Path, case: Case) -> None:
    """Writes the file of a case."""
    config = configuration(case)
    rng = np.random.default_rng(len(case.name))
    agent = random_agent(case, model_config(config), loss_config(config), seed=7)
    batch = random_batch(case, model_config(config), rng)
    arrays = {f"batch/{key}": value for key, value in batch.items()}
    arrays["state/retnorm/lo"], arrays["state/retnorm/hi"] = np.float32(-0.2), np.float32(0.9)
    arrays["config"] = np.array(json.dumps(config))
    np.savez(path, **arrays)
    golden = Golden(path)  # of which only batch, spaces and constants are used
    params = {name: param.detach().clone() for name, param in agent.named_parameters()}
    for name, param in params.items():
        prefix = "" if is_slow(name) else "param/"
        arrays[prefix + official(golden, name)] = to_official(name, param).numpy()
    recording = record(agent, golden.batch())
    results = outputs(golden, agent, recording) | gradient_norms(agent, recording.output)
    results = {key: value for key, value in results.items() if not key.endswith("/slow")}
    agent.load_state_dict(params, strict=False)
    agent.behavior.normalizer.low.fill_(-0.2)
    agent.behavior.normalizer.high.fill_(0.9)
    results |= training(golden, agent, params)
    np.savez(path, **arrays, **{key: value.detach().numpy() for key, value in results.items()})


def official(golden: Golden, name: str) -> str:
    """The official name of one of our parameters."""
    return official_name(name, golden.obs, golden.actions, len(golden.model_config.mults))


def training(golden: Golden, agent: Agent, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of two updates."""
    updates = train(golden, agent)
    trained = {name: param for name, param in params.items() if not is_slow(name)}
    silent = [n for n in trained if golden.eps == 0.0 and ".mean." in n]
    grads = [{n: g * (n not in silent) for n, g in update.grads.items()} for update in updates]
    results = {}
    for i, moved in enumerate(updates_of_stored_gradients(golden, trained, grads), 1):
        after = updates[i - 1]
        for name in trained:
            key = official(golden, name)
            results[f"out/grad{i}/{key}"] = to_official(name, grads[i - 1][name])
            results[f"out/update{i}/{key}"] = to_official(name, moved[name].float())
        for name, param in after.params.items():
            folder = f"out/slow{i}/" if is_slow(name) else f"out/param{i}/"
            key = official(golden, name).removeprefix("slow/")
            results[folder + key] = to_official(name, param)
        results[f"out/retnorm{i}/lo"], results[f"out/retnorm{i}/hi"] = after.low, after.high
        results[f"out/train{i}/opt/loss"] = after.total
    for name, factor in updates[0].clip_factors.items():
        results[f"out/agc_factor1/{official(golden, name)}"] = factor
    assert all(math.isfinite(float(value.sum())) for value in results.values())
    return results
