"""Output of a run on the terminal: a progress bar, or plain lines in a log file."""

import datetime
import logging
import sys
from collections.abc import Mapping
from typing import Any

# The least level that is shown: every line; results and warnings; none.
STEPS, RESULT, NOTHING = logging.INFO, logging.INFO + 5, logging.CRITICAL + 1
_WARNING = "WARNING: "
log = logging.getLogger("adadfq_jax")


class _Terminal(logging.Handler):
    """Prints log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line, on standard output."""
        import tqdm  # here: the benchmark of a device runs without it

        kind = _WARNING if record.levelno >= logging.WARNING else ""
        tqdm.tqdm.write(kind + record.getMessage(), file=sys.stdout)
        sys.stdout.flush()


def show(least: int = STEPS) -> None:
    """Print the lines that the package logs, from the level `least` on.

    Args:
      least: `STEPS`, `RESULT`, or `NOTHING`, as in all but the primary of several
        processes.
    """
    if not log.handlers:
        log.addHandler(_Terminal())
        log.propagate = False
    log.setLevel(least)


def show_by_default() -> None:
    """Call `show`, unless the caller's program decides what becomes of log lines."""
    if not log.hasHandlers() and log.level == logging.NOTSET:
        show()


def say(sentence: str) -> None:
    """Log a result; a sentence that begins with 'WARNING: ' is logged as a warning."""
    level = logging.WARNING if sentence.startswith(_WARNING) else RESULT
    log.log(level, sentence.removeprefix(_WARNING))


class Progress:
    """A progress bar on a terminal; elsewhere one plain line per update.

    Args:
      total: number of steps of the whole run.
      begin: number of steps that an earlier start has taken.
      game: number of steps of the game, where a reconstruction follows; it is `total`
        otherwise.
    """

    def __init__(self, total: int, begin: int = 0, game: int | None = None):
        import tqdm  # here: the benchmark of a device runs without it

        self._total, self._last = total, begin
        self._game = total if game is None else game
        self._seconds, self._since = 0.0, begin  # of the phase, and where it began
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            initial=begin,
            unit="step",
            disable=not (self._interactive and log.isEnabledFor(logging.INFO)),
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
        log.info(
            f"step {step}/{self._total}: {losses}, {rate:.2f} steps/s,"
            f" {self._time_left(step, rate)}"
        )

    def _time_left(self, step: int, rate: float) -> str:
        """Estimate the time to the end of the phase from its mean rate so far.

        The rate of an interval would not do: the first iterations of a block contain
        its compilation. Nothing is known of the reconstruction during the game.
        """
        if self._since < self._game <= self._last:
            self._seconds, self._since = 0.0, self._last
        self._seconds += (step - self._last) / rate
        self._last = step
        end = self._game if step <= self._game else self._total
        seconds = self._seconds * (end - step) / (step - self._since)
        left = datetime.timedelta(seconds=round(seconds))
        return f"{left} {'left' if end == self._total else 'to the reconstruction'}"

    def show(self, step: int, state: Any, means: Mapping[str, Any]) -> None:
        """Call `update`, in the form of a callback of the loop."""
        del state
        self.update(step, means)

    def close(self) -> None:
        """End the progress bar; its last line stays on the terminal."""
        self._bar.close()
