"""The Control Suite env against dm_control itself."""

from __future__ import annotations

import numpy as np
import pytest
from absl.testing import absltest
from dm_env import test_utils
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from rllib_dreamer.envs import dmc, make_env, rendering

rendering.setup_rendering()


def dm_control_env(domain, task, seed):
    from dm_control import suite

    return suite.load(domain, task, task_kwargs={"random": seed})


def rescale(action, spec):
    low, high = np.asarray(spec.minimum, np.float64), np.asarray(spec.maximum, np.float64)
    # Another order of operations rounds otherwise, and contacts amplify the last digit.
    return (low + high) / 2 + (high - low) / 2 * np.asarray(action, np.float64)


def vector_of(time_step):
    parts = [np.ravel(value) for value in time_step.observation.values()]
    return np.concatenate(parts).astype(np.float32)


def test_task_list_is_that_of_the_suite():
    from dm_control import suite

    ours = sorted((domain, task) for domain, tasks in dmc.TASKS.items() for task in tasks)
    assert ours == sorted(suite.ALL_TASKS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmc/walker-walk", ("walker", "walk")),
        ("DMC/walker/walk", ("walker", "walk")),
        ("DMC/cup/catch", ("ball_in_cup", "catch")),
        ("dmc/ball_in_cup-catch", ("ball_in_cup", "catch")),
        ("dmc/lqr-lqr_2_1", ("lqr", "lqr_2_1")),
    ],
)
def test_both_spellings(name, expected):
    assert dmc.parse_name(name) == expected
    assert name in dmc.names()


@pytest.mark.parametrize("name", ["dmc/walker-wlak", "DMC/walker/wlak"])
def test_unknown_task_lists_the_nearest_in_the_same_spelling(name):
    nearest = name.replace("wlak", "walk")
    with pytest.raises(ValueError, match=f"Unknown env '{name}': did you mean .*'{nearest}'"):
        dmc.make(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"observation": "pixel"},
            r"env_config\['observation'\] must be one of 'pixels', .*'pixel'\.",
        ),
        ({"render": "slow"}, r"env_config\['render'\] must be one of 'fast', 'exact', 'faster'"),
        ({"action_repeat": 0}, r"env_config\['action_repeat'\] must be an int >= 1; got 0"),
        ({"size": (64, 64, 3)}, r"env_config\['size'\] must be an int or \(height, width\)"),
        ({"time_limit": 0.5}, r"env_config\['time_limit'\] must be an int >= 1; got 0.5"),
        ({"camera": True}, r"env_config\['camera'\] must be a number or name; got True"),
        ({"camera": 1.0}, r"env_config\['camera'\] must be a number or name; got 1\.0"),
        ({"camera": "nope"}, r"env_config\['camera'\] must be among 'side', 'back', 0 to 1 or -1 "),
        ({"camera": 9}, r"env_config\['camera'\] must be among 'side', .* got 9"),
        ({"camera": "", "observation": "proprio"}, r"env_config\['camera'\] must be among 'side'"),
        ({"camra": 1}, r"unknown key 'camra': did you mean 'camera'\?"),
    ],
)
def test_bad_options_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        dmc.make("dmc/walker-walk", config)


@pytest.mark.parametrize("observation", ["pixels", "proprio", "both"])
def test_gymnasium_conformance(observation):
    env = dmc.make("dmc/cartpole-balance", {"observation": observation, "size": 32})
    check_env(env, skip_render_check=True)
    env.close()


@pytest.mark.parametrize(
    ("domain", "task", "repeat"),
    [("walker", "walk", 2), ("quadruped", "walk", 2), ("hopper", "hop", 3)],
)
def test_whole_episode_equals_dm_control(domain, task, repeat):
    """Every reward is the sum over the repeat, and the 1000th env step truncates."""
    env = dmc.make(f"dmc/{domain}-{task}", {"observation": "proprio", "action_repeat": repeat})
    reference = dm_control_env(domain, task, seed=3)
    observation, _ = env.reset(seed=3)
    time_step = reference.reset()
    np.testing.assert_array_equal(observation, vector_of(time_step))
    rng, steps = np.random.default_rng(0), 0
    while True:
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        expected = 0.0
        for _ in range(repeat):
            time_step = reference.step(rescale(action, reference.action_spec()))
            expected += time_step.reward
            if time_step.last():
                break
        steps += 1
        assert reward == pytest.approx(expected, abs=1e-12)
        np.testing.assert_array_equal(observation, vector_of(time_step))
        assert truncated == time_step.last()
        assert not terminated
        if truncated:
            break
    assert steps == -(-1000 // repeat)
    env.close()


@pytest.mark.parametrize(
    ("domain", "task", "camera", "steps"),
    [("walker", "walk", 0, 50), ("quadruped", "run", 2, 20)],
)
def test_exact_frames_equal_dm_control(domain, task, camera, steps):
    env = dmc.make(f"dmc/{domain}-{task}", {"render": "exact", "observation": "both"})
    reference = dm_control_env(domain, task, seed=5)
    observation, _ = env.reset(seed=5)
    reference.reset()
    rng = np.random.default_rng(1)
    for _ in range(steps):
        frame = reference.physics.render(64, 64, camera_id=camera)
        np.testing.assert_array_equal(observation["image"], frame)
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, *_ = env.step(action)
        for _ in range(2):
            reference.step(rescale(action, reference.action_spec()))
    env.close()
    reference.physics.free()


@pytest.mark.parametrize(
    "name",
    [
        "dmc/walker-walk",
        "dmc/cheetah-run",
        "dmc/quadruped-run",
        "dmc/quadruped-escape",
        "dmc/cartpole-swingup",
    ],
)
def test_fast_frames_are_close_to_exact_ones(name):
    """The default rendering changes the picture by less than 0.1 of 255 on average."""
    fast, exact = (dmc.make(name, {"render": mode}) for mode in ("fast", "exact"))
    frames = [env.reset(seed=2)[0] for env in (fast, exact)]
    rng, differences = np.random.default_rng(2), []
    for _ in range(10):
        differences.append(np.abs(frames[0].astype(int) - frames[1]).mean())
        action = rng.uniform(-1, 1, fast.action_space.shape).astype(np.float32)
        frames = [env.step(action)[0] for env in (fast, exact)]
    assert np.mean(differences) < 0.1
    fast.close()
    exact.close()


def test_frames_are_not_shared_between_steps():
    env = dmc.make("dmc/cheetah-run", {"size": 32})
    first, _ = env.reset(seed=0)
    kept = first.copy()
    for _ in range(3):
        env.step(np.ones(env.action_space.shape, np.float32))
    np.testing.assert_array_equal(first, kept)
    env.close()


@pytest.mark.parametrize("size", [32, (64, 96), (720, 720)])
@pytest.mark.parametrize("render", ["fast", "exact"])
def test_frames_have_the_size_asked_for(size, render):
    env = dmc.make("dmc/pendulum-swingup", {"size": size, "render": render})
    observation, _ = env.reset(seed=0)
    expected = (size, size, 3) if isinstance(size, int) else (*size, 3)
    assert observation.shape == env.observation_space.shape == expected
    assert observation.std() > 1
    env.close()


def test_same_seed_same_episode_and_no_seed_another():
    env = dmc.make("dmc/reacher-easy", {"observation": "proprio"})
    first, _ = env.reset(seed=7)
    following, _ = env.reset()
    again, _ = env.reset(seed=7)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, following)
    other = dmc.make("dmc/reacher-easy", {"observation": "proprio", "seed": 7})
    np.testing.assert_array_equal(other.reset()[0], first)
    unseeded = [dmc.make("dmc/reacher-easy", {"observation": "proprio"}) for _ in range(2)]
    assert not np.array_equal(unseeded[0].reset()[0], unseeded[1].reset()[0])


def test_lqr_has_one_model_in_every_runner_and_terminates():
    """lqr draws its dynamics at construction and is the one domain that ends by itself."""
    one, two = (dmc.make("dmc/lqr-lqr_2_1", {"observation": "proprio"}) for _ in range(2))
    stiffness = [env._env.physics.model.jnt_stiffness.copy() for env in (one, two)]
    np.testing.assert_array_equal(*stiffness)
    assert one.action_space == spaces.Box(-1.0, 1.0, (1,), np.float32)
    control = one._limits.control(np.array([0.25]))
    assert control == pytest.approx([0.25])  # its limits of 1e10 mean none: passed on unscaled
    one.reset(seed=0)
    one._time_step = one._env.step(np.zeros(1))
    physics = one._env.physics
    with physics.reset_context():
        physics.data.qpos[:] = 0
        physics.data.qvel[:] = 0
    _, _, terminated, truncated, _ = one.step(np.zeros(1, np.float32))
    assert terminated
    assert not truncated


def test_time_limit_counts_env_steps_and_truncates_inside_a_repeat():
    env = dmc.make("dmc/cartpole-balance", {"observation": "proprio", "time_limit": 5})
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert env._env_steps == 5


def test_actions_are_clipped_and_mapped_to_the_limits():
    env = dmc.make("dmc/quadruped-walk", {"observation": "proprio"})
    spec = env._env.action_spec()
    for value, limit in ((1.5, spec.maximum), (-1.5, spec.minimum)):
        env.reset(seed=0)
        env.step(np.full(env.action_space.shape, value, np.float32))
        np.testing.assert_allclose(env._env.physics.control(), limit)


class TestDmEnvUnderneath(test_utils.EnvironmentTestMixin, absltest.TestCase):
    """The dm_env which ours drives, with its rendering settings, keeps dm_env's contract."""

    def make_object_under_test(self):
        return dmc.make("dmc/cartpole-balance", {"render": "fast", "time_limit": 10})._env

    def make_action_sequence(self):
        yield from [np.zeros(1)] * 25


def test_no_opengl_context_before_the_first_picture():
    env = dmc.make("dmc/walker-walk")
    assert env._env.physics._contexts is None
    env.close()


def test_a_reset_that_needs_opengl_is_guarded_as_drawing_is(monkeypatch):
    """Escape hands its hills to OpenGL in each reset, also where nothing is drawn."""
    escape, walker = (
        dmc.make(f"dmc/{task}", {"observation": "proprio"})
        for task in ("quadruped-escape", "walker-walk")
    )

    def without_driver():
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    for env in (escape, walker):
        monkeypatch.setattr(env._env.physics, "_make_rendering_contexts", without_driver)
    with pytest.raises(RuntimeError, match=r"OpenGL backend .* does not work here .*install"):
        escape.reset(seed=0)
    monkeypatch.setitem(rendering._state, "forked_after_render", True)
    with pytest.raises(RuntimeError, match="forked from one that had already rendered"):
        escape.reset(seed=0)
    walker.reset(seed=0)


def test_a_reset_makes_its_context_current_after_another_library_drew(monkeypatch):
    env = dmc.make("dmc/quadruped-escape", {"observation": "proprio"})
    env.reset(seed=0)
    current = []
    context = env._env.physics.contexts.gl
    monkeypatch.setattr(context, "_platform_make_current", lambda: current.append(True))
    env.reset(seed=1)
    rendering.note_rendering("mujoco")
    env.reset(seed=2)
    assert current == [True]
    env.close()


def test_checked_env_keeps_the_name_in_errors():
    env = make_env("dmc/walker-walk", {"observation": "proprio"})
    env.reset(seed=0)
    with pytest.raises(
        RuntimeError, match=r"Env 'dmc/walker-walk' raised in step.. at agent step 1"
    ):
        env.step(np.zeros(99, np.float32))


@pytest.mark.parametrize("camera", [0, -1, "back", np.int64(1)])
def test_cameras_by_number_and_by_name(camera):
    env = dmc.make("dmc/walker-walk", {"camera": camera, "size": 32})
    env.reset(seed=0)
    assert env.render().std() > 0
    env.close()
