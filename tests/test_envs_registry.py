"""Env names: registered with Ray Tune, built anywhere, refused with the nearest ones."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from ray import tune
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.tune.registry import ENV_CREATOR, _global_registry

from rllib_dreamer import DreamerConfig, DreamerTorch, envs
from rllib_dreamer.envs import atari, dmc, rendering, robosuite, wrappers
from rllib_dreamer.envs import gymnasium as gymnasium_ids


class Slider(gym.Env):
    """A user's own env."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, env_config=None):
        self.scale = (env_config or {}).get("scale", 0.5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(2, self.scale, np.float32), {}

    def step(self, action):
        return np.full(2, self.scale, np.float32), 0.0, False, False, {}


def created(name, config, **context):
    creator = _global_registry.get(ENV_CREATOR, name)
    return creator(EnvContext(config, worker_index=context.pop("worker_index", 0), **context))


def test_every_family_is_listed_in_both_spellings():
    names = envs.env_names()
    assert len(names) == len(set(names))
    assert {
        "dmc/walker-walk",
        "DMC/walker/walk",
        "robosuite/Lift",
        "atari100k/pong",
        "ALE/Pong-v5",
    } <= set(names)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("dmc/walker-walk", {}, 2),
        ("dmc/walker-walk", {"action_repeat": 4}, 4),
        ("DMC/walker/walk", None, 2),
        ("robosuite/Lift", {}, 1),
        ("atari100k/pong", {}, 4),
        ("ALE/Pong-v5", {}, 4),
        ("CartPole-v1", {}, 1),
        ("CartPole-v1", {"action_repeat": 3}, 3),
        (Slider, {}, 1),
    ],
)
def test_action_repeat(name, config, expected):
    assert envs.action_repeat(name, config) == expected


def test_action_repeat_of_a_family_under_another_name():
    assert envs.action_repeat(envs.register_env("dmc/walker-walk", "my-walker"), {}) == 2
    assert envs.action_repeat(envs.EnvCreator("atari100k/pong")) == 4


@pytest.mark.parametrize(
    ("env", "other", "expected"),
    [
        ("dmc/walker-walk", "DMC/hopper/hop", True),
        ("ALE/Pong-v5", "atari100k/pong", False),
        ("robosuite/Lift", "dmc/walker-walk", False),
        ("CartPole-v1", "CartPole-v1", True),
        ("CartPole-v1", "Acrobot-v1", False),
        ("CartPole-v1", None, False),
        (Slider, Slider, True),
        (Slider, "dmc/walker-walk", False),
    ],
)
def test_an_env_config_holds_within_a_family(env, other, expected):
    assert envs.shares_options(env, other) is expected


def keys_of_the_docs():
    """The table "Keys of env_config": which keys each family takes."""
    page = (Path(__file__).parents[1] / "docs" / "environments.md").read_text()
    rows = page.partition("## Keys of env_config")[2].split("\n\n")[1].splitlines()[2:]
    keys, key = {"dmc": set(), "robosuite": set(), "Atari": set(), "Gymnasium": set()}, ""
    for row in rows:
        name, families = (cell.strip() for cell in row.split("|")[1:3])
        key = name.strip("`") or key  # an empty cell goes on with the key above
        for family in keys if families == "all" else families.split(", "):
            keys[family].add(key)
    return keys


@pytest.mark.parametrize(
    ("family", "options", "others"),
    [
        ("dmc", dmc.DmcOptions, set()),
        ("robosuite", robosuite.RobosuiteOptions, set()),
        ("Atari", atari.Atari100kOptions, set()),
        ("Atari", atari.AleOptions, set()),
        ("Gymnasium", gymnasium_ids.GymnasiumOptions, {"any other"}),
    ],
)
def test_the_table_of_the_docs_has_the_keys_of_each_family(family, options, others):
    fields = {field.name for field in dataclasses.fields(options)}
    assert keys_of_the_docs()[family] == fields | others


@pytest.mark.parametrize(
    ("env", "env_config", "message"),
    [
        ("dmc/waker-walk", {}, "Unknown env 'dmc/waker-walk': did you mean 'dmc/walker-walk'"),
        ("dmc/walker-walk", {"sizes": 64}, "unknown key 'sizes': did you mean 'size'"),
        ("atari100k/pong", {"noops": -1}, r"env_config\['noops'\] must be an int >= 0"),
    ],
)
def test_configs_refuse_unknown_envs_and_keys_before_anything_starts(env, env_config, message):
    config = DreamerConfig().environment(env, env_config=env_config)
    with pytest.raises(ValueError, match=message):
        config.validate()
    settings = config.to_dict() | {"num_env_runners": 2}
    with pytest.raises(ValueError, match=message):  # as a Tuner builds a trial from its param_space
        DreamerTorch(config=settings)


def test_creators_carry_the_drivers_backend(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    creator = pickle.loads(pickle.dumps(envs.EnvCreator("dmc/walker-walk")))
    assert creator.mujoco_gl == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "")
    seen = []
    monkeypatch.setattr(rendering, "setup_rendering", lambda *args, **kwargs: seen.append(args))
    monkeypatch.setattr(envs, "make_env", lambda env, config, **_: None)
    creator(EnvContext({}, worker_index=1))
    assert seen == [("osmesa",)]


@pytest.mark.parametrize("config", [{}, {"scale": 0.25}])
def test_a_creator_gets_the_context_that_rllib_made(config):
    seen = []
    creator = envs.checked_creator(lambda context: seen.append(context) or Slider(context))
    creator(EnvContext(config, worker_index=2, num_workers=3))
    assert (seen[0], seen[0].worker_index, seen[0].num_workers) == (config, 2, 3)


@pytest.mark.parametrize(
    ("env_id", "observation", "fails"),
    [
        ("InvertedPendulum-v5", "state", False),
        ("InvertedPendulum-v5", "pixels", True),
        ("CartPole-v1", "pixels", False),
    ],
)
def test_pictures_of_mujoco_need_opengl_and_others_do_not(monkeypatch, env_id, observation, fails):
    """On a machine without it, where the env is the first or comes after one without pictures."""
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv(rendering.OURS, "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(rendering, "library_found", lambda name: False)
    for config in ({"observation": observation}, {}, {"observation": observation}):
        if fails and config:
            with pytest.raises(RuntimeError, match=r"^No OpenGL library .*apt-get install"):
                gymnasium_ids.make(env_id, config)
        else:
            gymnasium_ids.make(env_id, config).close()


def test_films_of_a_gymnasium_id_keep_its_time():
    plain, repeated = (envs.make_env("CartPole-v1", {"action_repeat": n}) for n in (1, 5))
    assert (plain.metadata["render_fps"], repeated.metadata["render_fps"]) == (50, 10)


def test_seeds_differ_between_runners():
    envs.register_envs()
    config = {"observation": "proprio", "seed": 3}
    first = created("dmc/reacher-easy", config).reset()[0]
    same = created("dmc/reacher-easy", config).reset()[0]
    other = created("dmc/reacher-easy", config, worker_index=1).reset()[0]
    neighbour = created("dmc/reacher-easy", config, vector_index=1).reset()[0]
    np.testing.assert_array_equal(first, same)
    np.testing.assert_array_equal(first, neighbour)  # envs of one runner do not
    assert not np.array_equal(first, other)


def test_a_seed_leaves_what_is_drawn_at_construction_alike_in_all_runners():
    envs.register_envs()
    config = {"observation": "proprio", "seed": 3}
    one, two = (created("dmc/lqr-lqr_2_1", config, worker_index=index) for index in (1, 2))
    stiffness = [env.unwrapped._env.physics.model.jnt_stiffness for env in (one, two)]
    np.testing.assert_array_equal(*stiffness)
    assert not np.array_equal(one.reset()[0], two.reset()[0])


@pytest.mark.parametrize(
    ("env", "config", "message"),
    [
        ("dmc/walker-walk", {"seed": "1"}, r"env_config\['seed'\] must be an int >= 0; got '1'"),
        ("dmc/walker-walk", {"size": 64.0}, r"env_config\['size'\] must be an int or"),
        ("atari100k/pong", {"gray": "false"}, r"env_config\['gray'\] must be True or False"),
        ("ALE/Pong-v5", {"sticky": "0.2"}, r"env_config\['sticky'\] must be a probability"),
        (
            "robosuite/Lift",
            {"object_state": "false"},
            r"env_config\['object_state'\] must be True, False or None; got 'false'",
        ),
        ("dmc/walker-walk", {"camera": [0]}, r"env_config\['camera'\] must be a number or name"),
        ("CartPole-v1", {"observation": "picture"}, r"\['observation'\] must be one of 'state'"),
        ("CartPole-v1", {"action_repeat": 0}, r"env_config\['action_repeat'\] must be an int >= 1"),
        ("gymnasium:CartPole-v1", {"size": 6.4}, r"env_config\['size'\] must be an int or"),
    ],
)
def test_wrong_values_are_named(env: str, config: dict, message: str):
    with pytest.raises(ValueError, match=message):
        envs.validate_env(env, config)
    with pytest.raises(ValueError, match=message):
        envs.validate_env(envs.register_env(env, f"mine-{env.replace(':', '-')}"), config)


def test_what_only_an_env_itself_knows_is_left_to_it():
    envs.validate_env("CartPole-v1", {"slippery": False, "action_repeat": 2})
    name = "Acrobot-v1"
    tune.register_env(name, lambda config: Slider(config))  # reads keys of its own
    try:
        envs.validate_env(name, {"size": "large"})
    finally:
        _global_registry.unregister(ENV_CREATOR, name)


def test_what_a_module_of_ones_own_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_robot.py").write_text("import a_simulator_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'my_robot' cannot be imported: .*a_simulator_that_is_m"):
        envs.validate_env_name("my_robot.Reach")
    with pytest.raises(ValueError, match=r"Unknown env 'their_robot\.Reach'"):
        envs.validate_env_name("their_robot.Reach")


def test_an_env_class_of_ones_own_gets_the_checks():
    name = envs.register_env(Slider)
    assert name == "Slider"
    env = created(name, {"scale": 0.25})
    assert env.reset()[0][0] == 0.25
    with pytest.raises(wrappers.EnvOutputError, match=r"Env 'Slider', agent step 0 .*'vector'"):
        created(name, {"scale": 3.0}).reset()


def test_a_gymnasium_id_gets_the_checks():
    assert envs.register_env("CartPole-v1", "a-checked-cartpole") == "a-checked-cartpole"
    assert isinstance(created("a-checked-cartpole", {}), wrappers.CheckedEnv)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (4,)),
        ({"observation": "pixels"}, (64, 64, 3)),
        ({"observation": "pixels", "size": (32, 48), "action_repeat": 2}, (32, 48, 3)),
    ],
)
def test_gymnasium_ids(config, shape):
    env = envs.make_env("CartPole-v1", config)
    observation, _ = env.reset(seed=0)
    assert observation.shape == env.observation_space.shape == shape
    check_env(env.env, skip_render_check=True)
    env.close()


def test_gymnasium_state_and_pixels_together():
    env = envs.make_env("CartPole-v1", {"observation": "both", "size": 32})
    observation, _ = env.reset(seed=0)
    assert {key: value.shape for key, value in observation.items()} == {
        "image": (32, 32, 3),
        "vector": (4,),
    }
    assert env.step(1)[0]["image"].std() > 0


def test_other_keys_go_to_gym_make():
    env = envs.make_env("FrozenLake-v1", {"is_slippery": False, "map_name": "8x8"})
    assert env.observation_space == spaces.Discrete(64)
    with pytest.raises(ValueError, match="env_config of 'CartPole-v1' has a key that neither"):
        envs.make_env("CartPole-v1", {"slippery": False})


def test_a_type_error_inside_an_env_is_not_blamed_on_its_config():
    class Broken(Slider):
        def __init__(self, gear=1, render_mode=None):
            dict(speed=gear) if gear == 1 else np.zeros(2, colour="red")
            self.scale = gear + "2"

    gym.register("Broken-v0", entry_point=Broken)
    for config, message in (({}, "unsupported operand"), ({"gear": 2}, "'colour'")):
        with pytest.raises(TypeError, match=message):
            envs.make_env("Broken-v0", config)
    with pytest.raises(ValueError, match=r"has a key that neither .*'colour'"):
        envs.make_env("Broken-v0", {"colour": "red"})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dmc/waker-walk", "dmc/walker-walk"),
        ("DMC/walker/wlk", "DMC/walker/walk"),
        ("robosuite/Lfit", "robosuite/Lift"),
        ("atari100k/pnog", "atari100k/pong"),
        ("CartPole-v9x", "CartPole-v1"),
        ("CarPole", "CartPole-v1"),
    ],
)
def test_unknown_names_list_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown env '{name}': did you mean .*'{nearest}'"):
        envs.validate_env_name(name)
    with pytest.raises(ValueError, match=f"Unknown env '{name}'"):
        envs.make_env(name)


@pytest.mark.parametrize(
    "name", ["dmc/walker-walk", "ALE/Pong-v5", "CartPole-v1", "robosuite/Lift"]
)
def test_known_names_pass(name):
    envs.validate_env_name(name)


def test_several_agents_are_refused():
    class Two(MultiAgentEnv):
        def __init__(self, config=None):
            super().__init__()

    message = r"Env 'Two' has several agents.*Dict spaces"
    with pytest.raises(ValueError, match=message):
        envs.make_env(Two)
    with pytest.raises(ValueError, match=message):
        envs.make_env(lambda config: Two(), name="Two")
    with pytest.raises(ValueError, match=message):
        DreamerConfig().environment(Two).validate()


def test_things_that_are_no_env_are_refused():
    with pytest.raises(ValueError, match=r"is a dict, not a gymnasium.Env: wrap it"):
        envs.make_env(lambda config: {})


def test_async_workers_may_fork_although_the_parent_looked_at_the_spaces():
    """A vector env builds one env in the parent first; no OpenGL context may come of it."""
    code = """
import gymnasium as gym, numpy as np
from rllib_dreamer import envs
make = lambda: envs.make_env("dmc/walker-walk", {"size": 32})
vector = gym.vector.AsyncVectorEnv([make, make], context="fork")
first, _ = vector.reset(seed=1)
frames = vector.step(np.ones((2, 6), np.float32))[0]
assert frames.shape == (2, 32, 32, 3) and frames.std() > 1
assert not np.array_equal(first[0], first[1])
vector.close()
one = make()
one.reset()
vector = gym.vector.AsyncVectorEnv([make, make], context="fork")
try:
    vector.reset(seed=1)
except RuntimeError as error:
    print("refused" if "forked from one that had already rendered" in str(error) else error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ.copy(),
    )
    assert result.stdout.strip().endswith("refused"), result.stdout + result.stderr


def test_as_an_env_runner_builds_it():
    """RLlib hands the creator to `gym.make_vec`, which adds wrappers of its own."""
    envs.register_envs()
    creator = _global_registry.get(ENV_CREATOR, "dmc/walker-walk")
    context = EnvContext({"observation": "proprio"}, worker_index=0)
    gym.register("as-rllib-does-v0", entry_point=lambda: creator(context))
    for mode in ("sync", "async"):
        vector = gym.make_vec("as-rllib-does-v0", num_envs=2, vectorization_mode=mode)
        observations, _ = vector.reset(seed=0)
        assert observations.shape == (2, 24)
        assert vector.step(np.zeros((2, 6), np.float32))[0].shape == (2, 24)
        vector.close()


def test_sync_vector_env_of_pixels():
    vector = gym.vector.SyncVectorEnv(
        [lambda: envs.make_env("dmc/cartpole-swingup", {"size": 32})] * 2
    )
    frames, _ = vector.reset(seed=0)
    assert not np.array_equal(frames[0], frames[1])
    vector.step(np.zeros((2, 1), np.float32))
    vector.close()
