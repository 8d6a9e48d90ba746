"""The docs are true: every command is understood, all Python runs or at least names what exists."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import filter as filter_names
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer
import yaml
from gymnasium import spaces
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.scripts.scripts import cli as ray_cli
from test_packaging import ROOT, pyproject
from tiny import IMAGE, MODEL, VECTOR, RandomEnv, built, tiny_config, train_until

from rllib_dreamer.cli.app import app, resume_without_path
from rllib_dreamer.cli.overrides import apply_overrides, parse_stop
from rllib_dreamer.dreamer import DreamerConfig
from rllib_dreamer.dreamer_catalog import action_spec, obs_spec
from rllib_dreamer.envs import make_env
from rllib_dreamer.envs.robosuite import load_robosuite
from rllib_dreamer.evaluation import curves
from rllib_dreamer.model.agent import build_agent
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.sizes import LossConfig, model_config
from rllib_dreamer.policy.policy import DreamerPolicy
from rllib_dreamer.spaces import leaf_spaces

sys.path.insert(0, str(ROOT / "scripts"))
from experiments import EXPERIMENTS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANIFEST = ROOT / "docs" / "kuberay_rayjob.yaml"
THEIRS = {"corridor.py", "my_training.py", "..."}  # files that the reader writes
THEIR_MODULES = {"my_tasks"}


class Block(NamedTuple):
    """A fenced block; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    for fence in fences:
        line = page.read_text()[: fence.start()].count("\n") + 1
        yield Block(page, line, fence.group(1), fence.group(2))


def label(block: Any) -> str:
    return f"{block.page.name}:{block.line}" if isinstance(block, Block) else str(block)


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


# Commands.


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of all shell blocks, comments taken off."""
    for block in BLOCKS:
        if block.language in ("", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                line = re.sub(r"^\w+=\$\((.*)\).*$", r"\1", line)  # the output of a command
                if words := shlex.split(line, comments=True):
                    yield block.page.name, shlex.join(words)


def understood(command: Any, words: list[str]) -> Any:
    """Parses words by a Click command and returns the context of the last sub-command."""
    context = command.make_context(command.name or "", list(words))
    while rest := [*getattr(context, "_protected_args", []), *context.args]:
        if not hasattr(command, "get_command"):
            break
        found = command.get_command(context, rest[0])
        assert found is not None, f"{command.name} has no command {rest[0]}"
        command, context = found, found.make_context(rest[0], rest[1:], parent=context)
    return context


def check_rllib(words: list[str]) -> None:
    values = understood(typer.main.get_command(app), resume_without_path(words)).params
    apply_overrides(DreamerConfig(), values.get("set") or [])
    if values.get("stop") is not None:
        assert parse_stop(values["stop"])
    if values.get("reference") is not None:
        assert values["reference"] in curves.REFERENCES
    file = values.get("file")
    assert file is None or file.name in THEIRS or (ROOT / file).is_file()


def check_ray(words: list[str]) -> None:
    context = understood(ray_cli, words)
    if context.command.name == "submit":
        entry = context.params["entrypoint"]
        check(list(entry))


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    called = [word for word in words if "=" not in word]
    assert set(called) <= set(targets)
    variables = {"FILE": "tuned_examples/walker.py", "ARGS": "", "EXPERIMENT": "cartpole"}
    variables |= dict(word.split("=", 1) for word in words if "=" in word)
    if "train" in called:
        check_rllib(["train", "file", variables["FILE"], *shlex.split(variables["ARGS"])])
    if "reproduce" in called:
        assert filter_names(EXPERIMENTS, variables["EXPERIMENT"]), variables["EXPERIMENT"]


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for extras in re.findall(r"^(?:\.|rllib-dreamer)\[(.+)\]$", "\n".join(words), re.M):
        assert set(extras.split(",")) <= pyproject()["project"]["optional-dependencies"].keys()


def check_files(words: list[str]) -> None:
    """Files that are named have to be there."""
    for word in words:
        assert not re.search(r"\.(py|ya?ml)$", word) or (ROOT / word).is_file(), word


CHECKS = {
    "rllib": check_rllib,
    "ray": check_ray,
    "make": check_make,
    "pip": check_pip,
    "python": check_files,
    "kubectl": check_files,
}
UNCHECKED = {"sudo", "mkdir", "ln", "export"}  # tools of the system


def check(words: list[str]) -> None:
    """Checks one command, by its name; variables may stand before it."""
    words = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words))
    if words:
        assert words[0] in CHECKS or words[0] in UNCHECKED, f"nothing checks {words[0]}"
        CHECKS.get(words[0], list)(words[1:])


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_a_command_is_understood(page: str, line: str) -> None:
    check(shlex.split(line))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("rllib train file tuned_examples/walker.py --stopp 1", "No such option"),
        ("rllib train file tuned_examples/walker.py --set model_sizes=1M", "model_sizes"),
        ("rllib train file tuned_examples/runner.py", "is_file"),
        ("rllib evaluated x", "no command"),
        ("ray job submit -- rllib train file gone.py", "is_file"),
        ("make everything", "everything"),
        ("make train FILE=gone.py", "is_file"),
        ("make train ARGS='--stopp 1'", "No such option"),
        ("make reproduce EXPERIMENT=cartpol", "cartpol"),
        ("pip install .[dmx]", "dmx"),
        ("python scripts/none.py", "none.py"),
        ("wget x", "nothing checks wget"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        check(shlex.split(line))


def test_the_manifest_runs_a_command_that_is_understood() -> None:
    claim, manifest = yaml.safe_load_all(MANIFEST.read_text())
    assert manifest["kind"] == "RayJob"
    check(shlex.split(manifest["spec"]["entrypoint"]))
    claimed = set(re.findall(r"claimName: ([\w-]+)", MANIFEST.read_text()))
    assert claimed == {claim["metadata"]["name"]}
    version = manifest["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().replace("[rllib]", "")


# Links.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        titles = re.findall(r"^#+ (.+)$", found.read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, target


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in PAGES} - {"README.md"}
    assert [page for page in pages if f"({page})" not in index] == []


def test_the_page_of_the_command_line_has_the_options_of_train() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text()
    table = page.partition("\n## Options\n")[2].partition("\n### ")[0]
    names = " ".join(row.split("|")[1] for row in re.findall(r"^\| `.*$", table, re.M))
    train = typer.main.get_command(app).get_command(None, "train")
    for command in (train, train.get_command(None, "file")):
        options = [name for each in command.params for name in (*each.opts, *each.secondary_opts)]
        options = [name for name in options if name.startswith("-") and name != "--help"]
        assert sorted(re.findall(r"--?[a-z][\w-]*", names)) == sorted(options)


# Python.


def imported(tree: ast.Module) -> dict[str, Any]:
    """What the imports of a block bind; fails where something does not exist."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in THEIR_MODULES:
                    continue
                module = importlib.import_module(alias.name)
                first = importlib.import_module(alias.name.split(".")[0])
                names[alias.asname or first.__name__] = module if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            names |= {
                alias.asname or alias.name: getattr(module, alias.name) for alias in node.names
            }
    return names


def settings_of(method: str) -> set[str]:
    """Keywords of a method of the config: ours, and those of RLlib that it hands on."""
    found = [getattr(cls, method, None) for cls in (DreamerConfig, AlgorithmConfig)]
    return {
        name for function in found if function for name in inspect.signature(function).parameters
    }


def check_names(text: str) -> None:
    """Every attribute of what is imported, and every setting of a config, has to exist."""
    tree = ast.parse(text)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            if "config" in ast.unparse(node.func).lower() and settings_of(node.func.attr):
                assert keywords <= settings_of(node.func.attr), ast.unparse(node)


@pytest.mark.parametrize("block", PYTHON, ids=label)
def test_python_names_what_exists(block: Block) -> None:
    check_names(block.text)


def test_settings_in_the_text_exist() -> None:
    for page in PAGES:
        for call in re.findall(r"`(config\.\w+\([^`]*\))`", page.read_text()):
            with contextlib.suppress(SyntaxError):  # "..." stands for more of them
                check_names(call.replace("...", "None"))


@pytest.mark.parametrize(
    "text",
    [
        "import rllib_dreamer\nrllib_dreamer.Dreamer",
        "from rllib_dreamer import Nothing",
        "config.training(model_sizes='1M')",
        "config.env_runners(num_runners=3)",
    ],
)
def test_a_wrong_name_is_noticed(text: str) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        check_names(text)


def python_of(name: str) -> list[str]:
    return [block.text for block in PYTHON if block.page.name == name]


class Camera(RandomEnv):
    """Pictures, found by evaluations under its name."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({"observation_space": spaces.Dict({"image": IMAGE}), "length": 9} | config)


class Arm(RandomEnv):
    """Six joints."""

    def __init__(self, config: dict[str, Any]) -> None:
        arm = spaces.Box(-1.0, 1.0, (6,), np.float32)
        super().__init__({"observation_space": VECTOR, "action_space": arm} | config)


def exported(folder: Path, env: type[RandomEnv], **model: Any) -> None:
    """An untrained policy, for which a trained one stands in the docs."""
    torch.manual_seed(0)
    observation, action = env({}).observation_space, env({}).action_space
    agent = build_agent(
        {key: obs_spec(key, space) for key, space in leaf_spaces(observation).items()},
        {key: action_spec(key, space) for key, space in leaf_spaces(action, "action").items()},
        model_config("1M", **model),
        LossConfig(),
    )
    DreamerPolicy(agent, observation, action, env=env).export(folder, ())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder to work in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_act_and_deploy(home: Path) -> None:
    exported(home / "ray_results" / "my_run", Arm)
    batch = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(8, 3)
    scope: dict[str, Any] = {"obs": batch[0], "over": False}
    act, several, imagine, export, step, onnx = python_of("act_and_deploy.md")
    exec(act, scope)
    assert scope["action"].shape == (6,)
    exec(several, scope | {"observations": batch, "just_reset": np.ones(8, bool)})
    exec(imagine, scope | {"obs": batch[:5], "actions": np.zeros((7, 6), np.float32)})
    exec(export.replace('"exported")', '"exported", ("torch", "onnx"))', 1), scope)
    scope["policy"].agent.noise = FixedNoise()  # latents as those of the exported step
    scope["policy"].reset()
    expected = scope["policy"].act(batch[0]), scope["policy"].act(batch[1])
    observed = iter([(batch[1], False), (batch[2], True)])
    taken = []

    def robot(action: np.ndarray) -> Any:
        taken.append(action)
        return next(observed)

    scope["robot"] = robot
    exec(step, scope)
    np.testing.assert_allclose(taken, expected, atol=1e-5)
    exec(onnx, scope)


def test_evaluate(home: Path) -> None:
    exported(home / "ray_results" / "walker", Camera, **MODEL)
    (text,) = python_of("evaluate.md")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(text.replace("episodes=20", "episodes=2"))
    assert len(out.getvalue().split()) == 2
    assert (home / "evaluation" / "report.html").is_file()


def test_train_your_env(home: Path) -> None:
    env, check, config, _, in_real_time = python_of("train_your_env.md")
    scope: dict[str, Any] = {}
    for text in (env, check, config):
        exec(text, scope)
    shown = scope["config"].copy()
    exec(in_real_time, scope)
    scope["config"].validate()
    tiny = tiny_config(scope["Corridor"], **shown.env_config)
    with built(tiny) as algo:
        assert algo.train()["dreamer"]["env_steps"] >= 1
    assert scope["stop"].keys() == {"dreamer/env_steps"}


def test_other_blocks_run(home: Path) -> None:
    (text,) = python_of("replay.md")[:1]
    exec(text, {"env": RandomEnv({}), "capacity": 1000})
    text, _ = python_of("environments.md")
    exec(text, {"MyEnv": RandomEnv})
    scope: dict[str, Any] = {}
    for text in python_of("scaling.md"):
        exec(text.replace("tuner.fit()", "None"), scope)
    assert scope["config"].lr == [[0, 4e-5], [50_000, 8e-5]]


def test_custom_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, head = python_of("custom_observation.md")
    custom = ModuleType("custom")
    monkeypatch.setitem(sys.modules, "custom", custom)
    exec(encoder, vars(custom))
    exec(head, vars(custom))
    config = tiny_config().rl_module(rl_module_spec=RLModuleSpec(catalog_class=custom.HeadCatalog))
    with built(config) as algo:
        train_until(algo, 1)
        heads = algo._on_learners(lambda learner: type(learner.agent().world.reward))
        assert heads == [custom.SquaredHead]


def test_a_robosuite_task_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    load_robosuite()
    from robosuite.environments import base
    from robosuite.environments.manipulation.stack import Stack

    monkeypatch.setattr(base, "REGISTERED_ENVS", dict(base.REGISTERED_ENVS))
    _, text = python_of("environments.md")
    tasks = ModuleType("my_tasks")
    vars(tasks)["StackHigh"] = type("StackHigh", (Stack,), {})
    monkeypatch.setitem(sys.modules, "my_tasks", tasks)
    scope: dict[str, Any] = {}
    exec(text, scope)
    with pytest.raises(ValueError, match="unknown key 'horizont': did you mean 'horizon'"):
        make_env(scope["make_stack_high"], {"horizont": 2})
    env = make_env(scope["make_stack_high"], {"observation": "proprio", "horizon": 2})
    env.reset(seed=0)
    *_, truncated, info = [env.step(env.action_space.sample()) for _ in range(2)][-1]
    env.close()
    assert truncated and info == {"success": False}


@pytest.mark.slow
def test_the_readme_trains(home: Path) -> None:
    (text,) = python_of("README.md")
    command = [sys.executable, "-c", text.replace("20_000", "50")]
    subprocess.run(command, check=True, timeout=600)  # Ray looks for HOME when it is imported
    assert os.listdir(home / "ray_results")
