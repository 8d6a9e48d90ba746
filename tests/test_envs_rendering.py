"""The choice of the OpenGL backend, and its errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rllib_dreamer.envs import rendering


@pytest.fixture
def no_choice(monkeypatch):
    """A Linux process without MUJOCO_GL, whose own value comes back afterwards."""
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv(rendering.OURS, "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(rendering, "_reload_bindings", lambda backend: None)


def libraries(monkeypatch, *found):
    monkeypatch.setattr(rendering, "library_found", lambda name: name in found)


def run_python(code):
    clean = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean,
    )


@pytest.mark.parametrize(
    ("found", "expected"), [(("egl", "osmesa"), "egl"), (("osmesa",), "osmesa")]
)
def test_egl_comes_before_osmesa(no_choice, monkeypatch, found, expected):
    libraries(monkeypatch, *found)
    assert rendering.setup_rendering() == expected
    assert os.environ["MUJOCO_GL"] == expected


def test_the_users_value_wins(no_choice, monkeypatch):
    libraries(monkeypatch, "egl", "osmesa")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.setup_rendering("egl") == "osmesa"


def test_the_drivers_value_is_used_where_none_is_set(no_choice, monkeypatch):
    libraries(monkeypatch, "egl", "osmesa")
    assert rendering.setup_rendering("osmesa") == "osmesa"


def test_no_library_is_one_line_that_names_the_packages(no_choice, monkeypatch):
    libraries(monkeypatch)
    with pytest.raises(
        RuntimeError, match=r"apt-get install .*libegl1 .*libosmesa6.*MUJOCO_GL"
    ) as e:
        rendering.setup_rendering()
    assert "\n" not in str(e.value)


def test_no_library_is_no_error_if_nothing_is_drawn(no_choice, monkeypatch):
    libraries(monkeypatch)
    assert rendering.setup_rendering(required=False) == "disable"


def test_what_was_turned_off_for_want_of_a_library_is_decided_again(no_choice, monkeypatch):
    libraries(monkeypatch)
    rendering.setup_rendering(required=False)
    assert rendering.requested_backend() is None  # nobody's choice: not one for other machines
    with pytest.raises(RuntimeError, match=r"^No OpenGL library .*apt-get install"):
        rendering.setup_rendering()
    libraries(monkeypatch, "osmesa")
    assert rendering.setup_rendering() == "osmesa"
    assert rendering.requested_backend() == "osmesa"


def test_a_child_process_knows_that_no_user_turned_rendering_off(no_choice, monkeypatch):
    libraries(monkeypatch)
    rendering.setup_rendering(required=False)
    code = "from rllib_dreamer.envs import rendering as r; print(r.requested_backend())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "None"


def test_a_user_who_turns_rendering_off_is_told_so(no_choice, monkeypatch):
    libraries(monkeypatch)
    rendering.setup_rendering(required=False)
    monkeypatch.setenv("MUJOCO_GL", "0")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=0 turns rendering off"):
        rendering.setup_rendering()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("vulkan", ValueError, "MUJOCO_GL='vulkan' is not an OpenGL backend; set it to 'egl'"),
        ("osmesa", RuntimeError, "MUJOCO_GL=osmesa but its library is not found: install"),
        ("disable", RuntimeError, "MUJOCO_GL=disable turns rendering off.*'proprio'"),
    ],
)
def test_wrong_values_are_explained(no_choice, monkeypatch, value, error, message):
    libraries(monkeypatch, "egl")
    monkeypatch.setenv("MUJOCO_GL", value)
    with pytest.raises(error, match=message):
        rendering.setup_rendering()


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'NoneType' object has no attribute 'eglQueryString'"),
        ImportError("Cannot initialize a headless EGL display."),
        RuntimeError("an OpenGL platform library has not been loaded into this process"),
        ImportError("libGL.so.1: cannot open shared object file: No such file or directory"),
        ImportError("libgthread-2.0.so.0: cannot open shared object file"),
    ],
)
def test_errors_of_the_bindings_name_the_packages(error):
    with pytest.raises(RuntimeError, match=r"does not work here .*install.*libgl1-mesa-dri") as e:
        with rendering.gl_errors():
            raise error
    assert e.value.__cause__ is error


def test_other_errors_pass_through():
    with pytest.raises(KeyError), rendering.gl_errors():
        raise KeyError("camera")


def test_a_child_of_a_process_that_has_rendered_is_told_instead_of_hanging(monkeypatch):
    monkeypatch.setitem(rendering._state, "rendered", True)
    monkeypatch.setitem(rendering._state, "forked_after_render", False)
    rendering._after_fork_in_child()
    with pytest.raises(RuntimeError, match=r"forked from one that had already rendered.*'spawn'"):
        rendering.note_rendering("mujoco")


def test_noticing_that_another_library_drew(monkeypatch):
    monkeypatch.setitem(rendering._state, "owner", None)
    monkeypatch.setitem(rendering._state, "forked_after_render", False)
    owners = ["dm_control", "dm_control", "mujoco", "dm_control"]
    changes = [rendering.note_rendering(owner) for owner in owners]
    assert changes == [False, False, True, True]


def test_naming_the_envs_imports_no_simulator():
    """dm_control is not looked for: RLlib itself imports it."""
    code = """
import sys
from rllib_dreamer import envs
assert len(envs.env_names()) > 300
print({"robosuite", "ale_py", "supersuit"} & set(sys.modules))
"""
    result = run_python(code)
    assert result.stdout.strip() == "set()", result.stderr


def test_a_backend_fixed_by_an_earlier_import_is_chosen_again():
    """`import ray.rllib` alone makes dm_control take GLFW, which needs a display."""
    code = """
from dm_control import _render
assert _render.BACKEND == "glfw", _render.BACKEND
from rllib_dreamer.envs import make_env
frame, _ = make_env("dmc/pendulum-swingup").reset(seed=0)
print(_render.BACKEND, frame.std() > 1)
"""
    result = run_python(code)
    assert result.stdout.split() == ["egl", "True"], result.stderr
