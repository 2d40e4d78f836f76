"""A run that is stopped, killed or damaged ends as if nothing had happened."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from tests import jobs, runs
from tests.checkpointing import flip
from tests.runs import assert_same_result, start, summary_of, wait_for


def stopped_apart(arguments, text, number):
    """A process that gets a signal when it says the text."""
    process = start(arguments)
    wait_for(process, text)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def stopped_here(arguments, text, number):
    return runs.main(*arguments, signal_at=(text, number))


@pytest.mark.parametrize(
    ("stop", "number", "code"),
    [
        (stopped_apart, signal.SIGTERM, 75),
        (stopped_here, signal.SIGTERM, 75),
        (stopped_here, signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_the_same_command_resumes(
    job, finished, tmp_path, stop, number, code
):
    workdir = tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}")
    stopped = stop(arguments, "step 5/20", number)
    assert stopped.returncode == code, (stopped.stdout, stopped.stderr)
    assert "saved at step" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (workdir / "quantized.safetensors").exists()

    done = runs.main(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same_result(workdir, finished)


def test_a_second_signal_ends_the_run_at_once(job, tmp_path):
    process = start(job.arguments(f"--workdir={tmp_path / 'run'}"))
    wait_for(process, "P: tiny")
    process.send_signal(signal.SIGINT)
    assert "again to stop immediately" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 1


def test_a_signal_before_the_first_step_leaves_a_run_that_starts_anew(
    job, finished, tmp_path
):
    workdir = tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}")
    stopped = stopped_here(arguments, "P: tiny", signal.SIGTERM)
    assert stopped.returncode == 75, stopped.stderr
    assert "nothing to save yet" in stopped.stderr
    done = runs.main(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same_result(workdir, finished)


def test_kills_at_random_moments_end_in_the_same_bytes(job):
    """A shortened form of the script, whose default is 20 kills of a ResNet-20."""
    script = [sys.executable, "tests/tools/kill_and_resume.py", "--kills=2", "--seed=3"]
    done = runs.run(
        [*script, *job.arguments(*jobs.RECONSTRUCTED)],
        env={"PYTHONPATH": str(jobs.ROOT)},
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("2 kills, ") and last.endswith("2 ended in the same bytes")


def test_a_finished_workdir_prints_its_table_and_stays_as_it_is(job, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    done = runs.main(*job.arguments(f"--workdir={finished}", "--config.log.every=7"))
    assert done.returncode == 0, done.stderr
    assert "Q last" in done.stdout
    assert "step " not in done.stdout.split("Q before")[0]
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_more_steps_continue_a_finished_run(job, finished, tmp_path):
    """And end where a run of so many steps ends."""
    short, long = tmp_path / "short", tmp_path / "long"
    shutil.copytree(finished, short)
    more = "--config.game.steps=26"
    for workdir in (short, long):
        done = runs.main(*job.arguments(f"--workdir={workdir}", more))
        assert done.returncode == 0, done.stderr
    assert summary_of(short)["steps"] == 26
    assert summary_of(short)["sha256"] == summary_of(long)["sha256"]
    fewer = runs.main(*job.arguments(f"--workdir={short}"))
    runs.assert_refused(fewer, short, "26", "config.game.steps")


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(
    job, finished, tmp_path
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "quantized.safetensors").write_bytes(b"damaged")
    flip(workdir / "checkpoints" / "20")
    done = runs.main(*job.arguments(f"--workdir={workdir}"))
    assert done.returncode == 0, done.stderr
    assert f"{workdir}/checkpoints/20 is damaged" in done.stdout
    assert "resuming at step 16 of 20" in done.stdout
    assert_same_result(workdir, finished)


def test_a_number_that_is_not_finite_ends_the_run_with_its_step_and_terms(
    job, tmp_path
):
    workdir = tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}", "--config.game.q_rate=1e38")
    done = runs.main(*arguments)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    # The seventh is the first in which Q trains; its update is already too much.
    last = done.stderr.splitlines()[-1]
    step = int(last.split("step ")[1].split(":")[0])
    assert 7 <= step <= 8
    assert "not finite" in last and "config.game.q_rate" in last
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {4}
    assert max(jobs.steps(workdir)) <= step
    assert not (workdir / "quantized.safetensors").exists()
    failure = json.loads((workdir / "failed.json").read_text())["failure"]
    assert last == f"error: {failure}"
