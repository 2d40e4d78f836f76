"""The main job: plays the game of a configuration and writes its workdir."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from adadfq_jax import build, events, export, files, game, outcome, results, sharding
from adadfq_jax import workdir as folder
from adadfq_jax.build import Steps
from adadfq_jax.checkpoint import Checkpoints
from adadfq_jax.errors import Stopped
from adadfq_jax.events import Events
from adadfq_jax.game import GameState, Phase
from adadfq_jax.metrics import MetricsLog, interval_means
from adadfq_jax.progress import Progress, mention, say
from adadfq_jax.report import run_page
from adadfq_jax.report.record import Recorder, Subject
from adadfq_jax.stop import StopRequest


def phase_at(step: int, game_config: ConfigDict) -> Phase:
    """The phase of step `step`, counted from 0."""
    if step >= game_config.warmup_steps:
        return Phase.BOTH
    again = game_config.warmup_steps - game_config.reobserve_steps
    observing = step < game_config.observe_steps or step >= again
    return Phase.OBSERVE if observing else Phase.G_ONLY


def phase_ends(game_config: ConfigDict) -> list[int]:
    """Steps at which a phase is over; the last is the number of steps."""
    warmup = game_config.warmup_steps
    again = warmup - game_config.reobserve_steps
    ends = {game_config.observe_steps, again, warmup, game_config.steps}
    return sorted(end for end in ends if 0 < end <= game_config.steps)


def evaluation_steps(config: ConfigDict) -> list[int]:
    """Steps after which Q is evaluated: before it trains, between, and the last."""
    start, end = config.game.warmup_steps, config.game.steps
    return sorted({int(s) for s in np.linspace(start, end, config.eval.between + 2)})


def next_pause(step: int, config: ConfigDict) -> int:
    """The next step after which the host waits for the device, to log or to save."""
    every = [config.log.every, config.checkpoint.every or config.game.steps]
    at = [n * (step // n + 1) for n in every]
    at += phase_ends(config.game)
    if config.eval.enabled:
        at += evaluation_steps(config)
    return min(end for end in at if end > step)


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


class _Sitting:
    """One start of a run: from its newest checkpoint to its end, or to a stop."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        p_host: Any,
        devices: Sequence[jax.Device],
        batch_size: int,
        measurements: outcome.Measurements,
        stop: StopRequest,
    ):
        self.config, self.workdir, self.stop = config, workdir, stop
        self.measurements, self.devices = measurements, devices
        self.started, self.earlier_seconds = time.time(), 0.0
        self.p_host = p_host
        self.top1_on: dict[str, list] = {}  # histories by evaluation set
        self.p_variables = sharding.replicate(p_host, devices)
        self.checkpoints = Checkpoints(
            workdir / folder.CHECKPOINTS, config.checkpoint.keep
        )
        self.saved = self.begin = 0
        self.p_top1: float | None = None
        self.events = Events(None)
        self.recorder = _make_recorder(config, workdir, batch_size, measurements)
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
        found, sentences = self.checkpoints.restore_newest(self.state)
        for sentence in sentences:
            say(f"WARNING: {sentence}")
        if self.recorder:
            self.recorder.resume(0 if found is None else found.step)
        if found is None:
            return
        folder.refuse_fewer(self.workdir, found.step, self.config.game.steps)
        self.state = sharding.replicate(found.state, self.devices)
        self.begin = self.saved = found.step
        self.earlier_seconds = found.record["seconds"]
        self.top1_on = found.record["top1_on"]
        history = self.top1_on.get(self.measurements.evaluated_on, [])
        self.measurements.history = [(step, top1) for step, top1 in history]
        mention(f"resuming at step {self.begin} of {self.config.game.steps}")

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
        log = MetricsLog(self.workdir / folder.METRICS_FILE, self.begin)
        if config.log.tensorboard:
            self.events = Events(self.workdir / events.FOLDER, self.begin)
        progress = Progress(total, self.begin)
        # A stop came before them.
        self._evaluate_if_due(self.begin)
        self._record_if_due(self.begin)
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
                log.write({"step": step, "phase": phase.value, **means})
                self.events.write(step, means)
                progress.update(step, means)
                self._evaluate_and_save(step)
        finally:
            progress.close()

    def _evaluate_and_save(self, step: int) -> None:
        self._evaluate_if_due(step)
        self._record_if_due(step)
        every = self.config.checkpoint.every
        if step == self.config.game.steps or (every and step % every == 0):
            self._save(step)

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
                mention(f"step {step}: Q top-1 {top1:.2f} %")
                self.events.write(step, {"q_top1": top1})

    def _record_if_due(self, step: int) -> None:
        """Records for the report, at the steps at which Q is evaluated."""
        if self.recorder and self.recorder.is_due(step) and not self.stop:
            q_top1 = dict(self.measurements.history).get(step)
            self.recorder.record(self.state, self.p_variables, self.p_top1, q_top1)

    def _save(self, step: int) -> None:
        if step == self.saved:
            return
        self.top1_on[self.measurements.evaluated_on] = self.measurements.history
        record = {
            "seconds": self.seconds,
            "top1_on": self.top1_on,
        }
        self.checkpoints.save(step, self.state, record)
        self.saved = step

    def _stop(self, step: int) -> None:
        self._save(step)
        kept = f"saved at step {step}" if step else "nothing to save yet"
        raise Stopped(f"{kept}; repeat the command to resume")

    def finish(self, command: str) -> dict[str, Any]:
        """Writes Q's file and the summary; the accuracy is that of the file."""
        config, file = self.config, self.workdir / folder.QUANTIZED_FILE
        state = game.to_deploy(self.state)
        size = export.save_quantized(
            file,
            state.q_params,
            build.final_batch_stats(config, sharding.fetch(state), self.p_host),
            state.q_ranges,
            info=build.network_info(config),
            range_ema=config.quant.range_ema,
            weight_range=config.quant.weight_range,
        )
        variables = export.load_quantized(file).variables
        top1 = self.measurements.measure_q(config.game.steps, variables)
        if top1 is not None:
            self.events.write(config.game.steps, {"q_top1": top1})
        self.events.close()
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
        files.write_json(self.workdir / folder.SUMMARY_FILE, summary)
        return summary


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


def _recorded(config: ConfigDict) -> dict[str, Any]:
    """The configuration for config.json; its paths hold from any folder."""
    recorded = config.to_dict()
    recorded["teacher"]["path"] = str(Path(config.teacher.path).resolve())
    if config.eval.data_dir:
        recorded["eval"]["data_dir"] = str(Path(config.eval.data_dir).resolve())
    return recorded


def run(
    config: ConfigDict,
    workdir: Path,
    stop: StopRequest | None = None,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Plays the whole game, from where an earlier start of it ended, if one did.

    Args:
      config: see `config.default_config`.
      workdir: gets config.json, identity.json, metrics.jsonl, checkpoints,
        quantized.safetensors, summary.json, then the files of
        `outcome.export_files` and report/index.html. One that is finished is left as
        it is.
      stop: looked at after every step.
      command: that asks for this run, for the summary and the report.

    Returns:
      The contents of summary.json.

    Raises:
      InputError: the configuration, P's file, the evaluation data or the workdir
        cannot be used.
      NumericalError: the game reached a number that is not finite.
      Stopped: `stop` asked for it.
      ExportError: an exported file does not compute what Q does; Q's is whole.
    """
    config = build.prepare(config)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    devices, batch_size = sharding.choose_devices(
        config.devices, config.game.batch_size, config.game.batch_rule
    )
    if config.log.tensorboard:
        events.need_writer()
    p_host = build.load_teacher(config)
    identity = build.identity(config, p_host, batch_size)
    folder.check(workdir, identity)
    summary = folder.finished(workdir, config.game.steps)
    fresh = summary is None
    if summary is None:
        measurements = outcome.Measurements(config, devices)
        with folder.occupy(workdir, identity):
            sitting = _Sitting(
                config,
                workdir,
                p_host,
                devices,
                batch_size,
                measurements,
                StopRequest() if stop is None else stop,
            )
            sitting.resume()
            files.write_json(workdir / folder.CONFIG_FILE, _recorded(config))
            if command:
                files.write_text(workdir / folder.COMMAND_FILE, command + "\n")
            p_top1 = sitting.p_top1 = measurements.p_top1(sitting.p_variables)
            mention(results.describe_teacher(config, p_top1))
            warning = (
                None if p_top1 is None else results.warn_of_teacher(config, p_top1)
            )
            if warning:
                say(warning)
            sitting.play()
            summary = sitting.finish(command)
    file = workdir / folder.QUANTIZED_FILE
    exported = outcome.export_files(config, file, workdir)
    if fresh and config.report.enabled:
        say(run_page.attempt(workdir))
    say(results.table(summary, file, exported))
    return summary
