"""A run in its folder: resuming, logging, evaluating, saving and finishing it."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from adadfq_jax import game
from adadfq_jax.deploy import quantized_file
from adadfq_jax.deploy.network import QuantizedNetwork
from adadfq_jax.game import GameState
from adadfq_jax.reconstruction import calibration
from adadfq_jax.runtime import files, sharding
from adadfq_jax.runtime.progress import log
from adadfq_jax.runtime.remote import Workdir
from adadfq_jax.training import events, results, schedule, workdir
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.checkpoints import Checkpoint, Checkpoints
from adadfq_jax.training.events import Events
from adadfq_jax.training.images import draw_images, split
from adadfq_jax.training.measurements import Measurements
from adadfq_jax.training.metrics import MetricsLog
from adadfq_jax.training.reconstruct import (
    BlockError,
    Reconstruction,
    ReconstructionState,
)


class Recording(Protocol):
    """The interface of the report's recorder, see `report.record.Recorder`."""

    def resume(self, step: int) -> None:
        """Remove the recordings of steps after `step`."""

    def is_due(self, step: int) -> bool:
        """Tell whether a step to record has been reached since the last recording."""

    def record(
        self,
        step: int,
        state: Any,
        teacher: game.Teacher,
        q: game.QVariables,
        p_top1: float | None,
        q_top1: float | None,
    ) -> None:
        """Record the present state of G and Q."""


class Run:
    """A run in its folder, which can go on from its newest checkpoint.

    Every process has one, but only the primary process uses the folder.

    Args:
      assembly: the parts of the run.
      place: the folder of the run.
      teacher: P, on the devices.
      measurements: measures P and Q.
      reconstruction: the phase after the game, or None.
      recorder: records for the report, or None.
      stop: the request to stop; once it is true, nothing is evaluated or recorded.
      label: the beginning of the lines that the run prints.

    Attributes:
      label: the beginning of the lines that the run prints.
      p_top1: top-1 of P in per cent, or None before it is measured.
      steps: number of steps of the whole run: the game, and the reconstruction; a
        calibration counts as one step.
      block_errors: errors of the blocks that are reconstructed.
    """

    def __init__(
        self,
        assembly: Assembly,
        place: Workdir,
        teacher: game.Teacher,
        measurements: Measurements,
        *,
        reconstruction: Reconstruction | None = None,
        recorder: Recording | None = None,
        stop: Any = None,
        label: str = "",
    ):
        self.assembly, self.place, self.folder = assembly, place, place.folder
        self.measurements, self._recorder = measurements, recorder
        self.p_top1: float | None = None
        self.reconstruction = reconstruction
        self._calibrates = bool(assembly.spec.calibration.images)
        self.steps = assembly.spec.game.steps + self._calibrates
        if reconstruction is not None:
            self.steps = reconstruction.steps
        self.block_errors: list[BlockError] = []
        self._teacher = teacher
        self._stop, self.label = stop, label
        self._started, self._earlier_seconds = time.time(), 0.0
        self._top1_on: dict[str, list] = {}  # histories by evaluation set
        self._saved = 0
        self._log: MetricsLog | None = None
        self._events = Events(None)
        keep = assembly.spec.checkpoint.keep
        self.checkpoints = Checkpoints(self.folder / workdir.CHECKPOINTS, keep)
        options = assembly.parts.q_options
        self._quantize = jax.jit(
            functools.partial(game.q_variables, graph=assembly.graph, options=options)
        )

    def like(self, state: GameState) -> Callable[[int], Any]:
        """Return the function step -> a state like the one in the step's checkpoint."""
        if self.reconstruction is None:
            return lambda step: state
        return functools.partial(self.reconstruction.like, state, self._teacher)

    def find(self, state: GameState) -> tuple[Checkpoint | None, list[str]]:
        """Restore the newest undamaged checkpoint, and report each damaged one.

        Args:
          state: the state before the first step.

        Returns:
          The checkpoint or None, and a sentence for every damaged one.

        Raises:
          InputError: the checkpoint has another structure.
        """
        found, sentences = self.checkpoints.restore_newest(self.like(state))
        if self._recorder:
            self._recorder.resume(0 if found is None else found.step)
        return found, sentences

    def go_on_from(self, found: Checkpoint) -> None:
        """Continue with the history, block errors and seconds of a checkpoint.

        Raises:
          InputError: the checkpoint lies beyond the last step of the run.
        """
        workdir.refuse_fewer(self.folder, found.step, self.steps)
        self._saved = found.step
        errors = found.record.get("block_errors", ())
        self.block_errors = [BlockError(*error) for error in errors]
        self._earlier_seconds = found.record["seconds"]
        self._top1_on = found.record["top1_on"]
        history = self._top1_on.get(self.measurements.evaluated_on, [])
        self.measurements.history = [(step, top1) for step, top1 in history]
        log.info(f"{self.label}resuming at step {found.step} of {self.steps}")

    @property
    def seconds(self) -> float:
        """Seconds spent on the run, with earlier starts up to their last checkpoint."""
        return self._earlier_seconds + time.time() - self._started

    def open_log(self, begin: int) -> None:
        """Open the log, and TensorBoard's where `log.tensorboard` is set."""
        self._log = MetricsLog(self.folder / workdir.METRICS_FILE, begin)
        if self.assembly.spec.log.tensorboard:
            self._events.close()
            self._events = Events(self.folder / events.FOLDER, begin)

    def write_row(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the means of an interval to the log."""
        assert self._log is not None
        self._log.write({"step": step, **metrics})
        means = {k: v for k, v in metrics.items() if not isinstance(v, str)}
        self._events.write(step, means)

    def evaluate(self, step: int, state: GameState, _: Any = None) -> None:
        """Measure Q if its evaluation is due at this step.

        The last step is left out, because `measure_last` measures the network of the
        file. After a request to stop nothing is measured, so that saving comes first;
        the next start measures instead.
        """
        spec = self.assembly.spec
        due = step in schedule.evaluation_steps(spec) and 0 < step < self.steps
        due = due and spec.eval.measures
        if not due or self._stop or step in dict(self.measurements.history):
            return
        variables = self._quantize(game.to_deploy(state), self._teacher)
        top1 = self.measurements.measure_q(step, variables)
        if top1 is not None:
            log.info(f"{self.label}step {step}: Q top-1 {top1:.2f} %")
            self._events.write(step, {"q_top1": top1})

    def record(self, step: int, state: GameState, _: Any = None) -> None:
        """Record for the report if a recording is due and no stop was requested."""
        if self._recorder and self._recorder.is_due(step) and not self._stop:
            q_top1 = dict(self.measurements.history).get(step)
            q = self._quantize(game.to_deploy(state), self._teacher)
            self._recorder.record(step, state, self._teacher, q, self.p_top1, q_top1)

    def record_last(self, state: Any, variables: game.QVariables) -> None:
        """Record the network of the file, if the work after the game made it."""
        after = isinstance(state, ReconstructionState)
        if not (after or self._calibrates):
            return
        if self._recorder and self._recorder.is_due(self.steps):
            q_top1 = dict(self.measurements.history).get(self.steps)
            last = state.game if after else state
            self._recorder.record(
                *(self.steps, last, self._teacher, variables),
                *(self.p_top1, q_top1),
            )

    def is_due(self, step: int) -> bool:
        """Tell whether the state after `step` steps is saved, evaluated or recorded."""
        spec = self.assembly.spec
        at = schedule.saves(spec, self.steps) | set(schedule.evaluation_steps(spec))
        return step in at or bool(self._recorder and self._recorder.is_due(step))

    def close(self) -> None:
        """Close TensorBoard's file."""
        self._events.close()

    def save_if_due(self, step: int, state: Any, _: Any = None) -> None:
        """Save a checkpoint if one is due at this step."""
        if step in schedule.saves(self.assembly.spec, self.steps):
            self.save(step, state)

    def save(self, step: int, state: Any) -> None:
        """Save a checkpoint, unless this step or a later one is saved already."""
        if step <= self._saved:
            return
        self._top1_on[self.measurements.evaluated_on] = self.measurements.history
        record = {
            "seconds": self.seconds,
            "top1_on": self._top1_on,
            "block_errors": self.block_errors,
        }
        self.checkpoints.save(step, state, record)
        self._saved = step
        self.place.publish()

    def write_network(self, state: Any) -> tuple[int, Any]:
        """Write Q's file, and return its size in bytes and the variables in it."""
        network = freeze(self.assembly, state, self._teacher, self.reconstruction)
        file = network.save(self.folder / workdir.QUANTIZED_FILE)
        return file.stat().st_size, sharding.fetch(network.variables)

    def summarise(
        self, size: int, command: str, devices: Sequence[jax.Device]
    ) -> dict[str, Any]:
        """Write summary.json, and return its content."""
        file = self.folder / workdir.QUANTIZED_FILE
        summary = results.summarise(
            self.assembly.spec,
            p_top1=self.p_top1,
            history=self.measurements.history,
            block_errors=self.block_errors,
            seconds=self.seconds,
            layer_bits=dict(self.assembly.info.layer_bits),
            size=size,
            digest=workdir.sha256(file),
            command=command,
            devices=devices,
        )
        files.write_json(self.folder / workdir.SUMMARY_FILE, summary)
        return summary

    def measure_last(self, variables: Any) -> None:
        """Measure the network of the file, after the last step."""
        top1 = self.measurements.measure_q(self.steps, variables)
        if top1 is not None:
            self._events.write(self.steps, {"q_top1": top1})
        self.close()


def freeze(
    assembly: Assembly,
    state: GameState | ReconstructionState,
    teacher: game.Teacher,
    reconstruction: Reconstruction | None = None,
) -> QuantizedNetwork:
    """Make the quantized network of a state.

    Args:
      assembly: the parts of the run.
      state: a state of the game, or the state at the end of the reconstruction.
      teacher: P.
      reconstruction: the reconstruction that made the state, or None.
    """
    integers = ranges = None
    if isinstance(state, ReconstructionState):
        assert reconstruction is not None
        integers, ranges = reconstruction.quantized(state, teacher)
        state = state.game
    deployed = sharding.fetch(game.to_deploy(state))
    teacher, parameters = sharding.fetch(teacher), deployed.q_params
    if assembly.spec.calibration.images:
        parameters = {**parameters, **_calibrated(assembly, deployed, teacher)}
    return quantized_file.freeze(
        teacher,
        parameters,
        deployed.q_ranges if ranges is None else ranges,
        info=assembly.info,
        function=assembly.function,
        graph=assembly.graph,
        range_ema=assembly.spec.quant.range_ema,
        symmetric=assembly.spec.quant.symmetric,
        integers=integers,
    )


def _calibrated(
    assembly: Assembly, state: GameState, teacher: game.Teacher
) -> dict[str, jax.Array]:
    """Return Q's variables that are calibrated on images of G; all on the host."""
    spec = assembly.spec
    count = spec.calibration.images
    log.info(f"calibration: biases on {count:,} images")
    # Frames make errors of rounding unlike those of whole pictures.
    images = draw_images(assembly, state, spec.seed, count, 0.0)
    graph, options = assembly.graph, assembly.parts.q_options
    found = calibration.calibrate(graph, options, teacher, split(images))
    return sharding.fetch(found)
