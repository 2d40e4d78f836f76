r"""Quantizes a trained image classifier without any data.

Play the game of a configuration; the same command resumes it:

    python -m adadfq_jax.main --config=configs/fashion_mnist_resnet20.py:w4a4 \
        --workdir=runs/w4a4

Measure a full-precision or a quantized file on the configuration's evaluation set:

    python -m adadfq_jax.main --mode=evaluate --config=configs/FILE.py --file=FILE

Export a quantized file to ONNX and StableHLO, beside it or into --workdir:

    python -m adadfq_jax.main --mode=export --file=quantized.safetensors

Write N images that the generator of a run makes, as samples.npz and samples.png:

    python -m adadfq_jax.main --mode=sample --workdir=runs/w4a4 --count=N

Say what a file is, whether it can be quantized, and what to type for it:

    python -m adadfq_jax.main --mode=inspect --config.teacher.path=FILE

Look at a run, finished or not: writes report/index.html in its folder:

    python -m adadfq_jax.main --mode=report --workdir=runs/w4a4

Several runs side by side, as a table and as compare.html in the current folder:

    python -m adadfq_jax.main --mode=compare [--out=FILE.html] DIR DIR ...

Any configuration key can be set, as in --config.game.lambda_l=0.2; --keys lists them.

Exit codes: 0 done; 2 input that cannot be used; 3 a number was not finite; 4 an
exported file does not compute what Q does; 75 stopped by SIGTERM and 130 by Ctrl-C,
both saved: the same command resumes; 1 stopped at once, by a second signal.
"""

import functools
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import adadfq_jax
from adadfq_jax import allocator, command_line, config, stop
from adadfq_jax.errors import InputError, Stopped

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with its argument after a colon."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "export", "sample", "inspect", "report", "compare"],
    "What to do.",
)
_FILE = flags.DEFINE_string(
    "file",
    None,
    "With --mode=evaluate: a P file or a quantized.safetensors. By default both of"
    " the run in --workdir, or config.teacher.path. With --mode=export: a"
    " quantized.safetensors, by default that of the run.",
)
_COUNT = flags.DEFINE_integer("count", 100, "With --mode=sample: how many images.")
_OUT = flags.DEFINE_string(
    "out", "compare.html", "With --mode=compare: the page that is written."
)
_QUIET = flags.DEFINE_bool("quiet", False, "Show warnings and results alone.")
_KEYS = flags.DEFINE_bool("keys", False, "List every configuration key and stop.")
_VERSION = flags.DEFINE_bool("version", False, "Print the version and stop.")


def _with_config(argv: list[str]) -> list[str]:
    """With --config of the defaults where --mode=inspect has none: it needs no recipe.

    (Overrides like --config.teacher.path can only be parsed beside a --config.)
    """
    inspects = any(argument.lstrip("-") == "mode=inspect" for argument in argv)
    if not inspects or any(a.lstrip("-").startswith("config=") for a in argv):
        return argv
    return [argv[0], f"--config={config.__file__}", *argv[1:]]


def _parse_flags(argv: list[str]) -> list[str]:
    return command_line.parse_flags(_with_config(argv))


def _needed_config() -> ConfigDict:
    """That of --config, or the one that an earlier run in --workdir was played by."""
    if _CONFIG.value is not None:
        return _CONFIG.value
    if _MODE.value == "export" and _WORKDIR.value is None and _FILE.value is not None:
        alone = config.default_config()
        alone.eval.enabled = False  # compared on random images
        return alone
    if _MODE.value == "train" or _WORKDIR.value is None:
        raise InputError("--config is needed, as in --config=configs/FILE.py:w4a4")
    from adadfq_jax import workdir

    file = Path(_WORKDIR.value) / workdir.CONFIG_FILE
    if not file.exists():
        raise InputError(f"{file}: no such file; --workdir must be that of a run")
    try:
        return config.from_json(workdir.read_json(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _needed_workdir() -> Path:
    if _WORKDIR.value is None:
        raise InputError("--workdir is needed: the folder of the run")
    return Path(_WORKDIR.value)


def _evaluate(run_config: ConfigDict) -> None:
    from adadfq_jax import modes, workdir

    found = [Path(run_config.teacher.path)]
    if _FILE.value is not None:
        found = [Path(_FILE.value)]
    elif _WORKDIR.value is not None:
        found.append(Path(_WORKDIR.value) / workdir.QUANTIZED_FILE)
    for file in found:
        if not file.is_file():
            raise InputError(
                f"{file}: no such file; --file, config.teacher.path or a finished run's"
                " --workdir must name what is measured"
            )
    for file in found:
        print(modes.evaluate(run_config, file), flush=True)


def _inspect(run_config: ConfigDict) -> None:
    from adadfq_jax import inspection

    file = _FILE.value or run_config.teacher.path
    if not file:
        raise InputError("--config.teacher.path is needed: the file to inspect")
    print(inspection.describe(Path(file), run_config.teacher.model))


def _export(run_config: ConfigDict) -> None:
    from adadfq_jax import modes, workdir

    if _WORKDIR.value is not None:
        folder = Path(_WORKDIR.value)
        file = Path(_FILE.value or folder / workdir.QUANTIZED_FILE)
    elif _FILE.value is not None:
        file = Path(_FILE.value)
        folder = file.parent
    else:
        raise InputError("--file is needed: a quantized.safetensors; or a --workdir")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the files go there")
    for line in modes.export_file(run_config, file, folder):
        print(line)


def _compare(folders: list[Path]) -> None:
    from adadfq_jax.report import compare

    print(compare.write(folders, Path(_OUT.value)))
    print(f"\npage: {_OUT.value}")


def _run(folders: list[Path]) -> None:
    """What --mode asks for; folders of runs are for --mode=compare."""
    if _MODE.value == "compare":
        _compare(folders)
        return
    if _MODE.value == "report":
        from adadfq_jax.report import run_page

        print(run_page.write(_needed_workdir()))
        return
    run_config = _needed_config()
    if _MODE.value == "inspect":
        _inspect(run_config)
        return
    allocator.keep_freed_memory()
    # Here, so that --help and refusals do not wait for JAX.
    from adadfq_jax import compile_cache

    compile_cache.enable()
    if _MODE.value == "evaluate":
        _evaluate(run_config)
    elif _MODE.value == "export":
        _export(run_config)
    elif _MODE.value == "sample":
        from adadfq_jax import modes

        for path in modes.sample(run_config, _needed_workdir(), _COUNT.value):
            print(path)
    else:
        from adadfq_jax import progress, train

        workdir = _needed_workdir()
        if _QUIET.value:
            progress.be_quiet()
        with stop.on_signals() as request:
            try:
                command = command_line.to_text(sys.argv)
                train.run(run_config, workdir, request, command=command)
            except Stopped as stopped:
                print(stopped, file=sys.stderr)
                sys.exit(request.exit_code)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if _VERSION.value:
        print(f"adadfq_jax {adadfq_jax.__version__}")
        return
    if _KEYS.value:
        print(config.reference())
        return
    # JAX and TFDS tell of every backend and reader that they did not find.
    logging.set_verbosity(logging.ERROR)
    folders = [Path(argument) for argument in argv[1:]]
    command_line.run(functools.partial(_run, folders))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
