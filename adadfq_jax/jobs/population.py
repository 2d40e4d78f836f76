"""The main job of a population: plays all members' games, each into its own workdir."""

import contextlib
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from adadfq_jax import config as base
from adadfq_jax.errors import ExportError, InputError, NumericalError, Stopped
from adadfq_jax.jobs import members, outcome
from adadfq_jax.report import population_table, run_page
from adadfq_jax.report.population_table import Row
from adadfq_jax.runtime import files, multihost, remote, sharding
from adadfq_jax.runtime.progress import Progress, mention, say
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import build, events, metrics, population, results, schedule
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.checkpoints import Checkpoints
from adadfq_jax.training.sitting import Sitting, compile_and_time


class Game(NamedTuple):
    """A member's game. config: as if it were played alone. workdir: its own."""

    name: str
    values: dict[str, Any]
    config: ConfigDict
    workdir: Path

    @property
    def failure(self) -> str:
        """Why its numbers failed, '' where they did not."""
        return folder.failure_of(self.workdir)

    @property
    def summary(self) -> dict[str, Any] | None:
        """Of the finished game, None where it is not finished."""
        return folder.finished(self.workdir, self.config.game.steps)


class _Party:
    """One start of a population: all members from one step to the end, or to a stop.

    Every member has its place in the compiled step. Those that are finished or have
    failed play on in theirs from the start, to no end, so that the others' numbers
    stay those of the same program.
    """

    def __init__(
        self,
        games: Sequence[Game],
        layout: population.Layout,
        p_host: Any,
        measurements: outcome.Measurements,
        stop: StopRequest,
        place: Workdir,
    ):
        self.games, self.layout, self.stop, self.place = games, layout, stop, place
        self.config = games[0].config
        batch_size = self.config.game.batch_size
        self.p_variables = sharding.replicate(p_host, layout.devices)
        self.sittings = []
        for game in games:
            own = copy.copy(measurements)  # the compiled evaluation is shared
            own.history = []
            sitting = Sitting(
                game.config,
                Workdir(game.workdir),
                p_host,
                layout.devices,
                batch_size,
                own,
                stop,
            )
            sitting.label = f"{game.name}: "
            sitting.p_variables = self.p_variables
            sitting.state = sharding.fetch(sitting.state)
            self.sittings.append(sitting)
        self.steps = population.make_steps(
            lambda values: build.game_parts(self.config, values=values),
            build.make_draw(self.config, batch_size),
            layout,
        )
        self.alive = [
            i for i, game in enumerate(games) if not (game.failure or game.summary)
        ]
        self.begin = 0

    def resume(self) -> None:
        """Takes the members to the newest step that all of them have saved."""
        self._drop_what_others_lack()
        for i in self.alive:
            sitting = self.sittings[i]
            sitting.resume()
            sitting.state = sharding.fetch(sitting.state)
            self.begin = sitting.begin

    def _drop_what_others_lack(self) -> None:
        """A kill between two members' saves leaves one ahead of the other."""
        while True:
            newest = {}
            for i in self.alive:
                game, like = self.games[i], self.sittings[i].state
                checkpoints = self._checkpoints(game)
                found, _ = checkpoints.restore_newest(like, read_only=True)
                newest[i] = found.step if found else 0
            if len(set(newest.values())) < 2:
                return
            for i in self.alive:
                self._checkpoints(self.games[i]).drop_after(min(newest.values()))

    def _checkpoints(self, game: Game) -> Checkpoints:
        return Checkpoints(
            game.workdir / folder.CHECKPOINTS, game.config.checkpoint.keep
        )

    def open(self, command: str) -> None:
        """Writes what a run's folder begins with, and measures P once."""
        for i in self.alive:
            game = self.games[i]
            config = base.recorded(game.config)
            files.write_json(game.workdir / folder.CONFIG_FILE, config)
            if command:
                files.write_text(game.workdir / folder.COMMAND_FILE, command + "\n")
        p_top1 = self.sittings[0].measurements.p_top1(self.p_variables)
        for sitting in self.sittings:
            sitting.p_top1 = p_top1
        mention(results.describe_teacher(self.config, p_top1))
        warning = (
            None if p_top1 is None else results.warn_of_teacher(self.config, p_top1)
        )
        if warning:
            say(warning)

    def play(self) -> None:
        """Plays the steps that are left; see `Sitting.play`.

        A member whose numbers fail is out; the others play on.

        Raises:
          InputError: a workdir cannot be written any more.
          Stopped: it was asked to; all members are saved.
        """
        config, total, devices = (
            self.config,
            self.config.game.steps,
            self.layout.devices,
        )
        own = population.member_arguments([game.config for game in self.games])
        constants = (self.p_variables, self.layout.split(own))
        states: Any = self.layout.split([sitting.state for sitting in self.sittings])
        count = sharding.steps_per_dispatch(config.steps_per_dispatch, devices)
        count = min(count, config.log.every)
        seconds = compile_and_time(
            self.steps,
            states,
            constants,
            config,
            begin=self.begin,
            count=count,
            stop=self.stop,
        )
        mention(f"{len(self.games)} members, {self.layout.description}")
        mention(results.describe_game(config, seconds, devices))
        for i in self.alive:
            self.sittings[i].open_logs()
        progress = Progress(total, self.begin)
        self._pause(states, self.begin)
        step = self.begin
        try:
            while step < total and self.alive:
                if self.stop:
                    self._stop(states, step)
                begin, since = step, time.perf_counter()
                phase = schedule.phase_at(step, config.game)
                end, pending = schedule.next_pause(step, config), []
                # As in a game alone: several steps in a dispatch stay whole.
                while step < end and not (self.stop and count == 1):
                    each = count if end - step >= count else 1
                    states, measured = self.steps(phase, each)(states, *constants)
                    pending.append((each, measured))
                    step += each
                if not pending:
                    continue
                means = self._member_means(pending, begin)
                rate = (step - begin) / (time.perf_counter() - since)
                for i, own_means in means.items():
                    own_means["steps_per_second"] = rate
                    row = {"step": step, "phase": phase.value, **own_means}
                    self.sittings[i].write(row)
                if means:
                    progress.update(step, _mean_of(list(means.values())))
                self._pause(states, step)
        finally:
            progress.close()
        for i, state in self._alive_states(states):
            self.sittings[i].state = state

    def _member_means(
        self, pending: Sequence[tuple[int, Any]], begin: int
    ) -> dict[int, dict[str, float]]:
        """Each member's means over an interval; without those that fail in it."""
        joined = [(count, self.layout.join(measured)) for count, measured in pending]
        found = {}
        for i in list(self.alive):
            own = [(count, by_member[i]) for count, by_member in joined]
            try:
                found[i] = metrics.interval_means(own, begin)
            except NumericalError as error:
                self._fail(i, str(error))
        return found

    def _fail(self, i: int, failure: str) -> None:
        """Takes a member out, with what happened in its folder."""
        game = self.games[i]
        folder.leave_failure(game.workdir, failure)
        self.sittings[i].events.close()
        self.alive.remove(i)
        say(f"WARNING: member {game.name} failed: {failure}")

    def _alive_states(self, states: Any) -> list[tuple[int, Any]]:
        joined = self.layout.join(states)
        return [(i, joined[i]) for i in self.alive]

    def _pause(self, states: Any, step: int) -> None:
        """Measures, records and saves the members, one after the other."""
        if not self.alive or not self._is_due(step):
            return
        for i, state in self._alive_states(states):
            sitting = self.sittings[i]
            sitting.state = sharding.replicate(state, self.layout.devices)
            sitting.evaluate_and_save(step)
            sitting.state = state  # the devices' room is for the game
        self.place.publish()

    def _is_due(self, step: int) -> bool:
        """Whether there is anything to do, so that the states are fetched."""
        config, recorder = self.config, self.sittings[self.alive[0]].recorder
        every = config.checkpoint.every
        return bool(
            step == config.game.steps
            or (every and step % every == 0)
            or step in schedule.evaluation_steps(config)
            or (recorder and recorder.is_due(step))
        )

    def _stop(self, states: Any, step: int) -> None:
        for i, state in self._alive_states(states):
            self.sittings[i].state = state
            self.sittings[i].save(step)
        self.place.publish()
        kept = f"all saved at step {step}" if step else "nothing to save yet"
        raise Stopped(f"{kept}; repeat the command to resume")

    def finish(self, command: str) -> None:
        """Writes the files of the members that have played to the end."""
        for i in self.alive:
            sitting = self.sittings[i]
            sitting.state = sharding.replicate(sitting.state, self.layout.devices)
            sitting.finish(command)


def _mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The members' mean of each number that all of them have."""
    names = set.intersection(*(set(row) for row in rows))
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _make_games(config: ConfigDict, workdir: Path) -> list[Game]:
    """The members' games; P's network may still be to be told from its file."""
    return [
        Game(
            member.name,
            member.values,
            members.configure(config, member),
            workdir / member.name,
        )
        for member in members.parse(config.population)
    ]


def run(
    config: ConfigDict,
    workdir: str | Path,
    stop: StopRequest | None = None,
    *,
    command: str = "",
) -> list[Row]:
    """Plays the games of `config.population`, from where an earlier start ended.

    Args:
      config: see `config.default_config`.
      workdir: gets a workdir for each member, named after it, as `train.run` leaves
        one; then population.json and compare.html, of all of them. It may be on
        shared storage, see `mirror`.
      stop: looked at after every step.
      command: that asks for this, for the summaries and reports.

    Returns:
      The rows of population.json.

    Raises:
      InputError: the configuration, P's file, the evaluation data or a workdir cannot
        be used.
      NumericalError: some members' numbers failed; the others have finished.
      Stopped: `stop` asked for it.
      ExportError: a member's exported file does not compute what its Q does; all
        members have finished.
    """
    if multihost.several():
        raise InputError(
            "config.population: its members tell each other nothing; start it in each"
            " process alone, with members of its own, and compare with --mode=compare"
        )
    members.parse(config.population)  # refused before the workdir is looked at
    request = StopRequest() if stop is None else stop
    with remote.opened(workdir) as place:
        games = _make_games(config, place.folder)
        first = games[0].config
        jax.config.update("jax_default_matmul_precision", first.matmul_precision)
        layout = population.choose_layout(
            len(games), first.devices, first.members_at_once
        )
        if first.log.tensorboard:
            events.need_writer()
        p_host = build.load_teacher(first)
        for game in games:
            game.config.teacher.model = first.teacher.model
        identities = [
            build.identity(game.config, p_host, first.game.batch_size) for game in games
        ]
        whole = {**identities[0], "population": [game.name for game in games]}
        with contextlib.ExitStack() as held:
            held.enter_context(folder.occupy(place.folder, whole))
            for game, identity in zip(games, identities, strict=True):
                held.enter_context(folder.occupy(game.workdir, identity))
            place.claim()
            fresh = [g.name for g in games if not (g.failure or g.summary)]
            if fresh:
                measurements = outcome.Measurements(first, layout.devices)
                party = _Party(games, layout, p_host, measurements, request, place)
                party.resume()
                party.open(command)
                party.play()
                party.finish(command)
            return _export_and_tell(games, fresh, place)


def _export_and_tell(
    games: Sequence[Game], fresh: Sequence[str], place: Workdir
) -> list[Row]:
    """Members' exported files and reports, and the table over all of them."""
    not_exported = []
    rows = []
    for game in games:
        failure, summary = game.failure, game.summary
        rows.append(population_table.make_row(game.name, game.values, summary, failure))
        if summary:
            file = game.workdir / folder.QUANTIZED_FILE
            try:
                outcome.export_files(game.config, file, game.workdir)
            except ExportError as error:
                not_exported.append(f"member {game.name}: {error}")
        if game.name in fresh and game.config.report.enabled:
            say(place.told(run_page.attempt(game.workdir)))
    told = population_table.write(rows, [game.workdir for game in games], place.folder)
    place.publish()
    say(place.told(told))
    failed = [f"member {row.name}: {row.failure}" for row in rows if row.failure]
    if failed:
        finished = len(games) - len(failed)
        raise NumericalError(f"{'; '.join(failed)} ({finished} others have finished)")
    if not_exported:
        raise ExportError("; ".join(not_exported))
    return rows
