"""Devices: where the pure functions are compiled and spread out. The only user of pmap.

State is replicated (`in_axes=None`, no leading device axis), the global batch is
split: over the axis `AXIS`, one device being the same code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from adadfq_jax.errors import InputError

AXIS = "batch"


def choose_devices(
    count: int, batch_size: int, batch_rule: str
) -> tuple[list[jax.Device], int]:
    """The local devices that take part, and the batch over all of them.

    Args:
      count: how many devices; 0 is all.
      batch_size: images a step.
      batch_rule: 'global', over all devices, or 'per_device'.

    Raises:
      InputError: there are not so many, or the batch does not divide over them.
    """
    there = jax.local_devices()
    if count > len(there):
        raise InputError(
            f"config.devices={count}: there are {len(there)}; 0 takes all of them"
        )
    devices = there[:count] if count else there
    if batch_rule == "per_device":
        return devices, batch_size * len(devices)
    if batch_size % len(devices):
        most = max(n for n in range(1, len(devices)) if batch_size % n == 0)
        larger = -(-batch_size // len(devices)) * len(devices)
        raise InputError(
            f"config.game.batch_size={batch_size} does not divide over {len(devices)}"
            f" devices: take fewer devices (config.devices={most}), a larger batch"
            f" (config.game.batch_size={larger}) or another batch rule"
            " (config.game.batch_rule=per_device: that many on each)"
        )
    return devices, batch_size


def steps_per_dispatch(wanted: int, devices: Sequence[jax.Device]) -> int:
    """How many steps are played in one dispatch: `wanted`, or, for 0, by backend.

    An accelerator would wait for the host between short steps. On CPU there is
    nothing to hide, and XLA runs convolutions inside a loop many times slower.
    """
    if wanted:
        return wanted
    return 1 if devices[0].platform == "cpu" else 50


def fetch(tree: Any) -> Any:
    """The tree as numpy arrays on the host: the one place that waits for devices."""
    return jax.device_get(tree)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """The tree with every leaf whole on each of the devices."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, whole)


def parallel_step(
    step: Callable[..., Any], devices: Sequence[jax.Device]
) -> Callable[..., Any]:
    """Compiles step(state, *constants) -> (state, metrics) for all devices.

    All arguments and results are replicated; the state is donated. Inside,
    collectives over `AXIS` see every device.
    """
    # pmap wants one argument with a mapped axis.
    index = np.arange(len(devices))

    def mapped(_, state, constants):
        return step(state, *constants)

    compiled = jax.pmap(
        mapped,
        AXIS,
        in_axes=(0, None, None),
        out_axes=None,
        devices=devices,
        donate_argnums=1,
    )

    def run(state, *constants):
        return compiled(index, state, constants)

    # Like that of jax.jit, for those who look at the program.
    run.lower = lambda state, *constants: compiled.lower(index, state, constants)  # type: ignore[attr-defined]
    return run


def parallel_count(
    count: Callable[..., Any], devices: Sequence[jax.Device]
) -> Callable[..., Any]:
    """Compiles count(variables, *batch) -> pytree of sums for all devices.

    The batch arrays are split on their leading axis, which the devices must
    divide; sums come back over all devices.
    """

    def mapped(variables, batch):
        return jax.lax.psum(count(variables, *batch), AXIS)

    compiled = jax.pmap(mapped, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def run(variables, *batch):
        def split(x):
            return x.reshape(len(devices), -1, *x.shape[1:])

        return compiled(variables, jax.tree.map(split, batch))

    return run
