"""The compiled step of a population, and where its members are on the devices.

Members share everything but a seed and some numbers (`build.Values`): one program
plays all of them, on the numbers as arguments. They are spread over the devices, which
tell each other nothing. Those of a device are computed some at a time, by vmap, and the
others after them, in another round through the same program.

vmap makes of a convolution with a kernel for each member one in groups, which is slow
on CPU, as convolutions inside a loop are. A step per member, one game's being 1
(ResNet-20 at 28 x 28, batch 16, both train; medians of 5 alternating rounds on 2 cores
that others used as well):

    members   in turn   jax.lax.map   vmap
    2            1.12           2.2    3.6
    4            1.18

Hence the rounds: one member at a time on CPU, all of them elsewhere, which has not been
measured. Compiling took 44 to 64 s in each of these forms and 52 s for one game.
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
    """Where members are: rounds x devices x at_once of them, in this order."""

    devices: list[jax.Device]
    rounds: int
    at_once: int

    @property
    def description(self) -> str:
        """'on 2 x cpu, 1 at once on each'."""
        devices, kind = len(self.devices), self.devices[0].device_kind
        return f"on {devices} x {kind}, {self.at_once} at once on each"

    def split(self, members: Sequence[Any]) -> tuple[Any, ...]:
        """Members' trees -> a tree for each round, [devices, at_once, ...] leaves."""
        size = len(self.devices) * self.at_once
        rounds = []
        for i in range(self.rounds):
            chosen = members[i * size : (i + 1) * size]
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chosen)
            rounds.append(sharding.split_members(stacked, self.devices))
        return tuple(rounds)

    def join(self, rounds: Sequence[Any]) -> list[Any]:
        """The inverse of `split`: each member's tree, on the host."""
        members = []
        for tree in sharding.fetch(tuple(rounds)):
            for device in range(len(self.devices)):
                for lane in range(self.at_once):
                    at = (device, lane)
                    members.append(jax.tree.map(lambda x, at=at: x[at], tree))
        return members


def choose_layout(count: int, wanted_devices: int, at_once: int) -> Layout:
    """Where `count` members go: on as many devices as divide them.

    Args:
      count: of members.
      wanted_devices: how many; 0: the most of those there are that divide `count`.
      at_once: members in one computation on a device; 0: one on CPU, else all.

    Raises:
      InputError: the members do not divide so.
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
    """The members' values with the same terms: weight 0 where another has the term."""

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
    """What the step takes of each member beside its state: key data and values."""
    values = share_terms([build.game_values(spec) for spec in specs])
    as_float32 = functools.partial(jax.tree.map, np.float32)
    return [
        (np.asarray(jax.random.key_data(jax.random.key(spec.seed))), as_float32(own))
        for spec, own in zip(specs, values, strict=True)
    ]


def make_steps(
    make_parts: Callable[[Values], GameParts], draw: Callable[..., Any], layout: Layout
) -> Steps:
    """Compiled steps of all members (at their first use).

    Args:
      make_parts: a member's game of its values, which are traced.
      draw: key -> the batch, see `rollout.make_game_step`.
      layout: where members are.

    Returns:
      (phase, steps in a dispatch) -> a function of (rounds of states, P's variables,
      rounds of arguments) to (rounds of states, rounds of metrics). The states are
      donated.
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
