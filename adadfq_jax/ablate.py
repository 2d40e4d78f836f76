r"""Compares recipes and options fairly: equal steps, paired seeds, a table.

    python -m adadfq_jax.ablate --config=configs/fashion_mnist_resnet20.py \
        --bits=w3a3,w4a4 --seeds=0,1,2 --workdir=runs/average \
        --arm=released --arm='average: game.q_average=0.99'

An arm is a name and the configuration keys that it sets; the first arm is the baseline.
`--set` sets keys of all arms. This process trains the runs one after the other, in
folders below --workdir. The same command resumes a comparison that was stopped or
killed, and arms and seeds can be added later. table.md, runs.csv and plot.png are
written again after each run.

Choose settings with --half=first and some seeds; then report them with --half=second,
the other half of the evaluation set, and with other seeds.

Exit codes are those of adadfq_jax.main.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from adadfq_jax.errors import InputError, Stopped
from adadfq_jax.jobs import command_line
from adadfq_jax.runtime import allocator, progress, signals

_CONFIG = flags.DEFINE_string(
    "config", None, "A packaged configuration or a file, without argument: see --bits."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the comparison.")
_ARMS = flags.DEFINE_multi_string("arm", [], "'NAME: KEY=VALUE KEY=VALUE'.")
_SET = flags.DEFINE_string("set", "", "'KEY=VALUE KEY=VALUE' for all arms.")
_BITS = flags.DEFINE_list("bits", ["w4a4"], "Bits of kernels and activations.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every arm.")
_HALF = flags.DEFINE_enum(
    "half", "whole", ["whole", "first", "second"], "Part of the evaluation set."
)

_SLICES = {"whole": "", "first": "[:50%]", "second": "[50%:]"}


def _compare(request: signals.StopRequest) -> None:
    from adadfq_jax.jobs import ablate
    from adadfq_jax.report import ablation, drawing

    if _CONFIG.value is None or _WORKDIR.value is None or not _ARMS.value:
        raise InputError("--config, --workdir and an --arm are needed")
    name, colon, argument = _CONFIG.value.partition(":")
    if colon:
        raise InputError(
            f"--config={_CONFIG.value}: write --config={name} --bits={argument}"
        )
    if "://" in _WORKDIR.value:
        raise InputError(f"--workdir={_WORKDIR.value}: must be a local folder")
    try:
        seeds = [int(seed) for seed in _SEEDS.value]
    except ValueError:
        raise InputError(f"--seeds={','.join(_SEEDS.value)}: must be numbers") from None
    drawing.need_matplotlib("the plot of a comparison")  # refuse before the training
    arms = [ablate.parse_arm(text) for text in _ARMS.value]
    common = ablate.parse_settings(_SET.value)
    file = command_line.config_file(_CONFIG.value)
    cells = ablate.cells(arms, _BITS.value, seeds)
    half = _SLICES[_HALF.value]
    specs = [
        ablate.configure(file.get_config, cell, common, half, file.recipe)
        for cell in cells
    ]
    folder, results = Path(_WORKDIR.value).expanduser(), []
    for number, (cell, spec) in enumerate(zip(cells, specs, strict=True), 1):
        print(f"run {number} of {len(cells)}: {cell.folder}", flush=True)
        results.append(ablate.play(cell, spec, folder / cell.folder, request))
        table = ablation.write(results, folder)
    print(table, end="", flush=True)


def _run() -> None:
    allocator.keep_freed_memory()
    # Here, so that --help and refusals do not wait for JAX.
    from adadfq_jax.runtime import compile_cache

    compile_cache.enable()
    with signals.on_signals() as request:
        try:
            _compare(request)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(request.exit_code)


parse_flags = command_line.parse_flags


def main(argv: list[str]) -> None:
    """Run the command line."""
    del argv
    logging.set_verbosity(logging.ERROR)
    progress.show()
    command_line.run(_run)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
