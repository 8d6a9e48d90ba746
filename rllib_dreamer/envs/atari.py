"""Atari: `atari100k/<game>` (the paper's protocol) and `ALE/<Game>-v5` (sticky actions).

Both drive the Arcade Learning Environment directly and differ only in their options:

| | atari100k/pong | ALE/Pong-v5 |
|---|---|---|
| sticky actions | no | probability 0.25 a frame |
| no-op frames at reset | 0 to 30, uniformly | none |
| picture | maximum of the last two frames, then resized | last frame, resized |
| action repeat, actions, episode length | 4, the game's own, 108000 frames | the same |

Lives are not used: an episode ends with the game. The frame limit truncates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rllib_dreamer.envs import wrappers
from rllib_dreamer.near_names import nearest

GAMES = tuple(
    """adventure air_raid alien amidar assault asterix asteroids atlantis atlantis2 backgammon
    bank_heist basic_math battle_zone beam_rider berzerk blackjack bowling boxing breakout carnival
    casino centipede chopper_command crazy_climber crossbow darkchambers defender demon_attack
    donkey_kong double_dunk earthworld elevator_action enduro entombed et fishing_derby flag_capture
    freeway frogger frostbite galaxian gopher gravitar hangman haunted_house hero human_cannonball
    ice_hockey jamesbond journey_escape kaboom kangaroo keystone_kapers king_kong klax koolaid krull
    kung_fu_master laser_gates lost_luggage mario_bros miniature_golf montezuma_revenge mr_do
    ms_pacman name_this_game othello pacman phoenix pitfall pitfall2 pong pooyan private_eye qbert
    riverraid road_runner robotank seaquest sir_lancelot skiing solaris space_invaders space_war
    star_gunner superman surround tennis tetris tic_tac_toe_3d time_pilot trondead turmoil tutankham
    up_n_down venture video_checkers video_chess video_cube video_pinball wizard_of_wor word_zapper
    yars_revenge zaxxon""".split()
)
"""The single-player games that ship with ale-py."""


@dataclass(frozen=True)
class Atari100kOptions:
    """The `env_config` of an `atari100k/` env; see docs/environments.md for the table."""

    size: int | tuple[int, int] = 64
    action_repeat: int = 4
    noops: int = 30
    sticky: float = 0.0
    pool: bool = True
    all_actions: bool = False
    gray: bool = False
    max_frames: int = 108_000
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks each value; raises a ValueError that names the key."""
        wrappers.parse_size(self.size)
        wrappers.require_count("action_repeat", self.action_repeat)
        wrappers.require_count("noops", self.noops, 0)
        wrappers.require_count("max_frames", self.max_frames)
        number = isinstance(self.sticky, int | float)
        wrappers.require(
            number and 0 <= self.sticky < 1, "sticky", self.sticky, "a probability in [0, 1)"
        )


@dataclass(frozen=True)
class AleOptions(Atari100kOptions):
    """The `env_config` of an `ALE/` env: the same keys, the defaults of the v5 games."""

    noops: int = 0
    sticky: float = 0.25
    pool: bool = False


OPTIONS = {"atari100k": Atari100kOptions, "ALE": AleOptions}
"""By the family of the name."""


def camel_case(game: str) -> str:
    """Returns the name of a game as in `ALE/<Game>-v5` ("ms_pacman" becomes "MsPacman")."""
    return game.replace("_", " ").title().replace(" ", "")


_BY_NAME = {f"ALE/{camel_case(game)}-v5": game for game in GAMES}
_BY_NAME |= {f"atari100k/{game}": game for game in GAMES}


def names() -> list[str]:
    """Returns every registered name."""
    return list(_BY_NAME)


def parse_name(env_id: str) -> str:
    """Returns the game of `atari100k/<game>` or `ALE/<Game>-v5`.

    Raises:
        ValueError: No such game; lists the nearest names.
    """
    if env_id not in _BY_NAME:
        style = [name for name in _BY_NAME if name.startswith(env_id.partition("/")[0] + "/")]
        raise ValueError(f"Unknown env {env_id!r}: {nearest(env_id, style or _BY_NAME)}")
    return _BY_NAME[env_id]


def make(env_id: str, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """Builds an Atari env.

    Raises:
        ValueError: The name or a key or value of `env_config` is unknown.
        ImportError: ale-py is not installed.
    """
    game = parse_name(env_id)
    options = OPTIONS[env_id.partition("/")[0]]
    return AtariEnv(game, wrappers.parse_options(options, env_config, env_id))


class AtariEnv(gym.Env):
    """One Atari game; observes a uint8 picture (h, w, 3), or (h, w, 1) if gray.

    Args:
        game: One of `GAMES`.
        options: The rest.
    """

    def __init__(self, game: str, options: Atari100kOptions | None = None) -> None:
        """See the class."""
        self.options = options or Atari100kOptions()
        repeat = self.options.action_repeat
        self.render_mode = "rgb_array"
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": wrappers.film_fps(60, repeat)}
        self.size = wrappers.parse_size(self.options.size)
        ale_py = wrappers.import_extra("ale_py", "atari")
        self._rom = wrappers.import_extra("ale_py.roms", "atari").get_rom_path(game)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # before: it prints a banner
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", self.options.sticky)
        self._load(self.options.seed)
        self._pending_seed = self.options.seed
        actions = self._ale.getLegalActionSet if self.options.all_actions else None
        self._actions = list((actions or self._ale.getMinimalActionSet)())
        self._noop = ale_py.Action.NOOP
        height, width = self._ale.getScreenDims()
        shape = (height, width) if self.options.gray else (height, width, 3)
        self._frames = [np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)]  # older, newer
        self._frame_count = 0
        self.action_space = spaces.Discrete(len(self._actions))
        self.observation_space = wrappers.image_space(self.size, 1 if self.options.gray else 3)

    def _load(self, seed: int | None) -> None:
        # The second word, as ale-py's own Gymnasium env does: equal seeds then give equal games.
        words = np.random.SeedSequence(seed).generate_state(2)
        self._ale.setInt("random_seed", int(words[1].astype(np.int32)))
        self._ale.loadROM(self._rom)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Starts a game; the same `seed` gives the same one."""
        seed = self._pending_seed if seed is None else seed
        self._pending_seed = None
        super().reset(seed=seed)
        if seed is not None:
            self._load(seed)
        self._ale.reset_game()
        for _ in range(int(self.np_random.integers(self.options.noops + 1))):
            self._ale.act(self._noop)
            if self._ale.game_over():
                self._ale.reset_game()
        self._frame_count = 0
        self._grab()
        self._frames[0][...] = self._frames[1]
        return self._observation(), {"lives": self._ale.lives()}

    def step(self, action: int | np.integer[Any]) -> wrappers.StepResult:
        """Applies `action` for `action_repeat` frames, or to the end of the game."""
        total = 0.0
        for _ in range(self.options.action_repeat):
            total += self._ale.act(self._actions[action])
            self._frame_count += 1
            if self.options.pool:
                self._grab()
            terminated = self._ale.game_over(with_truncation=False)
            truncated = not terminated and self._frame_count >= self.options.max_frames
            if terminated or truncated:
                break
        if not self.options.pool:
            self._grab()
        return self._observation(), total, terminated, truncated, {"lives": self._ale.lives()}

    def _grab(self) -> None:
        self._frames.reverse()
        if self.options.gray:
            self._ale.getScreenGrayscale(self._frames[1])
        else:
            self._ale.getScreenRGB(self._frames[1])

    def _observation(self) -> NDArray[np.uint8]:
        frame = np.maximum(*self._frames) if self.options.pool else self._frames[1]
        picture = np.array(wrappers.resize_picture(frame, self.size))
        return picture[..., None] if self.options.gray else picture  # (h, w, C)

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        """Returns the current screen in the console's own size and colours, uint8 (h, w, 3)."""
        screen: NDArray[np.uint8] = self._ale.getScreenRGB()
        return screen
