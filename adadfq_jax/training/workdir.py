"""The folder of a run: what lies in it, whose it is, and whether it is done."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from adadfq_jax.errors import InputError
from adadfq_jax.runtime import files
from adadfq_jax.runtime.files import read_json as read_json
from adadfq_jax.runtime.files import sha256 as sha256
from adadfq_jax.runtime.run_files import CHECKPOINTS as CHECKPOINTS
from adadfq_jax.runtime.run_files import COMMAND_FILE as COMMAND_FILE
from adadfq_jax.runtime.run_files import CONFIG_FILE as CONFIG_FILE
from adadfq_jax.runtime.run_files import EXPORT_FILE as EXPORT_FILE
from adadfq_jax.runtime.run_files import FAILURE_FILE as FAILURE_FILE
from adadfq_jax.runtime.run_files import IDENTITY_FILE as IDENTITY_FILE
from adadfq_jax.runtime.run_files import LOCK_FILE as LOCK_FILE
from adadfq_jax.runtime.run_files import METRICS_FILE as METRICS_FILE
from adadfq_jax.runtime.run_files import QUANTIZED_FILE as QUANTIZED_FILE
from adadfq_jax.runtime.run_files import SUMMARY_FILE as SUMMARY_FILE


@contextlib.contextmanager
def occupy(workdir: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Makes the folder, or checks that it is of the same game; holds it meanwhile.

    Args:
      workdir: the folder; it may be empty, new, or of an earlier start of this run.
      identity: everything that changes the numbers, JSON values by key.

    Raises:
      InputError: another run is using it, or it holds another game.
    """
    made, begun = not workdir.exists(), False
    try:
        with explained(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            # A file that is never replaced: a lock is of the file, not of its name.
            with (workdir / LOCK_FILE).open("a") as lock:
                _lock(lock, workdir)
                check(workdir, identity)
                if not (workdir / IDENTITY_FILE).exists():
                    files.write_json(workdir / IDENTITY_FILE, dict(identity))
                begun = True
                yield
    finally:
        if made and not begun and workdir.is_dir():  # leave no debris
            (workdir / LOCK_FILE).unlink(missing_ok=True)
            workdir.rmdir()


@contextlib.contextmanager
def explained(workdir: Path) -> Iterator[None]:
    """Says what to do where the system refuses what is done in a folder.

    Raises:
      InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename or workdir
        raise InputError(
            f"{name}: {error.strerror or error}; start again once that is mended, or"
            " choose another workdir"
        ) from error


def _lock(file: IO[str], workdir: Path) -> None:
    """Holds a file until it is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{workdir}: another run is using it") from None
    except OSError:
        pass  # a file system without locks


def check(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Refuses a folder that holds another game.

    Raises:
      InputError: with the keys that differ.
    """
    file = workdir / IDENTITY_FILE
    if not file.exists():
        strange = [
            name
            for name in (CONFIG_FILE, METRICS_FILE, QUANTIZED_FILE, CHECKPOINTS)
            if (workdir / name).exists()
        ]
        if strange:
            raise InputError(
                f"{workdir}: it has {strange[0]}, but no {IDENTITY_FILE} that says of"
                " which game; choose another workdir"
            )
        return
    there = read_json(file)
    here = json.loads(json.dumps(dict(identity)))
    differing = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise InputError(
            f"{workdir}: it holds another game ({'; '.join(differing[:4])}); choose"
            " another workdir"
        )


def finished(workdir: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that has played `steps` and whose file is whole, or None.

    Raises:
      InputError: it has played more.
    """
    file = workdir / SUMMARY_FILE
    if not file.exists():
        return None
    summary = read_json(file)
    played = summary.get("steps", 0)
    refuse_fewer(workdir, played, steps)
    quantized = workdir / QUANTIZED_FILE
    whole = quantized.exists() and sha256(quantized) == summary.get("sha256")
    return summary if played == steps and whole else None


def leave_failure(workdir: Path, failure: str) -> None:
    """Leaves why a run's numbers failed."""
    files.write_json(workdir / FAILURE_FILE, {"failure": failure})


def failure_of(workdir: Path) -> str:
    """Why a run's numbers failed, '' where they did not.

    Raises:
      InputError: the file that says so is damaged.
    """
    file = workdir / FAILURE_FILE
    if not file.exists():
        return ""
    return str(read_json(file).get("failure") or "it is not known why")


def describe_run(workdir: Path, digest: str) -> dict[str, Any] | None:
    """The summary of a run, its recipe, P's file name and digest; None without one.

    Args:
      workdir: where a run may have been.
      digest: of the quantized file that must be its own.
    """
    names = (SUMMARY_FILE, CONFIG_FILE, IDENTITY_FILE)
    if not all((workdir / name).exists() for name in names):
        return None
    summary, config, identity = (read_json(workdir / name) for name in names)
    if summary.get("sha256") != digest:
        return None
    return {
        **summary,
        "recipe": config["recipe"],
        "teacher": Path(config["teacher"]["path"]).name,
        "teacher_sha256": identity["teacher.sha256"],
    }


def refuse_fewer(workdir: Path, played: int, steps: int) -> None:
    """Refuses to go back in a run.

    Raises:
      InputError: it has played more than `steps`.
    """
    if played > steps:
        raise InputError(
            f"{workdir}: the run there has played {played} steps, game.steps is"
            f" {steps}; choose another workdir"
        )
