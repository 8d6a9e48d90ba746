"""Looking at what was learned: statistics, frame quality, videos, reports and learning curves.

Nothing here runs an environment or a model: every function takes numpy arrays or files on disk,
so each one also works on data that was collected elsewhere.

=================  ===============================================================================
`statistics`       returns of episodes: mean, median, IQM, stratified bootstrap intervals
`reconstruction`   SSIM and PSNR of predicted frames, per step ahead for open loop
`videos`           frames to MP4; the truth / model / error grid
`plots`            matplotlib figures as PNG bytes
`report`           one self-contained HTML page out of figures, tables, plots and videos
`curves`           learning curves of Tune runs beside the published ones
`plot_command`     the `rllib plot` sub-command
=================  ===============================================================================
"""
