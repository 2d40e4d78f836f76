"""SIGTERM and Ctrl-C as a request that the loop looks at between two steps.

One of several processes that hears a signal must not stop alone: the request counts
when all have agreed on it, at a pause that they all come to.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopRequest:
    """Which signal asked to stop, or None.

    heard: the signal that came to this process.
    signal: the one that counts: the same, unless it is to be agreed on.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self.signal: signal.Signals | None = None
        self._alone = True

    def hear(self, number: int) -> None:
        """Takes a signal of this process."""
        self.heard = signal.Signals(number)
        if self._alone:
            self.signal = self.heard

    def agree(self, largest: Callable[[int], int]) -> None:
        """Makes it one request of all processes, which call this at the same pauses.

        Args:
          largest: of the processes' numbers.
        """
        self._alone = False
        number = largest(int(self.heard or 0))
        if number:
            self.signal = signal.Signals(number)

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
        if request.heard:
            os._exit(1)
        request.hear(number)
        print("stopping, after saving; again: at once", file=sys.stderr, flush=True)

    for s in EXIT_CODES:
        signal.signal(s, handle)
    try:
        yield request
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
