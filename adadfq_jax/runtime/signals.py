"""SIGTERM and Ctrl-C as a request to stop, which the loop reads between two steps.

When several processes train together, a process that receives a signal must not stop
alone. Then the request takes effect once all processes have agreed on it, at a pause
that all of them reach.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopRequest:
    """A request to stop; it is true once the run has to stop.

    Attributes:
      heard: the signal that this process received, or None.
      signal: the signal that the run stops for, or None. With a single process it is
        `heard`; otherwise `agree` sets it.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self.signal: signal.Signals | None = None
        self._alone = True

    def hear(self, number: int) -> None:
        """Record a signal that this process received."""
        self.heard = signal.Signals(number)
        if self._alone:
            self.signal = self.heard

    def agree(self, largest: Callable[[int], int]) -> None:
        """Agree with the other processes; all of them call this at the same pauses.

        Args:
          largest: returns the largest of the numbers that the processes pass to it.
        """
        self._alone = False
        number = largest(int(self.heard or 0))
        if number:
            self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """75 for SIGTERM (EX_TEMPFAIL of sysexits: try again), 130 for Ctrl-C."""
        assert self.signal is not None
        return EXIT_CODES[self.signal]


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """Yield a request that SIGTERM and Ctrl-C set.

    A second signal ends the process at once, with exit code 1: nothing is saved.
    """
    request = StopRequest()
    before = {s: signal.getsignal(s) for s in EXIT_CODES}

    def handle(number, frame):
        del frame
        if request.heard:
            os._exit(1)
        request.hear(number)
        print(
            "Saving and stopping, once the step or its compilation is done. Press"
            " Ctrl-C again to stop immediately.",
            file=sys.stderr,
            flush=True,
        )

    for s in EXIT_CODES:
        signal.signal(s, handle)
    try:
        yield request
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
