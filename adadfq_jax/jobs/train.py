"""The main job: plays the game of a configuration and writes its workdir."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from adadfq_jax import config as base
from adadfq_jax.errors import ExportError, InputError, NumericalError
from adadfq_jax.jobs import outcome
from adadfq_jax.report import run_page
from adadfq_jax.runtime import files, multihost, remote, sharding
from adadfq_jax.runtime.progress import mention, say
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import build, events, results
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.sitting import Sitting, agree


def _anywhere(config: ConfigDict) -> dict[str, Any]:
    """The configuration without where things lie on this machine."""
    values = config.to_dict()
    del values["teacher"]["path"]
    del values["eval"]["data_dir"], values["eval"]["classes"]
    return values


def _describe(config: ConfigDict, workdir: Path, command: str) -> None:
    """Writes what is played, and what was typed for it."""
    files.write_json(workdir / folder.CONFIG_FILE, base.recorded(config))
    if command:
        files.write_text(workdir / folder.COMMAND_FILE, command + "\n")


def run(
    config: ConfigDict,
    workdir: str | Path,
    stop: StopRequest | None = None,
    *,
    command: str = "",
    p_variables: Any = None,
) -> dict[str, Any]:
    """Plays the whole game, from where an earlier start of it ended, if one did.

    Args:
      config: see `config.default_config`.
      workdir: gets config.json, identity.json, metrics.jsonl, checkpoints,
        quantized.safetensors, summary.json, then report/index.html and the files of
        `outcome.export_files`. One that is finished is left as it is. It may be on
        shared storage, see `mirror`.
      stop: looked at after every step; by several processes at the pauses.
      command: that asks for this run, for the summary and the report.
      p_variables: P's, of the network config.teacher.model; None reads its file.

    Returns:
      The contents of summary.json.

    Raises:
      InputError: the configuration, P's file, the evaluation data or the workdir
        cannot be used.
      NumericalError: the game reached a number that is not finite; failed.json and the
        report say which. The next start forgets it, and plays from the last checkpoint.
      Stopped: `stop` asked for it.
      ExportError: an exported file does not compute what Q does; Q's is whole.
    """
    stop = StopRequest() if stop is None else stop
    agree(stop)
    setting = multihost.together(lambda: _set_up(config, p_variables))
    alike = {**setting.identity, "config": _anywhere(setting.config)}
    multihost.require_equal(alike, "configuration or P")
    if multihost.several():
        sharding.meet(setting.devices)
    with multihost.held_by_first(lambda: remote.opened(workdir)) as opened:
        place = opened or Workdir(Path(workdir))
        summary = multihost.from_first(lambda: _look(place.folder, setting))
        fresh = summary is None
        if summary is None:
            summary = _play(setting, place, stop, command)

        def conclude() -> None:
            file = place.folder / folder.QUANTIZED_FILE
            try:
                if fresh and setting.config.report.enabled:
                    say(place.told(run_page.attempt(place.folder, place.title)))
                exported = outcome.export_files(setting.config, file, place.folder)
            except ExportError:  # Q's own file is whole
                say(place.told(results.table(summary, file, None)))
                raise
            finally:
                place.publish()
            say(place.told(results.table(summary, file, exported)))

        multihost.from_first(conclude)
    return summary


class _Setting(NamedTuple):
    """What a run needs before its workdir: the prepared configuration, devices, P."""

    config: ConfigDict
    devices: Sequence[jax.Device]
    batch_size: int
    p_host: Any
    identity: dict[str, Any]


def _set_up(config: ConfigDict, p_variables: Any) -> _Setting:
    config = build.prepare(config)
    if config.population:
        raise InputError("config.population: several games are for adadfq_jax.main")
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    devices, batch_size = sharding.choose_devices(
        config.devices, config.game.batch_size, config.game.batch_rule
    )
    if config.log.tensorboard:
        events.need_writer()
    p_host = build.load_teacher(config) if p_variables is None else p_variables
    identity = build.identity(config, p_host, batch_size)
    return _Setting(config, devices, batch_size, p_host, identity)


def _look(workdir: Path, setting: _Setting) -> dict[str, Any] | None:
    """The summary of a finished run; another game is refused."""
    folder.check(workdir, setting.identity)
    return folder.finished(workdir, setting.config.game.steps)


def _begin(place: Workdir) -> None:
    """Makes the folder this start's: what an earlier one failed of goes."""
    (place.folder / folder.FAILURE_FILE).unlink(missing_ok=True)
    place.claim()


def _leave_failed(config: ConfigDict, place: Workdir, failure: str) -> None:
    """Leaves why the numbers failed, and a report that shows how it came to it."""
    try:
        folder.leave_failure(place.folder, failure)
        if config.report.enabled:
            say(place.told(run_page.attempt(place.folder, place.title)))
        place.publish()
    except (InputError, OSError) as error:
        # The failed numbers are what the run ends with, not that they cannot be kept.
        say(place.told(f"WARNING: what the run came to is not kept: {error}"))


def _play(
    setting: _Setting, place: Workdir, stop: StopRequest, command: str
) -> dict[str, Any]:
    """Plays what is left, to Q's file and the summary."""
    config, devices = setting.config, setting.devices
    measurements = multihost.together(lambda: outcome.Measurements(config, devices))
    size = measurements.eval_set and measurements.eval_set.size
    multihost.require_equal(size, "evaluation set")
    with multihost.held_by_first(lambda: folder.occupy(place.folder, setting.identity)):
        multihost.from_first(lambda: _begin(place))
        sitting = Sitting(
            config,
            place,
            setting.p_host,
            devices,
            setting.batch_size,
            measurements,
            stop,
        )
        sitting.resume()
        multihost.from_first(lambda: _describe(config, place.folder, command))
        p_top1 = sitting.p_top1 = measurements.p_top1(sitting.p_variables)
        mention(results.describe_teacher(config, p_top1))
        warning = None if p_top1 is None else results.warn_of_teacher(config, p_top1)
        if warning:
            say(warning)
        try:
            sitting.play()
        except NumericalError as error:  # in all processes: the numbers are the same
            leave = functools.partial(_leave_failed, config, place, str(error))
            multihost.from_first(leave)
            raise
        return sitting.finish(command)
