"""robosuite tasks: `robosuite/<Task>`, for example `robosuite/Lift`.

A wrapper of its own over `robosuite.make`, because the one in robosuite ends every episode as
terminated, ignores `reset(seed=...)`, and hands out pictures upside down. Here the horizon
truncates, any other end terminates, seeds work, pictures are the right way up, and each agent step
draws once.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rllib_dreamer.envs import rendering, wrappers

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

RENDER_MODES = ("fast", "exact", "faster")
HIDDEN_GROUP = 5
"""A MuJoCo geom group that is never drawn."""


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

    family: ClassVar[str] = "robosuite"

    def __post_init__(self) -> None:
        """Checks each value; raises a ValueError that names the key."""
        wrappers.require_choice("observation", self.observation, ("pixels", "proprio", "both"))
        wrappers.require_choice("render", self.render, RENDER_MODES)
        for name in ("action_repeat", "horizon", "control_freq"):
            wrappers.require_count(name, getattr(self, name))
        wrappers.parse_size(self.size)
        cameras = self.camera_names
        wrappers.require(
            len(set(cameras)) == len(cameras) > 0, "cameras", cameras, "distinct names"
        )

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
        raise ValueError(f"Unknown env {env_id!r}: {wrappers.nearest(env_id, names())}")
    return task


def make(env_id: str, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds a `robosuite/` env.

    Raises:
        ValueError: The name or a key or value of `env_config` is unknown.
        ImportError: robosuite is not installed.
        RuntimeError: Pixels are asked for and nothing can draw them.
    """
    task = parse_name(env_id)
    return RobosuiteEnv(task, wrappers.parse_options(RobosuiteOptions, env_config, env_id))


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


class RobosuiteEnv(gym.Env):
    """A robosuite task as a Gymnasium env.

    Observations: "pixels" one uint8 picture (h, w, 3), or with several cameras a Dict of them by
    name; "proprio" a float32 vector of the robots' joints and grippers (and of the objects, unless
    `object_state` is False); "both" a Dict with `vector` beside `image` or the cameras' names.
    Actions: float32 in [-1, 1], clipped and mapped affinely to the limits of the controller.

    Args:
        task: One of `TASKS`.
        options: The rest.
    """

    def __init__(self, task: str, options: RobosuiteOptions | None = None) -> None:
        """See the class."""
        self.options = options or RobosuiteOptions()
        self.render_mode = "rgb_array"
        self.size = wrappers.parse_size(self.options.size)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": max(1, self.options.control_freq // self.options.action_repeat),
        }
        self._env = _make(task, self.options)
        self._vector_keys = self._select_vector_keys()
        self._renderer: SceneRenderer | None = None
        self._state: Mapping[str, Any] = {}
        self._started = False
        self._pending_seed = self.options.seed
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
        low, high = (np.asarray(limit, np.float64) for limit in self._env.action_spec)
        self._action_center, self._action_scale = (low + high) / 2, (high - low) / 2
        self.action_space = spaces.Box(-1.0, 1.0, low.shape, np.float32)
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
            # In place: the samplers of object positions hold this very generator.
            self._env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._started = True
        self._state = self._env.reset()
        return self._observation(), {"success": self._success()}

    def step(self, action: NDArray[np.floating[Any]]) -> wrappers.StepResult:
        """Applies `action` for `action_repeat` control steps, or to the end of the episode."""
        clipped = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        control = self._action_center + self._action_scale * clipped
        total = 0.0
        for _ in range(self.options.action_repeat):
            self._state, reward, over, _ = self._env.step(control)
            total += float(reward)
            success = self._success()
            early = bool(over) and not self._env.done  # `done` is set by the horizon alone
            terminated = early or (success and self.options.terminate_on_success)
            if over or terminated:
                break
        truncated = bool(over) and not terminated
        return self._observation(), total, terminated, truncated, {"success": success}

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


_open: weakref.WeakSet[SceneRenderer] = weakref.WeakSet()


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()


class SceneRenderer:
    """Draws a robosuite scene with MuJoCo's own renderer.

    "exact" gives robosuite's picture. "fast" leaves out bodies whose bounding sphere is outside the
    view of the camera; in the picture only their reflections can be missed (0 to 0.02 of 255 on
    average). "faster" also turns off reflections and antialiasing (about 2.3 of 255).

    The OpenGL context is made current before each drawing and before it is freed: with robosuite's
    own, several envs in one process draw into and free one another's.

    Args:
        model: A `mujoco.MjModel`.
        size: (height, width) in pixels.
        mode: One of `RENDER_MODES`.
    """

    def __init__(self, model: Any, size: tuple[int, int], mode: str) -> None:
        """See the class."""
        mujoco = wrappers.import_extra("mujoco", "robosuite")
        rendering.note_rendering("mujoco")
        self.model = model
        self.size = size
        self._cull = mode != "exact"
        height, width = size
        visual = model.vis
        visual.global_.offheight = max(height, visual.global_.offheight)
        visual.global_.offwidth = max(width, visual.global_.offwidth)
        if mode == "faster":
            visual.quality.offsamples = 0
        self._renderer = mujoco.Renderer(model, height, width)
        if not _open:
            atexit.unregister(_close_all)
            atexit.register(_close_all)  # now: has to run before MuJoCo's own handler
        _open.add(self)
        if mode == "faster":
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # collision shapes
        self._option.geomgroup[HIDDEN_GROUP] = 0
        self._is_plane = np.asarray(model.geom_type) == int(mujoco.mjtGeom.mjGEOM_PLANE)

    def draw(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """Returns the picture of `camera`, uint8 (h, w, 3)."""
        rendering.note_rendering("mujoco")
        groups = self.model.geom_group.copy()
        if self._cull:
            hidden = ~self._is_plane & outside_view(self.model, data, camera, self.size)
            self.model.geom_group[hidden] = HIDDEN_GROUP
        self._renderer.update_scene(data, camera, self._option)
        self.model.geom_group[:] = groups
        picture: NDArray[np.uint8] = self._renderer.render()
        return picture

    def close(self) -> None:
        """Frees the OpenGL context."""
        _open.discard(self)
        rendering.note_rendering("mujoco")
        self._renderer.render()  # freeing works on the current context: makes it this one
        self._renderer.close()


def outside_view(model: Any, data: Any, camera: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Tells which geoms a camera cannot see, by their bounding spheres.

    In the frame of the camera, which looks along -z, a point is in view if |y| <= -z tan(f/2) with
    f the vertical field of view, and likewise for x. A sphere of radius r is outside if its centre
    is further than r beyond one of these planes.

    Args:
        model: A `mujoco.MjModel`.
        data: Its `mujoco.MjData`.
        camera: A camera of the model.
        size: (height, width) in pixels.

    Returns:
        bool (geoms,); all False for cameras that are not plain perspective ones.
    """
    index = model.camera(camera).id
    if model.cam_projection[index] or np.any(model.cam_sensorsize[index]):
        return np.zeros(model.ngeom, bool)
    height, width = size
    rotation = data.cam_xmat[index].reshape(3, 3)
    points = (data.geom_xpos - data.cam_xpos[index]) @ rotation  # (geoms, 3)
    depth, radius = -points[:, 2], model.geom_rbound
    vertical = np.deg2rad(model.cam_fovy[index]) / 2
    horizontal = np.arctan(np.tan(vertical) * width / height)
    outside: NDArray[np.bool_] = depth + radius < 0
    for axis, angle in ((0, horizontal), (1, vertical)):
        distance = np.abs(points[:, axis]) * np.cos(angle) - depth * np.sin(angle)
        outside = outside | (distance > radius)
    return outside
