"""Several processes that train together: how they start, agree and end.

All processes run the same program on the same input, and their devices share a global
batch. Only process 0, the primary process, writes to the workdir and prints. Work of
one process that the others rely on goes through `from_first` or `together`, so that an
error in one process ends all of them with the same line and exit code. A process that
disappears (killed, out of memory, a defect) ends the others too: at once on CPU, where
its connections close, and after `LOST_AFTER` seconds elsewhere. With a single process
the functions of this module only run the actions that they are given.
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

LOST_AFTER = 60  # seconds without a heartbeat after which a process counts as lost
# Errors of JAX's runtime when another process is gone: by their first word, or by what
# they name. Other errors, such as RESOURCE_EXHAUSTED, come from this process.
_DISCONNECT_ERRORS = re.compile(
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
    """Join the other processes; call this before anything that uses a device.

    Without arguments the processes are found by Cloud TPU, Slurm or MPI.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
      processes: number of processes.
      process_id: number of this process, counted from 0.
      patience: seconds to wait for the other processes.

    Raises:
      InputError: the arguments do not fit each other, or the other processes cannot
        be reached.
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
    # JAX's handler of SIGTERM would replace the one of `signals.on_signals`.
    jax.config.update("jax_enable_preemption_service", False)
    # When JAX's own timeout ends, it aborts the process with a long report.
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
        if not named and isinstance(error, ValueError):  # no cluster was detected
            reason = (
                f"{reason}: no Cloud TPU, Slurm or MPI here that names the processes;"
                " use --coordinator=HOST:PORT --processes=N --process_id=I"
            )
        raise InputError(reason) from error
    finally:
        giving_up.cancel()
    largest(0)  # connects the processes while all of them wait, see `sharding.meet`


def _give_up(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(2)  # the code for bad input; there is nothing to save yet


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
    """Tell whether there is more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Tell whether this is the primary process, which writes files and prints."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """Return the largest of the numbers that the processes pass."""
    if not several():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first(action: Callable[[], T]) -> T:
    """Run an action in process 0 and broadcast its value, or its error, to all.

    Args:
      action: takes nothing; its value must be one that can be pickled.
    """
    if not several():
        return action()
    value: Any = None
    error = None
    if is_first():
        value, error = _attempt(action)
    sent, parts = _broadcast((value, _to_parts(error)), 0)
    if parts is not None:
        raise error or _from_parts(0, parts)
    return value if is_first() else sent


def together(action: Callable[[], T]) -> T:
    """Run an action in every process; if it fails in some, all raise one error.

    That is the error of the failing process with the lowest number.
    """
    if not several():
        return action()
    value, error = _attempt(action)
    failed = multihost_utils.process_allgather(np.int32(error is not None))
    if failed.any():
        source = int(np.argmax(failed))
        parts = _broadcast(_to_parts(error), source)
        raise error or _from_parts(source, parts)
    return value


def require_equal(value: Any, what: str) -> None:
    """Refuse processes that were started differently.

    Args:
      value: a JSON value that must be the same in all processes.
      what: a word for the value, used in the message.

    Raises:
      InputError: the values differ; every process raises it.
    """
    if not several():
        return
    text = json.dumps(value, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((digests != digests[0]).any(1))
    if others.size:
        raise InputError(
            f"process {others[0]} has another {what} than process 0: start all with"
            " the same command, files and version"
        )


@contextlib.contextmanager
def held_by_first(
    make: Callable[[], contextlib.AbstractContextManager[T]],
) -> Iterator[T | None]:
    """Enter a context in process 0 alone; an error on entering it ends all processes.

    Args:
      make: makes the context manager; only process 0 calls it.

    Yields:
      The value of the context in process 0, None in the other processes.
    """
    with contextlib.ExitStack() as stack:
        entered: list[T] = []
        from_first(lambda: entered.append(stack.enter_context(make())))
        yield entered[0] if entered else None


@contextlib.contextmanager
def none_left_behind(expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """End this process at once on an error that the other processes do not have.

    A normal exit would wait for the other processes, while they wait for this one.

    Args:
      expected: types of errors that all processes raise together; these propagate.
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
    if _DISCONNECT_ERRORS.match(
        str(error)
    ):  # by text: some of these errors are ValueErrors
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


def _to_parts(error: Exception | None) -> tuple[str, str, tuple[str, ...]] | None:
    """Return an error's class name, text and arguments, to be sent to the others."""
    if error is None:
        return None
    kind = "InputError" if isinstance(error, OSError) else type(error).__name__
    return kind, str(error), getattr(error, "arguments", ())


def _from_parts(source: int, parts: tuple[str, str, tuple[str, ...]]) -> Exception:
    """Rebuild another process's error, in its class if that is one of `errors`."""
    kind, text, arguments = parts
    ours = getattr(errors, kind, None)
    if ours is None:
        return RuntimeError(f"process {source}: {kind}: {text}")
    return ours(f"process {source}: {text}", *arguments)


def _broadcast(value: Any, source: int) -> Any:
    """Return, in every process, a copy of the value of the process `source`."""
    mine = jax.process_index() == source
    data = np.frombuffer(pickle.dumps(value) if mine else b"", np.uint8)
    # The receiving processes do not know the size beforehand. It may be more than an
    # int32 holds, and JAX has no int64 here.
    size = np.frombuffer(np.int64(data.size).tobytes(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(size, mine)
    data = data if mine else np.zeros(int(size.view(np.int64)[0]), np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(data, mine).tobytes())
