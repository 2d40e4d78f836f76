"""Checkpoints of a run: the last few, each with a digest that reveals damage.

Orbax writes a checkpoint into a temporary folder and renames that folder when it is
complete, but it keeps no checksum of the contents. The digest is written afterwards. A
checkpoint without a matching digest was therefore interrupted or has changed since.

When there are several processes, only one of them calls this module: the state is the
same in all of them.
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
_MAX_DISK_BYTES = 1.2  # on disk, for a byte of state


class Checkpoint(NamedTuple):
    """A restored checkpoint.

    Attributes:
      step: number of steps taken.
      state: numpy arrays in the structure of the state.
      record: the JSON values that were saved with the state.
    """

    step: int
    state: Any
    record: dict[str, Any]


def digest(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a folder's files.

    The digest file itself is left out.
    """
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
    """The checkpoints in a folder; checkpoint S is the state after S steps.

    Args:
      folder: the folder; it is made when the first checkpoint is saved.
      keep: number of checkpoints to keep, at least 2, so that there is a complete one
        while the next is written.
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
        """Write the checkpoint of a step.

        Args:
          step: number of steps taken.
          state: the state; it is copied from its devices first.
          record: JSON values to save with the state.

        Raises:
          InputError: the checkpoint cannot be written; earlier ones stay.
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
        except (OSError, ValueError) as error:  # tensorstore raises ValueErrors
            self._remove_unfinished()
            reason = " ".join(str(error).split())[:200]
            gone = not self._folder.parent.is_dir()
            advice = "the folder is gone" if gone else "start again to resume"
            raise InputError(
                f"{self._folder}: the checkpoint of step {step} cannot be written"
                f" ({reason}); {advice}"
            ) from error

    def _refuse_without_room(self, state: Any) -> None:
        """Raise OSError if the disk is too full; Orbax would print tracebacks."""
        needed = _MAX_DISK_BYTES * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
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
        """Restore the newest undamaged checkpoint, and report each damaged one.

        Damaged checkpoints are removed, so that the resumed run can write them again.

        Args:
          like: step -> a state of the structure, shapes and types to restore.
          read_only: whether to remove nothing, because the run may still be running.

        Returns:
          The checkpoint, or None if there is none, and a sentence for every damaged
          one.

        Raises:
          InputError: the checkpoint is undamaged, but has another structure.
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
                    # Orbax does not refuse arrays of another shape.
                    chex.assert_trees_all_equal_shapes(restored.state, shapes)
                except (AssertionError, KeyError, TypeError, ValueError) as error:
                    raise InputError(
                        f"{folder}: this checkpoint does not fit this version and"
                        f" network ({first_line(error)}); choose another workdir"
                    ) from error
                state = sharding.fetch(restored.state)
                return Checkpoint(step, state, restored.record), damaged
            damaged.append(f"checkpoint {folder} is damaged or unfinished: not used")
            if not read_only:
                shutil.rmtree(folder)
        return None, damaged

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps.

        Call this before any checkpoint has been restored or saved.
        """
        for later in self._steps() if self._folder.is_dir() else ():
            if later > step:
                shutil.rmtree(self._folder / str(later))

    def _steps(self) -> list[int]:
        return [int(p.name) for p in self._folder.iterdir() if p.name.isdecimal()]
