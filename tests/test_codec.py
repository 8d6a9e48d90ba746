"""Tests of rllib_dreamer.model.codec."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_export import TINY, agent_and_batch
from torch import Tensor, nn

from rllib_dreamer.model import ops
from rllib_dreamer.model.codec import Decoder, Encoder, ImageDecoder, module_name, vector_features
from rllib_dreamer.model.sizes import ObsSpec, model_config

SPECS = {
    "position": ObsSpec("vector", (2,)),
    "inventory": ObsSpec("discrete", (2,), 3),
    "speed": ObsSpec("vector", (1,)),
}
CONFIG = model_config("1M", units=16, hidden=16, deter=32, depth=2, stoch=4, mults=(2, 4))


def observation() -> dict[str, Tensor]:
    return {
        "position": torch.tensor([[-3.0, np.e - 1.0]]),
        "inventory": torch.tensor([[2, 0]]),
        "speed": torch.tensor([[1000.0]]),
    }


def sorted_specs() -> dict[str, ObsSpec]:
    return {key: SPECS[key] for key in sorted(SPECS)}


def test_vector_features_are_one_hot_and_symlog_in_sorted_order() -> None:
    features = vector_features(observation(), sorted_specs(), symlog=True)
    expected = [0, 0, 1, 1, 0, 0, -np.log(4.0), 1.0, np.log(1001.0)]
    torch.testing.assert_close(features, torch.tensor([expected], dtype=torch.float32))
    raw = vector_features(observation(), sorted_specs(), symlog=False)
    torch.testing.assert_close(raw[0, -3:], torch.tensor([-3.0, np.e - 1.0, 1000.0]))


def test_missing_values_become_zeros() -> None:
    obs = observation()
    obs["position"][0, 0] = -torch.inf
    obs["inventory"][0, 1] = -1
    features = vector_features(obs, sorted_specs(), symlog=True)
    assert features[0, 3:7].tolist() == [0, 0, 0, 0]


def test_tokens_are_vector_features_then_image_features_as_rows() -> None:
    specs = SPECS | {"camera": ObsSpec("image", (16, 16, 3))}
    encoder = Encoder(specs, CONFIG)
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    obs = observation() | {"camera": frames}
    tokens = encoder(obs)
    assert encoder.embed == tokens.shape[-1] == 16 + 4 * 4 * 8
    frames[0, 15, 15] = 255  # the lower right corner changes the last of the (h, w, C) features
    changed = (encoder(obs) != tokens)[0]
    assert not changed[:16].any()
    image = changed[16:].unflatten(0, (4, 4, 8))
    assert image[3, 3].any() and not image[:2, :2].any()


def test_images_are_stacked_in_sorted_order_and_scaled() -> None:
    specs = {"b": ObsSpec("image", (8, 8, 1)), "a": ObsSpec("image", (8, 8, 2))}
    encoder = Encoder(specs, CONFIG)
    seen: list[Tensor] = []
    encoder.image.convs[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    values = {"a": 255, "b": 51}
    encoder({k: torch.full((1, *specs[k].shape), v, dtype=torch.uint8) for k, v in values.items()})
    expected = torch.tensor([0.5, 0.5, -0.3]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(seen[0], expected)


def decoder_and_latents() -> tuple[Decoder, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    specs = SPECS | {"a": ObsSpec("image", (16, 16, 1)), "b": ObsSpec("image", (16, 16, 3))}
    decoder = Decoder(specs, CONFIG)
    outputs = decoder(torch.randn(5, CONFIG.deter), torch.randn(5, CONFIG.stoch * CONFIG.classes))
    obs = {
        "a": torch.randint(0, 256, (5, 16, 16, 1), dtype=torch.uint8),
        "b": torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8),
        "position": torch.randn(5, 2) * 9,
        "speed": torch.randn(5, 1),
        "inventory": torch.randint(0, 3, (5, 2)),
    }
    return decoder, outputs, obs


def test_reconstruction_losses_are_sums_without_a_half() -> None:
    decoder, outputs, obs = decoder_and_latents()
    losses, predictions = decoder.losses(outputs, obs), decoder.predictions(outputs)
    assert losses.keys() == obs.keys()
    for key in ("a", "b"):
        assert predictions[key].shape == obs[key].shape
        expected = (predictions[key] - obs[key] / 255.0).square().sum((1, 2, 3))
        torch.testing.assert_close(losses[key], expected)
    x = obs["position"]
    target = x.sign() * (1 + x.abs()).log()
    expected = (outputs["position"] - target).square().sum(-1)
    torch.testing.assert_close(losses["position"], expected)
    y = predictions["position"]
    torch.testing.assert_close(y.sign() * (1 + y.abs()).log(), outputs["position"])
    logits = outputs["inventory"].reshape(5, 2, 3)
    expected = F.cross_entropy(logits.flatten(0, 1), obs["inventory"].flatten(), reduction="none")
    torch.testing.assert_close(losses["inventory"], expected.reshape(5, 2).sum(-1))
    assert torch.equal(predictions["inventory"], logits.argmax(-1))


def test_missing_values_add_nothing_to_the_losses() -> None:
    decoder, outputs, obs = decoder_and_latents()
    complete = decoder.losses(outputs, obs)
    keys = ("position", "inventory")
    obs["position"][0], obs["inventory"][0] = -torch.inf, -1  # nothing is known of these two leaves
    obs["position"][1, 0], obs["inventory"][1, 0] = -torch.inf, -1  # half of each is known
    losses = decoder.losses(outputs, obs)
    gradients = torch.autograd.grad(
        sum(losses[key].sum() for key in keys), [outputs[key] for key in keys]
    )
    for key, gradient in zip(keys, gradients, strict=True):
        assert losses[key][0] == 0.0 and not gradient[0].any()
        assert 0.0 < losses[key][1] < complete[key][1]
        assert gradient.isfinite().all() and gradient[1].any()
        torch.testing.assert_close(losses[key][2:], complete[key][2:])


def test_each_block_of_the_first_image_layer_owns_a_slice_of_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Decoder({"image": ObsSpec("image", (16, 16, 3))}, replace(CONFIG, blocks=4)).image
    maps: list[Tensor] = []
    norm_silu = ops.norm_silu

    def spy(x: Tensor, scale: Tensor) -> Tensor:
        if x.ndim == 4:  # the sum of both branches (n, h, w, c)
            maps.append(x.detach())
        return norm_silu(x, scale)

    monkeypatch.setattr(ops, "norm_silu", spy)
    with torch.no_grad():
        decoder.stoch_out.weight.zero_()
        decoder.deter_in.bias.unflatten(0, (4, -1))[2] = torch.arange(4.0 * 4 * 2)
    decoder(torch.zeros(1, 32), torch.zeros(1, 16))
    (x,) = maps
    assert x[..., [0, 1, 2, 3, 6, 7]].count_nonzero() == 0  # the third of four blocks has 4 and 5
    assert torch.equal(x[0, ..., 4:6], torch.arange(32.0).reshape(4, 4, 2))


@pytest.mark.parametrize("key", ["keys", "values", "items", "pop", "training", "a.b", "type"])
def test_any_key_can_name_a_module(key: str) -> None:
    modules = nn.ModuleDict({module_name(key): nn.Identity()})
    assert module_name(key) in modules


def test_blocks_that_do_not_divide_the_channels_are_named() -> None:
    config = model_config("1M", depth=3)
    with pytest.raises(ValueError, match=r"depth=3 times .* must be a multiple of"):
        ImageDecoder((32, 32, 3), config)


def test_different_keys_have_different_modules() -> None:
    keys = ["a.b", "a_b", "a%2Eb", "keys", "keys%", "action", "a/b"]
    assert len({module_name(key) for key in keys}) == len(keys)
    assert module_name("camera/front") == "camera/front"


def test_every_kind_of_leaf_is_learned_from() -> None:
    """No leaf is forgotten: each one's loss sends gradients to the decoder and to the encoder."""
    agent, batch = agent_and_batch(TINY)
    losses = agent(batch).losses
    for key in TINY.obs:
        agent.zero_grad()
        losses[key].mean().backward(retain_graph=True)
        for part in (agent.world.decoder, agent.world.encoder):
            assert any(p.grad is not None and p.grad.any() for p in part.parameters()), key
