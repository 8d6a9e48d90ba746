"""walker-walk from joint positions and velocities.

    rllib train file tuned_examples/walker_proprio.py

Protocol: dm_control walker-walk, proprioception only, action repeat 1 as in the official code's
present dmc_proprio preset (size 1M, training ratio 1024, 16 envs, 500,000 env steps). On the CPU,
also where there is a GPU: that takes `--set num_gpus_per_learner=1`.
Expected: no result of ours yet. Published: 881 after 490,000 env steps, mean of five seeds
(danijar/dreamerv3, scores/dmc_proprio; `rllib plot --reference dmc_proprio`).
Time: not measured.
"""

from rllib_dreamer import DreamerConfig

config = (
    DreamerConfig()
    .environment("dmc/walker-walk", env_config={"observation": "proprio", "action_repeat": 1})
    .training(model_size="1M", training_ratio=1024, replay_capacity=500_000)
    .env_runners(num_env_runners=0, num_envs_per_env_runner=16)
    .reporting(min_time_s_per_iteration=20)
    .debugging(seed=0)
)

stop = {"dreamer/env_steps": 500_000}
