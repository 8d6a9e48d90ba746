"""Two cameras and the joints of a robot in one Dict observation.

    rllib train file tuned_examples/multi_camera_dict.py

Protocol: robosuite Lift as in `robosuite_lift.py`, but the agent sees a Dict of three: `agentview`
and `robot0_eye_in_hand` (64x64 RGB each) and `vector` (50 numbers: joints, gripper, hand; nothing
of the cube). The loss of each key is reported under its name.
On a CUDA machine the 12M model, on a CPU the 1M model with small batches.
Expected: no result of ours yet and none published; a random policy returns about 4 of at most 500.
Time: not measured.
"""

import torch

from rllib_dreamer import DreamerConfig
from rllib_dreamer.hardware import available_cpus

config = (
    DreamerConfig()
    .environment(
        "robosuite/Lift",
        env_config={
            "observation": "both",
            "cameras": ("agentview", "robot0_eye_in_hand"),
            "action_repeat": 2,
        },
    )
    .training(model_size="12M", training_ratio=256, replay_capacity=200_000)
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
