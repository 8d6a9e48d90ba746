"""Looking at what was learned: statistics, frame quality, videos, reports and learning curves.

The first six work on numpy arrays or files on disk, so also on data collected elsewhere; the others
run environments and a loaded policy.

=================  ===============================================================================
`statistics`       returns of episodes: mean, median, IQM, stratified bootstrap intervals
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
=================  ===============================================================================
"""
