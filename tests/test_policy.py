"""Tests of rllib_dreamer.policy and of what it stands on: reading checkpoints, export, checks."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.utils.spaces.space_utils import unsquash_action
from ray.tune import Checkpoint
from tiny import IMAGE, MIXED, RandomEnv, built, tiny_config
from walking import ACTIONS

from rllib_dreamer import checkpoint
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.policy import export, imagination
from rllib_dreamer.policy import step as policy_step
from rllib_dreamer.policy.checkpoint_reader import find_checkpoint
from rllib_dreamer.policy.policy import DreamerPolicy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a policy for the richest spaces."""
    folder = tmp_path_factory.mktemp("runs") / "experiment" / "trial" / "checkpoint_000000"
    config = tiny_config(RandomEnv, observation_space=MIXED, action_space=ACTIONS, action_repeat=3)
    with built(config) as algo:
        algo.train()
        algo.save_to_path(folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy's export, with its step in both formats."""
    folder = tmp_path_factory.mktemp("exported")
    return DreamerPolicy.from_checkpoint(saved, seed=0).export(folder, ("torch", "onnx"))


@pytest.fixture
def policy(saved: Path) -> DreamerPolicy:
    return DreamerPolicy.from_checkpoint(saved, seed=0)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint_000000"))


def observations(space: gym.Space, *lead: int) -> Any:
    """Random observations with leading axes."""
    count = int(np.prod(lead))
    batch = gym.vector.utils.batch_space(space, count).sample()
    leaves = {key: np.asarray(x) for key, x in batch.items()}
    return {key: x.reshape(*lead, *x.shape[1:]) for key, x in leaves.items()}


def actions_of(space: spaces.Dict, *lead: int) -> dict[str, np.ndarray]:
    return observations(space, *lead)


class TestActing:
    def test_builds_no_env(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("an env was built")

        monkeypatch.setattr(RandomEnv, "__init__", refuse)
        DreamerPolicy.from_checkpoint(saved)

    def test_gives_actions_of_the_space(self, policy: DreamerPolicy) -> None:
        for greedy in (True, False):
            for _ in range(20):
                assert ACTIONS.contains(policy.act(MIXED.sample(), greedy))

    def test_batch_acts_on_each_row_alone(self, policy: DreamerPolicy) -> None:
        policy.agent.noise = FixedNoise()
        obs = observations(MIXED, 4, 3)  # (steps, rows)
        policy.reset(3)
        steps = [policy.act({key: x[t] for key, x in obs.items()}) for t in range(4)]
        for row in range(3):
            policy.reset()
            for t in range(4):
                single = policy.act({key: x[t, row] for key, x in obs.items()})
                for key, x in single.items():
                    np.testing.assert_allclose(x, steps[t][key][row], atol=1e-5)

    def test_is_first_forgets_only_those_rows(self, policy: DreamerPolicy) -> None:
        policy.agent.noise = FixedNoise()
        first, second = observations(MIXED, 2), observations(MIXED, 2)
        policy.reset(2)
        policy.act(first)
        policy.act(second, is_first=np.array([True, False]))
        mixed = policy.state.deter.clone()
        policy.reset(2)
        policy.act(second)
        assert torch.allclose(mixed[0], policy.state.deter[0])
        assert not torch.allclose(mixed[1], policy.state.deter[1])

    def test_same_seed_same_actions(self, saved: Path) -> None:
        obs = MIXED.sample()

        def run(seed: int) -> list[np.ndarray]:
            torch.rand(1)  # the global generator does not matter
            policy = DreamerPolicy.from_checkpoint(saved, seed=seed)
            return [policy.act(obs, greedy=False)["arm"] for _ in range(3)]

        np.testing.assert_array_equal(run(1), run(1))
        assert not np.array_equal(run(1), run(2))

    def test_acts_as_the_rl_module_and_rllibs_connector(self, saved: Path) -> None:
        policy = DreamerPolicy.from_checkpoint(saved)
        module = RLModule.from_checkpoint(
            saved / "learner_group" / "learner" / "rl_module" / "default_policy"
        )
        module.agent.noise = policy.agent.noise = FixedNoise()
        obs = MIXED.sample()
        batch = {key: torch.as_tensor(np.asarray(x))[None, None] for key, x in obs.items()}
        state = {key: x[None] for key, x in module.get_initial_state().items()}
        out = module.forward_inference({"obs": batch, "state_in": state})
        raw = {key: x[0, 0].detach().numpy() for key, x in out["actions"].items()}
        expected = unsquash_action(raw, dict(ACTIONS.spaces))
        for key, x in policy.act(obs).items():
            np.testing.assert_allclose(x, expected[key], atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"camera": np.zeros((64, 32, 3), np.uint8)}, r"obs\['camera'\]: got shape \(64, 32"),
            ({"camera": np.zeros((32, 32, 3), np.float32)}, "got dtype float32; must be uint8"),
            ({"joints": np.array(["a", "b", "c"])}, r"obs\['joints'\]: got dtype"),
            ({"joints": np.array([0.0, np.nan, 0.0])}, "got 1 of 3 numbers that are NaN or inf"),
            ({"mode": 7}, r"got 7 to 7, outside its space Discrete\(4\)"),
            ({"mode": 1.5}, "got dtype float64; must be int64"),
        ],
    )
    def test_refuses_a_wrong_observation(
        self, policy: DreamerPolicy, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            policy.act({**MIXED.sample(), **change})

    def test_says_how_to_hand_over_a_batch(self, policy: DreamerPolicy) -> None:
        with pytest.raises(ValueError, match=r"policy\.reset\(n=2\)"):
            policy.act(observations(MIXED, 2))
        policy.reset(2)
        with pytest.raises(ValueError, match="is for single observations"):
            policy.act(MIXED.sample())
        with pytest.raises(ValueError, match="is_first: got shape"):
            policy.act(observations(MIXED, 2), is_first=np.array([True]))
        with pytest.raises(ValueError, match="n: got 0; must be at least 1"):
            policy.reset(0)

    def test_refuses_another_nesting(self, policy: DreamerPolicy) -> None:
        with pytest.raises(ValueError, match="not nested like its space"):
            policy.act({"camera": IMAGE.sample()})

    def test_takes_any_real_numbers_for_a_vector(self, policy: DreamerPolicy) -> None:
        policy.act({**MIXED.sample(), "joints": [0, 1, 0]})


class TestImagine:
    def test_shapes_units_and_dtypes(self, policy: DreamerPolicy) -> None:
        found = policy.imagine(observations(MIXED, 5), actions_of(ACTIONS, 4 + 7))
        assert found.obs["camera"].shape == (7, 32, 32, 3)
        assert found.obs["camera"].dtype == np.uint8
        assert found.obs["joints"].shape == (7, 3) and found.obs["joints"].dtype == np.float32
        assert found.obs["mode"].shape == (7,)
        assert found.reward.shape == found.cont.shape == (7,)
        assert (found.cont >= 0).all() and (found.cont <= 1).all()

    def test_rows_are_imagined_alone(self, policy: DreamerPolicy) -> None:
        policy.agent.noise = FixedNoise()
        obs, actions = observations(MIXED, 2, 3), actions_of(ACTIONS, 2, 6)
        both = policy.imagine(obs, actions)
        for row in range(2):
            one = policy.imagine(
                {key: x[row] for key, x in obs.items()}, {k: x[row] for k, x in actions.items()}
            )
            np.testing.assert_allclose(one.cont, both.cont[row], atol=1e-5)

    def test_begins_where_acting_is(self, policy: DreamerPolicy) -> None:
        """With the actions that the policy took, the filtered state is that of acting."""
        policy.agent.noise = FixedNoise()
        obs = observations(MIXED, 3)
        steps = [{key: x[t] for key, x in obs.items()} for t in range(3)]
        taken = [policy.act(step) for step in steps]
        actions = {key: np.stack([a[key] for a in taken]) for key in taken[0]}
        before = policy.state.deter.clone()
        found = policy.imagine(obs, actions)
        assert torch.equal(before, policy.state.deter)
        agent = policy.agent
        state = agent.world.rssm.imagine_step(
            agent.world.rssm.state(policy.state.deter, policy.state.stoch),
            policy.state.action,
            None,
        )
        expected = imagination.predict_heads(agent, state)[1]
        assert 0 < expected.item() < 1
        np.testing.assert_allclose(found.cont, expected.numpy(), atol=1e-6)

    def test_refuses_too_few_actions(self, policy: DreamerPolicy) -> None:
        with pytest.raises(ValueError, match=r"for 5 observations; must have at least 5 steps"):
            policy.imagine(observations(MIXED, 5), actions_of(ACTIONS, 4))
        with pytest.raises(ValueError, match=r"must be \(steps, 32, 32, 3\) or"):
            policy.imagine(MIXED.sample(), actions_of(ACTIONS, 4))


class TestExport:
    def test_loads_without_ray_and_without_pickle(
        self, policy: DreamerPolicy, tmp_path: Path
    ) -> None:
        policy.seed(3)
        obs = observations(MIXED, 2)
        policy.reset(2)
        expected = policy.act(obs)["arm"]
        policy.export(tmp_path / "exported", formats=())
        np.savez(tmp_path / "obs.npz", **obs)
        code = """
import pickle, sys
sys.modules["ray"] = None
def refuse(*_, **__): raise AssertionError("unpickling")
pickle.load = pickle.loads = pickle.Unpickler = refuse
import numpy as np
from rllib_dreamer import DreamerPolicy
policy = DreamerPolicy.load(sys.argv[1], seed=3)
policy.reset(2)
print(policy.act(dict(np.load(sys.argv[2])))["arm"].tolist())
"""
        arguments = [str(tmp_path / "exported"), str(tmp_path / "obs.npz")]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-6)

    def test_keeps_spaces_origin_and_weights(self, policy: DreamerPolicy, tmp_path: Path) -> None:
        policy.export(tmp_path, formats=())
        loaded = DreamerPolicy.load(tmp_path)
        assert loaded.observation_space == MIXED and loaded.action_space == ACTIONS
        assert loaded.conversion == "unsquash"
        assert loaded.env == "tiny.RandomEnv"
        assert loaded.about["agent_steps"] > 0 and loaded.about["action_repeat"] == 3
        for key, x in policy.agent.state_dict().items():
            assert torch.equal(loaded.agent.state_dict()[key], x), key
        card = (tmp_path / "README.md").read_text()
        assert "tiny.RandomEnv" in card and "agent steps" in card

    def test_step_equals_the_policy(self, policy: DreamerPolicy, exported: Path) -> None:
        """The exported program, over an episode with three rows, traced with two."""
        program = torch.export.load(exported / "policy_step.pt2").module()
        described = json.loads((exported / "policy.json").read_text())["step"]
        names = [leaf["name"] for leaf in described["inputs"]]
        values = dict(zip(names, policy_step.example_inputs(policy, 3), strict=True))
        policy.agent.noise = FixedNoise()
        policy.reset(3)
        for step in range(4):
            obs = observations(MIXED, 3)
            first = np.array([step == 0, step in (0, 2), step == 0])
            expected = policy.act(obs, is_first=first)
            values |= {f"obs/{key}": torch.as_tensor(x) for key, x in obs.items()}
            values["is_first"] = torch.from_numpy(first)
            outputs = program(*values.values())
            found = {leaf["name"]: x for leaf, x in zip(described["outputs"], outputs, strict=True)}
            for key, x in expected.items():
                np.testing.assert_allclose(found[f"action/{key}"].numpy(), x, atol=1e-5)
                values[f"prev_action/{key}"] = found[f"action/{key}"]
            torch.testing.assert_close(found["next_deter"], policy.state.deter)
            assert (found["next_stoch"] == policy.state.stoch).all()
            values |= {"deter": found["next_deter"], "stoch": found["next_stoch"]}

    def test_onnx_step_equals_the_program(self, policy: DreamerPolicy, exported: Path) -> None:
        program = torch.export.load(exported / "policy_step.pt2").module()
        session = onnxruntime.InferenceSession(exported / "policy_step.onnx")
        inputs = policy_step.example_inputs(policy, 3)
        feed = {leaf.name: x.numpy() for leaf, x in zip(session.get_inputs(), inputs, strict=True)}
        for x, y in zip(session.run(None, feed), program(*inputs), strict=True):
            np.testing.assert_allclose(x, y.numpy(), atol=1e-5)

    def test_nothing_of_an_earlier_export_is_left(
        self, policy: DreamerPolicy, exported: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(exported, tmp_path / "copy")
        files = {export.DESCRIPTION, export.WEIGHTS, export.CARD}
        steps = set(policy_step.STEP_FILES.values())
        assert {path.name for path in folder.iterdir()} == files | steps
        (folder / "notes.txt").write_text("of a user")
        policy.export(folder, formats=())
        assert {path.name for path in folder.iterdir()} == files | {"notes.txt"}
        assert inspect.signature(policy.export).parameters["formats"].default == ("torch",)


class TestCheckpoints:
    def test_warns_of_connectors_which_are_not_run(
        self, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config(RandomEnv)
        config.env_runners(env_to_module_connector=lambda *_, **__: MeanStdFilter())
        with built(config) as algo:
            algo.save_to_path(tmp_path / "c")
        DreamerPolicy.from_checkpoint(saved)
        assert not caplog.records
        DreamerPolicy.from_checkpoint(tmp_path / "c")
        assert "was trained with `env_to_module_connector`, which is not run" in caplog.text

    def test_finds_them_by_every_kind_of_path(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = saved.parents[2]
        for path in (saved, saved / "rllib_checkpoint.json", saved.parent, saved.parents[1]):
            assert find_checkpoint(path) == saved
        assert find_checkpoint("best", storage=storage) == saved
        assert find_checkpoint("last", storage=storage) == saved
        monkeypatch.chdir(saved.parent)
        assert find_checkpoint("checkpoint_000000").resolve() == saved
        DreamerPolicy.from_checkpoint("checkpoint_000000")
        assert DreamerPolicy.from_checkpoint(Checkpoint.from_directory(str(saved))).about

    def test_takes_the_best_the_last_and_no_unfinished_one(
        self, copy: Path, tmp_path: Path
    ) -> None:
        for number, score in enumerate([3.0, 9.0, 5.0, 99.0]):
            folder = tmp_path / f"checkpoint_{number:06d}"
            if folder != copy:
                shutil.copytree(copy, folder)
            mark = {"rllib_dreamer": {"checkpoint_score": score}}
            (folder / ".metadata.json").write_text(json.dumps(mark))
        (tmp_path / "checkpoint_000003" / checkpoint.MANIFEST).unlink()
        assert find_checkpoint(tmp_path).name == "checkpoint_000001"
        assert DreamerPolicy.from_checkpoint(tmp_path).about["checkpoint"] == "checkpoint_000001"
        last = DreamerPolicy.from_checkpoint(tmp_path, which="last")
        assert last.about["checkpoint"] == "checkpoint_000002"
        assert find_checkpoint(tmp_path, "best").name == "checkpoint_000001"
        assert find_checkpoint(tmp_path, "last").name == "checkpoint_000002"

    def test_goes_by_numbers_within_a_trial_as_a_copy_has_other_times(
        self, copy: Path, tmp_path: Path
    ) -> None:
        for trial, newest in (("first", 100), ("second", 200)):
            for number in range(3):
                folder = tmp_path / trial / f"checkpoint_{number:06d}"
                shutil.copytree(copy, folder)
                time = newest - number
                os.utime(folder / checkpoint.MANIFEST, (time, time))
        assert find_checkpoint(tmp_path / "first", "last").name == "checkpoint_000002"
        assert find_checkpoint(tmp_path / "first", "best").name == "checkpoint_000002"
        shutil.rmtree(copy)
        assert find_checkpoint(tmp_path, "last").parent.name == "second"

    def test_takes_scores_from_the_results_where_nothing_is_marked(
        self, copy: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(copy, tmp_path / "checkpoint_000001")
        results = [
            {
                "checkpoint_dir_name": f"checkpoint_00000{n}",
                "env_runners": {"episode_return_mean": r},
            }
            for n, r in enumerate([7.0, 2.0])
        ]
        (tmp_path / "result.json").write_text("\n".join(map(json.dumps, results)) + "\n{cut off")
        assert find_checkpoint(tmp_path, "best").name == "checkpoint_000000"
        assert find_checkpoint(tmp_path, "last").name == "checkpoint_000001"

    def test_passes_over_files_that_were_cut_short(self, copy: Path, tmp_path: Path) -> None:
        for number in (1, 2):
            shutil.copytree(copy, tmp_path / f"checkpoint_00000{number}")
        for number, mark in enumerate(
            ('{"rllib_dreamer": {"checkpoint_score": 7}}', '{"rllib_dre')
        ):
            (tmp_path / f"checkpoint_00000{number}" / ".metadata.json").write_text(mark)
        (tmp_path / "result.json").write_text('{"checkpoint_dir_name": "checkpoint_000001", "tr')
        (tmp_path / "checkpoint_000002" / checkpoint.MANIFEST).write_text("")
        assert find_checkpoint(tmp_path, "best").name == "checkpoint_000000"
        assert find_checkpoint(tmp_path, "last").name == "checkpoint_000001"

    @pytest.mark.parametrize(
        ("name", "message"),
        [("nothing", "nothing does not exist"), (".", "holds no checkpoint")],
    )
    def test_says_if_there_is_none(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_checkpoint(tmp_path / name)
        with pytest.raises(ValueError, match=r"no experiment in .* has a finished checkpoint"):
            find_checkpoint("best", storage=tmp_path)
        with pytest.raises(ValueError, match="which: got 'first'; must be one of best, last"):
            find_checkpoint(tmp_path, "first")
        with pytest.raises(ValueError, match="s3://bucket/a is not on this machine; copy the fold"):
            find_checkpoint("s3://bucket/a")

    def test_refuses_a_half_written_one(self, copy: Path) -> None:
        (copy / checkpoint.MANIFEST).unlink()
        with pytest.raises(ValueError, match=r"is not complete: manifest\.json is missing"):
            DreamerPolicy.from_checkpoint(copy)
        with pytest.raises(ValueError, match="holds no finished checkpoint"):
            DreamerPolicy.from_checkpoint(copy.parent)

    def test_refuses_a_damaged_one(self, copy: Path) -> None:
        path = copy / "learner_group/learner/rl_module/default_policy/module_state.pkl"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"module_state\.pkl has 100 bytes instead of"):
            DreamerPolicy.from_checkpoint(copy)

    def test_refuses_files_from_elsewhere(self, copy: Path) -> None:
        path = copy / "learner_group/learner/rl_module/default_policy/module_state.pkl"
        path.rename(copy.parent / "state.pkl")
        path.symlink_to(copy.parent / "state.pkl")
        with pytest.raises(ValueError, match=r"module_state\.pkl leads out of it"):
            DreamerPolicy.from_checkpoint(copy)

    def test_needs_no_replay(self, saved: Path, tmp_path: Path) -> None:
        """Where it was removed to save room, the folders around find the checkpoint too."""
        experiment = Path(shutil.copytree(saved.parents[1], tmp_path / "experiment"))
        folder = experiment / saved.parent.name / saved.name
        shutil.rmtree(folder / "replay")
        DreamerPolicy.from_checkpoint(folder)
        assert find_checkpoint(folder.parent) == folder
        assert find_checkpoint("last", storage=tmp_path) == folder

    def test_refuses_another_algorithm(self, copy: Path) -> None:
        from ray.rllib.algorithms.ppo import PPO, PPOConfig

        shutil.rmtree(copy)
        copy.mkdir()
        (copy / "rllib_checkpoint.json").write_text("{}")
        content = {"class": PPO, "ctor_args_and_kwargs": ((PPOConfig(),), {})}
        (copy / "class_and_ctor_args.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="is of PPO, not of DreamerTorch"):
            DreamerPolicy.from_checkpoint(copy)

    def test_names_a_module_that_is_not_installed(self, copy: Path) -> None:
        content = b"cno_such_package\nEnv\n."
        path = copy / "class_and_ctor_args.pkl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="needs the module 'no_such_package'"):
            DreamerPolicy.from_checkpoint(copy)
        path.write_bytes(b"ctiny\nRenamedEnv\n.")
        with pytest.raises(ValueError, match=r"another name or place now .*'RenamedEnv'"):
            DreamerPolicy.from_checkpoint(copy)
