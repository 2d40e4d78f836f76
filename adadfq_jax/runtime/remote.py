"""Workdirs on shared storage: any path with a scheme that etils.epath opens.

A run on `gs://BUCKET/RUN` works in a local copy of the folder, which is fetched at its
start and published after every save and at its end: Orbax has drivers for a few object
stores only, and no store has locks, appends or renames. An object appears whole when it
is closed; what makes a whole of several is their order: `identity.json` comes first, a
checkpoint's digest after its other files, `summary.json` after everything, and things
are removed last. A checkpoint that was published in part has no digest that fits, and
is not used.

What is weaker than in a local folder:

* There is no lock. A start leaves its mark in `.lock`; a run that finds another mark
  when it is about to publish ends with an error and publishes nothing. So the newest
  start wins, and what the older one played since its last save is lost. Two starts in
  the moment between reading the mark and writing can mix their files; checkpoints that
  are mixed have no digest that fits.
* A kill between two saves loses the log lines since the last save as well. They would
  be dropped by the next start anyway.
"""

import contextlib
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from adadfq_jax.errors import InputError, first_line
from adadfq_jax.runtime.progress import say
from adadfq_jax.runtime.run_files import IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE

_DIGEST_SUFFIX = ".sha256"
_WAITS = (1, 2, 4, 8, 16)  # seconds between attempts: a store may be away for a moment


def is_remote(path: str | Path) -> bool:
    """Whether a path has a scheme, as gs://BUCKET/RUN."""
    return "://" in str(path)


class Workdir:
    """A run's folder as the program works in it, and where the user has it.

    folder: a local one. name: what the user calls it. title: a word for the run.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        self.title = folder.resolve().name

    def claim(self) -> None:
        """Makes it this run's, and publishes what the run is."""

    def publish(self) -> None:
        """Brings what is in the folder to where the user has it."""

    def told(self, text: str) -> str:
        """A text on the folder, in the user's terms."""
        return text.replace(str(self.folder), self.name)


class _Mirror(Workdir):
    """The local copy of a remote folder."""

    def __init__(self, name: str, folder: Path):
        super().__init__(folder)
        self.name = name.rstrip("/")
        self.title = self.name.rpartition("/")[2]  # the copy's name says nothing
        self._mark: str | None = None
        self._known: dict[str, Any] = {}  # name -> what `_stamp` said when it was equal
        with self._explained("be opened"):
            self._remote = epath.Path(name)

    def fetch(self) -> None:
        """Copies everything that is there; what goes meanwhile is left out."""
        with self._explained("be read"):
            for name in list(_names(self._remote)):
                if _last(name) == LOCK_FILE:
                    continue
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    target.write_bytes((self._remote / name).read_bytes())
                    self._known[name] = _stamp(target)

    def claim(self) -> None:
        self._mark = uuid.uuid4().hex
        with self._explained("be written"):
            self._remote.mkdir(parents=True, exist_ok=True)
            (self._remote / LOCK_FILE).write_text(self._mark)
        self.publish()

    def publish(self) -> None:
        """Copies what is new or changed, then removes what is gone.

        What fails is tried again, from where it failed.

        Raises:
          InputError: another run has claimed the folder, or it cannot be written.
        """
        for wait in _WAITS:
            try:
                return self._publish_once()
            except InputError:
                raise
            except Exception as error:  # of whatever library is behind the scheme
                say(f"WARNING: {self.name}: {first_line(error)}; again in {wait} s")
                time.sleep(wait)
        with self._explained("be written"):
            self._publish_once()

    def _publish_once(self) -> None:
        self._refuse_taken()
        here = {
            name: _stamp(self.folder / name)
            for name in _names(self.folder)
            if _last(name) != LOCK_FILE
        }
        changed = [name for name in here if self._known.get(name) != here[name]]
        for name in sorted(changed, key=_order):
            target = self._remote / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.folder / name).read_bytes())
            self._known[name] = here[name]
        for name in sorted(self._known.keys() - here.keys(), key=_order)[::-1]:
            (self._remote / name).unlink(missing_ok=True)
            del self._known[name]

    def _refuse_taken(self) -> None:
        mark = self._remote / LOCK_FILE
        if self._mark and mark.exists() and mark.read_text() != self._mark:
            raise InputError(
                f"{self.name}: another run has been started on it since; this one ends"
            )

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of whatever library is behind the scheme
            reason = first_line(error)
            raise InputError(f"{self.name}: it cannot {what} ({reason})") from error


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[Workdir]:
    """A workdir to work in: a local folder itself, of a remote one a copy.

    The copy goes at the end; errors name the remote folder.

    Raises:
      InputError: there is nothing that opens the scheme, or it cannot be read.
    """
    if not is_remote(workdir):
        yield Workdir(Path(workdir))
        return
    with tempfile.TemporaryDirectory(prefix="adadfq_jax-") as temporary:
        mirror = _Mirror(str(workdir), Path(temporary) / "run")
        mirror.fetch()
        try:
            yield mirror
        except InputError as error:
            raise InputError(mirror.told(str(error))) from error


def _names(folder: Any, prefix: str = "") -> Iterator[str]:
    """Every file below a folder, as a relative name."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}"


def _last(name: str) -> str:
    """The file's own name: members of a population have their folders below."""
    return name.rpartition("/")[2]


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does. Ours are replaced or appended to, never edited."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _order(name: str) -> tuple[int, str]:
    """Place among what is published: what says that others are whole comes last."""
    if _last(name) == IDENTITY_FILE:
        return 0, name
    if _last(name) == SUMMARY_FILE:
        return 3, name
    return (2 if name.endswith(_DIGEST_SUFFIX) else 1), name
