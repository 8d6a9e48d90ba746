"""How close predicted frames, rewards and continues come to the real ones.

Frames are compared by SSIM and PSNR of torchmetrics with a data range of 1. The settings of SSIM
are those of Wang et al. 2004: Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01,
K2 = 0.03, population covariance, the mean over channels and over the pixels whose window lies
inside the frame. scikit-image gives the same by `structural_similarity(..., gaussian_weights=True,
sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1)`. torchmetrics 1.9 on its
own also averages the border, where the window sees mirrored pixels (29 % of a 64 x 64 frame), so
its plain result differs in the second digit; the border is cut off here.

A value for several frames is the mean of the values per frame, not a value of the pooled error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

PSNR_CEILING_DB = 100.0
"""Reported for identical frames, whose PSNR is infinite: means and JSON stay finite."""

SSIM_WINDOW = 11
"""Width of the Gaussian window in pixels, and so the least height and width of a frame."""

_BORDER = SSIM_WINDOW // 2
_FRAMES_PER_CHUNK = 128
_FLOAT_TOLERANCE = 1e-3

Frames = NDArray[Any]
Floats = NDArray[np.float64]


class FrameQuality(NamedTuple):
    """SSIM (at most 1) and PSNR (dB, at most `PSNR_CEILING_DB`) of each frame, both (...)."""

    ssim: Floats
    psnr: Floats


class StepQuality(NamedTuple):
    """Quality of each step over many sequences; all arrays (K,).

    `step` counts from 1; `low` and `high` are the 10 % and 90 % quantiles over the sequences;
    `sequences` counts those that reach the step. Steps that none reaches are left out.
    """

    step: NDArray[np.int64]
    sequences: NDArray[np.int64]
    ssim: Floats
    ssim_low: Floats
    ssim_high: Floats
    psnr: Floats
    psnr_low: Floats
    psnr_high: Floats

    def overall(self) -> dict[str, float]:
        """Returns the mean "ssim" and "psnr" over all frames, whichever step they are of."""
        weights = self.sequences
        return {
            "ssim": float(np.average(self.ssim, weights=weights)),
            "psnr": float(np.average(self.psnr, weights=weights)),
        }

    def as_dict(self) -> dict[str, list[float]]:
        """Returns plain lists, ready for JSON."""
        return {name: values.tolist() for name, values in self._asdict().items()}


class OpenLoopQuality(NamedTuple):
    """Quality while observing (`context`) and per step ahead without observing (`ahead`)."""

    context: StepQuality
    ahead: StepQuality


class HeadErrors(NamedTuple):
    """Errors of the reward and the continue head, means over all steps.

    `reward_mae` and `reward_rmse` are in reward units, `cont_brier` is the mean squared error of
    the probability in [0, 1], `cont_accuracy` the share of steps with the right side of 1/2.
    """

    reward_mae: float
    reward_rmse: float
    cont_brier: float
    cont_accuracy: float


def frame_quality(model: Frames, truth: Frames) -> FrameQuality:
    """Compares predicted frames with real ones, frame by frame.

    PSNR = 10 log10(1 / mean((model - truth)^2)) over the pixels and channels of a frame.

    Args:
        model: (..., h, w, C) predicted frames, uint8 in [0, 255] or float in [0, 1].
        truth: (..., h, w, C) real frames, likewise; the two may differ in dtype.

    Returns:
        SSIM and PSNR, both (...).

    Raises:
        ValueError: if the shapes differ, the frames are smaller than the window of SSIM, the
            dtype is neither uint8 nor float, or float values leave [0, 1].
    """
    _check_shapes(model, truth)
    leading, frame = model.shape[:-3], model.shape[-3:]
    model, truth = model.reshape(-1, *frame), truth.reshape(-1, *frame)  # (..., h, w, C) -> (N,)
    parts = [
        _chunk_quality(
            _unit_tensor(model[start : start + _FRAMES_PER_CHUNK], "model"),
            _unit_tensor(truth[start : start + _FRAMES_PER_CHUNK], "truth"),
        )
        for start in range(0, len(model), _FRAMES_PER_CHUNK)
    ]
    return FrameQuality(
        np.concatenate([part.ssim for part in parts]).reshape(leading),  # (N,) -> (...)
        np.concatenate([part.psnr for part in parts]).reshape(leading),
    )


def open_loop_quality(
    model: Frames,
    truth: Frames,
    context: int,
    *,
    valid: NDArray[np.bool_] | None = None,
) -> OpenLoopQuality:
    """Compares open-loop predictions with the truth, per step ahead.

    Args:
        model: (B, T, h, w, C) frames: `context` reconstructions, then imagined ones.
        truth: (B, T, h, w, C) real frames.
        context: observed steps at the start of each sequence, 1 to T - 1.
        valid: (B, T) False where a sequence has ended; None means all are valid.

    Returns:
        Quality of the observed steps and of the imagined ones.

    Raises:
        ValueError: if `context` leaves nothing to imagine, the shapes differ or no step of
            either part is valid.
    """
    if model.ndim != 5:
        raise ValueError(
            f"model: got shape {model.shape}; must be (sequences, steps, height, width, channels)."
        )
    quality = frame_quality(model, truth)
    B, T = quality.ssim.shape
    if not 1 <= context < T:
        raise ValueError(
            f"context: got {context} for sequences of {T} steps; must be 1 to {T - 1}: use a "
            "smaller context or longer sequences."
        )
    mask = np.ones((B, T), bool) if valid is None else np.asarray(valid, bool)
    if mask.shape != (B, T):
        raise ValueError(f"valid: got shape {mask.shape}; must be {(B, T)}, as the frames.")
    return OpenLoopQuality(
        _by_step(FrameQuality(*(x[:, :context] for x in quality)), mask[:, :context]),
        _by_step(FrameQuality(*(x[:, context:] for x in quality)), mask[:, context:]),
    )


def repeat_last_context(truth: Frames, context: int) -> Frames:
    """Predicts that nothing moves: the baseline an open-loop prediction has to beat.

    Args:
        truth: (B, T, h, w, C) real frames.
        context: observed steps at the start of each sequence, 1 to T - 1.

    Returns:
        (B, T, h, w, C) the true context, then its last frame over and over.
    """
    still = truth.copy()
    still[:, context:] = truth[:, context - 1 : context]
    return still


def head_errors(
    reward_model: ArrayLike,
    reward_truth: ArrayLike,
    cont_model: ArrayLike,
    cont_truth: ArrayLike,
) -> HeadErrors:
    """Measures the reward and continue predictions.

    Args:
        reward_model: (...) predicted rewards.
        reward_truth: (...) real rewards.
        cont_model: (...) predicted probabilities of going on, in [0, 1]. Divide out a discount
            that the head was trained on.
        cont_truth: (...) 0 on terminal steps, else 1.

    Returns:
        The errors.

    Raises:
        ValueError: if the shapes differ or there is no step.
    """
    given = (reward_model, reward_truth, cont_model, cont_truth)
    rewards, real_rewards, conts, real_conts = arrays = [np.asarray(x, np.float64) for x in given]
    shapes = [x.shape for x in arrays]
    if len(set(shapes)) > 1 or not rewards.size:
        raise ValueError(
            f"rewards and continues: got shapes {shapes}; all must have one shape, with at least "
            "one step."
        )
    error = rewards - real_rewards
    return HeadErrors(
        reward_mae=float(np.abs(error).mean()),
        reward_rmse=float(np.sqrt(np.square(error).mean())),
        cont_brier=float(np.square(conts - real_conts).mean()),
        cont_accuracy=float(((conts > 0.5) == (real_conts > 0.5)).mean()),
    )


def _check_shapes(model: Frames, truth: Frames) -> None:
    if model.shape != truth.shape:
        raise ValueError(f"truth: got shape {truth.shape}; must equal that of model, {model.shape}")
    if model.ndim < 4 or model.size == 0:
        raise ValueError(
            f"model: got shape {model.shape}; must be (..., height, width, channels) with at "
            "least one frame: add a channel axis to gray frames."
        )
    if min(model.shape[-3:-1]) < SSIM_WINDOW:
        raise ValueError(
            f"model: got frames of {model.shape[-3]} x {model.shape[-2]} pixels; SSIM needs at "
            f"least {SSIM_WINDOW} x {SSIM_WINDOW}: enlarge the frames."
        )


def _unit_tensor(frames: Frames, field: str) -> torch.Tensor:
    """Turns (N, h, w, C) frames into a float (N, C, h, w) tensor in [0, 1]."""
    if frames.dtype == np.uint8:
        unit = frames.astype(np.float32) / 255.0
    elif np.issubdtype(frames.dtype, np.floating):
        unit = frames.astype(np.float32)
    else:
        raise ValueError(f"{field}: got dtype {frames.dtype}; must be uint8 or a float in [0, 1].")
    low, high = float(unit.min()), float(unit.max())
    if not (low >= -_FLOAT_TOLERANCE and high <= 1.0 + _FLOAT_TOLERANCE):
        raise ValueError(
            f"{field}: got float frames in [{low:g}, {high:g}]; must lie in [0, 1]: divide by 255 "
            "or pass uint8."
        )
    channels_first = np.ascontiguousarray(np.moveaxis(unit.clip(0.0, 1.0), -1, 1))
    return torch.from_numpy(channels_first)  # (N, h, w, C) -> (N, C, h, w)


def _chunk_quality(model: torch.Tensor, truth: torch.Tensor) -> FrameQuality:
    """Compares (N, C, h, w) tensors in [0, 1]."""
    # As channels of one frame, since channels do not mix: takes half as long on a CPU.
    flat = (x.reshape(1, -1, *x.shape[2:]) for x in (model, truth))  # (1, N * C, h, w)
    _, ssim_map = structural_similarity_index_measure(
        *flat, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = ssim_map.view_as(model)[..., _BORDER:-_BORDER, _BORDER:-_BORDER].double()
    psnr = peak_signal_noise_ratio(model, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return FrameQuality(
        inside.mean((1, 2, 3)).numpy(),  # (N,)
        psnr.double().clamp(max=PSNR_CEILING_DB).numpy(),
    )


def _by_step(quality: FrameQuality, valid: NDArray[np.bool_]) -> StepQuality:
    """Summarizes (B, K) qualities over the sequences that reach each step."""
    reached = np.flatnonzero(valid.any(0))
    if reached.size == 0:
        raise ValueError(
            "valid: got no sequence with a step in one of the parts; at least one must go on "
            "past the context: use longer sequences."
        )
    columns = [
        [np.array([x[valid[:, k], k].mean(), *np.quantile(x[valid[:, k], k], [0.1, 0.9])])]
        for x in quality
        for k in reached
    ]
    table = np.concatenate(columns).reshape(2, reached.size, 3)  # (metric, step, mean/low/high)
    return StepQuality(reached + 1, valid[:, reached].sum(0), *table[0].T, *table[1].T)
