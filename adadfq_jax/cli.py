"""The installed command `adadfq`, with its subcommands and their help.

    adadfq train --config=fashion_mnist_resnet20:w4a4 --workdir=runs/w4a4

A subcommand is a mode of `adadfq_jax.main`, or `adadfq_jax.ablate` or
`adadfq_jax.benchmark`. Those modules define the flags and do the work; this module has
the texts for `--help`. A subcommand takes exactly the flags that its help lists.
"""

import functools
import importlib
import re
import sys
import textwrap
from collections.abc import Callable

from absl import app, flags

from adadfq_jax.config import packaged
from adadfq_jax.jobs import command_line
from adadfq_jax.runtime import invocation
from adadfq_jax.runtime.versions import __version__

_TRAIN = """\
Quantizes a trained image classifier without any data.

    adadfq train --config=fashion_mnist_resnet20:w4a4 --workdir=runs/w4a4

Repeat the command to resume a run that was stopped.

  --config=NAME:wKaK     configuration, with bits of kernels and activations
  --config.KEY=VALUE     changes one key of it, after --config
  --keys                 list all keys and stop
  --workdir=FOLDER       folder of the run, local or as gs://BUCKET/RUN
  --quiet                show only warnings and results

For several processes that train together, each started with the same command:

  --distributed          on Cloud TPU, or started by Slurm or MPI
  --coordinator=HOST:PORT
                         elsewhere: where process 0 listens
  --processes=N          with --coordinator: number of processes
  --process_id=I         with --coordinator: number of this process, from 0
  --patience=SECONDS     how long to wait for the others, by default 300

NAME is a file, or one of: {names}.

Exit codes: 0 finished; 2 unusable input; 3 a number was not finite; 4 an
exported file does not compute what the quantized network does; 75 stopped by
SIGTERM or 130 by Ctrl-C, saved: repeat the command to resume; 1 stopped at
once: the last checkpoint counts.
"""

_EVALUATE = """\
Measures the top-1 accuracy of a full-precision or quantized file.

    adadfq evaluate --workdir=runs/w4a4
    adadfq evaluate --config=fashion_mnist_resnet20 --file=quantized.safetensors

On a folder of images without classes, it says how often the quantized network
answers as the full-precision one does.

  --workdir=FOLDER       measure both networks of this run
  --file=FILE            measure this file instead
  --config=NAME          configuration that names the evaluation set, by default
                         that of the run
  --config.KEY=VALUE     changes one key of it
  --keys                 list all keys and stop

Exit codes: 0 finished; 2 unusable input.
"""

_EXPORT = """\
Writes ONNX and StableHLO files of a quantized network.

    adadfq export --workdir=runs/w4a4
    adadfq export --file=quantized.safetensors

Each file is first compared with the quantized network, image by image.

  --workdir=FOLDER       export the network of this run, into this folder
  --file=FILE            export this file instead, into --workdir or beside it
  --config=NAME          configuration that names the evaluation set to compare
                         on, by default that of the run
  --config.KEY=VALUE     changes one key of it
  --keys                 list all keys and stop

Exit codes: 0 finished; 2 unusable input; 4 an exported file does not compute
what the quantized network does.
"""

_SAMPLE = """\
Writes images that the generator of a run makes.

    adadfq sample --workdir=runs/w4a4 --count=100

samples.npz has all images, samples.png some of them.

  --workdir=FOLDER       folder of the run, where the files go
  --count=N              number of images, by default 100
  --config=NAME:wKaK     configuration, by default that of the run
  --config.KEY=VALUE     changes one key of it
  --keys                 list all keys and stop

Exit codes: 0 finished; 2 unusable input.
"""

_SENSITIVITY = """\
Says which layers suffer most from few bits.

    adadfq sensitivity --workdir=runs/w4a4
    adadfq sensitivity --config=fashion_mnist_resnet20:w4a4

Each layer alone is quantized to 2, 3, 4 and 8 bits, on images of the run's
generator. sensitivity.json has all numbers, the run's report a figure.

  --workdir=FOLDER       folder of the run, where the file goes; a new folder,
                         or none, needs --config
  --config=NAME:wKaK     configuration, by default that of the run
  --config.KEY=VALUE     changes one key of it
  --keys                 list all keys and stop

Exit codes: 0 finished; 2 unusable input.
"""

_INSPECT = """\
Says what a file is, and which command quantizes it.

    adadfq inspect --file=resnet18.pth

  --file=FILE            a .pth, .pt, .th, .safetensors or .onnx file, or
                         hf://OWNER/NAME, of the Hugging Face Hub
  --config=NAME          configuration, which names the file and its network
  --config.KEY=VALUE     changes one key, as config.teacher.model; it works
                         without --config, too
  --keys                 list all keys and stop

Exit codes: 0 finished; 2 unusable input.
"""

_REPORT = """\
Writes report/index.html of a run, finished or not.

    adadfq report --workdir=runs/w4a4

  --workdir=FOLDER       folder of the run

Exit codes: 0 finished; 2 unusable input.
"""

_COMPARE = """\
Compares runs side by side, as a table and as a page.

    adadfq compare runs/w4a4 runs/w3a3 --out=compare.html

  --out=FILE             page that is written, by default compare.html

Exit codes: 0 finished; 2 unusable input.
"""

_ABLATE = """\
Compares recipes and options at equal steps, on paired seeds.

    adadfq ablate --config=fashion_mnist_resnet20 --workdir=runs/average \\
        --bits=w3a3,w4a4 --seeds=0,1,2 \\
        --arm=released --arm='average: game.q_average=0.99'

Repeat the command to resume a comparison that was stopped, or to add arms or
seeds.

  --config=NAME          configuration, without bits
  --workdir=FOLDER       folder of the comparison
  --arm='NAME: KEY=VALUE ...'
                         an arm and the keys that it sets; the first is the
                         baseline
  --set='KEY=VALUE ...'  keys of all arms
  --bits=wKaK,...        bits of kernels and activations, by default w4a4
  --seeds=N,...          seeds of every arm, by default 0
  --half=first|second    half of the evaluation set, by default the whole

NAME is a file, or one of: {names}.

Exit codes: those of adadfq train.
"""

_BENCHMARK = """\
Measures the training step against plain JAX and PyTorch.

    adadfq benchmark --config=cifar10_resnet20:w4a4 --json=benchmark.json

  --config=NAME:wKaK     configuration, may be repeated; by default all
  --rounds=N             number of timed steps of each, by default 20
  --torch                measure an eager PyTorch step as well
  --batch=N,...          measure at these batch sizes, too
  --devices=N,...        measure on so many virtual devices, too
  --images=N             images of the evaluation, by default 2000
  --start_up=false       leave out start-up time and memory
  --json=FILE            file for all figures

A GPU or a TPU is measured otherwise: steps of the game and reconstruction, in
float32, TF32 and bfloat16, until the time is over.

    adadfq benchmark --device

  --device               measure this machine's first GPU or TPU
  --out=FOLDER           folder for its figures, by default runs/device; repeat
                         the command to measure what was left out
  --budget=SECONDS       time that it may take, by default 440
  --quick                try it with a tiny network, also on a CPU

Exit codes: 0 finished; 2 unusable input; 3 the steps compute different numbers.
"""

HELP = {
    "train": _TRAIN,
    "evaluate": _EVALUATE,
    "export": _EXPORT,
    "sample": _SAMPLE,
    "sensitivity": _SENSITIVITY,
    "inspect": _INSPECT,
    "report": _REPORT,
    "compare": _COMPARE,
    "ablate": _ABLATE,
    "benchmark": _BENCHMARK,
}
_MODULES = {"ablate": "adadfq_jax.ablate", "benchmark": "adadfq_jax.benchmark.__main__"}
_HELP_FLAGS = {"-h", "-help", "--help"}


def overview() -> str:
    """Return the help of the command itself, with a line for each subcommand."""
    lines = [f"  {name:<12}{text.splitlines()[0]}" for name, text in HELP.items()]
    return "\n".join(
        [
            "Quantizes image classifiers without data (AdaDFQ).",
            "",
            "    adadfq train --config=fashion_mnist_resnet20:w4a4 --workdir=runs/w4a4",
            "",
            *lines,
            "",
            "adadfq SUBCOMMAND --help lists its flags, adadfq --version the version.",
        ]
    )


def help_of(name: str) -> str:
    """Return the help of a subcommand."""
    lines = HELP[name].rstrip().splitlines()
    names = ", ".join(packaged.names())
    filled = (
        textwrap.fill(line.format(names=names), 80) if "{names}" in line else line
        for line in lines
    )
    return "\n".join(filled)


def taken_flags(name: str) -> set[str]:
    """Return the names of the flags that a subcommand takes, which its help lists."""
    return set(re.findall(r"^  --(\w+)", HELP[name], re.MULTILINE))


def _parse(
    name: str, parse: Callable[[list[str]], list[str]], argv: list[str]
) -> list[str]:
    rest = parse(argv)
    given = (flag for flag in flags.FLAGS if flags.FLAGS[flag].present)
    for flag in given:
        if flag.partition(".")[0] not in taken_flags(name):
            command_line.leave(
                command_line.EXIT_BAD_INPUT,
                f"adadfq {name} takes no --{flag}; its --help lists its flags",
            )
    return rest


def main() -> None:
    """Run the subcommand that the process's arguments name."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in _HELP_FLAGS:
        print(overview())
    elif name == "--version":
        print(f"adadfq_jax {__version__}")
    elif name not in HELP:
        command_line.leave(
            command_line.EXIT_BAD_INPUT,
            f"{name!r} is no subcommand of adadfq; those are {', '.join(HELP)}",
        )
    elif _HELP_FLAGS & {*arguments}:
        print(help_of(name))
    else:
        invocation.use_subcommands()
        module = importlib.import_module(_MODULES.get(name, "adadfq_jax.main"))
        if name not in _MODULES:
            flags.FLAGS.set_default("mode", name)
        flags.FLAGS.set_gnu_getopt()  # flags may come after folders
        parse = functools.partial(_parse, name, module.parse_flags)
        app.run(module.main, argv=["adadfq", *arguments], flags_parser=parse)


if __name__ == "__main__":
    main()
