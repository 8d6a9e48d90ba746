"""Exports of policies with parts of their own, of any config, and over what lies there already."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RandomEnv
from walking import CAMERA, make_policy

from rllib_dreamer.dreamer_catalog import obs_spec
from rllib_dreamer.evaluation.run import Rules, as_dict, evaluate
from rllib_dreamer.model.codec import Decoder
from rllib_dreamer.policy import export, export_folder, step
from rllib_dreamer.policy.plain_json import from_plain, to_plain
from rllib_dreamer.policy.policy import DreamerPolicy

CONFIG = {
    "length": np.int64(7),
    "scale": np.float32(0.5),
    "wind": np.bool_(True),
    "limits": (-math.inf, math.inf),
    "deep": {"start": np.array([1, 2]), "name": "arm", "none": None},
}
READ = {
    "length": 7,
    "scale": 0.5,
    "wind": True,
    "limits": [-math.inf, math.inf],
    "deep": {"start": [1, 2], "name": "arm", "none": None},
}


def decoding(policy: DreamerPolicy, keys: set[str] | None) -> DreamerPolicy:
    """The policy with a decoder of some of the leaves, or none."""
    world = policy.agent.world
    specs = {key: obs_spec(key, space) for key, space in policy.observation_leaves.items()}
    kept = {key: spec for key, spec in specs.items() if keys and key in keys}
    world.decoder = None if keys is None else Decoder(kept, world.config)
    return policy


class TestDecoder:
    @pytest.mark.parametrize("keys", [{"camera"}, {"joints"}, set(), None], ids=str)
    def test_may_reconstruct_fewer_leaves_than_are_read(
        self, keys: set[str] | None, tmp_path: Path
    ) -> None:
        policy = decoding(make_policy(), keys)
        policy.export(tmp_path, formats=())
        loaded = DreamerPolicy.load(tmp_path, seed=0)
        policy.seed(0)
        obs = CAMERA.sample()
        np.testing.assert_array_equal(loaded.act(obs), policy.act(obs))
        several = {key: np.stack([x] * 3) for key, x in obs.items()}
        imagined = loaded.imagine(several, np.zeros((4, 2), np.float32)).obs
        assert {key for key, x in imagined.items() if x is not None} == (keys or set())

    def test_of_another_size_is_refused(self, tmp_path: Path) -> None:
        policy = make_policy()
        out = policy.agent.world.reward.out
        policy.agent.world.reward.out = torch.nn.Linear(out.in_features, 7)
        with pytest.raises(ValueError, match=r"world\.reward\.out.* cannot be exported; load its"):
            policy.export(tmp_path / "exported", formats=())
        assert not (tmp_path / "exported").exists()


class TestParts:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("world.encoder", "encoder"),
            ("world.decoder", "decoder"),
            ("world.rssm", "rssm"),
            ("world.reward", "reward head"),
            ("world.cont", "continue head"),
            ("behavior.actor", "actor"),
            ("behavior.critic", "critic"),
        ],
    )
    def test_of_a_custom_catalog_are_refused(self, tmp_path: Path, path: str, name: str) -> None:
        policy = make_policy()
        part = policy.agent.get_submodule(path)
        part.__class__ = type("Own", (type(part),), {})
        with pytest.raises(ValueError, match=f"the {name} is a Own, not the standard"):
            policy.export(tmp_path)


class TestFormats:
    def test_that_are_unknown_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"formats: got \['tflite'\]; must be of torch, onnx"):
            make_policy().export(tmp_path, formats=("tflite",))

    def test_say_what_they_need_and_leave_the_earlier_export(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = make_policy()
        policy.export(tmp_path, formats=())
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        policy.about = {"agent_steps": 7}
        monkeypatch.setattr(step, "find_spec", lambda name: None)
        for formats in (("onnx",), ("torch", "onnx")):
            with pytest.raises(ImportError, match="pip install onnx onnxscript"):
                policy.export(tmp_path, formats=formats)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class TestConfig:
    def test_comes_back_as_it_was(self, tmp_path: Path) -> None:
        policy = make_policy()
        policy.env_config = CONFIG
        policy.export(tmp_path, formats=())
        loaded = DreamerPolicy.load(tmp_path)
        assert loaded.env_config == READ
        assert type(loaded.env_config["length"]) is int

    def test_is_written_by_evaluations_in_the_same_way(self) -> None:
        rules = Rules(max_steps=2, draw=False)
        found = as_dict(evaluate(make_policy(), "walking.Walk", CONFIG, episodes=1, rules=rules))
        text = json.dumps(found, allow_nan=False)
        assert from_plain(json.loads(text)["env_config"]) == READ

    def test_what_is_unknown_is_none_and_objects_are_text(self) -> None:
        assert to_plain(math.nan) is None and to_plain(np.float32("nan")) is None
        assert to_plain({1: Path("a")}) == {"1": "a"}

    def test_names_no_env_that_no_name_leads_to(self, tmp_path: Path) -> None:
        policy = make_policy()
        for env, name in (
            (functools.partial(RandomEnv, {}), None),
            (lambda config: RandomEnv(config), None),
            (RandomEnv, "tiny.RandomEnv"),
        ):
            policy.env = env
            policy.export(tmp_path, formats=())
            assert DreamerPolicy.load(tmp_path).env == name


class TestFolder:
    @pytest.mark.parametrize("name", [export.DESCRIPTION, export.WEIGHTS])
    def test_with_a_file_cut_off_is_refused(self, tmp_path: Path, name: str) -> None:
        make_policy().export(tmp_path, formats=())
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="holds no whole exported policy"):
            DreamerPolicy.load(tmp_path)

    def test_of_another_format_or_with_other_weights_is_refused(self, tmp_path: Path) -> None:
        make_policy().export(tmp_path, formats=())
        path = tmp_path / export.DESCRIPTION
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "model": {**found["model"], "units": 32}}))
        with pytest.raises(ValueError, match="do not fit each other"):
            DreamerPolicy.load(tmp_path)
        path.write_text(json.dumps({**found, "format": 99}))
        with pytest.raises(ValueError, match="is of format 99; this version reads 1"):
            DreamerPolicy.load(tmp_path)

    def test_of_a_user_is_refused(self, tmp_path: Path) -> None:
        readme = tmp_path / "README.md"
        readme.write_text("of a user")
        for folder in (tmp_path, readme):
            with pytest.raises(ValueError, match=r"path: .* no exported policy: give a new or emp"):
                make_policy().export(folder, formats=())
        assert readme.read_text() == "of a user" and list(tmp_path.iterdir()) == [readme]

    @pytest.mark.parametrize("place", ["write_steps", "write_text", "save"])
    def test_keeps_the_earlier_export_where_another_fails(
        self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("disk full")

        policy = make_policy()
        policy.export(tmp_path, formats=())
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        policy.about = {"agent_steps": 7}
        with monkeypatch.context() as patched:
            patched.setattr(export, place, fail)
            with pytest.raises(RuntimeError, match="disk full"):
                policy.export(tmp_path, formats=())
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        policy.export(tmp_path, formats=())
        assert DreamerPolicy.load(tmp_path).about == {"agent_steps": 7}

    def test_where_a_kill_left_files_is_written_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At any of the steps by which a finished export takes its place."""
        policy = make_policy()
        replace, left = Path.replace, [0]

        def killed(path: Path, target: Path) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return replace(path, target)

        policy.export(tmp_path, formats=())
        for kill in range(4):
            left[0] = kill
            with monkeypatch.context() as patched:
                patched.setattr(Path, "replace", killed)
                patched.setattr(export_folder.shutil, "rmtree", lambda *_, **__: None)
                with pytest.raises(KeyboardInterrupt):
                    policy.export(tmp_path, formats=())
            if export.is_exported(tmp_path):
                DreamerPolicy.load(tmp_path)
            policy.export(tmp_path, formats=())
            names = {export.DESCRIPTION, export.WEIGHTS, export.CARD}
            assert {path.name for path in tmp_path.iterdir()} == names
