"""The robosuite env against `robosuite.make`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from ray.rllib.env.env_context import EnvContext

from rllib_dreamer.envs import dmc, make_env, robosuite

SMALL = {"size": 32, "horizon": 6}


@pytest.fixture
def make():
    """Builds envs and closes them, so that their OpenGL contexts do not pile up."""
    envs = []

    def build(task="Lift", **config):
        envs.append(robosuite.make(f"robosuite/{task}", config))
        return envs[-1]

    yield build
    for env in envs:
        env.close()
    gc.collect()


def reference_env(task="Lift", **kwargs):
    suite = robosuite.load_robosuite()
    return suite.make(
        task, robots="Panda", has_renderer=False, hard_reset=False, reward_shaping=True, **kwargs
    )


def seed_reference(env, seed):
    env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def actions(count, size=7):
    return np.random.default_rng(0).uniform(-1, 1, (count, size)).astype(np.float32)


def test_task_list_is_that_of_robosuite():
    robosuite.load_robosuite()
    from robosuite.environments.base import REGISTERED_ENVS

    assert sorted(robosuite.TASKS) == sorted(REGISTERED_ENVS)


def test_rewards_and_states_equal_robosuite(make):
    """Sums over the repeat; the horizon truncates where robosuite's own wrapper terminates."""
    env = make(observation="proprio", action_repeat=2, horizon=60)
    reference = reference_env(
        has_offscreen_renderer=False, use_camera_obs=False, horizon=60, seed=0
    )
    observation, _ = env.reset(seed=9)
    seed_reference(reference, 9)
    expected = reference.reset()
    for step, action in enumerate(actions(30)):
        keys = ("robot0_proprio-state", "object-state")
        vector = np.concatenate([expected[key] for key in keys]).astype(np.float32)
        np.testing.assert_allclose(observation, vector, rtol=0, atol=1e-6)
        observation, reward, terminated, truncated, info = env.step(action)
        total = 0.0
        for _ in range(2):
            expected, one_reward, done, _ = reference.step(action.astype(np.float64))
            total += one_reward
        assert reward == pytest.approx(total, abs=1e-9)
        assert info["success"] == bool(reference._check_success())
        assert (terminated, truncated) == (False, done)
        assert truncated == (step == 29)
    reference.close()


def test_exact_pictures_equal_robosuite_turned_upright(make):
    env = make(render="exact", size=48)
    reference = reference_env(
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names="agentview",
        camera_heights=48,
        camera_widths=48,
        seed=0,
    )
    seed_reference(reference, 2)
    expected = [reference.reset()["agentview_image"]]
    expected += [
        reference.step(action.astype(np.float64))[0]["agentview_image"] for action in actions(4)
    ]
    reference.close()
    del reference
    gc.collect()  # robosuite's context is freed before ours is made
    pictures = [env.reset(seed=2)[0], *(env.step(action)[0] for action in actions(4))]
    for picture, raw in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(picture, raw[::-1])


def test_pictures_are_the_right_way_up(make):
    """Lift the hand: what moves is in the upper half of the front view."""
    env = make(cameras="frontview", render="exact")
    before, _ = env.reset(seed=0)
    for _ in range(8):
        after, *_ = env.step(np.array([0, 0, 1, 0, 0, 0, 0], np.float32))
    moved = np.abs(after.astype(int) - before).sum((1, 2))  # (h,)
    assert moved[:32].sum() > 2 * moved[32:].sum()


@pytest.mark.parametrize(
    ("task", "camera"),
    [("Lift", "agentview"), ("Lift", "robot0_eye_in_hand"), ("Door", "agentview")],
)
def test_fast_pictures_are_close_to_exact_ones(make, task, camera):
    """The default rendering changes the picture by less than 0.1 of 255 on average."""
    fast, exact = (make(task, cameras=camera, render=mode) for mode in ("fast", "exact"))
    frames = [env.reset(seed=1)[0] for env in (fast, exact)]
    differences = []
    for action in actions(5, fast.action_space.shape[0]):
        assert frames[1].std() > 5
        differences.append(np.abs(frames[0].astype(int) - frames[1]).mean())
        frames = [env.step(action)[0] for env in (fast, exact)]
    assert np.mean(differences) < 0.1


def test_envs_in_one_process_do_not_draw_into_each_other(make):
    """Two robosuite envs and a dm_control one, stepped in turn, one closed on the way."""
    alone = make(seed=0, **SMALL)
    expected = [alone.reset()[0], *(alone.step(a)[0] for a in actions(4))]
    alone.close()
    one, two = make(seed=0, **SMALL), make("Stack", **SMALL)
    walker = dmc.make("dmc/walker-walk", {"size": 32})
    walker_frame, _ = walker.reset(seed=0)
    two.reset(seed=1)
    pictures = [one.reset()[0]]
    for step, action in enumerate(actions(4)):
        if step < 2:
            two.step(action)
        elif step == 2:
            two.close()
        np.testing.assert_array_equal(walker.render(), walker_frame)
        pictures.append(one.step(action)[0])
    walker.close()
    np.testing.assert_array_equal(np.stack(pictures), np.stack(expected))


def test_same_seed_same_episode(make):
    env, other = make(observation="proprio"), make(observation="proprio")

    def episode(env, seed):
        return np.stack([env.reset(seed=seed)[0], *(env.step(a)[0] for a in actions(5))])

    first = episode(env, 3)
    unseeded = env.reset()[0]
    np.testing.assert_allclose(episode(env, 3), first, atol=1e-6)
    np.testing.assert_allclose(episode(other, 3), first, atol=1e-6)
    assert not np.allclose(unseeded, first[0], atol=1e-3)
    assert not np.allclose(episode(env, 4), first, atol=1e-3)


SEEDED = """
from rllib_dreamer.envs import robosuite
for task in ("PickPlaceSingle", "NutAssemblySingle"):
    env = robosuite.make_task(task, {"observation": "proprio", "horizon": 3})
    for seed in range(4):
        print(task, env.reset(seed=seed)[0].tolist(), env._env.obj_to_use)
"""


def test_same_seed_same_object_in_every_process():
    """robosuite draws one of a set of names, whose order is another in each process."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SEEDED],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hashed},
        )
        for hashed in ("1", "2")  # for which robosuite itself draws others
    ]
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out.splitlines())
    assert printed[0] == printed[1]
    drawn = [{line.rpartition(" ")[2] for line in printed[0][i : i + 4]} for i in (0, 4)]
    assert all(len(names) > 1 for names in drawn)


def test_draws_of_other_things_are_those_of_numpy():
    def draws(rng):
        words = ["b", "a", "c"]
        return [
            rng.choice(5),
            rng.choice([3, 1, 2]),
            rng.choice(np.array([2.0, 1.0])),
            *rng.choice(words, 4, p=[0.5, 0.25, 0.25]),
            rng.standard_normal(),
            rng.integers(9),
        ]

    ours = robosuite.OrderedGenerator(np.random.PCG64(3))
    assert draws(ours) == draws(np.random.default_rng(3))


def test_hard_reset_draws_the_new_model(make):
    env = make(hard_reset=True, **SMALL)
    first, _ = env.reset(seed=1)
    model = env._renderer.model
    again, _ = env.reset(seed=1)
    assert env._renderer.model is not model
    np.testing.assert_array_equal(first, again)


def test_several_cameras_and_vector(make):
    env = make(observation="both", cameras=("agentview", "robot0_eye_in_hand"), **SMALL)
    observation, _ = env.reset(seed=0)
    assert sorted(observation) == ["agentview", "robot0_eye_in_hand", "vector"]
    assert env.observation_space.contains(observation)
    assert (
        np.abs(observation["agentview"].astype(int) - observation["robot0_eye_in_hand"]).mean() > 5
    )
    assert observation["vector"].shape == (50,)  # the robot alone; with object_state 10 more
    assert make(observation="both", object_state=True).observation_space["vector"].shape == (60,)


@pytest.mark.parametrize("robots", [{}, {"robots": ("Panda", "Sawyer"), "controller": "BASIC"}])
def test_two_arms_and_a_named_controller(make, robots):
    env = make("TwoArmLift", observation="proprio", **robots)
    env.reset(seed=0)
    observation, reward, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    assert env.observation_space.contains(observation)
    assert np.isfinite(reward)


def test_success_terminates_if_asked(make, monkeypatch):
    for asked in (False, True):
        env = make(observation="proprio", terminate_on_success=asked)
        env.reset(seed=0)
        monkeypatch.setattr(env._env, "_check_success", lambda: True)
        _, _, terminated, truncated, info = env.step(np.zeros(7, np.float32))
        assert (terminated, truncated, info["success"]) == (asked, False, True)


def test_a_success_at_any_step_of_the_repeat_counts(make, monkeypatch):
    env = make(observation="proprio", action_repeat=3)
    env.reset(seed=0)
    told = iter([False, True, False, False, False, False])
    monkeypatch.setattr(env, "_success", lambda: next(told))
    successes = [env.step(np.zeros(7, np.float32))[4]["success"] for _ in range(2)]
    assert successes == [True, False]


def test_a_task_by_its_own_name_has_the_checks_and_seeds_of_the_family():
    config = {"observation": "proprio", "seed": 3}
    with pytest.raises(ValueError, match="unknown key 'camera': did you mean 'cameras'"):
        robosuite.make_task("Lift", {"camera": "agentview"})
    with pytest.raises(ValueError, match=r"env_config\['hard_reset'\] must be True or False"):
        robosuite.make_task("Lift", {"hard_reset": "no"})
    contexts = [EnvContext(config, worker_index=index) for index in (0, 1, 1)]
    envs = [robosuite.make_task("Lift", context) for context in contexts]
    first, second, again = (env.reset()[0] for env in envs)
    family = make_env("robosuite/Lift", contexts[1])
    np.testing.assert_allclose(family.reset()[0], second, atol=1e-6)
    for env in (*envs, family):
        env.close()
    assert not np.allclose(first, second, atol=1e-3)
    np.testing.assert_allclose(second, again, atol=1e-6)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_collision_terminates_where_the_task_says_so(make, ignored):
    """Wipe ends early when the arm presses on the table; a horizon that is ignored ends nothing."""
    options = {"horizon": 10, "kwargs": {"ignore_done": True}} if ignored else {}
    env = make("Wipe", observation="proprio", **options)
    env.reset(seed=0)
    down = np.array([0, 0, -1, 0, 0, 0], np.float32)
    steps, ends = 0, (False, False)
    while not any(ends) and steps < 60:
        *_, terminated, truncated, info = env.step(down)
        steps, ends = steps + 1, (terminated, truncated)
    assert ends == (True, False) and not info["success"]
    assert 10 < steps < 60


@pytest.mark.parametrize("config", [{"size": 32}, {"observation": "proprio"}])
def test_gymnasium_conformance(make, config):
    check_env(make(**config), skip_render_check=True)


def test_no_opengl_context_before_the_first_picture(make):
    env = make(**SMALL)
    assert env._renderer is None
    assert env._env.sim._render_context_offscreen is None


def test_import_is_silent_and_keeps_mujoco_gl(capfd, monkeypatch):
    import os
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "robosuite"]:
        monkeypatch.delitem(sys.modules, name)
    chosen = os.environ["MUJOCO_GL"]
    robosuite.load_robosuite()
    assert os.environ["MUJOCO_GL"] == chosen
    captured = capfd.readouterr()
    assert "robosuite" not in captured.err + captured.out


def test_unknown_task_lists_the_nearest():
    with pytest.raises(
        ValueError, match="Unknown env 'robosuite/lift': did you mean 'robosuite/Lift'"
    ):
        robosuite.make("robosuite/lift")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"robots": "Pandda"}, r"env_config\['robots'\] must be among .*Panda.*; got 'Pandda'"),
        (
            {"controller": "OSC"},
            r"env_config\['controller'\] must be a .json file or one of .*BASIC",
        ),
        ({"cameras": "top"}, r"env_config\['cameras'\] must be among frontview.*; got 'top'"),
        ({"cameras": ()}, r"env_config\['cameras'\] must be distinct names; got \(\)"),
        ({"cameras": 5}, r"env_config\['cameras'\] must be a name or a list of names; got 5"),
        ({"robots": [5]}, r"env_config\['robots'\] must be a name or a list of names; got \[5\]"),
        ({"controller": 5}, r"env_config\['controller'\] must be None, a name or a .json file"),
        ({"kwargs": 3}, r"env_config\['kwargs'\] must be a dict; got 3"),
        ({"horizon": 0}, r"env_config\['horizon'\] must be an int >= 1; got 0"),
        ({"camera": "agentview"}, r"unknown key 'camera': did you mean 'cameras'"),
    ],
)
def test_bad_options_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        robosuite.make("robosuite/Lift", config)
