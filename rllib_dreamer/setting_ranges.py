"""What each single setting of `DreamerConfig` may be, and which of RLlib's mean nothing here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rllib_dreamer.hardware import PRECISIONS
from rllib_dreamer.model.sizes import CHOICES

OPTIMIZERS = ("laprop", "adam")
STORAGES = ("memory", "disk")


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether the value is a finite number of at least `least`."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and math.isfinite(value) and bool(value >= least)


def is_count(value: Any, least: int) -> bool:
    """Whether the value is a whole number of at least `least`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(value >= least)


def is_rate(value: Any) -> bool:
    """Whether the value is a learning rate, or a list of pairs (step, learning rate)."""
    if isinstance(value, (list, tuple)):
        pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
        return pairs and all(is_number(number, 0) for pair in value for number in pair)
    return is_number(value, 0)


RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "training_ratio": ("a number > 0", lambda v: is_number(v) and v > 0),
    "agc": ("a number > 0", lambda v: is_number(v) and v > 0),
    "batch_size_B": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "batch_length_T": ("a whole number >= 2", lambda v: is_count(v, 2)),
    "horizon_H": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "replay_capacity": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "broadcast_interval": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "metrics_num_episodes_for_smoothing": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "max_nonfinite_updates": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "num_envs_per_env_runner": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "rollout_fragment_length": ("a whole number >= 1", lambda v: is_count(v, 1)),
    "num_env_runners": ("a whole number >= 0", lambda v: is_count(v, 0)),
    "num_learners": ("a whole number >= 0", lambda v: is_count(v, 0)),
    "warmup_updates": ("a whole number >= 0", lambda v: is_count(v, 0)),
    "replay_prefetch": ("a whole number >= 0", lambda v: is_count(v, 0)),
    "initial_random_steps": ("a whole number >= 0", lambda v: is_count(v, 0)),
    "seed": ("None or a whole number >= 0", lambda v: v is None or is_count(v, 0)),
    "grad_clip_norm": ("None or a number > 0", lambda v: v is None or (is_number(v) and v > 0)),
    "optimizer": (f"one of {OPTIMIZERS}", lambda v: v in OPTIMIZERS),
    "actor_grad": (f"one of {CHOICES['actor_grad']}", lambda v: v in CHOICES["actor_grad"]),
    "weight_decay": ("a number >= 0", lambda v: is_number(v, 0)),
    "free_nats": ("a number >= 0", lambda v: is_number(v, 0)),
    "entropy_scale": ("a number >= 0", lambda v: is_number(v, 0)),
    "gamma": ("in [0, 1), the paper has 1 - 1/333", lambda v: is_number(v, 0) and v < 1),
    "gae_lambda": ("in [0, 1]", lambda v: is_number(v, 0) and v <= 1),
    "return_normalization_decay": ("in [0, 1)", lambda v: is_number(v, 0) and v < 1),
    "precision": (f"one of {PRECISIONS}", lambda v: v in PRECISIONS),
    "replay_storage": (f"one of {STORAGES}", lambda v: v in STORAGES),
    "symlog_obs": ('True, False or "auto"', lambda v: v in (True, False, "auto")),
    "sample_timeout_s": ("None or a number > 0", lambda v: v is None or (is_number(v) and v > 0)),
    "evaluation_sample_timeout_s": ("a number > 0", lambda v: is_number(v) and v > 0),
    "video_interval_s": ("None or a number >= 0", lambda v: v is None or is_number(v, 0)),
    "clip_rewards": (
        "None or False: rewards of any size are learned as they are (symlog, two-hot); a wrapper "
        "of the environment can clip them",
        lambda v: v is None or v is False,
    ),
    "learner_threads": ('"auto" or a whole number >= 1', lambda v: v == "auto" or is_count(v, 1)),
}
"""By setting: what is allowed, in words and as a test."""

REFUSED: dict[str, tuple[Any, str]] = {
    "train_batch_size": (None, "set `batch_size_B` and `batch_length_T` instead"),
    "_train_batch_size_per_learner": (None, "set `batch_size_B`, that of all learners, instead"),
    "minibatch_size": (None, "every update takes a whole batch, set `batch_size_B` instead"),
    "num_epochs": (1, "set `training_ratio` instead"),
    "shuffle_batch_per_epoch": (False, "batches are drawn at random, leave it out"),
    "grad_clip": (None, "set `grad_clip_norm` or `agc` instead"),
    "_learner_connector": (
        None,
        "batches come from the replay, change what goes in: in a wrapper of the environment, or by "
        "an `env_to_module_connector` that writes into the episode",
    ),
    "log_gradients": (False, "the norm of all gradients is always logged, leave it out"),
    "torch_skip_nan_gradients": (
        False,
        "an update with a NaN gradient is always skipped, set `max_nonfinite_updates`",
    ),
    "policies_to_train": (None, "set `train_actor` and `train_critic` instead"),
    "num_gpus": (0, "set `num_gpus_per_learner` instead"),
    "torch_compile_learner": (False, "set `compile` instead"),
    "torch_compile_worker": (False, "set `compile` instead"),
    "num_aggregator_actors_per_learner": (
        0,
        "there are no episodes to aggregate, batches come from the replay; leave it out",
    ),
    "max_requests_in_flight_per_env_runner": (
        1,
        "the env runners sample a round ahead as it is, leave it out",
    ),
    "_torch_grad_scaler_class": (None, "bfloat16 needs no scaler, set `precision` instead"),
    "_torch_lr_scheduler_classes": (None, "set `lr` to a list of [steps, rate] instead"),
    "input_": ("sampler", "`DreamerTorch` learns from what its env runners sample, leave it out"),
    "offline_evaluation_interval": (None, "set `evaluation_interval` instead"),
    "num_offline_eval_runners": (0, "set `evaluation_num_env_runners` instead"),
    "offline_evaluation_parallel_to_training": (
        False,
        "set `evaluation_parallel_to_training` instead",
    ),
    "output_config": ({}, "set `output_write_method_kwargs` instead"),
    "output_max_file_size": (64 * 1024 * 1024, "set `output_max_rows_per_file` instead"),
    "observation_filter": (
        "NoFilter",
        "`symlog_obs` squashes vectors, a wrapper of the environment can do anything else",
    ),
    "compress_observations": (
        False,
        "lower `replay_capacity`, or set `replay_storage`='disk', if memory is short",
    ),
    "use_env_runner_state_server": (
        False,
        "env runners get their weights every `broadcast_interval` training steps, leave it out",
    ),
    "disable_env_checking": (
        False,
        "environments are always checked, `env_config={'check_spaces': False}` lifts the bounds",
    ),
    "action_mask_key": ("action_mask", "actions are not masked, leave it out"),
    "render_env": (False, "set `video_interval_s` instead"),
    "grad_clip_by": (
        "global_norm",
        "`grad_clip_norm` is of all gradients together, `agc` of each tensor",
    ),
    "add_default_connectors_to_learner_pipeline": (
        True,
        "batches come from the replay, leave it out",
    ),
}
"""RLlib's settings that mean nothing here: the one value allowed, and what to do instead."""

IGNORED = {
    "world_model_grad_clip_by_global_norm": "gradients are clipped adaptively, see agc",
    "actor_grad_clip_by_global_norm": "gradients are clipped adaptively, see agc",
    "critic_grad_clip_by_global_norm": "gradients are clipped adaptively, see agc",
    "intrinsic_rewards_scale": "there are no intrinsic rewards",
    "gc_frequency_train_steps": "nothing needs collecting by hand",
}
"""Those of its DreamerV3Config, with why: accepted, since scripts written for that are to run."""
