"""The DeepMind Control Suite: `dmc/<domain>-<task>`, also spelt `DMC/<domain>/<task>`.

Rewards are summed over the action repeat; an episode *terminates* only where the task says so (a
discount of 0: only the lqr tasks do) and is otherwise *truncated* at its time limit of 1000 env
steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rllib_dreamer.envs import rendering, wrappers
from rllib_dreamer.envs.action_limits import ActionLimits
from rllib_dreamer.near_names import nearest

TASKS: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": (
        "balance",
        "balance_sparse",
        "swingup",
        "swingup_sparse",
        "two_poles",
        "three_poles",
    ),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
"""Every task of `dm_control.suite`, by domain; written out so that naming them imports nothing."""

DOMAIN_ALIASES = {"cup": "ball_in_cup"}

CAMERAS = {"quadruped": 2}
"""Domains whose default camera is not 0 (source: the official code's dmc.py)."""

RENDER_MODES = ("fast", "exact", "faster")
SHADOW_SIZE = 1024
"""Side of the shadow map in "fast", half of MuJoCo's: 1.5x faster, less than 0.06 of 255 away."""

TERRAIN_TASKS = (("quadruped", "escape"),)
"""Tasks on hills. Each reset hands them to OpenGL, even if nothing is drawn; and half a shadow map
would change the picture by 0.7 of 255 there, so "fast" leaves it alone."""


@dataclass(frozen=True)
class DmcOptions:
    """The `env_config` of a `dmc/` env; see docs/environments.md for the table."""

    observation: str = "pixels"
    size: int | tuple[int, int] = 64
    camera: int | str | None = None
    action_repeat: int = 2
    time_limit: int | None = None
    render: str = "fast"
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks each value; raises a ValueError that names the key."""
        wrappers.require_choice("observation", self.observation, ("pixels", "proprio", "both"))
        wrappers.require_choice("render", self.render, RENDER_MODES)
        wrappers.require_count("action_repeat", self.action_repeat)
        wrappers.parse_size(self.size)
        if self.camera is not None:
            named = isinstance(self.camera, str | int | np.integer)
            is_flag = isinstance(self.camera, bool)
            wrappers.require(named and not is_flag, "camera", self.camera, "a number or name")
        if self.time_limit is not None:
            wrappers.require_count("time_limit", self.time_limit)


def names() -> list[str]:
    """Returns every registered spelling of every task."""
    tasks = [(domain, task) for domain, tasks in TASKS.items() for task in tasks]
    tasks += [(alias, task) for alias, domain in DOMAIN_ALIASES.items() for task in TASKS[domain]]
    return [f"dmc/{d}-{t}" for d, t in tasks] + [f"DMC/{d}/{t}" for d, t in tasks]


def parse_name(env_id: str) -> tuple[str, str]:
    """Returns (domain, task) of `dmc/<domain>-<task>` or `DMC/<domain>/<task>`.

    Raises:
        ValueError: No such task; lists the nearest names.
    """
    _, _, rest = env_id.partition("/")
    domain, _, task = rest.partition("/" if "/" in rest else "-")
    domain = DOMAIN_ALIASES.get(domain, domain)
    if task not in TASKS.get(domain, ()):
        style = [name for name in names() if name.startswith(env_id.partition("/")[0] + "/")]
        raise ValueError(f"Unknown env {env_id!r}: {nearest(env_id, style or names())}")
    return domain, task


def make(env_id: str, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds a `dmc/` env.

    Raises:
        ValueError: The name or a key or value of `env_config` is unknown.
        ImportError: dm_control is not installed.
        RuntimeError: Pixels are asked for and nothing can draw them.
    """
    domain, task = parse_name(env_id)
    return DmcEnv(domain, task, wrappers.parse_options(DmcOptions, env_config, env_id))


def _load_suite(needs_pixels: bool) -> Any:
    rendering.setup_rendering(required=needs_pixels)
    with rendering.gl_errors():
        return wrappers.import_extra("dm_control.suite", "dmc")


class DmcEnv(gym.Env):
    """A Control Suite task as a Gymnasium env.

    Observations: "pixels" a uint8 picture (h, w, 3); "proprio" the task's own observations as one
    float32 vector, in the order of its specification; "both" a Dict of `image` and `vector`.
    Actions: float32 in [-1, 1], clipped and mapped affinely to the limits of the task.

    No OpenGL context exists before the first picture, or the first reset of one of
    `TERRAIN_TASKS`, so that a vector env may fork after building one env to look at its spaces.

    Args:
        domain: A key of `TASKS`.
        task: One of its tasks.
        options: The rest.
    """

    def __init__(self, domain: str, task: str, options: DmcOptions | None = None) -> None:
        """See the class."""
        self.options = options or DmcOptions()
        self.render_mode = "rgb_array"
        self.size = wrappers.parse_size(self.options.size)
        self.camera = CAMERAS.get(domain, 0) if self.options.camera is None else self.options.camera
        self._on_terrain = (domain, task) in TERRAIN_TASKS
        suite = _load_suite(self.options.observation != "proprio")
        # The models of lqr are drawn from this stream: every runner has to get the same one.
        self._random = np.random.RandomState(self.options.seed or 0)
        task_kwargs: dict[str, Any] = {"random": self._random}
        if self.options.time_limit is not None:
            task_kwargs["time_limit"] = float("inf")  # counted here, in env steps
        self._env = suite.load(domain, task, task_kwargs=task_kwargs)
        if self.options.camera is not None:
            self._check_camera()
        self._picture_camera: Any = None
        self._has_context = False
        self._time_step: Any = None
        self._env_steps = 0
        self._pending_seed = self.options.seed
        self._prepare_rendering()
        self._set_spaces()
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": wrappers.film_fps(
                1 / self._env.control_timestep(), self.options.action_repeat
            ),
        }

    def _check_camera(self) -> None:
        """Refuses a camera that the model has not: MuJoCo itself says so at the first picture."""
        model = self._env.physics.model
        count = int(model.ncam)
        names = [model.id2name(i, "camera") for i in range(count)]
        known = self.camera in names if isinstance(self.camera, str) else self.camera < count
        listed = ", ".join(repr(name) for name in names if name)
        wrappers.require(
            known and (isinstance(self.camera, str) or self.camera >= -1),
            "camera",
            self.camera,
            f"among {listed}, 0 to {count - 1} or -1 (free)",
        )

    def _set_spaces(self) -> None:
        spec = self._env.action_spec()
        shape = spec.shape
        low, high = (np.broadcast_to(limit, shape) for limit in (spec.minimum, spec.maximum))
        self._limits = ActionLimits.between(low, high)
        self.action_space = spaces.Box(-1.0, 1.0, shape, np.float32)
        count = sum(int(np.prod(s.shape)) for s in self._env.observation_spec().values())
        parts: dict[str, gym.Space] = {
            "image": wrappers.image_space(self.size),
            "vector": spaces.Box(-np.inf, np.inf, (count,), np.float32),
        }
        single = {"pixels": "image", "proprio": "vector"}.get(self.options.observation)
        self.observation_space = spaces.Dict(parts) if single is None else parts[single]

    def _prepare_rendering(self) -> None:
        visual = self._env.physics.model.vis
        height, width = self.size
        if self.options.render == "exact":
            visual.global_.offheight = max(height, visual.global_.offheight)
            visual.global_.offwidth = max(width, visual.global_.offwidth)
            return
        visual.global_.offheight, visual.global_.offwidth = height, width
        if not self._on_terrain:
            visual.quality.shadowsize = min(SHADOW_SIZE, visual.quality.shadowsize)
        if self.options.render == "faster":
            visual.quality.offsamples = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; the same `seed` gives the same one.

        Raises:
            RuntimeError: It needs OpenGL, which does not work here.
        """
        super().reset(seed=seed)
        seed = self._pending_seed if seed is None else seed
        if seed is not None:
            self._random.seed(seed)
        elif self._time_step is None:
            self._random.seed(np.random.SeedSequence().generate_state(4))
        self._pending_seed = None
        self._env_steps = 0
        with self._context() if self._on_terrain else contextlib.nullcontext():
            self._time_step = self._env.reset()
        return self._observation(), {}

    def step(self, action: NDArray[np.floating[Any]]) -> wrappers.StepResult:
        """Applies `action` for `action_repeat` env steps, or to the end of the episode."""
        control = self._limits.control(action)
        total = 0.0
        over_time = False
        for _ in range(self.options.action_repeat):
            self._time_step = self._env.step(control)
            self._env_steps += 1
            total += float(self._time_step.reward or 0.0)
            over_time = self._env_steps == self.options.time_limit
            if self._time_step.last() or over_time:
                break
        last = self._time_step.last()
        terminated = bool(last and self._time_step.discount == 0.0)
        truncated = not terminated and bool(last or over_time)
        return self._observation(), total, terminated, truncated, {}

    def _observation(self) -> Any:
        kind = self.options.observation
        if kind == "pixels":
            return self.render()
        parts = [np.ravel(value) for value in self._time_step.observation.values()]
        vector = np.concatenate(parts).astype(np.float32)
        return vector if kind == "proprio" else {"image": self.render(), "vector": vector}

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        """Returns the current picture, uint8 (h, w, 3)."""
        height, width = self.size
        with self._context():
            if self.options.render == "exact":
                picture = self._env.physics.render(height, width, camera_id=self.camera)
            else:
                picture = self._camera().render()
        return np.array(picture, order="C")  # the camera draws into the same buffer each time

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """What uses the OpenGL context of the env, and makes it if there is none, goes in here."""
        stale = rendering.note_rendering("dm_control")
        with rendering.gl_errors():
            if stale and self._has_context:
                self._env.physics.contexts.gl._platform_make_current()
            yield
        self._has_context = True

    def _camera(self) -> Any:
        if self._picture_camera is None:
            engine = wrappers.import_extra("dm_control.mujoco.engine", "dmc")
            height, width = self.size
            self._picture_camera = engine.Camera(self._env.physics, height, width, self.camera)
        return self._picture_camera

    def close(self) -> None:
        """Frees the simulation and its OpenGL context."""
        self._picture_camera = None
        if self._env is not None:
            if self._has_context and rendering.note_rendering("dm_control"):
                self._env.physics.contexts.gl._platform_make_current()
            self._env.physics.free()
            self._env = None
