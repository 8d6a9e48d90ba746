"""Reads the golden files: numbers of the official implementation, as our model's tensors.

A whole-loss file holds a configuration, parameters, one replay batch and everything the official
code computes from them. Nothing about the known files is written down here: sizes, spaces, horizon
and noise all come from the file. Keys starting with `out/` are results, see `golden_run`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rllib_dreamer.model.agent import Agent, build_agent
from rllib_dreamer.model.codec import module_name
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.optim import LaProp
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig, ObsSpec

LOSS_NAMES = {"rew": "reward", "con": "cont", "policy": "actor", "value": "critic"}

# Official modules and our parameters that belong to them.
MODULES = {
    "enc": "world.encoder.",
    "dyn": "world.rssm.",
    "dec": "world.decoder.",
    "rew": "world.reward.",
    "con": "world.cont.",
    "pol": "behavior.actor.",
    "val": "behavior.critic.",
}

# Our module -> the official path, first full match wins. `~N` marks a decoder stage, which the
# official code counts downwards. The leaf (weight, bias, scale) is appended afterwards.
_PATHS = [
    (r"world\.encoder\.vector\.(\d+)\.linear", r"enc/mlp\1"),
    (r"world\.encoder\.vector\.(\d+)\.norm", r"enc/mlp\1norm"),
    (r"world\.encoder\.image\.convs\.(\d+)", r"enc/cnn\1"),
    (r"world\.encoder\.image\.norms\.(\d+)", r"enc/cnn\1norm"),
    (r"world\.rssm\.deter_in\.linear", "dyn/dynin0"),
    (r"world\.rssm\.deter_in\.norm", "dyn/dynin0norm"),
    (r"world\.rssm\.stoch_in\.linear", "dyn/dynin1"),
    (r"world\.rssm\.stoch_in\.norm", "dyn/dynin1norm"),
    (r"world\.rssm\.action_in\.linear", "dyn/dynin2"),
    (r"world\.rssm\.action_in\.norm", "dyn/dynin2norm"),
    (r"world\.rssm\.cell_in", "dyn/dynhid0"),
    (r"world\.rssm\.cell_norm", "dyn/dynhid0norm"),
    (r"world\.rssm\.gates", "dyn/dyngru"),
    (r"world\.rssm\.prior\.(\d+)\.linear", r"dyn/prior\1"),
    (r"world\.rssm\.prior\.(\d+)\.norm", r"dyn/prior\1norm"),
    (r"world\.rssm\.prior_out", "dyn/priorlogit"),
    (r"world\.rssm\.posterior\.(\d+)\.linear", r"dyn/obs\1"),
    (r"world\.rssm\.posterior\.(\d+)\.norm", r"dyn/obs\1norm"),
    (r"world\.rssm\.posterior_out", "dyn/obslogit"),
    (r"world\.decoder\.vector\.mlp\.(\d+)\.(linear|norm)", r"dec/mlp/\2\1"),
    (r"world\.decoder\.image\.deter_in", "dec/sp0"),
    (r"world\.decoder\.image\.stoch_in\.linear", "dec/sp1"),
    (r"world\.decoder\.image\.stoch_in\.norm", "dec/sp1norm"),
    (r"world\.decoder\.image\.stoch_out", "dec/sp2"),
    (r"world\.decoder\.image\.norm", "dec/spnorm"),
    (r"world\.decoder\.image\.out", "dec/imgout"),
    (r"world\.decoder\.image\.convs\.(\d+)", r"dec/conv~\1"),
    (r"world\.decoder\.image\.norms\.(\d+)", r"dec/conv~\1norm"),
    (r"world\.reward\.mlp\.(\d+)\.(linear|norm)", r"rew/mlp/\2\1"),
    (r"world\.reward\.out", "rew/head/logits"),
    (r"world\.cont\.mlp\.(\d+)\.(linear|norm)", r"con/mlp/\2\1"),
    (r"world\.cont\.out", "con/head/logit"),
    (r"behavior\.critic\.mlp\.(\d+)\.(linear|norm)", r"val/mlp/\2\1"),
    (r"behavior\.critic\.out", "val/head/logits"),
    (r"behavior\.slow_critic\.mlp\.(\d+)\.(linear|norm)", r"slow/mlp/\2\1"),
    (r"behavior\.slow_critic\.out", "slow/head/logits"),
    (r"behavior\.actor\.mlp\.(\d+)\.(linear|norm)", r"pol/mlp/\2\1"),
]
_HEADS = re.compile(r"(world\.decoder\.vector|behavior\.actor)\.heads\.(.+)")

# Settings that the official code has and our model does not: a file with another value is refused.
_ONLY: dict[str, Any] = {
    "ac_grads": False,
    "advnorm/impl": "none",
    "conhead/output": "binary",
    "contdisc": True,
    "dec/simple/outer": False,
    "dec/simple/strided": False,
    "dyn/rssm/absolute": False,
    "dyn/rssm/dynlayers": 1,
    "enc/simple/kernel": 5,
    "enc/simple/outer": False,
    "enc/simple/strided": False,
    "imag_last": 0,
    "imag_loss/slowtar": False,
    "opt/momentum": True,
    "opt/schedule": "const",
    "policy_dist_cont": "bounded_normal",
    "policy_dist_disc": "categorical",
    "repl_loss/slowtar": False,
    "repval_grad": True,
    "repval_loss": True,
    "retnorm/debias": False,
    "retnorm/impl": "perc",
    "reward_grad": True,
    "rewhead/output": "symexp_twohot",
    "slowvalue/every": 1,
    "valnorm/impl": "none",
    "value/output": "symexp_twohot",
}


class Golden:
    """One whole-loss file.

    Args:
        path: The .npz file.

    Raises:
        ValueError: If the file was made with a setting that our model does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path) as file:
            self.arrays: dict[str, np.ndarray] = {key: file[key] for key in file.files}
        self.config: dict[str, Any] = json.loads(str(self.arrays.pop("config")))
        official = self.config["agent"]
        for key, value in _ONLY.items():
            found = lookup(official, key)
            if found is not None and found != value:
                raise ValueError(f"{path.name}: {key}={found!r} is not supported, only {value!r}.")
        self.model_config = model_config(self.config)
        self.loss_config = loss_config(self.config)
        self.eps = float(self.config["sampling"]["normal_eps"])
        self.obs = {key: obs_spec(s) for key, s in self.config["obs_space"].items()}
        self.actions = {key: action_spec(s) for key, s in self.config["act_space"].items()}

    def tensor(self, key: str) -> Tensor:
        """An entry as a tensor."""
        return torch.from_numpy(np.array(self.arrays[key]))

    def keys(self, prefix: str) -> list[str]:
        """Keys below a prefix, in the order of the file."""
        return [key for key in self.arrays if key.startswith(prefix)]

    def key(self, prefix: str, name: str) -> str:
        """The key in the file of one of our parameters.

        Args:
            prefix: "param/", "out/grad1/", ...; of the slow critic "", "out/slow1/", ...
            name: Name of our parameter.
        """
        official = official_name(name, self.obs, self.actions, len(self.model_config.mults))
        if prefix.startswith("out/slow"):
            official = official.removeprefix("slow/")
        key = prefix + official
        if key not in self.arrays:  # the leaf of a head may have another name
            folder, leaf = key.rsplit("/", 2)[0], key.rsplit("/", 1)[1]
            (key,) = [
                k for k in self.arrays if re.fullmatch(f"{re.escape(folder)}/[^/]+/{leaf}", k)
            ]
        return key

    def read(self, prefix: str, name: str, like: Tensor) -> Tensor:
        """The array of our parameter `name`, in our layout; `like` is that parameter."""
        return to_ours(name, self.tensor(self.key(prefix, name)), like)

    def agent(self) -> Agent:
        """Our agent with the file's parameters, slow critic, normaliser and way of sampling."""
        agent = build_agent(self.obs, self.actions, self.model_config, self.loss_config)
        with torch.no_grad():
            for name, param in agent.named_parameters():
                param.copy_(self.read("" if is_slow(name) else "param/", name, param))
            agent.behavior.normalizer.low.copy_(self.tensor("state/retnorm/lo"))
            agent.behavior.normalizer.high.copy_(self.tensor("state/retnorm/hi"))
        agent.noise = FixedNoise(self.eps)
        return agent

    def optimizer(self, params: list[Tensor]) -> LaProp:
        """Our optimizer with the file's constants."""
        opt = self.config["agent"]["opt"]
        return LaProp(
            params,
            self.config["lr"],
            agc=opt["agc"],
            betas=(opt["beta1"], opt["beta2"]),
            eps=opt["eps"],
            warmup=self.config["warmup"],
            weight_decay=opt["wd"],
        )

    def batch(self) -> dict[str, Tensor]:
        """The file's batch in our layout, with T + 1 steps."""
        batch = {key.removeprefix("batch/"): self.tensor(key) for key in self.keys("batch/")}
        return our_batch(batch, self.obs, self.actions)


def our_batch(
    batch: Mapping[str, Tensor], obs: Mapping[str, ObsSpec], actions: Mapping[str, ActionSpec]
) -> dict[str, Tensor]:
    """An official batch (B, T + 1, ...) in our layout: leaves flat, latents as class indices."""
    rows, steps = batch["reward"].shape
    ours = {key: batch[key] for key in ("reward", "is_first", "is_last", "is_terminal")}
    for key, spec in obs.items():
        ours[f"obs/{key}"] = batch[key].reshape(rows, steps, *spec.shape)
    for key, action in actions.items():
        ours[f"action/{key}"] = batch[key].reshape(rows, steps, action.size)
    return ours | {"deter": batch["dyn/deter"], "stoch": stoch_index(batch["dyn/stoch"])}


def lookup(tree: Mapping[str, Any], path: str) -> Any:
    """The entry at a path with slashes, None if there is none."""
    value: Any = tree
    for part in path.split("/"):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our architecture from a file's configuration."""
    size, official = config["size"], config["agent"]
    rssm, enc = official["dyn"]["rssm"], official["enc"]["simple"]
    names = ("deter", "hidden", "classes", "depth", "units", "stoch", "blocks")
    return ModelConfig(
        **{name: size[name] for name in names},
        mults=tuple(size["mults"]),
        decoder_blocks=size["bspace"],
        encoder_layers=enc["layers"],
        decoder_layers=official["dec"]["simple"]["layers"],
        prior_layers=rssm["imglayers"],
        posterior_layers=rssm["obslayers"],
        reward_layers=official["rewhead"]["layers"],
        cont_layers=official["conhead"]["layers"],
        actor_layers=official["policy"]["layers"],
        critic_layers=official["value"]["layers"],
        bins=official["value"]["bins"],
        unimix=rssm["unimix"],
        actor_unimix=0.0,  # the official code mixes nothing into a discrete actor
        min_std=official["policy"]["minstd"],
        max_std=official["policy"]["maxstd"],
        symlog_obs=enc["symlog"],
    )


def loss_config(config: Mapping[str, Any]) -> LossConfig:
    """Our constants of the losses from a file's configuration."""
    official = config["agent"]
    imagined, norm = official["imag_loss"], official["retnorm"]
    scales = {LOSS_NAMES.get(key, key): value for key, value in official["loss_scales"].items()}
    return LossConfig(
        horizon=config["H"],
        discount=1.0 - 1.0 / official["horizon"],
        lam=imagined["lam"],
        free_nats=official["dyn"]["rssm"]["free_nats"],
        entropy_scale=imagined["actent"],
        slow_regularization=imagined["slowreg"],
        slow_rate=official["slowvalue"]["rate"],
        return_rate=norm["rate"],
        return_limit=norm["limit"],
        return_percentiles=(norm["perclo"], norm["perchi"]),
        scales=scales,
    )


def _classes(space: Mapping[str, Any]) -> int:
    """Number of classes of an integer space, 0 of a real one."""
    if "classes" in space:
        return int(np.max(space["classes"]))
    if np.issubdtype(np.dtype(space["dtype"]), np.integer) and "high" in space:
        return int(np.max(space["high"]))
    return 2 if space["dtype"] == "bool" else 0


def obs_spec(space: Mapping[str, Any]) -> ObsSpec:
    """Rank 3 is an image, integers are discrete, anything else a vector, whatever its rank."""
    shape = tuple(space["shape"])
    if len(shape) == 3:
        return ObsSpec("image", shape)
    classes = _classes(space)
    return ObsSpec("discrete" if classes else "vector", (math.prod(shape),), classes)


def action_spec(space: Mapping[str, Any]) -> ActionSpec:
    """Integers are discrete, one or several components."""
    classes = _classes(space)
    return ActionSpec("discrete" if classes else "continuous", math.prod(space["shape"]), classes)


def is_slow(name: str) -> bool:
    """True for a parameter of the slow critic."""
    return name.startswith("behavior.slow_critic.")


def official_name(
    name: str, obs: Mapping[str, ObsSpec], actions: Mapping[str, ActionSpec], stages: int
) -> str:
    """The official name of one of our parameters, e.g. `dyn/dynin0/kernel`.

    Args:
        name: Name of our parameter.
        obs: Specs of the observation leaves.
        actions: Specs of the action leaves.
        stages: Number of conv stages.
    """
    module, leaf = name.rsplit(".", 1)
    leaf = {"weight": "kernel"}.get(leaf, leaf)
    head = _HEADS.fullmatch(module)
    if head and head[1] == "world.decoder.vector":
        (key,) = [k for k in obs if module_name(k) == head[2]]
        return f"dec/vec/{key}/{'logits' if obs[key].kind == 'discrete' else 'pred'}/{leaf}"
    if head:
        ours, _, output = head[2].rpartition(".")
        (key,) = [k for k in actions if module_name(k) == ours]
        return f"pol/head/{key}/{'stddev' if output == 'std' else output}/{leaf}"
    for pattern, path in _PATHS:
        match = re.fullmatch(pattern, module)
        if match:
            path = re.sub(r"~(\d+)", lambda m: str(stages - 2 - int(m[1])), match.expand(path))
            return f"{path}/{leaf}"
    raise KeyError(f"no official name is known for the parameter {name!r}")


def to_ours(name: str, value: Tensor, like: Tensor) -> Tensor:
    """An official array in the layout of our parameter `name`."""
    if not name.endswith("weight") or like.ndim == 3:  # block-linear kernels agree as they are
        return value.reshape(like.shape)
    if like.ndim == 4:
        return value.permute(3, 2, 0, 1)
    return value.flatten(1).T


def to_official(name: str, value: Tensor) -> Tensor:
    """The inverse of `to_ours`."""
    if name.endswith("weight") and value.ndim == 4:
        return value.permute(2, 3, 1, 0)
    return value.T if name.endswith("weight") and value.ndim == 2 else value


def stoch_index(stoch: Tensor) -> Tensor:
    """Class indices (..., S) of stored one-hot latents (..., S, K); all-zero groups become -1."""
    return torch.where(stoch.sum(-1) > 0.5, stoch.argmax(-1), -1)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest entry of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def l2_error(ours: Tensor, theirs: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
