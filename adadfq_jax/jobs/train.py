"""The main job: trains Q by a configuration and writes its workdir."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from adadfq_jax import game
from adadfq_jax.errors import ExportError, InputError, NumericalError, Stopped
from adadfq_jax.game import GameState
from adadfq_jax.jobs import exports
from adadfq_jax.jobs.configuration import load_teacher, resolved, to_keys
from adadfq_jax.network import Function
from adadfq_jax.recipes import Recipe
from adadfq_jax.report import run_page
from adadfq_jax.report.record import Recorder, Subject
from adadfq_jax.runtime import files, multihost, remote, sharding
from adadfq_jax.runtime.progress import Progress, mention, say
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import build, events, loop, results, schedule
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.callbacks import At
from adadfq_jax.training.measurements import Measurements
from adadfq_jax.training.reconstruct import (
    Reconstruction,
    ReconstructionState,
    check_batch,
    make_reconstruction,
)
from adadfq_jax.training.run import Run
from adadfq_jax.training.spec import RunSpec


def run(
    config: Any,
    workdir: str | Path,
    stop: StopRequest | None = None,
    *,
    command: str = "",
    recipe: Recipe | None = None,
    function: Function | None = None,
) -> dict[str, Any]:
    """Trains Q, from where an earlier start of the run ended, if there was one.

    Args:
      config: a ConfigDict, a mapping or a spec, see `configuration.resolved`.
      workdir: gets config.json, identity.json, metrics.jsonl, checkpoints,
        quantized.safetensors, summary.json, then report/index.html and the files of
        `exports.export_files`. One that is finished is left as it is. It may be on
        shared storage, see `runtime.remote`.
      stop: looked at after every step; by several processes at the pauses.
      command: that asks for this run, for the summary and the report.
      recipe: from outside the package; None finds config.recipe by its name.
      function: P, with its variables; None reads the file config.teacher.path.

    Returns:
      The contents of summary.json.

    Raises:
      InputError: the configuration, P's file, the evaluation data or the workdir
        cannot be used.
      NumericalError: the run reached a number that is not finite; failed.json and the
        report say which. The next start forgets it and resumes at the last checkpoint.
      Stopped: `stop` asked for it.
      ExportError: an exported file does not compute what Q does; Q's is whole.
    """
    stop = StopRequest() if stop is None else stop
    if multihost.several():
        stop.agree(multihost.largest)
    with resolved(config, recipe) as spec:
        if spec.population:
            raise InputError("config.population: several runs are for adadfq_jax.main")
        prepare = functools.partial(_prepare, spec, function)
        return _run(multihost.together(prepare), workdir, stop, command)


class _Prepared(NamedTuple):
    """What a run needs before its workdir is looked at."""

    assembly: Assembly
    devices: Sequence[jax.Device]
    p_host: Any
    identity: dict[str, Any]


def _prepare(spec: RunSpec, function: Function | None) -> _Prepared:
    devices, batch_size = sharding.choose_devices(
        spec.devices, spec.game.batch_size, spec.game.batch_rule
    )
    check_batch(spec, devices)
    if spec.log.tensorboard:
        events.need_writer()
    if function is None:
        function, spec = load_teacher(spec)
    assembly = build.assemble(spec, batch_size, function)
    for note in [*build.notes(assembly), *exports.notes(spec)]:
        say(note)
    identity = assembly.identity(function.variables)
    return _Prepared(assembly, devices, function.variables, identity)


def _anywhere(spec: RunSpec) -> dict[str, Any]:
    """The settings without where things lie on this machine."""
    values = spec.to_json()
    del values["teacher"]["path"]
    del values["eval"]["data_dir"], values["eval"]["classes"]
    return values


def _run(
    prepared: _Prepared, workdir: str | Path, stop: StopRequest, command: str
) -> dict[str, Any]:
    """Everything in the workdir: training what is left, report and exported files."""
    spec, function = prepared.assembly.spec, prepared.assembly.function
    alike = {**prepared.identity, "config": _anywhere(spec)}
    multihost.require_equal(alike, "configuration or P")
    if multihost.several():
        sharding.meet(prepared.devices)
    with multihost.held_by_first(lambda: remote.opened(workdir)) as opened:
        place = opened or Workdir(Path(workdir))
        summary = multihost.from_first(lambda: _finished(place.folder, prepared))
        fresh = summary is None
        if summary is None:
            summary = _train(prepared, place, stop, command)

        def conclude() -> None:
            file = place.folder / folder.QUANTIZED_FILE
            try:
                if fresh and spec.report.enabled:
                    say(place.told(run_page.attempt(place.folder, place.title)))
                exported = exports.export_files(spec, file, place.folder, function)
            except ExportError:  # Q's own file is whole
                say(place.told(results.table(summary, file, None)))
                raise
            finally:
                place.publish()
            say(place.told(results.table(summary, file, exported)))

        multihost.from_first(conclude)
    return summary


def _finished(workdir: Path, prepared: _Prepared) -> dict[str, Any] | None:
    """The summary of a finished run; a workdir of another run is refused."""
    with folder.explained(workdir):
        folder.check(workdir, prepared.identity)
        return folder.finished(workdir, prepared.assembly.spec.game.steps)


def make_recorder(
    assembly: Assembly,
    workdir: Path,
    measurements: Measurements,
    reconstruction: Reconstruction | None = None,
) -> Recorder | None:
    """What records for the report, or None where that is disabled."""
    spec, p = assembly.spec, assembly.spec.teacher
    if not spec.report.enabled:
        return None
    subject = Subject(
        assembly.parts.networks,
        assembly.parts.q_options,
        num_classes=p.num_classes,
        seed=spec.seed,
        batch_size=assembly.batch_size,
        mean=p.mean,
        std=p.std,
        eval_set=measurements.eval_set,
    )
    last = [] if reconstruction is None else [reconstruction.steps]
    return Recorder(workdir, subject, [*schedule.evaluation_steps(spec), *last])


def describe(spec: RunSpec, workdir: Path, command: str) -> None:
    """Writes what is trained, and what was typed for it."""
    files.write_json(workdir / folder.CONFIG_FILE, spec.to_json())
    if command:
        files.write_text(workdir / folder.COMMAND_FILE, command + "\n")


def tell_of_teacher(spec: RunSpec, p_top1: float | None) -> None:
    """Says how good P is, with a warning where that is not what is expected."""
    mention(results.describe_teacher(spec, p_top1))
    warning = None if p_top1 is None else results.warn_of_teacher(spec, p_top1)
    if warning:
        say(to_keys(warning))


def _begin(place: Workdir) -> None:
    """Makes the folder this start's: what an earlier one failed of goes."""
    (place.folder / folder.FAILURE_FILE).unlink(missing_ok=True)
    place.claim()


def _leave_failed(spec: RunSpec, place: Workdir, failure: str) -> None:
    """Leaves why the numbers failed, and a report that shows how it came to it."""
    try:
        folder.leave_failure(place.folder, failure)
        if spec.report.enabled:
            say(place.told(run_page.attempt(place.folder, place.title)))
        place.publish()
    except (InputError, OSError) as error:
        # The failed numbers are what the run ends with, not that they cannot be kept.
        say(place.told(f"WARNING: what the run came to is not kept: {error}"))


def _train(
    prepared: _Prepared, place: Workdir, stop: StopRequest, command: str
) -> dict[str, Any]:
    """Trains what is left, to Q's file and the summary."""
    assembly, devices = prepared.assembly, prepared.devices
    spec = assembly.spec
    measurements = multihost.together(lambda: Measurements(assembly, devices))
    size = measurements.eval_set and measurements.eval_set.size
    multihost.require_equal(size, "evaluation set")
    with multihost.held_by_first(
        lambda: folder.occupy(place.folder, prepared.identity)
    ):
        multihost.from_first(lambda: _begin(place))
        teacher = sharding.replicate(assembly.teacher(prepared.p_host), devices)
        reconstruction = make_reconstruction(assembly, devices)
        recorder = make_recorder(assembly, place.folder, measurements, reconstruction)
        this = Run(
            *(assembly, place, teacher, measurements),
            reconstruction=reconstruction,
            recorder=recorder,
            stop=stop,
        )
        steps, begun = build.build_game(assembly, prepared.p_host, devices)
        state: Any
        state, begin = _resume(this, begun, devices)
        multihost.from_first(lambda: describe(spec, place.folder, command))
        this.p_top1 = measurements.p_top1(teacher)
        tell_of_teacher(spec, this.p_top1)
        try:
            step = begin
            if begin <= spec.game.steps:
                state, step = _fit(this, steps, state, teacher, devices, begin, stop)
            if step >= spec.game.steps and reconstruction is not None:
                state, step = reconstruct(this, state, teacher, devices, stop)
        except NumericalError as error:  # in all processes: the numbers are the same
            failure = to_keys(str(error))
            multihost.from_first(lambda: _leave_failed(spec, place, failure))
            raise
        if step < this.steps:
            multihost.from_first(lambda: this.save(step, state))
            # What was saved already has published nothing.
            multihost.from_first(place.publish)
            kept = f"saved at step {step}" if step else "nothing to save yet"
            raise Stopped(f"{kept}; repeat the command to resume")
        size, variables = multihost.from_first(lambda: this.write_network(state))
        this.measure_last(variables)
        multihost.from_first(lambda: this.record_last(state, variables))
        return multihost.from_first(lambda: this.summarise(size, command, devices))


def _resume(
    this: Run, state: GameState, devices: Sequence[jax.Device]
) -> tuple[Any, int]:
    """The state of the newest whole checkpoint and its step; the first if none is."""

    def find():
        found, sentences = this.find(state)
        for sentence in sentences:
            say(f"WARNING: {this.place.told(sentence)}")
        return found

    found = multihost.from_first(find)
    if found is None:
        if multihost.several():  # machines of two kinds could have two Gs
            fetched = multihost.from_first(lambda: sharding.fetch(state))
            return sharding.replicate(fetched, devices), 0
        return state, 0
    this.go_on_from(found)
    return sharding.replicate(found.state, devices), found.step


def _fit(
    this: Run,
    steps: build.Steps,
    state: GameState,
    teacher: game.Teacher,
    devices: Sequence[jax.Device],
    begin: int,
    stop: StopRequest,
) -> tuple[GameState, int]:
    """The loop, with everything that a run pauses for."""
    spec = this.assembly.spec
    key = sharding.replicate(jax.random.key(spec.seed), devices)
    constants = (teacher, key)
    count = sharding.steps_per_dispatch(spec.steps_per_dispatch, devices)
    count = min(count, spec.log.every)
    progress = Progress(this.steps, begin)

    def tell(step: int, state: GameState, metrics: Mapping[str, Any]) -> None:
        this.write_row(step, metrics)
        progress.update(step, metrics)

    pauses = schedule.pauses(spec)
    callbacks = [
        At(pauses, tell, on_primary=True),
        At(pauses, this.evaluate),
        At(pauses, this.record, on_primary=True),
        At(pauses, this.save_if_due, on_primary=True),
    ]
    if multihost.several():
        callbacks.insert(0, At(pauses, lambda *_: stop.agree(multihost.largest)))
    try:
        seconds = loop.expected_seconds(
            *(steps, state, constants, spec.game, pauses),
            begin=begin,
            per_dispatch=count,
            stop=stop,
        )
        mention(results.describe_game(spec, seconds, devices))
        multihost.from_first(lambda: this.open_log(begin))
        # A stop came before them.
        this.evaluate(begin, state)
        multihost.from_first(lambda: this.record(begin, state))
        return loop.fit(
            *(steps, state, constants, spec.game),
            begin=begin,
            per_dispatch=count,
            callbacks=callbacks,
            stop=stop,
        )
    finally:
        progress.close()


def reconstruct(
    this: Run,
    state: GameState | ReconstructionState,
    teacher: game.Teacher,
    devices: Sequence[jax.Device],
    stop: Any,
) -> tuple[ReconstructionState, int]:
    """The phase after the game, with everything that a run pauses for.

    Args:
      this: the run.
      state: that the game ended in, or of a checkpoint of the phase.
      teacher: P, on the devices.
      devices: that take part.
      stop: the phase ends as soon as it is true.

    Returns:
      The state, and the steps of the run so far.
    """
    spec, phase = this.assembly.spec, this.reconstruction
    assert phase is not None
    begin = phase.step_of(state)
    mention(f"{this.label}{results.describe_reconstruction(spec, len(phase.ends))}")
    progress = Progress(this.steps, begin)
    count = sharding.steps_per_dispatch(spec.steps_per_dispatch, devices)

    def tell(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        this.write_row(step, metrics)
        progress.update(step, metrics)

    pauses = schedule.reconstruction_pauses(spec, this.steps)
    callbacks = [
        At([*pauses, *phase.ends], tell, on_primary=True),
        At(pauses, this.save_if_due, on_primary=True),
    ]
    if multihost.several():
        callbacks.insert(0, At(pauses, lambda *_: stop.agree(multihost.largest)))
    multihost.from_first(lambda: this.open_log(begin))
    try:
        return phase.fit(
            state,
            teacher,
            spec.seed,
            errors=this.block_errors,
            per_dispatch=min(count, spec.log.every),
            callbacks=callbacks,
            stop=stop,
        )
    finally:
        progress.close()
