"""Checkpoints of a game: the last few, each with a digest that shows damage.

Orbax writes a step into a temporary folder and renames it when it is whole; it has no
checksum of the contents. The digest is written after that, so that a step without a
matching one was cut short or has changed since.

Of several processes one alone calls this: what it saves is the same in all of them.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import orbax.checkpoint as ocp

from adadfq_jax.errors import InputError, first_line
from adadfq_jax.runtime import files, sharding

DIGEST_FILE = "digest.sha256"
_ROOM = 1.2  # bytes on disk for a byte of state, at most


class Checkpoint(NamedTuple):
    """A restored step: numpy arrays in the state's structure, and a JSON record."""

    step: int
    state: Any
    record: dict[str, Any]


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a folder but the digest."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == DIGEST_FILE:
            continue
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def _digest_line(folder: Path) -> bytes:
    return f"{digest(folder)}\n".encode()


class Checkpoints:
    """The checkpoints in a folder; step S is the state after S steps.

    Args:
      folder: made when the first is saved.
      keep: how many stay, at least 2, so that there is one while the next is written.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder.absolute()
        self._keep = keep
        self._opened: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            alone = jax.process_index()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=False,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=alone, active_processes={alone}
                ),
            )
            self._opened = ocp.CheckpointManager(self._folder, options=options)
        return self._opened

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes a step. The state is fetched from its devices first.

        Raises:
          InputError: it cannot be written; earlier steps stay.
        """
        fetched = sharding.fetch(state)
        try:
            self._refuse_without_room(fetched)
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(fetched), record=ocp.args.JsonSave(record)
            )
            self._manager.save(step, args=args)
            folder = self._folder / str(step)
            files.write_bytes(folder / DIGEST_FILE, _digest_line(folder))
        except (OSError, ValueError) as error:  # ValueError is tensorstore's
            self._remove_unfinished()
            reason = " ".join(str(error).split())[:200]
            gone = not self._folder.parent.is_dir()
            advice = "the folder is gone" if gone else "start again to resume"
            raise InputError(
                f"{self._folder}: the checkpoint of step {step} cannot be written"
                f" ({reason}); {advice}"
            ) from error

    def _refuse_without_room(self, state: Any) -> None:
        """Raises OSError on a full disk, on which Orbax ends in several tracebacks."""
        needed = _ROOM * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder.parent).free
        if free < needed:
            raise OSError(
                f"{needed:,.0f} bytes are needed and {free:,} are free: make room"
            )

    def _remove_unfinished(self) -> None:
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def restore_newest(
        self, like: Callable[[int], Any], *, read_only: bool = False
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and a sentence on each damaged one.

        Damaged ones are removed, so that the resumed game can write them again.

        Args:
          like: step -> a state of the structure, shapes and types to restore.
          read_only: nothing is removed: the run may be going on.

        Returns:
          (checkpoint or None, sentences).

        Raises:
          InputError: it is whole, but of another structure.
        """
        damaged: list[str] = []
        if not self._folder.is_dir():
            return None, damaged
        if not read_only:
            self._remove_unfinished()
        for step in sorted(self._steps(), reverse=True):
            folder = self._folder / str(step)
            written = folder / DIGEST_FILE
            if written.is_file() and written.read_bytes() == _digest_line(folder):
                shapes = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like(step)
                )
                args = ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes),
                    record=ocp.args.JsonRestore(),
                )
                try:
                    restored = self._manager.restore(step, args=args)
                    # Orbax hands on what has another shape.
                    chex.assert_trees_all_equal_shapes(restored.state, shapes)
                except (AssertionError, KeyError, TypeError, ValueError) as error:
                    raise InputError(
                        f"{folder}: whole, but not of this program and network"
                        f" ({first_line(error)}); an empty workdir begins anew"
                    ) from error
                state = sharding.fetch(restored.state)
                return Checkpoint(step, state, restored.record), damaged
            damaged.append(f"checkpoint {folder} is damaged or unfinished: not used")
            if not read_only:
                shutil.rmtree(folder)
        return None, damaged

    def drop_after(self, step: int) -> None:
        """Removes those of later steps, before any has been restored or saved."""
        for later in self._steps() if self._folder.is_dir() else ():
            if later > step:
                shutil.rmtree(self._folder / str(later))

    def _steps(self) -> list[int]:
        return [int(p.name) for p in self._folder.iterdir() if p.name.isdecimal()]
