r"""Quantizes a trained image classifier without any data.

Train with a configuration; the same command resumes a run that was stopped:

    python -m adadfq_jax.main --config=configs/fashion_mnist_resnet20.py:w4a4 \
        --workdir=runs/w4a4

A configuration of the package can also be given by name, from any folder:
--config=fashion_mnist_resnet20:w4a4. The installed command `adadfq` has these modes as
subcommands: `adadfq train`, `adadfq evaluate` and so on.

Train several networks at once, each in a folder of --workdir, with a table of all:

    python -m adadfq_jax.main --config=... --workdir=runs/seeds \
        --config.population='seed=0,1,2'

Measure a full-precision or a quantized file on the configuration's evaluation set:

    python -m adadfq_jax.main --mode=evaluate --config=configs/FILE.py --file=FILE

Export a quantized file to ONNX and StableHLO, into its folder or into --workdir:

    python -m adadfq_jax.main --mode=export --file=quantized.safetensors

Write N images that the generator of a run makes, as samples.npz and samples.png:

    python -m adadfq_jax.main --mode=sample --workdir=runs/w4a4 --count=N

Say which layers suffer most from few bits, on images of the run's generator; or, with
--config alone, on images of a generator that is trained for a moment:

    python -m adadfq_jax.main --mode=sensitivity --workdir=runs/w4a4

Say what a file is, whether it can be quantized, and what to type for it:

    python -m adadfq_jax.main --mode=inspect --config.teacher.path=FILE

Write report/index.html, a report of a run, finished or not, into the run's folder:

    python -m adadfq_jax.main --mode=report --workdir=runs/w4a4

Compare several runs, as a table and as compare.html in the current folder:

    python -m adadfq_jax.main --mode=compare [--out=FILE.html] DIR DIR ...

Several processes can train together. Each is started with the same command: by Cloud
TPU, Slurm or MPI with --distributed, anywhere else with

    --coordinator=HOST:PORT --processes=N --process_id=I

Any configuration key can be set, as in --config.game.lambda_l=0.2; --keys lists them.
--workdir may be on shared storage, as in gs://BUCKET/RUN.

Exit codes: 0 finished; 2 unusable input; 3 a number was not finite; 4 an exported file
does not compute what Q does; 75 stopped by SIGTERM, or 130 by Ctrl-C, and saved: repeat
the command to resume; 1 stopped at once, by a second signal or because another process
was lost: the last checkpoint counts.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import adadfq_jax
from adadfq_jax import config
from adadfq_jax.errors import ExportError, InputError, NumericalError, Stopped
from adadfq_jax.jobs import command_line
from adadfq_jax.runtime import allocator, invocation, progress, signals

if TYPE_CHECKING:  # at run time, importing JAX takes long
    from adadfq_jax.recipes import Recipe

T = TypeVar("T")

_CONFIG = command_line.define_config(
    "A packaged configuration or a file, with its argument after a colon, as in"
    " fashion_mnist_resnet20:w4a4."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        *("train", "evaluate", "export", "sample", "sensitivity"),
        *("inspect", "report", "compare"),
    ],
    "What to do.",
)
_FILE = flags.DEFINE_string(
    "file",
    None,
    "With --mode=evaluate: a file of P or a quantized.safetensors, by default both of"
    " the run in --workdir, or config.teacher.path. With --mode=export: a"
    " quantized.safetensors, by default the file of the run.",
)
_COUNT = flags.DEFINE_integer("count", 100, "With --mode=sample: number of images.")
_OUT = flags.DEFINE_string(
    "out", "compare.html", "With --mode=compare: the page to write."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train together with the processes that Cloud TPU, Slurm or MPI started.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Train together with other processes: HOST:PORT, where process 0 listens.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "With --coordinator: number of processes."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator: number of this process, from 0."
)
_PATIENCE = flags.DEFINE_integer(
    "patience", 300, "Seconds to wait for the other processes at the start."
)
_QUIET = flags.DEFINE_bool("quiet", False, "Show only warnings and results.")
_KEYS = flags.DEFINE_bool("keys", False, "List every configuration key and stop.")
_VERSION = flags.DEFINE_bool("version", False, "Print the version and stop.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags, see `command_line.parse_flags`.

    Without --config, its default is `any`: the flags --config.KEY exist only once a
    configuration is known. `_needed_config` says which one they then change.
    """
    return command_line.parse_flags(argv, default_config="any")


def _needed_config(folder: Path | None) -> ConfigDict:
    """Return the configuration of --config, or else of the earlier run in `folder`.

    A file that is inspected, or exported without a folder, needs neither.
    """
    flag = flags.FLAGS["config"]
    alone = _MODE.value == "inspect" or (_MODE.value == "export" and folder is None)
    if alone or not flag.using_default_value:
        return _CONFIG.value
    if _MODE.value == "train" or folder is None:
        raise InputError("--config is needed, as in --config=cifar10_resnet20:w4a4")
    from adadfq_jax.training import workdir

    file = folder / workdir.CONFIG_FILE
    if file.exists():
        try:
            found = config.from_json(workdir.read_json(file))
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    elif _MODE.value == "export" and _FILE.value is not None:
        found = config.default_config()  # the folder only receives the files
    else:
        raise InputError(f"{file}: no such file; --workdir must be a run's folder")
    if _MODE.value == "export" and not (found.export.onnx or found.export.stablehlo):
        found.export.onnx = found.export.stablehlo = True  # the run left them to this
    given = config_flags.get_override_values(flag)
    if {"eval.dataset", "eval.data_dir"} & given.keys():
        found.eval.enabled = True  # the run may have measured nothing
    found.update_from_flattened_dict(given)
    return found


def _refuse_overrides() -> None:
    given = config_flags.get_override_values(flags.FLAGS["config"])
    if given:
        key = next(iter(given))
        raise InputError(f"--config.{key}: --mode={_MODE.value} reads no configuration")


def _needed(workdir: T | None) -> T:
    if workdir is None:
        raise InputError("--workdir is needed: the folder of the run")
    return workdir


def _evaluate(run_config: ConfigDict, folder: Path | None) -> Iterator[str]:
    from adadfq_jax.jobs import evaluate
    from adadfq_jax.teacher import hub
    from adadfq_jax.training import workdir

    found = [hub.located(_FILE.value or run_config.teacher.path)]
    if _FILE.value is None and folder is not None:
        found.append(folder / workdir.QUANTIZED_FILE)
    for file in found:
        if isinstance(file, Path) and not file.is_file():
            raise InputError(
                f"{file}: no such file; name a file with --file or config.teacher.path,"
                " or a finished run with --workdir"
            )
    if evaluate.has_no_labels(run_config, _own_recipe()):
        yield evaluate.agreement(run_config, found[-1], _own_recipe())
        return
    if len(found) > 1 and hub.is_hub(found[0]):
        try:
            hub.fetch(found[0], run_config.teacher.model)
        except InputError as error:  # Q can be measured without a network
            yield f"P is not measured: {error}"
            del found[0]
    for file in found:
        yield evaluate.evaluate(run_config, file, _own_recipe())


def _inspect(run_config: ConfigDict) -> str:
    from adadfq_jax.jobs import configuration, inspection

    file = _FILE.value or run_config.teacher.path
    if not file:
        raise InputError("--file is needed: the file to inspect")
    with configuration.keys_in_messages():
        given = run_config.teacher
        shape = given.image_shape
        description = inspection.describe(
            file, given.model, given.batch_norms, shape, given.key
        )
    return configuration.to_keys(description)


def _export(run_config: ConfigDict, folder: Path | None) -> list[str]:
    from adadfq_jax.jobs import exports
    from adadfq_jax.training import workdir

    if folder is not None:
        file = Path(_FILE.value or folder / workdir.QUANTIZED_FILE).expanduser()
    elif _FILE.value is not None:
        file = Path(_FILE.value).expanduser()
        folder = file.parent
    else:
        raise InputError("--file is needed: a quantized.safetensors; or a --workdir")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the files are written there")
    return exports.export_file(run_config, file, folder, _own_recipe())


def _compare(folders: list[str]) -> None:
    from adadfq_jax.report import compare
    from adadfq_jax.runtime import remote

    compare.labels(folders)  # so that folders are refused before any is fetched
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(remote.opened(name)).folder for name in folders]
        print(compare.write(places, Path(_OUT.value).expanduser(), folders))
    print(f"\npage: {_OUT.value}")


def _join_processes() -> bool:
    """Join the other processes that the flags name; tell whether there are any."""
    named = (_COORDINATOR, _PROCESSES, _PROCESS_ID)
    given = [f"--{flag.name}" for flag in named if flag.value is not None]
    if not given and not _DISTRIBUTED.value:
        return False
    if given and _DISTRIBUTED.value:
        raise InputError(f"--distributed finds out by itself: leave out {given[0]}")
    if _COORDINATOR.value is None and given:
        raise InputError(f"{given[0]} needs --coordinator=HOST:PORT")
    if _MODE.value != "train":
        raise InputError(f"--mode={_MODE.value} is for one process")
    from adadfq_jax.runtime import multihost

    multihost.start(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS_ID.value,
        patience=_PATIENCE.value,
    )
    if not multihost.is_first():
        progress.show(progress.NOTHING)
    return multihost.several()


def _train(run_config: ConfigDict) -> None:
    workdir = _needed(_WORKDIR.value)
    allocator.keep_freed_memory()  # before JAX is imported
    several = _join_processes()
    with signals.on_signals() as request:
        # Here, so that --help and refusals do not wait for JAX.
        from adadfq_jax.runtime import compile_cache, multihost

        # Only process 0 would fill the cache, and the others would compile alone. On
        # GPU, where processes share compilation, they would then wait for process 0.
        if not several:
            compile_cache.enable()
        known = (InputError, NumericalError, ExportError, Stopped, OSError)
        try:
            with multihost.none_left_behind(known):
                _play(run_config, workdir, request)
        except Stopped as stopped:
            if multihost.is_first():
                print(stopped, file=sys.stderr)
            sys.exit(request.exit_code)


def _play(run_config: ConfigDict, workdir: str, request: signals.StopRequest) -> None:
    from adadfq_jax.jobs import exports, population, train

    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    exports.require_packages(
        onnx=bool(overrides.get("export.onnx")),  # by default, ONNX is left out
        litert=run_config.export.target == "litert",
    )
    run = population.run if run_config.population else train.run
    command = invocation.repeated(sys.argv)
    run(run_config, workdir, request, command=command, recipe=_own_recipe())


def _own_recipe() -> Recipe | None:
    """Return the recipe that the configuration file's get_recipe() makes, or None."""
    if flags.FLAGS["config"].using_default_value:
        return None
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    return command_line.config_file(name.partition(":")[0]).recipe


def _read_run(folder: Path | None, title: str = "") -> Iterator[str]:
    """Run a mode that reads a run or a file; yield the lines to print."""
    if _MODE.value == "report":
        from adadfq_jax.report import run_page

        _refuse_overrides()
        yield str(run_page.write(_needed(folder), title))
        return
    allocator.keep_freed_memory()  # before JAX is imported
    run_config = _needed_config(folder)
    if _MODE.value == "inspect":
        yield _inspect(run_config)
        return
    from adadfq_jax.jobs import samples, sensitivity
    from adadfq_jax.runtime import compile_cache

    compile_cache.enable()
    if _MODE.value == "evaluate":
        yield from _evaluate(run_config, folder)
    elif _MODE.value == "export":
        yield from _export(run_config, folder)
    elif _MODE.value == "sensitivity":
        yield from sensitivity.measure(run_config, folder, _own_recipe())
    else:
        made = samples.sample(run_config, _needed(folder), _COUNT.value, _own_recipe())
        yield from map(str, made)


def _run(folders: list[str]) -> None:
    """Do what --mode asks for; `folders` of runs are for --mode=compare."""
    if _MODE.value == "train":
        _train(_needed_config(None))
        return
    _join_processes()  # it refuses flags for several processes
    if _MODE.value == "compare":
        _refuse_overrides()
        _compare(folders)
        return
    if _WORKDIR.value is None:
        for line in _read_run(None):
            print(line, flush=True)
        return
    from adadfq_jax.runtime import remote

    with remote.opened(_WORKDIR.value) as place:
        for line in _read_run(place.folder, place.title):
            print(place.with_name(line), flush=True)
        place.publish()


def main(argv: list[str]) -> None:
    """Run the command line."""
    if _VERSION.value:
        print(f"adadfq_jax {adadfq_jax.__version__}")
        return
    if _KEYS.value:
        print(config.reference())
        return
    # JAX and TFDS warn of every backend and reader that they do not find.
    logging.set_verbosity(logging.ERROR)
    progress.show(progress.RESULT if _QUIET.value else progress.STEPS)
    command_line.run(functools.partial(_run, argv[1:]))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
