"""Whole runs with workdirs on a storage that only etils.epath opens."""

import hashlib
import json
import signal

import pytest

from adadfq_jax.errors import InputError, NumericalError, Stopped
from adadfq_jax.jobs import train
from adadfq_jax.runtime import remote
from adadfq_jax.runtime.signals import StopRequest
from adadfq_jax.training import workdir as folder
from adadfq_jax.training.checkpoints import DIGEST_FILE
from tests import memory_path
from tests.jobs import tiny_config
from tests.memory_path import files_of


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", ())


@pytest.fixture
def bucket():
    return memory_path.empty_bucket()


def test_a_run_whose_numbers_fail_leaves_why_and_its_report(job, bucket, capsys):
    name = f"{bucket}/wild"
    wild = tiny_config(job, **{"game.q_rate": 1e38, "report.enabled": True})
    with pytest.raises(NumericalError) as failed:
        train.run(wild, name, command="typed")
    assert f"report: {name}/report/index.html" in capsys.readouterr().out
    files = files_of(name)
    assert json.loads(files["failed.json"]) == {"failure": str(failed.value)}
    page = files["report/index.html"].decode()
    assert "<title>wild: " in page and f"its numbers failed, {failed.value}" in page

    # The next start forgets it; stopped before its first step, it is published too.
    stop = StopRequest()
    stop.hear(signal.SIGTERM)
    with pytest.raises(Stopped):
        train.run(wild, name, stop, command="typed again")
    files = files_of(name)
    assert "failed.json" not in files
    assert files["command.txt"] == b"typed again\n"


def test_why_numbers_failed_counts_more_than_that_it_cannot_be_kept(
    job, bucket, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "leave_failure", full)
    with pytest.raises(NumericalError, match=r"step \d: not finite"):
        train.run(tiny_config(job, **{"game.q_rate": 1e38}), bucket)
    assert "WARNING: what the run came to is not kept" in capsys.readouterr().out


def test_a_run_there_is_played_on_from_there(job, bucket, capsys):
    saving = {"checkpoint.every": 4}
    train.run(tiny_config(job, **saving, **{"game.steps": 4}), bucket)
    there = files_of(bucket)
    assert there.keys() >= {"identity.json", "summary.json", "quantized.safetensors"}
    assert f"checkpoints/4/{DIGEST_FILE}" in there
    with pytest.raises(InputError, match=f"{bucket}: it holds another game"):
        train.run(tiny_config(job, seed=1), bucket)
    capsys.readouterr()
    summary = train.run(tiny_config(job, **saving, **{"game.steps": 8}), bucket)
    said = capsys.readouterr().out
    assert "resuming at step 4 of 8" in said
    assert f"{bucket}/" in "".join(said.split())  # the table wraps it
    files = files_of(bucket)
    assert f"checkpoints/8/{DIGEST_FILE}" in files
    assert json.loads(files["summary.json"]) == summary
    quantized = hashlib.sha256(files["quantized.safetensors"]).hexdigest()
    assert quantized == summary["sha256"]
    rows = files["metrics.jsonl"].decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [4, 8]
