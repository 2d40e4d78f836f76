"""Several processes that play one game: how they start, agree and end together.

All run the same program on the same input; the devices of all share a batch. Process 0
alone touches the workdir and speaks. What one process does and the others rely on goes
through `from_first` or `together`, so that an error of one ends all of them with the
same line and code. One that vanishes (killed, out of memory, a defect) ends the others
too: on CPU at once, since its connections close, elsewhere after `LOST_AFTER` seconds.
With one process nothing here does anything.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from adadfq_jax import errors
from adadfq_jax.errors import InputError

T = TypeVar("T")

LOST_AFTER = 60  # seconds without a sign of life after which a process counts as lost
# How the runtime's errors begin or what they name when another process is gone; others,
# as RESOURCE_EXHAUSTED, are this process's own.
_LOST = re.compile(
    r"(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED): "
    r"|[A-Z_]{4,}: .*(Gloo|[Cc]onnection|[Hh]eartbeat|[Cc]oordination)",
    re.DOTALL,
)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: int = 300,
) -> None:
    """Joins the other processes; before anything else that uses a device.

    Without arguments the surroundings tell who they are: Cloud TPU, Slurm, MPI.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
      processes: how many there are.
      process_id: which this is, from 0.
      patience: seconds to wait for the others.

    Raises:
      InputError: the arguments do not fit, or the others cannot be reached.
    """
    named = coordinator is not None
    arguments: dict[str, Any] = {}
    if named:
        _check(coordinator, processes, process_id)
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    who = f"--coordinator={coordinator}" if named else "--distributed"
    missed = (
        f"{who}: the processes did not find each other within {patience} s; all"
        f" {processes or ''} must be started, with the same coordinator"
    )
    # Its handler would take SIGTERM away from ours, see `stop.on_signals`.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own end of its patience takes the process down with a report of its own.
    giving_up = threading.Timer(patience, _give_up, [missed])
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=patience + 60,
            heartbeat_timeout_seconds=LOST_AFTER,
            shutdown_timeout_seconds=LOST_AFTER,
        )
    except (ValueError, RuntimeError) as error:
        reason = f"{who}: {errors.first_line(error)}"
        if not named and isinstance(error, ValueError):  # nothing around tells
            reason = (
                f"{reason}: no Cloud TPU, Slurm or MPI here that names the processes;"
                " use --coordinator=HOST:PORT --processes=N --process_id=I"
            )
        raise InputError(reason) from error
    finally:
        giving_up.cancel()
    largest(0)  # connects them while all are there, see `sharding.meet`


def _give_up(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(2)  # bad input; nothing has begun


def _check(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    if not re.fullmatch(r".+:\d+", coordinator or ""):
        raise InputError(f"--coordinator={coordinator}: must be HOST:PORT")
    if processes is None or process_id is None:
        raise InputError(
            "--coordinator needs --processes=N and --process_id=I, I from 0 to N - 1"
        )
    if not 0 <= process_id < processes:
        raise InputError(
            f"--process_id={process_id}: must be 0 to {processes - 1}, for"
            f" --processes={processes}"
        )


def several() -> bool:
    """Whether there is more than this process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if not several():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first(action: Callable[[], T]) -> T:
    """Lets process 0 act; what comes of it, value or error, comes to all.

    Args:
      action: what it returns can be pickled.
    """
    if not several():
        return action()
    value: Any = None
    error = None
    if is_first():
        value, error = _attempt(action)
    said, told = _broadcast((value, _told(error)), 0)
    if told is not None:
        raise error or _heard(0, told)
    return value if is_first() else said


def together(action: Callable[[], T]) -> T:
    """Every process acts; if one fails, all raise what the first of them raised."""
    if not several():
        return action()
    value, error = _attempt(action)
    failed = multihost_utils.process_allgather(np.int32(error is not None))
    if failed.any():
        source = int(np.argmax(failed))
        told = _broadcast(_told(error), source)
        raise error or _heard(source, told)
    return value


def require_equal(value: Any, what: str) -> None:
    """Refuses processes that were started differently.

    Args:
      value: JSON, the same in all processes.
      what: a word for it.

    Raises:
      InputError: in all of them.
    """
    if not several():
        return
    text = json.dumps(value, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    all_of_them = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((all_of_them != all_of_them[0]).any(1))
    if others.size:
        raise InputError(
            f"process {others[0]} has another {what} than process 0: start all with"
            " the same command, files and version"
        )


@contextlib.contextmanager
def held_by_first(
    make: Callable[[], contextlib.AbstractContextManager[T]],
) -> Iterator[T | None]:
    """What process 0 holds meanwhile, None in the others; an error ends all."""
    with contextlib.ExitStack() as stack:
        entered: list[T] = []
        from_first(lambda: entered.append(stack.enter_context(make())))
        yield entered[0] if entered else None


@contextlib.contextmanager
def none_left_behind(expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """Ends this process at once on an error that the others do not have.

    An orderly end would wait for them, while they wait for this one.

    Args:
      expected: errors that all have: they pass.
    """
    try:
        yield
    except expected:
        raise
    except Exception as error:
        if not several():
            raise
        _leave_at_once(error)


def _leave_at_once(error: Exception) -> NoReturn:
    if _LOST.match(str(error)):  # some come as a ValueError
        print(
            f"error: process {jax.process_index()} lost the others"
            f" ({errors.first_line(error)}); repeat the command to resume from the last"
            " checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _attempt(action: Callable[[], T]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _told(error: Exception | None) -> tuple[str, str, tuple[str, ...]] | None:
    """An error for the others: what it is to them, its text and the arguments in it."""
    if error is None:
        return None
    kind = "InputError" if isinstance(error, OSError) else type(error).__name__
    return kind, str(error), getattr(error, "arguments", ())


def _heard(source: int, told: tuple[str, str, tuple[str, ...]]) -> Exception:
    """The error of another process, of one of our kinds if it was."""
    kind, text, arguments = told
    ours = getattr(errors, kind, None)
    if ours is None:
        return RuntimeError(f"process {source}: {kind}: {text}")
    return ours(f"process {source}: {text}", *arguments)


def _broadcast(value: Any, source: int) -> Any:
    """A value of one process in all of them, as a copy."""
    mine = jax.process_index() == source
    data = np.frombuffer(pickle.dumps(value) if mine else b"", np.uint8)
    # The others do not know how much will come.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size), mine))
    data = data if mine else np.zeros(size, np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(data, mine).tobytes())
