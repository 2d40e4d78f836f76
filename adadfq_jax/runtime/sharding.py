"""Compiling pure functions for several devices. Only this module uses `jax.pmap`.

The state is replicated (`in_axes=None`, without a leading device axis), and the global
batch is split over the mapped axis `AXIS`. A single device runs the same code. When
there are several processes, each holds the replicas on its own devices, and the axis
covers the devices of all processes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from adadfq_jax.errors import InputError

AXIS = "batch"


def choose_devices(
    count: int, batch_size: int, batch_rule: str
) -> tuple[list[jax.Device], int]:
    """Choose the devices that take part, and return the size of the global batch.

    Args:
      count: number of devices of each process; 0 takes all of them.
      batch_size: images in a step.
      batch_rule: 'global' if `batch_size` counts the images on all devices together,
        'per_device' if it counts those on each device.

    Returns:
      The devices, ordered by process, and the global batch size.

    Raises:
      InputError: there are fewer devices than `count`, the batch does not divide over
        them, or they are CPUs although JAX_PLATFORMS names another platform first.
    """
    processes = range(jax.process_count())
    there = [jax.local_devices(process_index=process) for process in processes]
    # JAX fails where a platform of JAX_PLATFORMS does not work, except for cuda: where
    # the driver shows no GPU, JAX takes the next platform without an error.
    named = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    wanted = named.split(",")[0]
    if wanted not in ("", "cpu") and there[0][0].platform == "cpu":
        raise InputError(
            f"JAX_PLATFORMS={named}: no {wanted} device is there;"
            " JAX_PLATFORMS=cpu runs on the CPU"
        )
    each = len(there[0])
    if any(len(own) != each for own in there):
        numbers = ", ".join(str(len(own)) for own in there)
        raise InputError(
            f"the processes have {numbers} devices: each must have the same number"
        )
    if count > each:
        raise InputError(
            f"devices={count}: there are {each}; 0 takes all of them", "devices"
        )
    devices = [device for own in there for device in own[: count or each]]
    if batch_rule == "per_device":
        return devices, batch_size * len(devices)
    if batch_size % len(devices):
        _refuse_batch(batch_size, len(devices), len(processes))
    return devices, batch_size


def _refuse_batch(batch_size: int, devices: int, processes: int) -> NoReturn:
    """Raise an InputError that lists what to change when a batch does not divide."""
    fits = [
        n for n in range(1, devices // processes) if not batch_size % (n * processes)
    ]
    fewer = f"fewer devices (devices={fits[-1]}), " if fits else ""
    larger = -(-batch_size // devices) * devices
    raise InputError(
        f"batch_size={batch_size} does not divide over {devices}"
        f" devices: take {fewer}a larger batch (batch_size={larger}) or"
        " another batch rule (batch_rule=per_device: that many images on each device)",
        "devices",
        "batch_size",
        "batch_rule",
    )


def local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Return those of the devices that belong to this process."""
    return [d for d in devices if d.process_index == jax.process_index()]


def meet(devices: Sequence[jax.Device]) -> None:
    """Connect the processes of the devices by running a small program on all of them.

    On CPU the first program that communicates makes the connections, and all processes
    must start it within 30 s. If that were the training step, one process could still
    be compiling when another stops waiting.
    """
    add = parallel_count(lambda _, x: x, devices)
    jax.block_until_ready(add(np.zeros(()), np.zeros(len(devices))))


def steps_per_dispatch(wanted: int, devices: Sequence[jax.Device]) -> int:
    """Return the number of steps in one dispatch: `wanted`, or a default where it is 0.

    The default is 50 on an accelerator, which would otherwise wait for the host between
    short steps. It is 1 on CPU, which does not wait, and where XLA runs convolutions
    inside a loop many times slower.
    """
    if wanted:
        return wanted
    return 1 if devices[0].platform == "cpu" else 50


def fetch(tree: Any) -> Any:
    """Copy a tree to the host as numpy arrays; this waits for the devices."""
    return jax.device_get(tree)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Replicate a tree: each device of this process gets a copy of every leaf."""
    mesh = jax.sharding.Mesh(np.asarray(local(devices)), (AXIS,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, whole)


def parallel_step(
    step: Callable[..., Any], devices: Sequence[jax.Device], *, donate: bool = True
) -> Callable[..., Any]:
    """Compile step(state, *constants) -> (state, metrics) for all devices.

    All arguments and results are replicated. The state is donated, unless `donate` is
    false. Collectives over `AXIS` inside the step cover every device.
    """
    # pmap requires at least one argument with a mapped axis.
    index = np.arange(len(local(devices)))

    def mapped(_, state, constants):
        return step(state, *constants)

    compiled = jax.pmap(
        mapped,
        AXIS,
        in_axes=(0, None, None),
        out_axes=None,
        devices=devices,
        donate_argnums=1 if donate else (),
    )

    def run(state, *constants):
        return compiled(index, state, constants)

    # The same method as a function of jax.jit has, to inspect the program.
    run.lower = lambda state, *constants: compiled.lower(index, state, constants)  # type: ignore[attr-defined]
    return run


def parallel_members(
    step: Callable[..., Any], devices: Sequence[jax.Device]
) -> Callable[..., Any]:
    """Compile step(state, shared, own) -> (state, metrics) for many games at once.

    The leaves of `state` and `own` have the shape [devices, games on each, ...], see
    `split_members`; `shared` is replicated. The games on a device run under vmap, and
    the devices do not communicate. The state is donated.
    """

    def mapped(state, shared, own):
        # Without vmap a single game has no grouped convolutions.
        if jax.tree.leaves(state)[0].shape[0] == 1:
            state, own = jax.tree.map(lambda x: x[0], (state, own))
            return jax.tree.map(lambda x: x[None], step(state, shared, own))
        return jax.vmap(step, in_axes=(0, None, 0))(state, shared, own)

    return jax.pmap(
        mapped,
        in_axes=(0, None, 0),
        devices=devices,
        donate_argnums=0,
    )


def split_members(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Spread leaves [games, ...] over the devices as [devices, games on each, ...]."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    count = len(devices)
    split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
    return jax.device_put(split, spread)


def parallel_count(
    count: Callable[..., Any], devices: Sequence[jax.Device]
) -> Callable[..., Any]:
    """Compile count(variables, *batch) -> pytree of sums for all devices.

    Every process passes the same global batch. Its arrays are split on their leading
    axis, whose length must be a multiple of the number of devices. The compiled
    function returns the sums over all devices.
    """
    own = local(devices)
    first = devices.index(own[0])

    def mapped(variables, batch):
        return jax.lax.psum(count(variables, *batch), AXIS)

    compiled = jax.pmap(mapped, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def run(variables, *batch):
        def split(x):
            shares = x.reshape(len(devices), -1, *x.shape[1:])
            return shares[first : first + len(own)]

        return compiled(variables, jax.tree.map(split, batch))

    return run
