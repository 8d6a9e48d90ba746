"""One evaluation: plays the episodes, measures, and writes what came out.

metrics.json   everything in numbers
episodes.csv   one row an episode
best.mp4, median.mp4, worst.mp4, open_loop.mp4
report.html    all of it on one page
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rllib_dreamer.atomic import write_text
from rllib_dreamer.envs import EnvSource, action_repeat
from rllib_dreamer.evaluation import videos
from rllib_dreamer.evaluation.environments import build_env, can_render, check_spaces
from rllib_dreamer.evaluation.episodes import Episode, Rules, play
from rllib_dreamer.evaluation.statistics import (
    EpisodeSummary,
    RepresentativeEpisodes,
    representative_episodes,
    summarize_episodes,
)
from rllib_dreamer.evaluation.world_model import WorldModelProbe, WorldModelResult
from rllib_dreamer.policy.imagination import CONTEXT
from rllib_dreamer.policy.plain_json import to_plain
from rllib_dreamer.policy.policy import DreamerPolicy, SeededNoise
from rllib_dreamer.spaces import is_image

FILMS = (*RepresentativeEpisodes._fields, "open_loop")
"""Names of the films that an evaluation may have."""

_GRID_WINDOWS = 4  # sequences side by side in the open-loop video
_DEFAULT_FPS = 20.0


class Record(NamedTuple):
    """A played episode without its observations; `rewards` (T,)."""

    number: int
    rewards: NDArray[np.float32]
    terminated: bool
    cut: bool
    success: bool | None

    @property
    def total_return(self) -> float:
        """Sum of the rewards, not discounted."""
        return float(self.rewards.sum(dtype=np.float64))


class Clip(NamedTuple):
    """A film, encoded: frames as they are drawn would take a hundred times the room.

    Attributes:
        mp4: Content of the file.
        poster: Its first frame as a PNG.
    """

    mp4: bytes
    poster: bytes


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        env: Name of the environment.
        env_config: Its config.
        rules: How the episodes were played.
        about: Where the policy comes from.
        records: The episodes, by number.
        summary: Their returns and lengths.
        world: The world model's errors.
        repeat: Env steps per agent step.
        seconds: How long it took.
        clips: Films by name, see `FILMS`; none without pictures.
    """

    env: str
    env_config: dict[str, Any]
    rules: Rules
    about: dict[str, Any]
    records: list[Record]
    summary: EpisodeSummary
    world: WorldModelResult
    repeat: int
    seconds: float
    clips: dict[str, Clip]

    @property
    def success_rate(self) -> float | None:
        """Share of successes among the episodes that tell; None if none does."""
        told = [record.success for record in self.records if record.success is not None]
        return sum(told) / len(told) if told else None

    @property
    def chosen(self) -> RepresentativeEpisodes:
        """The best, the median and the worst episode."""
        return representative_episodes([record.total_return for record in self.records])


def evaluate(
    policy: DreamerPolicy,
    env: EnvSource,
    env_config: Mapping[str, Any] | None = None,
    *,
    episodes: int = 20,
    num_envs: int | None = None,
    rules: Rules | None = None,
    on_progress: Callable[[int, int], None] = lambda finished, steps: None,
) -> Evaluation:
    """Plays episodes and measures returns and the world model.

    Args:
        policy: The policy; its noise is seeded by `rules.seed`.
        env: See `environments.build_env`.
        env_config: Of the environment.
        episodes: How many, at least 1.
        num_envs: Environments side by side; None is 4, and never more than episodes.
        rules: How to play; greedily with seed 0 by default.
        on_progress: Called after every step with the episodes finished and the steps taken so far.

    Returns:
        The result.

    Raises:
        ValueError: If a number is out of range, or the environment is unknown, not installed, or
            not of the kind that the policy was trained on.
    """
    begun, rules = time.monotonic(), rules or Rules()
    for name, value in {"episodes": episodes, "num_envs": num_envs}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}; must be at least 1.")
    if rules.max_steps is not None and rules.max_steps < 1:
        raise ValueError(f"max_steps: got {rules.max_steps}; must be at least 1, or none.")
    config = dict(env_config or {})
    envs = [build_env(env, config) for _ in range(min(episodes, num_envs or 4))]
    try:
        check_spaces(envs[0], policy.observation_space, policy.action_space)
        pictures = any(is_image(leaf) for leaf in policy.observation_leaves.values())
        rules = rules._replace(draw=rules.draw and (pictures or can_render(envs[0])))
        fps = float(envs[0].metadata.get("render_fps") or _DEFAULT_FPS)
        policy.seed(rules.seed)
        probe = WorldModelProbe(
            policy.agent, policy.observation_leaves, episodes, SeededNoise(rules.seed)
        )
        with tempfile.TemporaryDirectory() as folder:
            films, progress = _Films(Path(folder), fps), _Progress(on_progress)
            records = []
            for episode in play(policy, envs, episodes, rules, progress.step):
                probe.add(episode)
                films.add(episode)
                records.append(_record(episode))
                progress.finish()
            records.sort(key=lambda record: record.number)
            world = probe.result()
            clips = films.chosen(records) | _open_loop_clip(world, fps)
    finally:
        for built in envs:
            built.close()
    return Evaluation(
        env=env if isinstance(env, str) else getattr(env, "__name__", str(env)),
        env_config=config,
        rules=rules,
        about=policy.about,
        records=records,
        summary=summarize_episodes(
            [record.total_return for record in records], [len(r.rewards) for r in records]
        ),
        world=world,
        repeat=action_repeat(env, config),
        seconds=time.monotonic() - begun,
        clips=clips,
    )


def write_results(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes the result of an evaluation.

    Args:
        evaluation: The result.
        folder: Made if need be; what an earlier evaluation left in it is removed.

    Returns:
        The files.
    """
    from rllib_dreamer.evaluation.page import evaluation_page
    from rllib_dreamer.evaluation.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "episodes.csv", *(f"{film}.mp4" for film in FILMS), "report.html"):
        (folder / name).unlink(missing_ok=True)
    written = [_write_csv(evaluation, folder / "episodes.csv")]
    for name, clip in evaluation.clips.items():
        path = folder / f"{name}.mp4"
        path.write_bytes(clip.mp4)
        written.append(path)
    written.append(write_report(folder / "report.html", evaluation_page(evaluation)))
    metrics = folder / "metrics.json"  # the last one: where it is, the others are
    write_text(metrics, json.dumps(as_dict(evaluation), indent=1, allow_nan=False) + "\n")
    return [metrics, *written]


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The result in plain dicts and numbers, ready for JSON; what is unknown is None."""
    world = evaluation.world
    images = {
        key: {
            "posterior": {
                "ssim": float(quality.posterior.ssim.mean()),
                "psnr": float(quality.posterior.psnr.mean()),
                "frames": int(quality.posterior.ssim.size),
            },
            "open_loop": _open_loop(quality.open_loop),
            "last_frame_held": _open_loop(quality.still),
        }
        for key, quality in world.images.items()
    }
    vectors = {
        key: {"posterior_rmse": posterior, "open_loop_rmse": ahead}
        for key, (posterior, ahead) in world.vectors.items()
    }
    heads = {
        "posterior": world.heads._asdict(),
        "open_loop": world.heads_open_loop and world.heads_open_loop._asdict(),
    }
    found = {
        "env": evaluation.env,
        "env_config": evaluation.env_config,
        "policy": evaluation.about,
        "greedy": evaluation.rules.greedy,
        "seed": evaluation.rules.seed,
        "max_steps": evaluation.rules.max_steps,
        "action_repeat": evaluation.repeat,
        **evaluation.summary.as_dict(),
        "success_rate": evaluation.success_rate,
        "episodes_cut": sum(record.cut for record in evaluation.records),
        "world_model": {"context": CONTEXT, "images": images, "vectors": vectors, "heads": heads},
        "seconds": evaluation.seconds,
    }
    return {key: to_plain(value) for key, value in found.items()}


class _Progress:
    """Counts steps and episodes for whoever shows them."""

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self.show, self.steps, self.finished = show, 0, 0

    def step(self) -> None:
        self.steps += 1
        self.show(self.finished, self.steps)

    def finish(self) -> None:
        self.finished += 1
        self.show(self.finished, self.steps)


class _Films:
    """The episodes as films in a folder, each encoded as it ends: any may be the median.

    Args:
        folder: Where to keep them.
        fps: Frames shown per second.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        self.folder, self.fps = folder, fps
        self.posters: dict[int, bytes] = {}

    def add(self, episode: Episode) -> None:
        """Encodes an episode, if it was drawn."""
        if episode.frames is not None:
            clip = _clip(episode.frames, self.fps)
            self.posters[episode.index] = clip.poster
            self._file(episode.index).write_bytes(clip.mp4)

    def chosen(self, records: list[Record]) -> dict[str, Clip]:
        """The best, the median and the worst episode, of all by number."""
        found = representative_episodes([record.total_return for record in records])
        return {
            name: Clip(self._file(number).read_bytes(), self.posters[number])
            for name, number in found._asdict().items()
            if number in self.posters
        }

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.mp4"


def _clip(frames: NDArray[np.uint8], fps: float) -> Clip:
    return Clip(videos.encode_mp4(frames, fps), videos.poster_png(frames[0]))


def _record(episode: Episode) -> Record:
    ended = (episode.terminated, episode.cut, episode.success)
    return Record(episode.index, episode.rewards, *ended)


def _open_loop_clip(world: WorldModelResult, fps: float) -> dict[str, Clip]:
    """The film of the first image leaf's open loop, if there is one."""
    for windows in (world.windows or {}).values():
        longest = np.flatnonzero(windows.valid.sum(1) == windows.valid.sum(1).max())
        rows = longest[
            np.linspace(0, len(longest) - 1, min(_GRID_WINDOWS, len(longest))).astype(int)
        ]
        grid = videos.open_loop_grid(windows.model[rows], windows.truth[rows], CONTEXT)
        return {"open_loop": _clip(grid, max(4.0, fps / 2))}
    return {}


def _write_csv(evaluation: Evaluation, path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["episode", "seed", "return", "agent_steps", "env_steps", "end", "success"])
        for record in evaluation.records:
            end = "cut" if record.cut else "terminated" if record.terminated else "truncated"
            steps = len(record.rewards)
            seed = evaluation.rules.seed + record.number
            numbers = (f"{record.total_return:.6g}", steps, steps * evaluation.repeat)
            success = "" if record.success is None else int(record.success)
            table.writerow([record.number, seed, *numbers, end, success])
    return path


def _open_loop(quality: Any) -> dict[str, Any] | None:
    """Quality per step, and its mean over the frames ahead."""
    if quality is None:
        return None
    means = quality.ahead.overall()
    return {**means, "context": quality.context.as_dict(), "ahead": quality.ahead.as_dict()}
