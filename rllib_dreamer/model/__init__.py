"""DreamerV3 in plain PyTorch. Nothing below this package imports ray or gymnasium.

SHAPE LEGEND. Batch first, always; features last.

    B  batch rows             T  trained time steps      H  imagination horizon
    N  = B * T, starts of imagined trajectories, start n = b * T + t
    D  deter                  S  groups of stoch         K  classes of each group
    F  = D + S * K, width of `feat` = (deter, flattened stoch)
    E  embed, the encoder's output (vector features first, then image features as (h, w, c))
    A  width of the encoded action      U  hidden units      G  blocks of the block-linear layers
    (h, w, C)  image; frames are stored height, width, channels

ALIGNMENT, said once. Step t holds the observation o_t, the reward r_t and the flags that arrived
*with* o_t (r = 0 after a reset), and the action a_t chosen *after* seeing o_t, zero where is_last.
So the recurrent step into t consumes a_{t-1}, and r_{t+1} is the reward of a_t. A replayed row is
T + 1 steps long: step 0 is context, it supplies only the stored latents and the previous action.
In imagination index 0 is the replayed start and i = 1..H are imagined; a_i is chosen at state i.
"""
