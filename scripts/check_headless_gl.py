"""Checks that this machine draws MuJoCo pictures without a display.

Draws a 64x64 frame of dm_control's walker in a fresh process, with the backend that the package
itself would choose, and imports OpenCV, which needs system libraries of its own. The subprocess is
there because a broken driver can end a process without an exception.

Prints one line. The exit code is 0 if everything works, 1 if not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RENDERING = Path(__file__).resolve().parents[1] / "rllib_dreamer" / "envs" / "rendering.py"
TIMEOUT_S = 300  # A cold file cache makes the first import slow.

# Leaves by os._exit: with OSMesa, dm_control prints a harmless traceback when a process ends.
PROBE = """
import importlib.util, os, runpy, sys
try:
    backend = runpy.run_path(sys.argv[1])["setup_rendering"]()
    from dm_control import suite
    frame = suite.load("walker", "walk").physics.render(64, 64, camera_id=0)
    assert frame.shape == (64, 64, 3), f"frame has shape {frame.shape}"
    assert frame.min() < frame.max(), "the frame is blank"
    if importlib.util.find_spec("cv2") is not None:
        import cv2
except Exception as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
    os._exit(1)
print(backend or "the system's own OpenGL", flush=True)
os._exit(0)
"""


def probe() -> tuple[bool, str]:
    """Draws one frame in a subprocess.

    Returns:
        True and the backend that drew it, or False and one line that says what went wrong.
    """
    command = [sys.executable, "-c", PROBE, str(RENDERING)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False, f"no frame within {TIMEOUT_S} s"
    if done.returncode < 0:
        return False, f"the process drawing it was ended by signal {-done.returncode}"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def main() -> int:
    """Prints the result; returns the exit code."""
    works, detail = probe()
    if works:
        print(f"Headless OpenGL works ({detail}).")
    else:
        print(f"Headless OpenGL does not work: {detail}", file=sys.stderr)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
