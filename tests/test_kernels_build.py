"""How native kernels are compiled and kept, and what happens where they cannot be."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_kernels import error, plain_update, results
from tiny import agent_and_batch

from rllib_dreamer.model import kernels, kernels_build, ops
from rllib_dreamer.model.fuse import fusing
from rllib_dreamer.model.optim import LaProp


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that has not looked for kernels yet, with an empty cache folder."""
    monkeypatch.setenv("RLLIB_DREAMER_CACHE", str(tmp_path))
    before = dict(kernels._functions)
    kernels_build.library.cache_clear()
    kernels._functions.clear()
    yield tmp_path
    kernels_build.library.cache_clear()
    kernels._functions.clear()
    kernels._functions.update(before)


@pytest.fixture
def few_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source in place of the kernels that takes no time to compile."""
    source = tmp_path / "few_lines.c"
    source.write_text('__attribute__((visibility("default"))) int twice(int x) { return 2 * x; }')
    monkeypatch.setattr(kernels_build, "SOURCE", source)
    return source


def test_without_a_compiler_one_warning_and_the_plain_path(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    x, scale = torch.randn(3, 8), torch.ones(8)
    with caplog.at_level(logging.WARNING), fusing(True):
        assert torch.equal(ops.norm_silu(x, scale), ops.norm_silu.__wrapped__(x, scale))
        ops.norm_silu(x, scale)
    assert len(caplog.records) == 1
    assert "no-such-compiler" in caplog.text and "Install a C compiler" in caplog.text


def test_without_a_compiler_a_whole_update_is_the_plain_one(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    agent, batch = agent_and_batch()
    found = []
    for fused in (True, False):
        twin = copy.deepcopy(agent)
        twin.fuse = fused
        params = [p for p in twin.parameters() if p.requires_grad]
        for _ in range(2):
            plain_update(twin, batch, LaProp(params, warmup=0, fused=fused))
        found.append(twin.state_dict())
    assert all(torch.equal(found[0][key], x) for key, x in found[1].items())
    assert len(caplog.records) == 1


def test_a_failing_compiler_is_named_with_its_message(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = unbuilt / "broken-cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no space left >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert not kernels.available()
    assert "no space left" in caplog.text and len(caplog.records) == 1
    assert not list(unbuilt.glob("*.so"))


def test_kernels_are_compiled_once(
    unbuilt: Path, few_lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kernels_build.build(unbuilt)
    assert path.parent == unbuilt and path.exists()
    monkeypatch.setattr(kernels_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert kernels_build.build(unbuilt) == path


def test_the_next_process_compiles_nothing(unbuilt: Path, few_lines: Path) -> None:
    code = (
        "import pathlib, runpy, sys\n"
        "build = runpy.run_path(sys.argv[1])['build']\n"
        "build.__globals__['_compile'] = None\n"
        "build.__globals__['SOURCE'] = pathlib.Path(sys.argv[3])\n"
        "print(build(pathlib.Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, kernels_build.__file__, str(unbuilt), str(few_lines)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "'NoneType' object is not callable" in refused.stderr
    path = kernels_build.build(unbuilt)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(path)


def test_a_cache_folder_that_cannot_be_written_to(unbuilt: Path, few_lines: Path) -> None:
    blocked = unbuilt / "file"
    blocked.write_text("")
    path = kernels_build.build(blocked / "below")
    assert path.exists() and unbuilt not in path.parents


def test_a_damaged_library_is_built_anew(
    unbuilt: Path, few_lines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = kernels_build.build(unbuilt)
    path.write_bytes(path.read_bytes()[:100])
    native = kernels_build.library()
    assert native is not None and native.twice(4) == 8
    assert not caplog.records


def test_the_users_of_a_shared_cache_may_read_what_one_compiled(
    unbuilt: Path, few_lines: Path
) -> None:
    assert kernels_build.build(unbuilt).stat().st_mode & 0o777 == 0o755


def test_a_compiler_may_have_arguments(
    unbuilt: Path, few_lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (compiler,) = kernels_build.find_compiler()
    monkeypatch.setenv("CC", f"env LC_ALL=C {compiler}")
    assert kernels_build.find_compiler()[1:] == ["LC_ALL=C", compiler]
    assert kernels.available()
    native = kernels_build.library()
    assert native is not None and native.twice(4) == 8
    plain = kernels_build.build(unbuilt)
    monkeypatch.setenv("CC", f"env LC_ALL=C {compiler} -O0")
    assert kernels_build.build(unbuilt) != plain


def test_a_compiler_that_knows_few_flags(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple = unbuilt / "simple-cc"
    (compiler,) = kernels_build.find_compiler()
    flags = "*-fopenmp\\ *|*-mprefer*|*-march*"
    simple.write_text(f'#!/bin/sh\ncase "$*" in {flags}) exit 1;; esac\nexec {compiler} "$@"\n')
    simple.chmod(0o755)
    monkeypatch.setenv("CC", str(simple))
    args = torch.randn(2, 100, 24), torch.ones(24)
    native, plain = (results(ops.norm_silu, args, on) for on in (True, False))
    assert all(error(a, b) <= 2e-6 for a, b in zip(native, plain, strict=True))
    assert len(list(unbuilt.glob("kernels-*.so"))) == 1
