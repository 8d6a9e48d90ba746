"""Pictures of a robosuite scene, drawn by MuJoCo's own renderer."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllib_dreamer.envs import rendering, wrappers

RENDER_MODES = ("fast", "exact", "faster")
HIDDEN_GROUP = 5
"""A MuJoCo geom group that is never drawn."""

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
