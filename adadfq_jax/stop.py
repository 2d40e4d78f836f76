"""SIGTERM and Ctrl-C as a request that the loop looks at between two steps."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopRequest:
    """Which signal asked to stop, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """75 for SIGTERM (resumable, as sysexits has it), 130 for Ctrl-C."""
        assert self.signal is not None
        return EXIT_CODES[self.signal]


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """A request that SIGTERM and Ctrl-C set; a second one ends the process at once.

    The second exits with 1, since nothing is saved then.
    """
    request = StopRequest()
    before = {s: signal.getsignal(s) for s in EXIT_CODES}

    def handle(number, frame):
        del frame
        if request:
            os._exit(1)
        request.signal = signal.Signals(number)
        print("stopping, after saving; again: at once", file=sys.stderr, flush=True)

    for s in EXIT_CODES:
        signal.signal(s, handle)
    try:
        yield request
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
