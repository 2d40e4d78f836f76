"""The compiled step of a population, and the layout of its members on the devices.

The members share everything except a seed and some numbers (`build.Values`). One
program trains all of them and takes these numbers as arguments. The members are spread
over the devices, which do not communicate. Each device runs some of its members at
once, under vmap, and the others in further rounds through the same program.

vmap turns a convolution with a kernel for each member into a grouped convolution, which
is slow on CPU; so are convolutions inside a loop such as `jax.lax.map`. Therefore the
default is one member at a time on CPU and all members of a device at once elsewhere,
which has not been measured (docs/guides/populations.md has the times on CPU).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from adadfq_jax import game
from adadfq_jax.errors import InputError
from adadfq_jax.game import GameState, Phase, rollout
from adadfq_jax.runtime import sharding
from adadfq_jax.training import build
from adadfq_jax.training.build import GameParts, Steps, Values
from adadfq_jax.training.spec import RunSpec


class Layout(NamedTuple):
    """Where the members run; they are ordered by round, device and place in the vmap.

    Attributes:
      devices: the devices that take part.
      rounds: number of rounds through the program.
      at_once: number of members that a device computes at once.
    """

    devices: list[jax.Device]
    rounds: int
    at_once: int

    @property
    def description(self) -> str:
        """The layout in words, such as 'on 2 x cpu, 1 at once on each'."""
        devices, kind = len(self.devices), self.devices[0].device_kind
        return f"on {devices} x {kind}, {self.at_once} at once on each"

    def split(self, members: Sequence[Any]) -> tuple[Any, ...]:
        """Stack the members' trees into one per round, [devices, at_once, ...] leaves.

        The trees are placed on the devices.
        """
        size = len(self.devices) * self.at_once
        rounds = []
        for i in range(self.rounds):
            chosen = members[i * size : (i + 1) * size]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chosen)
            rounds.append(sharding.split_members(stacked, self.devices))
        return tuple(rounds)

    def join(self, rounds: Sequence[Any]) -> list[Any]:
        """Return each member's tree on the host: the inverse of `split`."""
        members = []
        for tree in sharding.fetch(tuple(rounds)):
            for device in range(len(self.devices)):
                for lane in range(self.at_once):
                    at = (device, lane)
                    members.append(jax.tree.map(lambda x, at=at: x[at], tree))
        return members


def choose_layout(count: int, wanted_devices: int, at_once: int) -> Layout:
    """Choose the layout of `count` members, the same number on each device.

    Args:
      count: number of members.
      wanted_devices: number of devices; 0 takes the largest available number that
        divides `count`.
      at_once: number of members that a device computes at once; 0 means one on CPU
        and all members of the device elsewhere.

    Raises:
      InputError: the members do not divide over the devices or the rounds.
    """
    there, _ = sharding.choose_devices(wanted_devices, 1, "per_device")
    used = max(n for n in range(1, len(there) + 1) if count % n == 0)
    if wanted_devices and used < wanted_devices:
        raise InputError(
            f"devices={wanted_devices}: {count} members do not divide over them;"
            f" devices={used} does, or another number of members",
            "devices",
        )
    each = count // used
    if not at_once:
        at_once = 1 if there[0].platform == "cpu" else each
    if each % at_once:
        raise InputError(
            f"members_at_once={at_once}: does not divide the {each} members of a"
            " device",
            "members_at_once",
        )
    return Layout(there[:used], each // at_once, at_once)


def share_terms(values: Sequence[Values]) -> list[Values]:
    """Give all members the same loss terms: weight 0 for a term only others have."""

    def fill(name: str) -> list[dict[str, Any]]:
        own = [getattr(value, name) for value in values]
        terms = sorted({term for weights in own for term in weights})
        return [{term: weights.get(term, 0.0) for term in terms} for weights in own]

    return [
        value._replace(g_weights=g_weights, q_weights=q_weights)
        for value, g_weights, q_weights in zip(
            values, fill("g_weights"), fill("q_weights"), strict=True
        )
    ]


def member_arguments(specs: Sequence[RunSpec]) -> list[tuple[np.ndarray, Values]]:
    """Return each member's own arguments of the step: its key data and values."""
    values = share_terms([build.game_values(spec) for spec in specs])
    as_float32 = functools.partial(jax.tree.map, np.float32)
    return [
        (np.asarray(jax.random.key_data(jax.random.key(spec.seed))), as_float32(own))
        for spec, own in zip(specs, values, strict=True)
    ]


def make_steps(
    make_parts: Callable[[Values], GameParts], draw: Callable[..., Any], layout: Layout
) -> Steps:
    """Return the steps of all members; they are compiled at their first use.

    Args:
      make_parts: values -> the parts of a member's game; the values are traced.
      draw: key -> the batch, see `rollout.make_game_step`.
      layout: where the members run.

    Returns:
      (phase, steps in a dispatch) -> a function that takes the states by round, P, and
      the members' own arguments by round, and returns the states and the metrics by
      round. The states are donated.
    """

    @functools.cache
    def steps(phase: Phase, count: int):
        def play_one(state: GameState, p_variables: Any, own: tuple[Any, Values]):
            key_data, values = own
            play = game.make_play(**make_parts(values)._asdict())
            step = rollout.make_game_step(play, draw=draw)
            key = jax.random.wrap_key_data(key_data)
            return rollout.make_rollout(step, count)(state, p_variables, key, phase)

        compiled = sharding.parallel_members(play_one, layout.devices)

        def play_all(states, p_variables, own):
            played = [
                compiled(state, p_variables, mine)
                for state, mine in zip(states, own, strict=True)
            ]
            new_states, metrics = zip(*played, strict=True)
            return new_states, metrics

        return play_all

    return steps
