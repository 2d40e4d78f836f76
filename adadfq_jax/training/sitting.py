"""One start of a run: from its newest checkpoint to its end, or to a stop."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from adadfq_jax import game
from adadfq_jax.deploy import quantized_file
from adadfq_jax.errors import Stopped
from adadfq_jax.game import GameState
from adadfq_jax.jobs import outcome
from adadfq_jax.report.record import Recorder, Subject
from adadfq_jax.runtime import files, multihost, sharding
from adadfq_jax.runtime.progress import Progress, mention, say
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import build, events, results
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.build import Steps
from adadfq_jax.training.checkpoints import Checkpoint, Checkpoints
from adadfq_jax.training.events import Events
from adadfq_jax.training.metrics import MetricsLog, interval_means
from adadfq_jax.training.schedule import (
    evaluation_steps,
    next_pause,
    phase_at,
    phase_ends,
)


def compile_and_time(
    steps: Steps,
    state: GameState,
    constants,
    config: ConfigDict,
    *,
    begin: int,
    count: int,
    stop: StopRequest,
) -> float:
    """Compiles the phases that will be played from `begin`; the expected seconds.

    Each is played twice on a throw-away copy of the state: once to compile, once
    to time it.

    Args:
      steps: from `build.build_game`.
      state: at `begin`; it is left as it is.
      constants: P's variables and the key.
      config: of the run.
      begin: steps that have been played.
      count: steps in a dispatch.
      stop: nothing more is compiled after it.
    """
    seconds = 0.0
    for end in phase_ends(config.game):
        if end <= begin or stop:
            continue
        # A phase shorter than a dispatch is played step by step.
        each = count if next_pause(begin, config) - begin >= count else 1
        step = steps(phase_at(begin, config.game), each)
        copy = jax.tree.map(lambda x: x.copy(), state)
        copy, _ = jax.block_until_ready(step(copy, *constants))
        started = time.perf_counter()
        jax.block_until_ready(step(copy, *constants))
        seconds += (end - begin) * (time.perf_counter() - started) / each
        begin = end
    return seconds


def _make_recorder(
    config: ConfigDict,
    workdir: Path,
    batch_size: int,
    measurements: outcome.Measurements,
) -> Recorder | None:
    """What records for the report, or None where that is disabled."""
    if not config.report.enabled:
        return None
    parts, p = build.game_parts(config), config.teacher
    subject = Subject(
        parts.networks,
        parts.q_options,
        num_classes=p.num_classes,
        seed=config.seed,
        batch_size=batch_size,
        mean=tuple(p.mean),
        std=tuple(p.std),
        eval_set=measurements.eval_set,
    )
    return Recorder(workdir, subject, evaluation_steps(config))


def agree(stop: StopRequest) -> None:
    """Makes a stop that one process was asked for one of all of them."""
    if multihost.several():
        stop.agree(multihost.largest)


class Sitting:
    """One start of a run: from its newest checkpoint to its end, or to a stop.

    Every process has one; process 0's alone touches the workdir.

    label: what its lines on the terminal begin with.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        p_host: Any,
        devices: Sequence[jax.Device],
        batch_size: int,
        measurements: outcome.Measurements,
        stop: StopRequest,
    ):
        self.config, self.stop = config, stop
        self.workdir, self.folder = workdir, workdir.folder
        self.measurements, self.devices = measurements, devices
        self.started, self.earlier_seconds = time.time(), 0.0
        self.p_host = p_host
        self.top1_on: dict[str, list] = {}  # histories by evaluation set
        self.p_variables = sharding.replicate(p_host, devices)
        self.checkpoints = Checkpoints(
            self.folder / folder.CHECKPOINTS, config.checkpoint.keep
        )
        self.saved = self.begin = 0
        self.p_top1: float | None = None
        self.label = ""
        self.log: MetricsLog | None = None
        self.events = Events(None)
        self.recorder = _make_recorder(config, self.folder, batch_size, measurements)
        self.steps, self.state = build.build_game(config, p_host, devices, batch_size)
        self._quantize = jax.jit(
            functools.partial(
                game.q_variables, options=build.game_parts(config).q_options
            )
        )

    def resume(self) -> None:
        """Goes to the newest whole checkpoint, if there is one.

        Raises:
          InputError: it lies beyond the steps that are asked for.
        """
        found = multihost.from_first(self._restore)
        if found is None:
            if multihost.several():  # machines of two kinds could have two Gs
                state = multihost.from_first(lambda: sharding.fetch(self.state))
                self.state = sharding.replicate(state, self.devices)
            return
        self.state = sharding.replicate(found.state, self.devices)
        folder.refuse_fewer(self.folder, found.step, self.config.game.steps)
        self.begin = self.saved = found.step
        self.earlier_seconds = found.record["seconds"]
        self.top1_on = found.record["top1_on"]
        history = self.top1_on.get(self.measurements.evaluated_on, [])
        self.measurements.history = [(step, top1) for step, top1 in history]
        mention(
            f"{self.label}resuming at step {self.begin} of {self.config.game.steps}"
        )

    def _restore(self) -> Checkpoint | None:
        found, sentences = self.checkpoints.restore_newest(self.state)
        for sentence in sentences:
            say(f"WARNING: {self.workdir.told(sentence)}")
        if self.recorder:
            self.recorder.resume(0 if found is None else found.step)
        return found

    @property
    def seconds(self) -> float:
        """Of the whole job so far, earlier sittings included up to their last save."""
        return self.earlier_seconds + time.time() - self.started

    def play(self) -> None:
        """Plays the steps that are left, pausing to log, evaluate and save.

        The host waits for the device at these pauses only.

        Raises:
          InputError: the workdir cannot be written any more.
          NumericalError: a number is not finite.
          Stopped: it was asked to; the state is saved.
        """
        config, total = self.config, self.config.game.steps
        key = sharding.replicate(jax.random.key(config.seed), self.devices)
        constants = (self.p_variables, key)
        count = sharding.steps_per_dispatch(config.steps_per_dispatch, self.devices)
        count = min(count, config.log.every)
        seconds = compile_and_time(
            self.steps,
            self.state,
            constants,
            config,
            begin=self.begin,
            count=count,
            stop=self.stop,
        )
        mention(results.describe_game(config, seconds, self.devices))
        multihost.from_first(self.open_logs)
        progress = Progress(total, self.begin)
        # A stop came before them.
        self._evaluate_if_due(self.begin)
        multihost.from_first(lambda: self._record_if_due(self.begin))
        step = self.begin
        try:
            while step < total:
                if self.stop:
                    self._stop(step)
                begin, since = step, time.perf_counter()
                phase, end = phase_at(step, config.game), next_pause(step, config)
                pending = []
                # Several steps in a dispatch stay whole, so that a resumed run is
                # dispatched in the same pieces.
                while step < end and not (self.stop and count == 1):
                    each = count if end - step >= count else 1
                    self.state, metrics = self.steps(phase, each)(
                        self.state, *constants
                    )
                    pending.append((each, metrics))
                    step += each
                if not pending:
                    continue
                means = interval_means(pending, begin)
                means["steps_per_second"] = (step - begin) / (
                    time.perf_counter() - since
                )
                agree(self.stop)
                row = {"step": step, "phase": phase.value, **means}
                multihost.from_first(functools.partial(self._tell, row, progress))
                self.evaluate_and_save(step)
        finally:
            progress.close()

    def open_logs(self) -> None:
        """Opens the log, and TensorBoard's where that is wanted."""
        self.log = MetricsLog(self.folder / folder.METRICS_FILE, self.begin)
        if self.config.log.tensorboard:
            self.events = Events(self.folder / events.FOLDER, self.begin)

    def write(self, row: dict[str, Any]) -> dict[str, float]:
        """Logs an interval; its means alone."""
        assert self.log is not None
        self.log.write(row)
        means = {k: v for k, v in row.items() if k not in ("step", "phase")}
        self.events.write(row["step"], means)
        return means

    def _tell(self, row: dict[str, Any], progress: Progress) -> None:
        progress.update(row["step"], self.write(row))

    def evaluate_and_save(self, step: int) -> None:
        """Does what is due at a pause: measuring, recording, saving."""
        self._evaluate_if_due(step)
        multihost.from_first(functools.partial(self._keep, step))

    def _keep(self, step: int) -> None:
        """Records and saves, where that is due."""
        self._record_if_due(step)
        every = self.config.checkpoint.every
        if step == self.config.game.steps or (every and step % every == 0):
            self.save(step)

    def _evaluate_if_due(self, step: int) -> None:
        """Measures Q before it trains and between; the last is of the file.

        Not when asked to stop: saving comes first, and the next start measures.
        """
        config = self.config
        due = step in evaluation_steps(config) and 0 < step < config.game.steps
        if due and not self.stop and step not in dict(self.measurements.history):
            top1 = self.measurements.measure_q(
                step, self._quantize(game.to_deploy(self.state), self.p_variables)
            )
            if top1 is not None:
                mention(f"{self.label}step {step}: Q top-1 {top1:.2f} %")
                self.events.write(step, {"q_top1": top1})

    def _record_if_due(self, step: int) -> None:
        """Records for the report, at the steps at which Q is evaluated."""
        if self.recorder and self.recorder.is_due(step) and not self.stop:
            q_top1 = dict(self.measurements.history).get(step)
            self.recorder.record(self.state, self.p_variables, self.p_top1, q_top1)

    def save(self, step: int) -> None:
        """Saves, unless this step is saved already."""
        if step == self.saved:
            return
        self.top1_on[self.measurements.evaluated_on] = self.measurements.history
        record = {
            "seconds": self.seconds,
            "top1_on": self.top1_on,
        }
        self.checkpoints.save(step, self.state, record)
        self.saved = step
        self.workdir.publish()

    def _stop(self, step: int) -> None:
        def keep() -> None:
            self.save(step)
            self.workdir.publish()  # a step that was saved already publishes nothing

        multihost.from_first(keep)
        kept = f"saved at step {step}" if step else "nothing to save yet"
        raise Stopped(f"{kept}; repeat the command to resume")

    def finish(self, command: str) -> dict[str, Any]:
        """Writes Q's file and the summary; the accuracy is that of the file."""
        config, file = self.config, self.folder / folder.QUANTIZED_FILE
        size, variables = multihost.from_first(lambda: self._export(file))
        top1 = self.measurements.measure_q(config.game.steps, variables)
        if top1 is not None:
            self.events.write(config.game.steps, {"q_top1": top1})
        self.events.close()

        def summarise() -> dict[str, Any]:
            summary = results.summarise(
                config,
                p_top1=self.p_top1,
                history=self.measurements.history,
                seconds=self.seconds,
                size=size,
                digest=folder.sha256(file),
                command=command,
                devices=self.devices,
            )
            files.write_json(self.folder / folder.SUMMARY_FILE, summary)
            return summary

        return multihost.from_first(summarise)

    def _export(self, file: Path) -> tuple[int, Any]:
        """Writes Q's file; its size, and the variables that it holds."""
        config = self.config
        state = game.to_deploy(self.state)
        size = quantized_file.save_quantized(
            file,
            state.q_params,
            build.final_batch_stats(config, sharding.fetch(state), self.p_host),
            state.q_ranges,
            info=build.network_info(config),
            range_ema=config.quant.range_ema,
            shrinks=state.q_shrinks,
        )
        return size, sharding.fetch(quantized_file.load_quantized(file).variables)
