"""walker-walk from pixels with the classic DreamerV3: a small model and the losses of 2023.

    rllib train file tuned_examples/walker_classic.py

The set-up of a published from-scratch PyTorch program, as arguments of the same classes: LayerNorm
GRU of 512, 32 x 32 latents, stride-2 convolutions to a 1024-d embedding, 4-layer heads, a
tanh-squashed Normal, the policy gradient straight through the imagined trajectory, KL scales 0.8
and 0.2, Adam 1e-4 with gradients clipped to a norm of 100.

Expected: no more than the published 171.3 +- 39.5 after 500K env steps (not run to its end here);
`tuned_examples/walker.py` has the current algorithm. Seed 0.
Time: published, about 10 hours on an RTX-class GPU; without a CUDA machine, days.

Protocol: dm_control walker-walk, 64x64 RGB from camera 0, action repeat 2, an episode is 1,000 env
steps and 500 agent steps. One update per 2 env steps is one per agent step, a training ratio of
16 x 64 = 1024. The first 5,000 agent steps act at random.

What differs from that program: rewards and values are two-hot, the replay holds the latents of
acting, and learning begins with the first full batch, not after the random steps.
"""

import torch

from rllib_dreamer import DreamerConfig

MODEL = {
    "deter": 512,
    "hidden": 512,
    "stoch": 32,
    "classes": 32,
    "cell": "gru",
    "norm": "layer",
    "prior_layers": 2,
    "posterior_layers": 2,
    "downsample": "stride",
    "depth": 32,
    "mults": (1, 2, 4, 6),
    "embed": 1024,
    "decoder_blocks": 1,
    "units": 224,
    "reward_layers": 4,
    "reward_units": 928,
    "cont_layers": 4,
    "cont_units": 960,
    "actor_layers": 4,
    "actor_units": 448,
    "actor_dist": "tanh_normal",
    "critic_layers": 4,
    "critic_units": 352,
}

config = (
    DreamerConfig()
    .environment("dmc/walker-walk", env_config={"action_repeat": 2})
    .training(
        batch_size_B=16,
        batch_length_T=64,
        horizon_H=15,
        gamma=0.997,
        free_nats=1.0,
        loss_scales={"dyn": 0.8, "rep": 0.2, "repval": 0.0},
        actor_grad="dynamics",
        optimizer="adam",
        lr=1e-4,
        warmup_updates=0,
        grad_clip_norm=100.0,
        training_ratio=1024,
        replay_capacity=1_000_000,
        initial_random_steps=5_000,
    )
    .rl_module(model_config=MODEL)
    .learners(num_learners=0, num_gpus_per_learner=int(torch.cuda.is_available()))
    .debugging(seed=0)
)

stop = {"dreamer/env_steps": 500_000}
