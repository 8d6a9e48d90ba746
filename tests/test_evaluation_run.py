"""Playing episodes with a policy and measuring them and the world model."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny import RandomEnv
from walking import ARM, CAMERA, Walk, make_policy

from rllib_dreamer.dreamer_catalog import obs_spec
from rllib_dreamer.envs import make_env
from rllib_dreamer.evaluation.environments import build_env, check_spaces, frame_of
from rllib_dreamer.evaluation.episodes import Episode, Rules, play
from rllib_dreamer.evaluation.run import Clip, evaluate
from rllib_dreamer.evaluation.world_model import AHEAD, CONTEXT, WorldModelProbe, _spread
from rllib_dreamer.model.codec import Decoder
from rllib_dreamer.model.distributions import FixedNoise
from rllib_dreamer.model.sizes import LossConfig
from rllib_dreamer.policy import imagination
from rllib_dreamer.policy.policy import DreamerPolicy


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

    @pytest.mark.parametrize(("limit", "expected"), [(None, [True, False, True]), (2, [False] * 3)])
    def test_a_success_at_any_step_counts(self, limit: int | None, expected: list[bool]) -> None:
        envs = [Walk({"tells": True}) for _ in range(2)]
        found = {e.index: e for e in play(make_policy(), envs, 3, Rules(max_steps=limit))}
        assert [found[index].success for index in range(3)] == expected

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

    @pytest.mark.parametrize("episodes", [1, 20, 40, 1000])
    def test_few_positions_of_each_episode_cover_all_of_their_length(self, episodes: int) -> None:
        """As many of each as the probe takes: 1,000 frames, 40 windows."""
        for total in (1000, 40):
            each = -(-total // episodes)
            phases = (np.arange(episodes) + 0.5) / episodes
            found = np.concatenate([_spread(500, each, phase) for phase in phases])
            assert found.min() >= 0 and found.max() < 500
            quarters, _ = np.histogram(found, 4, (0, 500))
            assert quarters.min() >= 0.9 * quarters.max()
            assert len(np.unique(found)) == min(500, len(found))

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
        places = 81 - CONTEXT - AHEAD + 1
        for actions, starts in zip(given, ([0], [0, places // 2]), strict=True):
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

    def test_a_long_episode_is_measured_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = make_policy()
        episode = self.episode(policy, 150)
        measured, sizes = imagination.predict_heads, []

        def noting(agent: Any, states: Any) -> Any:
            sizes.append(states.deter[..., 0].numel())
            return measured(agent, states)

        monkeypatch.setattr(imagination, "predict_heads", noting)
        monkeypatch.setattr("rllib_dreamer.evaluation.world_model.CONTEXT", 1000)  # no open loop
        probe = self.probe(policy)
        probe.add(episode)
        assert sum(sizes) == 150 and max(sizes) <= imagination.AT_ONCE
        reward, cont = measured(policy.agent, probe._states(episode, np.arange(1, 151)[None]))
        heads = np.concatenate(probe.heads, 1)
        np.testing.assert_allclose(heads[0], reward[0], atol=1e-5)
        np.testing.assert_allclose(heads[2], cont[0], atol=1e-5)
        np.testing.assert_array_equal(heads[1], episode.rewards)

    def test_an_episode_too_short_for_a_window_still_counts(self) -> None:
        policy = make_policy()
        probe = self.probe(policy)
        probe.add(self.episode(policy, CONTEXT - 1))
        found = probe.result()
        assert found.windows is None and found.heads_open_loop is None
        assert found.images["camera"].open_loop is None
        assert np.isfinite(found.vectors["joints"][0]) and np.isnan(found.vectors["joints"][1])

    def test_the_error_of_a_vector_is_over_all_steps_alike(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Episodes of 4 and 61 observations, wrong by 3 and by 1."""

        def zeros(agent: Any, states: Any) -> dict[str, torch.Tensor]:
            lead = states.deter.shape[:2]
            return {"camera": torch.zeros(*lead, 32, 32, 3), "joints": torch.zeros(*lead, 3)}

        policy = make_policy()
        probe = self.probe(policy)
        monkeypatch.setattr(imagination, "decode", zeros)
        for length, off in ((3, 3.0), (60, 1.0)):
            episode = self.episode(policy, length)
            episode.obs["joints"][:] = off
            probe.add(episode)
        posterior, ahead = probe.result().vectors["joints"]
        assert posterior == pytest.approx(math.sqrt((4 * 9 + 61) / 65))
        assert ahead == 1.0

    def test_windows_of_short_and_long_episodes_are_padded(self) -> None:
        policy = make_policy()
        probe = self.probe(policy, 40)
        for length in (7, 60):
            probe.add(self.episode(policy, length))
        windows = probe.result().windows
        assert windows is not None
        assert windows["camera"].valid.sum(1).tolist() == [8, CONTEXT + AHEAD]

    @pytest.mark.parametrize("discount", [1 - 1 / 333, 0.99])
    def test_continue_is_not_discounted(self, discount: float) -> None:
        agent = make_policy().agent
        agent.loss = LossConfig(discount=discount)
        with torch.no_grad():
            agent.world.cont.out.weight.zero_()
            agent.world.cont.out.bias.fill_(float(torch.logit(torch.tensor(discount))))
        _, cont = imagination.predict_heads(agent, agent.world.rssm.initial(2))
        np.testing.assert_allclose(cont, 1.0, atol=1e-4)


def frames_of(clip: Clip) -> np.ndarray:
    """The frames (T, h, w, 3) of an encoded clip."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(clip.mp4)
        frames = imageio_ffmpeg.read_frames(str(path))
        width, height = next(frames)["size"]
        return np.stack([np.frombuffer(x, np.uint8).reshape(height, width, 3) for x in frames])


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

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ((480, 480), (240, 240)),
            ((400, 600), (200, 300)),
            ((257, 700), (129, 350)),
            ((256, 700), (256, 700)),
            ((64, 64), (64, 64)),
            ((1024, 768), (342, 256)),
        ],
    )
    def test_large_frames_are_thinned(self, given: tuple[int, int], kept: tuple[int, int]) -> None:
        class Drawn(Walk):
            render_mode = "rgb_array"

            def render(self) -> Any:
                return np.zeros((*given, 3), np.uint8)

        blind = spaces.Box(-1.0, 1.0, (3,), np.float32)
        frame = frame_of(Drawn(), {"vector": np.zeros(3)}, blind)
        assert frame is not None and frame.shape == (*kept, 3)

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
        frames = frames_of(found.clips["best"])
        assert frames.shape[0] == len(found.records[0].rewards) + 1
        assert frames.std() > 0 and "open_loop" not in found.clips

    def test_each_film_is_that_of_its_episode(self) -> None:
        """Episode k shows the shade 10 k + t at step t."""
        found = evaluate(make_policy(), Walk, episodes=5, num_envs=2)
        for name, number in found.chosen._asdict().items():
            shades = frames_of(found.clips[name]).mean((1, 2, 3))
            np.testing.assert_allclose(shades, 10 * number + np.arange(9 + number), atol=3)

    def test_episodes_are_kept_as_films(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Raw frames of twenty episodes would be gigabytes on disk."""
        written: list[int] = []
        save = np.save
        monkeypatch.setattr(np, "save", lambda *args: (written.append(1), save(*args)))
        found = evaluate(make_policy(), Walk, {"length": 60}, episodes=3)
        assert not written
        for name in found.chosen._asdict():
            clip = found.clips[name]
            assert len(clip.mp4) + len(clip.poster) < 61 * 32 * 32 * 3 / 5
            assert clip.mp4[4:8] == b"ftyp" and clip.poster.startswith(b"\x89PNG")

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
