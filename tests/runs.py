"""The main job and other commands in processes of their own."""

import json
import os
import subprocess
import sys

from tests import compiling, jobs
from tests.jobs import ROOT


def command(*arguments) -> list[str]:
    """The main job's command line."""
    return [sys.executable, "-m", "adadfq_jax.main", *map(str, arguments)]


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with so many CPU devices, quick to compile for."""
    return {**os.environ, "XLA_FLAGS": compiling.flags(devices)}


def run(command, devices=1, env=None, timeout=900, cwd=ROOT):
    """The finished process of a command, in the root by default, its output as text."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment(devices), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def main(*arguments, devices=1):
    """The finished process of the main job."""
    return run(command(*arguments), devices)


def start(arguments):
    """The process of the main job, just begun."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, text):
    """Reads what the process says up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said: {process.communicate()}")


def assert_refused(done, *named):
    """Exit code 2 and one line that has every one of `named`."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    for name in named:
        assert str(name) in lines[0], lines[0]


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def assert_same_result(workdir, finished):
    name = "quantized.safetensors"
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()
    ours, theirs = summary_of(workdir), summary_of(finished)
    for key in ("evaluations", "q_best_top1", "q_best_step", "q_before_top1", "sha256"):
        assert ours[key] == theirs[key], key
    steps = jobs.steps(workdir)
    assert steps == sorted(set(steps))
    assert set(steps) >= set(jobs.steps(finished))
