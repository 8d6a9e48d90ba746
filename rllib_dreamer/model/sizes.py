"""Architecture and algorithm constants: one row a model size, everything else by its default."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple


class Size(NamedTuple):
    """What a model size sets. deter = 8 * units, hidden = units, classes = depth = units / 16."""

    deter: int
    hidden: int
    classes: int
    depth: int
    units: int


SIZES = {
    "1M": Size(512, 64, 4, 4, 64),
    "3M": Size(1024, 128, 8, 8, 128),  # of this package, for CPUs
    "12M": Size(2048, 256, 16, 16, 256),
    "25M": Size(3072, 384, 24, 24, 384),
    "50M": Size(4096, 512, 32, 32, 512),
    "100M": Size(6144, 768, 48, 48, 768),
    "200M": Size(8192, 1024, 64, 64, 1024),
    "400M": Size(12288, 1536, 96, 96, 1536),
}
ALIASES = {"XS": "12M", "S": "25M", "M": "50M", "L": "100M", "XL": "200M"}
ALIASES |= dict.fromkeys(("NANO", "MICRO", "MINI", "XXS"), "1M")  # RLlib's sizes for debugging


@dataclass(frozen=True)
class ObsSpec:
    """One observation leaf.

    Args:
        kind: "image" (uint8), "vector" (real numbers) or "discrete" (class indices).
        shape: (h, w, C), (n,) or (n,).
        classes: Number of classes of a discrete leaf.
    """

    kind: str
    shape: tuple[int, ...]
    classes: int = 0


@dataclass(frozen=True)
class ActionSpec:
    """One action leaf: n real numbers in [-1, 1], or n class indices.

    Args:
        kind: "continuous" or "discrete".
        size: n, the number of components.
        classes: Number of classes of each component of a discrete leaf.
        limits: Number of classes of each single component, where they differ; else empty.
    """

    kind: str
    size: int
    classes: int = 0
    limits: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Width of the leaf in the encoded action: a one-hot for each discrete component."""
        return self.size * max(1, self.classes)


CHOICES = {
    "cell": ("block_gru", "gru"),
    "norm": ("rms", "layer"),
    "downsample": ("pool", "stride"),
    "actor_dist": ("bounded_normal", "tanh_normal"),
    "actor_grad": ("reinforce", "dynamics"),
}
"""What the named variants of `ModelConfig` and `LossConfig` may be; the first is the default."""

_WIDTHS = ("deter", "hidden", "depth", "units")
_LAYERS = (
    *("encoder_layers", "decoder_layers", "prior_layers", "posterior_layers"),
    *("reward_layers", "cont_layers", "actor_layers", "critic_layers"),
)
_OPTIONAL_WIDTHS = ("embed", "reward_units", "cont_units", "actor_units", "critic_units")


def _check_choices(config: Any) -> None:
    """Raises ValueError if a field holds none of its choices."""
    for name, allowed in CHOICES.items():
        given = getattr(config, name, allowed[0])
        if given not in allowed:
            raise ValueError(f"{name}={given!r} is not known: choose one of {', '.join(allowed)}.")


def _check_numbers(config: ModelConfig) -> None:
    """Raises ValueError if a width, a share or a standard deviation is out of its range."""
    kinds = dict.fromkeys(_WIDTHS, "width") | dict.fromkeys(_LAYERS, "number of layers")
    kinds["stoch"] = "number of categoricals"
    for name, kind in kinds.items():
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be a {kind} >= 1.")
    if not config.mults or min(config.mults) < 1:
        raise ValueError(
            f"mults={config.mults} must be multiples of `depth`, each >= 1, one a convolution."
        )
    for name in _OPTIONAL_WIDTHS:
        if getattr(config, name) < 0:
            raise ValueError(
                f"{name}={getattr(config, name)} must be a width >= 1, or 0 for the default."
            )
    for name in ("unimix", "actor_unimix"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name}={getattr(config, name)} must be a share, in [0, 1).")
    if not 0.0 < config.min_std <= config.max_std:
        raise ValueError(
            f"min_std={config.min_std} and max_std={config.max_std}: 0 < min_std <= max_std."
        )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the world model, the actor and the critic (official `agent` config).

    The fields from `cell` on are off by default: with them the same classes make the classic
    DreamerV3 of `tuned_examples/walker_classic.py`.

    Raises:
        ValueError: If one of those fields has a value that does not exist, a number is out of its
            range, or widths do not fit.
    """

    deter: int
    hidden: int
    classes: int
    depth: int
    units: int
    stoch: int = 32
    blocks: int = 8
    mults: tuple[int, ...] = (2, 3, 4, 4)
    encoder_layers: int = 3
    decoder_layers: int = 3
    prior_layers: int = 2
    posterior_layers: int = 1
    reward_layers: int = 1
    cont_layers: int = 1
    actor_layers: int = 3
    critic_layers: int = 3
    bins: int = 255
    unimix: float = 0.01
    actor_unimix: float = 0.01
    min_std: float = 0.1
    max_std: float = 1.0
    symlog_obs: bool = True
    decoder_blocks: int = 0  # groups of the image decoder's first layer; 0: as `blocks`
    cell: str = "block_gru"  # "gru": one dense layer of (stoch, action), then a LayerNorm GRU
    norm: str = "rms"  # "layer": layer norm, with a shift
    downsample: str = "pool"  # "stride": the encoder's convolutions have stride 2
    embed: int = 0  # width of a linear layer after the encoder's convolutions; 0: no such layer
    actor_dist: str = "bounded_normal"  # "tanh_normal": squashed by tanh
    reward_units: int = 0  # of each head; 0: `units`
    cont_units: int = 0
    actor_units: int = 0
    critic_units: int = 0

    def __post_init__(self) -> None:
        """Checks the named variants and the ranges of the numbers."""
        _check_choices(self)
        _check_numbers(self)
        if self.bins < 3 or self.bins % 2 == 0:
            raise ValueError(
                f"bins={self.bins} must be an odd number >= 3: the bins are symmetric about a zero."
            )
        if not 2 <= self.classes <= 256:
            raise ValueError(
                f"classes={self.classes} must be from 2 to 256: the replay keeps a class in a byte."
            )
        for name in ("blocks", "decoder_blocks"):
            blocks = getattr(self, name) or self.blocks
            if blocks < 1 or self.deter % blocks:
                raise ValueError(f"deter={self.deter} must be a multiple of {name}={blocks}.")

    @property
    def feat(self) -> int:
        """F, the width of (deter, flattened stoch)."""
        return self.deter + self.stoch * self.classes


@dataclass(frozen=True)
class LossConfig:
    """Constants of the losses (official `agent` config, paper table 4).

    Raises:
        ValueError: If `actor_grad` is none of `CHOICES`.
    """

    horizon: int = 15
    discount: float = 1.0 - 1.0 / 333.0
    lam: float = 0.95
    free_nats: float = 1.0
    entropy_scale: float = 3e-4
    slow_regularization: float = 1.0
    slow_rate: float = 0.02
    return_rate: float = 0.01
    return_limit: float = 1.0
    return_percentiles: tuple[float, float] = (5.0, 95.0)
    scales: dict[str, float] = field(
        default_factory=lambda: {
            "rec": 1.0,
            "reward": 1.0,
            "cont": 1.0,
            "dyn": 1.0,
            "rep": 0.1,
            "actor": 1.0,
            "critic": 1.0,
            "repval": 0.3,
        }
    )
    actor_grad: str = "reinforce"  # "dynamics": through the imagined trajectory

    def __post_init__(self) -> None:
        """Checks the named variants."""
        _check_choices(self)


def model_config(size: str, **overrides: Any) -> ModelConfig:
    """Returns the architecture of a named size.

    Args:
        size: "1M" ... "400M", or RLlib's XS, S, M, L, XL for 12M ... 200M and nano, micro, mini,
            XXS for 1M.
        **overrides: Fields of `ModelConfig` to change.

    Raises:
        ValueError: If there is no such size.
    """
    name = ALIASES.get(str(size).upper(), str(size).upper())
    if name not in SIZES:
        raise ValueError(
            f"model_size={size!r} is not known: choose one of {', '.join(SIZES)} "
            f"(or {', '.join(ALIASES)} for {', '.join(ALIASES.values())})."
        )
    return replace(ModelConfig(**SIZES[name]._asdict()), **overrides)
