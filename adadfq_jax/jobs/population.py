"""The main job for a population: several runs at once, each in its own workdir."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adadfq_jax.errors import ExportError, InputError, NumericalError, Stopped
from adadfq_jax.game import GameState
from adadfq_jax.jobs import exports, members, train
from adadfq_jax.jobs.configuration import load_teacher, resolved, to_keys
from adadfq_jax.recipes import Recipe
from adadfq_jax.report import population_table, run_page
from adadfq_jax.report.population_table import Row
from adadfq_jax.runtime import invocation, multihost, remote, sharding
from adadfq_jax.runtime.progress import Progress, log, say
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import build, events, loop, population, results, schedule
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.callbacks import At
from adadfq_jax.training.checkpoints import Checkpoints
from adadfq_jax.training.measurements import Measurements
from adadfq_jax.training.metrics import interval_means
from adadfq_jax.training.reconstruct import (
    ReconstructionState,
    check_batch,
    check_memory,
    make_reconstruction,
)
from adadfq_jax.training.run import Run
from adadfq_jax.training.spec import RunSpec


class Game(NamedTuple):
    """A member's run.

    Attributes:
      name: name of the member.
      values: its values of the keys in which members differ.
      spec: the spec of its run, as if it were trained alone.
      workdir: its own folder.
    """

    name: str
    values: dict[str, Any]
    spec: RunSpec
    workdir: Path

    @property
    def failure(self) -> str:
        """Why its numbers failed, or '' if they did not."""
        return folder.failure_of(self.workdir)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The contents of summary.json, or None if the run is not finished."""
        return folder.finished(self.workdir, self.spec.game.steps)


class _Members:
    """The members of a population during training; true once the loop has to stop.

    Every member has its place in the compiled step. A member that is finished or has
    failed is trained there, too, and its results are ignored. So the program, and with
    it the numbers of the other members, stay the same.
    """

    def __init__(
        self,
        games: Sequence[Game],
        assemblies: Sequence[Assembly],
        layout: population.Layout,
        p_host: Any,
        measurements: Measurements,
        stop: StopRequest,
        place: Workdir,
    ):
        self._games, self._layout, self._stop, self._place = games, layout, stop, place
        self._spec, self._assembly = games[0].spec, assemblies[0]
        self.teacher = sharding.replicate(
            self._assembly.teacher(p_host), layout.devices
        )
        self._runs, self._states = [], []
        # States of the members that an earlier start has trained beyond the game.
        self._ended: dict[int, ReconstructionState] = {}
        reconstruction = make_reconstruction(assemblies[0], layout.devices)
        for each, assembly in zip(games, assemblies, strict=True):
            own = copy.copy(measurements)  # shares the compiled evaluation
            own.history = []
            recorder = train.make_recorder(assembly, each.workdir, own, reconstruction)
            self._runs.append(
                Run(
                    assembly,
                    Workdir(each.workdir),
                    self.teacher,
                    own,
                    reconstruction=reconstruction,
                    recorder=recorder,
                    stop=stop,
                    label=f"{each.name}: ",
                )
            )
            first = build.initial_state(assembly, p_host)
            self._states.append(sharding.fetch(first))
        self._alive = [
            i for i, each in enumerate(games) if not (each.failure or each.summary)
        ]
        self._begin = 0

    def __bool__(self) -> bool:
        return bool(self._stop) or not self._alive

    def resume(self) -> None:
        """Restore the members at the newest step that all of them have saved."""
        self._drop_what_others_lack()
        for i in self._alive:
            run = self._runs[i]
            found, sentences = run.find(self._states[i])
            for sentence in sentences:
                log.warning(run.place.with_name(sentence))
            if found is not None:
                run.go_on_from(found)
                self._begin = min(found.step, self._spec.game.steps)
                state = found.state
                if isinstance(state, ReconstructionState):
                    self._ended[i], state = state, state.game
                self._states[i] = state

    def _drop_what_others_lack(self) -> None:
        """Remove checkpoints of steps that not all members have saved.

        They exist if the process was killed after some members were saved.
        """
        while True:
            newest = {}
            for i in self._alive:
                checkpoints = self._checkpoints(self._games[i])
                like = self._runs[i].like(self._states[i])
                found, _ = checkpoints.restore_newest(like, read_only=True)
                newest[i] = min(found.step, self._spec.game.steps) if found else 0
            if len(set(newest.values())) < 2:
                return
            for i in self._alive:
                self._checkpoints(self._games[i]).drop_after(min(newest.values()))

    def _checkpoints(self, each: Game) -> Checkpoints:
        keep = each.spec.checkpoint.keep
        return Checkpoints(each.workdir / folder.CHECKPOINTS, keep)

    def open(self, command: str) -> None:
        """Write the first files of each member's folder, and measure P once."""
        for i in self._alive:
            train.describe(self._games[i].spec, self._games[i].workdir, command)
        p_top1 = self._runs[0].measurements.p_top1(self.teacher)
        for run in self._runs:
            run.p_top1 = p_top1
        train.tell_of_teacher(self._spec, p_top1)

    def fit(self) -> None:
        """Train the remaining steps of the game, see `loop.fit`.

        If a member reaches a non-finite number, the others go on without it.

        Raises:
          InputError: a workdir can no longer be written.
          Stopped: a stop was requested; all members are saved.
        """
        spec, layout, devices = self._spec, self._layout, self._layout.devices
        steps = population.make_steps(
            lambda values: self._assembly.parts_with(values=values),
            self._assembly.draw,
            layout,
        )
        own = population.member_arguments([each.spec for each in self._games])
        constants = (self.teacher, layout.split(own))
        states: Any = layout.split(self._states)
        count = sharding.steps_per_dispatch(spec.steps_per_dispatch, devices)
        count = min(count, spec.log.every)
        pauses = schedule.pauses(spec)
        seconds = loop.expected_seconds(
            *(steps, states, constants, spec.game, pauses),
            begin=self._begin,
            per_dispatch=count,
            stop=self,
        )
        log.info(f"{len(self._games)} members, {layout.description}")
        log.info(results.describe_game(self._assembly, seconds, devices))
        for i in self._alive:
            # The log of a member in `_ended` already goes on beyond the game.
            if i not in self._ended:
                self._runs[i].open_log(self._begin)
        progress = Progress(spec.game.steps, self._begin)

        def tell(step: int, states: Any, metrics: Mapping[str, Any]) -> None:
            shared = {name: metrics[name] for name in ("phase", "steps_per_second")}
            for i, means in metrics["members"].items():
                self._runs[i].write_row(step, {**means, **shared})
            if metrics["members"]:
                means = _mean_of(list(metrics["members"].values()))
                progress.update(step, {**means, **shared})

        try:
            self._pause(self._begin, states)
            states, step = loop.fit(
                *(steps, states, constants, spec.game),
                begin=self._begin,
                per_dispatch=count,
                reduce=self._member_means,
                callbacks=[At(pauses, tell), At(pauses, self._pause)],
                stop=self,
            )
        finally:
            progress.close()
        for i, state in self._alive_states(states):
            self._states[i] = state
        if step < spec.game.steps and self._alive:
            self._save_all(step)

    def _member_means(
        self, pending: Sequence[tuple[int, Any]], begin: int
    ) -> dict[str, dict[int, dict[str, float]]]:
        """Return each member's means over an interval, except members that fail in it.

        Those are removed from the population.
        """
        joined = [(count, self._layout.join(measured)) for count, measured in pending]
        found = {}
        for i in list(self._alive):
            own = [(count, by_member[i]) for count, by_member in joined]
            try:
                found[i] = interval_means(own, begin)
            except NumericalError as error:
                self._fail(i, to_keys(str(error)))
        return {"members": found}

    def _fail(self, i: int, failure: str) -> None:
        """Remove a member from training, and write the failure into its folder."""
        each = self._games[i]
        folder.leave_failure(each.workdir, failure)
        self._runs[i].close()
        self._alive.remove(i)
        log.warning(f"member {each.name} failed: {failure}")

    def _alive_states(self, states: Any) -> list[tuple[int, Any]]:
        joined = self._layout.join(states)
        return [(i, joined[i]) for i in self._alive]

    def _pause(self, step: int, states: Any, _: Any = None) -> None:
        """Measure, record and save the members, one after the other."""
        if not self._alive or not self._runs[self._alive[0]].is_due(step):
            return
        for i, host_state in self._alive_states(states):
            run = self._runs[i]
            state: GameState = sharding.replicate(host_state, self._layout.devices)
            run.evaluate(step, state)
            run.record(step, state)
            run.save_if_due(step, state)
        self._place.publish()

    def _save_all(self, step: int) -> None:
        for i in self._alive:
            self._runs[i].save(step, self._states[i])
        self._place.publish()
        kept = f"all saved at step {step}" if step else "nothing to save yet"
        raise Stopped(f"{kept}; repeat the command to resume")

    def finish(self, command: str) -> None:
        """Reconstruct the members that have finished the game, and write their files.

        The members follow one another; each one's batch is split over all devices.

        Raises:
          Stopped: a stop was requested; all members are saved.
        """
        for i in list(self._alive):
            run, devices = self._runs[i], self._layout.devices
            state = sharding.replicate(self._ended.get(i, self._states[i]), devices)
            if run.reconstruction is not None:
                try:
                    state, step = train.reconstruct(
                        run, state, self.teacher, devices, self._stop
                    )
                except NumericalError as error:
                    self._fail(i, to_keys(str(error)))
                    continue
                if step < run.steps:
                    run.save(step, state)
                    self._place.publish()
                    kept = f"{run.label}saved at step {step}, the others before"
                    raise Stopped(f"{kept}; repeat the command to resume")
            size, variables = run.write_network(state)
            run.measure_last(variables)
            run.record_last(state, variables)
            run.summarise(size, command, devices)
            self._place.publish()


def _mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean over the members of each number that all of them have."""
    names = set.intersection(*(set(row) for row in rows))
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _make_games(spec: RunSpec, workdir: Path) -> list[Game]:
    """Return the runs of the members of `spec.population`."""
    return [
        Game(
            member.name,
            member.values,
            members.configure(spec, member),
            workdir / member.name,
        )
        for member in members.parse(spec.population)
    ]


def run(
    config: Any,
    workdir: str | Path,
    stop: StopRequest | None = None,
    *,
    command: str = "",
    recipe: Recipe | None = None,
) -> list[Row]:
    """Train the members of `config.population`; resume them if there are checkpoints.

    Args:
      config: see `train.run`.
      workdir: the folder. It gets a workdir for each member, named after it, with the
        files that `train.run` writes, then population.json and compare.html for all
        members. It may be on shared storage, see `runtime.remote`.
      stop: the request to stop, checked after every step.
      command: the command that started this, for the summaries and reports.
      recipe: a recipe of the user's own; None takes the package's config.recipe.

    Returns:
      The rows of population.json.

    Raises:
      InputError: the configuration, P's file, the evaluation data or a workdir cannot
        be used.
      NumericalError: some members reached non-finite numbers; the others have finished.
      Stopped: a stop was requested.
      ExportError: a member's exported file does not compute what its Q does; all
        members have finished.
    """
    if multihost.several():
        raise InputError(
            "config.population: a population cannot be spread over processes; start"
            " each process by itself, with members of its own, and compare them with"
            f" {invocation.mode('compare')}"
        )
    request = StopRequest() if stop is None else stop
    with resolved(config, recipe) as spec:
        if spec.quant.budget:
            raise InputError(
                "quant.budget: a population does not choose bits; choose them in a run"
                " of one game, or give quant.layer_bits"
            )
        members.parse(spec.population)  # an error comes before the workdir is opened
        with remote.opened(workdir) as place:
            return _run(spec, place, request, command)


def _run(spec: RunSpec, place: Workdir, stop: StopRequest, command: str) -> list[Row]:
    count = len(_make_games(spec, place.folder))  # an error comes before P is read
    layout = population.choose_layout(count, spec.devices, spec.members_at_once)
    check_batch(spec, layout.devices)
    if spec.log.tensorboard:
        events.need_writer()
    function, spec = load_teacher(spec)
    p_host = function.variables
    games = _make_games(spec, place.folder)
    assemblies = [
        build.assemble(each.spec, each.spec.game.batch_size, function) for each in games
    ]
    exports.check(assemblies[0])
    for assembly in assemblies:
        check_memory(assembly, layout.devices)
    for note in [*build.notes(assemblies[0]), *exports.notes(spec)]:
        say(note)
    identities = [assembly.identity(p_host) for assembly in assemblies]
    whole = {**identities[0], "population": [each.name for each in games]}
    with contextlib.ExitStack() as held:
        held.enter_context(folder.occupy(place.folder, whole))
        for each, identity in zip(games, identities, strict=True):
            held.enter_context(folder.occupy(each.workdir, identity))
        place.claim()
        fresh = [g.name for g in games if not (g.failure or g.summary)]
        if fresh:
            measurements = Measurements(assemblies[0], layout.devices)
            training = _Members(
                games, assemblies, layout, p_host, measurements, stop, place
            )
            training.resume()
            training.open(command)
            training.fit()
            training.finish(command)
        return _export_and_tell(games, fresh, place)


def _export_and_tell(
    games: Sequence[Game], fresh: Sequence[str], place: Workdir
) -> list[Row]:
    """Write the members' exported files and reports, and the table of all members."""
    not_exported = []
    kind: type[Exception] = InputError
    rows = []
    for each in games:
        failure, summary = each.failure, each.summary
        rows.append(population_table.make_row(each.name, each.values, summary, failure))
        if summary:
            file = each.workdir / folder.QUANTIZED_FILE
            try:
                exports.export_files(each.spec, file, each.workdir)
            except (ExportError, InputError) as error:
                not_exported.append(f"member {each.name}: {error}")
                if isinstance(error, ExportError):
                    kind = ExportError
        if each.name in fresh and each.spec.report.enabled:
            say(place.with_name(run_page.attempt(each.workdir)))
    table = population_table.write(rows, [each.workdir for each in games], place.folder)
    place.publish()
    say(place.with_name(table))
    failed = [f"member {row.name}: {row.failure}" for row in rows if row.failure]
    if failed:
        finished = len(games) - len(failed)
        raise NumericalError(f"{'; '.join(failed)} ({finished} others have finished)")
    if not_exported:
        raise kind("; ".join(not_exported))
    return rows
