"""Compiles `kernels.c` on first use and keeps the library for the next process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fPIC", "-shared")
# What makes the kernels fast, dropped from the right until the compiler takes what is left.
FAST_FLAGS = ("-fopenmp-simd", "-march=native", "-fopenmp", "-mprefer-vector-width=512")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native kernels, or None, with one warning, where they cannot be compiled."""
    try:
        path = build(cache_folder())
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, or in a folder from which nothing may be run
            return ctypes.CDLL(str(build(_temporary_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "No native CPU kernels, so updates take two to three times as long: %s. Install a C "
            "compiler (Debian: apt-get install gcc), or name one in the variable CC.",
            error,
        )
        return None


def cache_folder() -> Path:
    """Where compiled kernels stay: $RLLIB_DREAMER_CACHE, else the user's cache folder."""
    if own := os.environ.get("RLLIB_DREAMER_CACHE"):
        return Path(own)
    try:
        general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return _temporary_folder()
    return general / "rllib_dreamer"


def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="rllib_dreamer_"))


def build(folder: Path) -> Path:
    """Returns the library for this source, compiler and CPU, compiling it if it is not there.

    Args:
        folder: Where to look and to write. If it cannot be written to, a new temporary folder is
            used.

    Raises:
        FileNotFoundError: If there is no compiler.
        subprocess.SubprocessError: If the compiler fails.
        OSError: If nothing can be written.
    """
    compiler = find_compiler()
    path = folder / f"kernels-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(".so", dir=folder)
    except OSError:
        path = _temporary_folder() / path.name
        descriptor, scratch = tempfile.mkstemp(".so", dir=path.parent)
    os.close(descriptor)
    try:
        _compile(compiler, Path(scratch))
        os.chmod(scratch, 0o755)  # other users may share the folder
        os.replace(scratch, path)  # atomic: other processes may be compiling too
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


def find_compiler() -> list[str]:
    """Command of the C compiler: $CC, which may have arguments, else the first of `COMPILERS`.

    Raises:
        FileNotFoundError: If there is none.
    """
    names = (os.environ["CC"],) if os.environ.get("CC") else COMPILERS
    for name in names:
        program, *arguments = shlex.split(name)
        if path := shutil.which(program):
            return [path, *arguments]
    raise FileNotFoundError(f"no C compiler was found (looked for {', '.join(names)})")


def _compile(compiler: Sequence[str], target: Path) -> None:
    for count in range(len(FAST_FLAGS), -1, -1):
        flags = (*FLAGS, *FAST_FLAGS[:count])
        command = [*compiler, *flags, str(SOURCE), "-o", str(target), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if result.returncode == 0:
            return
    raise subprocess.SubprocessError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")


def _fingerprint(compiler: Sequence[str]) -> str:
    """Changes with the source, the flags, the compiler and the CPU, for which code is native."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    cpu = [platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu += [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    digest = hashlib.sha256(SOURCE.read_bytes())
    digest.update("\n".join([*compiler, *FLAGS, *FAST_FLAGS, version, *cpu]).encode())
    return digest.hexdigest()[:16]
