"""DreamerTorch: sampling, replay and learning in step, as RLlib's Algorithm."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from pyarrow.fs import FileSystem, LocalFileSystem
from ray import cloudpickle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_RL_MODULE,
    DEFAULT_AGENT_ID,
    DEFAULT_MODULE_ID,
)
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    LEARN_ON_BATCH_TIMER,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    SAMPLE_TIMER,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from rllib_dreamer import checkpoint
from rllib_dreamer.checkpoint import REPLAY_FOLDER
from rllib_dreamer.dreamer_config import DreamerConfig
from rllib_dreamer.dreamer_torch_learner import DreamerTorchLearner
from rllib_dreamer.envs import action_repeat
from rllib_dreamer.episode_averages import EpisodeAverages
from rllib_dreamer.hardware import release_memory
from rllib_dreamer.learner_calls import (
    on_learners,
    require_saved,
    telling_refusals,
    update_learners,
)
from rllib_dreamer.replay import Replay
from rllib_dreamer.replay_prefetch import Prefetcher
from rllib_dreamer.sampling import Sampler
from rllib_dreamer.training_ratio import TrainingRatio

if TYPE_CHECKING:
    from rllib_dreamer.evaluation.training_videos import TrainingVideos


_TAKE_WEIGHTS = "set_state"
"""RLlib's tag of the requests that `sync_weights` makes."""


class DreamerTorch(Algorithm):
    """DreamerV3 on RLlib's env runners, learners, evaluation and checkpoints."""

    config: DreamerConfig

    @classmethod
    def get_default_config(cls) -> DreamerConfig:
        """The published values."""
        return DreamerConfig()

    def setup(self, config: AlgorithmConfig) -> None:
        """Builds runners, learners and the replay.

        Raises:
            RuntimeError: If no remote env runner could be built.
        """
        try:
            super().setup(config)
        except IndexError as error:  # RLlib asks the first of the runners that came up
            if not config.num_env_runners:
                raise
            raise RuntimeError(
                "no env runner could be built: the errors logged above say why; with "
                "`num_env_runners`=0 the error is raised here."
            ) from error
        cfg = self.config
        self._agent_steps = self._updates = self._replayed_steps = self._training_steps = 0
        self._weights_changed = False  # since the EnvRunners got them
        self._rate_mark = (time.monotonic(), 0, 0)
        self._episodes = EpisodeAverages(cfg.metrics_num_episodes_for_smoothing)
        self._skipped_in_a_row = 0
        self._ratio = TrainingRatio(cfg.training_ratio, cfg.batch_size_B * cfg.batch_length_T)
        self._action_repeat = action_repeat(cfg.env, cfg.env_config)
        self._description = self._on_learners(_describe_learner, [0])[0]
        observation_space, action_space = self.spaces[DEFAULT_MODULE_ID]
        release_memory()  # what an earlier replay left, which else would not count as available
        self.replay = Replay(
            observation_space,
            action_space,
            deter=self._description["deter"],
            stoch=self._description["stoch"],
            capacity=cfg.replay_capacity,
            batch_size=cfg.batch_size_B,
            batch_length=cfg.batch_length_T,
            online=cfg.replay_online,
            seed=cfg.seed,
            directory=self._replay_directory(),
        )
        self._batches = Prefetcher(self.replay, cfg.replay_prefetch)
        self._sampler = Sampler(self.env_runner_group, cfg)
        self._videos = self._training_videos()

    def _replay_directory(self) -> str | None:
        """Where the replay lies on disk: a folder that is the same after a restart.

        Raises:
            ValueError: If it is to lie in the trial's folder, and that is not one of this machine.
        """
        cfg, trial = self.config, self._storage
        if cfg.replay_directory is not None or cfg.replay_storage == "memory":
            return cfg.replay_directory
        if trial is None or not isinstance(trial.storage_filesystem, LocalFileSystem):
            raise ValueError(
                f"replay_storage='disk' puts the replay into the folder of a Tune trial on this "
                f"machine, but {'there is no trial' if trial is None else 'it is remote'}: set "
                "replay_directory to a folder on a fast disk. For a checkpoint, use "
                "DreamerTorch.from_checkpoint(path, config=config), where replay_directory is "
                "the folder of the saved run's replay; or, to start with an empty replay, "
                "replay_storage='memory' and store_buffer_in_checkpoints=False."
            )
        return str(Path(trial.trial_fs_path) / REPLAY_FOLDER)

    def _training_videos(self) -> TrainingVideos | None:
        if self.config.video_interval_s is None:
            return None
        from rllib_dreamer.evaluation.training_videos import TrainingVideos  # has extras

        return TrainingVideos(self.config.video_interval_s, self)

    def _on_learners(self, function: Any, ids: list[int] | None = None) -> list[Any]:
        """Calls a function with all learners, or those of `ids`; results in order of the shards."""
        return on_learners(self.learner_group, function, ids)

    def describe(self) -> str:
        """What was built, for a person: devices, precision, sizes and the replay's memory."""
        cfg, sizes = self.config, self._description
        learners = f"{max(1, cfg.num_learners)} x {sizes['device']}, {sizes['precision']}"
        gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
        hint = "; num_gpus_per_learner=1 uses a GPU" if gpus and sizes["device"] == "cpu" else ""
        where = f"{cfg.num_env_runners} remote" if cfg.num_env_runners else "1 local"
        gb = self.replay.nbytes_at_capacity / 1e9
        return "\n".join(
            [
                f"DreamerTorch {cfg.model_size} on {cfg.env}: {sizes['parameters']:,} parameters",
                f"learners     {learners}, {sizes['threads']} threads{hint}",
                f"env runners  {where} x {cfg.num_envs_per_env_runner} envs",
                f"batch        {cfg.batch_size_B} x {cfg.batch_length_T}, training ratio "
                f"{cfg.training_ratio:g}",
                f"replay       {gb:.2f} GB at {cfg.replay_capacity:,} steps"
                + (f" in {directory}" if (directory := self._replay_directory()) else ""),
            ]
        )

    def training_step(self) -> None:
        """Samples, learns as often as the training ratio asks, hands out the weights."""
        with self.metrics.log_time((TIMERS, SAMPLE_TIMER)):
            self._sample()
        updates = self._due_updates()
        for _ in range(updates):
            with self.metrics.log_time((TIMERS, LEARN_ON_BATCH_TIMER)):
                self._update()
        self._training_steps += 1
        self._weights_changed |= updates > 0
        if self._weights_changed and self._training_steps % self.config.broadcast_interval == 0:
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self._weights_changed = not self._hand_out_weights()

    def _due_updates(self) -> int:
        """Updates that the training ratio asks for, once the replay has enough to learn from.

        That is as many sequences as a batch has steps; a full replay holds all it ever will.
        """
        enough = self.config.batch_size_B * self.config.batch_length_T
        if self.replay.num_sequences >= enough or self.replay.is_full:
            return self._ratio.updates(self._agent_steps)
        self._ratio.restart()
        return 0

    def _hand_out_weights(self) -> bool:
        """Gives the EnvRunners the weights; returns whether all take them.

        RLlib gives none to a remote one that has not taken its last ones yet.
        """
        group = self.env_runner_group
        if not group.num_remote_env_runners():  # RLlib would take a way over the object store
            learner = COMPONENT_LEARNER
            part = f"{learner}/{COMPONENT_RL_MODULE}"
            state = self.learner_group.get_state(components=part, inference_only=True)[learner]
            group.local_env_runner.set_state(state)
            return True
        group.fetch_ready_async_reqs(tags=_TAKE_WEIGHTS)
        late = group.num_in_flight_async_reqs(_TAKE_WEIGHTS)
        group.sync_weights(from_worker_or_learner_group=self.learner_group, inference_only=True)
        return late == 0

    def _sample(self) -> None:
        """Steps the environments and puts what they gave into the replay."""
        samples = self._sampler.next()
        self.metrics.aggregate(samples.metrics, key=ENV_RUNNER_RESULTS)
        if samples.complete:
            self.replay.end_all_but(samples.episodes)
        for episode in samples.episodes:  # one by one, so that the steps before a refused one count
            self._agent_steps += self.replay.add([episode])

    def _update(self) -> None:
        """One update from one batch, whose fresh latents go back to the replay."""
        batch = self._batches.next()
        index = batch.pop("index")
        if not self.config.replay_context:
            batch["is_first"][:, 1] = True
        timesteps = {NUM_ENV_STEPS_SAMPLED_LIFETIME: self._agent_steps}
        results = update_learners(self.learner_group, self._shards(batch), timesteps)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        latents = self._on_learners(lambda learner: learner.take_latents())
        skipped = None in latents
        self._count_skipped(skipped)
        if not skipped and self.config.replay_context:
            deter, stoch = (np.concatenate(parts) for parts in zip(*latents, strict=True))
            self.replay.update_latents(index[:, 1:], deter, stoch)
        self._updates += 1
        self._replayed_steps += self.config.batch_size_B * self.config.batch_length_T

    def _count_skipped(self, skipped: bool) -> None:
        """Counts updates that the learners skipped, here, where the error reaches the user."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        most = self.config.max_nonfinite_updates
        if self._skipped_in_a_row >= most:
            raise RuntimeError(
                f"{most} updates in a row had a NaN or infinite gradient "
                f"(max_nonfinite_updates={most}): look at the losses, "
                "check observations and rewards for NaN, lower lr, or use precision='float32'; the "
                "last checkpoint is from before."
            )

    def _shards(self, batch: dict[str, np.ndarray]) -> list[MultiAgentBatch]:
        """The batch, cut in rows for the learners."""
        learners = max(1, self.config.num_learners)
        rows = self.config.batch_size_B // learners
        steps = rows * self.config.batch_length_T
        cut = [
            {key: x[i * rows : (i + 1) * rows] for key, x in batch.items()} for i in range(learners)
        ]
        return [MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(c)}, env_steps=steps) for c in cut]

    def step(self) -> dict[str, Any]:
        """One iteration; adds the counters that RLlib does not keep."""
        result: dict[str, Any] = super().step()
        self._average_episodes(result.setdefault(ENV_RUNNER_RESULTS, {}))
        self._on_learners(lambda learner: release_memory())
        now, (then, agent_steps, updates) = time.monotonic(), self._rate_mark
        elapsed = max(now - then, 1e-9)
        self._rate_mark = (now, self._agent_steps, self._updates)
        stats = self.replay.stats()
        result["dreamer"] = {
            "agent_steps": self._agent_steps,
            "env_steps": self._agent_steps * self._action_repeat,
            "updates": self._updates,
            "actual_training_ratio": self._replayed_steps / max(1, self._agent_steps),
            "replay_steps": int(stats["steps"]),
            "replay_gb": stats["gb"],
            "agent_steps_per_s": (self._agent_steps - agent_steps) / elapsed,
            "updates_per_s": (self._updates - updates) / elapsed,
        }
        if self._videos is not None:
            self._videos.report(result)
        return result

    def _before_evaluate(self) -> None:
        """RLlib's hook.

        Raises:
            ValueError: If there are no env runners to evaluate with. RLlib would take those of the
                training, which sample their actions and would cut their episodes off.
        """
        super()._before_evaluate()
        if self.eval_env_runner_group is None:
            raise ValueError(
                "evaluate() needs env runners of its own, which act greedily: set "
                "config.evaluation(evaluation_interval=...), or evaluation_num_env_runners=1."
            )

    def _average_episodes(self, results: dict[str, Any]) -> None:
        """Averages over the latest `metrics_num_episodes_for_smoothing` episodes, or a few more.

        RLlib's are over those that ended in this iteration, and are missing before the first, while
        Tune needs its `metric` and the columns of `progress.csv` from the first result on.
        """
        latest = self._episodes.add(int(results.get(NUM_EPISODES, 0)), results)
        results.update(latest)
        results["agent_episode_return_mean"] = {DEFAULT_AGENT_ID: latest[EPISODE_RETURN_MEAN]}
        results["module_episode_return_mean"] = {DEFAULT_MODULE_ID: latest[EPISODE_RETURN_MEAN]}

    def save_to_path(self, path: Any = None, **kwargs: Any) -> str:
        """Saves everything, the replay included, and seals the folder with a manifest.

        Raises:
            ValueError: If the path is no folder of this machine, or the replay on disk lies in it.
            OSError: If it could not be written.
            RuntimeError: If a learner is lost.
        """
        if "://" in str(path) or kwargs.get("filesystem") is not None:
            raise ValueError(
                f"save_to_path takes a folder of this machine, got {path}: save there and copy it, "
                "or let Tune upload checkpoints, tune.RunConfig(storage_path=...)."
            )
        folder = Path(tempfile.mkdtemp() if path is None else path).absolute()
        checkpoint.refuse_around_replay(folder, self._replay_directory())
        with checkpoint.writing(folder) as target:
            super().save_to_path(target, **kwargs)
            require_saved(self.learner_group)
            self._write_construction(target / self.CLASS_AND_CTOR_ARGS_FILE_NAME)
            if self.config.store_buffer_in_checkpoints:
                self.replay.save(target / REPLAY_FOLDER)
        return str(folder)

    def _write_construction(self, file: Path) -> None:
        """Writes what `from_checkpoint` builds us from, with our class as its author wrote it.

        As an actor, as Tune runs it, an object is of a class that Ray made of it. RLlib pickles
        that one by value, and then the names of all our methods must be there when the checkpoint
        is read.
        """
        written = getattr(type(self), "__ray_actor_class__", type(self))
        construction = {"class": written, "ctor_args_and_kwargs": self.get_ctor_args_and_kwargs()}
        file.write_bytes(cloudpickle.dumps(construction))

    def restore_from_path(
        self, path: Any, *args: Any, filesystem: FileSystem | None = None, **kwargs: Any
    ) -> None:
        """Restores everything that the checkpoint holds, or only `component`, as RLlib has it.

        With `store_buffer_in_checkpoints`=False the replay is left as it is, and that of the
        checkpoint may be missing.

        Args:
            path: A folder of this machine, or where `filesystem` or its URI say.
            *args: Of RLlib.
            filesystem: Where the path is from.
            **kwargs: Of RLlib.

        Raises:
            ValueError: If the checkpoint is incomplete or damaged.
            RuntimeError: If remote learners refuse it; a local one raises its own error.
        """
        whole = kwargs.get("component") is None
        with_replay = whole and self.config.store_buffer_in_checkpoints
        with checkpoint.on_this_machine(path, filesystem) as folder:
            if whole:
                checkpoint.verify(folder, without_replay=not with_replay)
            self._sampler.drop()
            self._take_any_weights()
            with telling_refusals(self.learner_group, f"in {path}"):
                super().restore_from_path(folder, *args, **kwargs)
            if with_replay and checkpoint.has_replay(folder):
                self._batches.close()
                self.replay.load(folder / REPLAY_FOLDER)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and our counters; what is learned later does not change it."""
        state: dict[str, Any] = super().get_state(*args, **kwargs)
        if COMPONENT_LEARNER_GROUP in state and self.learner_group.is_local:  # the very tensors
            state[COMPONENT_LEARNER_GROUP] = copy.deepcopy(state[COMPONENT_LEARNER_GROUP])
        state["dreamer"] = {
            "agent_steps": self._agent_steps,
            "action_repeat": self._action_repeat,  # for who reads the policy alone
            "updates": self._updates,
            "replayed_steps": self._replayed_steps,
            "training_steps": self._training_steps,
            "ratio": self._ratio.get_state(),
            "episodes": self._episodes.get_state(),
        }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores RLlib's state and our counters, also those of an earlier time of this run.

        Raises:
            RuntimeError: If remote learners refuse it; a local one raises its own error.
        """
        from rllib_dreamer.evaluation.recorder import forget_episodes

        self._take_any_weights()
        with telling_refusals(self.learner_group, "given"):
            super().set_state(state)
        forget_episodes(self.metrics)
        if "dreamer" in state:
            ours = state["dreamer"]
            self._agent_steps, self._updates = ours["agent_steps"], ours["updates"]
            self._replayed_steps = ours["replayed_steps"]
            self._training_steps = ours["training_steps"]
            self._ratio.set_state(ours["ratio"])
            self._episodes.set_state(ours["episodes"])
            self._rate_mark = (time.monotonic(), self._agent_steps, self._updates)
            self._skipped_in_a_row = 0
            # RLlib saves no count of remote ones alone, and gives those none.
            count = {NUM_ENV_STEPS_SAMPLED_LIFETIME: self._agent_steps}
            self._on_env_runners(lambda runner: runner.set_state(count))

    def _take_any_weights(self) -> None:
        """Lets learners and EnvRunners take the next weights even if older than their own."""
        self._on_learners(_forget_weights_number)
        self._on_env_runners(_forget_weights_number)

    def _on_env_runners(self, function: Callable[[Any], None]) -> None:
        """Calls a function with every EnvRunner, those of the evaluation too."""
        for group in (self.env_runner_group, self.eval_env_runner_group):
            if group is not None:
                group.foreach_env_runner(function)

    def cleanup(self) -> None:
        """Stops our threads and RLlib's parts, and gives the replay's memory back."""
        if self._videos is not None:
            self._videos.close()
        self._batches.close()
        self._sampler.close()
        self.replay.close()
        super().cleanup()
        release_memory()


def _forget_weights_number(component: Any) -> None:
    """Of an EnvRunner or Learner, which else refuse weights that are older than their own."""
    component._weights_seq_no = 0


def _describe_learner(learner: DreamerTorchLearner) -> dict[str, Any]:
    """Widths of the model and what it runs on, asked of a learner."""
    agent = learner.agent()
    return {
        "deter": agent.world.config.deter,
        "stoch": agent.world.config.stoch,
        "parameters": sum(p.numel() for p in agent.parameters() if p.requires_grad),
        "device": str(learner.device),
        "precision": str(agent.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
