from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dreamerv3 import DreamerV3Config
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from tiny import MODEL, CountingEnv, RandomEnv, tiny_config

from rllib_dreamer.dreamer import DreamerConfig, DreamerTorch
from rllib_dreamer.dreamer_catalog import DreamerCatalog, model_settings
from rllib_dreamer.model.sizes import LossConfig
from rllib_dreamer.setting_checks import check_settings
from rllib_dreamer.setting_ranges import REFUSED as UNUSED

REFUSED = {
    "training_ratio": (0, -1, float("nan"), float("inf"), "256", True),
    "agc": (0, -0.3),
    "batch_size_B": (0, 4.5),
    "batch_length_T": (1, 8.0),
    "horizon_H": (0, 2.5),
    "replay_capacity": (0, 1e6),
    "broadcast_interval": (0,),
    "rollout_fragment_length": ("auto", 0, 1.5),
    "max_nonfinite_updates": (0,),
    "metrics_num_episodes_for_smoothing": (0,),
    "warmup_updates": (-1,),
    "replay_prefetch": (-1,),
    "weight_decay": (-0.1,),
    "free_nats": (-1,),
    "entropy_scale": (-1e-3,),
    "gamma": (1.0, -0.1),
    "gae_lambda": (1.1, -0.1),
    "return_normalization_decay": (1.0, -0.1),
    "precision": ("float16", None),
    "replay_storage": ("nvme", None),
    "symlog_obs": ("yes",),
    "learner_threads": (0, "all", 1.5),
    "sample_timeout_s": (0, -1.0),
    "evaluation_sample_timeout_s": (None, 0),
    "clip_rewards": (True, 1.0),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_a_value_out_of_range_is_refused(name: str, value: Any) -> None:
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"`{name}`={value!r} must be"):
        config.validate()


def test_the_tiny_config_is_valid() -> None:
    tiny_config().validate()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"model_size": "13M"}, "model_size='13M' is not known: choose one of 1M, 3M, 12M"),
        ({"replay_capacity": 31}, "`replay_capacity`=31 is smaller than one batch of 4 x 8"),
        ({"train_critic": False}, "`train_actor`=True needs `train_critic`=True"),
        ({"loss_scales": {"recon": 1.0}}, r"`loss_scales` has unknown terms \['recon'\]"),
        ({"loss_scales": {"rec": -1.0}}, "`loss_scales` must be numbers >= 0, got"),
        ({"loss_scales": None}, "`loss_scales`=None must be a dict"),
        ({"lr": None}, "`world_model_lr` and `lr` are both None"),
        ({"lr": -4e-5}, "`lr`=-4e-05 must be a number >= 0"),
        ({"lr": "1e-4"}, "`lr`='1e-4' must be a number >= 0 like 4e-5 .in YAML 4.0e-5"),
        ({"critic_lr": math.nan}, "`critic_lr`=nan must be"),
        ({"actor_lr": [[0, 1e-4], [100, "1e-5"]]}, "`actor_lr`=.*'1e-5'.* must be"),
        ({"actor_lr": [[100, 1e-4]]}, "actor_lr"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    training: dict[str, Any], message: str
) -> None:
    config = tiny_config(training=training)
    with pytest.raises(ValueError, match=message):
        config.validate()


@pytest.mark.parametrize(
    ("setting", "value", "instead"),
    [
        ("train_batch_size", 32, "set `batch_size_B` and `batch_length_T` instead"),
        ("train_batch_size_per_learner", 32, "set `batch_size_B`, that of all learners"),
        ("minibatch_size", 8, "every update takes a whole batch, set `batch_size_B`"),
        ("num_epochs", 2, "set `training_ratio` instead"),
        ("shuffle_batch_per_epoch", True, "batches are drawn at random"),
        ("grad_clip", 40.0, "set `grad_clip_norm` or `agc` instead"),
        ("learner_connector", list, "batches come from the replay"),
    ],
)
def test_a_setting_that_means_nothing_here_is_refused(
    setting: str, value: Any, instead: str
) -> None:
    config = tiny_config(training={setting: value})
    with pytest.raises(
        ValueError, match=re.escape(f"`{setting}`={value!r} is not used: {instead}")
    ):
        config.validate()


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("max_requests_in_flight_per_env_runner", 2, "the env runners sample a round ahead"),
        ("num_aggregator_actors_per_learner", 1, "there are no episodes to aggregate"),
        ("torch_compile_learner", True, "set `compile` instead"),
        ("torch_compile_worker", True, "set `compile` instead"),
        ("torch_skip_nan_gradients", True, "an update with a NaN gradient is always skipped"),
        ("log_gradients", True, "the norm of all gradients is always logged"),
        ("policies_to_train", [], "set `train_actor` and `train_critic` instead"),
        ("_torch_grad_scaler_class", dict, "bfloat16 needs no scaler"),
        ("_torch_lr_scheduler_classes", [dict], "set `lr` to a list"),
        ("observation_filter", "MeanStdFilter", "`symlog_obs` squashes vectors"),
        ("compress_observations", True, "lower `replay_capacity`"),
        ("use_env_runner_state_server", True, "env runners get their weights"),
        ("offline_evaluation_interval", 1, "set `evaluation_interval` instead"),
        ("num_offline_eval_runners", 1, "set `evaluation_num_env_runners` instead"),
        ("render_env", True, "set `video_interval_s` instead"),
        ("action_mask_key", "mask", "actions are not masked"),
    ],
)
def test_a_part_of_rllib_that_would_do_harm_is_refused(name: str, value: Any, instead: str) -> None:
    config = tiny_config()
    setattr(config, name, value)
    public = name.removeprefix("_")
    with pytest.raises(ValueError, match=f"`{public}`=.* is not used: {instead}"):
        config.validate()


@pytest.mark.parametrize("name", UNUSED)
def test_what_is_refused_has_one_value_that_is_let_pass(name: str) -> None:
    defaults = vars(AlgorithmConfig())
    allowed, _ = UNUSED[name]
    assert allowed == (None if name == "train_batch_size" else defaults[name])
    config = tiny_config()
    setattr(config, name, "another")
    with pytest.raises(ValueError, match=f"`{name.removeprefix('_')}`='another' is not used"):
        check_settings(config)


def test_rewards_may_be_said_not_to_be_clipped() -> None:
    tiny_config().environment(clip_rewards=False).validate()


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        ("default_policy", {"lr": 1e-3, "gamma": 0.5}, r"\['gamma'\] .* are not used: set .* lr, "),
        ("other", {"lr": 1e-3}, r"has \['lr'\] for 'other', which are not used"),
        ("default_policy", {"actor_lr": -1.0}, "`actor_lr`=-1.0 must be a number >= 0"),
        ("default_policy", {"agc": 0}, "`agc`=0 must be a number > 0"),
    ],
)
def test_an_override_of_the_module_that_is_not_read_is_refused(
    module: str, given: dict[str, Any], message: str
) -> None:
    config = tiny_config().rl_module(algorithm_config_overrides_per_module={module: given})
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_overrides_of_the_module_reach_its_optimizers() -> None:
    given = {
        "lr": 1e-3,
        "actor_lr": 2e-3,
        "critic_lr": 3e-3,
        "world_model_lr": [[0, 4e-3], [10, 0.0]],
    }
    given |= {"optimizer": "laprop", "agc": 0.1, "warmup_updates": 7, "weight_decay": 0.01}
    config = tiny_config().rl_module(
        algorithm_config_overrides_per_module={"default_policy": given}
    )
    config.validate()
    learner = config.build_learner(env=RandomEnv({}))
    for part, lr in {"world_model": 4e-3, "actor": 2e-3, "critic": 3e-3}.items():
        (group,) = learner.get_optimizer("default_policy", part).param_groups
        assert (group["lr"], group["agc"], group["warmup"]) == (pytest.approx(lr), 0.1, 7)
        assert group["weight_decay"] == 0.01


def test_pieces_of_episodes_are_not_thrown_away() -> None:
    config = tiny_config().env_runners(batch_mode="complete_episodes")
    with pytest.raises(ValueError, match="`batch_mode`='complete_episodes' would lose the steps"):
        config.validate()
    evaluated = tiny_config().evaluation(evaluation_interval=1)
    evaluated.validate()
    runners = evaluated.get_evaluation_config_object()
    assert runners is not None and runners.batch_mode == "complete_episodes"
    runners.validate()


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("loss", {"slow_rate": 0.05}, "`horizon_H`"),
        ("model_size", "12M", "`model_size`"),
        ("compile", False, "`compile`"),
        ("initial_random_steps", 5, "`initial_random_steps`"),
    ],
)
def test_the_model_config_cannot_contradict_the_training(
    name: str, value: Any, setting: str
) -> None:
    message = f"`model_config` has a key '{name}': leave it out, and set {setting}"
    with pytest.raises(ValueError, match=message):
        tiny_config(model={name: value}).validate()
    spec = RLModuleSpec(catalog_class=DreamerCatalog, model_config={name: value})
    with pytest.raises(ValueError, match=message):
        tiny_config().rl_module(rl_module_spec=spec).validate()


def test_offline_data_is_refused() -> None:
    config = tiny_config().offline_data(input_=["/data/episodes"])
    with pytest.raises(ValueError, match=r"`input_`=\['/data/episodes'\] is not used: .*leave"):
        config.validate()


def test_rows_must_divide_among_learners() -> None:
    config = tiny_config().learners(num_learners=3)
    with pytest.raises(ValueError, match="`batch_size_B`=4 must be a multiple of `num_learners`=3"):
        config.validate()


def test_several_agents_are_refused() -> None:
    config = tiny_config().multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *_, **__: "a")
    with pytest.raises(
        ValueError,
        match=r"several agents are not supported, `policies` are \[.a., .b.\].*Wrap the env",
    ):
        config.validate()


def test_the_old_stack_is_refused() -> None:
    config = tiny_config().api_stack(
        enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False
    )
    with pytest.raises(ValueError, match="needs the new API stack"):
        config.validate()


def test_curiosity_is_refused() -> None:
    with pytest.raises(ValueError, match="use_curiosity=True is not available"):
        DreamerConfig().training(use_curiosity=True)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="trainings_ratio"):
        DreamerConfig().training(trainings_ratio=3)
    tiny_config().update_from_dict({"__stdout_file__": None}).validate()  # of Tune
    config = tiny_config().update_from_dict({"trainings_ratio": 3})
    with pytest.raises(ValueError, match="no setting `trainings_ratio`: did you mean 'training_r"):
        config.validate()


def test_what_only_training_takes_may_come_from_a_dict() -> None:
    given = {"use_float16": True, "replay_buffer_config": {"capacity": 500}, "lr": 1e-3}
    config = tiny_config().update_from_dict(given | {"gc_frequency_train_steps": 10})
    config.validate()
    assert (config.precision, config.replay_capacity, config.lr) == ("bfloat16", 500, 1e-3)
    with pytest.raises(ValueError, match="use_curiosity=True is not available"):
        DreamerConfig().update_from_dict({"use_curiosity": True})


def test_a_script_for_rllibs_own_dreamer_works_after_changing_the_import() -> None:
    def script(config: Any) -> Any:
        return (
            config.environment(RandomEnv)
            .training(
                model_size="XS",
                training_ratio=64,
                batch_size_B=8,
                batch_length_T=32,
                horizon_H=10,
                gae_lambda=0.9,
                entropy_scale=1e-3,
                return_normalization_decay=0.98,
                train_critic=True,
                train_actor=True,
                intrinsic_rewards_scale=0.1,
                world_model_lr=[[0, 1e-4], [1000, 1e-5]],
                actor_lr=3e-5,
                critic_lr=3e-5,
                world_model_grad_clip_by_global_norm=1000.0,
                critic_grad_clip_by_global_norm=100.0,
                actor_grad_clip_by_global_norm=100.0,
                symlog_obs=True,
                use_float16=False,
                replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 5000},
            )
            .reporting(
                metrics_num_episodes_for_smoothing=5,
                report_individual_batch_item_stats=False,
                report_dream_data=False,
                report_images_and_videos=False,
            )
            .learners(num_learners=0)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        )

    theirs, ours = script(DreamerV3Config()), script(DreamerConfig())
    ours.validate()
    names = "model_size training_ratio batch_size_B batch_length_T horizon_H gae_lambda".split()
    names += "entropy_scale return_normalization_decay world_model_lr actor_lr critic_lr".split()
    for name in [*names, "symlog_obs", "metrics_num_episodes_for_smoothing"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.replay_capacity == 5000
    assert ours.precision == "float32"


def test_learning_rates_of_the_parts_are_lr_unless_they_are_set() -> None:
    default = DreamerConfig()
    config = DreamerConfig().training(actor_lr=2 * default.actor_lr, lr=1e-3)
    for other in (config, *(trip(config) for trip in round_trips().values())):
        assert (other.world_model_lr, other.actor_lr, other.critic_lr) == (1e-3, 8e-5, 1e-3)
    assert config.to_dict()["critic_lr"] is None  # so that a search over `lr` moves it
    assert config.update_from_dict({"lr": 1e-2}).critic_lr == 1e-2


@pytest.mark.parametrize(("given", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_use_float16(given: bool, precision: str) -> None:
    assert DreamerConfig().training(use_float16=given).precision == precision


def test_settings_reach_the_losses() -> None:
    config = tiny_config(
        training={
            "horizon_H": 4,
            "gamma": 0.9,
            "gae_lambda": 0.8,
            "free_nats": 0.5,
            "entropy_scale": 0.01,
            "return_normalization_decay": 0.9,
            "loss_scales": {"rec": 2.0},
        }
    )
    loss = config.loss_config
    assert (loss.horizon, loss.lam, loss.free_nats, loss.entropy_scale) == (4, 0.8, 0.5, 0.01)
    assert loss.discount == pytest.approx(0.9)
    assert loss.return_rate == pytest.approx(0.1)
    assert loss.scales == LossConfig().scales | {"rec": 2.0}


def test_the_defaults_are_the_published_losses() -> None:
    ours, published = DreamerConfig().loss_config, LossConfig()
    assert ours.discount == pytest.approx(published.discount, rel=1e-12)
    assert ours.return_rate == pytest.approx(published.return_rate)
    for name in ("horizon", "lam", "free_nats", "entropy_scale", "scales"):
        assert getattr(ours, name) == getattr(published, name), name


def test_what_does_not_learn_has_no_loss() -> None:
    scales = DreamerConfig().training(train_actor=False).loss_config.scales
    assert (scales["actor"], scales["critic"], scales["repval"]) == (0.0, 1.0, 0.3)
    scales = DreamerConfig().training(train_actor=False, train_critic=False).loss_config.scales
    assert (scales["actor"], scales["critic"], scales["repval"]) == (0.0, 0.0, 0.0)


def round_trips() -> dict[str, Any]:
    return {
        "copy": lambda c: c.copy(copy_frozen=False),
        "dict": lambda c: DreamerConfig().update_from_dict(c.to_dict()),
        "state": lambda c: DreamerConfig.from_state(c.get_state()),
        "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    }


@pytest.mark.parametrize("way", round_trips())
def test_a_config_survives(way: str) -> None:
    config = tiny_config(CountingEnv, training={"loss_scales": {"rec": 2.0}}, length=3)
    config.training(actor_lr=[[0, 1e-3], [100, 1e-4]])
    again = round_trips()[way](config)
    assert isinstance(again, DreamerConfig)
    assert again.algo_class is DreamerTorch
    mine, theirs = config.to_dict(), again.to_dict()
    assert {k: v for k, v in theirs.items() if mine.get(k) != v and k != "class"} == {}
    assert again.loss_config == config.loss_config
    assert again.model_config == config.model_config
    again.validate()


def test_a_copy_shares_nothing() -> None:
    config = tiny_config(training={"loss_scales": {"rec": 2.0}})
    config.copy(copy_frozen=False).loss_scales["rec"] = 3.0
    assert config.loss_scales == {"rec": 2.0}


def test_a_plain_dict_is_enough() -> None:
    config = DreamerConfig().update_from_dict(
        {"env": RandomEnv, "training_ratio": 8, "batch_size_B": 2, "model_size": "1M"}
    )
    config.validate()
    assert (config.training_ratio, config.batch_size_B) == (8, 2)


def test_an_unknown_key_of_the_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"keys \['depht'\].*deter"):
        model_settings({"depht": 3, "model_size": "1M", "loss": {}})
    assert model_settings({"width": 3, "depth": 2}, extra=["width"]) == {"depth": 2}


def test_rllibs_own_model_config_is_let_pass_while_it_says_nothing() -> None:
    config = DreamerConfig().rl_module(model_config=DefaultModelConfig())
    assert model_settings(config.model_config) == {"symlog_obs": True}
    config.rl_module(model_config=DefaultModelConfig(conv_filters=[[16, 4, 2]]))
    with pytest.raises(ValueError, match=r"keys \['conv_filters'\]"):
        model_settings(config.model_config)
    assert model_settings({"use_lstm": True}, extra=["use_lstm"]) == {}


def test_settings_of_rllibs_own_networks_are_refused() -> None:
    config = tiny_config(CountingEnv, training={"model": {"fcnet_hiddens": [256, 256]}}, length=3)
    config.validate()  # as it is by default
    with pytest.raises(ValueError, match=r"`model` has keys \['fcnet_hiddens', 'mine'\]"):
        config.training(model={"fcnet_hiddens": [8], "mine": 1}).validate()


@pytest.mark.parametrize(("given", "expected"), [("auto", True), (True, True), (False, False)])
def test_symlog_reaches_the_model(given: Any, expected: bool) -> None:
    config = tiny_config(training={"symlog_obs": given})
    assert config.model_config["symlog_obs"] is expected
    assert config.model_config.items() >= MODEL.items()
