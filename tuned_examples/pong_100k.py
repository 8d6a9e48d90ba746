"""Pong by the Atari 100k protocol.

    rllib train file tuned_examples/pong_100k.py

Protocol: 100,000 agent steps, that is 400,000 frames: no sticky actions, action repeat 4, maximum
of the last two frames, then resized to 64x64 RGB, the game's own 6 actions, up to 30 no-op frames,
lives not used, at most 108,000 frames a game, one env, training ratio 256. Without a CUDA device it
is another: the 1M model with a training ratio of 64 and small batches.
Expected: no result of ours yet. Published at the end of it, five seeds: -9, -8, -4, -3 and -1
(danijar/dreamerv3, scores/atari100k; `rllib plot --reference atari100k`). A random policy returns
about -20, the best is 21.
Time: not measured.
"""

import torch

from rllib_dreamer import DreamerConfig

config = (
    DreamerConfig()
    .environment("atari100k/pong")
    .training(model_size="200M", training_ratio=256, replay_capacity=100_000)
    .env_runners(num_env_runners=0, num_envs_per_env_runner=1)
    .reporting(min_time_s_per_iteration=20)
    .debugging(seed=0)
)

if torch.cuda.is_available():
    config.learners(num_learners=0, num_gpus_per_learner=1)
else:  # days instead of hours with the published settings
    config.training(model_size="1M", training_ratio=64, batch_size_B=8)

stop = {"num_env_steps_sampled_lifetime": 100_000}
