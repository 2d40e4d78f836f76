"""Populations from the command line."""

import json
import signal

import pytest

from adadfq_jax.jobs import evaluate
from tests import jobs, runs
from tests.runs import start, wait_for

POPULATION = "--config.population=seed=0,1,2 game.q_rate=1e-3,1e-4,1e38"


NAMES = ("seed-0_q_rate-0.001", "seed-1_q_rate-0.0001", "seed-2_q_rate-1e+38")


@pytest.fixture(scope="module")
def played(job, tmp_path_factory):
    """A population whose third member fails, undisturbed: folder and process."""
    workdir = tmp_path_factory.mktemp("population") / "run"
    return workdir, runs.main(*job.arguments(f"--workdir={workdir}", POPULATION))


def test_each_member_leaves_a_workdir_and_the_failed_one_its_reason(job, played):
    workdir, done = played
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: member {NAMES[2]}: step ") and "2 others" in last
    for seed, name in enumerate(NAMES[:2]):
        summary = json.loads((workdir / name / "summary.json").read_text())
        config = json.loads((workdir / name / "config.json").read_text())
        assert summary["seed"] == config["seed"] == seed
        assert config["population"] == "" and len(summary["evaluations"]) == 4
        assert jobs.steps(workdir / name)[-1] == 20
        told = evaluate.evaluate(config, workdir / name / "quantized.safetensors")
        assert f"{summary['q_last_top1']:.2f} %" in told
    failed = workdir / NAMES[2]
    assert "not finite" in json.loads((failed / "failed.json").read_text())["failure"]
    assert not (failed / "quantized.safetensors").exists()
    whole = json.loads((workdir / "population.json").read_text())
    assert [row["name"] for row in whole["members"]] == list(NAMES)
    assert [bool(row["failure"]) for row in whole["members"]] == [False, False, True]
    assert "Its numbers failed: step" in (workdir / "compare.html").read_text()
    for name in NAMES:
        assert name in done.stdout


def test_a_stopped_population_goes_on_to_the_same_bytes(job, played, tmp_path):
    """Also after a kill between two members' saves, which leaves one ahead."""
    reference, workdir = played[0], tmp_path / "run"
    arguments = job.arguments(f"--workdir={workdir}", POPULATION)
    process = start(arguments)
    wait_for(process, "step 10/20")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, (out, err)
    assert "all saved at step" in err and "Traceback" not in err
    saved = [
        max((workdir / name / "checkpoints").iterdir(), key=lambda p: int(p.name))
        for name in NAMES[:2]
    ]
    assert saved[0].name == saved[1].name
    (saved[1] / "digest.sha256").unlink()
    done = runs.main(*arguments)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "resuming at step 8 of 20" in done.stdout
    for name in NAMES[:2]:
        file = f"{name}/quantized.safetensors"
        assert (workdir / file).read_bytes() == (reference / file).read_bytes()
        assert jobs.steps(workdir / name)[-1] == 20


def test_another_population_is_refused(job, played):
    other = "--config.population=seed=0,1"
    done = runs.main(*job.arguments(f"--workdir={played[0]}", other))
    runs.assert_refused(done, played[0], "population")
