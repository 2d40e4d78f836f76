"""Reading of a run's workdir for the report."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from adadfq_jax import settings
from adadfq_jax.errors import InputError
from adadfq_jax.report import snapshot
from adadfq_jax.report.snapshot import Snapshot
from adadfq_jax.teacher import hub
from adadfq_jax.training import workdir as folder

# Keys that every run's configuration has.
_REQUIRED = (
    *("quant.weight_bits", "game.steps", "game.observe_steps", "game.warmup_steps"),
    *("game.batch_rule", "game.batch_size", "recipe", "seed", "teacher.model"),
    *("teacher.num_classes", "teacher.path", "eval.data_dir", "eval.dataset"),
    "eval.split",
)


class Run(NamedTuple):
    """A run, finished or not.

    Attributes:
      name: title of the run.
      config: values by dotted key.
      summary: of the run; None where it is not finished.
      rows: of metrics.jsonl.
      snapshots: in the order of the steps.
      sizes: bytes by file.
      command: that started the run; '' where it is not known.
      failure: step and term in which a number was not finite, or ''.
      notes: sentences on files that could not be read.
      sensitivity: contents of sensitivity.json; None where there is none.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any] | None
    rows: list[dict[str, Any]]
    snapshots: list[Snapshot]
    sizes: dict[str, int]
    command: str
    failure: str
    notes: list[str]
    sensitivity: dict[str, Any] | None = None

    @property
    def bits(self) -> str:
        """The label of the bits, see `settings.bits_label`."""
        names = ["weight_bits", "act_bits", "first_last_bits", "places"]
        names += ["layer_bits", "budget"]
        return settings.bits_label(*(self.config.get(f"quant.{k}", 0) for k in names))

    @property
    def step(self) -> int:
        """The last step that was logged or recorded."""
        steps = [row["step"] for row in self.rows] + [s.step for s in self.snapshots]
        return max(steps, default=0)

    @property
    def p_top1(self) -> float | None:
        """P's accuracy in per cent, None where it was not measured."""
        if self.summary:
            return self.summary["p_top1"]
        return next((s.p_top1 for s in self.snapshots if _is_number(s.p_top1)), None)

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Pairs (step, top-1 of Q in per cent), in the order of the steps."""
        if self.summary:
            found = self.summary["evaluations"]
            return [(entry["step"], entry["q_top1"]) for entry in found]
        return [(s.step, s.q_top1) for s in self.snapshots if _is_number(s.q_top1)]

    @property
    def before(self) -> float | None:
        """Q's accuracy before it trained, in per cent."""
        return dict(self.evaluations).get(self.config["game.warmup_steps"])


def _is_number(value: float) -> bool:
    return not math.isnan(value)


def read(workdir: Path, name: str = "") -> Run:
    """Read a run's folder.

    Args:
      workdir: the run's folder.
      name: a title for the run; by default its folder's name.

    Raises:
      InputError: there is no run, or a file of it is damaged.
    """
    config_file = workdir / folder.CONFIG_FILE
    if not config_file.is_file():
        raise InputError(f"{config_file}: no such file; a run's folder is needed")
    config = settings.flatten(folder.read_json(config_file))
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise InputError(
            f"{config_file}: not a run's configuration; {missing[0]} is missing"
        )
    summary_file = workdir / folder.SUMMARY_FILE
    summary = folder.read_json(summary_file) if summary_file.exists() else None
    if summary and summary.get("steps") != config["game.steps"]:
        summary = None  # it is of an earlier run with fewer steps
    notes: list[str] = []
    p = config["teacher.path"]
    files = {
        "P, float32": hub.in_cache(p) if hub.is_hub(p) else Path(p),
        "Q": workdir / folder.QUANTIZED_FILE,
    }
    command = workdir / folder.COMMAND_FILE
    return Run(
        name=name or workdir.resolve().name,
        config=config,
        summary=summary,
        rows=_read_rows(workdir / folder.METRICS_FILE, notes),
        snapshots=_read_snapshots(workdir, notes),
        sizes={
            k: path.stat().st_size
            for k, path in files.items()
            if path and path.is_file()
        },
        command=command.read_text().strip() if command.exists() else "",
        failure=folder.failure_of(workdir),
        notes=notes,
        sensitivity=_read_sensitivity(workdir / folder.SENSITIVITY_FILE, notes),
    )


def _read_sensitivity(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return folder.read_json(path)
    except InputError:
        notes.append(f"{path.name} is damaged and left out.")
        return None


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            notes.append(f"A line of {path.name} is damaged and left out.")
    return rows


def _read_snapshots(workdir: Path, notes: list[str]) -> list[Snapshot]:
    found = []
    for step in snapshot.steps(workdir):
        try:
            found.append(snapshot.read(snapshot.path_of(workdir, step)))
        except Exception:  # damage can raise any error of zipfile, zlib and numpy
            notes.append(f"The recording of step {step} is damaged and left out.")
    return found
