"""Checks of a `DreamerConfig` that tell what is wrong and what to do instead."""

from __future__ import annotations

from importlib.util import find_spec

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.models.catalog import MODEL_DEFAULTS
from ray.rllib.utils.schedules.scheduler import Scheduler

from rllib_dreamer.model.sizes import LossConfig, model_config
from rllib_dreamer.near_names import nearest
from rllib_dreamer.part_rates import PARTS
from rllib_dreamer.setting_ranges import RANGES, REFUSED, is_number, is_rate

_OF_TRAINING = {
    "model_size": "`model_size`",
    "symlog_obs": "`symlog_obs`",
    "compile": "`compile`",
    "initial_random_steps": "`initial_random_steps`",
    "loss": "`horizon_H`, `gamma`, `loss_scales` and the others",
}
"""Keys of the RLModule's `model_config` that the config writes, and what sets them."""
_PER_MODULE = (
    *("lr", *(f"{part}_lr" for part in PARTS)),
    *("optimizer", "agc", "warmup_updates", "weight_decay"),
)
"""What the learner reads from `algorithm_config_overrides_per_module`."""


def check_settings(config: AlgorithmConfig) -> None:
    """Checks every setting but the learning rates.

    Raises:
        ValueError: Naming the field, what was given and what is allowed.
    """
    _check_names(config)
    model_config(config.model_size)
    for name, (allowed, instead) in REFUSED.items():
        if (given := getattr(config, name)) != allowed:
            config._value_error(f"`{name.removeprefix('_')}`={given!r} is not used: {instead}.")
    for name, (allowed, holds) in RANGES.items():
        if not holds(given := getattr(config, name)):
            config._value_error(f"`{name}`={given!r} must be {allowed}.")
    _check_loss_scales(config)
    _check_model_config(config)
    _check_batches(config)
    _check_combinations(config)
    _check_overrides(config)


def check_learning_rates(config: AlgorithmConfig) -> None:
    """Checks `lr` and the rates of the single parts: numbers or schedules, none missing.

    Raises:
        ValueError: Naming the field, what was given and what is allowed.
    """
    for part in PARTS:
        name = f"{part}_lr"
        rate = getattr(config, name)
        if rate is None:
            config._value_error(f"`{name}` and `lr` are both None: set either, `lr` is for all.")
        if not is_rate(rate):
            given = "lr" if config.__dict__[name] is None else name
            config._value_error(
                f"`{given}`={rate!r} must be a number >= 0 like 4e-5 (in YAML 4.0e-5, without "
                "the point it is text), or a schedule of them: [[0, 4e-5], [1_000_000, 1e-5]]."
            )
        Scheduler.validate(
            fixed_value_or_schedule=rate, setting_name=name, description="learning rate"
        )


def _check_names(config: AlgorithmConfig) -> None:
    """Refuses settings that do not exist, which RLlib takes from dicts without a word."""
    known = vars(type(config)()).keys() | {"class"}  # which `from_state` adds
    for name in vars(config).keys() - known:
        if not name.startswith("__"):  # as Tune's own do, "__stdout_file__" and others
            config._value_error(
                f"there is no setting `{name}`: {nearest(name, known)} Values of your own belong "
                "into `env_config`."
            )


def _check_loss_scales(config: AlgorithmConfig) -> None:
    """Checks the names and values of `loss_scales`."""
    if not isinstance(config.loss_scales, dict):
        config._value_error(f"`loss_scales`={config.loss_scales!r} must be a dict, like {{}}.")
    negative = {k: v for k, v in config.loss_scales.items() if not is_number(v, 0)}
    if negative:
        config._value_error(f"`loss_scales` must be numbers >= 0, got {negative}.")
    unknown = config.loss_scales.keys() - LossConfig().scales.keys()
    if unknown:
        config._value_error(
            f"`loss_scales` has unknown terms {sorted(unknown)}: it takes "
            f"{sorted(LossConfig().scales)}."
        )


def _check_model_config(config: AlgorithmConfig) -> None:
    """Refuses what would contradict the settings of `training`, or would not be read at all."""
    if changed := sorted(key for key, x in config.model.items() if MODEL_DEFAULTS.get(key) != x):
        config._value_error(
            f"`model` has keys {changed}, but is for RLlib's own networks: leave it out, and set "
            "`model_size`, or single widths and depths by `rl_module(model_config=...)`."
        )
    for given in (config._model_config, getattr(config._rl_module_spec, "model_config", None)):
        for name in _OF_TRAINING.keys() & (given if isinstance(given, dict) else {}):
            config._value_error(
                f"`model_config` has a key {name!r}: leave it out, and set "
                f"{_OF_TRAINING[name]} by `training(...)`."
            )


def _check_batches(config: AlgorithmConfig) -> None:
    """Checks batches against the replay and the learners."""
    if config.replay_capacity < config.batch_size_B * config.batch_length_T:
        config._value_error(
            f"`replay_capacity`={config.replay_capacity} is smaller than one batch of "
            f"{config.batch_size_B} x {config.batch_length_T} steps: raise it, 1_000_000 is usual."
        )
    if config.num_learners > 1 and config.batch_size_B % config.num_learners:
        config._value_error(
            f"`batch_size_B`={config.batch_size_B} must be a multiple of `num_learners`="
            f"{config.num_learners}, so that every learner gets as many rows: change either."
        )


def _check_combinations(config: AlgorithmConfig) -> None:
    """Checks settings that need another one, or something that is not here."""
    if config.train_actor and not config.train_critic:
        config._value_error("`train_actor`=True needs `train_critic`=True: set both or neither.")
    if config.cuda_graphs and config.num_learners > 1:
        config._value_error(
            f"`cuda_graphs`=True is for one learner, `num_learners` is {config.num_learners}: "
            "set it to False."
        )
    if config.batch_mode != "truncate_episodes" and not config.in_evaluation:
        config._value_error(
            f"`batch_mode`={config.batch_mode!r} would lose the steps of episodes that have not "
            "ended: leave it out, the replay takes episodes in pieces."
        )
    if config.optimizer == "adam" and config.weight_decay:
        config._value_error(
            f"`weight_decay`={config.weight_decay} is not for `optimizer`='adam': set it to 0, "
            "or take 'laprop'."
        )
    if config.video_interval_s is not None and find_spec("imageio_ffmpeg") is None:
        config._value_error(
            f"`video_interval_s`={config.video_interval_s} needs packages that are not "
            'installed: pip install "rllib-dreamer[eval]", or set it to None.'
        )
    if config.is_multi_agent:
        config._value_error(
            f"several agents are not supported, `policies` are {sorted(config.policies)}: "
            "`DreamerTorch` has one replay and one training ratio, for one policy. Wrap the "
            "environment as a single agent with Dict spaces; docs/scaling.md says what is "
            "missing."
        )
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        config._value_error("`DreamerTorch` needs the new API stack: leave `api_stack` alone.")


def _check_overrides(config: AlgorithmConfig) -> None:
    """Refuses overrides per module that are not read, and values that are not allowed."""
    for module_id, given in config.algorithm_config_overrides_per_module.items():
        read = _PER_MODULE if module_id == DEFAULT_MODULE_ID else ()
        if unread := sorted(given.keys() - set(read)):
            config._value_error(
                f"`algorithm_config_overrides_per_module` has {unread} for {module_id!r}, which "
                f"are not used: set them by `training(...)`. Used are {', '.join(_PER_MODULE)} for "
                f"{DEFAULT_MODULE_ID!r}."
            )
        merged = config.copy(copy_frozen=False).update_from_dict(given)
        merged.algorithm_config_overrides_per_module = {}
        check_learning_rates(merged)
        check_settings(merged)
