"""Workdirs on shared storage: any path with a scheme that etils.epath opens.

A run on `gs://BUCKET/RUN` works in a local copy of the folder. The copy is fetched when
the run starts and published after every save and at the end, because Orbax has drivers
for a few object stores only, and because no store has locks, appends or renames. A
store shows an object only once it is complete. The order of publishing keeps files
consistent with each other: `identity.json` comes first, a checkpoint's digest after its
other files, `summary.json` after all of them, and deletions come last. A checkpoint
that was published in part has no matching digest and is not used.

Two guarantees are weaker than in a local folder:

* There is no lock. Every start writes its own mark to `.lock`. A run that finds another
  mark before it publishes ends with an error and publishes nothing. So the newest start
  wins, and the older one loses its steps since its last save. If two runs publish at
  the same moment, their files can mix; a mixed checkpoint has no matching digest.
* A run that is killed between two saves also loses the log lines since the last save.
  The next start would drop them anyway.
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
from adadfq_jax.runtime.progress import log
from adadfq_jax.runtime.run_files import IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE

_DIGEST_SUFFIX = ".sha256"
_WAITS = (1, 2, 4, 8, 16)  # seconds between attempts: a store may fail for a moment


def is_remote(path: str | Path) -> bool:
    """Tell whether a path has a scheme, such as gs://BUCKET/RUN."""
    return "://" in str(path)


class Workdir:
    """A run's folder: the local one that the program uses, and the user's name for it.

    Attributes:
      folder: the local folder.
      name: the folder as the user named it.
      title: a short name of the run, for the report.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        self.title = folder.resolve().name

    def claim(self) -> None:
        """Claim the folder for this run, and publish what is in it."""

    def publish(self) -> None:
        """Copy the content of the local folder to the user's folder."""

    def with_name(self, text: str) -> str:
        """Return a text with the user's name in place of the local folder's."""
        return text.replace(str(self.folder), self.name)


class _Mirror(Workdir):
    """The local copy of a remote folder."""

    def __init__(self, name: str, folder: Path):
        super().__init__(folder)
        self.name = name.rstrip("/")
        self.title = self.name.rpartition("/")[2]  # the copy has an arbitrary name
        self._mark: str | None = None
        # Name -> the stamp of the local file when both copies were last equal.
        self._known: dict[str, Any] = {}
        with self._explained("be opened"):
            self._remote = epath.Path(name)

    def fetch(self) -> None:
        """Copy all remote files, except those that are removed during the copy."""
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
        """Copy new and changed files to the store, then delete the removed ones.

        After a failure this is tried again, from the file that failed.

        Raises:
          InputError: another run has claimed the folder, or it cannot be written.
        """
        for wait in _WAITS:
            try:
                return self._publish_once()
            except InputError:
                raise
            except Exception as error:  # the type depends on the store's library
                log.warning(
                    f"{self.name}: {first_line(error)}; trying again in {wait} s"
                )
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
                f"{self.name}: another run was started in this folder; this run ends"
            )

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # the type depends on the store's library
            reason = first_line(error)
            raise InputError(f"{self.name}: it cannot {what} ({reason})") from error


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[Workdir]:
    """Yield a workdir to work in: the local folder itself, or a copy of a remote one.

    The copy is removed at the end. Errors name the remote folder.

    Raises:
      InputError: no library opens the scheme, or the folder cannot be read.
    """
    if not is_remote(workdir):
        yield Workdir(Path(workdir).expanduser())
        return
    with tempfile.TemporaryDirectory(prefix="adadfq_jax-") as temporary:
        mirror = _Mirror(str(workdir), Path(temporary) / "run")
        mirror.fetch()
        try:
            yield mirror
        except InputError as error:
            raise InputError(mirror.with_name(str(error))) from error


def _names(folder: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names, relative to the folder, of all files below it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}"


def _last(name: str) -> str:
    """Return the last part of a name; members of a population have subfolders."""
    return name.rpartition("/")[2]


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of a file, which change whenever the file does.

    That holds since this package replaces or extends files, but never edits them.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _order(name: str) -> tuple[int, str]:
    """Return the sort key for publishing: files that vouch for others come later."""
    if _last(name) == IDENTITY_FILE:
        return 0, name
    if _last(name) == SUMMARY_FILE:
        return 3, name
    return (2 if name.endswith(_DIGEST_SUFFIX) else 1), name
