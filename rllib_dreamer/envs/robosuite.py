"""robosuite tasks: `robosuite/<Task>`, for example `robosuite/Lift`.

A wrapper of its own over `robosuite.make`, because the one in robosuite ends every episode as
terminated, ignores `reset(seed=...)`, and hands out pictures upside down. Here the horizon
truncates, any other end terminates, seeds work, pictures are the right way up, and each agent step
draws once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rllib_dreamer.envs import rendering, wrappers
from rllib_dreamer.envs.action_limits import ActionLimits
from rllib_dreamer.envs.robosuite_scene import RENDER_MODES, SceneRenderer
from rllib_dreamer.envs.success import last_info
from rllib_dreamer.near_names import nearest

TASKS = (
    "Door",
    "Lift",
    "NutAssembly",
    "NutAssemblyRound",
    "NutAssemblySingle",
    "NutAssemblySquare",
    "PickPlace",
    "PickPlaceBread",
    "PickPlaceCan",
    "PickPlaceCereal",
    "PickPlaceMilk",
    "PickPlaceSingle",
    "Stack",
    "ToolHang",
    "TwoArmHandover",
    "TwoArmLift",
    "TwoArmPegInHole",
    "TwoArmTransport",
    "Wipe",
)
"""Every task of robosuite 1.5; written out so that naming them imports nothing."""


@dataclass(frozen=True)
class RobosuiteOptions:
    """The `env_config` of a `robosuite/` env; see docs/environments.md for the table."""

    robots: str | tuple[str, ...] | None = None
    controller: str | None = None
    observation: str = "pixels"
    cameras: str | tuple[str, ...] = "agentview"
    object_state: bool | None = None
    size: int | tuple[int, int] = 64
    action_repeat: int = 1
    horizon: int = 500
    control_freq: int = 20
    reward_shaping: bool = True
    terminate_on_success: bool = False
    hard_reset: bool = False
    render: str = "fast"
    seed: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks each value; raises a ValueError that names the key."""
        wrappers.require_choice("observation", self.observation, ("pixels", "proprio", "both"))
        wrappers.require_choice("render", self.render, RENDER_MODES)
        for name in ("action_repeat", "horizon", "control_freq"):
            wrappers.require_count(name, getattr(self, name))
        wrappers.parse_size(self.size)
        wrappers.require(
            self.object_state is None or isinstance(self.object_state, bool),
            "object_state",
            self.object_state,
            "True, False or None",
        )
        for name in ("robots", "cameras"):
            given = getattr(self, name)
            found = given if isinstance(given, (list, tuple)) else [given]
            known = all(isinstance(x, str) for x in found) or (name, given) == ("robots", None)
            wrappers.require(known, name, given, "a name or a list of names")
        cameras = self.camera_names
        wrappers.require(
            len(set(cameras)) == len(cameras) > 0, "cameras", cameras, "distinct names"
        )
        wrappers.require(
            self.controller is None or isinstance(self.controller, str),
            "controller",
            self.controller,
            "None, a name or a .json file",
        )
        wrappers.require(isinstance(self.kwargs, Mapping), "kwargs", self.kwargs, "a dict")

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The cameras as a tuple."""
        return (self.cameras,) if isinstance(self.cameras, str) else tuple(self.cameras)

    @property
    def with_objects(self) -> bool:
        """Whether the vector holds the state of the objects: by default only without pixels."""
        return self.observation == "proprio" if self.object_state is None else self.object_state


def names() -> list[str]:
    """Returns every registered name."""
    return [f"robosuite/{task}" for task in TASKS]


def parse_name(env_id: str) -> str:
    """Returns the task of `robosuite/<Task>`.

    Raises:
        ValueError: No such task; lists the nearest names.
    """
    task = env_id.partition("/")[2]
    if task not in TASKS:
        raise ValueError(f"Unknown env {env_id!r}: {nearest(env_id, names())}")
    return task


def make(env_id: str, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds a `robosuite/` env.

    Raises:
        ValueError: The name or a key or value of `env_config` is unknown.
        ImportError: robosuite is not installed.
        RuntimeError: Pixels are asked for and nothing can draw them.
    """
    return make_task(parse_name(env_id), env_config)


def make_task(task: str, env_config: Mapping[str, Any] | None = None) -> RobosuiteEnv:
    """Builds the env of any task that robosuite knows, one of your own too.

    Args:
        task: Its name in robosuite.
        env_config: As of the names `robosuite/`. The worker index of a RLlib `EnvContext` shifts
            the seed of the first episode, so that runners differ.

    Raises:
        ValueError: A key or value of `env_config` is unknown.
        ImportError: robosuite is not installed.
        RuntimeError: Pixels are asked for and nothing can draw them.
    """
    options = wrappers.parse_options(RobosuiteOptions, env_config, f"robosuite/{task}")
    return RobosuiteEnv(task, options, wrappers.first_seed(env_config or {}))


def load_robosuite(needs_pixels: bool = True) -> Any:
    """Imports robosuite without its notices and without its change of `MUJOCO_GL`."""
    rendering.setup_rendering(required=needs_pixels)
    chosen = os.environ.get(rendering.MUJOCO_GL)
    logging.disable(logging.WARNING)
    try:
        with rendering.gl_errors():
            module = wrappers.import_extra("robosuite", "robosuite")
    finally:
        logging.disable(logging.NOTSET)
        if chosen is not None:
            os.environ[rendering.MUJOCO_GL] = chosen
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    return module


class OrderedGenerator(np.random.Generator):
    """A generator whose choice among names does not depend on their order.

    robosuite draws the object of some tasks from `list({names})`, which Python orders otherwise in
    each process, so that equal seeds would give other episodes.
    """

    def choice(self, a: Any, *args: Any, **kwargs: Any) -> Any:
        """As of the base class, for a list of names alone that of the sorted ones."""
        if isinstance(a, list) and not args and not kwargs and all(isinstance(x, str) for x in a):
            a = sorted(a)
        return super().choice(a, *args, **kwargs)


class RobosuiteEnv(gym.Env):
    """A robosuite task as a Gymnasium env.

    Observations: "pixels" one uint8 picture (h, w, 3), or with several cameras a Dict of them by
    name; "proprio" a float32 vector of the robots' joints and grippers (and of the objects, unless
    `object_state` is False); "both" a Dict with `vector` beside `image` or the cameras' names.
    Actions: float32 in [-1, 1], clipped and mapped affinely to the limits of the controller.

    Args:
        task: One of `TASKS`, or a task of your own.
        options: The rest. Their seed is that of what is drawn at construction.
        first_seed: Of the first episode, if its reset is given none; by default that too.
    """

    def __init__(
        self,
        task: str,
        options: RobosuiteOptions | None = None,
        first_seed: int | None = None,
    ) -> None:
        """See the class."""
        self.options = options or RobosuiteOptions()
        self.render_mode = "rgb_array"
        self.size = wrappers.parse_size(self.options.size)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": wrappers.film_fps(self.options.control_freq, self.options.action_repeat),
        }
        self._env = _make(task, self.options)
        self._env.rng = OrderedGenerator(self._env.rng.bit_generator)
        self._vector_keys = self._select_vector_keys()
        self._renderer: SceneRenderer | None = None
        self._state: Mapping[str, Any] = {}
        self._started = False
        self._pending_seed = self.options.seed if first_seed is None else first_seed
        self._check_cameras()
        self._set_spaces()

    def _check_cameras(self) -> None:
        known = self._env.sim.model.camera_names
        for camera in self.options.camera_names:
            wrappers.require(camera in known, "cameras", camera, f"among {', '.join(known)}")

    def _select_vector_keys(self) -> list[str]:
        keys = [f"robot{i}_proprio-state" for i in range(len(self._env.robots))]
        return [*keys, "object-state"] if self.options.with_objects else keys

    def _set_spaces(self) -> None:
        self._limits = ActionLimits.between(*self._env.action_spec)
        self.action_space = spaces.Box(-1.0, 1.0, self._limits.scale.shape, np.float32)
        specification = self._env.observation_spec()
        count = sum(np.size(specification[key]) for key in self._vector_keys)
        vector = spaces.Box(-np.inf, np.inf, (count,), np.float32)
        if self.options.observation == "proprio":
            self.observation_space = vector
            return
        cameras = self.options.camera_names
        names = ("image",) if len(cameras) == 1 else cameras
        parts: dict[str, gym.Space] = {name: wrappers.image_space(self.size) for name in names}
        if self.options.observation == "both":
            parts["vector"] = vector
        self.observation_space = spaces.Dict(parts) if len(parts) > 1 else parts["image"]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; the same `seed` gives the same one."""
        super().reset(seed=seed)
        seed = self._pending_seed if seed is None else seed
        self._pending_seed = None
        if seed is not None or not self._started:
            # In place: the samplers of object positions draw from the same bits.
            self._env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._started = True
        self._state = self._env.reset()
        return self._observation(), {"success": self._success()}

    def step(self, action: NDArray[np.floating[Any]]) -> wrappers.StepResult:
        """Applies `action` for `action_repeat` control steps, or to the end of the episode."""
        control = self._limits.control(action)
        total, infos = 0.0, []
        for _ in range(self.options.action_repeat):
            self._state, reward, over, _ = self._env.step(control)
            total += float(reward)
            success = self._success()
            infos.append({"success": success})
            early = bool(over) and not self._env.done  # `done` is set by the horizon alone
            terminated = early or (success and self.options.terminate_on_success)
            if over or terminated:
                break
        truncated = bool(over) and not terminated
        return self._observation(), total, terminated, truncated, last_info(infos)

    def _success(self) -> bool:
        return bool(self._env._check_success())

    def _observation(self) -> Any:
        parts: dict[str, Any] = {}
        if self.options.observation != "proprio":
            cameras = self.options.camera_names
            names = ("image",) if len(cameras) == 1 else cameras
            parts = {name: self._draw(cam) for name, cam in zip(names, cameras, strict=True)}
        if self.options.observation != "pixels":
            values = [np.ravel(self._state[key]) for key in self._vector_keys]
            parts["vector"] = np.concatenate(values).astype(np.float32)
        return (
            parts if isinstance(self.observation_space, spaces.Dict) else next(iter(parts.values()))
        )

    def _draw(self, camera: str) -> NDArray[np.uint8]:
        sim = self._env.sim
        with rendering.gl_errors():
            if self._renderer is None or self._renderer.model is not sim.model._model:
                self._close_renderer()  # a hard reset has built another model
                self._renderer = SceneRenderer(sim.model._model, self.size, self.options.render)
            return self._renderer.draw(sim.data._data, camera)

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        """Returns the picture of the first camera, uint8 (h, w, 3)."""
        return self._draw(self.options.camera_names[0])

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def close(self) -> None:
        """Frees the simulation and its OpenGL context."""
        self._close_renderer()
        if self._env is not None:
            self._env.close()
            self._env = None


def _make(task: str, options: RobosuiteOptions) -> Any:
    robosuite = load_robosuite(options.observation != "proprio")
    given = options.robots or ("Panda",) * (2 if task.startswith("TwoArm") else 1)
    robots = [given] if isinstance(given, str) else list(given)
    controller = None
    if options.controller is not None:
        known = tuple(robosuite.ALL_COMPOSITE_CONTROLLERS)
        is_file = options.controller.endswith(".json")
        wrappers.require(
            is_file or options.controller in known,
            "controller",
            options.controller,
            f"a .json file or one of {', '.join(known)}",
        )
        controller = robosuite.load_composite_controller_config(controller=options.controller)
    for robot in robots:
        wrappers.require(
            robot in robosuite.ALL_ROBOTS,
            "robots",
            robot,
            f"among {', '.join(robosuite.ALL_ROBOTS)}",
        )
    ours = {
        "robots": robots,
        "controller_configs": controller,
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": options.with_objects,
        "reward_shaping": options.reward_shaping,
        "control_freq": options.control_freq,
        "horizon": options.horizon,
        "hard_reset": options.hard_reset,
        "seed": options.seed or 0,  # shapes drawn at construction are the same in every runner
    }
    twice = sorted(ours.keys() & options.kwargs.keys())
    wrappers.require(not twice, "kwargs", twice, "arguments that no other key of env_config sets")
    return robosuite.make(task, **ours, **options.kwargs)
