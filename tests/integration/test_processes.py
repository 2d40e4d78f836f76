"""Several real processes on loopback that play one game."""

import socket
import subprocess
import sys

import pytest

from tests import jobs, runs
from tests.runs import wait_for

LONG = ["--config.game.steps=4000", "--config.log.every=5", "--config.eval.between=0"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments, count=2, devices=1, own=None):
    """The processes of a run; `own` gives arguments of one of them alone."""
    port = free_port()
    return [
        subprocess.Popen(
            runs.command(
                *arguments,
                f"--coordinator=127.0.0.1:{port}",
                f"--processes={count}",
                f"--process_id={index}",
                *(own or {}).get(index, []),
            ),
            cwd=jobs.ROOT,
            env=runs.environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def ends(started, timeout=300):
    """(exit code, stdout, stderr) of each."""
    said = [process.communicate(timeout=timeout) for process in started]
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def test_the_script_that_compares_them_with_one_process(job):
    """Shortened; by itself it plays a ResNet-20 in up to 4 processes x 2 devices."""
    script = [sys.executable, "tests/tools/several_processes.py", "--layouts=2x1"]
    arguments = [a for a in job.arguments() if a.startswith("--config")]
    done = runs.run([*script, *arguments], env={"PYTHONPATH": str(jobs.ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| 2 x 1 |") and row.endswith("| yes |")


def test_a_signal_to_one_stops_all_and_a_killed_one_ends_the_others(job, tmp_path):
    workdir = tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}", *LONG)
    started = start(arguments)
    wait_for(started[0], "step 10/4000")
    started[1].terminate()
    (code, _, err), (other_code, other_out, _) = ends(started)
    assert (code, other_code) == (75, 75), err
    assert "saved at step" in err
    # Process 0 alone speaks, beside the library that connects them.
    assert [x for x in other_out.splitlines() if "[Gloo]" not in x] == []
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert jobs.steps(workdir)[-1] == saved

    started = start(arguments)
    wait_for(started[0], f"resuming at step {saved} of 4000")
    wait_for(started[0], "/4000: ")
    started[1].kill()
    (code, _, err), _ = ends(started, timeout=120)
    assert code == 1, err
    assert "process 0 lost the others" in err
    assert "Traceback" not in err
    assert jobs.steps(workdir) == sorted(set(jobs.steps(workdir)))
    assert jobs.steps(workdir)[-1] > saved


JOINED = """
import os, signal
from adadfq_jax.runtime import multihost, signals
multihost.start("127.0.0.1:{port}", 1, 0)
with signals.on_signals() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    print("heard", request.heard)
"""


def test_a_signal_right_after_joining_is_heard():
    """JAX's own handler, of its preemption service, would take it."""
    done = runs.run([sys.executable, "-c", JOINED.format(port=free_port())])
    assert done.returncode == 0, done.stderr
    assert "heard 15" in done.stdout.replace("Signals.SIGTERM", "15")


def test_bad_input_of_one_ends_all(job, tmp_path):
    own = {1: [f"--config.teacher.path={tmp_path}/none.safetensors"]}
    started = start(job.arguments(f"--workdir={tmp_path}/run"), own=own)
    for code, out, err in ends(started, timeout=120):
        done = subprocess.CompletedProcess([], code, out, err)
        runs.assert_refused(done, f"{tmp_path}/none.safetensors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--distributed", "--processes=2"], "--processes"),
        (["--processes=2", "--process_id=0"], "--coordinator=HOST:PORT"),
        (["--distributed", "--mode=evaluate"], "--mode=evaluate"),
        (["--distributed"], "no Cloud TPU, Slurm or MPI"),
        (
            ["--coordinator=127.0.0.1:9", "--processes=2", "--process_id=1"],
            "did not find each other",
        ),
    ],
)
def test_processes_that_cannot_be_joined_are_refused(job, tmp_path, arguments, named):
    others = [f"--workdir={tmp_path}/run", "--patience=2"]
    done = runs.main_apart(*job.arguments(*others, *arguments))
    runs.assert_refused(done, named)
    assert not (tmp_path / "run").exists()
