"""robosuite Lift with a Panda arm, from pixels.

    rllib train file tuned_examples/robosuite_lift.py

Protocol: Lift of robosuite 1.5, 64x64 RGB from `agentview`, the arm's default controller
(operational space, 7 actions) at 20 Hz, shaped reward, action repeat 2, horizon 500, so that an
episode is 250 agent steps; the horizon truncates. The reward of a control step is at most 1, so a
perfect episode stays below 500.
On a CUDA machine the 12M model, on a CPU the 1M model with small batches.
Expected: no result of ours yet and none published for DreamerV3; a random policy returns about 4
(mean of 4 episodes).
Time: not measured.
"""

import torch

from rllib_dreamer import DreamerConfig
from rllib_dreamer.hardware import available_cpus

config = (
    DreamerConfig()
    .environment("robosuite/Lift", env_config={"action_repeat": 2, "horizon": 500})
    .training(model_size="12M", training_ratio=256, replay_capacity=250_000)
    .env_runners(num_env_runners=0, num_envs_per_env_runner=1)
    .reporting(min_time_s_per_iteration=20)
    .debugging(seed=0)
)

if torch.cuda.is_available():
    config.env_runners(num_env_runners=min(4, available_cpus() - 1), num_envs_per_env_runner=1)
    config.learners(num_learners=0, num_gpus_per_learner=1)
else:
    config.training(model_size="1M", training_ratio=64, batch_size_B=8)

stop = {"dreamer/env_steps": 1_000_000}
