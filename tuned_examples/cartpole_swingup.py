"""cartpole-swingup from pixels.

    rllib train file tuned_examples/cartpole_swingup.py

Protocol: dm_control cartpole-swingup, 64x64 RGB, action repeat 2. On a CUDA machine: training ratio
256 as in the official code's present dmc_vision preset, with the 12M model. On a CPU: the 1M
model and smaller batches.
Expected: no result of ours yet. Published: 862 after 1,000,000 env steps, mean of ten
seeds (danijar/dreamerv3, scores/dmc_vision; `rllib plot --reference dmc_vision`).
Time: not measured.
"""

import torch

from rllib_dreamer import DreamerConfig

config = (
    DreamerConfig()
    .environment("dmc/cartpole-swingup", env_config={"action_repeat": 2})
    .training(replay_capacity=500_000)
    .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
    .reporting(min_time_s_per_iteration=20)
    .debugging(seed=0)
)

if torch.cuda.is_available():
    config.training(model_size="12M", training_ratio=256)
    config.learners(num_learners=0, num_gpus_per_learner=1)
else:
    config.training(
        model_size="1M",
        training_ratio=128,
        batch_size_B=8,
        batch_length_T=64,
        lr=3e-4,
        warmup_updates=100,
    )

stop = {"dreamer/env_steps": 1_000_000}
