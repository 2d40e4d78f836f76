"""The folder of a run: its files, which run it belongs to, and whether that is done."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from adadfq_jax import settings
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
from adadfq_jax.runtime.run_files import LAYER_BITS_FILE as LAYER_BITS_FILE
from adadfq_jax.runtime.run_files import LOCK_FILE as LOCK_FILE
from adadfq_jax.runtime.run_files import METRICS_FILE as METRICS_FILE
from adadfq_jax.runtime.run_files import QUANTIZED_FILE as QUANTIZED_FILE
from adadfq_jax.runtime.run_files import SENSITIVITY_FILE as SENSITIVITY_FILE
from adadfq_jax.runtime.run_files import SUMMARY_FILE as SUMMARY_FILE
from adadfq_jax.teacher import hub


@contextlib.contextmanager
def occupy(workdir: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder, or check that it belongs to the same run, and lock it meanwhile.

    Args:
      workdir: the folder; it may be new, empty, or from an earlier start of this run.
      identity: everything that changes the numbers, as JSON values by key.

    Raises:
      InputError: another run is using the folder, or it holds another run.
    """
    made, locked, begun = not workdir.exists(), False, False
    try:
        with explained(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            # The lock file must never be replaced: a lock is on the file, not its name.
            with (workdir / LOCK_FILE).open("a") as lock:
                _lock(lock, workdir)
                locked = True
                check(workdir, identity)
                if not (workdir / IDENTITY_FILE).exists():
                    files.write_json(workdir / IDENTITY_FILE, dict(identity))
                begun = True
                yield
    finally:
        # Leave no empty folder behind, but leave another run's.
        if made and locked and not begun:
            (workdir / LOCK_FILE).unlink(missing_ok=True)
            workdir.rmdir()


@contextlib.contextmanager
def explained(workdir: Path) -> Iterator[None]:
    """Turn errors of the file system within into errors that say what to do.

    Raises:
      InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename or workdir
        raise InputError(
            f"{name}: {error.strerror or error}; correct that and start again, or"
            " choose another workdir"
        ) from error


def _lock(file: IO[str], workdir: Path) -> None:
    """Lock a file until it is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{workdir}: another run is using it") from None
    except OSError:
        pass  # the file system has no locks


def check(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Raises:
      InputError: the folder holds another run; the message names what differs.
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
                f"{workdir}: it has {strange[0]}, but no {IDENTITY_FILE} that says"
                " which run made it; choose another workdir"
            )
        return
    there = settings.complete(read_json(file), settings.LATER)
    own = json.loads(json.dumps(dict(identity)))
    here = settings.complete(own, settings.LATER)
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
    """Return the summary of a run that is finished, or None if it is not.

    A run is finished if it has taken all steps and its quantized file is undamaged.

    Args:
      workdir: the folder of the run.
      steps: number of steps of the game.

    Raises:
      InputError: the run has taken more steps.
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
    """Write down why a run's numbers failed."""
    files.write_json(workdir / FAILURE_FILE, {"failure": failure})


def failure_of(workdir: Path) -> str:
    """Return why a run's numbers failed, or '' if they did not.

    Raises:
      InputError: failed.json is damaged.
    """
    file = workdir / FAILURE_FILE
    if not file.exists():
        return ""
    return str(read_json(file).get("failure") or "the reason was not recorded")


def describe_run(workdir: Path, digest: str) -> dict[str, Any] | None:
    """Return the summary of a run, with its recipe, P's file name and P's digest.

    It is None if the folder is not the one of the run that wrote the quantized file.

    Args:
      workdir: a folder that may belong to a run.
      digest: SHA-256 of the quantized file.
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
        "teacher": hub.source(config["teacher"]["path"]),
        "teacher_sha256": identity["teacher.sha256"],
    }


def refuse_fewer(workdir: Path, played: int, steps: int) -> None:
    """Refuse a run that has taken more steps than are asked for.

    Raises:
      InputError: the run has taken more than `steps` steps.
    """
    if played > steps:
        raise InputError(
            f"{workdir}: the run there has played {played} steps, game.steps is"
            f" {steps}; choose another workdir"
        )
