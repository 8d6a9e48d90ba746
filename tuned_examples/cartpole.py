"""CartPole-v1 from its four numbers: the quickest check that learning works.

    rllib train file tuned_examples/cartpole.py

Protocol: Gymnasium's CartPole-v1, episodes of at most 500 steps, return 500 at best. The 1M model
with small batches and a high learning rate.
Expected: a mean training return of the latest 20 episodes of 450, where it stops; there is no
published result.
Time: on two cores, with learner_threads=2, two of three seeds were there after 21,000 and 28,000
agent steps, 6.6 and 7.9 minutes, the third stood at 443 after ten; a budget of 100,000 agent steps.
"""

from rllib_dreamer import DreamerConfig

config = (
    DreamerConfig()
    .environment("CartPole-v1")
    .training(
        model_size="1M",
        training_ratio=32,
        batch_size_B=8,
        batch_length_T=32,
        lr=4e-4,
        warmup_updates=50,
        gamma=0.99,
        loss_scales={"rec": 100.0},  # else it does not learn where the cart is: docs/results.md
        precision="float32",  # bfloat16 gains nothing at this size, see docs/results.md
        learner_threads=1,  # two gain a quarter at best, and lose on shared cores
        replay_capacity=100_000,
    )
    .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
    .reporting(min_time_s_per_iteration=10, metrics_num_episodes_for_smoothing=20)
    .debugging(seed=0)
)

stop = {"env_runners/episode_return_mean": 450.0, "num_env_steps_sampled_lifetime": 100_000}
