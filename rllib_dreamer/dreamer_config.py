"""DreamerConfig: every setting and its published value."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllib_dreamer.dreamer_catalog import DreamerCatalog
from rllib_dreamer.dreamer_env_runner import DreamerEnvRunner, RecordingEnvRunner
from rllib_dreamer.dreamer_torch_rl_module import DreamerTorchRLModule
from rllib_dreamer.envs import validate_env
from rllib_dreamer.learner_scaling import Scaled, scale_config
from rllib_dreamer.model.sizes import LossConfig
from rllib_dreamer.part_rates import PartRate
from rllib_dreamer.setting_checks import check_learning_rates, check_settings
from rllib_dreamer.setting_ranges import IGNORED

if TYPE_CHECKING:
    from rllib_dreamer.dreamer_torch_learner import DreamerTorchLearner

logger = logging.getLogger(__name__)

_OTHERS = ("self", "kwargs", "__class__")  # locals of `training` that are no settings
_TRANSLATED = {"use_float16", "use_curiosity", "replay_buffer_config", *IGNORED}
"""Keywords of `training` that are no attributes."""


class DreamerConfig(AlgorithmConfig):
    """Configuration of `DreamerTorch`.

    Two settings matter to most users, `model_size` and `training_ratio`; the others hold the
    published values. Names are those of RLlib's `DreamerV3Config` where the thing is the same.

        config = (
            DreamerConfig()
            .environment("dmc/walker-walk")
            .training(model_size="12M", training_ratio=256)
        )
        config.build_algo().train()
    """

    world_model_lr = PartRate()
    actor_lr = PartRate()
    critic_lr = PartRate()

    def __init__(self, algo_class: type | None = None) -> None:
        """Sets the published values."""
        from rllib_dreamer.dreamer import DreamerTorch

        super().__init__(algo_class=algo_class or DreamerTorch)
        # Model and losses.
        self.model_size = "12M"
        self.horizon_H = 15
        self.gamma = 1.0 - 1.0 / 333.0
        self.gae_lambda = 0.95
        self.entropy_scale = 3e-4
        self.return_normalization_decay = 0.99
        self.free_nats = 1.0
        self.loss_scales: dict[str, float] = {}
        self.actor_grad = "reinforce"
        self.train_actor = True
        self.train_critic = True
        self.symlog_obs: bool | str = "auto"
        # Optimization.
        self.optimizer = "laprop"
        self.grad_clip_norm: float | None = None
        self.lr = 4e-5
        self.world_model_lr = self.actor_lr = self.critic_lr = None
        self.agc = 0.3
        self.warmup_updates = 1000
        self.weight_decay = 0.0
        self.max_nonfinite_updates = 10
        self.precision = "auto"
        self.compile = True
        self.cuda_graphs = False
        self.learner_threads: int | str = "auto"
        # Replay.
        self.training_ratio = 256.0
        self.batch_size_B = 16
        self.batch_length_T = 64
        self.replay_capacity = 1_000_000
        self.replay_online = True
        self.replay_context = True
        self.replay_storage = "memory"
        self.replay_directory: str | None = None
        self.replay_prefetch = 0
        self.store_buffer_in_checkpoints = True
        # What `scale_to_learners` has changed, by name.
        self._scaled_settings: dict[str, Scaled] = {}
        # Sampling.
        self.initial_random_steps = 0
        self.broadcast_interval = 1
        # Reporting.
        self.video_interval_s: float | None = None
        # RLlib's own settings.
        self.train_batch_size = None
        self.env_runner_cls: type | None = DreamerEnvRunner
        self.num_env_runners = 0
        self.rollout_fragment_length = 1
        self.min_time_s_per_iteration = 5
        self.delay_between_env_runner_restarts_s = 5.0  # all other runners wait for it
        self.env_runner_restore_timeout_s = 600.0
        self.evaluation_sample_timeout_s = 3600.0
        self.metrics_num_episodes_for_smoothing = 10
        self.enable_rl_module_and_learner = self.enable_env_runner_and_connector_v2 = True

    def training(
        self,
        *,
        model_size: str = NotProvided,
        training_ratio: float = NotProvided,
        batch_size_B: int = NotProvided,
        batch_length_T: int = NotProvided,
        horizon_H: int = NotProvided,
        gae_lambda: float = NotProvided,
        entropy_scale: float = NotProvided,
        return_normalization_decay: float = NotProvided,
        free_nats: float = NotProvided,
        loss_scales: dict[str, float] = NotProvided,
        actor_grad: str = NotProvided,
        train_actor: bool = NotProvided,
        train_critic: bool = NotProvided,
        symlog_obs: bool | str = NotProvided,
        world_model_lr: Any = NotProvided,
        actor_lr: Any = NotProvided,
        critic_lr: Any = NotProvided,
        optimizer: str = NotProvided,
        agc: float = NotProvided,
        grad_clip_norm: float | None = NotProvided,
        warmup_updates: int = NotProvided,
        weight_decay: float = NotProvided,
        max_nonfinite_updates: int = NotProvided,
        precision: str = NotProvided,
        use_float16: bool = NotProvided,
        compile: bool = NotProvided,
        cuda_graphs: bool = NotProvided,
        learner_threads: int | str = NotProvided,
        replay_capacity: int = NotProvided,
        replay_online: bool = NotProvided,
        replay_context: bool = NotProvided,
        replay_storage: str = NotProvided,
        replay_directory: str | None = NotProvided,
        replay_prefetch: int = NotProvided,
        replay_buffer_config: dict[str, Any] = NotProvided,
        store_buffer_in_checkpoints: bool = NotProvided,
        initial_random_steps: int = NotProvided,
        broadcast_interval: int = NotProvided,
        **kwargs: Any,
    ) -> DreamerConfig:
        """Sets what concerns training.

        Args:
            model_size: "1M", "3M", "12M", "25M", "50M", "100M", "200M" or "400M" parameters; XS, S,
                M, L and XL stand for 12M to 200M, and RLlib's smaller sizes for 1M.
            training_ratio: Replayed steps per agent step, > 0. With 16 x 64 steps a batch, 256
                means one update every 4 agent steps. Held exactly.
            batch_size_B: Rows of a batch over all learners; a multiple of `num_learners`.
            batch_length_T: Trained steps of a row.
            horizon_H: Steps of an imagined trajectory.
            gae_lambda: Lambda of the returns, in [0, 1].
            entropy_scale: Weight of the actor's entropy.
            return_normalization_decay: Decay of the return percentiles, in [0, 1).
            free_nats: KL below which the dynamics and representation losses are constant.
            loss_scales: Weights to change: "rec", "reward", "cont", "dyn", "rep", "actor",
                "critic", "repval".
            actor_grad: How the actor learns: "reinforce", or "dynamics" for gradients through the
                imagined trajectory, for continuous actions only.
            train_actor: Whether the actor learns.
            train_critic: Whether the critic learns; the actor cannot learn without it.
            symlog_obs: Whether vector observations are squashed by symlog; "auto" is True.
            world_model_lr: Learning rate or RLlib schedule of the world model; None takes `lr`.
            actor_lr: The same for the actor.
            critic_lr: The same for the critic.
            optimizer: "laprop" or "adam"; Adam has neither `agc` nor `weight_decay`.
            agc: Largest norm of a tensor's gradient as a share of the tensor's norm.
            grad_clip_norm: Largest norm of all gradients together, or None for no such limit.
            warmup_updates: Updates over which learning rates rise from zero.
            weight_decay: Decoupled weight decay of matrices and kernels.
            max_nonfinite_updates: Updates with NaN or infinite gradients in a row, all skipped,
                after which training stops.
            precision: "float32", "bfloat16" or "auto": bfloat16 where the learner's device is
                faster with it.
            use_float16: True is precision="bfloat16", False is "float32".
            compile: Whether chains of small operations are fused, by native kernels on a CPU and by
                `torch.compile` on CUDA. Without a C compiler they run one by one.
            cuda_graphs: Whether a learner on CUDA captures its forward and backward pass in a CUDA
                graph, after a few updates, and replays that from then on; not with several
                learners. Elsewhere it changes nothing.
            learner_threads: CPU threads of each learner; "auto" takes the CPUs asked for if more
                than one, else all of the machine shared among the learners.
            replay_capacity: Steps that the replay holds.
            replay_online: Whether every fresh sequence is replayed once before any is drawn.
            replay_context: Whether a replayed sequence starts from stored latents, else from
                zero, as an episode does.
            replay_storage: "memory", or "disk" for memory-mapped files, which checkpoints name
                instead of copying them.
            replay_directory: Folder of these files, which implies "disk"; with None they lie in
                the trial's folder, for which there must be a Tune trial.
            replay_prefetch: Batches prepared ahead by a thread; 0 is repeatable across restarts.
            replay_buffer_config: Of RLlib's DreamerV3Config; only "capacity" is read.
            store_buffer_in_checkpoints: Whether checkpoints hold the replay.
            initial_random_steps: Agent steps, over all EnvRunners, whose actions are drawn
                uniformly, to the end of the iteration, before the actor takes over.
            broadcast_interval: Training steps between two updates of the EnvRunners' weights, which
                are those of encoder, RSSM and actor. Remote EnvRunners sample one round ahead of
                the learners and use them from the round after on.
            **kwargs: Of `AlgorithmConfig.training`: `lr`, `gamma`, ....

        Raises:
            ValueError: If curiosity is asked for.
        """
        given = {k: v for k, v in locals().items() if v is not NotProvided and k not in _OTHERS}
        if "use_float16" in given:
            given["precision"] = "bfloat16" if given.pop("use_float16") else "float32"
        buffer_config = given.pop("replay_buffer_config", {})
        if "capacity" in buffer_config:
            given["replay_capacity"] = int(buffer_config["capacity"])
        if kwargs.pop("use_curiosity", False):
            raise ValueError("use_curiosity=True is not available: leave it out.")
        for name in IGNORED.keys() & kwargs.keys():
            kwargs.pop(name)
            logger.warning("%s has no effect: %s.", name, IGNORED[name])
        super().training(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)
        return self

    def update_from_dict(self, config_dict: dict[str, Any]) -> DreamerConfig:
        """RLlib's; what only `training` takes goes through `training`."""
        training = {k: v for k, v in config_dict.items() if k in _TRANSLATED}
        rest = {k: v for k, v in config_dict.items() if k not in training}
        super().update_from_dict(rest)
        return self.training(**training)

    def reporting(
        self, *, video_interval_s: float | None = NotProvided, **kwargs: Any
    ) -> DreamerConfig:
        """Sets what is reported.

        Args:
            video_interval_s: Least seconds between two films of what the world model imagines, and
                of evaluation episodes; None for no films. Needs the extra `eval`.
            **kwargs: Of `AlgorithmConfig.reporting`; RLlib's `report_*` switches are accepted.
        """
        if video_interval_s is not NotProvided:
            self.video_interval_s = video_interval_s
        for name in [k for k in kwargs if k.startswith("report_")]:
            if kwargs.pop(name):
                logger.warning("%s has no effect: the losses are always reported.", name)
        super().reporting(**kwargs)
        return self

    def scale_to_learners(
        self, num_learners: int, *, total_steps: int | None = None
    ) -> DreamerConfig:
        """Goes from the settings for one learner to those for several, and prints what it sets.

        `batch_size_B` and `num_envs_per_env_runner` are multiplied by n, learning rates and their
        schedules by sqrt(n). What is set afterwards wins, over later calls too, each of which
        starts from the settings for one learner: calling twice is calling once.

            config.scale_to_learners(4, total_steps=500_000).learners(num_gpus_per_learner=1)

        Args:
            num_learners: The number n of learners, >= 1; with 1 everything is as it was.
            total_steps: Agent steps of the run, over whose first tenth fixed learning rates rise
                from that of one learner; None gives the full rates at once.

        Raises:
            ValueError: If a number is out of range, or a setting to scale is a search of Tune.
        """
        print(scale_config(self, self._scaled_settings, num_learners, total_steps))
        return self

    def validate(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: Naming the field, what was given and what is allowed.
        """
        check_learning_rates(self)  # before RLlib, which says less of a wrong one
        super().validate()
        check_settings(self)
        validate_env(self.env, self.env_config)
        if self.env_runner_cls in (DreamerEnvRunner, RecordingEnvRunner):
            self.env_runner_cls = RecordingEnvRunner if self.output else DreamerEnvRunner

    @property
    def loss_config(self) -> LossConfig:
        """The constants of the losses."""
        scales = LossConfig().scales | self.loss_scales
        if not self.train_actor:
            scales["actor"] = 0.0
        if not self.train_critic:
            scales["critic"] = scales["repval"] = 0.0
        return LossConfig(
            horizon=self.horizon_H,
            discount=self.gamma,
            lam=self.gae_lambda,
            free_nats=self.free_nats,
            entropy_scale=self.entropy_scale,
            return_rate=1.0 - self.return_normalization_decay,
            scales=scales,
            actor_grad=self.actor_grad,
        )

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        loss = {f: getattr(self.loss_config, f) for f in LossConfig.__dataclass_fields__}
        symlog = True if self.symlog_obs == "auto" else bool(self.symlog_obs)
        return super()._model_config_auto_includes | {
            "model_size": self.model_size,
            "symlog_obs": symlog,
            "compile": self.compile,
            "loss": loss,
            "initial_random_steps": 0 if self.in_evaluation else self.initial_random_steps,
        }

    def get_evaluation_config_object(self) -> AlgorithmConfig | None:
        """RLlib's config of the evaluation runners.

        They act greedily unless `evaluation_config` has its own `explore`, and film an episode if
        films are wanted. Where episodes are counted, each runner plays them in one env unless
        `evaluation_config` says otherwise: of several envs those that end first would be counted,
        the short ones.
        """
        from rllib_dreamer.evaluation.recorder import EpisodeRecorder

        config = super().get_evaluation_config_object()
        if config is None:
            return None
        own = self.evaluation_config or {}
        if "explore" not in own:
            config.explore = False
        counted = self.evaluation_duration_unit == "episodes" and self.evaluation_duration != "auto"
        if counted and "num_envs_per_env_runner" not in own:
            config.num_envs_per_env_runner = 1
        if self.video_interval_s is not None:
            given = config.callbacks_class
            others = list(given) if isinstance(given, (list, tuple)) else [given]
            config.callbacks_class = [*others, EpisodeRecorder]
        return config

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Our RLModule and catalog."""
        return RLModuleSpec(module_class=DreamerTorchRLModule, catalog_class=DreamerCatalog)

    def get_default_learner_class(self) -> type[DreamerTorchLearner]:
        """Our learner."""
        from rllib_dreamer.dreamer_torch_learner import DreamerTorchLearner

        return DreamerTorchLearner
