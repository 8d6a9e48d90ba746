"""DreamerV3 in PyTorch as an RLlib algorithm.

`import rllib_dreamer` makes the algorithm "DreamerTorch" and the environments known to Ray
Tune. Where Ray is not installed, `rllib_dreamer.model` still works.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
    from rllib_dreamer.policy.policy import DreamerPolicy
    from rllib_dreamer.registration import register

__version__ = "0.1.0"

__all__ = ["DreamerConfig", "DreamerPolicy", "DreamerTorch", "__version__", "register"]

_HOMES = {
    "DreamerConfig": "rllib_dreamer.dreamer",
    "DreamerPolicy": "rllib_dreamer.policy",
    "DreamerTorch": "rllib_dreamer.dreamer",
    "register": "rllib_dreamer.registration",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names, whether imported yet or not."""
    return sorted({*globals(), *_HOMES})


def _prefer_headless_rendering() -> None:
    """Sets MUJOCO_GL, unless it is set, to a backend that needs no display and is installed.

    RLlib itself imports dm_control, which reads the variable once and else takes a backend
    that needs a display. Ray's workers inherit it from the driver.
    """
    from rllib_dreamer.envs.rendering import LIBRARIES, library_found

    if os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY") or sys.platform != "linux":
        return
    backend = next((name for name in LIBRARIES if library_found(name)), None)
    if backend is not None:
        os.environ["MUJOCO_GL"] = backend


if find_spec("ray") is not None:
    _prefer_headless_rendering()
    import_module("rllib_dreamer.registration").register()
