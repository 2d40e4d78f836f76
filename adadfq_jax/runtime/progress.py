"""Output of a run on the terminal: a progress bar, or plain lines in a log file."""

import datetime
import sys
from collections.abc import Mapping
from typing import Any

_quiet = _silent = False


def be_quiet() -> None:
    """Show only the warnings and results of a run from now on."""
    global _quiet
    _quiet = True


def be_silent() -> None:
    """Show nothing from now on; only the primary process of several prints."""
    global _quiet, _silent
    _quiet = _silent = True


class Progress:
    """A progress bar on a terminal; elsewhere one plain line per update.

    Args:
      total: number of steps of the whole run.
      begin: number of steps that an earlier start has taken.
    """

    def __init__(self, total: int, begin: int = 0):
        import tqdm  # here: the benchmark of a device runs without it

        self._total = total
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            initial=begin,
            unit="step",
            disable=_quiet or not self._interactive,
            smoothing=0.1,
        )

    def update(self, step: int, means: Mapping[str, Any]) -> None:
        """Show the step and the mean losses of a logging interval.

        Args:
          step: number of steps taken so far.
          means: means of the metrics, with `steps_per_second`.
        """
        if "block" in means:
            losses = f"{means['block']}: error {means['error']:.4f}"
        else:
            losses = (
                f"G {means['generator']:.3f}, Q {means['student']:.3f},"
                f" H' {means['h_mean']:.2f}"
            )
        if self._interactive:
            self._bar.set_postfix_str(losses, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        rate = means["steps_per_second"]
        left = datetime.timedelta(seconds=round((self._total - step) / rate))
        mention(f"step {step}/{self._total}: {losses}, {rate:.2f} steps/s, {left} left")

    def show(self, step: int, state: Any, means: Mapping[str, Any]) -> None:
        """Call `update`, in the form of a callback of the loop."""
        del state
        self.update(step, means)

    def close(self) -> None:
        """End the progress bar; its last line stays on the terminal."""
        self._bar.close()


def mention(message: str) -> None:
    """Print a line, unless `be_quiet` or `be_silent` was called."""
    if not _quiet:
        say(message)


def say(message: str) -> None:
    """Print a line above the progress bar, unless `be_silent` was called."""
    if not _silent:
        import tqdm

        tqdm.tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
