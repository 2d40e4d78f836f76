"""Devices: where the pure functions are compiled and spread out. The only user of pmap.

State is replicated (`in_axes=None`, no leading device axis), the global batch is
split: over the axis `AXIS`, one device being the same code. Of several processes each
holds the replicas on its own devices; the axis goes over the devices of all.
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
    """The devices that take part, those of a process together; the batch over all.

    Args:
      count: how many devices of each process; 0 is all.
      batch_size: images a step.
      batch_rule: 'global', over all devices, or 'per_device'.

    Raises:
      InputError: there are not so many, or the batch does not divide over them, or
        they are CPUs though JAX_PLATFORMS names another platform first.
    """
    processes = range(jax.process_count())
    there = [jax.local_devices(process_index=process) for process in processes]
    # A platform that JAX_PLATFORMS names must work, but cuda: where the driver shows no
    # GPU, JAX passes over it and takes the next.
    named = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    wanted = named.split(",")[0]
    if wanted not in ("", "cpu") and there[0][0].platform == "cpu":
        raise InputError(
            f"JAX_PLATFORMS={named}: no {wanted} device is there;"
            " JAX_PLATFORMS=cpu plays on the CPU"
        )
    each = len(there[0])
    if any(len(own) != each for own in there):
        numbers = ", ".join(str(len(own)) for own in there)
        raise InputError(f"the processes have {numbers} devices: must be equally many")
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
    """Raises InputError with the ways out of a batch that does not divide."""
    fits = [
        n for n in range(1, devices // processes) if not batch_size % (n * processes)
    ]
    fewer = f"fewer devices (devices={fits[-1]}), " if fits else ""
    larger = -(-batch_size // devices) * devices
    raise InputError(
        f"batch_size={batch_size} does not divide over {devices}"
        f" devices: take {fewer}a larger batch (batch_size={larger}) or"
        " another batch rule (batch_rule=per_device: that many on each)",
        "devices",
        "batch_size",
        "batch_rule",
    )


def local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those of this process."""
    return [d for d in devices if d.process_index == jax.process_index()]


def meet(devices: Sequence[jax.Device]) -> None:
    """Connects the processes of the devices, while all of them are there.

    On CPU a connection is made by the first program that needs it, and the others must
    come to it within 30 s, which they may not when each compiles a large one first.
    """
    add = parallel_count(lambda _, x: x, devices)
    jax.block_until_ready(add(np.zeros(()), np.zeros(len(devices))))


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
    """The tree with every leaf whole on each of the devices of this process."""
    mesh = jax.sharding.Mesh(np.asarray(local(devices)), (AXIS,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, whole)


def parallel_step(
    step: Callable[..., Any], devices: Sequence[jax.Device], *, donate: bool = True
) -> Callable[..., Any]:
    """Compiles step(state, *constants) -> (state, metrics) for all devices.

    All arguments and results are replicated; the state is donated, unless `donate` is
    false. Inside, collectives over `AXIS` see every device.
    """
    # pmap wants one argument with a mapped axis.
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

    # Like that of jax.jit, for those who look at the program.
    run.lower = lambda state, *constants: compiled.lower(index, state, constants)  # type: ignore[attr-defined]
    return run


def parallel_members(
    step: Callable[..., Any], devices: Sequence[jax.Device]
) -> Callable[..., Any]:
    """Compiles step(state, shared, own) -> (state, metrics) for many games at once.

    Leaves of state and own are [devices, games on each, ...], see `split_members`;
    `shared` is replicated. Games on a device are vmapped, the devices tell each other
    nothing. The state is donated.
    """

    def mapped(state, shared, own):
        if jax.tree.leaves(state)[0].shape[0] == 1:  # not a convolution in groups
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
    """Leaves [games, ...] -> [devices, games on each, ...], spread over the devices."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    count = len(devices)
    split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
    return jax.device_put(split, spread)


def parallel_count(
    count: Callable[..., Any], devices: Sequence[jax.Device]
) -> Callable[..., Any]:
    """Compiles count(variables, *batch) -> pytree of sums for all devices.

    The batch arrays, the same in all processes, are split on their leading axis, which
    the devices must divide; sums come back over all devices.
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
