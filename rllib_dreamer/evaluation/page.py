"""The report of an evaluation: what goes on the page."""

from __future__ import annotations

from rllib_dreamer.evaluation import plots, report
from rllib_dreamer.evaluation.run import Evaluation
from rllib_dreamer.evaluation.statistics import Summary
from rllib_dreamer.evaluation.world_model import ImageQuality
from rllib_dreamer.policy.imagination import CONTEXT

Items = list[report.Plot | report.Video | report.Table]

_BLANK = "-"


def evaluation_page(evaluation: Evaluation) -> report.Report:
    """Puts an evaluation on a page, ready to be written."""
    rules, about = evaluation.rules, evaluation.about
    kind = "greedy" if rules.greedy else "sampled"
    trained = (
        f", trained for {about['agent_steps']:,} agent steps" if "agent_steps" in about else ""
    )
    return report.Report(
        title=f"Evaluation on {evaluation.env}",
        subtitle=f"{about.get('checkpoint', 'policy')}{trained}; {kind} actions, seed {rules.seed}",
        numbers=_numbers(evaluation),
        sections=[
            report.Section("Episodes", _episode_items(evaluation), _episode_text(evaluation)),
            report.Section("World model", _world_items(evaluation), _world_text(evaluation)),
        ],
        footer=f"{len(evaluation.records)} episodes in {evaluation.seconds:.0f} s by "
        "rllib evaluate. SSIM and PSNR are means over frames; the interval is a "
        "bootstrap over the episodes.",
    )


def _numbers(evaluation: Evaluation) -> list[report.Number]:
    """The headline."""
    returns, lengths = evaluation.summary
    world, places = evaluation.world, returns.decimals
    numbers = [
        report.Number(
            "Return, mean",
            f"{returns.mean:.{places}f}",
            f"± {returns.std:.{places}f} (n={returns.n})",
        ),
        report.Number(
            "Return, IQM",
            f"{returns.iqm:.{places}f}",
            f"95 % interval {returns.iqm_low:.{places}f} to {returns.iqm_high:.{places}f}",
        ),
        report.Number(
            "Length, mean",
            f"{lengths.mean:.0f}",
            f"agent steps, {lengths.mean * evaluation.repeat:.0f} env steps",
        ),
    ]
    if evaluation.success_rate is not None:
        share = f"{100 * evaluation.success_rate:.0f} %"
        numbers.append(report.Number("Success", share, "of episodes"))
    for key, quality in world.images.items():
        numbers += _image_numbers(key if len(world.images) > 1 else "", quality)
    return numbers


def _image_numbers(key: str, quality: ImageQuality) -> list[report.Number]:
    ssim, psnr = (x.mean() for x in quality.posterior)
    name = f" ({key})" if key else ""
    numbers = [report.Number(f"Reconstruction{name}", f"{ssim:.3f}", f"SSIM; PSNR {psnr:.1f} dB")]
    if quality.open_loop is not None:
        ahead = quality.open_loop.ahead
        means = ahead.overall()
        text = f"SSIM; PSNR {means['psnr']:.1f} dB, 1 to {ahead.step[-1]} steps ahead"
        numbers.append(report.Number(f"Open loop{name}", f"{means['ssim']:.3f}", text))
    return numbers


def _episode_text(evaluation: Evaluation) -> str:
    cut = sum(record.cut for record in evaluation.records)
    note = "" if "best" in evaluation.clips else " The environment gives no pictures to film."
    limit = f" {cut} cut off after {evaluation.rules.max_steps} agent steps." if cut else ""
    return f"Each dot is an episode with a seed of its own.{limit}{note}"


def _episode_items(evaluation: Evaluation) -> Items:
    returns = [record.total_return for record in evaluation.records]
    picture = plots.to_png(plots.plot_returns(returns, evaluation.summary.returns))
    chosen = evaluation.chosen._asdict()
    places = evaluation.summary.returns.decimals
    traces = {
        f"{name} ({returns[i]:.{places}f})": evaluation.records[i].rewards
        for name, i in chosen.items()
    }
    rewards = plots.to_png(plots.plot_reward_traces(traces))
    items: Items = [
        report.Plot("Returns", picture, "The band is the 95 % interval of the IQM."),
        report.Plot("Reward along the episode", rewards, "Per agent step."),
    ]
    for name in chosen:
        if name in evaluation.clips:
            record, clip = evaluation.records[chosen[name]], evaluation.clips[name]
            caption = f"Return {record.total_return:.{places}f}, {len(record.rewards)} agent steps"
            title = f"{name.capitalize()} episode"
            items.append(report.Video(title, clip.mp4, caption, clip.poster))
    columns = ["", "mean", "std", "median", "min", "max", "IQM", "95 % interval"]
    rows = [_row("return", evaluation.summary.returns, places)]
    rows.append(_row("length (agent steps)", evaluation.summary.lengths, 0))
    return [*items, report.Table("All episodes", columns, rows, wide=True)]


def _row(name: str, summary: Summary, digits: int) -> list[str]:
    values = (summary.mean, summary.std, summary.median, summary.min, summary.max, summary.iqm)
    interval = f"{summary.iqm_low:.{digits}f} to {summary.iqm_high:.{digits}f}"
    return [name, *(f"{value:.{digits}f}" for value in values), interval]


def _world_text(evaluation: Evaluation) -> str:
    if evaluation.world.heads_open_loop is None:
        return f"No episode was longer than the {CONTEXT} steps that an open loop is shown."
    return (
        f"Open loop: the model is shown {CONTEXT} steps (green), then imagines on with the actions "
        "that were taken (red), without seeing anything more."
    )


def _world_items(evaluation: Evaluation) -> Items:
    world = evaluation.world
    items: Items = []
    if "open_loop" in evaluation.clips:
        clip = evaluation.clips["open_loop"]
        caption = "Rows: truth, model, error (gray where the two agree). Columns: windows."
        items.append(report.Video("Truth, model, error", clip.mp4, caption, clip.poster, wide=True))
    for key, quality in world.images.items():
        if quality.open_loop is None:
            continue
        for metric in ("ssim", "psnr"):
            figure = plots.plot_open_loop(quality.open_loop, metric, quality.still)
            title = f"{metric.upper()} per step ahead, {key}"
            items.append(
                report.Plot(title, plots.to_png(figure), "Bands: 10 % to 90 % of windows.")
            )
    return [*items, _errors(evaluation)]


def _errors(evaluation: Evaluation) -> report.Table:
    """The reward and continue heads and the leaves that are not pictures."""
    world = evaluation.world
    heads, ahead = world.heads, world.heads_open_loop
    names = {
        "reward_mae": "reward, mean absolute error",
        "reward_rmse": "reward, root mean squared error",
        "cont_brier": "continue, Brier score",
        "cont_accuracy": "continue, accuracy",
    }
    rows = [
        [text, f"{getattr(heads, key):.4g}", f"{getattr(ahead, key):.4g}" if ahead else _BLANK]
        for key, text in names.items()
    ]
    for key, (posterior, open_loop) in world.vectors.items():
        shown = _BLANK if open_loop != open_loop else f"{open_loop:.4g}"
        rows.append([f"{key}, root mean squared error", f"{posterior:.4g}", shown])
    return report.Table("Prediction errors", ["", "posterior", "open loop"], rows, wide=True)
