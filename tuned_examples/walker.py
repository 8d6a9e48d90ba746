"""walker-walk from pixels.

    rllib train file tuned_examples/walker.py

Protocol: dm_control walker-walk, 64x64 RGB from camera 0, action repeat 2, so an episode is
1,000 control steps and 500 agent steps. On a CUDA machine: the 12M model, with training ratio and
batch (256, 16 x 64) of the official code's present dmc_vision preset and a replay of the newest
250,000 agent steps. On a CPU: the 3M model, smaller batches, a quarter of that ratio and a discount
of 0.99, a horizon of 100 agent steps instead of the published 333, so that the critic has caught up
within hours on two cores.
Expected: docs/results.md has ours. Published: 945 after 500,000 env steps and 962 after 1,000,000,
means of ten seeds (danijar/dreamerv3, scores/dmc_vision; `rllib plot --reference dmc_vision`). A
random policy returns about 45, the best 1,000.
Time: docs/results.md, with the hardware.
"""

import torch

from rllib_dreamer import DreamerConfig
from rllib_dreamer.hardware import available_cpus

config = (
    DreamerConfig()
    .environment("dmc/walker-walk", env_config={"action_repeat": 2})
    .training(replay_capacity=250_000)
    .debugging(seed=0)
)

if torch.cuda.is_available():
    config.training(model_size="12M", training_ratio=256)
    config.env_runners(num_env_runners=min(4, available_cpus() - 1), num_envs_per_env_runner=4)
    config.learners(num_learners=0, num_gpus_per_learner=1)
else:
    config.training(
        model_size="3M",
        gamma=0.99,
        training_ratio=64,
        batch_size_B=8,
        batch_length_T=64,
        lr=3e-4,
        warmup_updates=100,
    )
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=4)
    config.reporting(min_time_s_per_iteration=20)

stop = {"dreamer/env_steps": 1_000_000}
