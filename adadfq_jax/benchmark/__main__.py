r"""Measures the game's step against a plain JAX step and, with --torch, PyTorch's.

    python -m adadfq_jax.benchmark --json=benchmark.json

One process runs a step of each in turn and takes medians over --rounds. The reference
is in `reference.py`: two forward passes of Q, nearest upsampling and then a
convolution, one gradient per player, jitted, without donated buffers. Both start from
the same state, and their results are compared.

With --device it measures a GPU or a TPU instead, see `device.py`.
"""

import platform
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from adadfq_jax import config as packaged
from adadfq_jax.errors import InputError
from adadfq_jax.jobs import command_line
from adadfq_jax.runtime import allocator

_CONFIGS = flags.DEFINE_multi_string(
    "config",
    None,
    "A packaged configuration or a file, with its argument; by default all packaged"
    " ones.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Number of timed steps of each.", 1)
_TORCH = flags.DEFINE_bool("torch", False, "Measure an eager PyTorch step as well.")
_BATCHES = flags.DEFINE_list("batch", [], "Measure at these batch sizes, too.")
_DEVICES = flags.DEFINE_list("devices", [], "Measure on so many virtual devices, too.")
_JSON = flags.DEFINE_string("json", None, "A file for all figures.")
_START_UP = flags.DEFINE_bool("start_up", True, "Measure start-up time and memory.")
_IMAGES = flags.DEFINE_integer("images", 2000, "Images of the evaluation.", 1)
_DEVICE = flags.DEFINE_bool("device", False, "Measure a GPU or a TPU instead.")
_OUT = flags.DEFINE_string("out", "runs/device", "With --device: a folder for figures.")
_BUDGET = flags.DEFINE_float("budget", 440.0, "With --device: seconds it may take.", 0)
_QUICK = flags.DEFINE_bool(
    "quick", False, "With --device: a tiny network, also on CPU."
)

MOST_OVER_TORCH = 1.15  # the reference is fair up to this multiple of PyTorch's time


def measure_config(config: ConfigDict, **what: Any) -> dict[str, Any]:
    """Measure a configuration; return JSON values. For `what` see `_measure_spec`."""
    from adadfq_jax.jobs.configuration import resolved

    with resolved(config) as spec:
        return _measure_spec(spec, **what)


def _measure_spec(
    spec: Any,
    *,
    rounds: int,
    with_torch: bool,
    batches: list[int],
    devices: list[int],
    start_up: bool,
    images: int,
) -> dict[str, Any]:
    from adadfq_jax.benchmark import measure
    from adadfq_jax.game import Phase

    players = measure.Players(spec, spec.game.batch_size)
    found: dict[str, Any] = {
        "batch_size": spec.game.batch_size,
        "phases": {
            phase.value: players.phase(
                phase, rounds, with_torch and phase is Phase.BOTH
            )
            for phase in Phase
        },
        "flops": players.arithmetic(),
        "evaluation_images_per_second": measure.evaluation(
            spec, players.p_host, images
        ),
    }
    found["batches"] = {
        str(size): measure.Players(spec, size).phase(Phase.BOTH, rounds)
        for size in batches
    }
    found["devices"] = {
        str(n): measure.in_process(spec, devices=n, steps=rounds) for n in devices
    }
    if start_up:
        found["start_up"] = {
            name: measure.start_up(spec, name) for name in ("ours", "reference")
        }
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """Print the figures of a configuration as tables of at most 80 columns."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=80)
    table = Table(title=f"{name}, batch {found['batch_size']}: steps per second")
    for column in ("phase", "ours", "reference", "ratio", "torch", "ratio", "outputs"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    rows = [*found["phases"].items()]
    rows += [(f"both, batch {n}", row) for n, row in found["batches"].items()]
    for phase, row in rows:
        torch = row.get("torch_steps_per_second")
        table.add_row(
            phase,
            f"{row['ours_steps_per_second']:.2f}",
            f"{row['reference_steps_per_second']:.2f}",
            f"{row['against_reference']:.2f}",
            f"{torch:.2f}" if torch else "",
            f"{row['against_torch']:.2f}" if torch else "",
            "agree" if row["agreement"]["agree"] else "DIFFER",
        )
    console.print(table)
    over = found["phases"]["both"].get("reference_over_torch")
    if over is not None:
        verdict = "counts" if over <= MOST_OVER_TORCH else "does NOT count"
        console.print(
            f"The reference takes {over:.2f} times PyTorch's step: it {verdict}"
            f" (at most {MOST_OVER_TORCH})."
        )
    rest = Table(show_header=True)
    for column in ("", "ours", "reference"):
        rest.add_column(column, justify="right" if column else "left")
    rest.add_row("Gflop a step", *(f"{v / 1e9:.2f}" for v in found["flops"].values()))
    for state in ("cold", "warm") if "start_up" in found else ():
        ours, theirs = (found["start_up"][n][state] for n in ("ours", "reference"))
        for key, what in (
            ("compile", "trace, compile"),
            ("to_first_step", "to step 1"),
        ):
            cells = (f"{x[key]:.1f}" for x in (ours, theirs))
            rest.add_row(f"{what}, s, cache {state}", *cells)
        if state == "cold":
            cells = (f"{x['peak_megabytes']:.0f}" for x in (ours, theirs))
            rest.add_row("peak memory, MB", *cells)
    for count, row in found["devices"].items():
        rest.add_row(f"ms a step, virtual devices: {count}", f"{1e3 * row['step']:.0f}")
    rest.add_row(
        "evaluated images per second", f"{found['evaluation_images_per_second']:.0f}"
    )
    console.print(rest)


def _numbers(name: str, texts: list[str]) -> list[int]:
    if not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise InputError(f"--{name}={','.join(texts)}: numbers from 1 up are needed")
    return [int(text) for text in texts]


def _run() -> None:
    with_device = (_OUT, _BUDGET, _QUICK)
    without = (_CONFIGS, _ROUNDS, _TORCH, _BATCHES, _DEVICES, _JSON, _START_UP, _IMAGES)
    for flag in without if _DEVICE.value else with_device:
        if flag.present:
            raise InputError(
                f"--{flag.name}: only {'without' if _DEVICE.value else 'with'} --device"
            )
    if _DEVICE.value:
        from adadfq_jax.benchmark import device

        device.run(Path(_OUT.value).expanduser(), _BUDGET.value, _QUICK.value)
    else:
        _compare_steps()


def _compare_steps() -> None:
    batches = _numbers("batch", _BATCHES.value)
    devices = _numbers("devices", _DEVICES.value)
    # `any` needs a file of P.
    names = _CONFIGS.value or [n for n in packaged.names() if n != "any"]
    configs = {name: command_line.load_config(name) for name in names}
    # Here, so that --help and refusals do not wait for JAX.
    import jax

    from adadfq_jax.runtime import compile_cache, files

    compile_cache.enable()
    results: dict[str, Any] = {
        "machine": {
            "platform": jax.default_backend(),
            "device": jax.local_devices()[0].device_kind,
            "python": platform.python_version(),
            "jax": jax.__version__,
        },
        "rounds": _ROUNDS.value,
        "configs": {},
    }
    for name, config in configs.items():
        found = measure_config(
            config,
            rounds=_ROUNDS.value,
            with_torch=_TORCH.value,
            batches=batches,
            devices=devices,
            start_up=_START_UP.value,
            images=_IMAGES.value,
        )
        results["configs"][name] = found
        show(Path(name).name, found)
        if _JSON.value:
            files.write_json(Path(_JSON.value).expanduser(), results)
    if not all(
        row["agreement"]["agree"]
        for found in results["configs"].values()
        for row in (*found["phases"].values(), *found["batches"].values())
    ):
        command_line.leave(
            command_line.EXIT_NUMERICAL,
            "the step's outputs differ from the reference's",
        )


parse_flags = command_line.parse_flags


def main(argv: list[str]) -> None:
    """Run the command line."""
    del argv
    logging.set_verbosity(logging.ERROR)
    allocator.keep_freed_memory()  # as main.py does
    command_line.run(_run)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
