"""Measuring cases one after the other, within a budget of time."""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adadfq_jax.errors import InputError
from adadfq_jax.runtime import files


class Budget:
    """The figures of cases, in the order in which they are to be measured.

    Args:
      folder: gets device.json and device.md; figures that are there already are kept.
      machine: what the figures depend on besides the program.
      cases: names of the cases; the first word is the network.
      seconds: the budget, from now on.
      document: (figures, names of all cases) -> Markdown.

    Raises:
      InputError: the folder's figures are of another machine.
    """

    def __init__(
        self,
        folder: Path,
        machine: Mapping[str, str],
        cases: Sequence[str],
        seconds: float,
        document: Callable[[Mapping[str, Any], Sequence[str]], str],
    ):
        self._end = time.monotonic() + seconds
        self._folder, self._cases, self._document = folder, cases, document
        self._lock = threading.Lock()
        self.found: dict[str, Any] = {"machine": machine, "cases": {}}
        file = folder / "device.json"
        if file.exists():
            self.found = files.read_json(file)
            if self.found["machine"] != machine:
                raise InputError(
                    f"{file}: it is of {self.found['machine']}, and this is {machine};"
                    " choose another --out"
                )
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def missing(self) -> list[str]:
        """The cases without figures."""
        return [case for case in self._cases if case not in self.found["cases"]]

    def expected(self, case: str) -> float:
        """Return the seconds that a case may take: as the longest one alike so far."""
        rows = self.found["cases"]
        alike = [name for name in rows if name.split()[0] == case.split()[0]]
        return max((rows[name]["seconds"] for name in alike or rows), default=0.0)

    def measure(self, run: Callable[[str], dict[str, Any]]) -> None:
        """Measure what fits into the budget, and print all figures.

        The files are written after each case. XLA cannot be interrupted, so the process
        ends when the budget does, with exit code 0.

        Args:
          run: measures a case; its figures have the 'seconds' that it took.
        """
        timer = threading.Timer(self._end - time.monotonic(), self._give_up)
        timer.daemon = True
        timer.start()
        try:
            for case in self.missing:
                if self.expected(case) <= self._end - time.monotonic():
                    print(f"{case} ...", flush=True)
                    row = run(case)
                    with self._lock:
                        self.found["cases"][case] = row
                        self._write()
        finally:
            timer.cancel()
        self._finish()

    def _write(self) -> str:
        text = self._document(self.found, self._cases)
        files.write_json(self._folder / "device.json", self.found)
        files.write_text(self._folder / "device.md", text)
        return text

    def _finish(self) -> None:
        with self._lock:
            print(f"\n{self._write()}\nFiles: {self._folder}/device.json, device.md")
            sys.stdout.flush()

    def _give_up(self) -> None:
        self._finish()
        os._exit(0)
