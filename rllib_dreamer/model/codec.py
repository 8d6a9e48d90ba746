"""Encoder and decoder of dict observations. An observation kind is one branch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_dreamer.model import nets, ops
from rllib_dreamer.model.sizes import ModelConfig, ObsSpec

ObsSpecs = Mapping[str, ObsSpec]


def module_name(key: str) -> str:
    """A key as the name of a submodule: no dot, no name that a ModuleDict has already.

    Different keys give different names, most of them the key itself.
    """
    name = key.replace("%", "%25").replace(".", "%2E")
    return f"{name}%" if hasattr(nn.ModuleDict(), name) else name


def _split(specs: ObsSpecs) -> tuple[dict[str, ObsSpec], dict[str, ObsSpec]]:
    """Returns the image leaves and the other leaves, both in sorted order."""
    images = {key: specs[key] for key in sorted(specs) if specs[key].kind == "image"}
    others = {key: specs[key] for key in sorted(specs) if specs[key].kind != "image"}
    return images, others


def _width(spec: ObsSpec) -> int:
    return spec.shape[0] * max(1, spec.classes)


def vector_features(obs: Mapping[str, Tensor], specs: ObsSpecs, symlog: bool) -> Tensor:
    """Concatenates the non-image leaves: one-hot of discrete ones, symlog of the real ones.

    Missing entries, -inf or a class of -1, become zeros.
    """
    parts = []
    for key, spec in specs.items():
        x = obs[key]
        if spec.kind == "discrete":
            x = ops.one_hot(x.reshape(-1, *spec.shape).long(), spec.classes)  # (n, s, K)
        else:
            x = x.reshape(-1, *spec.shape).float()
            x = x.masked_fill(x == -torch.inf, 0.0)
            x = ops.symlog(x) if symlog else x
        parts.append(x.flatten(1))  # (n, width)
    return ops.concat(parts)


def _stages(convs: nn.ModuleList, norms: nn.ModuleList) -> Iterator[tuple[nets.Conv, nets.Norm]]:
    """The convolutions with the norm that follows each."""
    return cast("Iterator[tuple[nets.Conv, nets.Norm]]", zip(convs, norms, strict=True))


class ImageEncoder(nn.Module):
    """Stages of 5x5 conv -> 2x2 max pool -> RMS norm over channels -> SiLU.

    (official `enc.simple`.) With `downsample="stride"` the convolutions have stride 2 instead.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        depths = [config.depth * mult for mult in config.mults]
        widths = [channels, *depths]
        self.strided = config.downsample == "stride"
        self.convs = nn.ModuleList(
            nets.Conv(a, b, stride=2 if self.strided else 1)
            for a, b in zip(widths[:-1], depths, strict=True)
        )
        self.norms = nn.ModuleList(nets.make_norm(d, config.norm) for d in depths)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (n, h, w, C) -> (n, features), flattened as (h, w, C)."""
        x = ops.normalize_frames(frames)
        for conv, norm in _stages(self.convs, self.norms):
            x = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (n, h, w, C'), channels-last
            x = norm.silu(x) if self.strided else norm.pool_silu(x)  # (n, h / 2, w / 2, C')
        return x.flatten(1)  # (n, h' * w' * C')


class Encoder(nn.Module):
    """tokens = (MLP of the vector features, conv features of the stacked images).

    With `config.embed` a linear layer brings the conv features to that width.
    """

    def __init__(self, specs: ObsSpecs, config: ModelConfig) -> None:
        super().__init__()
        self.images, self.vectors = _split(specs)
        self.symlog = config.symlog_obs
        self.embed = 0
        if self.vectors:
            width = sum(_width(spec) for spec in self.vectors.values())
            self.vector = nets.MLP(width, config.units, config.encoder_layers, config.norm)
            self.embed += config.units
        if self.images:
            h, w, _ = next(iter(self.images.values())).shape
            channels = sum(spec.shape[2] for spec in self.images.values())
            self.image = ImageEncoder(channels, config)
            shrink = 2 ** len(config.mults)
            features = (h // shrink) * (w // shrink) * config.depth * config.mults[-1]
            width = config.embed or features
            self.image_out = nets.Linear(features, width) if config.embed else nn.Identity()
            self.embed += width

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Observation leaves with one batch axis (n, ...) -> tokens (n, E)."""
        parts = []
        if self.vectors:
            parts.append(self.vector(vector_features(obs, self.vectors, self.symlog)))
        if self.images:
            parts.append(self.image_out(self.image(ops.concat([obs[key] for key in self.images]))))
        return ops.concat([part.float() for part in parts])


class ImageDecoder(nn.Module):
    """Latents -> a 4x4 map -> stages of upsample x2, 5x5 conv, RMS norm, SiLU -> pixels in (0, 1).

    (official `dec.simple` with `bspace` groups.) The same for either kind of `downsample`:
    upsampling leaves no checkerboard, as transposed convolutions do.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__()
        h, w, channels = shape
        shrink = 2 ** len(config.mults)
        depths = [config.depth * mult for mult in config.mults]
        self.blocks = config.decoder_blocks or config.blocks
        self.start = (h // shrink, w // shrink, depths[-1])
        if depths[-1] % self.blocks:
            raise ValueError(
                f"depth={config.depth} times the last of mults={config.mults} must be a multiple "
                f"of the decoder's {self.blocks} blocks."
            )
        size = self.start[0] * self.start[1] * self.start[2]
        self.deter_in = nets.BlockLinear(config.deter, size, self.blocks)
        self.stoch_in = nets.Layer(config.stoch * config.classes, 2 * config.units, config.norm)
        self.stoch_out = nets.Linear(2 * config.units, size)
        self.norm = nets.make_norm(depths[-1], config.norm)
        widths = depths[::-1]
        self.convs = nn.ModuleList(nets.Conv(a, b) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nets.make_norm(d, config.norm) for d in widths[1:])
        self.out = nets.Conv(widths[-1], channels)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """(n, D), (n, S * K) -> pixels before the sigmoid, as phases (n, h / 2, w / 2, 4 * C)."""
        n, (h, w, c) = deter.shape[0], self.start
        x0 = self.deter_in(deter).reshape(n, self.blocks, h, w, -1)  # (n, G, h, w, c / G)
        x0 = x0.permute(0, 2, 3, 1, 4).reshape(n, h, w, c)  # each group owns a slice of channels
        x1 = self.stoch_out(self.stoch_in(stoch)).reshape(n, h, w, c)
        x = self.norm.silu(x0 + x1)  # (n, h, w, c)
        for conv, norm in _stages(self.convs, self.norms):
            x = ops.upsample_conv(x.permute(0, 3, 1, 2), conv.weight, conv.bias)
            x = norm.phase_silu(x)  # (n, 2h, 2w, c')
        return ops.upsample_conv(x.permute(0, 3, 1, 2), self.out.weight, self.out.bias)


class VectorDecoder(nn.Module):
    """MLP of (stoch, deter), then one linear head for each non-image leaf."""

    def __init__(self, specs: ObsSpecs, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = nets.MLP(config.feat, config.units, config.decoder_layers, config.norm)
        self.heads = nn.ModuleDict(
            {module_name(k): nets.Linear(config.units, _width(spec)) for k, spec in specs.items()}
        )

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """(n, D), (n, S * K) -> raw outputs (n, width) by module name. stoch comes first here."""
        x = self.mlp(torch.cat([stoch, deter], -1))
        return {key: head(x) for key, head in self.heads.items()}


class Decoder(nn.Module):
    """Reconstruction of every observation leaf from the latents."""

    def __init__(self, specs: ObsSpecs, config: ModelConfig) -> None:
        super().__init__()
        self.images, self.vectors = _split(specs)
        self.symlog = config.symlog_obs
        if self.vectors:
            self.vector = VectorDecoder(self.vectors, config)
        if self.images:
            h, w, _ = next(iter(self.images.values())).shape
            self.channels = [spec.shape[2] for spec in self.images.values()]
            self.image = ImageDecoder((h, w, sum(self.channels)), config)

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """(n, D), (n, S * K) -> by leaf: phases of pixels, as `ImageDecoder`, or raw (n, width)."""
        outputs: dict[str, Tensor] = {}
        if self.vectors:
            raw = self.vector(deter, stoch)
            outputs |= {key: raw[module_name(key)].float() for key in self.vectors}
        if self.images:
            phases = self.image(deter, stoch).unflatten(-1, (4, -1))  # (n, h / 2, w / 2, 4, C)
            parts = [part.flatten(-2) for part in phases.split(self.channels, -1)]
            outputs |= dict(zip(self.images, parts, strict=True))
        return outputs

    def losses(self, outputs: Mapping[str, Tensor], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruction loss (n,) of each leaf.

        Images: sum of squared errors of pixels in [0, 1]. Real vectors: squared error in symlog
        space. Discrete: cross-entropy. All are sums over the leaf, without a factor 1/2. Missing
        entries, see `vector_features`, add nothing.
        """
        losses = {}
        for key in self.images:
            losses[key] = ops.image_loss(outputs[key], obs[key])
        for key, spec in self.vectors.items():
            target = obs[key].reshape(-1, *spec.shape)
            if spec.kind == "discrete":
                log_probs = F.log_softmax(outputs[key].reshape(*target.shape, spec.classes), -1)
                losses[key] = -(ops.one_hot(target.long(), spec.classes) * log_probs).sum((1, 2))
            else:
                missing, target = target == -torch.inf, target.float()
                target = ops.symlog(target) if self.symlog else target
                error = (outputs[key] - target).masked_fill(missing, 0.0)
                losses[key] = error.square().sum(-1)
        return losses

    def predictions(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw outputs as observations: pixels in [0, 1], vectors in their units, class indices."""
        predictions = {
            key: torch.sigmoid(ops.place_phases(outputs[key].float())) for key in self.images
        }
        for key, spec in self.vectors.items():
            raw = outputs[key]
            if spec.kind == "discrete":
                predictions[key] = raw.reshape(-1, *spec.shape, spec.classes).argmax(-1)
            else:
                predictions[key] = ops.symexp(raw) if self.symlog else raw
        return predictions
