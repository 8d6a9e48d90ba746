"""Tests of `rllib evaluate` and of the parts that play and measure."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import ray
import torch
import typer
from gymnasium import spaces
from tiny import IMAGE, MODEL, VECTOR, RandomEnv, built, tiny_config

from rllib_dreamer import cli
from rllib_dreamer.cli import app as cli_app
from rllib_dreamer.cli.evaluate import environment
from rllib_dreamer.dreamer_catalog import action_spec, obs_spec
from rllib_dreamer.envs import make_env
from rllib_dreamer.evaluation.environments import build_env, check_spaces
from rllib_dreamer.evaluation.episodes import Episode, Rules, play
from rllib_dreamer.evaluation.run import evaluate, write_results
from rllib_dreamer.evaluation.world_model import AHEAD, CONTEXT, WorldModelProbe
from rllib_dreamer.model.agent import build_agent
from rllib_dreamer.model.codec import Decoder
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.sizes import LossConfig, model_config
from rllib_dreamer.policy import imagination
from rllib_dreamer.policy.policy import DreamerPolicy
from rllib_dreamer.spaces import leaf_spaces

CAMERA = spaces.Dict({"camera": IMAGE, "joints": VECTOR})
ARM = spaces.Box(-2.0, 2.0, (2,), np.float32)


class Walk(gym.Env):
    """Says where it is: joints hold (episode's seed, step, last action). Ends by its seed."""

    observation_space = CAMERA
    action_space = ARM

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = dict(config or {})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.seed, self.t, self.action = seed or 0, 0, np.zeros(2, np.float32)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> Any:
        assert self.action_space.contains(action)
        self.t, self.action = self.t + 1, action
        end = self.t == self.config.get("length", 8) + self.seed
        return self._obs(), float(self.t), end and self.seed % 2 == 0, end, {}

    def _obs(self) -> dict[str, np.ndarray]:
        picture = np.full((32, 32, 3), 10 * self.seed + self.t, np.uint8)
        joints = np.array([self.seed, self.t, self.action[0]], np.float32) / 100
        return {"camera": picture, "joints": joints}


def make_policy(
    observation_space: gym.Space = CAMERA, action_space: gym.Space = ARM
) -> DreamerPolicy:
    torch.manual_seed(0)
    agent = build_agent(
        {key: obs_spec(key, space) for key, space in leaf_spaces(observation_space).items()},
        {key: action_spec(key, s) for key, s in leaf_spaces(action_space, "action").items()},
        model_config("1M", **MODEL),
        LossConfig(),
    )
    return DreamerPolicy(agent, observation_space, action_space, env=Walk)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run on pictures, in an experiment's folder."""
    folder = tmp_path_factory.mktemp("runs") / "experiment" / "trial" / "checkpoint_000000"
    config = tiny_config(
        RandomEnv, observation_space=CAMERA, action_space=ARM, length=12, terminated=False
    )
    with built(config) as algo:
        algo.train()
        algo.save_to_path(folder)
    ray.shutdown()
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command line that is wrong; returns its one line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rllib: "), lines
    return lines[0]


class TestEpisodes:
    def test_each_seed_is_played_once_to_its_end(self) -> None:
        found = {e.index: e for e in play(make_policy(), [Walk() for _ in range(3)], 7, Rules())}
        assert sorted(found) == list(range(7))
        for index, episode in found.items():
            steps = 8 + index
            assert episode.length == steps
            assert episode.total_return == steps * (steps + 1) / 2
            np.testing.assert_allclose(episode.obs["joints"][:, 0], index / 100)
            np.testing.assert_allclose(episode.obs["joints"][:, 1] * 100, np.arange(steps + 1))
            assert episode.terminated == (index % 2 == 0) and not episode.cut
            assert episode.frames is not None and episode.frames.shape == (steps + 1, 32, 32, 3)
            assert len(episode.deter) == len(episode.stoch) == steps + 1
            assert episode.actions.shape == (steps, 2)

    def test_actions_are_those_that_were_taken(self) -> None:
        (episode,) = play(make_policy(), [Walk()], 1, Rules())
        taken = episode.obs["joints"][1:, 0 + 2] * 100
        np.testing.assert_allclose(2.0 * episode.actions[:, 0], taken, atol=1e-5)

    def test_side_by_side_or_one_after_the_other_is_the_same(self) -> None:
        policy = make_policy()
        policy.agent.noise = FixedNoise()
        alone = {e.index: e for e in play(policy, [Walk()], 4, Rules())}
        for episode in play(policy, [Walk() for _ in range(4)], 4, Rules()):
            np.testing.assert_allclose(episode.deter, alone[episode.index].deter, atol=1e-4)

    def test_is_cut_at_the_limit(self) -> None:
        steps: list[int] = []
        found = list(play(make_policy(), [Walk()], 2, Rules(max_steps=3), lambda: steps.append(1)))
        assert [e.length for e in found] == [3, 3] and len(steps) == 6
        assert all(e.cut and not e.terminated for e in found)


class TestWorldModel:
    def episode(self, policy: DreamerPolicy, length: int, seed: int = 0) -> Episode:
        env = Walk({"length": length})
        return next(play(policy, [env], 1, Rules(seed=seed)))

    def probe(self, policy: DreamerPolicy, episodes: int = 1) -> WorldModelProbe:
        leaves = policy.observation_leaves
        return WorldModelProbe(policy.agent, leaves, episodes, FixedNoise())

    def test_shapes(self) -> None:
        policy = make_policy()
        probe = self.probe(policy)
        probe.add(self.episode(policy, 60))
        found = probe.result()
        quality = found.images["camera"]
        assert quality.posterior.ssim.shape == (61,)
        assert quality.open_loop is not None and quality.still is not None
        assert len(quality.open_loop.context.step) == CONTEXT
        assert len(quality.open_loop.ahead.step) == AHEAD
        assert quality.open_loop.ahead.sequences[0] == 61 - CONTEXT - AHEAD + 1
        assert found.windows is not None and found.windows["camera"].valid.all()

    def test_open_loop_sees_nothing_after_the_context(self) -> None:
        policy = make_policy()
        episode = self.episode(policy, 20)
        blind = {key: x.copy() for key, x in episode.obs.items()}
        for x in blind.values():
            x[CONTEXT:] = 0
        deter, stoch = episode.deter.copy(), episode.stoch.copy()
        deter[CONTEXT:], stoch[CONTEXT:] = 0, -1
        models = []
        for one in (episode, Episode(**{**vars(episode), "deter": deter, "stoch": stoch})):
            probe = self.probe(policy)
            probe.add(one)
            windows = probe.result().windows
            assert windows is not None
            models.append(windows["camera"].model)
        np.testing.assert_array_equal(models[0], models[1])

    def test_open_loop_is_imagine(self) -> None:
        """The window at the start of an episode is what `DreamerPolicy.imagine` shows."""
        policy = make_policy()
        policy.agent.noise = FixedNoise()
        episode = next(play(policy, [Walk({"length": 20})], 1, Rules()))
        probe = self.probe(policy)
        probe.add(episode)
        windows = probe.result().windows
        assert windows is not None
        obs = {key: x[:CONTEXT] for key, x in episode.obs.items()}
        shown = policy.imagine(obs, 2.0 * episode.actions)
        model = windows["camera"].model[0, CONTEXT:].astype(int)
        assert np.abs(model - shown.obs["camera"].astype(int)).max() <= 1

    def test_windows_take_the_actions_after_their_steps(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = make_policy()
        episode = self.episode(policy, 80)
        imagined = imagination.roll_out
        given: list[torch.Tensor] = []

        def noting(agent: Any, start: Any, actions: torch.Tensor, noise: Any) -> Any:
            given.append(actions)
            return imagined(agent, start, actions, noise)

        monkeypatch.setattr(imagination, "roll_out", noting)
        self.probe(policy, 40).add(episode)
        self.probe(policy, 20).add(episode)
        for actions, starts in zip(given, ([0], [0, 81 - CONTEXT - AHEAD]), strict=True):
            for row, start in zip(actions, starts, strict=True):
                first = start + CONTEXT - 1  # taken after the last step that is shown
                np.testing.assert_array_equal(row, episode.actions[first : first + AHEAD])

    def test_head_errors_take_the_reward_that_arrived_and_the_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = make_policy()
        episode = self.episode(policy, 8)

        def perfect(agent: Any, states: Any) -> Any:
            """Reads the step off the state: exact rewards, sure that nothing ends."""
            step = states.deter[..., 0]
            return step, torch.ones_like(step)

        deter = episode.deter.copy()
        deter[:, 0] = np.arange(len(deter))
        monkeypatch.setattr(imagination, "predict_heads", perfect)
        probe = self.probe(policy)
        probe.add(Episode(**{**vars(episode), "deter": deter}))
        heads = probe.result().heads
        assert heads.reward_mae == 0.0
        assert heads.cont_accuracy == pytest.approx(7 / 8)  # of 8 steps one is the end

    def test_an_episode_too_short_for_a_window_still_counts(self) -> None:
        policy = make_policy()
        probe = self.probe(policy)
        probe.add(self.episode(policy, CONTEXT - 1))
        found = probe.result()
        assert found.windows is None and found.heads_open_loop is None
        assert found.images["camera"].open_loop is None
        assert np.isfinite(found.vectors["joints"][0]) and np.isnan(found.vectors["joints"][1])

    def test_windows_of_short_and_long_episodes_are_padded(self) -> None:
        policy = make_policy()
        probe = self.probe(policy, 40)
        for length in (7, 60):
            probe.add(self.episode(policy, length))
        windows = probe.result().windows
        assert windows is not None
        assert windows["camera"].valid.sum(1).tolist() == [8, CONTEXT + AHEAD]

    def test_continue_is_not_discounted(self) -> None:
        agent = make_policy().agent
        with torch.no_grad():
            agent.world.cont.out.weight.zero_()
            agent.world.cont.out.bias.fill_(float(torch.logit(torch.tensor(1 - 1 / 333))))
        _, cont = imagination.predict_heads(agent, agent.world.rssm.initial(2))
        np.testing.assert_allclose(cont, 1.0, atol=1e-4)


def rewards_of(env: Any) -> list[float]:
    env.reset(seed=1)
    return [env.step(np.array([0.5], np.float32))[1] for _ in range(3)]


class TestEnvironments:
    def test_kinds_of_names(self) -> None:
        assert isinstance(build_env(Walk, {"length": 3}).unwrapped, Walk)
        assert build_env("CartPole-v1").render_mode == "rgb_array"
        path = f"{RandomEnv.__module__}.RandomEnv"
        assert isinstance(build_env(path, {"length": 3}).unwrapped, RandomEnv)

    @pytest.mark.parametrize("observation", ["state", "pixels"])
    def test_gymnasium_ids_take_the_env_config_of_training(self, observation: str) -> None:
        config = {"observation": observation, "action_repeat": 2, "g": 9.0}
        config |= {"size": 32} if observation == "pixels" else {}
        built, trained = build_env("Pendulum-v1", config), make_env("Pendulum-v1", config)
        assert built.observation_space == trained.observation_space
        assert built.unwrapped.g == 9.0 and built.render_mode == "rgb_array"
        assert rewards_of(built) == rewards_of(trained)

    def test_a_name_registered_with_tune(self) -> None:
        from ray import tune

        tune.register_env("walk-of-this-test", Walk)
        env = build_env("walk-of-this-test", {"length": 4})
        assert isinstance(env.unwrapped, Walk) and env.unwrapped.config == {"length": 4}

    def test_unknown_or_not_installed(self) -> None:
        with pytest.raises(ValueError, match="CartPole-v1"):
            build_env("CartPole-v9")
        with pytest.raises(ValueError, match=r"Unknown env 'no_such_package\.Env'"):
            build_env("no_such_package.Env")

    def test_only_environments_are_called(self) -> None:
        with pytest.raises(ValueError, match=r"'os\.system' is not a class of gymnasium\.Env"):
            build_env("os.system", {"length": 3})

    def test_of_another_kind(self) -> None:
        with pytest.raises(ValueError, match=r"observation_space is .* policy was trained on"):
            check_spaces(build_env("CartPole-v1"), CAMERA, ARM)


class TestEvaluate:
    def test_same_seed_same_result(self) -> None:
        first, second = (
            evaluate(make_policy(), Walk, {"length": 9}, episodes=2, rules=Rules(greedy=False))
            for _ in range(2)
        )
        assert first.summary == second.summary
        a, b = (x.world.images["camera"].posterior.psnr for x in (first, second))
        np.testing.assert_array_equal(a, b)

    def test_an_env_without_pictures(self) -> None:
        blind = spaces.Box(-1.0, 1.0, (3,), np.float32)
        found = evaluate(
            make_policy(blind, spaces.Discrete(3)),
            RandomEnv,
            {"observation_space": blind, "length": 7},
            episodes=2,
        )
        assert not found.clips and not found.world.images
        assert found.world.vectors["vector"][0] > 0

    @pytest.mark.parametrize("shown", [{"joints"}, set()])
    def test_what_is_not_decoded_is_left_out(self, shown: set[str]) -> None:
        policy = make_policy()
        world = policy.agent.world
        specs = {key: obs_spec(key, space) for key, space in policy.observation_leaves.items()}
        kept = {key: spec for key, spec in specs.items() if key in shown}
        world.decoder = Decoder(kept, world.config) if kept else None
        found = evaluate(policy, Walk, {"length": 60}, episodes=1).world
        assert (set(found.vectors), set(found.images)) == (shown, set())
        assert found.heads_open_loop is not None
        obs = {key: np.stack([space.sample()] * 3) for key, space in CAMERA.items()}
        imagined = policy.imagine(obs, np.zeros((4, 2), np.float32)).obs
        assert imagined["camera"] is None and (imagined["joints"] is None) == (not shown)

    def test_an_env_that_is_drawn(self) -> None:
        env = build_env("CartPole-v1")
        policy = make_policy(env.observation_space, env.action_space)
        found = evaluate(policy, "CartPole-v1", episodes=1, rules=Rules(max_steps=3))
        assert found.clips["best"].frames.shape[0] == len(found.records[0].rewards) + 1
        assert found.clips["best"].frames.std() > 0 and "open_loop" not in found.clips

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"episodes": 0}, "episodes: got 0; must be at least 1"),
            ({"num_envs": 0}, "num_envs: got 0; must be at least 1"),
            ({"rules": Rules(max_steps=0)}, "max_steps: got 0; must be at least 1"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(make_policy(), Walk, **change)


class TestCommand:
    @pytest.fixture(scope="class")
    def results(self, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """What the command writes for an experiment's folder."""
        folder = tmp_path_factory.mktemp("results")
        with pytest.raises(SystemExit) as ended:
            words = ["evaluate", str(saved.parents[1]), "--episodes", "4", "--num-envs", "2"]
            cli.main([*words, "--save-dir", str(folder)])
        assert ended.value.code == 0
        assert not ray.is_initialized()
        return folder

    def test_what_an_earlier_evaluation_left_goes(self, tmp_path: Path) -> None:
        (tmp_path / "open_loop.mp4").write_bytes(b"of another policy")
        (tmp_path / "notes.mp4").write_bytes(b"not ours")
        env = build_env("CartPole-v1")
        policy = make_policy(env.observation_space, env.action_space)
        rules = Rules(max_steps=2, draw=False)
        found = evaluate(policy, "CartPole-v1", episodes=1, rules=rules)
        names = {path.name for path in write_results(found, tmp_path)}
        assert names == {"metrics.json", "episodes.csv", "report.html"}
        assert {path.name for path in tmp_path.iterdir()} == names | {"notes.mp4"}

    def test_metrics_come_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They tell that an evaluation is complete."""
        found = evaluate(make_policy(), Walk, episodes=1, rules=Rules(max_steps=2))
        write_results(found, tmp_path)

        def full(*arguments: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("rllib_dreamer.evaluation.report.write_report", full)
        with pytest.raises(OSError, match="no space left"):
            write_results(found, tmp_path)
        assert not (tmp_path / "metrics.json").exists()

    def test_results_have_a_folder_of_their_own(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", str(saved), "--episodes", "1", "--max-steps", "2"])
        assert ended.value.code == 0
        (folder,) = (tmp_path / "evaluations").iterdir()
        assert (folder / "metrics.json").is_file()

    def test_the_config_of_the_training_holds_within_its_family(self) -> None:
        policy = make_policy()
        policy.env, policy.env_config = "dmc/walker-walk", {"action_repeat": 4}
        for env, expected in (
            (None, {"action_repeat": 4, "size": 32}),
            ("DMC/walker/run", {"action_repeat": 4, "size": 32}),
            ("CartPole-v1", {"size": 32}),
        ):
            assert environment(policy, env, {"size": 32}) == (env or policy.env, expected)

    def test_metrics(self, results: Path) -> None:
        found = json.loads((results / "metrics.json").read_text())
        assert found["returns"]["n"] == 4
        assert found["returns"]["mean"] == sum(range(13))
        assert found["lengths"]["mean"] == 12 and found["greedy"] is True
        assert found["returns"]["iqm_low"] <= found["returns"]["iqm"]
        image = found["world_model"]["images"]["camera"]
        assert 0 < image["posterior"]["ssim"] < 1 and image["posterior"]["frames"] == 4 * 13
        assert image["open_loop"]["ahead"]["step"] == list(range(1, 13 - CONTEXT + 1))
        heads = found["world_model"]["heads"]
        assert heads["posterior"]["reward_mae"] > 0 and heads["open_loop"]["cont_brier"] > 0

    def test_episodes(self, results: Path) -> None:
        with (results / "episodes.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["seed"] for row in rows] == ["0", "1", "2", "3"]
        assert {row["end"] for row in rows} == {"truncated"}
        assert {row["return"] for row in rows} == {"78"}

    def test_films(self, results: Path) -> None:
        for name in ("best", "median", "worst"):
            assert imageio_ffmpeg.count_frames_and_secs(str(results / f"{name}.mp4"))[0] == 13
        assert imageio_ffmpeg.count_frames_and_secs(str(results / "open_loop.mp4"))[0] == 13

    def test_report_is_one_file(self, results: Path) -> None:
        page = (results / "report.html").read_text()
        assert page.count("data:video/mp4") == 4 and page.count("data:image/png") >= 4
        assert not re.search(r'(src|href)="(?!data:)', page)
        assert "Open loop" in page and "IQM" in page

    def test_report_fits_a_narrow_screen(self, results: Path, tmp_path: Path) -> None:
        """Says so itself, and in each installed browser nothing is wider than the window."""
        page = (results / "report.html").read_text()
        assert 'name="viewport" content="width=device-width' in page
        script = (
            "<script>onload=()=>document.title='wide '+document.documentElement.scrollWidth"
            "+' '+[...document.images].every(i=>i.naturalWidth>0)</script>"
        )
        path = tmp_path / "page.html"
        path.write_text(page.replace("</main>", f"</main>{script}"))
        for browser in filter(None, map(shutil.which, ("chromium", "google-chrome"))):
            words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            words += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}"]
            words += ["--window-size=500,800", path.as_uri()]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            found = re.search(r"<title>wide (\d+) (\w+)</title>", done.stdout)
            assert found is not None, done.stderr[-500:]
            assert int(found[1]) <= 500 and found[2] == "true"

    def test_an_exported_policy_on_another_env(self, saved: Path, tmp_path: Path) -> None:
        policy = DreamerPolicy.from_checkpoint(saved)
        policy.export(tmp_path / "exported", formats=())
        (tmp_path / "envs.py").write_text(
            "from ray import tune\nfrom test_evaluate_command import Walk\n"
            "class Own(Walk):\n    pass\n"  # of a module that nothing else can import
            "tune.register_env('my-walk', Own)\n"
        )
        with pytest.raises(SystemExit) as ended:
            cli.main(
                [
                    *("evaluate", str(tmp_path / "exported"), "--env", "my-walk"),
                    *("--env-config", '{"length": 6}', "--file", str(tmp_path / "envs.py")),
                    *("--episodes", "2", "--sample", "--seed", "5", "--max-steps", "7"),
                    *("--save-dir", str(tmp_path / "results")),
                ]
            )
        assert ended.value.code == 0
        found = json.loads((tmp_path / "results" / "metrics.json").read_text())
        assert found["env"] == "my-walk" and found["env_config"] == {"length": 6}
        assert found["lengths"]["max"] == 7 and found["episodes_cut"] == 2
        assert found["greedy"] is False and found["seed"] == 5

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["nowhere"], "nowhere does not exist"),
            (["best", "--storage-path", "{tmp}"], "has a finished checkpoint"),
            (["{saved}", "--env-config", "{{"], "--env-config: "),
            (["{saved}", "--env-config", "[1]"], "must be like"),
            (["{saved}", "--file", "gone.py"], "no such file: gone.py"),
            (["{saved}", "--env", "Walker-v99"], "Walker-v99"),
            (["{saved}", "--env", "CartPole-v1"], "the policy was trained on"),
            (["{saved}", "--which", "first"], "must be one of best, last"),
            (["{saved}", "--episodes", "0"], "--episodes"),
            (["{saved}", "--device", "gpu"], "--device: got 'gpu'; must be cpu or cuda"),
            (["{saved}", "--save-dir", "{saved}/manifest.json"], "--save-dir: "),
        ],
    )
    def test_mistakes_take_one_line(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        words: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        words = [word.format(saved=saved, tmp=tmp_path) for word in words]
        assert message in fails(capsys, "evaluate", *words)

    @pytest.mark.parametrize("at", ["reset", "step"])
    def test_an_env_that_raises_takes_one_line(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        at: str,
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no OpenGL")

        monkeypatch.setattr(RandomEnv, at, fail)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", str(saved)])
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 1
        assert len(lines) == 1 and f"raised in {at}()" in lines[0] and "no OpenGL" in lines[0]

    def test_a_broken_file_is_named(
        self, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.py").write_text("1 / 0")
        line = fails(capsys, "evaluate", str(saved), "--file", str(tmp_path / "bad.py"))
        assert "bad.py fails: ZeroDivisionError" in line

    def test_a_missing_extra_takes_one_line(self) -> None:
        """In a process of its own, in which what the extra brings cannot be imported."""
        code = """
import sys
for name in ("matplotlib", "torchmetrics", "imageio_ffmpeg"):
    sys.modules[name] = None
from rllib_dreamer import cli
for words in (["evaluate", "--episodes", "3", "x"], ["plot", "y"], ["--help"]):
    try:
        cli.main(words)
    except SystemExit as ended:
        print("code", ended.code, file=sys.stderr)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert re.findall(r"code (\d)", done.stderr) == ["2", "2", "0"], done.stderr
        for command in ("evaluate", "plot"):
            line = rf'rllib: {command} needs \w+, .*; type: pip install "rllib-dreamer\[eval\]"'
            assert re.search(line, done.stderr), done.stderr
            assert command in done.stdout

    def test_commands_are_imported_when_they_are_used(self) -> None:
        code = "import sys; import rllib_dreamer.cli.app; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "rllib_dreamer.cli.app" in done.stdout, done.stderr
        assert not {"matplotlib", "torchmetrics"} & set(done.stdout.split())

    def test_the_docs_name_every_option(self) -> None:
        page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text()
        options = [
            name
            for option in typer.main.get_command(cli_app.app).get_command(None, "evaluate").params
            for name in option.opts
            if name.startswith("--") and name != "--verbose"
        ]
        assert len(options) > 8
        assert [name for name in options if f"`{name}`" not in page] == []

    def test_plot_is_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["plot", str(tmp_path)])
        assert ended.value.code == 2
        assert "holds no result.json" in capsys.readouterr().err
