"""What a run reports: metrics in Tune's files and in the docs, and films."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from ray import tune
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune import Result
from tensorboardX.proto.event_pb2 import Event
from tiny import (
    CONTINUOUS,
    MIXED,
    VECTOR,
    RandomEnv,
    agent_of,
    built,
    learner_of,
    start_ray,
    tiny_config,
    train_until,
)

from rllib_dreamer.dreamer import DreamerConfig
from rllib_dreamer.evaluation import training_videos
from rllib_dreamer.evaluation.recorder import EPISODE, VIDEOS, open_loop_frames
from rllib_dreamer.evaluation.training_videos import CONTEXT, Film, write_event
from rllib_dreamer.evaluation.wandb_logger import VideoWandbLogger

DOCS = Path(__file__).resolve().parents[1] / "docs"
LENGTH = 12  # of an episode
T = 8  # of a sequence


def filmed_config(**env_config: Any) -> DreamerConfig:
    """Films as often as it can, evaluates beside training in every second iteration."""
    spaces = {"observation_space": MIXED, "action_space": CONTINUOUS} | env_config
    config = tiny_config(RandomEnv, length=LENGTH, terminated=False, **spaces)
    config.evaluation(evaluation_interval=2, evaluation_duration=1)
    return config.reporting(video_interval_s=0, min_sample_timesteps_per_iteration=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run under Tune, with evaluation in parallel to training."""
    start_ray()
    config = filmed_config().evaluation(
        evaluation_num_env_runners=1, evaluation_parallel_to_training=True
    )
    config.env_runners(num_envs_per_env_runner=2)
    folder = tmp_path_factory.mktemp("storage")
    settings = tune.RunConfig(storage_path=str(folder), stop={"training_iteration": 10}, verbose=0)
    return tune.Tuner("DreamerTorch", param_space=config, run_config=settings).fit()[0]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def events(folder: Path) -> Iterator[Event]:
    """The events of all event files in a folder, by the format of TFRecord."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # then 4 bytes of checksum, before and after
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def read_film(path: Path) -> np.ndarray:
    """Frames (T, H, W, 3) of an MP4 file."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    return np.stack(frames).reshape(-1, height, width, 3)


class TestLoggers:
    def test_tensorboard_gets_finite_scalars(self, run: Result) -> None:
        values = [v for event in events(Path(run.path)) for v in event.summary.value]
        scalars = {v.tag: v.simple_value for v in values if v.HasField("simple_value")}
        assert all(math.isfinite(value) for value in scalars.values())
        for name in (
            "dreamer/env_steps",
            "learners/default_policy/loss_camera",
            "evaluation/env_runners/episode_return_mean",
        ):
            assert f"ray/tune/{name}" in scalars

    def test_csv_and_json_hold_the_same_plain_numbers(self, run: Result) -> None:
        with (Path(run.path) / "progress.csv").open() as file:
            rows = list(csv.DictReader(file))
        results = [json.loads(x) for x in (Path(run.path) / "result.json").read_text().splitlines()]
        assert len(rows) == len(results) == 10
        ended = False
        for row, result in zip(rows, results, strict=True):
            ended |= result["env_runners"]["num_episodes"] > 0
            known = math.isfinite(float(row["env_runners/episode_return_mean"]))
            assert known == ended
            assert row["dreamer/agent_steps"] == str(result["dreamer"]["agent_steps"])
            plain = {key: x for key, x in flat(result) if not key.startswith("config/")}
            assert all(not isinstance(value, list) for value in plain.values())
            numbers = {key: x for key, x in plain.items() if isinstance(x, float)}
            unknown = {key for key, x in numbers.items() if not math.isfinite(x)}
            # Others are NaN until the first episode, evaluation or update has ended.
            ours = r"dreamer/|learners/default_policy/(?!num_)"
            ours += "|env_runners/episode_[rl]" if ended else ""
            assert not [key for key in unknown if re.match(ours, key)]
            assert not [key for key in plain if key.endswith(EPISODE)]

    def test_wandb_gets_films_as_videos(self, run: Result, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[dict[str, Any]] = []
        monkeypatch.setattr(
            WandbLoggerCallback,
            "log_trial_result",
            lambda self, i, trial, result: seen.append(result),
        )
        film = next((Path(run.path) / VIDEOS).glob("open_loop_*.mp4"))
        logger = VideoWandbLogger(project="p")
        logger.log_trial_result(1, None, {"x": 1, VIDEOS: {"a": str(film), "b": "/not/there.mp4"}})
        logger.log_trial_result(2, None, {"x": 2})
        assert seen[0]["x"] == 1 and list(seen[0][VIDEOS]) == ["a"]
        assert seen[0][VIDEOS]["a"]._path == str(film)
        assert seen[1] == {"x": 2, VIDEOS: {}}


def documented(section: str) -> list[str]:
    """Names in the table of a section of docs/metrics.md, `<leaf>` as a pattern."""
    text = (DOCS / "metrics.md").read_text()
    (body,) = re.findall(rf"^## `{re.escape(section)}`\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    cells = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `")]
    return [
        re.escape(n).replace("<leaf>", "[a-z]+") for c in cells for n in re.findall("`(.+?)`", c)
    ]


@pytest.mark.parametrize("section", ["dreamer/", "learners/default_policy/"])
def test_the_docs_list_every_metric(run: Result, section: str) -> None:
    reported = {k.removeprefix(section) for k, _ in flat(run.metrics) if k.startswith(section)}
    names = documented(section)
    assert len(names) > 5
    assert [x for x in reported if not any(re.fullmatch(name, x) for name in names)] == []
    assert [name for name in names if not any(re.fullmatch(name, x) for x in reported)] == []


class TestFilms:
    def test_of_a_run(self, run: Result) -> None:
        folder = Path(run.path) / VIDEOS
        film = read_film(sorted(folder.glob("open_loop_camera_*.mp4"))[-1])
        assert len(film) == T
        border = film[:, 1, 1].astype(int)  # green while it observes, then red
        assert (border[:CONTEXT, 1] > border[:CONTEXT, 0] + 50).all()
        assert (border[CONTEXT:, 0] > border[CONTEXT:, 1] + 50).all()
        assert len(read_film(min(folder.glob("evaluation_episode_*.mp4")))) == LENGTH + 1

    def test_of_a_run_in_tensorboard(self, run: Result) -> None:
        values = [v for e in events(Path(run.path) / VIDEOS) for v in e.summary.value]
        pictures = {v.tag: v.image.encoded_image_string for v in values}
        assert pictures.keys() == {"videos/open_loop_camera", "videos/evaluation_episode"}
        assert all(picture.startswith(b"GIF89a") for picture in pictures.values())

    def test_results_name_the_files(self, run: Result) -> None:
        lines = (Path(run.path) / "result.json").read_text().splitlines()
        named = {file for line in lines for file in json.loads(line).get(VIDEOS, {}).values()}
        assert named and named <= {str(x) for x in (Path(run.path) / VIDEOS).glob("*.mp4")}

    def test_open_loop_sees_only_the_context(self) -> None:
        with built(filmed_config()) as algo:
            train_until(algo, 1)
            rows = algo.replay.peek(np.random.default_rng(0), 3)
            learner = learner_of(algo)
            film = open_loop_frames(learner, rows, CONTEXT)["camera"]
            later = {key: x.copy() for key, x in rows.items()}
            later["obs/camera"][:, CONTEXT + 1 :] = 0
            np.testing.assert_array_equal(open_loop_frames(learner, later, CONTEXT)["camera"], film)
            later["obs/camera"][:, CONTEXT] = 0
            assert film.shape == (3, T, 32, 32, 3)
            assert (open_loop_frames(learner, later, CONTEXT)["camera"][:, -1] != film[:, -1]).any()
            agent_of(algo).world.decoder = None
            assert open_loop_frames(learner, rows, CONTEXT) == {}

    def test_training_goes_the_same_way_with_films(self) -> None:
        ends = []
        for interval in (0, None):
            with built(filmed_config().reporting(video_interval_s=interval)) as algo:
                train_until(algo, 3)
                ends.append(algo.replay.sample())
                ends[-1]["random"] = torch.rand(3).numpy()
        for key in ends[0]:
            np.testing.assert_array_equal(ends[0][key], ends[1][key], err_msg=key)

    def test_of_an_evaluation_in_several_rounds(self) -> None:
        config = filmed_config().evaluation(
            evaluation_interval=1,
            evaluation_duration="auto",
            evaluation_num_env_runners=1,
            evaluation_parallel_to_training=True,
        )
        with built(config) as algo:
            two_rounds, rounds = threading.Event(), 0
            fetch = algo.eval_env_runner_group.foreach_env_runner_async_fetch_ready

            def fetch_and_count(*args: Any, **kwargs: Any) -> list[Any]:
                nonlocal rounds
                ended = fetch(*args, **kwargs)
                rounds += len(ended)
                if rounds >= 2:
                    two_rounds.set()
                return ended

            train = algo.training_step

            def train_beside_two_rounds() -> None:
                assert two_rounds.wait(timeout=300)  # RLlib drops what comes after training's end
                train()

            algo.eval_env_runner_group.foreach_env_runner_async_fetch_ready = fetch_and_count
            algo.training_step = train_beside_two_rounds
            algo.train()
            folder = Path(algo.logdir) / VIDEOS
        assert len([*folder.glob("evaluation_episode_*.mp4")]) == 1

    def test_a_film_of_an_evaluation_is_written_once(self) -> None:
        with built(filmed_config()) as algo:
            for _ in range(5):
                algo.train()
            folder = Path(algo.logdir) / VIDEOS
        steps = [int(x.stem.rsplit("_", 1)[1]) for x in folder.glob("evaluation_episode_*.mp4")]
        assert sorted(steps) == [16, 32]  # of the second and the fourth iteration

    def test_a_recording_in_a_checkpoint_is_dropped(self, tmp_path: Path) -> None:
        """Checkpoints of earlier versions hold one, in a form that others cannot be merged with."""
        config = filmed_config().evaluation(evaluation_interval=1)
        key = ("evaluation", "env_runners", EPISODE)
        with built(config) as algo:
            algo.metrics.log_value(key, np.zeros((1, 8, 8, 3), np.uint8), reduce="item")
            path = algo.save_to_path(tmp_path / "c")
        with built(config.copy(copy_frozen=False)) as algo:
            algo.restore_from_path(path)
            assert algo.train()["evaluation"]["env_runners"]["num_episodes"] == 1

    def test_none_are_made_before_the_replay_has_a_sequence_again(self, tmp_path: Path) -> None:
        config = filmed_config().training(store_buffer_in_checkpoints=False)
        config.reporting(min_sample_timesteps_per_iteration=1)
        with built(config) as algo:
            train_until(algo, 1)
            path = algo.save_to_path(tmp_path / "c")
        with built(config.copy(copy_frozen=False)) as algo:
            algo.restore_from_path(path)
            algo.train()
            assert algo._updates and not algo.replay.num_sequences

    def test_without_pictures_there_are_none(self) -> None:
        with built(filmed_config(observation_space=VECTOR)) as algo:
            train_until(algo, 2)
            assert VIDEOS not in algo.train()

    def test_one_that_fails_costs_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*args: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(training_videos, "write_event", fail)
        with caplog.at_level(logging.WARNING), built(filmed_config()) as algo:
            train_until(algo, 2)
        assert "the film open_loop_camera could not be written: disk full" in caplog.text

    def test_long_ones_are_thinned_out_for_tensorboard(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (250, 8, 8, 3), np.uint8)
        write_event(tmp_path, Film("long", frames, 20.0, 7))
        (event,) = [event for event in events(tmp_path) if event.summary.value]
        picture = event.summary.value[0].image.encoded_image_string
        assert event.step == 7
        assert picture.count(b"\x21\xf9\x04") == 84  # every third frame

    def test_settings_are_checked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="`video_interval_s`=-1 must be None or a number >= 0"):
            filmed_config().reporting(video_interval_s=-1).validate()
        monkeypatch.setattr("rllib_dreamer.setting_checks.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"`video_interval_s`=0 needs .*rllib-dreamer\[eval\]"):
            filmed_config().validate()
