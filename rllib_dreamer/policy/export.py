"""A trained policy as files that any machine can read: safetensors, JSON and a model card.

    policy.json         spaces, architecture, where the policy comes from, versions
    model.safetensors   the weights
    policy_step.pt2     one step for `torch.export.load` (or policy_step.onnx)
    README.md           the model card

Reading needs neither Ray nor pickle. The step is a pure function of tensors, for programs that do
not have this package: it acts greedily and takes the most probable latents, without randomness.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rllib_dreamer.atomic import write_text
from rllib_dreamer.model.agent import Agent
from rllib_dreamer.model.behavior import Actor, Behavior
from rllib_dreamer.model.codec import Decoder, Encoder
from rllib_dreamer.model.rssm import RSSM, DenseRSSM
from rllib_dreamer.model.sizes import ActionSpec, LossConfig, ModelConfig, ObsSpec
from rllib_dreamer.model.world_model import BinaryHead, TwoHotHead, WorldModel
from rllib_dreamer.policy.export_folder import check_target, taking_place
from rllib_dreamer.policy.parts import PolicyParts
from rllib_dreamer.policy.plain_json import from_plain, to_plain
from rllib_dreamer.policy.space_json import space_from_json, space_to_json
from rllib_dreamer.policy.step import (
    STEP_FILES,
    STEP_FORMATS,
    describe_step,
    require_packages,
    write_steps,
)

DESCRIPTION, WEIGHTS, CARD = "policy.json", "model.safetensors", "README.md"

_FORMAT = 1


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported policy."""
    return (folder / DESCRIPTION).is_file()


def write_export(policy: PolicyParts, folder: Path, formats: Sequence[str] = ("torch",)) -> Path:
    """Writes a policy.

    Args:
        policy: The policy.
        folder: New, empty, or that of an earlier export, which stays as it is until this one is
            written whole. Without `policy.json` a folder holds no exported policy.
        formats: How to write the step: "torch", "onnx" (needs onnx and onnxscript), both or none.

    Returns:
        The folder.

    Raises:
        ValueError: If a format is unknown, the folder holds something else, or the agent has parts
            that a custom catalog built.
        ImportError: If the packages for ONNX are not installed.
    """
    unknown = sorted(set(formats) - STEP_FORMATS.keys())
    if unknown:
        raise ValueError(f"formats: got {unknown}; must be of {', '.join(STEP_FORMATS)}.")
    require_packages(formats)
    check_target(folder, DESCRIPTION)
    _check_standard(policy.agent)
    description = _describe(policy)
    _check_sizes(policy.agent, description)
    with taking_place(folder, DESCRIPTION, (WEIGHTS, CARD, *STEP_FILES.values())) as fresh:
        _write_files(policy, description, fresh, formats)
    return folder


def _write_files(
    policy: PolicyParts, description: dict[str, Any], folder: Path, formats: Sequence[str]
) -> None:
    tensors = {key: x.detach().cpu().contiguous() for key, x in policy.agent.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(tensors))
    files = write_steps(policy, folder, formats)
    description = description | {"step": describe_step(policy) | {"files": files}}
    (folder / CARD).write_text(_card(description), encoding="utf-8")
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1, allow_nan=False) + "\n")


def read_export(folder: Path) -> PolicyParts:
    """Reads an exported policy.

    Raises:
        ValueError: If a file is missing, cut short, or of another format.
    """
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no whole exported policy ({error}): it needs {DESCRIPTION} and "
            f"{WEIGHTS}, as policy.export() writes them."
        ) from error
    if found.get("format") != _FORMAT:
        raise ValueError(
            f"{folder / DESCRIPTION} is of format {found.get('format')!r}; this version reads "
            f"{_FORMAT}: install the version that wrote it, {found.get('versions')}."
        )
    try:
        return _build(found, tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(
            f"{DESCRIPTION} and {WEIGHTS} in {folder} do not fit each other or are not whole "
            f"({type(error).__name__}: {line}): export again."
        ) from error


def _build(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PolicyParts:
    """Puts a policy together from its description and its weights."""
    agent = _build_agent(found)
    agent.load_state_dict(tensors)
    observation_space, action_space = (
        space_from_json(found[name]) for name in ("observation_space", "action_space")
    )
    rest = (from_plain(found[name]) for name in ("conversion", "env", "env_config", "about"))
    return PolicyParts(agent, observation_space, action_space, *rest)


def _build_agent(found: Mapping[str, Any]) -> Agent:
    """The agent of a description, with new weights."""
    config = ModelConfig(**_tuples(found["model"]))
    loss, decoded = LossConfig(**_tuples(found["loss"])), found["decoded"]
    actions = {key: ActionSpec(**_tuples(spec)) for key, spec in found["actions"].items()}
    world = WorldModel(
        Encoder(_obs_specs(found["observations"]), config),
        None if decoded is None else Decoder(_obs_specs(decoded), config),
        actions,
        config,
    )
    return Agent(world, Behavior(actions, config, loss), loss)


def _obs_specs(described: Mapping[str, Any]) -> dict[str, ObsSpec]:
    return {key: ObsSpec(**_tuples(spec)) for key, spec in described.items()}


def _describe(policy: PolicyParts) -> dict[str, Any]:
    """All of policy.json but the step."""
    agent = policy.agent
    decoder = agent.world.decoder
    return {
        "format": _FORMAT,
        "observation_space": space_to_json(policy.observation_space),
        "action_space": space_to_json(policy.action_space),
        "conversion": policy.conversion,
        "observations": _leaves_of(agent.world.encoder),
        "decoded": None if decoder is None else _leaves_of(decoder),
        "actions": {key: asdict(spec) for key, spec in agent.world.actions.items()},
        "model": asdict(agent.world.config),
        "loss": asdict(agent.loss),
        "parameters": sum(p.numel() for p in agent.parameters()),
        "env": _env_name(policy.env),
        "env_config": to_plain(policy.env_config),
        "about": to_plain(policy.about),
        "versions": _versions(),
    }


def _leaves_of(codec: Any) -> dict[str, dict[str, Any]]:
    """The leaves that an encoder reads, or a decoder gives."""
    leaves: dict[str, ObsSpec] = {**codec.images, **codec.vectors}
    return {key: asdict(spec) for key, spec in sorted(leaves.items())}


def _env_name(env: Any) -> str | None:
    """A name by which `rllib evaluate` finds the environment: for a class its path, or None."""
    if env is None or isinstance(env, str):
        return env
    module, name = getattr(env, "__module__", ""), getattr(env, "__qualname__", "")
    found = getattr(sys.modules.get(module), name, None)
    return f"{module}.{name}" if found is env else None


_CUSTOM = (
    "a policy with parts of a custom catalog cannot be exported; load its checkpoint by "
    "DreamerPolicy.from_checkpoint."
)


def _check_standard(agent: Agent) -> None:
    """Refuses parts of a custom catalog, whose code the files could not name without pickle."""
    world, behavior = agent.world, agent.behavior
    parts: dict[str, tuple[nn.Module | None, type[nn.Module]]] = {
        "encoder": (world.encoder, Encoder),
        "decoder": (world.decoder, Decoder),
        "rssm": (world.rssm, DenseRSSM if world.config.cell == "gru" else RSSM),
        "reward head": (world.reward, TwoHotHead),
        "continue head": (world.cont, BinaryHead),
        "actor": (behavior.actor, Actor),
        "critic": (behavior.critic, TwoHotHead),
    }
    for name, (part, standard) in parts.items():
        if part is not None and type(part) is not standard:
            raise ValueError(
                f"the {name} is a {type(part).__name__}, not the standard {standard.__name__}: "
                f"{_CUSTOM}"
            )


def _check_sizes(agent: Agent, description: Mapping[str, Any]) -> None:
    """Refuses standard parts that a custom catalog built otherwise: no file could be read again."""
    with torch.device("meta"):  # sizes alone, no memory
        standard = _build_agent(description).state_dict()
    given = agent.state_dict()
    for name in sorted(standard.keys() | given.keys()):
        sizes = [None if name not in x else tuple(x[name].shape) for x in (given, standard)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} is of size {sizes[0]}, by its config {sizes[1]}: {_CUSTOM}")


def _versions() -> dict[str, str]:
    names = ("rllib-dreamer", "torch", "gymnasium", "numpy", "ray")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that frozen dataclasses hold."""
    return {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}


def _card(found: Mapping[str, Any]) -> str:
    """The model card."""
    about, model, versions = found["about"], found["model"], found["versions"]
    env = found["env"] or "an environment that was not recorded"
    rows = {
        "environment": f"`{env}`",
        "env_config": f"`{json.dumps(found['env_config'])}`",
        "trained for": f"{about.get('agent_steps', 0):,} agent steps",
        "action repeat": about.get("action_repeat") or "not recorded",
        "observation": f"`{json.dumps(found['observation_space'])[:400]}`",
        "action": f"`{json.dumps(found['action_space'])[:400]}`",
        "parameters": f"{found['parameters']:,}",
        "latent state": f"{model['deter']} + {model['stoch']} x {model['classes']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    step = "".join(
        f"\n- `{file}`: one greedy step, inputs and outputs listed under `step` in "
        f"`{DESCRIPTION}`; {STEP_FORMATS[name]}"
        for name, file in found["step"]["files"].items()
    )
    return f"""# DreamerV3 policy for {env}

A world model and a policy learned inside it, trained with rllib_dreamer.

| | |
|---|---|
{table}

## Use

```python
from rllib_dreamer.policy.policy import DreamerPolicy

policy = DreamerPolicy.load("this/folder")
policy.reset()  # before each episode
action = policy.act(obs)
```

`{DESCRIPTION}` and `{WEIGHTS}`, all that this reads, hold data only: no code, no pickle.

## Files

- `{DESCRIPTION}`: spaces, architecture, origin
- `{WEIGHTS}`: weights, float32{step}

## Limits

It was trained on the environment above and acts sensibly only on observations like those it has
seen. Nothing about safety was learned beyond what the reward says. How well it does is told by
`rllib evaluate this/folder --episodes 20`.
"""
