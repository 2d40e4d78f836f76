"""Plays a game in several processes and compares it with one process.

    PYTHONPATH=. .venv/bin/python tests/tools/several_processes.py

For every layout PxD, P processes with D virtual CPU devices each that talk over
loopback: 20 steps of the game without quantization, and the main job with as many, to
its log and its file, beside those of a single process with P*D devices. Prints a row a
layout, with the largest relative differences over the steps.

* smooth: at rates of 1e-5, every term within 5 times what it moves by when the latents
  move by 1e-6 (largest of the phase), and 1e-4 of it. Last bits grow: four devices of
  several processes add in another order, which alone moves BN statistics by 2e-5 of
  them after 4 steps and by 5e-4 after 20, as much as the moved latents do.
* quantized: the same with 1e-3, which is what the golden games of tests/ allow.
* file: top-1 of both files within half a point.

--config=FILE and --config.KEY=VALUE choose another game. Exit code 0 if all rows hold.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

_GAME = "configs/fashion_mnist_resnet20.py:w4a4"
_CONFIG = config_flags.DEFINE_config_file("config", _GAME, "The game.")
_LAYOUTS = flags.DEFINE_list("layouts", ["2x1", "4x1", "2x2", "4x2"], "Which to play.")
_OUT = flags.DEFINE_string("out", None, "Of a player: where its terms go.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Of a player.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Of a player.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of a player.")

STEPS, OBSERVE = 20, 6  # Q trains after the observing steps
TERMS = ("margin", "disagreement", "agreement", "bn_stats", "generator", "student")
FILE_TOLERANCE = 0.5
# Of a term, beside what moved latents allow.
ALLOWED = {"smooth": 1e-4, "quantized": 1e-3}
JITTER = 1e-6
PATIENCE = 1800  # seconds for one layout
# Of the smooth game: at the released rates Adam, whose step is the sign of a gradient
# near 0, makes other images of last bits within some six steps.
RATES = {"game.g_rate": 1e-5, "game.q_rate": 1e-5}
RUN = {
    "game.steps": STEPS,
    "game.observe_steps": OBSERVE,
    "game.warmup_steps": OBSERVE,
    "reconstruction.iterations": 4,
    "reconstruction.images": 64,
    "eval.between": 0,
    "log.every": 1,
    "checkpoint.every": 0,
    "export.onnx": False,
    "export.stablehlo": False,
    "report.enabled": False,
}


def play(bits: bool, jitter: float = 0.0) -> list[list[float]]:
    """TERMS of the first steps, on the devices of all processes."""
    import jax

    from adadfq_jax import game
    from adadfq_jax.game import rollout
    from adadfq_jax.runtime import multihost, sharding
    from adadfq_jax.training import build
    from adadfq_jax.training.spec import resolve

    config = _CONFIG.value.copy_and_resolve_references()
    if not bits:
        config.update_from_flattened_dict(RATES)
    spec = resolve(config)
    jax.config.update("jax_default_matmul_precision", spec.matmul_precision)
    devices, batch_size = sharding.choose_devices(
        0, spec.game.batch_size, spec.game.batch_rule
    )
    if multihost.several():
        sharding.meet(devices)
    function, spec, _ = build.load_teacher(spec)
    assembly = build.assemble(spec, batch_size)
    parts = assembly.parts_with(axis_name=sharding.AXIS)
    if not bits:
        parts = parts._replace(q_options=game.QOptions(None, None))
    draw = assembly.draw

    def draw_jittered(key):
        batch = draw(key)
        moved = jax.random.normal(jax.random.fold_in(key, 3), batch.latents.shape)
        return batch._replace(latents=batch.latents * (1 + jitter * moved))

    one = rollout.make_game_step(
        game.make_play(**parts._asdict(), axis_name=sharding.AXIS),
        draw=draw_jittered if jitter else draw,
        axis_name=sharding.AXIS,
    )
    state = build.initial_state(assembly._replace(parts=parts), function.variables)
    if not bits:  # Q starts elsewhere, or there were nothing to disagree on
        rng = np.random.default_rng(0)
        moved = {
            name: np.asarray(x * (1 + 0.1 * rng.normal(size=x.shape)), x.dtype)
            for name, x in state.q_params.items()
        }
        state = state.replace(q_params=moved)
    fixed = assembly._replace(parts=parts).teacher(function.variables)
    state, fixed, key = sharding.replicate(
        (state, fixed, jax.random.key(spec.seed)), devices
    )
    rows = []
    for phase, count in (
        (game.Phase.OBSERVE, OBSERVE),
        (game.Phase.BOTH, STEPS - OBSERVE),
    ):
        step = sharding.parallel_step(functools.partial(one, phase=phase), devices)
        for _ in range(count):
            state, metrics = step(state, fixed, key)
            rows.append([float(metrics[term]) for term in TERMS])
    return rows


def play_and_write() -> None:
    """A player: one process of a layout, or the reference with its jittered game."""
    from adadfq_jax.jobs import train
    from adadfq_jax.runtime import multihost

    alone = _COORDINATOR.value is None
    if not alone:
        multihost.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
    config, out = _CONFIG.value, Path(_OUT.value)
    config.update_from_flattened_dict(RUN)
    found: dict = {"smooth": play(False)}
    if alone:
        found["moved smooth"] = play(False, JITTER)
        found["moved quantized"] = play(True, JITTER)
    found["top1"] = train.run(config, out.with_suffix(""))["q_last_top1"]
    if multihost.is_first():
        log = (out.with_suffix("") / "metrics.jsonl").read_text().splitlines()
        played = [row for row in map(json.loads, log) if "generator" in row]
        found["quantized"] = [[row[term] for term in TERMS] for row in played]
        out.write_text(json.dumps(found))


def run(command: list[str], processes: int, devices: int) -> None:
    """Runs a command in so many processes; ends the script if one fails."""
    kept = os.environ.get("XLA_FLAGS", "")
    flag = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{kept} {flag}"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
    started = [
        subprocess.Popen(
            [*command, *([*joined, f"--process_id={i}"] if processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in started]
    for number, process in enumerate(started):
        if process.returncode:
            sys.exit(
                f"error: process {number} of {processes} x {devices}: exit code"
                f" {process.returncode}\n{said[number]}"
            )


def player(processes: int, devices: int, others: list[str], folder: Path) -> dict:
    """By game, TERMS of the steps [STEPS, 6]; and the file's top-1 in per cent."""
    out = folder / f"{processes}x{devices}.json"
    run([sys.executable, __file__, f"--out={out}", *others], processes, devices)
    return {
        name: np.asarray(told) for name, told in json.loads(out.read_text()).items()
    }


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found - expected) / np.abs(expected)


def is_near(name: str, found: dict, reference: dict) -> bool:
    """Whether the terms of a game differ little enough from those of one process."""
    expected, moved = reference[name], reference[f"moved {name}"]
    errors, moves = np.abs(found[name] - expected), np.abs(moved - expected)
    parts = (slice(0, OBSERVE), slice(OBSERVE, STEPS))
    share = ALLOWED[name]
    allowed = [5 * moves[p].max(0) + share * np.abs(expected[p]) for p in parts]
    return bool((errors <= np.concatenate(allowed)).all())


def compare(layouts: list[str], others: list[str]) -> bool:
    """Prints a row a layout; whether all hold."""
    columns = [TERMS.index(name) for name in ("bn_stats", "generator")]
    references: dict[int, dict] = {}
    all_hold = True
    print(
        "| processes x devices | smooth: BN, G's loss, near | quantized: BN, G's loss,"
        " near | top-1 of the file, of one process's | holds |"
    )
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for layout in layouts:
            multihost, devices = map(int, layout.split("x"))
            total = multihost * devices
            if total not in references:
                references[total] = player(1, total, others, folder)
            reference = references[total]
            found = player(multihost, devices, others, folder)
            top1, expected = float(found["top1"]), float(reference["top1"])
            smooth, quantized = (
                relative(found[name], reference[name])[:, columns].max(0)
                for name in ALLOWED
            )
            near = [is_near(name, found, reference) for name in ALLOWED]
            holds = all(near) and abs(top1 - expected) <= FILE_TOLERANCE
            first, second, verdict = ("yes" if it else "NO" for it in (*near, holds))
            all_hold &= holds
            print(
                f"| {multihost} x {devices} | {smooth[0]:.1e}, {smooth[1]:.1e}, {first}"
                f" | {quantized[0]:.1e}, {quantized[1]:.1e}, {second}"
                f" | {top1:.2f}, {expected:.2f} | {verdict} |",
                flush=True,
            )
    return all_hold


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    if _OUT.value is not None:
        play_and_write()
        return
    others = [a for a in sys.argv[1:] if a.lstrip("-").startswith("config")]
    if not any(a.lstrip("-").startswith("config=") for a in others):
        others = [f"--config={_GAME}", *others]
    sys.exit(not compare(_LAYOUTS.value, others))


if __name__ == "__main__":
    app.run(main)
