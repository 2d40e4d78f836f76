"""The main job: train Q by a configuration, and write the workdir."""

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
from adadfq_jax.runtime import allocator, files, multihost, remote, sharding
from adadfq_jax.runtime.progress import Progress, log, say
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import budget, build, events, loop, results, schedule
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.callbacks import At
from adadfq_jax.training.measurements import Measurements
from adadfq_jax.training.reconstruct import (
    Reconstruction,
    ReconstructionState,
    check_batch,
    check_memory,
    kept_bytes,
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
    """Train Q; resume an earlier start of the run if there is a checkpoint.

    Args:
      config: a ConfigDict, a mapping or a spec, see `configuration.resolved`.
      workdir: the folder. It gets config.json, identity.json, metrics.jsonl,
        checkpoints, quantized.safetensors, summary.json, then report/index.html and the
        files of `exports.export_files`. A finished run is not trained again. The folder
        may be on shared storage, see `runtime.remote`.
      stop: the request to stop, checked after every step, or at the pauses if there
        are several processes.
      command: the command that started this run, for the summary and the report.
      recipe: a recipe of the user's own; None takes the package's config.recipe.
      function: P with its variables; None reads the file config.teacher.path.

    Returns:
      The contents of summary.json.

    Raises:
      InputError: the configuration, P's file, the evaluation data or the workdir
        cannot be used.
      NumericalError: the run reached a number that is not finite; failed.json and the
        report say which. The next start removes failed.json and resumes at the last
        checkpoint.
      Stopped: a stop was requested.
      ExportError: an exported file does not compute what Q does; the quantized file is
        complete.
    """
    stop = StopRequest() if stop is None else stop
    if multihost.several():
        stop.agree(multihost.largest)
    with resolved(config, recipe) as spec:
        if spec.population:
            raise InputError(
                "config.population: this trains a single run; adadfq_jax.main trains"
                " a population"
            )
        prepare = functools.partial(_prepare, spec, function)
        return _run(multihost.together(prepare), workdir, stop, command)


class _Prepared(NamedTuple):
    """The parts of a run that are made before its workdir is opened.

    Attributes:
      assembly: the parts of the run.
      devices: the devices that take part.
      p_host: P's variables on the host.
      identity: everything that changes the numbers, see `spec.identity`.
    """

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
    exports.check(assembly)
    check_memory(assembly, devices)
    for note in [*build.notes(assembly), *exports.notes(spec)]:
        say(note)
    identity = assembly.identity(function.variables)
    return _Prepared(assembly, devices, function.variables, identity)


def _portable_settings(spec: RunSpec) -> dict[str, Any]:
    """Return the settings without paths, which may differ between machines."""
    values = spec.to_json()
    del values["teacher"]["path"]
    del values["eval"]["data_dir"], values["eval"]["classes"]
    return values


def _run(
    prepared: _Prepared, workdir: str | Path, stop: StopRequest, command: str
) -> dict[str, Any]:
    """Do all work in the workdir: train the rest, write report and exported files."""
    spec, function = prepared.assembly.spec, prepared.assembly.function
    alike = {**prepared.identity, "config": _portable_settings(spec)}
    multihost.require_equal(alike, "configuration or P")
    if multihost.several():
        sharding.meet(prepared.devices)
    with multihost.held_by_first(lambda: remote.opened(workdir)) as opened:
        place = opened or Workdir(Path(workdir).expanduser())
        summary = multihost.from_first(lambda: _finished(place.folder, prepared))
        measurements = None
        # A set that cannot be used is refused before a folder is made.
        if summary is None:
            measurements = multihost.together(
                lambda: Measurements(prepared.assembly, prepared.devices)
            )
            size = measurements.eval_set and measurements.eval_set.size
            multihost.require_equal(size, "evaluation set")

        def conclude(summary: dict[str, Any]) -> None:
            file = place.folder / folder.QUANTIZED_FILE
            try:
                if measurements is not None and spec.report.enabled:
                    say(place.with_name(run_page.attempt(place.folder, place.title)))
                exported = exports.export_files(spec, file, place.folder, function)
            except (
                ExportError,
                InputError,
            ):  # the quantized file is complete nevertheless
                say(place.with_name(results.table(summary, file, None)))
                raise
            finally:
                place.publish()
            say(place.with_name(results.table(summary, file, exported)))

        with multihost.held_by_first(
            lambda: folder.occupy(place.folder, prepared.identity)
        ):
            if measurements is not None:
                summary = _train(prepared, place, measurements, stop, command)
            assert summary is not None
            multihost.from_first(lambda: conclude(summary))
    return summary


def _finished(workdir: Path, prepared: _Prepared) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None; refuse another run's workdir."""
    with folder.explained(workdir):
        folder.check(workdir, prepared.identity)
        return folder.finished(workdir, prepared.assembly.spec.game.steps)


def make_recorder(
    assembly: Assembly,
    workdir: Path,
    measurements: Measurements,
    reconstruction: Reconstruction | None = None,
) -> Recorder | None:
    """Make the recorder of the report, or None if the report is disabled."""
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
    last = [spec.game.steps + 1] if spec.calibration.images else []
    if reconstruction is not None:
        last = [reconstruction.steps]
    return Recorder(workdir, subject, [*schedule.evaluation_steps(spec), *last])


def describe(spec: RunSpec, workdir: Path, command: str) -> None:
    """Write config.json, and the command into command.txt."""
    files.write_json(workdir / folder.CONFIG_FILE, spec.to_json())
    if command:
        files.write_text(workdir / folder.COMMAND_FILE, command + "\n")


def tell_of_teacher(spec: RunSpec, p_top1: float | None) -> None:
    """Print the accuracy of P, and a warning if it is far below the expected one."""
    log.info(results.describe_teacher(spec, p_top1))
    warning = None if p_top1 is None else results.warn_of_teacher(spec, p_top1)
    if warning:
        say(to_keys(warning))


def _begin(place: Workdir) -> None:
    """Claim the folder for this start, and remove the failure of an earlier start."""
    (place.folder / folder.FAILURE_FILE).unlink(missing_ok=True)
    place.claim()


def _leave_failed(spec: RunSpec, place: Workdir, failure: str) -> None:
    """Write why the numbers failed, and a report that shows what led to it."""
    try:
        folder.leave_failure(place.folder, failure)
        if spec.report.enabled:
            say(place.with_name(run_page.attempt(place.folder, place.title)))
        place.publish()
    except (InputError, OSError) as error:
        # The run must end with the error of its numbers, not with this one.
        log.warning(place.with_name(f"what the run came to is not kept: {error}"))


def _train(
    prepared: _Prepared,
    place: Workdir,
    measurements: Measurements,
    stop: StopRequest,
    command: str,
) -> dict[str, Any]:
    """Train the remaining steps, write Q's file and the summary, and return that."""
    assembly, devices = prepared.assembly, prepared.devices
    spec = assembly.spec
    multihost.from_first(lambda: _begin(place))
    if spec.quant.budget:
        bits = multihost.from_first(lambda: _chosen_bits(prepared, place))
        assembly = build.assemble(spec, assembly.batch_size, assembly.function, bits)
        words = assembly.info.bits_in_words(assembly.graph)
        log.info(f"bits per layer for {spec.quant.budget}: {words or 'as usual'}")
        measurements.measure_with(assembly)
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
        elif step == spec.game.steps and not stop:
            step = this.steps  # a calibration follows, when the file is written
    # All processes raise it, since their numbers are the same.
    except NumericalError as error:
        failure = to_keys(str(error))
        multihost.from_first(lambda: _leave_failed(spec, place, failure))
        raise
    if step < this.steps:
        multihost.from_first(lambda: this.save(step, state))
        # `save` publishes nothing if the step was saved before.
        multihost.from_first(place.publish)
        kept = f"saved at step {step}" if step else "nothing to save yet"
        raise Stopped(f"{kept}; repeat the command to resume")
    size, variables = multihost.from_first(lambda: this.write_network(state))
    this.measure_last(variables)
    multihost.from_first(lambda: this.record_last(state, variables))
    return multihost.from_first(lambda: this.summarise(size, command, devices))


def _chosen_bits(prepared: _Prepared, place: Workdir) -> dict[str, int]:
    """Return the bits per layer that fit the budget, chosen once for a run."""
    file, assembly = place.folder / folder.LAYER_BITS_FILE, prepared.assembly
    if not file.exists():
        function = assembly.function._replace(variables=prepared.p_host)
        try:
            chosen = budget.choose(assembly.spec, assembly.batch_size, function)
        except InputError:  # nothing is trained yet: the folder may have another budget
            (place.folder / folder.IDENTITY_FILE).unlink()
            place.publish()
            raise
        files.write_json(file, chosen)
    return folder.read_json(file)


def _resume(
    this: Run, state: GameState, devices: Sequence[jax.Device]
) -> tuple[Any, int]:
    """Restore the newest undamaged checkpoint; without one, return `state` and step 0.

    Returns:
      The state on the devices, and the number of steps taken.
    """

    def find():
        found, sentences = this.find(state)
        for sentence in sentences:
            log.warning(this.place.with_name(sentence))
        return found

    found = multihost.from_first(find)
    if found is None:
        # Different machines could initialise G differently.
        if multihost.several():
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
    """Run the loop of the game with the run's callbacks."""
    spec = this.assembly.spec
    key = sharding.replicate(jax.random.key(spec.seed), devices)
    constants = (teacher, key)
    count = sharding.steps_per_dispatch(spec.steps_per_dispatch, devices)
    count = min(count, spec.log.every)
    total = this.steps if this.reconstruction else spec.game.steps
    progress = Progress(total, begin, spec.game.steps)

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
        log.info(results.describe_game(this.assembly, seconds, devices))
        multihost.from_first(lambda: this.open_log(begin))
        # An earlier start may have stopped at this step before it did these.
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
    """Run the reconstruction, the phase after the game, with the run's callbacks.

    Args:
      this: the run.
      state: the state at the end of the game, or of a checkpoint of the phase.
      teacher: P, on the devices.
      devices: the devices that take part.
      stop: the phase ends as soon as this is true.

    Returns:
      The state, and the number of steps of the run so far.
    """
    spec, phase = this.assembly.spec, this.reconstruction
    assert phase is not None
    begin = phase.step_of(state)
    kept = kept_bytes(this.assembly)
    line = results.describe_reconstruction(spec, len(phase.ends), kept)
    log.info(f"{this.label}{line}")
    allocator.return_freed_memory()  # the images may need what the game needed
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
