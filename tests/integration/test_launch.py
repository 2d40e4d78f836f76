"""The launch scripts, with a virtual environment that only says what it is given."""

import shlex
import shutil
import subprocess

import pytest

from tests import programs
from tests.jobs import ROOT

PYTHON = """#!/bin/sh
[ "$2" = pip ] && exit 0
for argument in "$@"; do echo "$argument"; done
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts beside a .venv whose python prints its arguments."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=lambda *_: {"golden"})
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def arguments_of(clone, script, *given):
    done = subprocess.run(
        [clone / "launch" / script, *given], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("given", "config", "workdir"),
    [
        (
            [],
            "{root}/configs/fashion_mnist_resnet20.py:w4a4",
            "{root}/runs/{name}-w4a4",
        ),
        (
            ["--config=c/x.py:w3a3,paper"],
            "c/x.py:w3a3,paper",
            "{root}/runs/x-w3a3-paper",
        ),
        (["--config", "x.py:w2a2"], None, "{root}/runs/x-w2a2"),
        (["--workdir=w"], "{root}/configs/fashion_mnist_resnet20.py:w4a4", "w"),
        (["--config=x.py", "--workdir=w"], "x.py", "w"),
    ],
)
def test_config_and_workdir_are_added_only_where_absent(clone, given, config, workdir):
    said = arguments_of(clone, "local.sh", *given)
    assert said[:2] == ["-m", "adadfq_jax.main"]
    names = {"root": str(clone), "name": "fashion_mnist_resnet20"}
    assert [a for a in said if a.startswith("--workdir=")] == [
        f"--workdir={workdir.format(**names)}"
    ]
    if config:
        found = [a for a in said if a.startswith("--config=")]
        assert found == [f"--config={config.format(**names)}"]


def test_overrides_come_after_the_config_that_is_added(clone):
    said = arguments_of(clone, "local.sh", "--config.seed=1")
    positions = [i for i, a in enumerate(said) if a.startswith("--config=")]
    assert positions and positions[0] < said.index("--config.seed=1")


def test_a_dry_run_prints_the_command_and_makes_nothing(clone):
    python = clone / ".venv" / "bin" / "python"
    given = ["--config.seed=1", "--config.note=it's $HOME"]
    said = arguments_of(clone, "local.sh", *given)
    shutil.rmtree(clone / ".venv")
    (line,) = arguments_of(clone, "local.sh", given[0], "--dry-run", given[1])
    env, path, *command = shlex.split(line)
    assert (env, path.split(":")[0]) == ("env", f"PYTHONPATH={clone}")
    assert command == [str(python), *said]
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("given", "played"),
    [
        ([], []),
        (["-k", "quant"], ["-k", "quant"]),
        (["--unit"], ["tests/unit"]),
        (["-k", "quant", "--unit", "-x"], ["tests/unit", "-k", "quant", "-x"]),
    ],
)
def test_the_test_script_knows_the_unit_tier_and_passes_the_rest(clone, given, played):
    assert arguments_of(clone, "test.sh", *given) == ["-m", "pytest", *played]


def test_the_scripts_pass_shellcheck():
    scripts = [
        *ROOT.glob("launch/*.sh"),
        ROOT / "launch/slurm.sbatch",
        ROOT / ".ci/run",
    ]
    command = [programs.find("shellcheck"), "--external-sources", *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
