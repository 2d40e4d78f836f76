"""The main job and other commands, in this process or in processes of their own."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import warnings
from unittest import mock

import jax
from absl import flags

from adadfq_jax.jobs import command_line
from adadfq_jax.runtime import allocator, progress
from tests import compiling, jobs
from tests.jobs import ROOT

MAIN, ABLATE = "adadfq_jax.main", "adadfq_jax.ablate"


def command(*arguments) -> list[str]:
    """The main job's command line."""
    return [sys.executable, "-m", MAIN, *map(str, arguments)]


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


def main_apart(*arguments, devices=1):
    """The finished process of the main job."""
    return run(command(*arguments), devices)


class _Heard(io.StringIO):
    """What is said; a text, said for the n-th time, sends a signal to this process."""

    def __init__(self, text=None, number=None, times=1):
        super().__init__()
        self._text, self._number, self._left = text, number, times

    def write(self, said):
        if self._text is not None and self._text in said:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), self._number)
        return super().write(said)


def main(*arguments, devices=1, signal_at=(), module=MAIN):
    """The same in this process, which has imported all and shares compiled steps.

    module: the program.
    signal_at: a text, the signal that comes as soon as it is said, and how often it
      must be said, once by default.
    """
    _forget_flags()
    argv = [str(ROOT / f"{module.replace('.', '/')}.py"), *map(str, arguments)]
    out, err, code = _Heard(*signal_at), io.StringIO(), 0
    with (
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", argv),
        first_devices(devices),
        mock.patch.object(allocator, "keep_freed_memory"),
        _own_logger(),
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            program = importlib.import_module(module)
            program.main(program.parse_flags(argv))
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def first_devices(count=1):
    """This process as one that has so many devices."""
    there = jax.devices()[:count]
    with (
        mock.patch.object(jax, "devices", lambda: there),
        mock.patch.object(jax, "local_devices", lambda **_: there),
    ):
        yield


def _forget_flags():
    """Lets a program define its flags anew: absl parses them once and for all."""
    by_module = flags.FLAGS.flags_by_module_dict()
    own = [*by_module.get(MAIN, []), *by_module.get(ABLATE, [])]
    names = {flag.name for flag in own}
    for name in list(flags.FLAGS):
        if name in names or name.partition(".")[0] == "config":
            delattr(flags.FLAGS, name)
    for module in (MAIN, ABLATE):
        sys.modules.pop(module, None)
    command_line.config_file.cache_clear()


@contextlib.contextmanager
def _own_logger():
    """Leaves the package's logger as it was."""
    before = progress.log.level, progress.log.propagate, progress.log.handlers[:]
    yield
    progress.log.setLevel(before[0])
    progress.log.propagate, progress.log.handlers[:] = before[1:]


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
