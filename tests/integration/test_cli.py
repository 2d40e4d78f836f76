"""The installed command: its helps, its refusals, its form in messages."""

import sys

import pytest

from adadfq_jax import cli
from tests import helpers, runs

HELPS = """
import sys
from adadfq_jax import cli
for name in [None, *cli.HELP]:
    sys.argv = ["adadfq", *([name] if name else []), "--help"]
    cli.main()
assert "jax" not in sys.modules
"""
DEFINED = """
import importlib, sys
from absl import flags
importlib.import_module(sys.argv[1])
print(*(f.name for f in flags.FLAGS.flags_by_module_dict()[sys.argv[2]]))
"""


def adadfq(*arguments):
    return runs.run([sys.executable, "-m", "adadfq_jax.cli", *arguments])


def test_helps_are_for_people_and_do_not_wait_for_jax():
    done = runs.run([sys.executable, "-c", HELPS])
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in cli.HELP:
        assert f"\n  {name} " in done.stdout  # in the list of subcommands
        assert f"\n    adadfq {name} " in done.stdout  # its example
    assert "cifar100_resnet20, cifar10_resnet20" in done.stdout
    assert "{" not in done.stdout
    assert adadfq().stdout.strip() == cli.overview()
    assert adadfq("sample", "-h").stdout.strip() == cli.help_of("sample")
    assert adadfq("--version").stdout.startswith("adadfq_jax ")


@pytest.mark.parametrize("module", ["main", "ablate", "benchmark.__main__"])
def test_the_helps_name_every_flag_of_the_module(module):
    names = {
        name
        for name in cli.HELP
        if cli._MODULES.get(name, "adadfq_jax.main") == f"adadfq_jax.{module}"
    }
    module = f"adadfq_jax.{module}"
    done = runs.run([sys.executable, "-c", DEFINED, module, module])
    assert done.returncode == 0, done.stderr
    # --config of `main` is defined by what it shares with others.
    defined = {*done.stdout.split(), "config"} - {"mode", "version"}
    assert set().union(*map(cli.taken_flags, names)) == defined


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nope"], "'nope' is no subcommand of adadfq; those are train, evaluate,"),
        (["--workdir=x"], "'--workdir=x' is no subcommand"),
        (["train", "--nope"], "Unknown command line flag 'nope'"),
        (["train", "--count=3"], "adadfq train takes no --count"),
        (["train", "--config.game.steps_=3"], "config.game.steps "),
        (["train", "--config=resnet:w4a4"], "'resnet' is neither a file nor a config"),
        (["train", "--config", "cifar10_resnet20:w4"], "'w4' is not wKaK"),
        (["report", "--nodistributed"], "adadfq report takes no --distributed"),
        (["report", "x"], "'x': flags start with --"),
        (["compare", "x", "--out=y"], "adadfq compare needs two folders"),
        (["ablate", "--count=3"], "Unknown command line flag 'count'"),
        (
            ["ablate", "--config=x:w3a3", "--workdir=x", "--arm=a"],
            "write --config=x --bits=w3a3",
        ),
        (["benchmark", "--config=x:w3a3"], "cifar100_resnet20, ci"),
        (
            ["export", f"--file={helpers.GOLDEN / 'he_resnet20_legacy.th'}"],
            "as adadfq inspect --file=",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(arguments, named):
    runs.assert_refused(adadfq(*arguments), named)


def test_inspect_prints_the_command_in_the_form_that_was_called():
    told = adadfq("inspect", f"--file={helpers.GOLDEN / 'he_resnet20_legacy.th'}")
    assert told.returncode == 0, told.stderr
    command = told.stdout.split("quantize    yes:\n")[1]
    assert command.startswith("    adadfq train \\\n")
    assert "--config=any:w4a4 \\\n" in command
