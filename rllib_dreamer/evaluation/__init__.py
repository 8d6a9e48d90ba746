"""Looking at what was learned: statistics, frame quality, videos, reports and learning curves.

The first six work on numpy arrays or files on disk, so also on data collected elsewhere; the next
five run environments and a loaded policy; the last three look at a run in training.

=================  ===============================================================================
`statistics`       returns of episodes: mean, median, IQM, bootstrap intervals
`reconstruction`   SSIM and PSNR of predicted frames, per step ahead for open loop
`videos`           frames to MP4; the truth / model / error grid
`plots`            matplotlib figures as PNG bytes
`report`           one self-contained HTML page out of figures, tables, plots and videos
`curves`           learning curves of Tune runs beside the published ones
`environments`     the environment of a checkpoint, in several copies stepped together
`episodes`         episodes played by a policy
`world_model`      what the world model predicts of recorded episodes
`run`              a whole evaluation
`page`             its report
`recorder`         pictures of a run in training
`training_videos`  films of them in the trial's folder
`wandb_logger`     and in Weights & Biases
=================  ===============================================================================
"""
