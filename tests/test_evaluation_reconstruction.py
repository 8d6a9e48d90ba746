"""Tests of rllib_dreamer.evaluation.reconstruction."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import metrics

from rllib_dreamer.evaluation import reconstruction


def noisy_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[NDArray, NDArray]:
    """Smooth float frames and a noisy copy of them, both in [0, 1]."""
    rng = np.random.default_rng(seed)
    h, w = shape[-3:-1]
    ramp = np.linspace(0.0, 1.0, h)[:, None, None] * np.linspace(0.2, 1.0, w)[:, None]
    truth = np.clip(ramp * rng.uniform(0.3, 1.0, (*shape[:-3], 1, 1, shape[-1])), 0.0, 1.0)
    return np.clip(truth + rng.normal(0.0, 0.08, shape), 0.0, 1.0), truth


@pytest.mark.parametrize("shape", [(3, 64, 64, 3), (2, 21, 34, 1), (1, 11, 11, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_frame_quality_agrees_with_scikit_image(shape: tuple[int, ...], dtype: type) -> None:
    model, truth = noisy_pair(shape)
    if dtype is np.uint8:
        model, truth = ((255 * x).round().astype(np.uint8) for x in (model, truth))
    quality = reconstruction.frame_quality(model.astype(dtype), truth.astype(dtype))
    unit = 255.0 if dtype is np.uint8 else 1.0
    for frame in range(shape[0]):
        a, b = model[frame] / unit, truth[frame] / unit
        ssim = metrics.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        )
        assert quality.ssim[frame] == pytest.approx(ssim, abs=1e-4)
        psnr = metrics.peak_signal_noise_ratio(b, a, data_range=1.0)
        assert quality.psnr[frame] == pytest.approx(psnr, abs=1e-3)


def test_identical_frames_reach_the_ceiling_and_flat_ones_stay_finite() -> None:
    black = np.zeros((2, 16, 16, 3), np.uint8)
    quality = reconstruction.frame_quality(black, black)
    np.testing.assert_allclose(quality.ssim, 1.0)
    np.testing.assert_allclose(quality.psnr, reconstruction.PSNR_CEILING_DB)
    assert reconstruction.frame_quality(black, black + 255).psnr[0] == pytest.approx(0.0, abs=1e-4)


def test_leading_axes_and_chunks_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, truth = noisy_pair((2, 5, 16, 16, 3))
    whole = reconstruction.frame_quality(model, truth)
    assert whole.ssim.shape == (2, 5)
    monkeypatch.setattr(reconstruction, "_FRAMES_PER_CHUNK", 3)
    np.testing.assert_allclose(reconstruction.frame_quality(model, truth).psnr, whole.psnr)
    one = reconstruction.frame_quality(model[1, 2][None], truth[1, 2][None])
    assert one.ssim[0] == pytest.approx(whole.ssim[1, 2], abs=1e-6)


def test_open_loop_splits_at_the_context_and_falls_with_the_noise() -> None:
    _, truth = noisy_pair((4, 8, 16, 16, 3))
    noise = np.random.default_rng(1).normal(size=truth.shape)
    model = np.clip(truth + noise * 0.02 * np.arange(1, 9)[:, None, None, None], 0, 1)
    quality = reconstruction.open_loop_quality(model, truth, context=5)
    np.testing.assert_array_equal(quality.context.step, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(quality.ahead.step, [1, 2, 3])
    frames = reconstruction.frame_quality(model, truth)
    np.testing.assert_allclose(quality.ahead.ssim, frames.ssim[:, 5:].mean(0))
    np.testing.assert_allclose(quality.context.psnr, frames.psnr[:, :5].mean(0))
    assert (np.diff(quality.ahead.psnr) < 0).all()
    assert (quality.ahead.ssim_low <= quality.ahead.ssim).all()
    assert (quality.ahead.ssim <= quality.ahead.ssim_high).all()
    assert json.loads(json.dumps(quality.ahead.as_dict()))["step"] == [1, 2, 3]


def test_open_loop_leaves_ended_sequences_out() -> None:
    model, truth = noisy_pair((2, 6, 16, 16, 3))
    valid = np.ones((2, 6), bool)
    valid[0, 3:] = valid[1, 5:] = False
    quality = reconstruction.open_loop_quality(model, truth, context=2, valid=valid)
    np.testing.assert_array_equal(quality.ahead.sequences, [2, 1, 1])
    single = reconstruction.frame_quality(model[1], truth[1])
    np.testing.assert_allclose(quality.ahead.ssim[1:], single.ssim[3:5])
    counted = reconstruction.frame_quality(model, truth).ssim[:, 2:][valid[:, 2:]]
    assert quality.ahead.overall()["ssim"] == pytest.approx(counted.mean())


def test_repeat_last_context_holds_the_frame_still() -> None:
    _, truth = noisy_pair((2, 6, 16, 16, 3))
    still = reconstruction.repeat_last_context(truth, 2)
    np.testing.assert_array_equal(still[:, :2], truth[:, :2])
    for step in range(2, 6):
        np.testing.assert_array_equal(still[:, step], truth[:, 1])


def test_head_errors_by_hand() -> None:
    errors = reconstruction.head_errors([[1.0], [2.0]], [[1.0], [4.0]], [[0.9], [0.4]], [[1], [0]])
    assert errors.reward_mae == pytest.approx(1.0)
    assert errors.reward_rmse == pytest.approx(np.sqrt(2.0))
    assert errors.cont_brier == pytest.approx((0.01 + 0.16) / 2)
    assert errors.cont_accuracy == 1.0


def test_errors_name_the_field() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"truth: got shape \(1, 16, 16, 3\)"):
        reconstruction.frame_quality(frames, frames[:1])
    with pytest.raises(ValueError, match="add a channel axis"):
        reconstruction.frame_quality(frames[..., 0], frames[..., 0])
    with pytest.raises(ValueError, match="got frames of 8 x 16 pixels"):
        reconstruction.frame_quality(frames[:, :8], frames[:, :8])
    with pytest.raises(ValueError, match="model: got dtype int64"):
        reconstruction.frame_quality(frames.astype(np.int64), frames)
    with pytest.raises(ValueError, match=r"truth: got float frames in \[0, 255\]"):
        reconstruction.frame_quality(frames, (frames + 255 * np.eye(16)[:, :, None]))
    with pytest.raises(ValueError, match=r"model: got float frames in \[nan, nan\]"):
        reconstruction.frame_quality(np.full(frames.shape, np.nan), frames)
    sequences = frames[None]
    with pytest.raises(ValueError, match="context: got 2 for sequences of 2 steps"):
        reconstruction.open_loop_quality(sequences, sequences, context=2)
    with pytest.raises(ValueError, match=r"model: got shape \(2, 16, 16, 3\)"):
        reconstruction.open_loop_quality(frames, frames, context=1)
    with pytest.raises(ValueError, match=r"valid: got shape \(2,\)"):
        reconstruction.open_loop_quality(sequences, sequences, context=1, valid=np.ones(2, bool))
    with pytest.raises(ValueError, match="valid: got no sequence"):
        reconstruction.open_loop_quality(
            sequences, sequences, context=1, valid=np.array([[True, False]])
        )
    with pytest.raises(ValueError, match="rewards and continues: got shapes"):
        reconstruction.head_errors([1.0], [1.0, 2.0], [1.0], [1.0])
