"""Headless OpenGL: the backend MuJoCo renders with, chosen before its first import.

`mujoco`, `dm_control` and `robosuite` read `MUJOCO_GL` once, while they are imported, and what they
pick without it (GLFW) needs a display. Every env of this package therefore calls
`setup_rendering()` in its own process before it imports any of them. A value set by the user always
wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

MUJOCO_GL = "MUJOCO_GL"
OURS = "RLLIB_DREAMER_GL_DISABLED"
"""Variable that says, to child processes too, that no user but this package set MUJOCO_GL=disable:
for want of a library, where nothing had to be drawn."""

LIBRARIES = {"egl": ("EGL", "libEGL.so.1"), "osmesa": ("OSMesa", "libOSMesa.so.8")}
"""Backends tried on Linux, in this order, as (name for the linker, usual file name)."""

ALIASES = {
    "egl": "egl",
    "osmesa": "osmesa",
    "glfw": "glfw",
    "glx": "glfw",
    "on": "glfw",
    "enable": "glfw",
    "enabled": "glfw",
    "true": "glfw",
    "1": "glfw",
    "off": "disable",
    "disable": "disable",
    "disabled": "disable",
    "false": "disable",
    "0": "disable",
}

INSTALL_HINT = (
    "install Mesa's EGL with `apt-get install --no-install-recommends libegl1 libgl1 "
    "libgl1-mesa-dri libegl-mesa0 libglib2.0-0` (or `libosmesa6`), or set MUJOCO_GL to a backend "
    "that works on this machine"
)

_state: dict[str, Any] = {"rendered": False, "forked_after_render": False, "owner": None}


def _after_fork_in_child() -> None:
    _state["forked_after_render"] = _state["rendered"]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def library_found(backend: str) -> bool:
    """True if the shared library behind `backend` ("egl" or "osmesa") can be loaded."""
    linker_name, file_name = LIBRARIES[backend]
    for name in (file_name, ctypes.util.find_library(linker_name)):
        try:
            if name is not None:
                ctypes.CDLL(name)
                return True
        except OSError:
            continue
    return False


def requested_backend() -> str | None:
    """Returns the `MUJOCO_GL` of this process, or None where nobody chose: unset, empty or `OURS`.

    Env creators carry it to Ray actors, so that a choice made in the driver holds on every node.
    """
    value = os.environ.get(MUJOCO_GL) or None
    return None if value == "disable" and os.environ.get(OURS) else value


def setup_rendering(backend: str | None = None, *, required: bool = True) -> str:
    """Chooses the OpenGL backend of this process and stores it in `MUJOCO_GL`.

    Best run before `mujoco`, `dm_control` or `robosuite` is imported; bindings that were imported
    with another backend are loaded again. Creates no OpenGL context.

    Args:
        backend: What to use if `MUJOCO_GL` is not set here (the driver's choice, in a Ray actor).
            By default EGL where its library is found, else OSMesa.
        required: If False (nothing will be drawn), a machine without any OpenGL library gets
            `MUJOCO_GL=disable` and no error. A later call that has to draw decides again.

    Returns:
        The value of `MUJOCO_GL`; "" on systems other than Linux that leave the choice to MuJoCo.

    Raises:
        ValueError: `MUJOCO_GL` is not a backend.
        RuntimeError: No OpenGL library is found, or the one asked for is not there.
    """
    chosen = requested_backend() or backend
    if chosen is None and sys.platform != "linux":
        return ""
    if chosen is None:
        chosen = next((name for name in LIBRARIES if library_found(name)), None)
    elif chosen.lower() not in ALIASES:
        raise ValueError(
            f"MUJOCO_GL={chosen!r} is not an OpenGL backend; set it to 'egl', 'osmesa', 'glfw' or "
            "'disable', or leave it unset to have one chosen."
        )
    if chosen is None and not required:
        chosen = os.environ[OURS] = "disable"
    if chosen is None:
        raise RuntimeError(f"No OpenGL library (EGL or OSMesa) found: {INSTALL_HINT}.")
    name = ALIASES[chosen.lower()]
    if required and name in LIBRARIES and sys.platform == "linux" and not library_found(name):
        raise RuntimeError(f"MUJOCO_GL={chosen} but its library is not found: {INSTALL_HINT}.")
    if required and name == "disable":
        raise RuntimeError(
            f"MUJOCO_GL={chosen} turns rendering off, but this env has to draw: unset MUJOCO_GL, "
            "or take observations without pixels (env_config={'observation': 'proprio'}; for a "
            "Gymnasium id 'state')."
        )
    os.environ[MUJOCO_GL] = chosen
    if name in LIBRARIES:
        _reload_bindings(name)
    return chosen


def _reload_bindings(backend: str) -> None:
    """Lets libraries that were imported with another backend choose again.

    `import ray.rllib` imports dm_control, so that a script may have fixed the backend long before
    it builds an env. Both modules hold nothing but that choice until something is drawn.
    """
    bindings = {
        "dm_control._render": lambda module: module.BACKEND,
        "mujoco.rendering.classic.gl_context": lambda module: module._MUJOCO_GL,
    }
    for module_name, read_backend in bindings.items():
        module = sys.modules.get(module_name)
        if module is not None and ALIASES.get(read_backend(module) or "on") != backend:
            with gl_errors():
                importlib.reload(module)


def note_rendering(owner: str) -> bool:
    """Says that this process is about to draw, or to create an OpenGL context.

    Args:
        owner: The library that does it ("dm_control", "mujoco"). dm_control remembers which context
            is current and does not notice when another library changes that.

    Returns:
        True if another library drew since `owner` last did.

    Raises:
        RuntimeError: This process was forked from one that had rendered. Mesa hangs in that case.
    """
    if _state["forked_after_render"]:
        raise RuntimeError(
            "This process was forked from one that had already rendered, where OpenGL hangs: "
            "create the vector env before anything is drawn in its parent, or start its workers "
            "with context='spawn'."
        )
    changed = _state["owner"] not in (None, owner)
    _state.update(rendered=True, owner=owner)
    return changed


@contextlib.contextmanager
def gl_errors() -> Iterator[None]:
    """Turns what OpenGL bindings raise without a working driver into one readable line.

    Raises:
        RuntimeError: The import or the first drawing inside the block failed in OpenGL.
    """
    try:
        yield
    except Exception as error:
        if not _is_gl_error(error):
            raise
        raise RuntimeError(
            f"OpenGL backend MUJOCO_GL={os.environ.get(MUJOCO_GL, '')!r} does not work here "
            f"({type(error).__name__}: {error}): {INSTALL_HINT}."
        ) from error


def _is_gl_error(error: Exception) -> bool:
    words = (
        *("opengl", "egl", "gladloadgl", "glgeterror", "osmesa", "glfw", "rendering backend"),
        *("libgl", "libgthread"),  # what OpenCV misses
    )
    text = f"{type(error).__name__} {error}".lower()
    return "GL" in type(error).__name__ or any(word in text for word in words)
